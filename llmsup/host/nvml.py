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
    """Reads one card, chosen by its index or UUID. Used from one event loop."""

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
        if isinstance(self._device, str):
            handle = nvml.nvmlDeviceGetHandleByUUID(self._device)
            index = nvml.nvmlDeviceGetIndex(handle)
        else:
            count, index = nvml.nvmlDeviceGetCount(), self._device
            if not 0 <= index < count:
                which = f"no card {index}, only {count}" if count else "no card"
                return NoDevice(Absence.NO_DEVICE, f"the NVIDIA driver has {which}")
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
        memory = _memory(nvml, handle)
        device = Device(
            index=index,
            uuid=nvml.nvmlDeviceGetUUID(handle),
            name=nvml.nvmlDeviceGetName(handle),
            driver=nvml.nvmlSystemGetDriverVersion(),
            total_bytes=memory.total,
            free_bytes=memory.free,
            used_bytes=memory.used,
            reserved_bytes=getattr(memory, "reserved", None),
            utilization_percent=_utilization(nvml, handle),
        )
        if device.doubt:
            return NoDevice(Absence.UNBELIEVABLE, f"NVML says {device.doubt}")
        return device

    def _shut_down(self, nvml: ModuleType) -> None:
        if self._is_initialised:
            self._is_initialised = False
            with suppress(Exception):
                nvml.nvmlShutdown()


def _memory(nvml: ModuleType, handle: Any) -> Any:
    """Version 2 tells apart what the driver keeps for itself; older drivers have version 1."""
    older = (
        nvml.NVML_ERROR_FUNCTION_NOT_FOUND,
        nvml.NVML_ERROR_NOT_SUPPORTED,
        nvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
    )
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
        if error.value not in (nvml.NVML_ERROR_NOT_SUPPORTED, nvml.NVML_ERROR_FUNCTION_NOT_FOUND):
            raise
        return None
    return percent if percent <= 100 else None


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
