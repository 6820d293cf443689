"""What `llmsup why` prints, as whole texts; and what follows a death, in words."""

from dataclasses import replace
from datetime import UTC

import pytest

from llmsup.cli import deaths, render
from llmsup.config.schema import Restart
from llmsup.control.wire import EventInfo, KeptDeath
from llmsup.core.advice import next_step
from llmsup.core.diagnosis import Cause
from llmsup.core.events import BecameReady, Exited, Hung, Spawned, SpawnFailed, StartAsked
from llmsup.core.lifecycle import step
from llmsup.core.service import Policy, Service, State, Want
from tests.fake_daemon import service

GIB = 2**30
REASON = "exited with status 1: out of GPU memory: allocating 4096.00 MiB on device 0: failed"


def death(**changed: object) -> KeptDeath:
    info: KeptDeath = {
        "service": "chat", "kind": "llama-server", "generation": 7, "time": 1764106812.0,
        "lived_s": 2.345, "cause": "out of GPU memory", "reason": REASON,
        "hint": "fewer `gpu_layers` or a smaller `ctx_size`", "code": 1, "signal": None,
        "next": "restarted after 2s", "argv": ["llama-server"], "cwd": None, "env": {},
        "inherited": ["PATH"], "launch": "0123456789abcdef", "binary": None,
        "model": "m.gguf", "gpu_layers": 20, "plan": None,
        "memory": {
            "total_bytes": 16 * GIB, "available_bytes": 3 * GIB, "process_bytes": 512 * 2**20,
            "group_bytes": GIB, "group_max_bytes": 2 * GIB, "group_oom_kills": 0,
        },
        "gpu": {"name": "RTX 4050", "total_bytes": 6 * GIB, "free_bytes": GIB // 2},
        "bundle": "/home/me/.local/state/llmsup/crashes/20251125T214012.000Z-chat-7",
        "output": [f"line {number}" for number in range(9)],
    }  # fmt: skip
    info.update(changed)  # type: ignore[typeddict-item]
    return info


def test_an_account_of_a_death_in_a_pipe_is_not_cut() -> None:
    now = service("chat", "backoff", generation=7, pid=None, uptime_s=None,
                  why=f"{REASON}; next try after 2s")  # fmt: skip
    assert deaths.account("chat", now, [death()], 4, zone=UTC) == (
        "chat is backoff (generation 7): next try after 2s\n"
        "1 of 4 deaths that are kept, newest first\n"
        "\n"
        "2025-11-25 21:40:12  out of GPU memory\n"
        f"  how     {REASON}\n"
        "  lived   2.3s (generation 7)\n"
        "  then    restarted after 2s\n"
        "  hint    fewer `gpu_layers` or a smaller `ctx_size`\n"
        "  memory  512 MiB its own · 1.0 GiB of 2.0 GiB used by its control group · 3.0 GiB of "
        "16.0 GiB left on the machine\n"
        "  gpu     512 MiB of 6144 MiB free on RTX 4050\n"
        "  said    line 4\n"
        "          line 5\n"
        "          line 6\n"
        "          line 7\n"
        "          line 8\n"
        "  kept in /home/me/.local/state/llmsup/crashes/20251125T214012.000Z-chat-7"
    )


def test_one_that_never_died_says_so() -> None:
    text = deaths.account("chat", service("chat"), [], 0)
    assert text == "chat is ready (generation 1, pid 4242, up 12s)\nno death of chat is kept"


@pytest.mark.parametrize("width", [40, 80, 200])
def test_nothing_but_the_directory_is_wider_than_the_terminal(width: int) -> None:
    said = ["word " * 100, "x" * 500]
    text = deaths.account("chat", service("chat"), [death(output=said)], 1, width=width, zone=UTC)
    *lines, bundle = text.splitlines()
    assert max(map(len, lines)) <= width
    assert bundle.endswith("Z-chat-7")
    told = text.partition("lived")[0].partition("how")[2]
    assert told.split() == REASON.split(), "the reason is wrapped, and nothing of it cut"


def test_words_of_a_process_cannot_upset_the_terminal() -> None:
    nasty = "\x1b[31mred\x07\r\n"
    text = deaths.account("chat", None, [death(reason=nasty, output=[nasty])], 1, zone=UTC)
    assert "\x1b" not in text
    assert "\x07" not in text


def test_a_death_in_the_journal_is_one_line() -> None:
    info: EventInfo = {
        "time": 1764106812.5, "at_s": 1.0, "event": "death", "service": "chat", "generation": 7,
        "cause": "out of GPU memory", "lived_s": 2.345, "next": "restarted after 2s", "why": REASON,
    }  # fmt: skip
    assert render.event(info, UTC) == (
        "21:40:12.500  chat  death of generation 7 after 2.3s  out of GPU memory; restarted after "
        "2s"
    )


# --- what follows


POLICY = Policy(restart=Restart(backoff_s=4.0, max_backoff_s=4.0, max_deaths=3, window_s=600.0))


def ready() -> Service:
    service, _ = step(Service("chat", POLICY), StartAsked(), 0.0)
    service, _ = step(service, Spawned(1, 11), 0.0)
    return step(service, BecameReady(1), 1.0)[0]


def test_what_followed_a_death_is_said_of_the_state_it_led_to() -> None:
    service, _ = step(ready(), Exited(1, "killed by SIGKILL", cause=Cause.KILLED), 10.0)
    assert service.death is not None
    assert (service.death.generation, service.death.cause) == (1, Cause.KILLED)
    assert next_step(service, 10.0) == "restarted at once"
    service, _ = step(service, Exited(2, "killed by SIGKILL"), 11.0)
    assert next_step(service, 11.0).startswith("restarted after ")
    service = replace(service, state=State.STARTING, generation=3)
    service, _ = step(service, Exited(3, "killed by SIGKILL"), 12.0)
    assert next_step(service, 12.0) == "given up; tried again after 10m"
    service = replace(service, state=State.STARTING)
    service, _ = step(service, SpawnFailed(3, "no such file", permanent=True), 13.0)
    assert service.death is not None
    assert (service.death.cause, service.death.reason) == (Cause.LAUNCH, "no such file")
    assert next_step(service, 13.0) == "given up until llmsup start"
    down = replace(service, want=Want.DOWN, state=State.STOPPED, timer_at=None)
    assert next_step(down, 13.0) == "stopped on request"


def test_a_hang_has_its_cause_when_it_is_found() -> None:
    service, _ = step(ready(), Hung(1, "decoded nothing for 30s"), 40.0)
    assert service.death is not None
    assert (service.death.cause, service.death.at) == (Cause.HUNG, 40.0)
    after, _ = step(service, Exited(1, "killed by SIGKILL", cause=Cause.KILLED), 40.1)
    assert after.death == service.death, "the kill that ended it is not another death"
