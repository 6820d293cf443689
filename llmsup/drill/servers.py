"""Scenarios that break the server a route prefers: kill, hang, crashloop; and plain load."""

import asyncio
import os
import signal
import time
from contextlib import suppress

from llmsup.config.schema import Restart
from llmsup.control.wire import Status
from llmsup.core import backoff
from llmsup.drill import judgement
from llmsup.drill.ground import ANSWER_TIMEOUT_S, Ground, of
from llmsup.drill.judgement import Allowed, Finding, Span
from llmsup.drill.report import Broken
from llmsup.drill.traffic import Record
from llmsup.errors import LlmsupError

BURST = 10
HANG_SLACK_S = 10.0
"""Beyond the liveness timeout: how often is looked, and the kill itself."""
GIVEN_UP_S = 10.0
MOST_DEATHS = 10
MOST_BACKOFF_S = 120.0


async def load(ground: Ground) -> Broken:
    """Breaks nothing: ten chat requests at once, all to be answered."""
    began = time.monotonic()
    records = await asyncio.gather(*(ground.ask() for _ in range(BURST)))
    did = f"{BURST} chat requests at once to {ground.route}"
    findings = judgement.all_answered(records, BURST)
    return Broken(did, Span(began, time.monotonic()), records, findings)


async def kill(ground: Ground) -> Broken:
    """SIGKILL to the server; the route goes on, and a new one is ready."""
    async with ground.traffic() as traffic:
        victim = await ground.service(ground.first)
        pid = await ground.pid(ground.first)
        began = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        within_s = ground.spec.start_timeout_s
        ready_at = await ground.until_ready(ground.first, victim["generation"], within_s)
        away = Span(began, ready_at)
    did = f"SIGKILL to {ground.first} (pid {pid})"
    back = judgement.recovered(f"{ground.first} ready again", away, within_s)
    return Broken(did, away, traffic.records, [*_felt(ground, traffic.records, away), back])


async def hang(ground: Ground) -> Broken:
    """SIGSTOP to the server: alive and answering nothing, until liveness replaces it."""
    within_s = liveness_s(ground) + HANG_SLACK_S
    async with ground.traffic(ANSWER_TIMEOUT_S + within_s) as traffic:
        victim = await ground.service(ground.first)
        pid = await ground.pid(ground.first)
        began = time.monotonic()
        # A pidfd: once it is replaced, its pid may be somebody else's.
        pidfd = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
            seen_at = await ground.until(lambda now: _is_another(now, victim["pid"]), within_s)
        finally:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGCONT)
            os.close(pidfd)
        noticed = Span(began, seen_at)
        ready_at = None
        if seen_at is not None:
            ready_at = await ground.until_ready(
                ground.first, victim["generation"], ground.spec.start_timeout_s
            )
        away = Span(began, ready_at)
    did = f"SIGSTOP to {ground.first} (pid {pid})"
    findings = [
        *_felt(ground, traffic.records, away),
        judgement.recovered("replaced", noticed, within_s),
        judgement.recovered("ready again", away, within_s + ground.spec.start_timeout_s),
    ]
    return Broken(did, away, traffic.records, findings)


async def crashloop(ground: Ground) -> Broken:
    """SIGKILL to each new server until the daemon gives it up; a start forgives."""
    first, restart = ground.first, ground.spec.restart
    within_s = total_backoff_s(restart) + MOST_BACKOFF_S
    killed: list[int] = []
    async with ground.traffic() as traffic:
        began = time.monotonic()
        try:
            while len(killed) < restart.max_deaths:
                await ground.until(lambda now: _is_fresh_or_failed(now, first, killed), within_s)
                now = await ground.service(first)
                if now["state"] == "failed" or now["pid"] is None:
                    break
                killed.append(now["pid"])
                with suppress(ProcessLookupError):
                    os.kill(now["pid"], signal.SIGKILL)
            given_up = Span(
                began,
                await ground.until(lambda now: of(now, first)["state"] == "failed", GIVEN_UP_S),
            )
            last = await ground.service(first)
            forgiven = time.monotonic()
        finally:
            await asyncio.to_thread(forgive, ground)
        start_timeout_s = ground.spec.start_timeout_s
        back_at = await ground.until_ready(first, last["generation"], start_timeout_s)
    away = Span(began, back_at)
    did = f"SIGKILL to {len(killed)} processes of {first}, each once it was there: {killed}"
    findings = [
        *_felt(ground, traffic.records, away),
        Finding(f"{len(killed)} deaths"),
        judgement.recovered("given up", given_up, within_s),
        Finding(last["why"])
        if last["why"]
        else Finding("says why", "a sentence in status", holds=False),
        judgement.recovered("ready after a start", Span(forgiven, back_at), start_timeout_s),
    ]
    return Broken(did, away, traffic.records, findings)


def forgive(ground: Ground) -> None:
    """Start what is not up any more; its deaths are forgotten."""
    with suppress(LlmsupError):
        ground.control.start([ground.first])


def liveness_s(ground: Ground) -> float:
    """How long the first service may hang; 0: for ever."""
    return ground.spec.liveness.timeout_s


def total_backoff_s(restart: Restart) -> float:
    """At most so long the waits of a whole crash loop take."""
    deaths: tuple[float, ...] = ()
    total_s = 0.0
    for number in range(1, restart.max_deaths):
        deaths = (*deaths, float(number))
        total_s += 2 * backoff.delay_s(deaths, restart, "")
    return total_s


def why_no_hang(ground: Ground) -> str:
    """Why a hang would tell nothing here."""
    return "" if liveness_s(ground) else f"{ground.first} may hang for ever: its liveness is off"


def why_no_crashloop(ground: Ground) -> str:
    """Why a crash loop would tell nothing here, or take too long."""
    restart = ground.spec.restart
    if restart.max_deaths > MOST_DEATHS:
        return f"max_deaths of {ground.first} is {restart.max_deaths}, and each is a kill"
    total_s = total_backoff_s(restart)
    if total_s > min(MOST_BACKOFF_S, restart.window_s):
        return f"the backoffs of {ground.first} may take {total_s:.0f} s"
    return ""


def allowed(ground: Ground) -> Allowed:
    """Which requests may fail while the first service is away."""
    return Allowed.NONE if ground.has_fallback else Allowed.HONEST


def _felt(ground: Ground, records: list[Record], away: Span) -> list[Finding]:
    return [
        judgement.failures(records, allowed(ground), away),
        judgement.in_flight(records, away),
        *judgement.meanwhile(records, away, ground.first),
    ]


def _is_another(status: Status, pid: int | None) -> bool:
    return all(each["pid"] != pid for each in status["services"])


def _is_fresh_or_failed(status: Status, name: str, killed: list[int]) -> bool:
    now = of(status, name)
    return now["state"] == "failed" or (now["pid"] is not None and now["pid"] not in killed)
