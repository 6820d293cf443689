"""One question whether a service is ready, and what came of it."""

import asyncio
import errno
import json

from llmsup.config.units import duration
from llmsup.core.health import Outcome, ProbeResult
from llmsup.host.fetch import Response, connect, fetch
from llmsup.services.launch import Target, Via

# The shortage of this process, which says nothing about the one that is asked.
_OUR_OWN_ERRNOS = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EADDRNOTAVAIL}
)
_PASSED = ProbeResult(Outcome.PASSED)
_LOADING = ProbeResult(Outcome.LOADING, "loading its model")


async def probe(target: Target, timeout_s: float) -> ProbeResult:
    """Ask `target` once. Whatever goes wrong is a result; nothing is raised.

    `Via.ALIVE` passes: that a process is alive is known to whoever watches it.
    """
    try:
        return await _ask(target, timeout_s)
    except TimeoutError:
        return ProbeResult(Outcome.SILENT, f"no answer within {duration(timeout_s)}")
    except ConnectionRefusedError:
        reason = f"connection refused on {_address(target)}"
    except FileNotFoundError:
        reason = f"no socket at {_address(target)}"
    except OSError as error:
        if error.errno in _OUR_OWN_ERRNOS:
            return ProbeResult(Outcome.UNKNOWN, f"this daemon: {error.strerror}")
        reason = f"{_address(target)}: {error.strerror or error}"
    except ValueError as error:
        reason = f"{_address(target)}: {error}"
    return ProbeResult(Outcome.FAILED, reason)


async def _ask(target: Target, timeout_s: float) -> ProbeResult:
    match target.via:
        case Via.ALIVE:
            return _PASSED
        case Via.TCP:
            return await _connected(target, timeout_s)
        case Via.HTTP:
            return _judged(await fetch(target, timeout_s=timeout_s))


async def _connected(target: Target, timeout_s: float) -> ProbeResult:
    async with asyncio.timeout(timeout_s):
        connection = await connect(target)
    connection.close()
    return _PASSED


def _judged(response: Response) -> ProbeResult:
    if 200 <= response.status < 300:
        return _PASSED
    if response.status == 503 and _says_loading(response.body):
        return _LOADING
    return ProbeResult(Outcome.UNWELL, f"answered {response.status}")


def _says_loading(body: bytes) -> bool:
    """llama-server: `{"error": {"message": "Loading model", …}}`."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return False
    error = document.get("error") if isinstance(document, dict) else None
    return isinstance(error, dict) and error.get("message") == "Loading model"


def _address(target: Target) -> str:
    return str(target.unix_socket or f"{target.host}:{target.port}")


async def says_close(target: Target) -> bool:
    """Whether an HTTP server would close a connection that could stay: it is being drained."""
    try:
        return (await fetch(target, timeout_s=2, keep_alive=True)).closes
    except (OSError, ValueError):
        return False
