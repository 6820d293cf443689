"""Serves the control API on the daemon's own event loop, on a Unix socket that only we may open."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

BACKLOG = 128
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


@contextlib.asynccontextmanager
async def serve(app: ASGIApp, socket_path: Path) -> AsyncIterator[None]:
    """Serve `app` for the length of the block; connections are accepted from its first line on.

    A stale socket is replaced: whoever calls this holds the daemon's lock. Raises OSError.
    """
    listener = _listen(socket_path)
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
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield
    finally:
        socket_path.unlink(missing_ok=True)  # first, so that nobody connects and is then cut off
        server.should_exit = True
        server.ending.set()
        await serving
        listener.close()


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
