"""A service and the card as `llmsup status` shows them."""

from llmsup.attendance import Unit
from llmsup.control.wire import GpuInfo, ServiceInfo
from llmsup.core.device import Device
from llmsup.core.service import ALIVE, Service
from llmsup.host import procfs


def _pid(leader: int, unit: Unit) -> int:
    """The process that does the work: one that can be succeeded has a parent of its own."""
    return leader if unit.successor is None else procfs.descendants(leader)[-1]


def service_info(
    service: Service, unit: Unit, port: int | None, now: float, trouble: str = ""
) -> ServiceInfo:
    """One service at monotonic time `now`; `trouble` is said where it has no reason of its own."""
    is_alive = service.state in ALIVE
    return {
        "service": service.name,
        "kind": unit.kind,
        "want": service.want.value,
        "state": service.state.value,
        "pid": _pid(service.pid, unit) if is_alive and service.pid else None,
        "generation": service.generation,
        "port": port,
        "model": unit.model,
        "gpu_layers": unit.gpu_layers,
        "layers": None,
        "planned_bytes": None,
        "measured_bytes": None,
        "restarts": service.restarts,
        "uptime_s": now - service.started_at if is_alive else None,
        "why": service.why or trouble,
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
