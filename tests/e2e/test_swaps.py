"""Requests swap two real models in single mode, behind the real Envoy."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from llmsup.control.client import Client
from tests.e2e.conftest import real_stack
from tests.home import Home, wait_until

DWELL_S = 2.0
SWAPS = 4


@pytest.mark.parametrize("way", ["break-first", "auto"])
def test_clients_of_two_models_are_all_answered_each_by_its_own(home: Home, way: str) -> None:
    real_stack(home)
    text = home.profile.read_text().replace("grace_period", 'start = "on-demand"\ngrace_period')
    home.write(f'mode = "single"\nswitch = "{way}"\nmin_dwell = "{DWELL_S}s"\n{text}')
    home.start(timeout_s=90)
    is_over = threading.Event()

    def keep_asking(model: str) -> list[tuple[int, str | None, str | None, float]]:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": "Say hello."}],
            "max_tokens": 2,
        }
        found = []
        base = f"http://127.0.0.1:{home.gateway_port}"
        with httpx.Client(base_url=base, timeout=120) as api:
            while not is_over.is_set():
                began = time.monotonic()
                answer = api.post("/v1/chat/completions", json=body)
                headers = answer.headers
                who = headers.get("x-llmsup-service"), headers.get("x-llmsup-fallback")
                found.append((answer.status_code, *who, time.monotonic() - began))
        return found

    def swaps() -> int:
        return len([each for each in home.events() if each["event"] == "swap"])

    with ThreadPoolExecutor(8) as pool:
        asking = [(name, pool.submit(keep_asking, name)) for name in ("chat-3b", "code-7b") * 4]
        try:
            wait_until(lambda: swaps() >= SWAPS, f"{SWAPS} swaps", 150)
        finally:
            is_over.set()
        found = [(name, each.result()) for name, each in asking]

    for name, answers in found:
        own = (200, name.partition("-")[0], "false")
        assert {each[:3] for each in answers} == {own}
        assert len(answers) > 1
    wait_until(lambda: sum(bool(each["model"]) for each in Client(home.paths).models()) == 1, "one")
    requests = sum(len(answers) for _, answers in found)
    longest_s = max(each[3] for _, answers in found for each in answers)
    print(f"{way}: {requests} requests, {swaps()} swaps, the longest wait {longest_s:.1f} s")
