"""What loads really took, kept per model, options, engine and card; the next plan uses it. Pure.

A load that was measured costs what it cost: what fitted yesterday fits today. For a choice that was
never loaded, what was learned corrects the estimate: how much larger this engine makes the compute
buffer of this model, and what the driver takes for each process on this card.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from statistics import median_low

from llmsup.core.gguf import Model, Unread
from llmsup.core.options import Options
from llmsup.core.plan import Price
from llmsup.core.sizes import Estimate, Sizes

MIB = 2**20
OVERHEAD_BYTES = 125 * MIB
"""Of a process whose like was never measured: a CUDA context and lazily loaded modules."""

OVERHEAD_MAX_BYTES = 1024 * MIB
"""More than this beside the buffers is another program's, which came while the model loaded."""

DISTURBED_BYTES = 128 * MIB
LOADS_KEPT = 3
ENTRIES_MAX = 256
PEERS = 5
GRAIN_BYTES = MIB
"""A log tells sizes with two decimals of a MiB: less than this is no difference."""


@dataclass(frozen=True, slots=True)
class Key:
    """What decides how much a load takes. `card` is the name of its model, for twins are alike."""

    fingerprint: str
    options: Options
    build: str
    card: str


@dataclass(frozen=True, slots=True)
class Record:
    """One load. `buffers` on the card as the engine's log tells them, `overhead_bytes` what the
    card lost beside them, `estimated` the estimate of the same.
    """

    buffers: Sizes
    overhead_bytes: int
    estimated: Sizes

    @property
    def is_believable(self) -> bool:
        """Whether the card lost about what the buffers take, and nobody else came meanwhile."""
        return -GRAIN_BYTES <= self.overhead_bytes <= OVERHEAD_MAX_BYTES

    @property
    def compute_excess_bytes(self) -> int:
        """How much larger the compute buffer is than it was estimated."""
        return self.buffers.compute_bytes - self.estimated.compute_bytes


@dataclass(frozen=True, slots=True)
class Ledger:
    """All that was learned: the last loads of each key, the latest key last."""

    entries: Mapping[Key, tuple[Record, ...]] = field(default_factory=dict)

    def learn(self, key: Key, record: Record) -> "Ledger":
        """With one more load; as it was where the figures cannot be those of one load."""
        if not record.is_believable:
            return self
        entries = {one: records for one, records in self.entries.items() if one != key}
        record = replace(record, overhead_bytes=max(0, record.overhead_bytes))
        entries[key] = (*self.entries.get(key, ()), record)[-LOADS_KEPT:]
        while len(entries) > ENTRIES_MAX:
            del entries[next(iter(entries))]
        return Ledger(entries)

    def price(self, key: Key, estimate: Estimate, pool_bytes: int) -> Price:
        """What a choice takes, by what was learned. `pool_bytes`: estimated for its pools."""
        alike = self._trusted(key)
        own = [record for one, record in alike if one == key]
        if own:
            return _measured(own, estimate)
        of_model = [record for one, record in alike if one.fingerprint == key.fingerprint]
        excess_bytes = max((each.compute_excess_bytes for each in of_model), default=0)
        if of_model:
            overhead_bytes = max(each.overhead_bytes for each in of_model[-PEERS:])
        elif alike:
            # A load shows little of the pools, which grow at the first long prompt.
            overhead_bytes = _usual_bytes(record for _, record in alike[-PEERS:]) + pool_bytes
        else:
            overhead_bytes = OVERHEAD_BYTES + pool_bytes
        return Price(estimate, overhead_bytes + max(0, excess_bytes))

    def _trusted(self, key: Key) -> list[tuple[Key, Record]]:
        """Loads by the same engine on the same card, but for those that somebody else disturbed.

        What a process takes beside its buffers is much the same for all models: where one took far
        more than is usual, another program came while it loaded.
        """
        alike = [
            (one, record)
            for one, records in self.entries.items()
            if (one.build, one.card) == (key.build, key.card)
            for record in records
        ]
        if not alike:
            return []
        limit_bytes = _usual_bytes(record for _, record in alike) + DISTURBED_BYTES
        return [each for each in alike if each[1].overhead_bytes <= limit_bytes]


def _usual_bytes(records: Iterable[Record]) -> int:
    return median_low(each.overhead_bytes for each in records)


def _measured(records: Iterable[Record], estimate: Estimate) -> Price:
    """The most that the last loads took. It may be less than was estimated."""
    took_bytes = max(each.buffers.total_bytes + each.overhead_bytes for each in records)
    return Price(estimate, took_bytes - estimate.device.total_bytes, is_measured=True)


def fingerprint(model: Model) -> str:
    """Tells models apart by what is in their headers, whatever their files are called."""
    digest = hashlib.sha256(str(model.file_bytes).encode())
    architecture = f"{model.architecture}."
    for key, value in sorted(model.metadata.items()):
        if key.startswith(architecture) and not isinstance(value, Unread):
            digest.update(f"{key}={value!r};".encode())
    for tensor in model.tensors:
        digest.update(f"{tensor.name}{tensor.shape}{tensor.type_id};".encode())
    return digest.hexdigest()[:16]
