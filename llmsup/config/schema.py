"""The profile: what a person may write, as frozen types.

Every key of a profile is a field here and nothing else is accepted. Units are in the Python names
(`grace_period_s`) and in the written values (`grace_period = "10s"`). `config.load` turns TOML into
these types and lists every problem it finds; nothing else constructs them from user input.
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct, field

from llmsup.config.units import Share

_WITH_UNIT = 'with a unit, such as "250ms", "10s", "5m" or "1h"'

Seconds = Annotated[
    float, Meta(ge=0, extra={"unit": "duration"}, description=f"a duration {_WITH_UNIT}")
]
"""A duration, written with its unit: "250ms", "10s", "5m", "1h"."""

Timeout = Annotated[
    float,
    Meta(gt=0, extra={"unit": "duration"}, description=f"a duration above zero {_WITH_UNIT}"),
]
Period = Annotated[
    float,
    Meta(
        ge=0.01, extra={"unit": "duration"}, description=f"a duration of 10ms or more {_WITH_UNIT}"
    ),
]

Dwell = Annotated[
    float,
    Meta(ge=1.0, extra={"unit": "duration"}, description=f"a duration of 1s or more {_WITH_UNIT}"),
]
"""Long enough for those who waited to be answered before the next one's turn."""

Headroom = Annotated[
    Annotated[int, Meta(ge=0, le=2**40)] | None,
    Meta(
        extra={"unit": "size"},
        description='a size of at most 1TiB with a unit, such as "256MiB"',
    ),
]

Ceiling = Annotated[
    Share,
    Meta(
        extra={"unit": "share"},
        description='a share such as "95%", or a size such as "5600MiB"',
    ),
]
"""Of the memory of a card."""

CardUuid = Annotated[
    str,
    Meta(
        pattern=r"^(GPU|MIG)-[A-Za-z0-9/-]{1,90}\Z",
        description='a UUID such as "GPU-…" or "MIG-…", as nvidia-smi -L lists them',
    ),
]
CardIndex = Annotated[int, Meta(ge=0, le=1023, description="the number of a card, from 0 on")]

LogSize = Annotated[
    int,
    Meta(
        ge=64 * 1024,
        le=2**40,
        extra={"unit": "size"},
        description='a size of 64KiB to 1TiB with a unit, such as "10MiB"',
    ),
]

Port = Annotated[int, Meta(ge=1, le=65535)]
Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Layers = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Priority = Annotated[int, Meta(ge=-1000, le=1000)]
Text = Annotated[str, Meta(min_length=1, description="a string that is not empty")]
Name = Annotated[
    str,
    Meta(
        pattern=r"^[a-z0-9][a-z0-9_-]{0,31}\Z",
        description='a name of lower case letters, digits, "-" and "_", at most 32',
    ),
]
ModelName = Annotated[
    str,
    Meta(
        pattern=r"^[!-~]{1,128}\Z",
        description="a model name of 1 to 128 visible ASCII characters without spaces",
    ),
]
Variable = Annotated[
    str,
    Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]*\Z", description="the name of an environment variable"),
]
HttpPath = Annotated[
    str, Meta(pattern=r"^/[!-~]*\Z", description='a path such as "/health", without spaces')
]

Origin = Annotated[
    str,
    Meta(
        pattern=r"^(null|https?://[A-Za-z0-9.:\[\]_-]+)\Z",
        description='the origin of a web page, such as "https://chat.example.com", without a path',
    ),
]

GpuLayers = Annotated[
    Literal["auto", "all"] | Layers,
    Meta(
        extra={"synonyms": {-1: "all"}},
        description='"auto", "all" or a number of layers',
    ),
]
"""-1 is all of them in .env files that were written for llama.cpp as it was."""

CacheType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"]
PLAIN_CACHE_TYPES = ("f32", "f16", "bf16")
"""Those that are not quantised."""

Rebalance = Literal["off", "shrink", "auto"]
"""What follows where other programs take memory of the card, or free it (auto)."""

Degradation = Literal["cache_type", "ubatch", "ctx_size"]
"""What a plan may take from a service before it takes layers; the values of `core.plan.Degrade`."""


class Table(Struct, frozen=True, forbid_unknown_fields=True):
    """A TOML table: frozen, and unknown keys are errors."""


class Readiness(Table, frozen=True):
    """When a service may receive traffic. Gates routing; never restarts anything."""

    http_get: HttpPath | None = None
    tcp: bool = False
    period_s: Period = field(default=2.0, name="period")
    timeout_s: Timeout = field(default=3.0, name="timeout")
    success_threshold: Count = 1
    failure_threshold: Count = 3


class Restart(Table, frozen=True):
    """What follows a death. `max_deaths` within `window` is a crash loop."""

    policy: Literal["always", "on-failure", "never"] = "always"
    backoff_s: Seconds = field(default=1.0, name="backoff")
    max_backoff_s: Seconds = field(default=60.0, name="max_backoff")
    max_deaths: Count = 5
    window_s: Timeout = field(default=600.0, name="window")


class Liveness(Table, frozen=True):
    """How soon a service that hangs is replaced; 0 is never."""

    timeout_s: Seconds = field(default=30.0, name="timeout")


