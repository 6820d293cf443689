"""A real daemon and servers that hang: each is found and replaced; one that is busy never is."""

import asyncio
import json
import os
import signal
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from llmsup.drill.traffic import Load, Record, chat_body
from tests.gguf_files import gguf
from tests.home import STUBS, Home, free_ports, stub, wait_until

BOUND_S = 3.0
LIVENESS = '{ timeout = "3s" }'


def dual(home: Home, gateway: str = "", **keys: str) -> None:
    """chat and code, stubs in place of llama-servers, which stand in for each other."""
    program = home.root / "llama-server"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {STUBS / "upstream.py"} "$@"\n')
    program.chmod(0o755)
    model = home.root / "model.gguf"
    model.write_bytes(gguf())
    lines = {
        "kind": '"llama-server"',
        "model": json.dumps(str(model)),
        "binary": json.dumps(str(program)),
        "readiness": '{ period = "1s" }',
        "liveness": LIVENESS,
        "grace_period": '"2s"',
        **keys,
    }
    text = f'[gateway]\nlisten = "127.0.0.1:{home.gateway_port}"\n{gateway}\n'
    for name, port in zip(("chat", "code"), free_ports(2), strict=True):
        text += f"[service.{name}]\nport = {port}\n"
        text += "".join(f"{key} = {value}\n" for key, value in lines.items())
    home.write(text + '[route."chat-7b"]\nservices = ["chat", "code"]\n')


def tell(home: Home, name: str, path: str) -> None:
    port = home.service(name)["port"]
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", method="POST", data=b"")
    urllib.request.urlopen(request, timeout=20).close()


