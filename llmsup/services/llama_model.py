"""Which model a llama-server serves, by its own word, and whether it generates."""

import msgspec

PROPS_PATH = "/props"
COMPLETION_PATH = "/completion"
COMPLETION_BODY = msgspec.json.encode({"prompt": "Hello", "n_predict": 1, "cache_prompt": False})
_NOT_SUPPORTED = 501
"""What a server for embeddings or for ranking says to it."""


class _Props(msgspec.Struct, frozen=True):
    model_path: str = ""


_PROPS = msgspec.json.Decoder(_Props)


def parse_model(status: int, body: bytes) -> str:
    """The file of the model, by the answer to `/props`; empty where it does not tell."""
    if status != 200:
        return ""
    try:
        return _PROPS.decode(body).model_path
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ""


def fault(status: int, body: bytes) -> str:
    """What is wrong with an answer to the completion; empty where it is good, or refused.

    Whoever serves embeddings, or wants a key, does not generate for us and is well.
    """
    if status < 500 or status == _NOT_SUPPORTED:
        return ""
    said = body[:200].decode(errors="replace").strip()
    return f"it generates nothing: HTTP status {status} {said}".strip()
