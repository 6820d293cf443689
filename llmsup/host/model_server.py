"""Asks a llama-server on a port of this machine what it serves, and for a token."""

from llmsup.host.fetch import fetch
from llmsup.services import llama_model
from llmsup.services.launch import Target, Via

PROPS_TIMEOUT_S = 3.0
TOKEN_TIMEOUT_S = 60.0


async def served_model(port: int, timeout_s: float = PROPS_TIMEOUT_S) -> str:
    """The file of its model; empty where it does not say so in time."""
    target = Target(Via.HTTP, port=port, path=llama_model.PROPS_PATH)
    try:
        answer = await fetch(target, timeout_s=timeout_s)
    except (OSError, ValueError):
        return ""
    return llama_model.parse_model(answer.status, answer.body)


async def token_fault(port: int) -> str:
    """What keeps it from generating one token; empty where nothing does."""
    target = Target(Via.HTTP, port=port, path=llama_model.COMPLETION_PATH)
    try:
        answer = await fetch(
            target, timeout_s=TOKEN_TIMEOUT_S, method="POST", body=llama_model.COMPLETION_BODY
        )
    except TimeoutError:
        return f"it generated nothing within {TOKEN_TIMEOUT_S:g} s"
    except (OSError, ValueError) as error:
        return f"it cannot be asked: {error}"
    return llama_model.fault(answer.status, answer.body)
