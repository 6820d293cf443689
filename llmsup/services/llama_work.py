"""What a llama-server tells about its work: `/metrics` and `/slots`, read.

Both are answered by its decoding loop (a loop that hangs answers neither), save while a batch is
computed: then they show what was true before it. `/slots` wakes a server that sleeps
(`--sleep-idle-seconds`) and keeps it awake; `/metrics` does not.
"""

import re
from collections.abc import Iterable
from math import isfinite

import msgspec

from llmsup.core.liveness import Work

METRICS_PATH = "/metrics"
SLOTS_PATH = "/slots"

_METRIC = re.compile(r"^llamacpp:(\w+)(?:\{[^}]*\})? ([0-9.eE+-]+)", re.MULTILINE)
_PENDING = ("requests_processing", "requests_deferred")
_PROGRESS = ("n_decode_total", "prompt_tokens_total", "tokens_predicted_total")


class _NextToken(msgspec.Struct, frozen=True):
    n_decoded: int = 0


class _Slot(msgspec.Struct, frozen=True):
    id: int
    is_processing: bool
    id_task: int = -1
    n_prompt_tokens_processed: int = 0
    next_token: _NextToken | tuple[_NextToken, ...] = ()

    @property
    def decoded(self) -> int:
        """Tokens decoded for its request; older servers have an object, newer ones a list."""
        if isinstance(self.next_token, _NextToken):
            return self.next_token.n_decoded
        return sum(token.n_decoded for token in self.next_token)


_SLOTS = msgspec.json.Decoder(tuple[_Slot, ...])


def parse_metrics(body: bytes) -> Work:
    """The answer to `/metrics`. Raises ValueError for anything else."""
    numbers = ((name, float(number)) for name, number in _METRIC.findall(body.decode()))
    metrics = {name: number for name, number in numbers if isfinite(number)}
    if _PENDING[0] not in metrics:
        raise ValueError(f"no llamacpp:{_PENDING[0]} among the metrics")
    return Work(
        pending=int(sum(metrics.get(name, 0) for name in _PENDING)),
        counters={name: metrics[name] for name in _PROGRESS if name in metrics},
    )


def parse_slots(body: bytes) -> Work:
    """The answer to `/slots`. Raises ValueError for anything else."""
    slots = _SLOTS.decode(body)
    counters: dict[str, float] = {}
    for slot in slots:
        counters[f"slot {slot.id} task"] = slot.id_task
        counters[f"slot {slot.id} prompt tokens"] = slot.n_prompt_tokens_processed
        counters[f"slot {slot.id} tokens"] = slot.decoded
    return Work(pending=sum(slot.is_processing for slot in slots), counters=counters)


def merged(works: Iterable[Work]) -> Work:
    """What several answers told, in one. Each may know of requests that the others do not."""
    counters: dict[str, float] = {}
    pending = 0
    for work in works:
        pending = max(pending, work.pending)
        counters |= work.counters
    return Work(pending, counters)
