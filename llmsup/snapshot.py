"""A service, its model and the card as `llmsup status` and its kin show them."""

import asyncio
from collections.abc import Mapping
from pathlib import Path

from llmsup.attendance import Unit
from llmsup.config.schema import LlamaServer, Profile
from llmsup.control.wire import GpuInfo, ModelInfo, PlanInfo, ServiceInfo
from llmsup.core.device import Device
from llmsup.core.leases import Lease
from llmsup.core.service import ALIVE, Service, State
from llmsup.host import procfs
from llmsup.host.model_server import served_model
from llmsup.keeper import Keeper
from llmsup.placing import Placed


def _pid(leader: int, unit: Unit) -> int:
    """The process that does the work: one that can be succeeded has a parent of its own."""
    return leader if unit.successor is None else procfs.descendants(leader)[-1]


def service_info(
    service: Service,
    unit: Unit,
    port: int | None,
    now: float,
    *,
    lease: Lease | None,
    model: str | None,
    why: str = "",
    trouble: str = "",
) -> ServiceInfo:
    """One service at monotonic time `now`; `why` is said instead of its own reason, and `trouble`
    where it has none.

    `model` is that of its process, if it has one.

    With a `lease` its layers are those that it was given, without one what its profile says.
    """
    is_alive = service.state in ALIVE
    placement = lease.placement if lease else None
    return {
        "service": service.name,
        "kind": unit.kind,
        "want": service.want.value,
        "state": service.state.value,
        "pid": _pid(service.pid, unit) if is_alive and service.pid else None,
        "generation": service.generation,
        "port": port,
        "model": model if is_alive and service.pid else unit.model,
        "gpu_layers": placement.options.gpu_layers if placement else unit.gpu_layers,
        "layers": placement.layers if placement else None,
        "planned_bytes": lease.planned_bytes if lease and placement else None,
        "measured_bytes": lease.measured_bytes if lease else None,
        "restarts": service.restarts,
        "uptime_s": now - service.started_at if is_alive else None,
        "why": why or service.why or trouble,
    }


def plan_info(placed: Placed, lease: Lease | None) -> PlanInfo:
    """A plan, and what came of it where that is known."""
    given = placed.placement
    return {
        "gpu_layers": given.options.gpu_layers,
        "layers": given.layers,
        "n_cpu_moe": given.options.n_cpu_moe,
        "ctx_size": given.options.ctx_size,
        "planned_bytes": given.price.device_bytes,
        "measured_bytes": lease.measured_bytes if lease else None,
        "free_bytes": placed.free_bytes,
        "reason": placed.why,
    }


def gpu_info(device: Device | None) -> GpuInfo | None:
    """The card, where there is one."""
    if device is None:
        return None
    return {
        "name": device.name,
        "total_bytes": device.total_bytes,
        "free_bytes": device.free_bytes,
    }


async def model_infos(profile: Profile, keepers: Mapping[str, Keeper]) -> list[ModelInfo]:
    """What each model server says it serves; those that are ready are asked, all at once."""
    first = {route.services[0]: name for name, route in reversed(profile.route.items())}
    specs = {name: spec for name, spec in profile.service.items() if isinstance(spec, LlamaServer)}

    async def served(name: str) -> str:
        port = keepers[name].port
        is_ready = keepers[name].service.state is State.READY
        return await served_model(port) if is_ready and port is not None else ""

    found = await asyncio.gather(*map(served, specs))
    return [
        {
            "service": name,
            "route": first.get(name),
            "model": Path(model).name or None,
            "expected_model": Path(spec.model).name,
            "state": keepers[name].service.state.value,
        }
        for (name, spec), model in zip(specs.items(), found, strict=True)
    ]
