"""Which backend computes what, where the graph is cut, and what is copied at each cut.

The rules are those of ggml_backend_sched_split_graph in ggml-backend.cpp.
"""

from dataclasses import dataclass, field

from llmsup.core.estimate.builder import OFFLOAD_MIN_ROWS
from llmsup.core.estimate.graph import CARD, HOST, Tensor

_NOWHERE = -1


@dataclass(slots=True)
class Split:
    """Nodes that one backend computes in a row, after it got copies of `inputs`."""

    backend: int
    nodes: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)


class Placing:
    """Where each tensor is."""

    def __init__(self, *, op_offload: bool) -> None:
        self.op_offload = op_offload
        self.backends: dict[Tensor, int] = {}

    def assign(self, nodes: list[Tensor]) -> None:
        """Gives every node a backend."""
        backends = self.backends
        real = [node for node in nodes if node.op != "view"]
        for node in real:
            backends[node] = self._first_guess(node)
        self._spread(real, only_card=True)
        self._spread(real[::-1], only_card=True)
        self._spread(real, only_card=False)
        self._spread(real[::-1], only_card=False)
        for node in real:
            if backends[node] == _NOWHERE:
                backends[node] = self._most_inputs(node)
        for node in nodes:
            if node.op == "view":
                self.of(node)

    def _first_guess(self, node: Tensor) -> int:
        if node.pinned is not None:
            return node.pinned
        if node.root is not None and node.root.home is not None:
            return node.root.home
        if node.op in ("rope", "flash_attn"):
            return _NOWHERE
        for src in node.srcs:
            if not src.is_weight:
                continue
            if src.home == CARD and not node.host_only:
                return CARD
            offloads = self.op_offload and not node.host_only and node.op != "get_rows"
            return CARD if offloads and node.rows >= OFFLOAD_MIN_ROWS else HOST
        return _NOWHERE

    def _spread(self, nodes: list[Tensor], *, only_card: bool) -> None:
        backends = self.backends
        current = _NOWHERE
        for node in nodes:
            backend = backends[node]
            if backend != _NOWHERE:
                current = _NOWHERE if only_card and backend == HOST else backend
            elif current != _NOWHERE and not (node.host_only and current == CARD):
                backends[node] = current

    def _most_inputs(self, node: Tensor) -> int:
        if node.host_only:
            return HOST
        on_card = sum(1 for src in node.srcs if self.of(src) == CARD)
        on_host = sum(1 for src in node.srcs if self.of(src) == HOST)
        return CARD if on_card >= on_host else HOST

    def of(self, tensor: Tensor) -> int:
        """The backend of any tensor: of a view, that of what it views."""
        root = tensor if tensor.root is None else tensor.root
        if root.home is not None:
            return root.home
        if root.is_input:
            return HOST
        return self.backends.get(root, _NOWHERE)


def split(
    nodes: list[Tensor], placing: Placing
) -> tuple[list[Split], dict[tuple[Tensor, int], Tensor]]:
    """The graph cut where the backend changes, and the copies on the card and on the host.

    A cut also is where a weight has to be copied, once the split has inputs: what was copied
    before is free by then. The copies are keyed by what they are copies of, and where they are.
    """
    splits: list[Split] = []
    copies: dict[tuple[Tensor, int], Tensor] = {}
    current: Split | None = None
    for node in nodes:
        if node.op == "view":
            if current is None:
                splits.append(current := Split(_first_backend(nodes, placing)))
            current.nodes.append(node)
            continue
        backend = placing.backends[node]
        if (
            current is None
            or backend != current.backend
            or (current.inputs and _has_far_weight(node, backend))
        ):
            splits.append(current := Split(backend))
        current.nodes.append(node)
        for src in node.srcs:
            if placing.of(src) != backend and (src, backend) not in copies:
                copies[src, backend] = Tensor("copy", src.shape, src.size)
                current.inputs.append(src)
    return splits, copies


def _first_backend(nodes: list[Tensor], placing: Placing) -> int:
    return next(placing.backends[node] for node in nodes if node.op != "view")


def _has_far_weight(node: Tensor, backend: int) -> bool:
    return any(src.is_weight and src.home != backend for src in node.srcs)
