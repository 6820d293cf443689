"""What loads really took, and what the next one is therefore believed to take.

A key that was measured costs what was measured. Of any other the estimate counts, with what other
loads taught: how much more this engine's compute buffer took than was estimated for the model, and
what the driver takes for each process of this engine on this device.

Figures may lie: NVML tells of the whole device, and another program may take or give back memory
while a model loads. What remains after the buffers is therefore believed only where it is
plausible and not far from the median of such remainders. That is judged when a price is asked
for, not when a load is learned, so that no first lie decides what is believed later.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from statistics import median_low

from llmsup.core.options import Options
from llmsup.core.plan import Price
from llmsup.core.sizes import Estimate, Sizes

MIB = 2**20
PRIOR_OVERHEAD_BYTES = 125 * MIB
RECORDS_PER_KEY = 3
KEYS_PER_MODEL = 32
KEYS_MAX = 512

_RECENT_RESIDUALS = 8
_RESIDUAL_MAX_BYTES = 1024 * MIB
_GRAIN_BYTES = MIB
"""The log rounds each buffer to 0.01 MiB, and a driver hands out whole granules."""
_FAR_BYTES = 128 * MIB


@dataclass(frozen=True, slots=True)
class Key:
    """What a measurement is true for.

    `model` is its fingerprint, `engine` the build, `device` the card's UUID and its driver.
    """

    model: str
    options: Options
    engine: str
    device: str


@dataclass(frozen=True, slots=True)
class Record:
    """One load. Bytes on the card.

    `buffers` as the log told them, `extra_bytes` further ones (adapters, projector), `estimated`
    what had been estimated of `buffers`. `taken_bytes`: what the device lost to the load by NVML,
    None where that is not known. `time`: Unix seconds.
    """

    buffers: Sizes
    estimated: Sizes
    taken_bytes: int | None
    time: float
    extra_bytes: int = 0

    @property
    def residual_bytes(self) -> int | None:
        """What the device lost beyond the buffers; None where that cannot be true."""
        if self.taken_bytes is None:
            return None
        rest = self.taken_bytes - self.buffers.total_bytes - self.extra_bytes
        return max(0, rest) if -_GRAIN_BYTES <= rest <= _RESIDUAL_MAX_BYTES else None


@dataclass(frozen=True, slots=True)
class History:
    """The last loads of one key, oldest first."""

    key: Key
    records: tuple[Record, ...]


@dataclass(frozen=True)
class Ledger:
    """All that is known, longest unused first. A value: learning makes another one."""

    histories: tuple[History, ...] = ()

    # --- asking

    def price(self, key: Key, estimate: Estimate, pool_bytes: int, extra_bytes: int = 0) -> Price:
        """What a load of `key` is believed to take.

        `pool_bytes`: what its pool may grow to. `extra_bytes`: what is estimated of further buffers
        (adapters, projector), until a load of the model taught that.
        """
        if key.options.gpu_layers == 0:
            return Price(estimate, 0)
        records = self._by_key.get(key, ())
        believed = self._believed.get((key.engine, key.device), frozenset())
        measured = [record for record in records if record.residual_bytes in believed]
        if measured:
            return _as_measured(estimate, measured)
        residual = max(believed, default=PRIOR_OVERHEAD_BYTES)
        if records:  # its buffers are known, what the driver took is not
            largest = max(records, key=lambda each: each.buffers.total_bytes + each.extra_bytes)
            overhead = residual + pool_bytes + largest.extra_bytes
            return Price(replace(estimate, device=largest.buffers), overhead)
        excess, extra = self._taught.get((key.model, key.engine), (0, 0))
        device = estimate.device
        device = replace(device, compute_bytes=device.compute_bytes + excess)
        return Price(
            replace(estimate, device=device), residual + pool_bytes + (extra or extra_bytes)
        )

    # --- learning

    def learn(self, key: Key, record: Record) -> "Ledger":
        """With one more load of `key`, which went well."""
        records = (*self._by_key.get(key, ()), record)[-RECORDS_PER_KEY:]
        return self._with(History(key, records))

    def _with(self, history: History) -> "Ledger":
        """With this history as the newest, and the oldest ones beyond the bounds left out."""
        others = [each for each in self.histories if each.key != history.key]
        same_model = [each for each in others if each.key.model == history.key.model]
        surplus = {each.key for each in same_model[: max(0, len(same_model) + 1 - KEYS_PER_MODEL)]}
        kept = [each for each in others if each.key not in surplus]
        return replace(self, histories=(*kept, history)[-KEYS_MAX:])

    # --- what the histories say together

    @cached_property
    def _by_key(self) -> dict[Key, tuple[Record, ...]]:
        return {history.key: history.records for history in self.histories}

    @cached_property
    def _believed(self) -> dict[tuple[str, str], frozenset[int]]:
        """The residuals of each engine on each device that can be true."""
        found: dict[tuple[str, str], list[int]] = {}
        for history in reversed(self.histories):
            of_it = found.setdefault((history.key.engine, history.key.device), [])
            residuals = (record.residual_bytes for record in reversed(history.records))
            of_it.extend(each for each in residuals if each is not None)
        return {each: _near_the_median(residuals) for each, residuals in found.items()}

    @cached_property
    def _taught(self) -> dict[tuple[str, str], tuple[int, int]]:
        """Of each model with each engine: the compute beyond the estimate, and further buffers."""
        taught: dict[tuple[str, str], tuple[int, int]] = {}
        for history in self.histories:
            of_it = (history.key.model, history.key.engine)
            excess, extra = taught.get(of_it, (0, 0))
            for record in history.records:
                beyond = record.buffers.compute_bytes - record.estimated.compute_bytes
                excess, extra = max(excess, beyond), max(extra, record.extra_bytes)
            taught[of_it] = excess, extra
        return taught


def _near_the_median(residuals: Iterable[int]) -> frozenset[int]:
    recent = list(islice(residuals, _RECENT_RESIDUALS))
    if not recent:
        return frozenset()
    middle = median_low(recent)
    return frozenset(each for each in recent if abs(each - middle) <= _FAR_BYTES)


def _as_measured(estimate: Estimate, records: Iterable[Record]) -> Price:
    """The largest of some measurements, whose sum is what the device lost."""

    def overhead_bytes(record: Record) -> int:
        return (record.residual_bytes or 0) + record.extra_bytes

    largest = max(records, key=lambda each: each.buffers.total_bytes + overhead_bytes(each))
    measured = replace(estimate, device=largest.buffers)
    return Price(measured, overhead_bytes(largest), is_measured=True)
