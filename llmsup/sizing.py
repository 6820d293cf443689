"""Gather, then decide: model headers, the ledger and the `[gpu]` table in, a plan out.

The daemon asks before every load, `llmsup plan` whenever somebody wonders. Nothing is started and
no card is read here: the caller hands in its reading.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from operator import is_
from pathlib import Path

from llmsup.config.schema import LlamaServer, Profile
from llmsup.core import offload
from llmsup.core.companions import (
    Companion,
    accompanied,
    companion_of,
    companions_at_least,
    extra_bytes,
)
from llmsup.core.device import Device, NoDevice, Reading
from llmsup.core.estimate import buffers_at_least, estimate, off_card, pool_bytes
from llmsup.core.fingerprint import fingerprint
from llmsup.core.gguf import Model
from llmsup.core.ledger import Key, Ledger
from llmsup.core.options import Options
from llmsup.core.plan import Budget, Degrade, Demand, Plan, Price
from llmsup.core.shape import ModelShape, shape_of
from llmsup.core.sizes import Estimate
from llmsup.errors import Flaw, LaunchError, ModelFileError
from llmsup.host import binaries, engine, gguf
from llmsup.host.systemctl import is_wsl
from llmsup.services import llama_options

HEADROOM_BYTES = 256 * 2**20
WSL_HEADROOM_SHARE = 0.04
"""Under WSL2 Windows draws on the same card, and what does not fit spills instead of failing."""


@dataclass(frozen=True)
class _Facts:
    """What the files of one service tell."""

    models: tuple[Model, ...]
    fingerprint: str
    shape: ModelShape
    companions: tuple[Companion, ...]

    def on_card(self, options: Options) -> Estimate:
        alone = estimate(self.shape, options)
        return accompanied(alone, options, self.companions)

    def off_card(self, options: Options) -> Estimate:
        options = replace(options, gpu_layers=0)
        alone = off_card(self.shape, options)
        return accompanied(alone, options, self.companions)

    def buffers_at_least(self, options: Options) -> int:
        if options.gpu_layers == 0:
            return 0
        least_bytes = buffers_at_least(self.shape, options)
        return least_bytes + companions_at_least(options, self.shape.layers, self.companions)


class Sizing:
    """What the services of one profile ask of the card, and what they get.

    `ledger` is asked at each plan, so that what a load has just taught is known to the next.
    `engines`: the file of what is known of engines; none is asked here.
    """

    def __init__(
        self,
        profile: Profile,
        environ: Mapping[str, str],
        ledger: Callable[[], Ledger],
        engines: Path,
    ) -> None:
        self._profile = profile
        self._environ = environ
        self._ledger = ledger
        self._engines = engines
        self._facts: dict[str, _Facts] = {}

    def take(self, profile: Profile) -> None:
        """From now on the services are those of `profile`."""
        self._profile = profile

    def models(self, services: Iterable[str]) -> tuple[str, ...]:
        """Those of `services` that have a model of their own."""
        of = self._profile.service
        return tuple(name for name in services if isinstance(of.get(name), LlamaServer))

    def demand(
        self, service: str, at_most_bytes: int | None = None, *, reading: Reading | None = None
    ) -> Demand:
        """What a service asks of the card that was read.

        Without a reading, what was measured on a card is not looked up. Raises ModelFileError where
        the header of one of its files cannot be read.
        """
        spec = self._server(service)
        facts = self._read(service)
        ledger, build = self._ledger(), self._build(spec)

        @cache
        def price(options: Options) -> Price:
            if options.gpu_layers == 0 or isinstance(reading, NoDevice):
                return Price(facts.off_card(options), overhead_bytes=0)
            key = Key(facts.fingerprint, options, build, _card(reading))
            return ledger.price(
                key,
                facts.on_card(options),
                pool_bytes(facts.shape, options),
                extra_bytes(options, facts.shape.layers, facts.companions),
            )

        return Demand(
            service=service,
            model=Path(spec.model).name,
            layers=facts.shape.layers,
            asked=llama_options.asked(spec, facts.shape.layers),
            price=price,
            buffers_at_least=facts.buffers_at_least,
            knobs=llama_options.knobs(spec),
            degrade=tuple(Degrade(word) for word in spec.degrade),
            ctx_size_min=spec.ctx_size_min or 0,
            priority=spec.priority,
            pinned=spec.pinned,
            has_experts=facts.shape.has_experts,
            at_most_bytes=at_most_bytes,
        )

    def key(self, service: str, options: Options, reading: Reading) -> Key:
        """By which a load with these options is known in the ledger. Raises ModelFileError."""
        build = self._build(self._server(service))
        return Key(self._read(service).fingerprint, options, build, _card(reading))

    def flaws(self, services: Iterable[str]) -> dict[str, ModelFileError]:
        """What is wrong with the model files of services, where something is."""
        found = {}
        for name in self.models(services):
            try:
                self._read(name)
            except ModelFileError as error:
                found[name] = error
        return found

    def budget(
        self, device: Device, *, reserved_bytes: int = 0, coming_back_bytes: int = 0
    ) -> Budget:
        """The card by the `[gpu]` table. `coming_back_bytes` are ours, and free before a load."""
        gpu = self._profile.gpu
        total_bytes = device.total_bytes
        headroom_bytes = gpu.headroom_bytes
        if headroom_bytes is None:
            headroom_bytes = default_headroom_bytes(total_bytes, is_wsl=is_wsl())
        return Budget(
            device_name=device.name,
            total_bytes=total_bytes,
            free_bytes=min(total_bytes, device.free_bytes + coming_back_bytes),
            headroom_bytes=headroom_bytes,
            ceiling_bytes=gpu.ceiling.of(total_bytes),
            reserved_bytes=reserved_bytes,
        )

    def plan(
        self,
        reading: Reading,
        services: Iterable[str],
        *,
        reserved_bytes: int = 0,
        coming_back_bytes: int = 0,
        at_most_bytes: Mapping[str, int] | None = None,
    ) -> Plan:
        """Who of `services` gets what. One whose model file has a flaw gets nothing: see `flaws`.

        `at_most_bytes`: what services that ran out of memory must stay below.
        """
        services = tuple(services)
        flaws, at_most = self.flaws(services), at_most_bytes or {}
        demands = [
            self.demand(name, at_most.get(name), reading=reading)
            for name in self.models(services)
            if name not in flaws
        ]
        if not isinstance(reading, Device):
            return offload.plan(None, demands, reading.reason)
        budget = self.budget(
            reading, reserved_bytes=reserved_bytes, coming_back_bytes=coming_back_bytes
        )
        return offload.plan(budget, demands)

    def _read(self, service: str) -> _Facts:
        """What its files tell; what was made of them is kept while they are the same."""
        spec, known = self._server(service), self._facts.get(service)
        path = Path(spec.model)
        if not path.is_absolute():  # as the profile has it: it was not found when that was loaded
            raise ModelFileError(Flaw.MISSING, f"there is no {spec.model} in models.dirs")
        # Relative ones stand below "/", where daemons live.
        companions = [Path("/", each) for each in llama_options.extra_files(spec)]
        models = tuple(gguf.look(each) for each in (path, *companions))
        if known is not None and all(map(is_, known.models, models)):
            return known
        model, *others = models
        marks = "+".join(map(fingerprint, models))
        facts = _Facts(models, marks, shape_of(model), tuple(map(companion_of, others)))
        self._facts[service] = facts
        return facts

    def _server(self, service: str) -> LlamaServer:
        spec = self._profile.service[service]
        if not isinstance(spec, LlamaServer):
            raise TypeError(f"{service} has no model")
        return spec

    def _build(self, spec: LlamaServer) -> str:
        """The build of its engine; empty where it is not installed or was never asked."""
        try:
            known = engine.look(binaries.llama_server(spec.binary, self._environ), self._engines)
        except LaunchError:
            return ""
        return "" if known is None else known.build


def _card(reading: Reading | None) -> str:
    """What a measurement on a card is true for: the card, and its driver."""
    return f"{reading.uuid} {reading.driver}" if isinstance(reading, Device) else ""


def default_headroom_bytes(total_bytes: int, *, is_wsl: bool) -> int:
    """What stays free on a card of so many bytes where the profile does not say."""
    if not is_wsl:
        return HEADROOM_BYTES
    return max(HEADROOM_BYTES, int(total_bytes * WSL_HEADROOM_SHARE))
