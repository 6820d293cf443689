"""The tensors of a computation and the order in which they are computed, as ggml keeps them."""

from __future__ import annotations

from math import prod

CARD, HOST = 0, 1
"""The two backends, the better one first."""

_F32 = 4


NOWHERE = -1


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
        self,
        op: str,
        shape: tuple[int, ...],
        size: int,
        srcs: tuple[Tensor, ...] = (),
        *,
        root: Tensor | None = None,
        rows: int = 0,
        home: int | None = None,
    ) -> None:
        self.op = op
        self.shape = shape
        self.size = size
        self.srcs = srcs
        self.root = root
        self.rows = rows
        self.home = home
        self.is_weight = False
        self.is_input = False
        self.pinned: int | None = None
        self.host_only = False
        self.type_id = 0
        self.seen = False
        self.backend = NOWHERE if home is None else home
        self.copies: list[Tensor | None] = []
        self.uses = self.views = 0
        self.where = NOWHERE
        self.offset = 0


def leaf(size: int, shape: tuple[int, ...] = ()) -> Tensor:
    """An input of the graph, which is filled on the host."""
    tensor = Tensor("", shape, size)
    tensor.is_input = True
    tensor.backend = HOST
    return tensor


def weight(size: int, home: int, shape: tuple[int, ...] = (), type_id: int = 0) -> Tensor:
    """A tensor of the model."""
    tensor = Tensor("", shape, size, home=home)
    tensor.is_weight = True
    tensor.type_id = type_id
    return tensor


def cache(size: int, home: int) -> Tensor:
    """A cache, which the graph reads and writes."""
    return Tensor("", (), size, home=home)


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
    if rows is None:
        rows = prod(shape[1:])
    return Tensor(name, shape, _F32 * prod(shape), srcs, rows=rows)


def same(name: str, first: Tensor, *others: Tensor) -> Tensor:
    """An operation whose result is like its first operand."""
    shape = first.shape
    return Tensor(name, shape, _F32 * prod(shape), (first, *others), rows=prod(shape[1:]))


def matmul(matrix: Tensor, rows_in: Tensor, width: int) -> Tensor:
    """A product with a matrix that gives `width` floats for each row."""
    shape = (width, *rows_in.shape[1:])
    batch = rows_in.shape[1] if len(rows_in.shape) > 1 else 1
    return Tensor("mul_mat", shape, _F32 * prod(shape), (matrix, rows_in), rows=batch)


def view(source: Tensor, shape: tuple[int, ...], size: int = 0) -> Tensor:
    """Another look at the same bytes. `size`: what a copy of it takes."""
    root = source.root or source
    size = size or _F32 * prod(shape)
    return Tensor("view", shape, size, (source,), root=root, home=root.home)
