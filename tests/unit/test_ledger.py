"""What loads took, and what the next plan makes of it."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from llmsup.core.gguf import joined
from llmsup.core.gguf_header import parse
from llmsup.core.ledger import (
    DISTURBED_BYTES,
    ENTRIES_MAX,
    LOADS_KEPT,
    OVERHEAD_BYTES,
    OVERHEAD_MAX_BYTES,
    Key,
    Ledger,
    Record,
    fingerprint,
)
from llmsup.core.options import Options
from llmsup.core.sizes import Estimate, Sizes
from tests.gguf_files import SMALL, TENSORS, gguf

MIB = 2**20
KEY = Key("a", Options(20), "b11434", "RTX 4050")
OTHER_LAYERS = replace(KEY, options=Options(21))
OTHER_MODEL = replace(KEY, fingerprint="b")
BUFFERS = Sizes(1000 * MIB, 100 * MIB, 80 * MIB)
ESTIMATE = Estimate(BUFFERS, Sizes())
POOL = 11 * MIB


def record(overhead_mib: int = 110, compute_mib: int = 80) -> Record:
    taken = replace(BUFFERS, compute_bytes=compute_mib * MIB)
    return Record(taken, overhead_mib * MIB, BUFFERS)


def total_mib(ledger: Ledger, key: Key = KEY, estimate: Estimate = ESTIMATE) -> float:
    return ledger.price(key, estimate, POOL).device_bytes / MIB


def test_before_the_first_load_the_usual_overhead_is_added() -> None:
    price = Ledger().price(KEY, ESTIMATE, POOL)

    assert (price.overhead_bytes, price.is_measured) == (OVERHEAD_BYTES + POOL, False)


def test_a_load_that_was_measured_costs_what_it_cost() -> None:
    """Even where that is less than was estimated, and the most of the last few."""
    ledger = Ledger().learn(KEY, record(110, 70))
    assert total_mib(ledger) == 1000 + 100 + 70 + 110
    assert ledger.price(KEY, ESTIMATE, POOL).is_measured

    ledger = ledger.learn(KEY, record(120)).learn(KEY, record(115))
    assert total_mib(ledger) == 1000 + 100 + 80 + 120

    for _ in range(LOADS_KEPT):
        ledger = ledger.learn(KEY, record(100))
    assert total_mib(ledger) == 1000 + 100 + 80 + 100


def test_other_options_of_the_same_model_are_corrected_by_it() -> None:
    """An engine whose compute buffer is larger than estimated has a larger one here, too."""
    ledger = Ledger().learn(KEY, record(110, compute_mib=86))

    price = ledger.price(OTHER_LAYERS, ESTIMATE, POOL)

    assert (price.overhead_bytes, price.is_measured) == ((110 + 6) * MIB, False)
    smaller = Ledger().learn(KEY, record(110, compute_mib=60))
    assert smaller.price(OTHER_LAYERS, ESTIMATE, POOL).overhead_bytes == 110 * MIB


def test_other_models_are_taken_to_have_the_usual_overhead_of_the_card() -> None:
    ledger = Ledger().learn(KEY, record(90, compute_mib=99))

    assert ledger.price(OTHER_MODEL, ESTIMATE, POOL).overhead_bytes == 90 * MIB + POOL


def test_another_engine_or_card_knows_nothing_of_it() -> None:
    ledger = Ledger().learn(KEY, record(90))
    for stranger in (replace(KEY, build="b2"), replace(KEY, card="RTX 3060")):
        assert ledger.price(stranger, ESTIMATE, POOL) == Ledger().price(stranger, ESTIMATE, POOL)


def test_a_program_that_came_while_a_model_loaded_is_not_taken_for_its_overhead() -> None:
    ledger = Ledger().learn(KEY, record(110)).learn(OTHER_MODEL, record(112))
    disturbed = ledger.learn(OTHER_LAYERS, record(112 + DISTURBED_BYTES // MIB + 1))

    for key in (KEY, OTHER_LAYERS, OTHER_MODEL):
        assert total_mib(disturbed, key) == total_mib(ledger, key)


def test_figures_that_cannot_be_those_of_one_load_are_not_learned() -> None:
    for overhead_mib in (-300, OVERHEAD_MAX_BYTES // MIB + 1):
        assert Ledger().learn(KEY, record(overhead_mib)) == Ledger()
    assert (
        total_mib(Ledger().learn(KEY, Record(BUFFERS, -100, BUFFERS))) == BUFFERS.total_bytes / MIB
    )


def test_the_oldest_is_forgotten() -> None:
    ledger = Ledger()
    for number in range(ENTRIES_MAX + 1):
        ledger = ledger.learn(replace(KEY, fingerprint=str(number)), record())
        ledger = ledger.learn(replace(KEY, fingerprint="used"), record())

    assert len(ledger.entries) == ENTRIES_MAX
    assert replace(KEY, fingerprint="0") not in ledger.entries
    assert replace(KEY, fingerprint="used") in ledger.entries


KEYS = st.builds(
    Key,
    st.sampled_from("ab"),
    st.builds(Options, st.integers(0, 3)),
    st.sampled_from(["b1", "b2"]),
    st.sampled_from(["one", "two"]),
)
RECORDS = st.builds(record, st.integers(-500, 1500), st.integers(0, 300))
LEARNED = st.lists(st.tuples(KEYS, RECORDS), max_size=20)


@given(LEARNED, KEYS)
def test_a_price_is_never_below_what_was_measured_or_estimated(
    learned: list[tuple[Key, Record]], key: Key
) -> None:
    ledger = Ledger()
    for each in learned:
        ledger = ledger.learn(*each)

    price = ledger.price(key, ESTIMATE, POOL)

    if price.is_measured:
        taken = [each.buffers.total_bytes + each.overhead_bytes for each in ledger.entries[key]]
        assert price.device_bytes in taken
    else:
        assert price.device_bytes >= BUFFERS.total_bytes


@given(LEARNED, KEYS, RECORDS)
def test_learning_changes_nothing_for_other_engines_and_cards(
    learned: list[tuple[Key, Record]], key: Key, new: Record
) -> None:
    before = Ledger()
    for each in learned:
        before = before.learn(*each)
    after = before.learn(key, new)
    for other in (replace(key, build="b3"), replace(key, card="three")):
        assert after.price(other, ESTIMATE, POOL) == before.price(other, ESTIMATE, POOL)


def test_a_model_is_known_by_its_header() -> None:
    def of(content: bytes) -> str:
        header = parse(content, len(content))
        assert header is not None
        return fingerprint(joined([header]))

    small = of(gguf())
    assert small == of(gguf())
    assert small != of(gguf({**SMALL, "llama.block_count": ("u32", 3)}))
    assert small != of(gguf(SMALL, (*TENSORS[:-1], ("output_norm.weight", (512,), 0))))
