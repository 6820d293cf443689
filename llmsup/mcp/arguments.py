"""What the tools take; the input schemas that clients see are made of these."""

from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from llmsup.errors import UsageError

Name = Annotated[str, Meta(min_length=1, max_length=200)]
Kind = TypeVar("Kind", bound=msgspec.Struct)
Mebibytes = Annotated[int, Meta(gt=0, le=2**31)]


class Nothing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """No arguments."""


class Switch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Arguments of `switch_model`."""

    model_type: Annotated[
        Name,
        Meta(description='"chat", "code", another service that serves a model, or a profile'),
    ]
    model: Annotated[
        Name | None,
        Meta(description="a GGUF file; by default the one that the profile says"),
    ] = None


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Arguments of `plan`."""

    profile: Annotated[
        Name | None,
        Meta(description="a profile's name or file; by default the one that is up"),
    ] = None
    total_mib: Annotated[
        Mebibytes | None, Meta(description="suppose a card with so much memory")
    ] = None
    free_mib: Annotated[
        Mebibytes | None, Meta(description="suppose that so much of the card is free")
    ] = None
    overrides: Annotated[
        list[Name],
        Meta(description='keys of the profile to change, as "service.chat.ctx_size=8192"'),
    ] = []


class Why(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Arguments of `why`."""

    service: Annotated[Name, Meta(description="a service, as get_status names it")]
    last: Annotated[int, Meta(ge=1, le=10, description="how many of its last deaths")] = 3


class Restart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Arguments of `restart_service`."""

    service: Annotated[Name, Meta(description="a service, as get_status names it")]


class Drill(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Arguments of `drill`."""

    scenarios: Annotated[
        list[Name],
        Meta(
            description="load, kill, hang, daemon, gateway, disk or crashloop; by default all "
            "of them that let no request fail here"
        ),
    ] = []


def schema(kind: type[msgspec.Struct]) -> dict[str, object]:
    """The JSON schema of the arguments."""
    _, components = msgspec.json.schema_components((kind,))
    made = components[kind.__name__]
    return {name: value for name, value in made.items() if name not in {"title", "description"}}


def parse(given: object, kind: type[Kind]) -> Kind:
    """The arguments. Raises UsageError."""
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        words, _, place = str(error).replace("`", "").partition(" - at $")
        words = words[:1].lower() + words[1:]
        name = place.removeprefix(".")
        raise UsageError(f"{name}: {words}" if name else words, hint=known(kind)) from None


def known(kind: type[msgspec.Struct]) -> str:
    """A hint that names them."""
    names = ", ".join(kind.__struct_fields__) or "none"
    return f"arguments of this tool: {names}"
