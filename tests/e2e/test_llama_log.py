"""What a real llama-server says of its loads, on the host and on a second device, is understood."""

import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from bench.models import smollm2
from llmsup.core.sizes import Sizes
from llmsup.host.binaries import llama_server
from llmsup.services.llama_log import Loaded, parse
from tests.home import free_ports, wait_until

MIB = 2**20


@contextmanager
def running(argv: list[str], log: Path, is_ready: Callable[[], bool]) -> Iterator[None]:
    with log.open("wb") as output:
        process = subprocess.Popen(argv, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_until(is_ready, f"{argv[0]} to be ready", 90)
        yield
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()
        process.wait()


def listens(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


def loaded(log: Path, port: int, *options: str) -> Loaded:
    server = [llama_server(None, {}), "-m", str(smollm2()), "--port", str(port)]
    told = ["-lv", "4", "-fit", "off", "-c", "1024", "-t", "1", *options]
    with running([*server, *told], log, lambda: b"model loaded" in log.read_bytes()):
        return parse(log.read_text(errors="replace").splitlines())


def test_a_load_on_the_host(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    log = tmp_path / "chat.log"
    found = loaded(log, port, "-np", "1", "--device", "none")
    assert found.is_complete
    assert (found.device, found.devices) == (Sizes(), frozenset())
    assert found.host.kv_cache_bytes == round(22.5 * MIB)
    assert found.effective.n_ctx == found.effective.n_ctx_seq == 1024
    assert (found.effective.n_seq_max, found.effective.kv_unified) == (1, False)


def test_a_load_that_a_second_device_shares(tmp_path: Path) -> None:
    rpc = Path(llama_server(None, {})).with_name("ggml-rpc-server")
    if not rpc.exists():
        pytest.skip("this llama.cpp has no RPC server")
    port, rpc_port = free_ports(2)
    shared = [str(rpc), "-H", "127.0.0.1", "-p", str(rpc_port)]
    with running(shared, tmp_path / "rpc.log", lambda: listens(rpc_port)):
        endpoint = f"127.0.0.1:{rpc_port}"
        found = loaded(tmp_path / "chat.log", port, "-np", "2", "-ngl", "20", "--rpc", endpoint)
    assert found.is_complete
    assert found.devices == {f"RPC0[{endpoint}]"}
    assert (found.offloaded_layers, found.layers) == (20, 31)
    assert found.device.kv_cache_bytes == round(14.25 * MIB)
    assert found.host.kv_cache_bytes == round(8.25 * MIB)
    assert 60 * MIB < found.device.weights_bytes < 80 * MIB
    assert found.device.compute_bytes > MIB
    assert (found.effective.n_ctx, found.effective.n_ctx_seq) == (1024, 512)
    assert found.effective.flash_attn is True
