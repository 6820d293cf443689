"""Processes that leave: those of an earlier daemon, and those whose place was taken."""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping

from llmsup.adoption import Takeover
from llmsup.core.grant import may_use_card
from llmsup.core.service import Policy, Service
from llmsup.gateway import Gateway
from llmsup.host.process import Found, Process
from llmsup.rolls import Keep
from llmsup.services.launch import Launch
from llmsup.strays import LOOK_PERIOD_S, AtLast, Strays
from llmsup.succession import Succession
from llmsup.supervisor import Supervisor
from llmsup.units import GATEWAY
from llmsup.warmth import Warmth

ROUTED_TIMEOUT_S = 5.0
"""How long is waited for the gateway to send them nothing more."""


class Departures:
    """The strays of one stack, and how they are seen off.

    `is_unsettled`: whether it is not known yet who of the adopted services is ready.
    """

    def __init__(
        self,
        strays: Strays,
        supervisor: Supervisor,
        gateway: Gateway,
        succession: Succession,
        warmth: Warmth,
        *,
        keep: Keep,
        is_unsettled: Callable[[], bool],
        is_ending: Callable[[], bool],
    ) -> None:
        self._strays = strays
        self._supervisor = supervisor
        self._gateway = gateway
        self._succession = succession
        self._warmth = warmth
        self._keep = keep
        self._is_unsettled = is_unsettled
        self._is_ending = is_ending

    def begin(self, found: Iterable[Found], taken: Takeover) -> None:
        """See off what an earlier daemon started and this one did not adopt."""
        everything = tuple(found)
        strays = taken.strays - self._retire_earlier(everything, taken)
        on_card = {each.mark: each.service for each in everything if may_use_card(each.grant)}
        self._strays.note(strays, on_card)
        if strays:
            services = {each.mark: each.service for each in everything if each.mark in strays}
            self._keep(self._end(services, is_routed=GATEWAY in taken.adopted))

    def see_off(self, service: Service, launch: Launch | None) -> None:
        """End a process whose place was taken, once it has no clients any more."""
        name, unit = service.name, self._supervisor.keepers[service.name].unit
        its_mark = unit.generation_mark(service.generation)

        async def save(_mark: str) -> None:
            if not self._is_ending():
                await self._warmth.save(service, launch)

        self._strays.note([its_mark], {its_mark: name})
        self._keep(self._end({its_mark: name}, save, is_routed=True))

    def _retire_earlier(self, found: Iterable[Found], taken: Takeover) -> frozenset[str]:
        """Let Envoys that were succeeded, or were about to be, finish. Returns their marks."""
        retired = set()
        for each in found:
            if each.service == GATEWAY and each.is_leader and each.mark in taken.strays:
                unit = self._supervisor.keepers[GATEWAY].unit
                process = Process.adopt(each.pid, log=unit.log, mark=each.mark)
                if process is not None:
                    self._succession.adopt_retired(process)
                    retired.add(each.mark)
        return frozenset(retired)

    async def _end(
        self, services: Mapping[str, str], at_last: AtLast | None = None, *, is_routed: bool
    ) -> None:
        """End the services of these marks; where the gateway is alive, once it sends them nothing
        more.
        """
        deadline = time.monotonic() + ROUTED_TIMEOUT_S
        while is_routed and (self._is_unsettled() or not self._gateway.is_settled):
            if time.monotonic() >= deadline:
                break
            await asyncio.sleep(LOOK_PERIOD_S)
        await self._strays.end(
            services, lambda mark: self._drain_timeout_s(services[mark]), at_last
        )

    def _drain_timeout_s(self, service: str) -> float:
        """How long the clients of a process that is not kept are waited for."""
        if service == GATEWAY:
            return 0.0  # the next one needs its address
        keeper = self._supervisor.keepers.get(service)
        return (keeper.unit.policy if keeper else Policy()).drain_timeout_s
