"""What the command line prints, as whole texts."""

from datetime import UTC
from typing import Any

import pytest

from llmsup.cli import render
from llmsup.control.wire import EventInfo, ServiceInfo
from tests.fake_daemon import service, snapshot

MIB = 2**20
CUT = "killed by SIGSEGV (core dumped): ggml_cuda_init: no device was found here"


def full_stack() -> list[ServiceInfo]:
    return [
        service(
            "chat",
            model="/models/Qwen2.5-3B-Instruct-Q4_K_M.gguf",
            gpu_layers=37,
            layers=37,
            planned_bytes=2198 * MIB,
            measured_bytes=2254 * MIB,
            uptime_s=190.4,
        ),
        service("code", "backoff", model="coder.gguf", gpu_layers=20, restarts=12, uptime_s=None,
                port=8004, why=CUT),
        service("rag", "stopped", want="down", port=None, uptime_s=None),
    ]  # fmt: skip


def test_status_in_a_pipe_is_not_cut() -> None:
    assert render.status(snapshot(*full_stack())) == (
        "demo · daemon pid 123 · up 3m00s · http://127.0.0.1:8000/v1\n"
        "no GPU: no NVIDIA driver is installed\n"
        "\n"
        "SERVICE  STATE    MODEL                       LAYERS         VRAM  PORT  RESTARTS  UPTIME"
        "  WHY\n"
        "chat     ready    Qwen2.5-3B-Instruct-Q4_K_M   37/37  2.1/2.2 GiB  8001         0"
        "   3m10s\n"
        "code     backoff  coder                           20            -  8004        12       -"
        f"  {CUT}\n"
        "rag      stopped  -                                -            -     -         0       -"
    )


def test_the_card_stands_below_the_header() -> None:
    stack = snapshot(*full_stack())
    stack["gpu"] = {
        "name": "NVIDIA GeForce RTX 4050 Laptop GPU",
        "total_bytes": 6141 * MIB,
        "free_bytes": 3277 * MIB,
    }

    assert render.status(stack).splitlines()[1] == "RTX 4050 Laptop GPU · 3.2 of 6.0 GiB free"


def test_a_card_that_nobody_asks_for_is_not_missed() -> None:
    """Given no layers for a card, its absence is not worth a line."""
    lines = render.status(snapshot(service("rag"), service("chat", gpu_layers=0))).splitlines()

    assert lines[1] == ""


def test_a_card_that_a_plan_did_without_is_missed() -> None:
    """Given layers that were left to a plan, there were none to give."""
    lines = render.status(snapshot(service("chat", gpu_layers=0, layers=29))).splitlines()

    assert lines[1] == "no GPU: no NVIDIA driver is installed"


def test_a_card_that_is_missed_stands_out() -> None:
    text = render.status(snapshot(service("chat", gpu_layers=9)), colour=True)

    assert text.splitlines()[1] == "\x1b[33mno GPU: no NVIDIA driver is installed\x1b[0m"


def test_a_narrow_terminal_cuts_models_and_reasons_and_shows_the_reasons_below() -> None:
    text = render.services(full_stack(), width=91)

    assert text == (
        "SERVICE  STATE    MODEL             LAYERS         VRAM  PORT  RESTARTS  UPTIME  WHY\n"
        "chat     ready    Qwen2.5-3B-Inst…   37/37  2.1/2.2 GiB  8001         0   3m10s\n"
        "code     backoff  coder                 20            -  8004        12       -  "
        "killed by…\n"
        "rag      stopped  -                      -            -     -         0       -\n"
        "\n"
        f"code: {CUT}"
    )
    assert max(map(len, text.splitlines()[:4])) == 91


@pytest.mark.parametrize("width", range(40, 200, 7))
def test_no_line_of_the_table_is_wider_than_the_terminal_where_that_can_be(width: int) -> None:
    narrowest = max(map(len, render.services(full_stack(), width=1).splitlines()[:4]))

    text = render.services(full_stack(), width=width)

    assert max(map(len, text.splitlines()[:4])) <= max(width, narrowest)
    assert CUT in text


@pytest.mark.parametrize(
    ("width", "dropped"),
    [
        (87, []),
        (86, ["WHY"]),
        (74, ["WHY", "VRAM"]),
        (61, ["WHY", "VRAM", "LAYERS"]),
        (50, ["WHY", "VRAM", "LAYERS", "RESTARTS"]),
        (20, ["WHY", "VRAM", "LAYERS", "RESTARTS"]),
    ],
)
def test_a_narrow_terminal_does_without_columns(width: int, dropped: list[str]) -> None:
    columns = render.services([]).split()

    heading, *_ = render.services(full_stack(), width=width).splitlines()

    assert heading.split() == [column for column in columns if column not in dropped]


@pytest.mark.parametrize(
    ("told", "layers", "vram"),
    [
        ({}, "-", "-"),
        ({"gpu_layers": "auto"}, "auto", "-"),
        ({"gpu_layers": "auto", "layers": 29}, "auto", "-"),
        ({"gpu_layers": 20}, "20", "-"),
        ({"gpu_layers": 19, "layers": 29, "planned_bytes": 3314 * MIB}, "19/29", "3.2 GiB"),
        (
            {"gpu_layers": 0, "layers": 29, "planned_bytes": 0, "measured_bytes": 0},
            "0/29",
            "-",
        ),
        ({"gpu_layers": 20, "measured_bytes": 3400 * MIB}, "20", "3.3 GiB"),
    ],
)
def test_layers_of_all_and_planned_against_measured(
    told: dict[str, Any], layers: str, vram: str
) -> None:
    _, row = render.services([service("chat", uptime_s=None, **told)]).splitlines()

    assert row.split() == ["chat", "ready", "-", layers, *vram.split(), "8001", "0", "-"]


