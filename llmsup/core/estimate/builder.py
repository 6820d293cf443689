"""The pieces of which the graph of a model is built: weights, inputs, norms and products."""

from math import prod

from llmsup.core.estimate.effective import Effective
from llmsup.core.estimate.graph import (
    CARD,
    HOST,
    Graph,
    Tensor,
    leaf,
    matmul,
    op,
    same,
    view,
    weight,
)
from llmsup.core.estimate.weights import expert_is_on_card, outer_is_on_card, tied_output
from llmsup.core.shape import Block, ModelShape

OFFLOAD_MIN_ROWS = 32
"""From so many rows on an operation with a weight on the host runs on the card."""

_ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


class Builder:
    """Builds the graph of a model for one long prompt, at one layer at a time.

    `kept`: what has to last until a node is done, by that node.
    """

    def __init__(self, shape: ModelShape, options: Effective) -> None:
        self.shape = shape
        self.options = options
        self.traits = shape.traits
        self.tokens = options.tokens
        self.graph = Graph()
        self.kept: dict[Tensor, list[Tensor]] = {}
        self.has_windows = any(block.window for block in shape.blocks[: shape.trunk])
        self.number = 0
        self._inputs: dict[str, Tensor] = {}
        self._outer: dict[str, Tensor] = {}
        is_whole = options.first_block == 0 and options.has_output
        self._pins_norms = is_whole or options.tokens < OFFLOAD_MIN_ROWS

    @property
    def block(self) -> Block:
        """The present layer."""
        return self.shape.blocks[self.number]

    @property
    def home(self) -> int:
        """Where the present layer is."""
        return CARD if self.options.on_card(self.number) else HOST

    @property
    def cache_owner(self) -> int:
        """The layer whose cache the present one attends to: its own, or a like one's before."""
        if self.block.has_cache or not self.traits.has_cache:
            return self.number
        owners = [
            number
            for number, each in enumerate(self.shape.blocks[: self.number])
            if each.has_cache and each.window == self.block.window
        ]
        return owners[-1] if owners else self.number

    def has(self, name: str) -> bool:
        """Whether the present layer has a weight of that name."""
        return f"{name}.weight" in self.block.weights

    def input(self, name: str, size: int, shape: tuple[int, ...] = ()) -> Tensor:
        """What is filled on the host for each batch. Bytes."""
        if name not in self._inputs:
            self._inputs[name] = leaf(size, shape)
        return self._inputs[name]

    def view_of_input(self, name: str, source: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A view that all layers share."""
        if name not in self._inputs:
            self._inputs[name] = view(source, shape, max(1, 4 * prod(shape)))
        return self._inputs[name]

    def weight(self, name: str) -> Tensor | None:
        """A weight of the present layer; None where it has none."""
        found = self.block.weights.get(name)
        if found is None:
            return None
        home = self.home
        if found.is_expert:
            home = CARD if expert_is_on_card(self.number, self.options) else HOST
        return weight(found.device_bytes, home, found.shape, found.type_id)

    def outer(self, name: str) -> Tensor | None:
        """A weight that belongs to no layer; None where there is none."""
        found = self.shape.outer.get(name)
        if found is None:
            return None
        if name not in self._outer:
            home = CARD if outer_is_on_card(self.shape, name, self.options) else HOST
            self._outer[name] = weight(found.device_bytes, home, found.shape)
        return self._outer[name]

    def output(self) -> Tensor | None:
        """The matrix that gives the logits; None where there is none."""
        found = self.shape.outer.get("output.weight") or tied_output(self.shape)
        if found is None:
            return None
        return weight(found.device_bytes, CARD if self.options.has_output else HOST, found.shape)

    def norm(self, x: Tensor, name: str, *, pin: bool = True) -> Tensor:
        """A norm of the present layer. `pin`: the engine may say where it is computed."""
        return self.norm_by(x, self.weight(f"{name}.weight"), self.weight(f"{name}.bias"), pin=pin)

    def norm_by(
        self, x: Tensor, factors: Tensor | None, bias: Tensor | None, *, pin: bool = True
    ) -> Tensor:
        """A norm with its factors and its bias."""
        cur = same("norm" if self.traits.plain_norm else "rms_norm", x)
        if pin and self._pins_norms and (factors is not None or bias is not None):
            cur.pinned = self.home
        if factors is not None:
            cur = same("mul", cur, factors)
        if bias is not None:
            cur = same("add", cur, bias)
        return cur

    def product(self, name: str, x: Tensor) -> Tensor | None:
        """A product with a matrix of the present layer, and its bias; None without the matrix."""
        matrix = self.weight(f"{name}.weight")
        if matrix is None:
            return None
        cur = matmul(matrix, x, matrix.shape[1] if len(matrix.shape) > 1 else 1)
        bias = self.weight(f"{name}.bias")
        return cur if bias is None else same("add", cur, bias)

    def needed(self, name: str, x: Tensor) -> Tensor:
        """A product whose matrix an odd model may lack: then `x` as it is."""
        product = self.product(name, x)
        return x if product is None else product

    def rope(self, x: Tensor) -> Tensor:
        """Queries or keys turned by their position."""
        positions = self.input("positions", 4 * self.traits.positions * self.tokens)
        for name in _ROPE_FACTORS:
            found = self.shape.outer.get(name)
            if found is not None:
                key = f"{name}@{self.home}"  # the engine makes a copy for the card
                if key not in self._outer:
                    self._outer[key] = weight(found.device_bytes, self.home, found.shape)
                return same("rope", x, positions, self._outer[key])
        return same("rope", x, positions)

    def outputs(self, x: Tensor) -> Tensor:
        """Only the rows that have an output."""
        ids = self.input("out_ids", 4 * self.options.outputs)
        return op("get_rows", (x.shape[0], self.options.outputs), x, ids)
