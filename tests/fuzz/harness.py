"""Random input to whatever reads what others wrote: no traceback, no hang, no memory blow-up.

A target is a function that raises on anything that may not happen; errors that it documents are
caught in it. Inputs of the past that broke something stand above it as `@example`s.

`LLMSUP_FUZZ_INPUTS` is how many inputs there are in all; `make fuzz` sets it to 100 000.
"""

import os
import signal
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

INPUTS = int(os.environ.get("LLMSUP_FUZZ_INPUTS", "600"))
SHARES = {
    "profile text": 3,
    "profile values": 3,
    "state file": 2,
    "control API": 3,
    "diagnosis": 3,
    "log lines": 2,
    "GGUF header": 6,
    "Envoy's clusters": 2,
    "Envoy's counters": 1,
    "upstream lists": 2,
    "event lines": 3,
}
"""The targets, and how the inputs are shared out among them."""

CPU_MAX_S = 5.0
PEAK_MAX_BYTES = 64 * 1024 * 1024

counts: Counter[str] = Counter()
"""How many inputs each target has had so far, those of a failure's reduction included."""

Check = Callable[..., None]


class HungError(Exception):
    """One input took longer than any should."""


def fuzz(target: str, **inputs: st.SearchStrategy[Any]) -> Callable[[Check], Check]:
    """Run the function on its share of the inputs, each within bounds of time and memory."""
    share = -(-INPUTS * SHARES[target] // sum(SHARES.values()))

    def decorate(check: Check) -> Check:
        @settings(max_examples=share, deadline=None, suppress_health_check=list(HealthCheck))
        @given(**inputs)
        @wraps(check)
        def within_bounds(*args: Any, **kwargs: Any) -> None:
            counts[target] += 1
            with bounded():
                check(*args, **kwargs)

        return within_bounds

    return decorate


@contextmanager
def bounded() -> Iterator[None]:
    """Time is that of the processor, which a busy machine does not lengthen."""
    tracemalloc.start()
    restored = signal.signal(signal.SIGVTALRM, _interrupt)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_MAX_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, restored)
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak_bytes < PEAK_MAX_BYTES, f"{peak_bytes} bytes for one input"


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise HungError(f"more than {CPU_MAX_S:g} s for one input")


EDITS = ("flip", "cut", "remove", "insert", "overwrite", "repeat", "splice")


def mutated(
    seeds: Sequence[bytes], tokens: Sequence[bytes] = (), edits: int = 5
) -> st.SearchStrategy[bytes]:
    """One of `seeds` with up to `edits` pieces changed, cut, repeated, or replaced by `tokens`."""
    pieces = st.binary(max_size=12)
    if tokens:
        pieces = st.one_of(st.sampled_from(tokens), pieces)

    @st.composite
    def edited(draw: st.DrawFn) -> bytes:
        data = bytearray(draw(st.sampled_from(seeds)))
        for _ in range(draw(st.integers(0, edits))):
            at = draw(st.integers(0, len(data)))
            to = at + draw(st.integers(0, 24))
            match draw(st.sampled_from(EDITS)):
                case "flip" if at < len(data):
                    data[at] ^= 1 << draw(st.integers(0, 7))
                case "cut":
                    del data[at:]
                case "remove":
                    del data[at:to]
                case "insert":
                    data[at:at] = draw(pieces)
                case "overwrite":
                    piece = draw(pieces)
                    data[at : at + len(piece)] = piece
                case "repeat":
                    data[at:at] = data[at:to] * draw(st.integers(1, 40))
                case "splice":
                    other = draw(st.sampled_from(seeds))
                    data[at:] = other[draw(st.integers(0, len(other))) :]
        return bytes(data)

    return edited()


JSON_TOKENS = (
    b"null", b"true", b"{}", b"[]", b'""', b"-1", b"1e999", b"NaN", b"1" * 400, b"[" * 3000,
    b'{"a":' * 3000, b'"\\ud800"', b'"\xff"', b'"\\u0000"', b"18446744073709551616", b"0.5",
)  # fmt: skip

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12),
    st.sampled_from([-1, 0, 2**63, 10**30, 1e308, float("nan"), "", "\x1b[31m", "\ud800", "NaN"]),
)  # fmt: skip
TREES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


def replaced(tree: Any, tables: Sequence[str] = ()) -> st.SearchStrategy[Any]:
    """`tree` with up to three of its places taken by something else, or removed."""

    @st.composite
    def changed(draw: st.DrawFn) -> Any:
        result = copied(tree)
        for _ in range(draw(st.integers(1, 3))):
            place = draw(st.sampled_from(_places(result)))
            if not place:
                continue
            holder: Any = result
            for part in place[:-1]:
                holder = holder[part]
            if draw(st.booleans()) or not isinstance(holder, dict):
                holder[place[-1]] = draw(TREES)
            else:
                name = draw(st.one_of(st.sampled_from([*tables, place[-1]]), st.text(max_size=8)))
                holder[name] = holder.pop(place[-1]) if draw(st.booleans()) else draw(TREES)
        return result

    return changed()


def copied(tree: Any) -> Any:
    """The tree anew, so that it can be changed."""
    if isinstance(tree, dict):
        return {name: copied(item) for name, item in tree.items()}
    return [copied(item) for item in tree] if isinstance(tree, list | tuple) else tree


def _places(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items: Any = ()
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list):
        items = enumerate(tree)
    return [at, *(place for name, item in items for place in _places(item, (*at, name)))]
