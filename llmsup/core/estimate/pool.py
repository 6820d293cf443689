"""The pool that CUDA's kernels take besides the buffers: it grows with the first long prompt."""

from functools import lru_cache

from llmsup.core.estimate.effective import effective
from llmsup.core.ggml import TYPES
from llmsup.core.options import Options
from llmsup.core.shape import ModelShape

_GRANULE_BYTES = 2 * 1024 * 1024
_ROW_ELEMENTS = 512
_Q8_1_BYTES = 1.125  # for each element: the input of a quantised product, quantised too


def pool_bytes(shape: ModelShape, options: Options) -> int:
    """The pool of one process, after its longest batch. Bytes."""
    if options.gpu_layers == 0:
        return 0
    largest = effective(shape, options).tokens * _bytes_for_each_token(shape)
    granules = -(-int(largest) // _GRANULE_BYTES)
    return (granules + 1) * _GRANULE_BYTES


@lru_cache(maxsize=64)
def _bytes_for_each_token(shape: ModelShape) -> float:
    """Of the widest product.

    Those with a quantised matrix quantise their input; the others make half floats of it.
    """
    largest = 0.0
    for block in shape.blocks[: shape.trunk]:
        for weight in block.weights.values():
            if len(weight.shape) < 2:
                continue
            width = weight.shape[0]
            if weight.is_expert and "down" in weight.name:
                width *= max(1, shape.experts_used)
            known = TYPES.get(weight.type_id)
            if known is None or known.block > 1:
                padded = width + -width % _ROW_ELEMENTS
                largest = max(largest, padded * _Q8_1_BYTES)
            elif known.name != "F32":
                largest = max(largest, 2.0 * (width + weight.shape[1]))
    return largest
