"""What the engine makes of its options for a model, before it reserves anything."""

from dataclasses import dataclass
from functools import lru_cache

from llmsup.core.ggml import TYPES
from llmsup.core.options import Options
from llmsup.core.shape import ModelShape, aligned

CELLS = 256
"""The cache has a multiple of so many tokens."""

_TYPE_IDS = {known.name.lower(): type_id for type_id, known in TYPES.items()}
_F16 = 1
NUMBER_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Effective:
    """The options as they come out. Counts of tokens, but for `outputs` and `layers`.

    `first_block`: the repeating layers from this one on are on the card. `sequence`: the cells of
    the cache of each of `streams`. `tokens`: the batch for which the graph is reserved; `outputs`
    of them have logits. `has_kernel`: the card can do flash attention for this model's heads.
    `turns_values`: the cache keeps values column by column; the engine decides that before it
    finds out whether the card can.
    """

    first_block: int
    has_output: bool
    n_cpu_moe: int
    sequence: int
    streams: int
    slots: int
    shared_slots: int
    batch: int
    tokens: int
    outputs: int
    k_type: int
    v_type: int
    flash_attn: bool
    has_kernel: bool
    turns_values: bool
    pooled: bool
    kv_offload: bool
    op_offload: bool
    swa_full: bool

    def window_cells(self, window: int) -> int:
        """The cells of a stream of a layer with this window; 0 is none."""
        if not window or self.swa_full:
            return self.sequence
        return aligned(min(self.sequence, window * self.shared_slots + self.batch), CELLS)

    def on_card(self, block: int) -> bool:
        """Whether a repeating layer is on the card."""
        return block >= self.first_block


@lru_cache(maxsize=4096)
def effective(shape: ModelShape, options: Options) -> Effective:
    """Clamps, rounds and decides as the engine does; any number gives something sensible."""
    layers = options.gpu_layers if 0 <= options.gpu_layers < shape.layers else shape.layers
    slots = min(max(1, options.parallel), 256)
    ctx = _number(options.ctx_size) or int(shape.number("context_length")) or 4096
    batch = _number(options.batch) or 2048
    pooled = options.pooled or not shape.traits.is_causal
    if shape.traits.is_causal:
        batch = min(ctx, batch)
    ubatch = min(batch, _number(options.ubatch) or batch)
    ctx = aligned(ctx, CELLS)
    sequence = ctx if options.kv_unified else aligned(max(1, ctx // slots), CELLS)
    tokens = aligned(min(ctx, ubatch), slots)
    return Effective(
        first_block=shape.layers - layers,
        has_output=layers > 0,
        n_cpu_moe=max(0, options.n_cpu_moe),
        sequence=sequence,
        streams=1 if options.kv_unified else slots,
        slots=slots,
        shared_slots=slots if options.kv_unified else 1,
        batch=ubatch,
        tokens=tokens,
        outputs=min(tokens, batch) if pooled else slots,
        k_type=_TYPE_IDS.get(options.cache_type_k.lower(), _F16),
        v_type=_TYPE_IDS.get(options.cache_type_v.lower(), _F16),
        flash_attn=_flash_attention(shape, options, shape.layers - layers),
        has_kernel=_has_kernels(shape),
        turns_values=options.flash_attn == "off" or shape.architecture == "grok",
        pooled=pooled,
        kv_offload=options.kv_offload,
        op_offload=options.op_offload,
        swa_full=options.swa_full,
    )


def _number(value: int) -> int:
    return min(max(0, value), NUMBER_MAX)


def _flash_attention(shape: ModelShape, options: Options, first_block: int) -> bool:
    """What "auto" comes to: on, unless a layer on the card has heads that it has no kernel for."""
    if options.flash_attn == "off" or shape.architecture == "grok":
        return False
    type_v = TYPES[_TYPE_IDS.get(options.cache_type_v.lower(), _F16)]
    if options.flash_attn == "on" or type_v.block > 1:
        return True
    return _has_kernels(shape, first_block)


def _has_kernels(shape: ModelShape, first_block: int = 0) -> bool:
    return all(
        has_kernel(*heads_of(shape, number))
        for number, block in enumerate(shape.blocks[: shape.trunk])
        if number >= first_block and block.heads and block.kv_heads
    )


def heads_of(shape: ModelShape, number: int) -> tuple[int, int, int]:
    """Lengths of a key and of a value as attention sees them, and how many heads share one key."""
    block = shape.blocks[number]
    if shape.number("attention.key_length_mla"):
        value = int(shape.number("attention.kv_lora_rank")) or block.value_length
        return block.key_length, value, block.heads
    return block.key_length, block.value_length, block.heads // max(1, block.kv_heads)


def has_kernel(key_length: int, value_length: int, sharing: int) -> bool:
    """Whether CUDA has flash attention for heads of these lengths."""
    match key_length, value_length:
        case (40 | 64 | 72 | 80 | 96 | 112 | 128 | 256, _):
            return key_length == value_length
        case (512, 512) | (576, 512):
            return sharing >= 2
        case (192, 128):
            return sharing % 8 == 0
        case (320, 256):
            return sharing % 32 == 0
    return False
