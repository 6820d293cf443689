"""What the daemon and its clients say to each other, as JSON over the control socket.

The keys are the public contract of `llmsup status --json`; scripts rely on them.
"""

from typing import NotRequired, TypedDict


class DaemonInfo(TypedDict):
    """The daemon itself.

    `profile_digest` is that of the profile's file when it was loaded, `overrides` what `--set`
    said, `restarting` names the services that a restart has yet to come to. `troubles` are
    sentences about what does not work just now although no service is down, such as a full disk.
    """

    pid: int
    version: str
    uptime_s: float
    profile: str
    profile_path: str
    profile_digest: str
    overrides: list[str]
    mode: str
    stopping: bool
    restarting: list[str]
    troubles: list[str]


class GpuInfo(TypedDict):
    """The card, as NVML sees it."""

    name: str
    total_bytes: int
    free_bytes: int


class ServiceInfo(TypedDict):
    """One service. `why` explains any state that is not plainly good; `uptime_s` is null while
    there is no process. `gpu_layers` of `layers` are on the card; `layers` is null until a plan
    was made. `measured_bytes`: what the card lost to it while it loaded.
    """

    service: str
    kind: str
    want: str
    state: str
    pid: int | None
    generation: int
    port: int | None
    model: str | None
    gpu_layers: int | str | None
    layers: int | None
    planned_bytes: int | None
    measured_bytes: int | None
    restarts: int
    uptime_s: float | None
    why: str


class MemoryInfo(TypedDict):
    """Memory at a death: of the machine right after it, of the process as last seen before.

    `group_*`: its control group; null where none counts memory, or has no limit of its own.
    """

    total_bytes: int
    available_bytes: int
    process_bytes: int | None
    group_bytes: int | None
    group_max_bytes: int | None
    group_oom_kills: int | None


class BinaryInfo(TypedDict):
    """The program that was started, and what tells builds of it apart without running it."""

    path: str
    size_bytes: int
    modified_time: float


class PlanInfo(TypedDict):
    """What a service was given of the card, and why. `layers` are those of its model.

    `free_bytes`: what was free when it was planned. `measured_bytes`: what the card lost to it.
    """

    gpu_layers: int
    layers: int
    n_cpu_moe: int
    ctx_size: int
    planned_bytes: int
    measured_bytes: int | None
    free_bytes: int | None
    reason: str


class DeathInfo(TypedDict):
    """`death.json` of a crash bundle. `time` is Unix seconds.

    `env` are the variables of the launch, secrets masked; `inherited` the names of the others. What
    is not known is null: `argv`, say, of a server that was launched otherwise than it would be now.
    """

    service: str
    kind: str
    generation: int
    time: float
    lived_s: float | None
    cause: str
    reason: str
    hint: str
    code: int | None
    signal: str | None
    next: str
    argv: list[str] | None
    cwd: str | None
    env: dict[str, str] | None
    inherited: list[str]
    launch: str | None
    binary: BinaryInfo | None
    model: str | None
    gpu_layers: int | str | None
    plan: PlanInfo | None
    memory: MemoryInfo
    gpu: GpuInfo | None


class KeptDeath(DeathInfo):
    """A death in `why --json`: its bundle's directory, and the output that is kept there."""

    bundle: str
    output: list[str]


class RouteInfo(TypedDict):
    """One route and the services that its published upstream list names, in order."""

    route: str
    aliases: list[str]
    services: list[str]
    published: list[str]


class Status(TypedDict):
    """`GET /status`: the whole stack. `gateway` is where it listens; it is one of the services.

    `gpu_why` says why `gpu` is null; empty where there is a card.
    """

    daemon: DaemonInfo
    gpu: GpuInfo | None
    gpu_why: str
    gateway: str
    services: list[ServiceInfo]
    routes: list[RouteInfo]


class UpstreamsInfo(TypedDict):
    """One route's list as desired, as published, and as Envoy has it (null: not known)."""

    route: str
    desired: list[str]
    published: list[str]
    confirmed: list[str] | None


class Ask(TypedDict, total=False):
    """Body of `POST /start`, `/stop` and `/restart`. No services: all of them."""

    services: list[str]
    now: bool


class Answer(TypedDict):
    """What a verb did: the services it changed, and a sentence."""

    changed: list[str]
    message: str
    error: NotRequired[str]


class ModelInfo(TypedDict):
    """A service with a model: the one that its server says it has, and the one it should have.

    `route` is the one whose requests it gets first; null where it is only a fallback. `model` is
    null while it cannot be asked.
    """

    service: str
    route: str | None
    model: str | None
    expected_model: str
    state: str


class SwitchAsk(TypedDict):
    """Body of `POST /switch`: a service, and a model file or null for that of the profile.

    Or another profile, by its name or the absolute path of its file.
    """

    target: str
    model: str | None


class SwitchProgress(TypedDict):
    """How far a switch is: a line of the answer to `POST /switch`, while it goes on.

    `read_bytes` of `size_bytes` are what the server has read or mapped of its model at least.
    `profile`: the one that is switched to, where it is that. Then `service` is the one that loads
    just now, and the rest of the lines may have to be asked of the next daemon: `GET /switch`.
    """

    phase: str
    profile: NotRequired[str]
    service: str
    model: str
    elapsed_s: float
    read_bytes: int
    size_bytes: int
    last_load_s: float | None
    why: str


class SwitchResult(TypedDict):
    """What came of a switch: the last line. `current_model` is what `service` serves after it.

    `warm_tokens`: so many tokens of its prompt cache it has got back, by its own word. Of a switch
    to another profile, `service` is null, and that model answers its first route.
    """

    success: bool
    message: str
    current_model: str | None
    service: str | None
    profile: str
    switch_time_s: float
    warm_tokens: int


class EventInfo(TypedDict):
    """One line of the event journal. `time` is Unix seconds; `at_s` is monotonic."""

    time: float
    at_s: float
    event: str
    service: NotRequired[str]
    generation: NotRequired[int]
    state: NotRequired[str]
    before: NotRequired[str]
    want: NotRequired[str]
    route: NotRequired[str]
    upstreams: NotRequired[list[str]]
    cause: NotRequired[str]
    lived_s: NotRequired[float | None]
    next: NotRequired[str]
    why: NotRequired[str]
    layers_before: NotRequired[int]
    layers_after: NotRequired[int]
    elapsed_ms: NotRequired[float]
    gpu_layers: NotRequired[int]
    planned_mib: NotRequired[int]
    measured_mib: NotRequired[int]
    free_mib: NotRequired[int | None]
