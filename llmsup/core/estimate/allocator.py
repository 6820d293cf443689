"""How large a buffer gets: a replay of the allocations of a graph, by the rules of ggml-alloc.c."""

from __future__ import annotations

from llmsup.core.estimate.graph import CARD, HOST, NOWHERE, Tensor
from llmsup.core.estimate.splits import Split
from llmsup.core.shape import aligned

IN_PLACE = frozenset(
    ("fill", "scale", "add", "add_id", "sub", "mul", "div", "sqr", "sqrt", "unary", "rope",
     "rms_norm", "clamp", "soft_max")
)  # fmt: skip
"""The operations that may write over an operand of the same layout that nobody else needs."""

_ENDLESS = 2**62
_ALIGNMENT = (128, 32)


class Buffer:
    """A growing buffer with holes. The last block is the open end."""

    __slots__ = ("alignment", "blocks", "peak")

    def __init__(self, alignment: int) -> None:
        self.alignment = alignment
        self.blocks: list[list[int]] = [[0, _ENDLESS]]
        self.peak = 0

    def take(self, size: int) -> int:
        """The offset of `size` bytes: in the smallest hole that they fit in, else at the end."""
        size += -size % self.alignment
        blocks = self.blocks
        best, best_size = -1, _ENDLESS
        for number in range(len(blocks) - 1):
            room = blocks[number][1]
            if size <= room <= best_size:
                best, best_size = number, room
        block = blocks[best]
        offset = block[0]
        block[0] += size
        block[1] -= size
        if not block[1]:
            del blocks[best]
        self.peak = max(self.peak, offset + size)
        return offset

    def give_back(self, offset: int, size: int) -> None:
        """Makes a hole of what was taken, one with the holes beside it."""
        size += -size % self.alignment
        if not size:
            return
        blocks = self.blocks
        end = offset + size
        for number, block in enumerate(blocks):
            if block[0] + block[1] == offset:
                block[1] += size
                if number + 1 < len(blocks) and blocks[number + 1][0] == end:
                    block[1] += blocks.pop(number + 1)[1]
                return
            if end == block[0]:
                block[0] = offset
                block[1] += size
                if number and sum(blocks[number - 1]) == offset:
                    blocks[number - 1][1] += block[1]
                    del blocks[number]
                return
            if block[0] > offset:
                blocks.insert(number, [offset, size])
                return


Step = tuple[Tensor | None, tuple[Tensor, ...], int]


def peaks(splits: list[Split], kept: dict[Tensor, list[Tensor]]) -> tuple[int, int]:
    """How large the buffers of the card and of the host get. Bytes.

    `kept`: what has to last until a node is done, though nobody needs it.
    """
    buffers = (Buffer(_ALIGNMENT[CARD]), Buffer(_ALIGNMENT[HOST]))
    steps: list[Step] = []
    for each in splits:
        backend = each.backend
        for source, copy in each.inputs:
            # The copy is made before the first node, and its source lasts until then.
            steps.append((None, (source,), HOST))
            steps.append((copy, (), backend))
        for computed, srcs in each.steps:
            steps.append((computed, srcs, backend))
            if computed in kept:
                steps.append((None, tuple(kept[computed]), backend))
    _count(steps, buffers[HOST])
    for node, srcs, backend in steps:
        if node is not None and node.root is None:
            _allocate(node, srcs, backend, buffers)
        for src in srcs:
            src.uses -= 1
            if src.uses or src.views:
                continue
            root = src
            if src.root is not None:
                root = src.root
                root.views -= 1
                if root.views or root.uses:
                    continue
            if root.where != NOWHERE:
                buffers[root.where].give_back(root.offset, root.size)
                root.where = NOWHERE
    return buffers[CARD].peak, buffers[HOST].peak


def _count(steps: list[Step], host: Buffer) -> None:
    """Who is used how often; the inputs of the graph are there from the beginning."""
    for node, srcs, _ in steps:
        if node is not None and node.root is not None:
            node.root.views += 1
        for src in srcs:
            src.uses += 1
            if src.is_input and src.where == NOWHERE:
                src.where = HOST
                src.offset = host.take(src.size)


def _allocate(
    node: Tensor, srcs: tuple[Tensor, ...], backend: int, buffers: tuple[Buffer, Buffer]
) -> None:
    if node.op in IN_PLACE:
        for src in srcs:
            if src.where == NOWHERE or src.uses != 1 or src.views or src.shape != node.shape:
                continue
            node.where, node.offset = src.where, src.offset
            src.where = NOWHERE
            if src.size > node.size:
                taken = aligned(node.size, _ALIGNMENT[node.where])
                rest = aligned(src.size, _ALIGNMENT[node.where]) - taken
                buffers[node.where].give_back(node.offset + taken, rest)
            return
    node.where = backend
    node.offset = buffers[backend].take(node.size)
