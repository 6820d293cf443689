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
from random import Random
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


def mutated(
    seeds: Sequence[bytes], tokens: Sequence[bytes] = (b"",), edits: int = 5
) -> st.SearchStrategy[bytes]:
    """One of `seeds` with up to `edits` pieces changed, cut, repeated, or replaced by `tokens`.

    The places are left to chance: hypothesis favours the ends of a range, and what is broken in
    its first byte reaches no further code.
    """

    @st.composite
    def one(draw: st.DrawFn) -> bytes:
        seed, count = draw(st.sampled_from(seeds)), draw(st.integers(0, edits))
        return edited(bytearray(seed), seeds, tokens, count, Random(draw(st.integers(0, 2**32))))

    return one()


def edited(
    data: bytearray, seeds: Sequence[bytes], tokens: Sequence[bytes], count: int, chance: Random
) -> bytes:
    """`data` with `count` edits, the places and kinds left to `chance`."""
    for _ in range(count):
        at = chance.randint(0, len(data))
        to = at + chance.randint(0, 24)
        piece = chance.choice(tokens) if chance.random() < 0.7 else chance.randbytes(to - at)
        match chance.choice(
            ("flip", "flip", "cut", "remove", "insert", "over", "repeat", "splice")
        ):
            case "flip" if at < len(data):
                data[at] ^= 1 << chance.randint(0, 7)
            case "cut" if chance.random() < 0.3:
                del data[at:]
            case "remove":
                del data[at:to]
            case "insert":
                data[at:at] = piece
            case "over":
                data[at : at + len(piece)] = piece
            case "repeat":
                data[at:at] = data[at:to] * chance.randint(1, 40)
            case "splice":
                other = chance.choice(seeds)
                data[at:] = other[min(at, len(other)) :]
    return bytes(data)


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
            place = draw(st.sampled_from(_places(result)[1:] or [()]))
            if not place:
                break
            holder: Any = result
            for part in place[:-1]:
                holder = holder[part]
            if draw(st.booleans()):
                holder[place[-1]] = draw(_like(holder[place[-1]]))
            elif draw(st.booleans()) or not isinstance(holder, dict):
                holder[place[-1]] = draw(TREES)
            else:
                name = draw(st.one_of(st.sampled_from([*tables, place[-1]]), st.text(max_size=8)))
                holder[name] = holder.pop(place[-1]) if draw(st.booleans()) else draw(TREES)
        return result

    return changed()


def _like(value: Any) -> st.SearchStrategy[Any]:
    """Values of the same kind: those that get past the check of kinds."""
    found: st.SearchStrategy[Any] = TREES
    match value:
        case bool():
            found = st.booleans()
        case int():
            found = st.one_of(st.integers(-2, 70_000), st.integers(), st.just(2**64))
        case float():
            found = st.floats(allow_nan=False, allow_infinity=False)
        case str():
            found = st.one_of(st.text(max_size=20), st.just(value * 2), st.just(value[1:]))
        case list():
            found = st.sampled_from([value * 2, value[1:], value * 20, value[::-1]])
        case dict():
            found = st.sampled_from([{**value, "x": 1}, dict(list(value.items())[1:]), {}])
    return found


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
