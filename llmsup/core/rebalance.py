"""When a service gives layers back because other programs need the card, and when it grows. Pure.

A change costs a restart, so little is done: a dip that passes and a drift that the headroom is
there for are nothing, one service at a time changes, and one that had to shrink soon after it
grew waits twice as long before it grows again.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from llmsup.config.schema import Rebalance
from llmsup.core.options import Options
from llmsup.core.plan import Budget, Demand

MIB = 2**20
DRIFT_BYTES = 200 * MIB
DRIFT_PART = 30
PRESSURE_S = 10.0
SQUEEZE_S = 2.0
ROOM_S = 30.0
SHRUNK_LATELY_S = 600.0
GREW_LATELY_S = 900.0
FIRST_WAIT_S = 60.0
LAST_WAIT_S = 7200.0
GAIN_LAYERS = 2


@dataclass(frozen=True, slots=True)
class Extent:
    """How much of a model is on the card. `is_whole`: nothing was taken from what is asked for it.

    The experts of a layer count as a layer of their own.
    """

    layers: int
    is_whole: bool


def extent(options: Options, demand: Demand) -> Extent:
    """What these options have on the card of what is demanded."""
    layers = options.gpu_layers
    if layers and demand.has_experts:
        layers += max(0, demand.layers - 1 - options.n_cpu_moe)
    return Extent(layers, options == demand.asked)


@dataclass(frozen=True, slots=True)
class Tenant:
    """A service that has, or could have, layers on the card.

    `held_bytes`: what the card lost to it, as measured where that is known. `may_change`: a plan
    chose its layers, and it is not pinned. `may_pause`: nobody waits for it, or another service of
    each of its routes answers meanwhile. `possible`: what it would get were it, and only it,
    started anew now; None where that was not asked.
    """

    service: str
    extent: Extent
    held_bytes: int
    may_change: bool
    may_pause: bool
    possible: Extent | None = None


@dataclass(frozen=True, slots=True)
class Observation:
    """The card at one moment, and its tenants in the order in which it is given to them.

    `is_settled`: nobody loads, drains or stops.
    """

    budget: Budget
    tenants: tuple[Tenant, ...]
    is_settled: bool

    @property
    def keep_free_bytes(self) -> int:
        """What other programs and our services together should leave free."""
        budget = self.budget
        return max(budget.headroom_bytes, budget.total_bytes - budget.ceiling_bytes)

    @property
    def drift_bytes(self) -> int:
        """A change of the free memory that is nothing: 200 MiB, or less on a small card."""
        return min(DRIFT_BYTES, self.budget.total_bytes // DRIFT_PART)

    @property
    def missing_bytes(self) -> int:
        """How much less is free than should be; negative where there is more."""
        return self.keep_free_bytes - self.budget.free_bytes

    @property
    def is_pressed(self) -> bool:
        """Whether more is missing than a drift. At least half of what is kept free is for that."""
        return self.missing_bytes > min(self.drift_bytes, self.keep_free_bytes // 2)

    @property
    def is_squeezed(self) -> bool:
        """Whether so little is free that the next allocation may fail."""
        return self.is_pressed and self.budget.free_bytes < self.budget.headroom_bytes // 4

    @property
    def is_roomy(self) -> bool:
        """Whether more is free than a drift explains."""
        return -self.missing_bytes >= self.drift_bytes


@dataclass(frozen=True, slots=True)
class Past:
    """What was done to one service. `in_vain`: how often in a row it grew for nothing.

    `grew_from`: its layers when it was to grow last, and has not shrunk since.
    """

    shrunk_at: float | None = None
    grew_at: float | None = None
    grew_from: int | None = None
    in_vain: int = 0

    @property
    def wait_s(self) -> float:
        """So long it does not grow after a change."""
        return min(FIRST_WAIT_S * 2.0 ** min(self.in_vain, 60), LAST_WAIT_S)

    def has_waited(self, now: float) -> bool:
        """Whether its last change is long enough ago."""
        changes = (self.shrunk_at, self.grew_at)
        return all(at is None or now - at >= self.wait_s for at in changes)


@dataclass(frozen=True, slots=True)
class Balance:
    """What is known from one observation to the next. Times are monotonic seconds.

    `*_since`: the first of the observations in a row that found it so. `is_told`: a pressure that
    nothing is done about has been said.
    """

    rebalance: Rebalance
    pressed_since: float | None = None
    squeezed_since: float | None = None
    roomy_since: float | None = None
    pasts: Mapping[str, Past] = field(default_factory=lambda: MappingProxyType({}))
    is_told: bool = False

    def past(self, service: str) -> Past:
        """What was done to the service so far."""
        return self.pasts.get(service, Past())


@dataclass(frozen=True, slots=True)
class Shrink:
    """Start the service anew with so many bytes less, at least."""

    service: str
    by_bytes: int


@dataclass(frozen=True, slots=True)
class Grow:
    """Start the service anew: the card has room for more of it."""

    service: str


@dataclass(frozen=True, slots=True)
class TellPressure:
    """Say that other programs take what should be free, and why nothing is done about it."""

    why: str


@dataclass(frozen=True, slots=True)
class TellRelief:
    """Say that this is over."""


Action = Shrink | Grow | TellPressure | TellRelief


def step(balance: Balance, seen: Observation, now: float) -> tuple[Balance, tuple[Action, ...]]:
    """The balance after one more observation, and what is to be done about it.

    While something is on its way the memory is not what it will be: nothing follows from it.
    """
    if not seen.is_settled:
        return _forget(balance), ()
    after = replace(
        balance,
        pressed_since=_since(balance.pressed_since, seen.is_pressed, now),
        squeezed_since=_since(balance.squeezed_since, seen.is_squeezed, now),
        roomy_since=_since(balance.roomy_since, seen.is_roomy, now),
    )
    if seen.is_pressed:
        return _relieve(after, seen, now)
    told: tuple[Action, ...] = (TellRelief(),) if after.is_told else ()
    after, actions = _use_room(replace(after, is_told=False), seen, now)
    return after, told + actions


def growing(balance: Balance, seen: Observation, now: float) -> Iterator[Tenant]:
    """For whom it is worth asking what is possible, the first of them first.

    A plan costs milliseconds and an observation comes every few seconds, so it is made for these
    only, and when it gave nothing, not before there has been room for as long again.
    """
    if balance.rebalance != "auto" or not seen.is_settled or not seen.is_roomy:
        return
    if not _lasts(balance.roomy_since, ROOM_S, now):
        return
    for tenant in seen.tenants:
        may_grow = tenant.may_change and tenant.may_pause and not tenant.extent.is_whole
        if may_grow and balance.past(tenant.service).has_waited(now):
            yield tenant


def _relieve(balance: Balance, seen: Observation, now: float) -> tuple[Balance, tuple[Action, ...]]:
    is_urgent = _lasts(balance.squeezed_since, SQUEEZE_S, now)
    if not is_urgent and not _lasts(balance.pressed_since, PRESSURE_S, now):
        return balance, ()
    if balance.rebalance == "off":
        return _tell(balance, 'rebalance is "off"')
    givers = [each for each in seen.tenants if each.may_change and each.extent.layers > 0]
    if not givers:
        return _tell(balance, "no service has layers that it may give back")
    giver = givers[-1]
    if not is_urgent and not giver.may_pause:
        return balance, ()
    past = balance.past(giver.service)
    by_bytes = seen.missing_bytes
    if past.shrunk_at is not None and now - past.shrunk_at < SHRUNK_LATELY_S:
        by_bytes = max(by_bytes, giver.held_bytes // 2)  # not a layer at a time, again and again
    after = _forget(balance, giver.service, _shrunk(past, now))
    return after, (Shrink(giver.service, by_bytes),)


def _use_room(
    balance: Balance, seen: Observation, now: float
) -> tuple[Balance, tuple[Action, ...]]:
    after = balance
    for tenant in growing(balance, seen, now):
        possible = tenant.possible
        if possible is not None and _is_worth_a_restart(tenant.extent, possible):
            past = _grew(balance.past(tenant.service), tenant.extent, now)
            return _forget(balance, tenant.service, past), (Grow(tenant.service),)
        after = replace(balance, roomy_since=now)
    return after, ()


def _is_worth_a_restart(before: Extent, after: Extent) -> bool:
    gain = after.layers - before.layers
    return gain >= GAIN_LAYERS or (gain >= 0 and after.is_whole and not before.is_whole)


def _grew(past: Past, before: Extent, now: float) -> Past:
    came_to_nothing = past.grew_from is not None and before.layers <= past.grew_from
    in_vain = past.in_vain + 1 if came_to_nothing else past.in_vain
    return replace(past, grew_at=now, grew_from=before.layers, in_vain=in_vain)


def _shrunk(past: Past, now: float) -> Past:
    after = replace(past, shrunk_at=now, grew_from=None)
    if past.grew_at is None or past.grew_from is None:
        return after  # it has not grown since it shrank last: nothing to be learnt
    is_soon = now - past.grew_at < GREW_LATELY_S
    return replace(after, in_vain=past.in_vain + 1 if is_soon else 0)


def _tell(balance: Balance, why: str) -> tuple[Balance, tuple[Action, ...]]:
    if balance.is_told:
        return balance, ()
    return replace(balance, is_told=True), (TellPressure(why),)


def _forget(balance: Balance, service: str = "", past: Past | None = None) -> Balance:
    """What has been seen says nothing of what comes; `past` is now that of the service."""
    fresh = replace(balance, pressed_since=None, squeezed_since=None, roomy_since=None)
    if past is None:
        return fresh
    return replace(fresh, pasts=MappingProxyType({**balance.pasts, service: past}))


def _since(before: float | None, is_so: bool, now: float) -> float | None:
    if not is_so:
        return None
    return now if before is None else before


def _lasts(since: float | None, at_least_s: float, now: float) -> bool:
    return since is not None and now - since >= at_least_s
