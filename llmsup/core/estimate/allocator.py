"""How large a buffer gets: a replay of the allocations of a graph, by the rules of ggml-alloc.c."""

from __future__ import annotations

from llmsup.core.estimate.graph import CARD, HOST, Tensor
from llmsup.core.estimate.splits import Split

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
        """The offset of `size` bytes: in the smallest hole that is large enough, else at the end."""
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


class Replay:
    """The allocations of a graph, node by node."""

    def __init__(self, backends: dict[Tensor, int]) -> None:
        self.backends = backends
        self.buffers = (Buffer(_ALIGNMENT[CARD]), Buffer(_ALIGNMENT[HOST]))
        self.places: dict[Tensor, tuple[int, int]] = {}
        self.uses: dict[Tensor, int] = {}
        self.views: dict[Tensor, int] = {}

    def run(
        self,
        splits: list[Split],
        copies: dict[tuple[Tensor, int], Tensor],
        kept: dict[Tensor, list[Tensor]],
    ) -> tuple[int, int]:
        """The peaks of the card's and of the host's buffer. Bytes.

        `kept`: what has to last until a node is done, though nobody needs it.
        """
        steps: list[tuple[Tensor | None, tuple[Tensor, ...], int]] = []
        for each in splits:
            for source in each.inputs:
                steps.append((None, (source,), HOST))
                steps.append((copies[source, each.backend], (), each.backend))
            for node in each.nodes:
                srcs = node.srcs
                if node.op != "view":
                    srcs = tuple(copies.get((src, each.backend), src) for src in srcs)
                steps.append((node, srcs, each.backend))
                if node in kept:
                    steps.append((None, tuple(kept[node]), each.backend))
        self._count(steps)
        for node, srcs, backend in steps:
            if node is not None and node.op != "view":
                self._allocate(node, srcs, backend)
            for src in srcs:
                self._release(src)
        return self.buffers[CARD].peak, self.buffers[HOST].peak

    def _count(self, steps: list[tuple[Tensor | None, tuple[Tensor, ...], int]]) -> None:
        uses, views = self.uses, self.views
        inputs: list[Tensor] = []
        for node, srcs, _ in steps:
            if node is not None and node.root is not None:
                views[node.root] = views.get(node.root, 0) + 1
            for src in srcs:
                uses[src] = uses.get(src, 0) + 1
                if src.is_input and src not in self.places:
                    self._place(src, HOST)
        del inputs

    def _place(self, tensor: Tensor, backend: int) -> None:
        self.places[tensor] = (backend, self.buffers[backend].take(tensor.size))

    def _allocate(self, node: Tensor, srcs: tuple[Tensor, ...], backend: int) -> None:
        if node.root is not None:
            return
        if node.op in IN_PLACE:
            for src in srcs:
                place = self.places.get(src)
                if place is None or src.shape != node.shape:
                    continue
                if self.uses[src] == 1 and not self.views.get(src):
                    self.places[node] = place
                    del self.places[src]
                    if src.size > node.size:
                        extra = node.size + -node.size % 128
                        whole = src.size + -src.size % 128
                        self.buffers[place[0]].give_back(place[1] + extra, whole - extra)
                    return
        self._place(node, backend)

    def _release(self, src: Tensor) -> None:
        uses = self.uses
        uses[src] -= 1
        if uses[src] or self.views.get(src):
            return
        root = src
        if src.root is not None:
            root = src.root
            self.views[root] -= 1
            if self.views[root] or uses.get(root):
                return
        place = self.places.pop(root, None)
        if place is not None:
            self.buffers[place[0]].give_back(place[1], root.size)
