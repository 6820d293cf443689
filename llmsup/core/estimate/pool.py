"""The pool that CUDA's kernels take besides the buffers: it grows with the first long prompt."""

from llmsup.core.estimate.effective import effective
from llmsup.core.ggml import TYPES
from llmsup.core.options import Options
from llmsup.core.shape import ModelShape

_GRANULE_BYTES = 2 * 1024 * 1024
_ROW_ELEMENTS = 512
_Q8_1_BYTES = 1.125  # for each element: the input of a quantised product, quantised too


def pool_bytes(shape: ModelShape, options: Options) -> int:
    """The pool of one process, after its longest batch. Bytes.

    Products with a quantised matrix quantise their input; the others make half floats of it.
    """
    if options.gpu_layers == 0:
        return 0
    tokens = effective(shape, options).tokens
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
                largest = max(largest, tokens * padded * _Q8_1_BYTES)
            elif known.name != "F32":
                largest = max(largest, tokens * 2 * (width + weight.shape[1]))
    granules = -(-int(largest) // _GRANULE_BYTES)
    return (granules + 1) * _GRANULE_BYTES
