"""The search among the choices of one demand. Prices are asked for when needed, and once.

A price is seen as the bound `buffers_at_least`, which is known for nothing, and a *gap* that only
asking tells. Between two steps that were asked for, the gap is expected to be no smaller than at
both of them. That picks the next question and nothing else: what is chosen was priced itself, so
that a wrong guess may cost a layer and never the card.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice

from llmsup.core.ladder import Step, degraded, is_required, steps
from llmsup.core.options import Options
from llmsup.core.plan import Degrade, Demand, Price

PROBES = 8
"""So many prices are asked for where fewer would do: guesses are checked with what is left."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to place a service: its step, what it gives for it, and what that takes."""

    step: int
    rung: int
    options: Options
    price: Price

    @property
    def device_bytes(self) -> int:
        """What it takes of the card."""
        return self.price.device_bytes

    @property
    def rank(self) -> tuple[int, int]:
        """More is better: a step first, then a lower rung."""
        return self.step, -self.rung


class Choices:
    """What one demand may get, and the best of it that fits."""

    def __init__(self, demand: Demand) -> None:
        self.demand = demand
        self.steps: tuple[Step, ...] = steps(demand)
        self.is_required = is_required(demand)
        self._prices: dict[Options, Price | None] = {}
        self._asked: dict[tuple[int, int], Choice] = {}
        self._gaps: dict[int, dict[int, int]] = {}  # of a rung, by step
        self._bounds: dict[tuple[int, int], int] = {}
        self.trouble = ""  # what the engine would refuse, if anything

    @property
    def top(self) -> int:
        """The best step."""
        return len(self.steps) - 1

    @cached_property
    def rungs(self) -> tuple[Options, ...]:
        """What may be given, the mildest first: nothing, then as `Demand.degrade` says."""
        rungs = [self.demand.asked]
        if self.steps[-1][0] == 0:
            return tuple(rungs)
        for what in self.demand.degrade:
            given = list(degraded(rungs[-1], what, self.demand.ctx_size_min))
            if what is Degrade.CACHE_TYPE:  # refused here, it is refused on all later rungs too
                given = [each for each in given if self._price(self._options(self.top, each))]
            rungs += given
        return tuple(rungs)

    @cached_property
    def least(self) -> Choice | None:
        """The cheapest that it would run with; None where it may not have any."""
        found = None
        for choice in self._cheap_ones():
            if self._may_take(choice) and (
                found is None or choice.device_bytes < found.device_bytes
            ):
                found = choice
        return found

    @property
    def cheapest(self) -> Choice | None:
        """The cheapest, no matter what it ran out of memory with; None if all are refused."""
        return min(self._cheap_ones(), key=lambda each: each.device_bytes, default=None)

    def best(self, room_bytes: int) -> Choice:
        """The best that takes no more than `room_bytes`; LookupError where there is none.

        There is one for what may go off the card, and for what is required if `least` fits.
        """
        room_bytes = max(0, room_bytes)
        if self.demand.at_most_bytes is not None:
            room_bytes = max(0, min(room_bytes, self.demand.at_most_bytes - 1))
        reached = self._climb(0, -1, room_bytes)
        if reached < self.top:
            for rung in range(1, len(self.rungs)):
                reached = self._climb(rung, reached, room_bytes)
            self._check_guesses(room_bytes)
        best = self._best_known(room_bytes)
        while best is not None and best.step < self.top:
            after = self.at(best.step + 1, best.rung)
            if after is None or after.device_bytes > room_bytes:
                break
            best = self._best_known(room_bytes)
        if best is None:
            raise LookupError(self.demand.service)
        return best

    def best_untouched(self, room_bytes: int) -> Choice | None:
        """The best known with nothing taken from the service."""
        bare = (each for each in self._asked.values() if each.rung == 0)
        fitting = (each for each in bare if each.device_bytes <= room_bytes)
        return max(fitting, key=lambda each: each.step, default=None)

    def at(self, step: int, rung: int) -> Choice | None:
        """This choice with its price; None where the engine would refuse it."""
        if (step, rung) not in self._asked:
            options = self._options(step, self._rung(rung))
            price = self._price(options)
            if price is None:
                return None
            self._asked[step, rung] = Choice(step, rung, options, price)
            gap_bytes = price.device_bytes - self.at_least(step, rung)
            self._gaps.setdefault(rung, {})[step] = gap_bytes
        return self._asked[step, rung]

    def at_least(self, step: int, rung: int) -> int:
        """A lower bound of what a choice takes of the card."""
        key = step, rung
        if key not in self._bounds:
            options = self._options(step, self._rung(rung))
            self._bounds[key] = self.demand.buffers_at_least(options) if options.gpu_layers else 0
        return self._bounds[key]

    def _rung(self, rung: int) -> Options:
        return self.rungs[rung] if rung else self.demand.asked  # no ladder unless it is needed

    def _options(self, step: int, rung: Options) -> Options:
        gpu_layers, n_cpu_moe = self.steps[step]
        return replace(rung, gpu_layers=gpu_layers, n_cpu_moe=n_cpu_moe)

    def _price(self, options: Options) -> Price | None:
        if options not in self._prices:
            try:
                self._prices[options] = self.demand.price(options)
            except ValueError as error:
                self._prices[options] = None
                self.trouble = str(error)
        return self._prices[options]

    def _may_take(self, choice: Choice) -> bool:
        most = self.demand.at_most_bytes
        return most is None or choice.device_bytes < most or choice.options.gpu_layers == 0

    def _climb(self, rung: int, reached: int, room_bytes: int) -> int:
        """The best step above `reached` that fits on this rung, as far as the gaps tell."""
        refused: set[int] = set()
        while True:
            for step in range(self.top, reached, -1):
                if rung and self.steps[step][0] == 0:
                    continue
                known = self._asked.get((step, rung))
                if known is not None:
                    if known.device_bytes <= room_bytes:
                        reached = step
                        break
                elif step not in refused and self._guess(step, rung) <= room_bytes:
                    if self.at(step, rung) is None:
                        refused.add(step)
                    break
            else:
                return reached

    def _guess(self, step: int, rung: int) -> int:
        gaps = self._gaps.get(rung, {})
        above = min((each for each in gaps if each > step), default=None)
        below = max((each for each in gaps if each < step), default=None)
        beside = [gaps[each] for each in (above, below) if each is not None]
        return self.at_least(step, rung) + min(beside, default=0)

    def _check_guesses(self, room_bytes: int) -> None:
        """Ask for better choices that were passed over, the nearest ones, up to the allowance."""
        best = self._best_known(room_bytes)
        passed_over = (
            key
            for key in self._keys()
            if key not in self._asked
            and (best is None or (key[0], -key[1]) > best.rank)
            and self.at_least(*key) <= room_bytes
        )
        for key in islice(passed_over, max(0, PROBES - len(self._prices))):
            self.at(*key)

    def _keys(self) -> list[tuple[int, int]]:
        """Steps and rungs of all choices, the least preferred first."""
        rungs = range(len(self.rungs) - 1, -1, -1)
        return [
            (step, rung)
            for step, (gpu_layers, _) in enumerate(self.steps)
            for rung in rungs
            if rung == 0 or gpu_layers
        ]

    def _best_known(self, room_bytes: int) -> Choice | None:
        fitting = (each for each in self._asked.values() if each.device_bytes <= room_bytes)
        return max(fitting, key=lambda each: each.rank, default=None)

    def _cheap_ones(self) -> list[Choice]:
        """The choices with the lowest bounds: the cheapest is expected among them."""
        bounded = sorted(self._keys(), key=lambda key: self.at_least(*key))
        return [each for key in bounded[: PROBES // 2] if (each := self.at(*key)) is not None]
