"""The compute buffer by a formula: the peer that the replay of the graph is measured by."""

from llmsup.core.estimate.bound import (
    attention_bytes,
    feed_forward_elements,
    largest_host_weight,
    mask_bytes,
)
from llmsup.core.estimate.effective import Effective
from llmsup.core.shape import ModelShape

_F32 = 4


def closed_form(shape: ModelShape, options: Effective) -> int:
    """The bytes of the compute buffer, within some ten percent for most models."""
    stream = _F32 * shape.embedding * options.tokens
    widest = max((_layer(shape, number, options) for number in range(shape.trunk)), default=0)
    logits = _F32 * shape.vocabulary * options.outputs if options.has_output else 0
    staged = int(0.85 * largest_host_weight(shape, options))
    return max(widest + 4 * stream, logits + stream) + mask_bytes(shape, options) + staged


def _layer(shape: ModelShape, number: int, options: Effective) -> int:
    feed_forward = feed_forward_elements(shape, shape.blocks[number]) * _F32 * options.tokens
    return max(feed_forward, attention_bytes(shape, number, options))
