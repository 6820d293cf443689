"""The compute buffers of one process: the graph is built, cut and replayed."""

from llmsup.core.estimate.allocator import peaks
from llmsup.core.estimate.builder import Builder
from llmsup.core.estimate.effective import Effective
from llmsup.core.estimate.fusion import group_shared_experts
from llmsup.core.estimate.model_graph import build
from llmsup.core.estimate.repetition import layers_that_count
from llmsup.core.estimate.splits import assign, cut
from llmsup.core.shape import ModelShape


def compute_bytes(shape: ModelShape, options: Effective, *, whole: bool = False) -> tuple[int, int]:
    """The bytes of the compute buffers on the card and on the host.

    `whole`: with all layers, though some of equal ones do.
    """
    builder = Builder(shape, options)
    build(builder, range(shape.trunk) if whole else layers_that_count(shape, options))
    nodes = builder.graph.nodes
    assign(nodes, op_offload=options.op_offload)
    splits = cut(nodes)
    if shape.has_experts:
        group_shared_experts(splits, builder.kept)
    return peaks(splits, builder.kept)
