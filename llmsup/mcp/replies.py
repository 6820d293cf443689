"""What the tools answer; the output schemas that clients check answers by are made of these.

Keys may be added to an answer: no schema forbids more than it names.
"""

from collections.abc import Iterable
from typing import Any, Literal, NotRequired, TypedDict

import msgspec

from llmsup.control.wire import ModelInfo, ServiceInfo


class About(TypedDict):
    """Where the models are: `mode` is the profile's, `services` are all that have a model."""

    profile: str
    mode: str
    services: list[ModelInfo]


class Dual(About):
    """Servers for chat and for code both run."""

    phase: Literal["dual"]
    chat_model: str | None
    code_model: str | None
    service_chat: str | None
    service_code: str | None


class Single(About):
    """One of them runs, or none."""

    phase: Literal["single"]
    current_model: str | None
    model_type: Literal["chat", "code"] | None
    service: str | None


class Switched(TypedDict):
    """What came of a switch."""

    success: bool
    message: str
    current_model: str | None
    switch_time_seconds: float
    service: NotRequired[str | None]
    profile: NotRequired[str]
    hint: NotRequired[str]


class Named(TypedDict):
    """A profile that can be named."""

    name: str
    origin: str
    summary: str
    path: str


class Profiles(TypedDict):
    """All of them, and the one that is up."""

    profiles: list[Named]
    up: str | None


class Card(TypedDict):
    """The graphics card of a plan."""

    name: str
    total_bytes: int
    free_bytes: int
    headroom_bytes: int
    ceiling_bytes: int


class Placed(TypedDict):
    """What a service gets of it."""

    service: str
    model: str
    gpu_layers: int
    layers: int
    ctx_size: int
    parallel: int
    total_bytes: int
    host_bytes: int
    reason: str


class Plan(TypedDict):
    """A plan; `refusal` where it does not fit."""

    device: Card | None
    fits: bool
    services: list[Placed]
    left_bytes: int | None
    refusal: NotRequired[str]
    hint: NotRequired[str]
    notes: NotRequired[str]


class Death(TypedDict):
    """A death that is kept; `time` is Unix seconds."""

    service: str
    generation: int
    time: float
    cause: str
    reason: str
    hint: str
    next: str
    bundle: str
    output: list[str]


class Why(TypedDict):
    """How a service is (`present`: null while no daemon keeps it), and its deaths, newest first."""

    service: str
    present: ServiceInfo | None
    deaths: list[Death]


class Restarted(TypedDict):
    """A service with a new process."""

    success: bool
    message: str
    service: str
    state: str
    pid: int | None
    generation: int
    why: str


class Drilled(TypedDict):
    """One scenario of a drill."""

    scenario: str
    outcome: Literal["passed", "failed", "skipped"]
    line: str
    breaks: str
    bound: str
    requests: NotRequired[int]
    failed_requests: NotRequired[int]


class Drill(TypedDict):
    """A whole drill."""

    passed: bool
    profile: str
    route: str
    scenarios: list[Drilled]
    message: str


class Refusal(TypedDict):
    """An error; `success` and `message` where something was to be changed."""

    error: str
    hint: str
    success: NotRequired[Literal[False]]
    message: NotRequired[str]


def schema(kinds: Iterable[Any]) -> dict[str, object]:
    """The JSON schema of an answer that is one of these typed dictionaries, or a refusal.

    Some clients check what an error holds, too.
    """
    found = (*kinds, Refusal)
    chosen, definitions = msgspec.json.schema_components(found, ref_template="#/$defs/{name}")
    for each in definitions.values():
        each["description"] = " ".join(str(each["description"]).split())
    return {"type": "object", "anyOf": list(chosen), "$defs": definitions}
