"""What a llama-server answers to `/metrics` and `/slots`, as it was seen to."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmsup.core.liveness import Work
from llmsup.services.llama_work import merged, parse_metrics, parse_slots

METRICS = b"""# HELP llamacpp:prompt_tokens_total Number of prompt tokens processed
# TYPE llamacpp:prompt_tokens_total counter
llamacpp:prompt_tokens_total 1231
llamacpp:prompt_seconds_total 4.8e-05
llamacpp:tokens_predicted_total 50
llamacpp:n_decode_total 53
llamacpp:requests_processing 1
llamacpp:requests_deferred 2
llamacpp:n_busy_slots_per_decode 1.96
"""
PROCESSING: dict[str, object] = {
    "id": 1, "n_ctx": 8192, "speculative": False, "is_processing": True, "id_task": 202,
    "n_prompt_tokens": 2031, "n_prompt_tokens_processed": 512, "n_prompt_tokens_cache": 0,
    "next_token": [{"has_next_token": True, "has_new_line": False, "n_remain": 50, "n_decoded": 3}],
}  # fmt: skip
FRESH: dict[str, object] = {"id": 0, "n_ctx": 8192, "speculative": False, "is_processing": False}


def slots(*each: dict[str, object]) -> Work:
    return parse_slots(json.dumps(each).encode())


def test_metrics_count_what_is_processed_and_what_waits() -> None:
    work = parse_metrics(METRICS)
    assert work.pending == 3
    assert work.counters == {
        "prompt_tokens_total": 1231, "tokens_predicted_total": 50, "n_decode_total": 53,
    }  # fmt: skip


@pytest.mark.parametrize("number", ["1e999", "e", "1.2.3", "nan", ""])
def test_what_is_no_number_is_no_metric(number: str) -> None:
    with pytest.raises(ValueError, match=r"requests_processing|could not convert"):
        parse_metrics(f"llamacpp:requests_processing {number}\n".encode())


def test_slots_tell_how_far_each_request_is() -> None:
    work = slots(FRESH, PROCESSING)
    assert work.pending == 1
    assert work.counters["slot 1 prompt tokens"] == 512
    assert work.counters["slot 1 tokens"] == 3


@pytest.mark.parametrize(
    "change",
    [
        {"id_task": 203},
        {"n_prompt_tokens_processed": 1024},
        {"next_token": [{"n_decoded": 4}]},
        {"next_token": {"n_decoded": 4}},
    ],
)
def test_any_step_of_a_slot_moves_a_counter(change: dict[str, object]) -> None:
    assert slots(PROCESSING | change).counters != slots(PROCESSING).counters


def test_older_servers_have_one_next_token() -> None:
    assert slots(PROCESSING | {"next_token": {"n_decoded": 3}}) == slots(PROCESSING)


def test_each_answer_may_know_of_requests_that_the_other_does_not() -> None:
    work = merged([parse_metrics(METRICS), slots(PROCESSING)])
    assert work.pending == 3
    assert {"n_decode_total", "slot 1 tokens"} <= work.counters.keys()


@given(st.one_of(st.binary(), st.text().map(str.encode), st.just(b"[1]"), st.just(b'[{"id":"x"}]')))
def test_anything_else_is_a_value_error(body: bytes) -> None:
    for parse in (parse_metrics, parse_slots):
        try:
            parse(body)
        except ValueError:
            continue
        assert parse is parse_slots
        assert json.loads(body) == []
