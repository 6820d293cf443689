"""Which tensors go to the card: the output layer first, then repeating layers from the last on."""

from dataclasses import dataclass

from llmsup.core.estimate.effective import Effective
from llmsup.core.shape import ModelShape, Weight

_INPUTS = ("token_embd.", "position_embd.", "token_types.", "per_layer_token_embd.")
_OF_LAYER_0 = ("rope_freqs.", "rope_factors_", "token_embd_norm.", "per_layer_")
_COPIED = ("rope_freqs.", "rope_factors_")


@dataclass(frozen=True, slots=True)
class Place:
    """The bytes of some tensors on the card and on the host."""

    device_bytes: int = 0
    host_bytes: int = 0


def weights_of_block(shape: ModelShape, number: int, options: Effective) -> Place:
    """One repeating layer, its experts left out."""
    return _place(shape, number, options, experts=False)


def experts_of_block(shape: ModelShape, number: int, options: Effective) -> Place:
    """The experts of one repeating layer."""
    return _place(shape, number, options, experts=True)


def expert_is_on_card(number: int, options: Effective) -> bool:
    """Whether the experts of a layer are on the card."""
    return options.on_card(number) and number >= options.n_cpu_moe


def _place(shape: ModelShape, number: int, options: Effective, *, experts: bool) -> Place:
    device, host, device_experts, host_experts = shape.blocks[number].sums
    if experts:
        if expert_is_on_card(number, options):
            return Place(device_bytes=device_experts)
        return Place(host_bytes=host_experts)
    return Place(device_bytes=device) if options.on_card(number) else Place(host_bytes=host)


def outer_weights(shape: ModelShape, options: Effective) -> Place:
    """The tensors that belong to no layer. A tied output layer is a second copy of the input."""
    device = host = 0
    for name, weight in shape.outer.items():
        if name.startswith("blk."):
            continue
        if outer_is_on_card(shape, name, options):
            device += weight.aligned_bytes
            continue
        host += weight.size_bytes
        if name.startswith(_COPIED) and _has_blocks_on_card(shape, options):
            device += weight.aligned_bytes
    tied = tied_output(shape)
    if tied is not None and options.has_output:
        device += tied.aligned_bytes
    return Place(device, host)


def output_weights(shape: ModelShape, options: Effective) -> Place:
    """The output layer: those of the others that follow it to the card."""
    device = host = 0
    for name, weight in shape.outer.items():
        if name.startswith(("blk.", *_INPUTS)) or is_of_layer_0(shape, name):
            continue
        if options.has_output:
            device += weight.aligned_bytes
        else:
            host += weight.size_bytes
    tied = tied_output(shape)
    if tied is not None and options.has_output:
        device += tied.aligned_bytes
    return Place(device, host)


def is_of_layer_0(shape: ModelShape, name: str) -> bool:
    """Whether a tensor that belongs to no layer goes where the first layer goes."""
    return name.startswith(_OF_LAYER_0) and not shape.architecture.startswith("lfm2")


def outer_is_on_card(shape: ModelShape, name: str, options: Effective) -> bool:
    """Whether a tensor that belongs to no layer is on the card."""
    if name.startswith(_INPUTS):
        return False
    if is_of_layer_0(shape, name):
        return options.on_card(0)
    return options.has_output


def tied_output(shape: ModelShape) -> Weight | None:
    """The input embedding, where it serves as output too."""
    if "output.weight" in shape.outer or not shape.traits.is_causal:
        return None
    return shape.outer.get("token_embd.weight")


def _has_blocks_on_card(shape: ModelShape, options: Effective) -> bool:
    return options.first_block < len(shape.blocks)
