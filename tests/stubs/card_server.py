"""A llama-server that takes memory of a card that does not exist (card.h), and answers as a stub.

    card_server.py --port 8001 --gpu-layers 20 [--device none] …

The name of its model tells what is wrong with it: "dies" (once it is loaded), "other" (it says
that it serves another file), "broken" (it answers 500). Read from its environment: TAKES_MIB
(default 500), RUNS_OUT_ABOVE (layers with which it finds no memory), RUNS_OUT_BESIDE (it finds none
where so many others have some), MISSES_MIB (what it then says it could not get), LOADS_S (so long
it loads), LISTENS_S (so long it then listens, and says that it is loading, before it takes its
memory).
"""

import fcntl
import os
import signal
import sys
import time
from pathlib import Path

MIB = 2**20
UPSTREAM = Path(__file__).with_name("upstream.py")


def argument(flag: str, default: str = "") -> str:
    return sys.argv[sys.argv.index(flag) + 1] if flag in sys.argv else default


def take(size_bytes: int) -> None:
    """The line of this process, as card.h has it; it ends with the process."""
    stat = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    with Path(f"{os.environ['NVML_STUB']}.processes").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(f"process {os.getpid()} {stat[19]} GPU-1 {size_bytes} 0\n")


def others() -> int:
    """How many processes have memory of the card."""
    file = Path(f"{os.environ['NVML_STUB']}.processes")
    lines = file.read_text().splitlines() if file.exists() else []
    return len({line.split()[1] for line in lines if Path("/proc", line.split()[1]).exists()})


def run_out(missing_mib: int) -> None:
    what = f"allocating {missing_mib:.2f} MiB on device 0: cudaMalloc failed: out of memory"
    lines = (
        f"ggml_backend_cuda_buffer_type_alloc_buffer: {what}",
        f"alloc_tensor_range: failed to allocate CUDA0 buffer of size {missing_mib * MIB}",
        "llama_model_load: error loading model: unable to allocate CUDA0 buffer",
    )
    print(*(f"0.01.000.000 E {line}" for line in lines), sep="\n", file=sys.stderr, flush=True)
    sys.exit(1)


def main() -> None:
    if "--port" not in sys.argv:  # --help, --version: a script of its user's, which tells nothing
        sys.exit(1)
    layers = int(argument("--gpu-layers", "0"))
    listens_s = float(os.environ.get("LISTENS_S", "0"))
    is_on_card = layers > 0 and argument("--device") != "none"
    time.sleep(float(os.environ.get("LOADS_S", "0")))
    if is_on_card:
        allowed = int(os.environ.get("RUNS_OUT_BESIDE", "1000"))
        if layers > int(os.environ.get("RUNS_OUT_ABOVE", "1000")) or others() >= allowed:
            run_out(int(os.environ.get("MISSES_MIB", "100")))
        size_bytes = int(float(os.environ.get("TAKES_MIB", "500")) * MIB)
        if listens_s and not os.fork():
            time.sleep(listens_s)
            take(size_bytes)
            signal.pause()
        elif not listens_s:
            take(size_bytes)
    model = argument("--model")
    if "dies" in model:
        sys.exit(1)
    faults = ["--status", "500"] if "broken" in model else []
    says = "/somewhere/else.gguf" if "other" in model else model
    port = ("--port", argument("--port"), "--load-s", str(listens_s))
    stub = (sys.executable, str(UPSTREAM), *port, "--name", argument("--alias", "stub"))
    os.execv(sys.executable, (*stub, "--model", says, *faults))


if __name__ == "__main__":
    main()
