"""The cache of keys and values, and the states of recurrent layers."""

from llmsup.core.estimate.effective import Effective
from llmsup.core.ggml import TYPES
from llmsup.core.shape import Block, ModelShape, aligned

_ROW_ELEMENTS = 512
_F32_BYTES = 4


def cache_of_block(shape: ModelShape, block: Block, options: Effective) -> int:
    """The bytes of one layer's cache and state, wherever it is."""
    size = 0
    for elements in block.state:
        if elements:
            size += aligned(_F32_BYTES * elements * options.slots)
    if not block.has_cache:
        return size
    cells = options.window_cells(block.window) * options.streams
    keys, values = widths(shape, block)
    size += _tensor_bytes(options.k_type, keys, cells)
    if values:
        size += _tensor_bytes(options.v_type, values, cells)
    return size


def widths(shape: ModelShape, block: Block) -> tuple[int, int]:
    """The elements of a row of keys and of values. MLA keeps one that serves as both."""
    if shape.number("attention.key_length_mla"):
        return block.key_length, 0
    return block.key_length * block.kv_heads, block.value_length * block.kv_heads


def row_bytes(type_id: int, elements: int) -> int:
    """The bytes of a row in the cache."""
    known = TYPES[type_id]
    return -(-elements // known.block) * known.block_bytes


def _tensor_bytes(type_id: int, width: int, rows: int) -> int:
    size = row_bytes(type_id, width) * rows
    if TYPES[type_id].block > 1 and width % _ROW_ELEMENTS:
        size += row_bytes(type_id, -width % _ROW_ELEMENTS)
    return aligned(size)
