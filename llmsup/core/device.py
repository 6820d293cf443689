"""The card as one reading found it: a device, or why there is none."""

from dataclasses import dataclass
from enum import Enum


class Absence(Enum):
    """Why a reading found no device."""

    NO_LIBRARY = "no library"  # no driver is installed on this machine
    NO_DRIVER = "no driver"  # installed, and not loaded
    MISMATCH = "mismatch"  # library and kernel module are of two versions
    NO_PERMISSION = "no permission"
    NO_DEVICE = "no device"  # the driver has no such card
    LOST = "lost"  # it fell off, or its driver was loaded anew under our feet
    ERROR = "error"  # any other error, named in the reason
    SILENT = "silent"  # no answer in time: says nothing of the card
    UNBELIEVABLE = "unbelievable"  # figures that cannot be true: says nothing of the card


@dataclass(frozen=True)
class NoDevice:
    """No device, and a phrase for a person that says why."""

    absence: Absence
    reason: str


@dataclass(frozen=True)
class Device:
    """One card. What the driver does not tell is None.

    `reserved_bytes` is what the driver keeps for itself, and then not part of `used_bytes`.
    """

    index: int
    uuid: str
    name: str
    driver: str
    total_bytes: int
    free_bytes: int
    used_bytes: int
    reserved_bytes: int | None = None
    utilization_percent: int | None = None

    @property
    def doubt(self) -> str:
        """What about its memory cannot be true; empty where it can."""
        if self.total_bytes <= 0:
            return f"{self.total_bytes} bytes of memory in total"
        for name, size_bytes in (("free", self.free_bytes), ("used", self.used_bytes)):
            if not 0 <= size_bytes <= self.total_bytes:
                return f"{size_bytes} bytes {name} of {self.total_bytes}"
        return ""


Reading = Device | NoDevice
