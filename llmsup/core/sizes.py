"""Bytes of memory, by what they are for: what an estimate tells and what a log measured."""

from dataclasses import dataclass, field
from enum import Enum


@dataclass(frozen=True, slots=True)
class Sizes:
    """The buffers of one process on one side, card or host."""

    weights_bytes: int = 0
    kv_cache_bytes: int = 0
    compute_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All of them together."""
        return self.weights_bytes + self.kv_cache_bytes + self.compute_bytes


class Basis(Enum):
    """What an estimate of the compute buffer rests on."""

    GRAPH = "the graph of its architecture"
    BOUND = "an upper bound: its architecture is not known here"


@dataclass(frozen=True, slots=True)
class Item:
    """A part of an estimate that a person understands: "output layer", "largest host tensor"."""

    what: str
    device_bytes: int = 0
    host_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one process takes on the card and on the host; `items` add up to both.

    Not in it: what the driver takes for each process (context, pools), which no buffer shows.
    """

    device: Sizes
    host: Sizes
    basis: Basis = Basis.GRAPH
    items: tuple[Item, ...] = field(default=(), compare=False)
    notes: tuple[str, ...] = ()
