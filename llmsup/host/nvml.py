"""The card, read through NVML. No GPU is a value with a reason, never an exception.

A call into the driver can hang for minutes (a suspended or a broken card), so each reading has a
thread of its own that is waited for only so long; it is a daemon thread, so that it cannot keep
this process from ending. Nothing here holds a CUDA context.
"""

import asyncio
import ctypes
import threading
from contextlib import suppress
from types import ModuleType
from typing import Any

from llmsup.config.units import duration
from llmsup.core.device import Absence, Device, NoDevice, Reading

LIBRARY = "libnvidia-ml.so.1"
TIMEOUT_S = 5.0
_LISTED = 8

_ABSENCES = {
    "DRIVER_NOT_LOADED": (Absence.NO_DRIVER, "the NVIDIA driver is not loaded"),
    "LIB_RM_VERSION_MISMATCH": (
        Absence.MISMATCH,
        "the NVIDIA driver was updated and its old kernel module is still loaded, or the other "
        "way round",
    ),
    "NO_PERMISSION": (Absence.NO_PERMISSION, "this user may not use the NVIDIA driver"),
    "LIBRARY_NOT_FOUND": (Absence.NO_LIBRARY, f"no NVIDIA driver is installed ({LIBRARY})"),
    "NOT_FOUND": (Absence.NO_DEVICE, "the NVIDIA driver has no such card"),
    "GPU_NOT_FOUND": (Absence.NO_DEVICE, "the NVIDIA driver has no such card"),
    "GPU_IS_LOST": (Absence.LOST, "the card is lost"),
    "UNINITIALIZED": (Absence.LOST, "the NVIDIA driver was loaded anew"),
}


class Nvml:
    """Reads one card or one instance (MIG), by its index or UUID. Used from one event loop."""

    def __init__(self, device: int | str = 0, timeout_s: float = TIMEOUT_S) -> None:
        self._device = device
        self._timeout_s = timeout_s
        self._asked_at: float | None = None  # while a thread is in a call
        self._is_initialised = False

    async def read(self) -> Reading:
        """The card as it is now. While an earlier call hangs, no second one is made."""
        loop = asyncio.get_running_loop()
        if self._asked_at is not None:
            return _silent(loop.time() - self._asked_at)
        answer: asyncio.Future[Reading] = loop.create_future()

        def work() -> None:
            reading = self._read()
            self._asked_at = None
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(_resolve, answer, reading)

        self._asked_at = loop.time()
        try:
            threading.Thread(target=work, name="nvml", daemon=True).start()
        except RuntimeError as error:
            self._asked_at = None
            return NoDevice(Absence.SILENT, f"this daemon: {error}")
        try:
            async with asyncio.timeout(self._timeout_s):
                return await answer
        except TimeoutError:
            return _silent(self._timeout_s)

    # --- in the thread

    def _read(self) -> Reading:
        try:
            # Looked for without the binding, whose import is large: most machines have none.
            ctypes.CDLL(LIBRARY)
        except OSError:
            return NoDevice(*_ABSENCES["LIBRARY_NOT_FOUND"])
        try:
            import pynvml  # noqa: PLC0415 - see above
        except Exception as error:
            return NoDevice(Absence.ERROR, f"nvidia-ml-py cannot be imported: {error}")
        try:
            reading = self._ask(pynvml)
        except pynvml.NVMLError as error:
            reading = _explained(pynvml, error.value)
        except Exception as error:  # a name that is no text, a library that is none
            reading = NoDevice(Absence.UNBELIEVABLE, f"NVML: {type(error).__name__}: {error}")
        if not isinstance(reading, Device):
            # The next reading begins at the beginning: there is no other way back from a card
            # that was lost or a driver that was loaded anew.
            self._shut_down(pynvml)
        return reading

    def _ask(self, nvml: ModuleType) -> Reading:
        if not self._is_initialised:
            nvml.nvmlInit()
            self._is_initialised = True
        handle = _found(nvml, self._device)
        if isinstance(handle, NoDevice):
            return handle
        whole = _whole(nvml, self._device, handle)
        if whole is handle and (reason := _partitioned(nvml, handle)):
            return NoDevice(Absence.NO_DEVICE, reason)
        memory = _memory(nvml, handle)
        device = Device(
            index=nvml.nvmlDeviceGetIndex(whole),
            uuid=nvml.nvmlDeviceGetUUID(handle),
            name=nvml.nvmlDeviceGetName(handle),
            driver=nvml.nvmlSystemGetDriverVersion(),
            total_bytes=memory.total,
            free_bytes=memory.free,
            used_bytes=memory.used,
            reserved_bytes=getattr(memory, "reserved", None),
            utilization_percent=_utilization(nvml, handle) if whole is handle else None,
        )
        if device.doubt:
            return NoDevice(Absence.UNBELIEVABLE, f"NVML says {device.doubt}")
        return device

    def _shut_down(self, nvml: ModuleType) -> None:
        if self._is_initialised:
            self._is_initialised = False
            with suppress(Exception):
                nvml.nvmlShutdown()


