"""Which models run, told from what each server says it serves. Pure."""

from collections.abc import Sequence
from typing import Literal

from llmsup.control.wire import ModelInfo, Status
from llmsup.mcp.replies import About, Dual, Single

Kind = Literal["chat", "code"]
CHAT: Kind = "chat"
CODE: Kind = "code"
RUNNING = frozenset({"starting", "ready", "unready", "draining", "stopping"})
"""The states of a service that has a process."""
NOBODY: tuple[None, None] = (None, None)


def current(status: Status, models: Sequence[ModelInfo]) -> Dual | Single:
    """The answer of `get_current_model`.

    The phase is "dual" where a server for chat and one for code run both, "single" where one of
    them does; where neither does it is what the profile means. A server that loads runs and tells
    of no model yet.
    """
    chat, code = _of(CHAT, models), _of(CODE, models)
    running = {
        kind: info
        for kind, info in ((CHAT, chat), (CODE, code))
        if info is not None and info["state"] in RUNNING
    }
    daemon = status["daemon"]
    about: About = {
        "profile": daemon["profile"],
        "mode": daemon["mode"],
        "services": list(models),
    }
    if len(running) == 2 or (not running and daemon["mode"] == "dual"):
        return {
            "phase": "dual",
            "chat_model": chat["model"] if chat else None,
            "code_model": code["model"] if code else None,
            "service_chat": chat["service"] if chat else None,
            "service_code": code["service"] if code else None,
            **about,
        }
    kind, info = next(iter(running.items()), NOBODY)
    return {
        "phase": "single",
        "current_model": info["model"] if info else None,
        "model_type": kind,
        "service": info["service"] if info else None,
        **about,
    }


def _of(kind: str, models: Sequence[ModelInfo]) -> ModelInfo | None:
    """The service of that name, else the one that comes first on a route such as `chat-7b`."""
    named = [info for info in models if info["service"] == kind]
    routed = [info for info in models if (info["route"] or "").partition("-")[0] == kind]
    return next(iter([*named, *routed]), None)
