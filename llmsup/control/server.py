"""Serves the control API on the daemon's own event loop, on a Unix socket that only we may open."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

BACKLOG = 4096
"""All requests that may be held come again at once to a daemon that takes over."""
GRACE_S = 1


class _Server(uvicorn.Server):
    """A server that leaves the signals to the daemon, and sleeps while nobody asks."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ending = asyncio.Event()

    async def main_loop(self) -> None:
        """Instead of ten looks a second whether it should exit."""
        await self.ending.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Door:
    """The listening socket of a served application."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self.is_kept = False

    def keep_over_exec(self) -> int:
        """Have the next program listen, so that clients wait and none is refused.

        Returns the descriptor for it to `serve` on.
        """
        self.is_kept = True
        self._listener.set_inheritable(True)
        return self._listener.fileno()


@contextlib.asynccontextmanager
async def serve(
    app: ASGIApp, socket_path: Path, inherited: int | None = None
) -> AsyncIterator[Door]:
    """Serve `app` for the length of the block; connections are accepted from its first line on.

    `inherited`: the descriptor that the program we were before listened on. A stale socket is
    replaced: whoever calls this holds the daemon's lock. Raises OSError.
    """
    if inherited is None or not socket_path.exists():
        spare = _listen(socket_path)
    else:
        spare = socket.socket(fileno=inherited)
        spare.set_inheritable(False)
    door = Door(spare)
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        timeout_graceful_shutdown=GRACE_S,
    )
    server = _Server(config)
    # No await up to the block: what it does first is done before the first request is answered.
    serving = asyncio.create_task(server.serve(sockets=[spare.dup()]))  # closed by the server
    try:
        yield door
    finally:
        if not door.is_kept:
            socket_path.unlink(missing_ok=True)  # first, so that nobody connects and is cut off
        server.should_exit = True
        server.ending.set()
        await serving
        if not door.is_kept:
            spare.close()


def _listen(path: Path) -> socket.socket:
    """A listening socket at `path`, mode 0600 from its first moment whatever the umask."""
    fresh = path.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    umask = os.umask(0o177)
    try:
        listener.bind(str(fresh))
        listener.listen(BACKLOG)
        fresh.rename(path)
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(umask)
    return listener