class ServiceTable(Table, frozen=True):
    """What every kind of service understands.

    `start = "on-demand"`: by its first request; one model in single mode that says so lets requests
    swap them. `ttl_s`: without a request for so long it is unloaded, and the next one loads it
    again; 0 is never.
    """

    depends_on: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    env: dict[Variable, str] = {}
    priority: Priority = 0
    pinned: bool = False
    start: Literal["always", "on-demand"] = "always"
    ttl_s: Seconds = field(default=0.0, name="ttl")
    readiness: Readiness = Readiness()
    liveness: Liveness = Liveness()
    restart: Restart = Restart()
    stall_timeout_s: Timeout = field(default=60.0, name="stall_timeout")
    start_timeout_s: Timeout = field(default=1800.0, name="start_timeout")
    drain_timeout_s: Seconds = field(default=30.0, name="drain_timeout")
    grace_period_s: Seconds = field(default=10.0, name="grace_period")


class LlamaServer(ServiceTable, frozen=True, kw_only=True, tag_field="kind", tag="llama-server"):
    """A llama.cpp server with one model. After loading, `model` is an absolute path.

    `warm_for_s`: how long its prompt cache is kept on the disk once it gives way; 0 is not at all.
    """

    model: Text
    binary: Text | None = None
    port: Port | None = None
    gpu_layers: GpuLayers = "auto"
    ctx_size: Count = 4096
    ctx_size_min: Count | None = None
    parallel: Count = 1
    cache_type_k: CacheType = "f16"
    cache_type_v: CacheType = "f16"
    batch: Count | None = None
    ubatch: Count | None = None
    flash_attn: Literal["auto", "on", "off"] = "auto"
    kv_unified: bool | None = None
    n_cpu_moe: Layers | None = None
    degrade: tuple[Degradation, ...] = ()
    warm_for_s: Seconds = field(default=3600.0, name="warm_for")


class Qdrant(ServiceTable, frozen=True, kw_only=True, tag_field="kind", tag="qdrant"):
    """A Qdrant server. `storage` is below the state directory unless it is absolute."""

    binary: Text | None = None
    port: Port = 6333
    grpc_port: Port = 6334
    storage: Text = "qdrant"


class Command(ServiceTable, frozen=True, kw_only=True, tag_field="kind", tag="command"):
    """Any program. With a `port` it is probed there, without one it is ready once it stays up.

    After loading, `cwd` is set and a program with a slash is an absolute path.
    """

    command: Annotated[tuple[str, ...], Meta(min_length=1)]
    port: Port | None = None
    cwd: Text | None = None


Service = LlamaServer | Qdrant | Command


class Route(Table, frozen=True, kw_only=True):
    """A model name that clients use, and the services that answer it, in order."""

    services: Annotated[tuple[str, ...], Meta(min_length=1)]
    aliases: tuple[ModelName, ...] = ()


class Logs(Table, frozen=True):
    """How large the log of each service and of the daemon grows, and how many older parts stay."""

    max_size_bytes: LogSize = field(default=10 * 1024 * 1024, name="max_size")
    keep: Annotated[int, Meta(ge=0, le=1000)] = 3


class Models(Table, frozen=True):
    """Where model files are looked for: directories, or `package:NAME` of an installed package."""

    dirs: tuple[Text, ...] = ("~/models",)


class Gpu(Table, frozen=True):
    """The card, and how much of it may be used. `ceiling` is for all programs together.

    `headroom_bytes`: None leaves it to `sizing`, which looks at the machine.
    """

    device: CardIndex | CardUuid = 0
    ceiling: Ceiling = Share(percent=95)
    headroom_bytes: Headroom = field(default=None, name="headroom")
    rebalance: Rebalance = "shrink"


class Gateway(Table, frozen=True):
    """The OpenAI-compatible endpoint.

    `admin_keys_file`: the keys of those who may load and unload models through it.
    `hold_timeout_s`: how long a request waits for a service that loads or is restarted.
    """

    listen: Text = "127.0.0.1:8000"
    listen_without_api_keys: str | None = None
    api_keys_file: Text | None = None
    admin_keys_file: Text | None = None
    allowed_origins: tuple[Origin, ...] = ()
    envoy: Text | None = None
    liveness_timeout_s: Seconds = field(default=10.0, name="liveness_timeout")
    hold_streams: Literal["auto", "off"] = "auto"
    drain_timeout_s: Seconds = field(default=30.0, name="drain_timeout")
    hold_timeout_s: Timeout = field(default=300.0, name="hold_timeout")


class Profile(Table, frozen=True):
    """A whole profile. `mode = "single"`: of the unpinned models only `active` is up.

    `min_dwell_s`: how long a model serves before a request for another one may have it leave.
    `switch = "break-first"`: what runs gives way before another model is started in its place.
    """

    mode: Literal["dual", "single"] = "dual"
    switch: Literal["auto", "break-first"] = "auto"
    active: str | None = None
    min_dwell_s: Dwell = field(default=10.0, name="min_dwell")
    env_file: Text | None = None
    models: Models = Models()
    gpu: Gpu = Gpu()
    gateway: Gateway = Gateway()
    logs: Logs = Logs()
    service: dict[Name, Service] = {}
    route: dict[ModelName, Route] = {}
