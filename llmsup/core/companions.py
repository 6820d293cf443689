"""Files that a llama-server loads beside its model: a draft model, a projector, LoRA adapters.

They live in the same process, so what the driver takes for a process is counted once.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum

from llmsup.core.estimate import buffers_at_least, estimate, off_card
from llmsup.core.gguf import Model
from llmsup.core.options import Options
from llmsup.core.shape import ModelShape, shape_of
from llmsup.core.sizes import Estimate, Item, Sizes

PROJECTOR_COMPUTE_BYTES = 256 * 2**20
"""For an image of the usual size; the header does not tell, the ledger learns it."""


class Kind(Enum):
    """What such a file is, as its header says. The value is for people."""

    DRAFT = "draft model"
    PROJECTOR = "multimodal projector"
    ADAPTER = "adapter"  # LoRA, or a control vector


@dataclass(frozen=True)
class Companion:
    """One such file."""

    kind: Kind
    file_bytes: int
    shape: ModelShape


def companion_of(model: Model) -> Companion:
    """What the model of such a file is. Whatever is not known to be another kind is a draft."""
    if model.architecture == "clip":
        kind = Kind.PROJECTOR
    elif _is_adapter(model):
        kind = Kind.ADAPTER
    else:
        kind = Kind.DRAFT
    return Companion(kind, model.file_bytes, shape_of(model))


def accompanied(alone: Estimate, options: Options, companions: Iterable[Companion]) -> Estimate:
    """The estimate of a model with its draft models, and with the host's part of the other files.

    What those take of the card is `extra_bytes`.
    """
    for each in companions:
        added = _added(each, options)
        alone = replace(
            alone,
            device=_sum(alone.device, added.device),
            host=_sum(alone.host, added.host),
            items=(*alone.items, *_items(each.kind, added)) if alone.items else (),
            notes=(*alone.notes, *(f"{each.kind.value}: {note}" for note in added.notes)),
        )
    return alone


def extra_bytes(options: Options, layers: int, companions: Iterable[Companion]) -> int:
    """What projectors and adapters are believed to take of the card until that was measured.

    A projector goes to the card as a whole, an adapter with the `layers` that it adapts.
    """
    return sum(
        _on_card(each, options, layers)
        + (PROJECTOR_COMPUTE_BYTES if each.kind is Kind.PROJECTOR and options.gpu_layers else 0)
        for each in companions
        if each.kind is not Kind.DRAFT
    )


def companions_at_least(options: Options, layers: int, companions: Iterable[Companion]) -> int:
    """Bytes on the card that they take at the least."""
    if options.gpu_layers == 0:
        return 0
    return sum(
        buffers_at_least(each.shape, _draft_options(each, options))
        if each.kind is Kind.DRAFT
        else _on_card(each, options, layers)
        for each in companions
    )


def _is_adapter(model: Model) -> bool:
    is_lora = model.metadata.get("general.type") == "adapter"
    return is_lora or model.architecture == "controlvector"


def _added(each: Companion, options: Options) -> Estimate:
    if each.kind is Kind.DRAFT:
        chosen = _draft_options(each, options)
        return estimate(each.shape, chosen) if chosen.gpu_layers else off_card(each.shape, chosen)
    is_guess = each.kind is Kind.PROJECTOR and options.gpu_layers > 0
    return Estimate(
        device=Sizes(),
        host=Sizes(weights_bytes=0 if options.gpu_layers else each.file_bytes),
        notes=("its compute buffer is a guess until it was measured",) if is_guess else (),
    )


def _on_card(each: Companion, options: Options, layers: int) -> int:
    if each.kind is Kind.PROJECTOR:
        return each.file_bytes if options.gpu_layers else 0
    return -(-each.file_bytes * min(options.gpu_layers, layers) // layers)


def _draft_options(each: Companion, options: Options) -> Options:
    """All of it on the card, unless the other is off it; with the other's context and slots."""
    layers = each.shape.layers if options.gpu_layers else 0
    return replace(options, gpu_layers=layers, n_cpu_moe=0, cache_type_k="f16", cache_type_v="f16")


def _sum(one: Sizes, other: Sizes) -> Sizes:
    return Sizes(
        one.weights_bytes + other.weights_bytes,
        one.kv_cache_bytes + other.kv_cache_bytes,
        one.compute_bytes + other.compute_bytes,
    )


def _items(kind: Kind, added: Estimate) -> tuple[Item, ...]:
    sizes = added.device.total_bytes, added.host.total_bytes
    return (Item(kind.value, *sizes),) if any(sizes) else ()
