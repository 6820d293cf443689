"""The search among the choices of one demand. Prices are asked for when needed, and once.

A price is seen as the bound `buffers_at_least`, which is known for nothing, and a *gap* that only
asking tells. Between two steps that were asked for, the gap is expected to be no smaller than at
both of them. That picks the next question and nothing else: what is chosen was priced itself, so
that a wrong guess may cost a layer and never the card.
"""

from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from llmsup.core.ladder import Step, degraded, is_required, steps
from llmsup.core.options import Options
from llmsup.core.plan import Degrade, Demand, Price

FEW = 8
"""With no more choices than that all are asked for: the layers of a small model are small beside
its gap, and guesses tell little."""


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
        self._gaps: dict[int, dict[int, int | None]] = {}  # of a rung, by step
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
    def cheapest(self) -> Choice | None:
        """The cheapest, whatever it ran out of memory with; None where the engine refuses all."""
        found: Choice | None = None
        by_bound = sorted(self._keys(), key=lambda key: self.at_least(*key))
        for key in by_bound[:FEW]:
            if found is not None and self.at_least(*key) >= found.device_bytes:
                break
            choice = self.at(*key)
            if choice is not None and (found is None or choice.device_bytes < found.device_bytes):
                found = choice
        return found

    @property
    def least(self) -> Choice | None:
        """The least that it would run with; None where it may not have even that."""
        most_bytes = self.demand.at_most_bytes
        least = self.cheapest
        if least is None or most_bytes is None or least.options.gpu_layers == 0:
            return least
        return least if least.device_bytes < most_bytes else None

    def best(self, room_bytes: int) -> Choice:
        """The best that takes no more than `room_bytes`; LookupError where there is none.

        There is one for what may go off the card, and for what is required if `least` fits.
        """
        room_bytes = self._allowed(room_bytes)
        while True:
            self._search(room_bytes)
            fitting = (each for each in self._asked.values() if each.device_bytes <= room_bytes)
            best = max(fitting, key=lambda each: each.rank, default=None)
            if best is None:
                raise LookupError(self.demand.service)
            if best.step == self.top:
                return best
            after = self.at(best.step + 1, best.rung)
            if after is None or after.device_bytes > room_bytes:
                return best

    def need(self, room_bytes: int) -> int:
        """What the whole model takes, and no more than it may use of `room_bytes`."""
        room_bytes = self._allowed(room_bytes)
        if self.at_least(self.top, 0) >= room_bytes:
            return room_bytes
        whole = self.at(self.top, 0)
        return room_bytes if whole is None else min(whole.device_bytes, room_bytes)

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
            gaps = self._gaps.setdefault(rung, {})
            gaps[step] = None
            if price is None:
                return None
            self._asked[step, rung] = Choice(step, rung, options, price)
            if options.gpu_layers:  # off the card there is none, which tells nothing of the others
                gaps[step] = price.device_bytes - self.at_least(step, rung)
        return self._asked[step, rung]

    def at_least(self, step: int, rung: int) -> int:
        """A lower bound of what a choice takes of the card."""
        key = step, rung
        if key not in self._bounds:
            options = self._options(step, self._rung(rung))
            self._bounds[key] = self.demand.buffers_at_least(options) if options.gpu_layers else 0
        return self._bounds[key]

    def _allowed(self, room_bytes: int) -> int:
        most_bytes = self.demand.at_most_bytes
        return max(0, room_bytes if most_bytes is None else min(room_bytes, most_bytes - 1))

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

    def _search(self, room_bytes: int) -> None:
        may_be_off = self.steps[0][0] == 0
        if may_be_off:
            self.at(0, 0)  # fits any room
        reached = self._climb(0, 0 if may_be_off else -1, room_bytes)
        if reached == self.top:
            return
        if len(self.rungs) > 1:
            self._give(reached, room_bytes)
        keys = self._keys()
        if len(keys) <= FEW:
            for key in keys:
                if self.at_least(*key) <= room_bytes:
                    self.at(*key)

    def _climb(self, rung: int, reached: int, room_bytes: int) -> int:
        """The best step above `reached` that fits on this rung, as far as the gaps tell."""
        while True:
            fitting = (
                choice.step
                for choice in self._asked.values()
                if choice.rung == rung and choice.device_bytes <= room_bytes
            )
            reached = max([reached, *fitting])
            step = self._hopeful(rung, reached, room_bytes)
            if step is None:
                return reached
            self.at(step, rung)

    def _hopeful(self, rung: int, reached: int, room_bytes: int) -> int | None:
        """The best step above `reached` that may fit and was not asked for."""
        gaps = self._gaps.setdefault(rung, {})
        walls = [reached, *sorted(step for step in gaps if step > reached), self.top + 1]
        for below, above in reversed(list(pairwise(walls))):
            known = [gap for each in (below, above) if (gap := gaps.get(each)) is not None]
            step = self._last_below(room_bytes - min(known, default=0), rung, below, above)
            if step > below:
                return step
        return None

    def _last_below(self, limit_bytes: int, rung: int, below: int, above: int) -> int:
        """The last step between two whose bound is within a limit, or `below`."""
        between = range(below + 1, above)
        return below + bisect_right(between, limit_bytes, key=lambda at: self.at_least(at, rung))

    def _give(self, reached: int, room_bytes: int) -> None:
        """Look for steps above `reached` on the last rung, and for the mildest that keeps them."""
        refused, fitting = 0, len(self.rungs) - 1
        step = self._climb(fitting, reached, room_bytes)
        if step == reached:
            return
        while fitting - refused > 1:
            rung = (refused + fitting) // 2
            choice = self.at(step, rung)
            if choice is not None and choice.device_bytes <= room_bytes:
                fitting = rung
            else:
                refused = rung

    def _keys(self) -> list[tuple[int, int]]:
        """Steps and rungs of all choices."""
        rungs = range(len(self.rungs))
        return [
            (step, rung)
            for step, (gpu_layers, _) in enumerate(self.steps)
            for rung in rungs
            if rung == 0 or gpu_layers
        ]
