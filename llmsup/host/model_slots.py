"""Has a llama-server on a port of this machine save its slots, and restore them.

All raise OSError (TimeoutError is one) and ValueError where it does not, or says that it cannot.
"""

from collections.abc import Sequence

from llmsup.host.fetch import Response, fetch
from llmsup.services import llama_slots
from llmsup.services.launch import Target, Via

LOOK_TIMEOUT_S = 1.0


async def look(port: int) -> tuple[llama_slots.Held, ...]:
    """All its slots."""
    target = Target(Via.HTTP, port=port, path=llama_slots.LIST_PATH)
    answer = await fetch(target, timeout_s=LOOK_TIMEOUT_S)
    return llama_slots.parse_held(answer.status, answer.body)


async def save(port: int, slot: int, file: str, timeout_s: float) -> tuple[int, int]:
    """Save a slot. Returns how many tokens and bytes that is."""
    answer = await _act(port, slot, "save", file, timeout_s)
    return llama_slots.parse_saved(answer.status, answer.body)


async def restore(port: int, slot: int, file: str, timeout_s: float) -> int:
    """Restore a slot. Returns how many tokens that is."""
    answer = await _act(port, slot, "restore", file, timeout_s)
    return llama_slots.parse_restored(answer.status, answer.body)


async def cached(port: int, slot: int, tokens: Sequence[int], timeout_s: float) -> int:
    """Have it go on after these tokens. Returns how many of them it had in its cache."""
    target = Target(Via.HTTP, port=port, path=llama_slots.COMPLETION_PATH)
    body = llama_slots.trial_body(slot, tokens)
    answer = await fetch(target, timeout_s=timeout_s, method="POST", body=body)
    return llama_slots.parse_cached(answer.status, answer.body)


async def _act(port: int, slot: int, action: str, file: str, timeout_s: float) -> Response:
    target = Target(Via.HTTP, port=port, path=llama_slots.action_path(slot, action))
    body = llama_slots.action_body(file)
    return await fetch(target, timeout_s=timeout_s, method="POST", body=body)
