"""The ledger: what loads taught, and what is believed of it."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from llmsup.core.fingerprint import fingerprint
from llmsup.core.gguf import Header, Model, Tensor
from llmsup.core.ledger import (
    KEYS_MAX,
    KEYS_PER_MODEL,
    PRIOR_OVERHEAD_BYTES,
    Key,
    Ledger,
    Record,
)
from llmsup.core.options import Options
from llmsup.core.plan import Price
from llmsup.core.sizes import Estimate, Sizes

MIB = 2**20
POOL = 10 * MIB
ESTIMATED = Sizes(1800 * MIB, 36 * MIB, 80 * MIB)
ESTIMATE = Estimate(ESTIMATED, Sizes())
KEY = Key("model", Options(37), "b11434", "GPU-1 550")
OTHER = replace(KEY, options=Options(20))
STRANGER = replace(KEY, model="stranger")


def load(
    overhead_mib: int = 130, buffers: Sizes = ESTIMATED, time: float = 0.0, extra_bytes: int = 0
) -> Record:
    taken = buffers.total_bytes + extra_bytes + overhead_mib * MIB
    return Record(buffers, ESTIMATED, taken, time, extra_bytes)


def test_what_was_never_seen_costs_the_estimate_and_the_prior() -> None:
    price = Ledger().price(KEY, ESTIMATE, POOL)
    assert price == Price(ESTIMATE, PRIOR_OVERHEAD_BYTES + POOL)


def test_what_is_off_the_card_costs_nothing_of_it() -> None:
    off = Estimate(Sizes(), ESTIMATED)
    ledger = Ledger().learn(KEY, load())
    assert ledger.price(replace(KEY, options=Options(0)), off, POOL).device_bytes == 0


sizes = st.builds(Sizes, *[st.integers(0, 4096 * MIB)] * 3)


@given(sizes, st.integers(0, 1024), st.integers(0, 512 * MIB))
def test_a_measured_key_costs_what_was_measured(buffers: Sizes, rest: int, extra: int) -> None:
    record = load(rest, buffers, extra_bytes=extra)
    price = Ledger().learn(KEY, record).price(KEY, ESTIMATE, POOL)
    assert price.is_measured
    assert price.device_bytes == record.taken_bytes


def test_of_several_loads_the_largest_counts() -> None:
    ledger = Ledger()
    for overhead in (120, 140, 130):
        ledger = ledger.learn(KEY, load(overhead))
    taken = load(140).taken_bytes
    assert ledger.price(KEY, ESTIMATE, POOL).device_bytes == taken


@given(st.permutations([KEY, OTHER, STRANGER]))
def test_the_order_of_equal_loads_does_not_matter(keys: list[Key]) -> None:
    ledger = Ledger()
    for key in keys:
        ledger = ledger.learn(key, load())
    straight = Ledger().learn(KEY, load()).learn(OTHER, load()).learn(STRANGER, load())
    for key in (KEY, replace(STRANGER, options=Options(5))):
        assert ledger.price(key, ESTIMATE, POOL) == straight.price(key, ESTIMATE, POOL)


def test_a_newer_engine_that_takes_more_compute_teaches_it_for_other_options() -> None:
    more = replace(ESTIMATED, compute_bytes=ESTIMATED.compute_bytes + 4 * MIB)
    ledger = Ledger().learn(KEY, load(130, more))
    price = ledger.price(OTHER, ESTIMATE, POOL)
    assert price.estimate.device == more
    assert price.overhead_bytes == 130 * MIB + POOL
    newer = replace(OTHER, engine="b12000")
    assert ledger.price(newer, ESTIMATE, POOL) == Price(ESTIMATE, PRIOR_OVERHEAD_BYTES + POOL)


@given(st.lists(st.tuples(sizes, st.integers(-4096, 4096)), max_size=12))
def test_no_load_changes_the_buffers_of_another_model(loads: list[tuple[Sizes, int]]) -> None:
    ledger = Ledger()
    for buffers, rest in loads:
        ledger = ledger.learn(KEY, load(rest, buffers))
    assert ledger.price(STRANGER, ESTIMATE, POOL).estimate == ESTIMATE


@given(st.integers(-6000, -2) | st.integers(1025, 6000))
def test_a_delta_that_cannot_be_true_teaches_nothing(rest: int) -> None:
    ledger = Ledger().learn(KEY, load(rest))
    price = ledger.price(KEY, ESTIMATE, POOL)
    assert not price.is_measured
    assert price.device_bytes == ESTIMATED.total_bytes + PRIOR_OVERHEAD_BYTES + POOL


def test_an_outside_program_that_came_during_a_load_is_not_charged_to_it() -> None:
    ledger = Ledger()
    for model in "abc":
        ledger = ledger.learn(replace(KEY, model=model), load(130))
    ledger = ledger.learn(KEY, load(630))
    price = ledger.price(KEY, ESTIMATE, POOL)
    assert not price.is_measured
    assert price.overhead_bytes == 130 * MIB + POOL


def test_a_first_lie_is_not_believed_once_others_contradict_it() -> None:
    ledger = Ledger().learn(KEY, load(900))
    for model in "abc":
        ledger = ledger.learn(replace(KEY, model=model), load(130))
    assert ledger.price(STRANGER, ESTIMATE, POOL).overhead_bytes == 130 * MIB + POOL


def test_it_is_bounded() -> None:
    ledger = Ledger()
    for layers in range(1, KEYS_PER_MODEL + 10):
        ledger = ledger.learn(replace(KEY, options=Options(layers)), load())
    assert len(ledger.histories) == KEYS_PER_MODEL
    assert all(history.key.options != Options(1) for history in ledger.histories)
    for number in range(KEYS_MAX):
        ledger = ledger.learn(replace(KEY, model=str(number)), load())
    assert len(ledger.histories) == KEYS_MAX


# --- which model it is


def model(**changes: object) -> Model:
    metadata = {"general.architecture": "llama", "llama.block_count": 2, "general.name": "x"}
    tensors = (Tensor("output.weight", (64, 32), 12, 0, 1152),)
    fields = {"metadata": metadata, "tensors": tensors, "file_bytes": 4096, **changes}
    return Model((Header(3, alignment=32, data_offset=512, **fields),))  # type: ignore[arg-type]


def test_a_copy_is_the_same_model_and_another_quantization_is_not() -> None:
    assert fingerprint(model()) == fingerprint(model())
    renamed = {"general.architecture": "llama", "llama.block_count": 2, "general.name": "y"}
    assert fingerprint(model(metadata=renamed)) == fingerprint(model())
    other = {
        fingerprint(model()),
        fingerprint(model(file_bytes=4097)),
        fingerprint(model(tensors=(Tensor("output.weight", (64, 32), 14, 0, 1152),))),
        fingerprint(model(tensors=(Tensor("output.weight", (32, 64), 12, 0, 1152),))),
        fingerprint(model(metadata={"general.architecture": "llama", "llama.block_count": 3})),
        fingerprint(model(), ["projector 811"]),
    }
    assert len(other) == 6
