"""One roll at a time, and nothing that was due is forgotten."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from typing import cast

from llmsup.core.service import Service
from llmsup.rolls import Rolls
from llmsup.supervisor import Supervisor


class FakeSupervisor:
    """Restarts services one by one, each when it is let."""

    def __init__(self) -> None:
        self.restarting: list[str] = []
        self.restarted: list[tuple[str, bool]] = []
        self.let = asyncio.Event()
        self.services = {name: Service(name, generation=1, pid=7) for name in "abcx"}

    def restart(self, name: str) -> None:
        self.restarted.append((name, True))
        self.services[name] = Service(name, generation=2, pid=8)

    async def restart_in_order(self, names: Iterable[str], *, drain: bool = True) -> None:
        self.restarting = sorted(names)
        try:
            while self.restarting:
                self.restarted.append((self.restarting[0], drain))
                await self.let.wait()
                del self.restarting[0]
        finally:
            self.restarting = []


def rolled(
    do: Callable[[Rolls], None],
    *,
    outdated: Iterable[str],
    together: Iterable[str] = (),
    is_rolling: bool = True,
) -> list[tuple[str, bool]]:
    """What is restarted, and whether it is drained, when `do` comes in the middle of a roll.

    Or before it, where that is not `is_rolling` yet.
    """

    async def run() -> list[tuple[str, bool]]:
        supervisor = FakeSupervisor()
        tasks: list[asyncio.Task[None]] = []

        def keep(work: Coroutine[object, object, None]) -> asyncio.Task[None]:
            tasks.append(asyncio.get_running_loop().create_task(work))
            return tasks[-1]

        rolls = Rolls(cast("Supervisor", supervisor), keep)
        rolls.outdated = frozenset(outdated)
        rolls.leave_together(together)
        assert rolls.leaving == tuple(together)
        if is_rolling:
            rolls.replace_outdated()
        await asyncio.sleep(0)
        do(rolls)
        supervisor.let.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        return supervisor.restarted

    return asyncio.run(run())


def test_outdated_services_are_replaced_once() -> None:
    restarted = rolled(Rolls.replace_outdated, outdated=("a", "b"))

    assert restarted == [("a", True), ("b", True)]


def test_a_restart_in_the_middle_of_a_roll_comes_first_and_the_rest_after_it() -> None:
    """Given a restart without a drain, what was due before is drained all the same."""
    restarted = rolled(lambda rolls: rolls.restart(["x"], drain=False), outdated=("a", "b", "c"))

    assert restarted == [("a", True), ("x", False), ("b", True), ("c", True)]


def test_a_roll_that_is_cancelled_leaves_the_rest() -> None:
    assert rolled(Rolls.cancel, outdated=("a", "b")) == [("a", True)]


def test_what_leaves_together_is_restarted_at_once_and_not_again() -> None:
    both = rolled(lambda _: None, outdated="abc", together="bc")
    assert both == [("b", True), ("c", True), ("a", True)]


def test_a_restart_before_the_roll_does_not_keep_anybody_from_leaving() -> None:
    """Given a service that may wait for the room of one that leaves."""
    both = rolled(lambda rolls: rolls.restart(["x"]), outdated="ab", together="b", is_rolling=False)
    assert both == [("b", True), ("x", True), ("a", True)]


def test_a_process_is_leaving_until_another_one_takes_its_place() -> None:
    supervisor = FakeSupervisor()
    rolls = Rolls(cast("Supervisor", supervisor), lambda _: cast("asyncio.Task[None]", None))
    rolls.leave_together("a")
    assert (rolls.is_leaving(7), rolls.is_leaving(8)) == (True, False)
    supervisor.restart("a")
    assert (rolls.is_leaving(7), rolls.leaving) == (False, ())
