"""Which backend computes what, where the graph is cut, and what is copied at each cut.

The rules are those of ggml_backend_sched_split_graph in ggml-backend.cpp.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from llmsup.core.estimate.builder import OFFLOAD_MIN_ROWS
from llmsup.core.estimate.graph import CARD, HOST, NOWHERE, Tensor


@dataclass(slots=True)
class Split:
    """Nodes that one backend computes in a row, each with what it reads there.

    `inputs` are copied to the backend before the first one runs: sources and copies.
    """

    backend: int
    steps: list[tuple[Tensor, tuple[Tensor, ...]]] = field(default_factory=list)
    inputs: list[tuple[Tensor, Tensor]] = field(default_factory=list)


def assign(nodes: list[Tensor], *, op_offload: bool) -> None:
    """Gives every node a backend."""
    real = [node for node in nodes if node.op != "view"]
    for node in real:
        node.backend = _first_guess(node, op_offload)
    backwards = real[::-1]
    _spread_card(real)
    _spread_card(backwards)
    _spread(real)
    _spread(backwards)
    for node in real:
        if node.backend == NOWHERE:
            node.backend = _most_inputs(node)


def _first_guess(node: Tensor, op_offload: bool) -> int:
    if node.pinned is not None:
        return node.pinned
    if node.root is not None and node.root.home is not None:
        return node.root.home
    if node.op not in ("rope", "flash_attn"):
        for src in node.srcs:
            if src.is_weight:
                return _by_weight(node, src, op_offload)
    return NOWHERE


def _by_weight(node: Tensor, matrix: Tensor, op_offload: bool) -> int:
    """Work goes to the weight, or the weight to the card where there is much to do."""
    if node.host_only:
        return HOST
    offloads = op_offload and node.rows >= OFFLOAD_MIN_ROWS and node.op != "get_rows"
    return CARD if matrix.home == CARD or offloads else HOST


def _spread_card(nodes: Iterable[Tensor]) -> None:
    """What stands beside the card's work, up to the host's, is the card's."""
    is_card = False
    for node in nodes:
        if node.backend != NOWHERE:
            is_card = node.backend == CARD
        elif is_card and not node.host_only:
            node.backend = CARD


def _spread(nodes: Iterable[Tensor]) -> None:
    current = NOWHERE
    for node in nodes:
        if node.backend != NOWHERE:
            current = node.backend
        elif current == HOST or (current == CARD and not node.host_only):
            node.backend = current


def _most_inputs(node: Tensor) -> int:
    if node.host_only:
        return HOST
    backends = [place(src) for src in node.srcs]
    return CARD if backends.count(CARD) >= backends.count(HOST) else HOST


def place(tensor: Tensor) -> int:
    """The backend of any tensor: of a view, that of what it views."""
    return (tensor.root or tensor).backend


def cut(nodes: list[Tensor]) -> list[Split]:
    """The graph cut where the backend changes.

    A cut also is where a weight has to be copied, once the split has inputs: what was copied
    before is free by then.
    """
    first = next((node.backend for node in nodes if node.op != "view"), HOST)
    current = Split(first)
    splits = [current]
    for node in nodes:
        srcs = node.srcs
        if node.op == "view":
            current.steps.append((node, srcs))
            continue
        backend = node.backend
        if backend != current.backend or (current.inputs and _has_far_weight(node, backend)):
            current = Split(backend)
            splits.append(current)
        for src in srcs:
            if (src.root or src).backend != backend:
                srcs = tuple(_near(each, backend, current) for each in srcs)
                break
        current.steps.append((node, srcs))
    return splits


def _near(src: Tensor, backend: int, current: Split) -> Tensor:
    """What the backend reads instead of `src`: itself, or its copy, which is made once."""
    if place(src) == backend:
        return src
    copy = src.copies[backend]
    if copy is None:
        copy = Tensor("copy", src.shape, src.size)
        on_card, on_host = src.copies
        src.copies = (copy, on_host) if backend == CARD else (on_card, copy)
        current.inputs.append((src, copy))
    return copy


def _has_far_weight(node: Tensor, backend: int) -> bool:
    return any(src.is_weight and src.home != backend for src in node.srcs)