def ask(home: Home, headers: dict[str, str] | None = None, timeout_s: float = 60.0) -> str:
    """Ask for chat-7b. Returns who answered."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{home.gateway_port}/v1/chat/completions",
        data=chat_body("chat-7b"),
        headers={"content-type": "application/json", **(headers or {})},
    )
    with urllib.request.urlopen(request, timeout=timeout_s) as response:
        return str(response.headers["x-llmsup-service"])


def deaths(home: Home, name: str) -> list[str]:
    """Why a service that was up was killed, each time."""
    return [
        event["why"]
        for event in home.events()
        if event.get("service") == name
        and event["event"] == "state"
        and event["state"] == "stopping"
    ]


def under_load(home: Home, hang: str) -> list[Record]:
    """Let chat hang under four clients, until it is replaced and they were answered again."""

    async def run() -> list[Record]:
        load = Load(home.gateway_port, chat_body("chat-7b"), clients=4)
        load.start()
        while len(load.records) < 20:
            await asyncio.sleep(0.01)
        chat = await asyncio.to_thread(home.service, "chat")
        if hang == "SIGSTOP":
            os.kill(chat["pid"], signal.SIGSTOP)
        else:
            await asyncio.to_thread(tell, home, "chat", hang)
        await asyncio.to_thread(home.wait_replaced, chat)
        answered = len(load.records)
        while len(load.records) < answered + 20:
            await asyncio.sleep(0.01)
        return list(await load.finish())

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("hang", "says"),
    [
        ("SIGSTOP", "stopped by a signal, has not moved for "),
        ("/stub/wedge", "says it is healthy but decoded nothing for "),
        ("/stub/deafen", "says it is healthy but did not tell what it does for "),
    ],
)
def test_a_server_that_hangs_under_load_is_replaced_and_fails_no_request(
    home: Home, hang: str, says: str
) -> None:
    dual(home)
    home.start()
    records = under_load(home, hang)
    assert [record.error for record in records if record.failed] == []
    assert {record.service for record in records} == {"chat", "code"}
    (why,) = deaths(home, "chat")
    assert why.startswith(says)
    assert home.service("chat")["restarts"] == 1
    assert deaths(home, "code") == []


def test_requests_that_hung_are_answered_elsewhere_before_the_server_is_back(home: Home) -> None:
    """Given a wedged chat with four requests, code answers them once chat is killed."""
    dual(home)
    home.start()
    chat = home.service("chat")
    tell(home, "chat", "/stub/wedge")
    with ThreadPoolExecutor() as pool:
        asked = [pool.submit(ask, home) for _ in range(4)]
        assert {each.result() for each in asked} <= {"code", "chat"}
    home.wait_replaced(chat)
    (why,) = deaths(home, "chat")
    assert why.endswith(" with 4 requests pending")


def test_a_server_that_hangs_while_idle_is_replaced(home: Home) -> None:
    dual(home)
    home.start()
    chat = home.service("chat")
    tell(home, "chat", "/stub/deafen")
    home.wait_replaced(chat)


def test_a_server_that_computes_for_long_is_left_alone(home: Home) -> None:
    """Given one request that takes a whole core for thrice the bound, and others that wait."""
    dual(home)
    home.start()
    chat = home.service("chat")
    busy = {"x-stub": json.dumps({"busy_s": 3 * BOUND_S})}
    with ThreadPoolExecutor() as pool:
        asked = [pool.submit(ask, home, headers) for headers in (busy, {"x-stub": "{}"})]
        assert [each.result() for each in asked] == ["chat", "chat"]
    assert home.service("chat")["generation"] == chat["generation"]
    assert deaths(home, "chat") == []


def test_an_idle_stack_is_left_alone(home: Home) -> None:
    dual(home, gateway='liveness_timeout = "3s"')
    home.start()
    begun = time.monotonic()
    wait_until(lambda: time.monotonic() > begun + 3 * BOUND_S, "three times the bound")
    assert [(s["state"], s["generation"]) for s in home.status()["services"]] == [("ready", 1)] * 3


def test_a_stopped_gateway_is_replaced_and_answers(home: Home) -> None:
    dual(home, gateway='liveness_timeout = "3s"')
    home.start()
    before = home.service("gateway")
    os.kill(before["pid"], signal.SIGSTOP)
    home.wait_replaced(before)
    assert ask(home) == "chat"
    assert deaths(home, "gateway")[0].startswith("stopped by a signal, has not moved for ")


def test_a_stopped_program_without_a_port_is_replaced_unless_told_otherwise(home: Home) -> None:
    sleeper = ["sleep", "3600"]
    home.write(
        home.command("watched", sleeper, liveness={"timeout": "3s"})
        + home.command("unwatched", sleeper, liveness={"timeout": "0s"})
    )
    home.start()
    watched, unwatched = home.service("watched"), home.service("unwatched")
    for each in (unwatched, watched):
        os.kill(each["pid"], signal.SIGSTOP)
    again = home.wait_replaced(watched)
    os.kill(again["pid"], signal.SIGSTOP)
    home.wait_replaced(again)
    assert home.service("unwatched")["pid"] == unwatched["pid"]


def test_a_program_that_accepts_and_says_nothing_is_replaced(home: Home) -> None:
    """Given a program other than llama-server, which stops answering without being stopped."""
    (port,) = free_ports(1)
    home.write(
        home.command(
            "mute", stub("upstream.py", "--port", port), port=port,
            readiness={"http_get": "/health", "period": "500ms"}, liveness={"timeout": "3s"},
        )
    )  # fmt: skip
    home.start()
    mute = home.service("mute")
    tell(home, "mute", "/stub/mute")
    home.wait_replaced(mute)
    assert deaths(home, "mute")[0].startswith("answered nothing for ")


def test_a_stop_ends_though_the_draining_server_is_stopped(home: Home) -> None:
    """Given a request in flight, a drain time of ten minutes and a server that hangs in it.

    The request is answered by code, though it takes just as long there.
    """
    dual(home, drain_timeout='"10m"')
    home.start()
    chat = home.service("chat")
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(ask, home, {"x-stub": json.dumps({"busy_s": 8})})
        wait_until(lambda: is_asked(chat["port"]), "the request")
        stopped = pool.submit(home.cli, "stop", "chat")
        home.wait_state("chat", "draining")
        os.kill(chat["pid"], signal.SIGSTOP)
        assert stopped.result().returncode == 0
        assert home.service("chat")["state"] == "stopped"
        assert asked.result() == "code"
    (why,) = deaths(home, "chat")
    assert why.startswith("asked to stop; stopped by a signal, has not moved for ")
    assert home.service("chat")["restarts"] == 0


def is_asked(port: int) -> bool:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/stub", timeout=20) as response:
        return bool(json.load(response)["requests"])
