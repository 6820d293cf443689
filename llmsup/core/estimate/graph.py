"""The tensors of a computation and the order in which they are computed, as ggml keeps them."""

from __future__ import annotations

from math import prod

CARD, HOST = 0, 1
"""The two backends, the better one first."""

_F32 = 4


NOWHERE = -1


_NO_COPIES = (None, None)


class Tensor:
    """A tensor: a weight, a cache, an input, or what an operation gives.

    `size` is what it takes in a buffer, in bytes. `root` is what it is a view of. `rows` is how
    many rows the operation works on, where that decides whether it is worth a copy of the weight.
    `home` is the backend of what lies in a buffer of its own. `pinned`: the engine said where.
    `host_only`: the card has no kernel for it. The rest is filled as the graph is cut and replayed.
    """

    __slots__ = (
        "backend", "copies", "home", "host_only", "is_input", "is_weight", "offset", "op",
        "pinned", "root", "rows", "seen", "shape", "size", "srcs", "type_id", "uses", "views",
        "where",
    )  # fmt: skip

    def __init__(
        self, op: str, shape: tuple[int, ...], size: int, srcs: tuple[Tensor, ...] = ()
    ) -> None:
        self.op = op
        self.shape = shape
        self.size = size
        self.srcs = srcs
        self.root: Tensor | None = None
        self.home: int | None = None
        self.pinned: int | None = None
        self.copies: tuple[Tensor | None, Tensor | None] = _NO_COPIES
        self.backend = self.where = NOWHERE
        self.is_weight = self.is_input = self.host_only = self.seen = False
        self.rows = self.type_id = self.uses = self.views = self.offset = 0


def leaf(size: int, shape: tuple[int, ...] = ()) -> Tensor:
    """An input of the graph, which is filled on the host."""
    tensor = Tensor("", shape, size)
    tensor.is_input = True
    tensor.backend = HOST
    return tensor


def weight(size: int, home: int, shape: tuple[int, ...] = (), type_id: int = 0) -> Tensor:
    """A tensor of the model."""
    tensor = Tensor("", shape, size)
    tensor.home = tensor.backend = home
    tensor.is_weight = True
    tensor.type_id = type_id
    return tensor


def cache(size: int, home: int) -> Tensor:
    """A cache, which the graph reads and writes."""
    tensor = Tensor("", (), size)
    tensor.home = tensor.backend = home
    return tensor


class Graph:
    """Operations in the order in which they run."""

    def __init__(self) -> None:
        self.nodes: list[Tensor] = []

    def expand(self, tensor: Tensor) -> None:
        """Appends what `tensor` needs and is not there yet, then itself."""
        if tensor.seen:
            return
        tensor.seen = True
        for src in tensor.srcs:
            if not src.seen:
                self.expand(src)
        if tensor.op:
            self.nodes.append(tensor)


def op(name: str, shape: tuple[int, ...], *srcs: Tensor, rows: int | None = None) -> Tensor:
    """An operation that gives `shape` floats."""
    tensor = Tensor(name, shape, _F32 * prod(shape), srcs)
    tensor.rows = prod(shape[1:]) if rows is None else rows
    return tensor


def same(name: str, first: Tensor, *others: Tensor) -> Tensor:
    """An operation whose result is like its first operand."""
    shape = first.shape
    tensor = Tensor(name, shape, _F32 * prod(shape), (first, *others))
    tensor.rows = prod(shape[1:])
    return tensor


def converted(name: str, size: int, source: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """An operation that makes `size` bytes of another type of `source`."""
    return Tensor(name, shape, size, (source,))


def written(name: str, into: Tensor, *srcs: Tensor) -> Tensor:
    """An operation that writes into another tensor, and takes no room itself."""
    tensor = Tensor(name, (1,), 0, (*srcs, into))
    tensor.root = into.root or into
    tensor.home = tensor.root.home
    return tensor


def matmul(matrix: Tensor, rows_in: Tensor, width: int) -> Tensor:
    """A product with a matrix that gives `width` floats for each row."""
    shape = (width, *rows_in.shape[1:])
    tensor = Tensor("mul_mat", shape, _F32 * prod(shape), (matrix, rows_in))
    tensor.rows = rows_in.shape[1] if len(rows_in.shape) > 1 else 1
    return tensor


def view(source: Tensor, shape: tuple[int, ...], size: int = 0) -> Tensor:
    """Another look at the same bytes. `size`: what a copy of it takes."""
    tensor = Tensor("view", shape, size or _F32 * prod(shape), (source,))
    root = source.root or source
    tensor.root = root
    if root.home is not None:
        tensor.home = root.home
    return tensor
