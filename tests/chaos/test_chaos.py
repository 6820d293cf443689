"""A seeded sequence of faults under load; after each the stack is whole, and nothing leaked.

LLMSUP_CHAOS_SEED=7 LLMSUP_CHAOS_FAULTS=200 pytest -s tests/chaos    (or: make chaos)
"""

import asyncio
import os
import time
from collections.abc import Callable
from itertools import islice
from typing import NoReturn

import pytest

from llmsup.drill.traffic import Load, chat_body
from tests.chaos.faults import ROUTES, Fault, faults
from tests.chaos.invariants import Leaks, checks, is_whole, unexcused
from tests.chaos.stack import ChaosStack
from tests.home import Home

SEED = int(os.environ.get("LLMSUP_CHAOS_SEED", "1"))
FAULTS = int(os.environ.get("LLMSUP_CHAOS_FAULTS", "12"))
WHOLE_WITHIN_S = 20.0
QUIET_WITHIN_S = 5.0
QUIET_S = 0.3
PAUSE_S = 0.02
CLIENTS = 2


@pytest.mark.timeout(60 + 30 * FAULTS)
def test_every_fault_is_survived(home: Home) -> None:
    print(f"\nseed {SEED}, {FAULTS} faults")
    stack = ChaosStack(home)
    home.start()
    leaks = asyncio.run(Chaos(stack).run())
    assert home.cli("stop").returncode == 0
    assert home.processes() == []
    assert leaks.no_leaked_memory(stack) == ""


class Chaos:
    """One run: the load, the faults, and what is checked after each."""

    def __init__(self, stack: ChaosStack) -> None:
        self._stack = stack
        self._loads = {
            route: Load(stack.home.gateway_port, chat_body(route), CLIENTS, pause_s=PAUSE_S)
            for route in ROUTES
        }

    async def run(self) -> Leaks:
        """All faults; returns what was seen of what may leak."""
        await self._until("the start", lambda: is_whole(self._stack), WHOLE_WITHIN_S)
        leaks = await asyncio.to_thread(Leaks, self._stack)
        for load in self._loads.values():
            load.start()
        for number, fault in enumerate(islice(faults(SEED), FAULTS), 1):
            await asyncio.sleep(QUIET_S)
            await self._survive(f"fault {number} of seed {SEED}, {fault}", fault, leaks)
        for load in self._loads.values():
            await load.finish()
        return leaks

    async def _survive(self, what: str, fault: Fault, leaks: Leaks) -> None:
        for load in self._loads.values():
            load.records.clear()
        at = time.monotonic()
        await self._stack.inflict(fault)
        over_at = time.monotonic()
        await self._until(what, lambda: is_whole(self._stack), WHOLE_WITHIN_S)
        whole_at = time.monotonic()
        for check in checks(leaks):
            await self._until(what, lambda check=check: check(self._stack), QUIET_WITHIN_S)  # type: ignore[misc]
        await asyncio.sleep(QUIET_S)
        failed = {
            route: [r for r in load.records if r.failed] for route, load in self._loads.items()
        }
        asked = sum(len(load.records) for load in self._loads.values())
        print(
            f"{what}: {over_at - at:.2f} s, whole after {whole_at - over_at:.2f} s; "
            f"{asked} requests, failed {({k: len(v) for k, v in failed.items() if v}) or 0}",
            flush=True,
        )
        for route, load in self._loads.items():
            bad = unexcused(fault, route, load.records, self._stack.killed_at)
            worst = [f"+{r.sent_at - at:.3f} s: {r.status} {r.error}" for r in bad[:5]]
            if bad:
                self._fail(f"{what}: {len(bad)} requests of {route} failed: {worst}")

    async def _until(self, what: str, wrong: Callable[[], str], within_s: float) -> None:
        """Until `wrong` has nothing to say."""
        deadline = time.monotonic() + within_s
        while words := await asyncio.to_thread(wrong):
            if time.monotonic() > deadline:
                self._fail(f"{what}: {words}")
            await asyncio.sleep(0.05)

    def _fail(self, words: str) -> NoReturn:
        log = self._stack.home.daemon_log()
        pytest.fail(f"{words}\n\nthe end of the daemon's log:\n{log}", pytrace=False)
