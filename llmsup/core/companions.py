"""Files that a llama-server loads beside its model: a draft model, a projector, LoRA adapters.

They live in the same process, so what the driver takes for a process is counted once.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum

from llmsup.core.estimate import buffers_at_least, estimate
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


def accompanied(
    alone: Estimate, options: Options, layers: int, companions: Iterable[Companion]
) -> Estimate:
    """The estimate of a model of `layers` with what its companions take added."""
    for each in companions:
        added = _added(each, options, layers)
        alone = replace(
            alone,
            device=_sum(alone.device, added.device),
            host=_sum(alone.host, added.host),
            items=(*alone.items, _item(each.kind, added)),
            notes=(*alone.notes, *(f"{each.kind.value}: {note}" for note in added.notes)),
        )
    return alone


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


def _added(each: Companion, options: Options, layers: int) -> Estimate:
    if options.gpu_layers == 0:
        return Estimate(device=Sizes(), host=Sizes(weights_bytes=each.file_bytes))
    if each.kind is Kind.DRAFT:
        return estimate(each.shape, _draft_options(each, options))
    on_card = _on_card(each, options, layers)
    compute_bytes = PROJECTOR_COMPUTE_BYTES if each.kind is Kind.PROJECTOR else 0
    return Estimate(
        device=Sizes(weights_bytes=on_card, compute_bytes=compute_bytes),
        host=Sizes(weights_bytes=each.file_bytes - on_card),
        notes=("its compute buffer is a guess",) if compute_bytes else (),
    )


def _on_card(each: Companion, options: Options, layers: int) -> int:
    """A projector goes to the card as a whole, an adapter with the layers that it adapts."""
    if each.kind is Kind.PROJECTOR:
        return each.file_bytes
    return -(-each.file_bytes * min(options.gpu_layers, layers) // layers)


def _draft_options(each: Companion, options: Options) -> Options:
    """All of it on the card, with the context and the slots of the model that it drafts for."""
    return replace(
        options, gpu_layers=each.shape.layers, n_cpu_moe=0, cache_type_k="f16", cache_type_v="f16"
    )


def _sum(one: Sizes, other: Sizes) -> Sizes:
    return Sizes(
        one.weights_bytes + other.weights_bytes,
        one.kv_cache_bytes + other.kv_cache_bytes,
        one.compute_bytes + other.compute_bytes,
    )


def _item(kind: Kind, added: Estimate) -> Item:
    return Item(kind.value, added.device.total_bytes, added.host.total_bytes)