def _found(nvml: ModuleType, device: int | str) -> Any:
    """Its handle; NoDevice that says what there is where there is none."""
    count = nvml.nvmlDeviceGetCount()
    try:
        if isinstance(device, str):
            return nvml.nvmlDeviceGetHandleByUUID(device)
        if 0 <= device < count:
            return nvml.nvmlDeviceGetHandleByIndex(device)
    except nvml.NVMLError as error:
        if error.value not in (nvml.NVML_ERROR_NOT_FOUND, nvml.NVML_ERROR_INVALID_ARGUMENT):
            raise
    if not count:
        return NoDevice(Absence.NO_DEVICE, "the NVIDIA driver has no card")
    listed = []
    for index in range(min(count, _LISTED)):
        with suppress(nvml.NVMLError):
            card = nvml.nvmlDeviceGetHandleByIndex(index)
            listed.append(f"{index}: {_named(nvml, card)}")
    there_is = "; ".join([*listed, *["…"] * (count > _LISTED)])
    return NoDevice(Absence.NO_DEVICE, f"there is no card {device}, only {there_is or count}")


def _named(nvml: ModuleType, handle: Any) -> str:
    return f"{nvml.nvmlDeviceGetName(handle)}, {nvml.nvmlDeviceGetUUID(handle)}"


def _whole(nvml: ModuleType, device: int | str, handle: Any) -> Any:
    """The card that an instance (MIG) is a part of; only a card has an index and is seen to work.

    Any other handle as it is.
    """
    if isinstance(device, str) and device.startswith("MIG-"):
        return nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
    return handle


def _partitioned(nvml: ModuleType, handle: Any) -> str:
    """Why a card cannot be used as a whole: programs get no more than an instance of it."""
    try:
        is_partitioned = nvml.nvmlDeviceGetMigMode(handle)[0] == nvml.NVML_DEVICE_MIG_ENABLE
        most = nvml.nvmlDeviceGetMaxMigDeviceCount(handle) if is_partitioned else 0
    except nvml.NVMLError:  # most cards cannot be; what else is wrong with it, its memory will tell
        return ""
    if not is_partitioned:
        return ""
    instances = []
    for number in range(most):
        with suppress(nvml.NVMLError):  # not every number has one
            instance = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
            instances.append(_named(nvml, instance))
    words = f"{_named(nvml, handle)} is partitioned (MIG)"
    if not instances:
        return f"{words} and has no instance; nvidia-smi mig makes one"
    return f"{words}; name one of its instances as gpu.device: {'; '.join(instances)}"


def _memory(nvml: ModuleType, handle: Any) -> Any:
    """Version 2 tells apart what the driver keeps for itself; older drivers have version 1."""
    older = (*_unsupported(nvml), nvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH)
    try:
        return nvml.nvmlDeviceGetMemoryInfo(handle, nvml.nvmlMemory_v2)
    except nvml.NVMLError as error:
        if error.value not in older:
            raise
    return nvml.nvmlDeviceGetMemoryInfo(handle)


def _utilization(nvml: ModuleType, handle: Any) -> int | None:
    """Percent of the last moments in which the card computed; WSL2 does not tell."""
    try:
        percent = int(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
    except nvml.NVMLError as error:
        if error.value not in _unsupported(nvml):
            raise
        return None
    return percent if percent <= 100 else None


def _unsupported(nvml: ModuleType) -> tuple[int, int]:
    return nvml.NVML_ERROR_NOT_SUPPORTED, nvml.NVML_ERROR_FUNCTION_NOT_FOUND


def _explained(nvml: ModuleType, code: int) -> NoDevice:
    prefix = "NVML_ERROR_"
    name = next(
        (
            constant.removeprefix(prefix)
            for constant, value in vars(nvml).items()
            if constant.startswith(prefix) and value == code
        ),
        str(code),
    )
    absence, words = _ABSENCES.get(name, (Absence.ERROR, "NVML fails"))
    return NoDevice(
        absence, f"{words} (NVML: {name})" if absence is not Absence.NO_LIBRARY else words
    )


def _silent(waited_s: float) -> NoDevice:
    words = f"the NVIDIA driver has not answered for {duration(round(waited_s, 1))}"
    return NoDevice(Absence.SILENT, words)


def _resolve(answer: asyncio.Future[Reading], reading: Reading) -> None:
    if not answer.done():
        answer.set_result(reading)
