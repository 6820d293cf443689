"""What follows a death, and what a person can do about its cause."""

from llmsup.config.units import duration
from llmsup.core.diagnosis import Cause
from llmsup.core.service import Service, State, Want

SIGBUS = 7

_HINTS = {
    Cause.GPU_MEMORY: "fewer `gpu_layers` or a smaller `ctx_size`; nvidia-smi shows who uses the "
    "card",
    Cause.NO_ROOM: '`gpu_layers = "auto"` takes what there is; nvidia-smi shows who uses the card',
    Cause.GPU_FAILED: "see that nvidia-smi works; after a suspend the driver may need a restart",
    Cause.HOST_MEMORY: "a smaller `ctx_size` or model, or more memory: under WSL2 that is `memory` "
    "in .wslconfig, under systemd MemoryMax",
    Cause.MODEL_MISSING: "see the path; relative names are looked for in `models.dirs`",
    Cause.MODEL_UNREADABLE: "give your user the right to read the file: chmod u+r",
    Cause.MODEL_CORRUPT: "compare its size with that at its source, and download it anew",
    Cause.MODEL_UNKNOWN: "a newer llama-server may know it; else choose another model",
    Cause.BAD_FLAG: "see the keys and `args` of the service; `llama-server --help` lists what it "
    "takes",
    Cause.PORT_IN_USE: "end the process that holds the port, or choose another `port`",
    Cause.CANNOT_LISTEN: "see that the address is one of this machine, and the port above 1023",
    Cause.LIBRARY_MISSING: "ldd PROGRAM shows what it looks for; install it, or name its directory "
    "in `env`: LD_LIBRARY_PATH",
    Cause.LIBRARY_BROKEN: "the program and its libraries are of different builds: install them "
    "anew, together",
    Cause.ILLEGAL_INSTRUCTION: "install a build for this processor, or compile it here",
    Cause.STALLED: "its output shows how far it came; raise `stall_timeout` or `start_timeout` for "
    "a slow disk",
}


def hint(cause: Cause, signal: int | None = None) -> str:
    """What may help against a cause, in a line; empty where nothing in general does."""
    if signal == SIGBUS:
        return "a file it had mapped was cut short or could not be read: the model, or the disk"
    return _HINTS.get(cause, "")


def next_step(service: Service, now: float) -> str:
    """What follows the last death, told of the service right after it."""
    match service.state:
        case State.BACKOFF:
            return f"restarted after {duration((service.timer_at or now) - now)}"
        case State.FAILED:
            return _given_up(service, now)
        case State.STOPPED:
            return "stopped on request" if service.want is Want.DOWN else service.why
    return "restarted at once"


def _given_up(service: Service, now: float) -> str:
    if service.timer_at is not None:
        return f"given up; tried again after {duration(service.timer_at - now)}"
    if service.policy.restart.policy == "never":
        return "given up: its restart policy is never"
    return "given up until llmsup start"