def test_an_older_daemon_knows_no_layers() -> None:
    old = service("chat", gpu_layers=20)
    del old["layers"]  # type: ignore[misc]

    assert "20" in render.services([old]).splitlines()[1].split()


def test_colours_change_no_column() -> None:
    plain = render.services(full_stack())
    coloured = render.services(full_stack(), colour=True)

    assert "\x1b[32mready  \x1b[0m" in coloured
    assert "\x1b[31mbackoff\x1b[0m" in coloured
    for code in ("0", "1", "2", "31", "32"):
        coloured = coloured.replace(f"\x1b[{code}m", "")
    assert coloured == plain


def test_a_reason_cannot_upset_the_terminal() -> None:
    """Given a last log line with escape codes, it is shown without its control characters."""
    text = render.services([service("chat", "failed", why="\x1b]0;owned\x07 bad\nmodel\r")])

    assert text.splitlines()[1].endswith("]0;owned  bad model")
    assert "\x1b" not in text


def test_a_stack_that_stops_says_so() -> None:
    stopping = snapshot()
    stopping["daemon"]["stopping"] = True

    assert render.header(stopping) == (
        "demo · daemon pid 123 · stopping · http://127.0.0.1:8000/v1"
    )


def test_no_services_is_a_heading() -> None:
    assert render.services([]) == (
        "SERVICE  STATE  MODEL  LAYERS  VRAM  PORT  RESTARTS  UPTIME  WHY"
    )


def test_upstreams() -> None:
    text = render.upstreams(
        [
            {
                "route": "chat-7b",
                "desired": ["chat", "code"],
                "published": ["code"],
                "confirmed": [],
            },
            {"route": "code-7b", "desired": [], "published": ["code"], "confirmed": None},
        ]
    )

    assert text == (
        "ROUTE    DESIRED     PUBLISHED  ENVOY HAS\n"
        "chat-7b  chat, code  code       -\n"
        "code-7b  -           code       not known"
    )


@pytest.mark.parametrize(
    ("info", "line"),
    [
        (
            {"event": "state", "service": "chat", "before": "ready", "state": "backoff",
             "why": "killed by SIGKILL"},
            "chat  ready → backoff  killed by SIGKILL",
        ),
        ({"event": "state", "service": "chat", "state": "ready", "why": ""}, "chat  ready"),
        (
            {"event": "published", "route": "chat-7b", "upstreams": ["chat", "code"]},
            "chat-7b  upstreams: chat, code",
        ),
        (
            {"event": "confirmed", "route": "chat-7b", "upstreams": [], "elapsed_ms": 4.21},
            "chat-7b  upstreams: -  (confirmed in 4.2 ms)",
        ),
        ({"event": "daemon", "why": "stopping"}, "daemon  stopping"),
        ({"event": "card", "why": "lost: NVML fails"}, "card  lost: NVML fails"),
        ({"event": "hiccup", "service": "chat"}, "chat  hiccup"),
        (
            {"event": "state", "service": "chat", "before": "starting", "state": "starting",
             "generation": 3, "why": "killed by SIGKILL"},
            "chat  starting (generation 3)  killed by SIGKILL",
        ),
    ],
)  # fmt: skip
def test_events(info: dict[str, object], line: str) -> None:
    event: EventInfo = {"time": 1700000000.5129, "at_s": 1.0, **info}  # type: ignore[typeddict-item]

    assert render.event(event, UTC) == f"22:13:20.512  {line}"


def test_events_of_many_are_in_columns_below_their_day() -> None:
    info: EventInfo = {"time": 1700000000.5, "at_s": 1.0, "event": "state", "service": "chat",
                       "state": "ready"}  # fmt: skip

    assert render.subject(info) == "chat"
    assert render.event(info, UTC, width=9) == "22:13:20.500  chat       ready"
    assert render.day(info, UTC) == "2023-11-14"


def test_changes_are_told_once() -> None:
    infos = [service("chat"), service("embedding", "backoff", why="killed by SIGKILL")]

    lines = render.changes({"chat": "ready"}, infos, 0.12)
    assert lines == ["embedding  backoff      0.1s  killed by SIGKILL"]
    assert render.changes({"chat": "starting", "embedding": "backoff"}, infos, 12.34) == [
        "chat       ready       12.3s"
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0s"),
        (59.9, "59s"),
        (60, "1m00s"),
        (3599, "59m59s"),
        (3600, "1h00m"),
        (86399, "23h59m"),
        (86400, "1d00h"),
        (1e6, "11d13h"),
    ],
)
def test_ages(seconds: float, text: str) -> None:
    assert render.age(seconds) == text


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [(1, "service", "1 service"), (0, "service", "0 services"), (3, "process", "3 processes")],
)
def test_counts(number: int, noun: str, text: str) -> None:
    assert render.count(number, noun) == text


def test_troubles_stand_below_the_table() -> None:
    full = snapshot(service("chat"))
    full["daemon"]["troubles"] = ["events are lost: No space left", "a\x1b[31mb: c"]
    lines = render.status(full).splitlines()
    assert lines[-3:] == ["", "warning: events are lost: No space left", "warning: a [31mb: c"]


def test_a_daemon_that_knows_no_troubles_is_shown() -> None:
    old = snapshot(service("chat"))
    del old["daemon"]["troubles"]  # type: ignore[misc]
    assert "warning" not in render.status(old)
