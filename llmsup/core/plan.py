"""The words of a plan: what is asked of the card, what there is, and who gets what.

`core.offload` makes a `Plan` of a `Budget` and some `Demand`s.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from llmsup.core.options import Options
from llmsup.core.sizes import Estimate


@dataclass(frozen=True, slots=True)
class Budget:
    """The card at the moment of a decision. Bytes.

    `free_bytes` as NVML said, and what is known to come back before it is used. `headroom_bytes`
    stay free. `ceiling_bytes` is the most that all programs together may take. `reserved_bytes`
    are kept for services that are not part of the decision.
    """

    device_name: str
    total_bytes: int
    free_bytes: int
    headroom_bytes: int
    ceiling_bytes: int
    reserved_bytes: int = 0

    @property
    def usable_bytes(self) -> int:
        """What the services of a plan may take together; never negative."""
        below_free = self.free_bytes - self.headroom_bytes
        below_ceiling = self.ceiling_bytes - (self.total_bytes - self.free_bytes)
        return max(0, min(below_free, below_ceiling) - self.reserved_bytes)


class Knob(Enum):
    """What a plan may choose of a service."""

    GPU_LAYERS = "gpu_layers"
    N_CPU_MOE = "n_cpu_moe"


class Degrade(Enum):
    """What a plan may take from a service, where its profile allows it, before it takes layers."""

    CACHE_TYPE = "cache_type"  # f16 keys and values become q8_0
    UBATCH = "ubatch"  # 512, then 256, then 128
    CTX_SIZE = "ctx_size"  # halved, down to what the profile says


@dataclass(frozen=True, slots=True)
class Price:
    """What one choice of options takes. `overhead_bytes` are the driver's: context and pools.

    `is_measured`: a load with these very options was measured, and the sum is what it took.
    """

    estimate: Estimate
    overhead_bytes: int
    is_measured: bool = False

    @property
    def device_bytes(self) -> int:
        """All that the card loses to the process."""
        return self.estimate.device.total_bytes + self.overhead_bytes


@dataclass(frozen=True, slots=True)
class Demand:
    """What one service asks of the card.

    `layers`: how many its model has for the card, the output layer among them. `asked`: its
    options with everything that may be chosen at its best. `knobs`: what may be chosen; without
    Knob.GPU_LAYERS the number of layers is the operator's word. `degrade`: in this order, and not
    below `ctx_size_min` tokens. `at_most_bytes`: it ran out of memory with more than this.

    `price` is what some options take; it costs a millisecond or so. `buffers_at_least` is a lower
    bound of the same, weights and KV cache, and costs next to nothing.
    """

    service: str
    model: str
    layers: int
    asked: Options
    price: Callable[[Options], Price]
    buffers_at_least: Callable[[Options], int]
    knobs: frozenset[Knob] = frozenset()
    degrade: tuple[Degrade, ...] = ()
    ctx_size_min: int = 0
    priority: int = 0
    pinned: bool = False
    has_experts: bool = False
    at_most_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Placement:
    """What one service got, and why: a sentence for a person.

    `next_bytes`: how much more one more step (a layer, or the experts of one) would take; None
    where there is none.
    """

    service: str
    model: str
    layers: int
    options: Options
    price: Price
    reason: str
    next_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """Who gets what, in the order of placing.

    `refusal`: why it cannot work, with the arithmetic; empty where it can. `hint` is what would
    help then, and `refused` are the services that do not fit. `budget` is None where there is no
    card, and `no_card` says why.
    """

    placements: tuple[Placement, ...]
    budget: Budget | None
    refusal: str = ""
    no_card: str = ""
    hint: str = ""
    refused: tuple[str, ...] = ()

    @property
    def left_bytes(self) -> int:
        """What is usable and not taken; negative where the plan does not fit."""
        if self.budget is None:
            return 0
        taken = sum(each.price.device_bytes for each in self.placements)
        return self.budget.usable_bytes - taken

    def of(self, service: str) -> Placement | None:
        """What the service got."""
        return next((each for each in self.placements if each.service == service), None)
