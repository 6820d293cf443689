"""Clients in a closed loop while real models are switched: no request is lost or misled.

`python -m bench.switching` does the same for longer.
"""

import asyncio

import pytest

from bench.switching import ROUTES, Trial, Way, report, run, ways
from bench.witness import heard
from tests.home import Home

SWITCHES = 4


def tried(home: Home, way: Way) -> Trial:
    trial = asyncio.run(run(home, way, SWITCHES, plain_loads=1))
    report(trial)
    return trial


@pytest.mark.timeout(300)  # beside other work, each load takes several times as long
@pytest.mark.parametrize("way", ways(), ids=lambda way: way.name)
def test_no_request_fails_and_none_is_answered_by_the_wrong_model(home: Home, way: Way) -> None:
    trial = tried(home, way)

    assert [record.error for record in trial.all_records if record.failed] == []
    assert len(set(trial.prompt_tokens.values())) == 2, "so the models are told apart"
    assert trial.faults() == []
    assert trial.failed == []
    assert len(trial.timings) == SWITCHES
    answered = {heard(record.body) for record in trial.all_records}
    assert {(each.service, each.prompt_tokens) for each in answered} >= {
        (turn.service, trial.prompt_tokens[turn.model]) for turn in trial.turns
    }, "whoever had a turn has answered"
    assert all(0 < each.load_s < each.total_s for each in trial.timings)
    assert ("loading beside" in trial.phases) is not way.gives_way_first
    if way.holds:
        longest_s = max(record.wait_s for record in trial.all_records)
        assert longest_s > max(each.load_s for each in trial.timings), "somebody waited for a load"
    for route in ROUTES:
        is_fallback = [record.is_fallback for record in trial.records[route]]
        assert any(is_fallback) == (route in way.falls_back), "another model answers only then"
