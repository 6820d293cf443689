"""A launch: all that is needed to start one service and to tell when it is ready."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from hashlib import sha256
from pathlib import Path

from llmsup.core.options import Options


class Via(Enum):
    """How readiness is found out."""

    HTTP = "http"  # 2xx passes; 503 while loading is "not yet"
    TCP = "tcp"  # a connection is accepted
    ALIVE = "alive"  # the process has stayed up for one period


@dataclass(frozen=True)
class Target:
    """What a probe asks: an address (host and port, or a Unix socket) and an HTTP path."""

    via: Via
    host: str = "127.0.0.1"
    port: int = 0
    unix_socket: Path | None = None
    path: str = "/"


@dataclass(frozen=True)
class Prompt:
    """What a server is asked once, before anybody else may ask: a path and a JSON document."""

    path: str
    body: bytes


@dataclass(frozen=True)
class Slots:
    """That a server can save its slots, and what tells which other one can restore them.

    `essence`: what it was told that a prompt cache depends on. `files`: what it consists of and has
    read. `keep_s`: for how long a saved slot is kept.
    """

    options: Options
    essence: str
    keep_s: float
    files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Launch:
    """argv, the variables set over the inherited environment, and what to probe.

    Before it is started, the `ports` it will listen on are seen to be free, and the headers of its
    `models` are looked at.
    `tells_work`: on the port of its target it has the endpoints of a llama-server.
    `may_wait`: it may be the client of somebody who takes long to answer.
    `configuration` tells what else would make it a different process: the content of its files, the
    version of its program. `once` are further arguments that make no difference of that kind.
    `grant`: what it was given of the card, which the next daemon reads off the process.
    `first_prompt` makes it take at once what else it would take only later. `slots`: None where its
    prompt cache is not kept.
    """

    argv: tuple[str, ...]
    target: Target
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: Path | None = None
    ports: tuple[int, ...] = ()
    tells_work: bool = False
    may_wait: bool = False
    configuration: str = ""
    once: tuple[str, ...] = ()
    models: tuple[Path, ...] = ()
    grant: str = ""
    first_prompt: Prompt | None = None
    slots: Slots | None = None

    @property
    def digest(self) -> str:
        """Tells launches apart that give different processes."""
        place = str(self.cwd or "")
        essence = repr((self.argv, sorted(self.env.items()), place, self.configuration))
        return sha256(essence.encode(errors="surrogateescape")).hexdigest()[:16]
