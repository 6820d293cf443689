"""What a drill makes of what it saw."""

import pytest

from llmsup.drill import judgement
from llmsup.drill.judgement import Allowed, Finding, Span
from llmsup.drill.report import Outcome, judged
from llmsup.drill.traffic import Record

AWAY = Span(10.0, 12.0)


def answered(sent_at: float, wait_s: float = 0.01, service: str = "chat") -> Record:
    return Record(sent_at, sent_at + wait_s, 200, service, service != "chat")


def failed(sent_at: float, status: int = 0, retry_after: str = "", error: str = "") -> Record:
    return Record(sent_at, sent_at + 0.01, status, "", False, error, b"", retry_after)


@pytest.mark.parametrize(
    ("record", "allowed"),
    [
        (failed(11, 503, "5"), {Allowed.HONEST}),
        (failed(11, 503), set()),
        (failed(11, 502, "5"), set()),
        (failed(11, 0), {Allowed.AWAY}),
        (failed(9.995, 0), {Allowed.AWAY}),
        (failed(9, 0), set()),
        (failed(12.5, 0), set()),
        (failed(12.5, 503, "5"), set()),
    ],
)
def test_a_failure_is_allowed_for_its_reason_and_in_its_time(
    record: Record, allowed: set[Allowed]
) -> None:
    records = [answered(9), record, answered(13)]
    held = {each for each in Allowed if judgement.failures(records, each, AWAY).holds}
    assert held == allowed


def test_without_a_failure_everything_holds() -> None:
    finding = judgement.failures([answered(9), answered(11)], Allowed.NONE, AWAY)
    assert finding == Finding("0 of 2 requests failed", Allowed.NONE.value)


def test_no_request_at_all_proves_nothing() -> None:
    assert not judgement.failures([], Allowed.NONE, AWAY).holds


def test_what_never_recovered_is_not_excused_for_ever_by_its_end() -> None:
    """Given no recovery, a failure long after the break still belongs to it."""
    never = Span(10.0, None)
    assert judgement.failures([failed(500, 503, "5")], Allowed.HONEST, never).holds
    assert not judgement.recovered("ready again", never, 60).holds


def test_refused_and_reset_are_counted_apart() -> None:
    records = [failed(10.5, error="ConnectionRefusedError: no"), failed(10, error="reset by peer")]
    words = judgement.failures([*records, records[0]], Allowed.AWAY, AWAY).words
    assert words == "3 of 3 requests failed (2 refused, 1 reset)"


def test_the_line_says_who_helped_and_what_the_slowest_waited() -> None:
    records = [answered(9.99, 0.05, "code"), answered(11, 0.021, "code"), answered(13, 9.0)]
    words = [finding.words for finding in judgement.meanwhile(records, AWAY, "chat")]
    assert words == ["answered meanwhile by code", "worst wait 50 ms"]
    assert judgement.in_flight(records, AWAY).words == "1 in flight"


def test_a_recovery_is_held_against_its_bound() -> None:
    assert judgement.recovered("ready again", AWAY, 2.0) == Finding(
        "ready again after 2.00 s", "within 2.00 s"
    )
    late = judgement.recovered("ready again", AWAY, 0.3)
    assert str(late) == "ready again after 2.00 s (must be: within 0.30 s)"


def test_a_burst_is_answered_whole_or_not() -> None:
    records = [answered(0, 0.5), answered(0, 1.5), failed(0)]
    words = [finding.words for finding in judgement.all_answered(records, 3)]
    assert words == ["2 of 3 answered", "p50 1.00 s", "longest 1.50 s"]
    assert not judgement.all_answered(records, 3)[0].holds
    assert [each.holds for each in judgement.all_answered([failed(0)], 1)] == [False]


def test_a_scenario_passes_where_all_findings_hold() -> None:
    good, bad = Finding("a"), Finding("b", "c", holds=False)
    assert judged([good, good]) == (Outcome.PASSED, "a · a")
    assert judged([good, bad]) == (Outcome.FAILED, "a · b (must be: c)")
    assert judged([])[0] is Outcome.FAILED


def test_of_note_is_what_failed_was_cut_or_was_slow() -> None:
    usual = [answered(number / 10) for number in range(300)]
    cut, lost, slow = answered(9.995, 0.05), failed(11), answered(20, 3.0)
    chosen = judgement.of_note([*usual, cut, lost, slow], AWAY)
    assert {cut, lost, slow} <= set(chosen)
    assert len(chosen) < 20
    assert chosen == sorted(chosen, key=lambda record: record.sent_at)
