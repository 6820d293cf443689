"""A profile that changes under load: only what it changes is touched, and no request fails."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable

import pytest

from llmsup.control.client import Client
from llmsup.drill.traffic import Load, chat_body
from tests.home import LLMSUP, Home, free_ports, is_alive, stub, wait_until
from tests.process.test_adoption import foreground, pids
from tests.process.test_stack import ask, dual

ROUTE = '[route."chat-7b"]\nservices = ["chat", "code"]\naliases = ["gpt-4o-mini"]\n'


def reload(home: Home) -> str:
    """`llmsup reload`, seen to succeed; what it said of it."""
    result = home.cli("reload")
    assert result.returncode == 0, result.stderr + home.daemon_log()
    said = result.stderr.splitlines()[-1]
    assert said.startswith("reloaded: "), result.stderr
    return re.sub(r" in [0-9.]+ s$", "", said.removeprefix("reloaded: "))


def edit(home: Home, old: str, new: str) -> None:
    text = home.profile.read_text()
    assert old in text
    home.profile.write_text(text.replace(old, new))


def without(home: Home, name: str) -> None:
    """Take a service out of the profile, and out of every route."""
    text = home.profile.read_text()
    text = re.sub(rf"\[service\.{name}\]\n(?:[^\[\n].*\n)*", "", text)
    text = re.sub(rf'\[route\."[^"]*"\]\nservices = \["{name}"\]\n', "", text)
    home.profile.write_text(re.sub(rf', "{name}"|"{name}", ', "", text))


def under_load(
    home: Home,
    act: Callable[[], object],
    *,
    models: tuple[str, ...] = ("chat-7b",),
    clients: int = 6,
) -> Load:
    """Requests before, while and after `act`; all are seen to be answered with 200."""

    async def run() -> list[Load]:
        loads = [Load(home.gateway_port, chat_body(model), clients=clients) for model in models]
        for load in loads:
            load.start()
        await asyncio.sleep(0.2)
        try:
            await asyncio.to_thread(act)
            for load in loads:
                answered = len(load.records)
                while len(load.records) < answered + 50:
                    await asyncio.sleep(0.01)
        finally:
            for load in loads:
                await load.finish()
        return loads

    loads = asyncio.run(run())
    for load in loads:
        assert [record.error for record in load.records if record.failed] == [], home.daemon_log()
    return loads[0]


def test_nothing_changed_touches_nothing(home: Home) -> None:
    dual(home)
    home.start()
    before, daemon = pids(home), home.daemon_pid()
    assert reload(home) == "2 services unchanged"
    assert (pids(home), home.daemon_pid()) == (before, daemon)


def test_a_changed_environment_restarts_that_service_alone(home: Home) -> None:
    dual(home)
    home.start()
    before = pids(home)
    edit(home, "[service.code]\n", '[service.code]\nenv = { SPEED = "1" }\n')

    under_load(home, lambda: said.append(reload(home)), models=("chat-7b", "code-7b"), clients=3)

    after = pids(home)
    assert said.pop() == "1 service unchanged; restarted code"
    assert after["code"] != before["code"]
    assert {**after, "code": 0} == {**before, "code": 0}
    assert home.service("code")["restarts"] == 0, "nobody died"


said: list[str] = []


def test_what_no_process_is_started_with_restarts_nothing(home: Home) -> None:
    """Given changed time-outs, readiness, restart policy and gateway drain."""
    dual(home)
    home.start()
    before = pids(home)
    edit(home, '"2s"', '"3s"')
    edit(home, 'period = "200ms"', 'period = "300ms"')
    edit(home, "[service.chat]\n", '[service.chat]\nstall_timeout = "9s"\n')
    edit(home, "[gateway]\n", '[gateway]\ndrain_timeout = "9s"\n')
    assert under_load(home, lambda: reload(home)).records
    assert pids(home) == before


def test_a_removed_service_finishes_its_requests_and_gets_no_new_ones(home: Home) -> None:
    """Given requests that last, those of the service that goes are answered by it."""
    dual(home)
    edit(home, '"--name", "code"', '"--name", "code", "--delay-ms", "700"')
    home.start()
    before = pids(home)
    body = json.dumps({"model": "code-7b", "messages": []}).encode()
    answers: list[str] = []

    def ask_slowly() -> None:
        request = urllib.request.Request(
            f"http://127.0.0.1:{home.gateway_port}/v1/chat/completions",
            data=body,
            headers={"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=20) as response:
            answers.append(response.headers["x-llmsup-service"])

    def act() -> None:
        threads = [threading.Thread(target=ask_slowly) for _ in range(8)]
        for each in threads:
            each.start()
        time.sleep(0.1)
        without(home, "code")
        said.append(reload(home))
        for each in threads:
            each.join()

    edit(home, ROUTE, ROUTE.replace(', "code"', ""))
    reload(home)
    under_load(home, act)

    assert said.pop() == "1 service unchanged; ended code; routes changed: code-7b"
    assert not is_alive(before["code"])
    assert answers == ["code"] * 8
    assert pids(home) == {name: pid for name, pid in before.items() if name != "code"}
    assert ask(home, "code-7b")[1]["x-llmsup-service"] == "chat"


def test_clients_that_stay_connected_do_not_keep_a_removed_service(home: Home) -> None:
    """Given a client of the port itself that never leaves, the drain time-out is the bound."""
    (port,) = free_ports(1)
    command = stub("upstream.py", "--port", port, "--name", "aside")
    dual(home)
    home.write(home.profile.read_text() + home.command("aside", command, port=port))
    home.start()
    aside = home.service("aside")["pid"]
    assert home.cli("stop", "code").returncode == 0
    with socket.create_connection(("127.0.0.1", port)):
        without(home, "aside")
        Client(home.paths).reload()
        wait_until(lambda: "ending what is left of" in home.daemon_log(), "the drain")
        time.sleep(0.5)
        assert is_alive(aside)
    wait_until(lambda: not is_alive(aside), "the end of the removed service")


def test_a_service_may_take_the_port_of_a_removed_one(home: Home) -> None:
    """Given a renamed service, its route is answered by the other until it is there."""
    chat, _ = dual(home)
    home.start()
    before = pids(home)

    def act() -> None:
        edit(home, "[service.chat]", "[service.talk]")
        edit(home, 'services = ["chat", "code"]', 'services = ["talk", "code"]')
        edit(home, 'services = ["code", "chat"]', 'services = ["code", "talk"]')
        said.append(reload(home))

    under_load(home, act)

    assert said.pop() == (
        "1 service unchanged; started talk; ended chat; routes changed: chat-7b, code-7b"
    )
    talk = home.service("talk")
    assert (talk["port"], talk["restarts"], talk["state"]) == (chat, 0, "ready")
    assert not is_alive(before["chat"])
    assert ask(home)[1]["x-llmsup-service"] == "talk"


def test_a_changed_port_is_moved_to_without_a_failed_request(home: Home) -> None:
    chat, _ = dual(home)
    home.start()
    (other,) = free_ports(1)
    edit(home, str(chat), str(other))

    load = under_load(home, lambda: said.append(reload(home)))

    assert said.pop() == "1 service unchanged; restarted chat"
    assert home.service("chat")["port"] == other
    assert load.records[-1].service == "chat"


def test_a_service_that_others_depended_on_goes(home: Home) -> None:
    dual(home)
    home.write(
        home.profile.read_text() + home.command("rag", ["sleep", "1000"], depends_on=["code"])
    )
    home.start()
    before = pids(home)
    without(home, "code")
    result = home.cli("reload")
    assert result.returncode == 2
    assert "service.rag.depends_on" in result.stderr
    assert pids(home) == before, "a profile with problems changes nothing"

    edit(home, 'depends_on = ["code"]', "depends_on = []")
    assert reload(home).startswith("2 services unchanged; ended code")
    assert pids(home)["rag"] == before["rag"]


# --- routes


def test_routes_change_without_a_failed_request(home: Home) -> None:
    """Given a route that is renamed, one whose order turns, and one that is new."""
    dual(home)
    home.start()
    before = pids(home)

    def act() -> None:
        edit(home, ROUTE, '[route."talk"]\nservices = ["code", "chat"]\naliases = ["chat-7b"]\n')
        said.append(reload(home))
        edit(home, 'services = ["code", "chat"]\naliases', 'services = ["chat", "code"]\naliases')
        said.append(reload(home))
        edit(home, '"talk"]\n', '"chat-7b"]\n')
        edit(home, 'aliases = ["chat-7b"]', 'aliases = ["talk"]')
        said.append(reload(home))

    load = under_load(home, act)

    assert said == [
        "2 services unchanged; routes changed: chat-7b, talk",
        "2 services unchanged; routes changed: talk",
        "2 services unchanged; routes changed: talk, chat-7b",
    ]
    said.clear()
    assert {record.service for record in load.records} == {"chat", "code"}
    assert pids(home) == before
    assert ask(home, "talk")[1]["x-llmsup-service"] == "chat"
    with pytest.raises(urllib.error.HTTPError, match="404"):
        ask(home, "gpt-4o-mini")


def test_the_lists_of_removed_routes_are_removed(home: Home) -> None:
    dual(home)
    home.start()
    edit(home, '[route."code-7b"]', '[route."codes"]')
    reload(home)
    lists = home.paths.gateway / "upstreams"
    wait_until(
        lambda: {path.stem for path in lists.iterdir()} == {"chat-7b", "codes"}, "no old list"
    )
    clusters = json.loads((home.paths.gateway / "xds/clusters.json").read_bytes())["resources"]
    assert {each["name"] for each in clusters} == {"chat-7b", "codes", ".activator"}


# --- the gateway


def status_with(home: Home, key: str) -> int:
    request = urllib.request.Request(f"http://127.0.0.1:{home.gateway_port}/v1/models")
    if key:
        request.add_header("authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_keys_are_added_changed_and_removed_without_a_restart(home: Home) -> None:
    dual(home)
    keys = home.root / "keys.txt"
    keys.touch(mode=0o600)
    home.start()
    before = pids(home)

    keys.write_text("sk-one-0123456789\n")
    edit(home, "[gateway]\n", f'[gateway]\napi_keys_file = "{keys}"\n')
    reload(home)
    wait_until(lambda: status_with(home, "") == 401, "a key is asked for")
    assert status_with(home, "sk-one-0123456789") == 200

    keys.write_text("sk-two-0123456789\n")
    reload(home)
    wait_until(lambda: status_with(home, "sk-one-0123456789") == 401, "the old key is refused")
    assert status_with(home, "sk-two-0123456789") == 200

    edit(home, f'api_keys_file = "{keys}"\n', "")
    reload(home)
    wait_until(lambda: status_with(home, "") == 200, "no key is asked for")
    assert pids(home) == before
    assert "sk-" not in home.daemon_log()


def test_keys_come_and_go_without_a_failed_request(home: Home) -> None:
    """Given clients that send a good key all the time, on connections that stay open."""
    dual(home)
    keys = home.root / "keys.txt"
    keys.touch(mode=0o600)
    keys.write_text("sk-one-0123456789\n")
    home.start()
    stop = threading.Event()
    statuses: list[int] = []

    def ask_on() -> None:
        import http.client  # noqa: PLC0415

        connection = http.client.HTTPConnection("127.0.0.1", home.gateway_port, timeout=20)
        headers = {"authorization": "Bearer sk-one-0123456789", "content-type": "application/json"}
        while not stop.is_set():
            connection.request("POST", "/v1/chat/completions", chat_body("chat-7b"), headers)
            answer = connection.getresponse()
            answer.read()
            statuses.append(answer.status)
        connection.close()

    threads = [threading.Thread(target=ask_on) for _ in range(4)]
    for each in threads:
        each.start()
    try:
        for _ in range(2):
            edit(home, "[gateway]\n", f'[gateway]\napi_keys_file = "{keys}"\n')
            reload(home)
            wait_until(lambda: status_with(home, "") == 401, "a key is asked for")
            edit(home, f'api_keys_file = "{keys}"\n', "")
            reload(home)
            wait_until(lambda: status_with(home, "") == 200, "no key is asked for")
    finally:
        stop.set()
        for each in threads:
            each.join()
    assert len(statuses) > 100
    assert set(statuses) == {200}


def test_the_gateway_moves_to_another_address_without_a_restart(home: Home) -> None:
    """Given requests in flight, they are answered at the old address, the next at the new one."""
    dual(home)
    edit(home, '"--name", "chat"', '"--name", "chat", "--delay-ms", "1500"')
    home.start()
    before, old = pids(home), home.gateway_port
    (new,) = free_ports(1)
    services: list[str] = []
    in_flight = threading.Thread(target=lambda: services.append(ask(home)[1]["x-llmsup-service"]))
    in_flight.start()
    time.sleep(0.3)
    edit(home, f"127.0.0.1:{old}", f"127.0.0.1:{new}")
    reload(home)
    in_flight.join()
    assert services == ["chat"]
    assert pids(home) == before
    home.gateway_port = new
    assert ask(home, "code-7b")[1]["x-llmsup-service"] == "code"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", old), timeout=5)


# --- what is refused


def test_a_bad_profile_is_refused_with_all_its_problems(home: Home) -> None:
    dual(home)
    home.start()
    before, daemon = pids(home), home.status()["daemon"]
    edit(home, "[service.chat]\n", "[service.chat]\nprot = 1\npinned = 3\n")
    result = home.cli("reload")
    assert result.returncode == 2
    assert "service.chat.prot" in result.stderr
    assert "service.chat.pinned" in result.stderr
    assert "Traceback" not in result.stderr
    after = home.status()["daemon"]
    assert pids(home) == before
    assert after["profile_digest"] == daemon["profile_digest"]
    assert after["uptime_s"] > daemon["uptime_s"], "the same daemon"

    os.kill(after["pid"], signal.SIGHUP)
    wait_until(lambda: home.daemon_log().count("not reloaded: ") == 2, "both problems in the log")
    assert pids(home) == before


def test_a_port_that_a_stranger_holds_is_refused(home: Home) -> None:
    chat, _ = dual(home)
    home.start()
    before = pids(home)
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        edit(home, str(chat), str(stranger.getsockname()[1]))
        result = home.cli("reload")
    assert result.returncode == 2
    assert f"is taken by pid {os.getpid()}" in result.stderr
    assert pids(home) == before


def test_a_reload_without_a_daemon_says_so(home: Home) -> None:
    result = home.cli("reload")
    assert (result.returncode, result.stderr) == (
        3,
        "error: llmsup is not running\nhint: llmsup start\n",
    )


def test_a_service_that_fails_after_the_reload_is_told(home: Home) -> None:
    dual(home)
    home.start()
    home.write(home.profile.read_text() + home.command("broken", ["/nowhere/program"]))
    result = home.cli("reload")
    assert result.returncode == 1
    assert "error: broken failed: cannot start /nowhere/program" in result.stderr
    assert home.service("chat")["state"] == "ready"


# --- SIGHUP


def hang_up(home: Home) -> None:
    pid = home.daemon_pid()
    assert pid is not None
    os.kill(pid, signal.SIGHUP)


def test_a_hang_up_reloads(home: Home) -> None:
    dual(home)
    home.start()
    daemon = home.daemon_pid()
    edit(home, "[service.code]\n", '[service.code]\nenv = { SPEED = "1" }\n')
    hang_up(home)
    wait_until(lambda: answer(home)["code"][0] == 2, "a new code")
    home.wait_state("code", "ready")
    assert home.daemon_pid() == daemon
    assert answer(home)["chat"][0] == 1


def answer(home: Home) -> dict[str, tuple[int, str]]:
    """Generation and state of each service."""
    services = home.status()["services"]
    return {each["service"]: (each["generation"], each["state"]) for each in services}


def test_many_hang_ups_are_harmless(home: Home) -> None:
    """Given SIGHUP at every moment of a reload, and the last change made just before the last."""
    dual(home)
    home.start()
    before, daemon = pids(home), home.daemon_pid()

    def act() -> None:
        for number in range(60):
            if number == 59:
                edit(home, 'aliases = ["gpt-4o-mini"]', 'aliases = ["gpt-4o-mini", "late"]')
            hang_up(home)
            time.sleep(0.05)
        wait_until(lambda: has_route(home, "late"), "the last change")

    under_load(home, act)
    assert home.daemon_pid() == daemon
    assert pids(home) == before


def has_route(home: Home, name: str) -> bool:
    return any(name in route["aliases"] for route in home.status()["routes"])


def test_clients_of_the_daemon_wait_while_it_is_replaced(home: Home) -> None:
    """Given a client that asks all the time, it is never refused: the socket stays."""
    dual(home)
    home.start()
    daemons = set()
    for number in range(400):
        if number % 100 == 20:
            hang_up(home)
        status = home.status()
        daemons.add(round(time.monotonic() - status["daemon"]["uptime_s"], 1))
        time.sleep(0.005)
    assert len(daemons) > 2, "it was replaced meanwhile"


def test_a_hang_up_during_the_start_is_harmless(home: Home) -> None:
    """Given SIGHUP from the first moment of the process on, before it listens to signals."""
    dual(home)
    edit(home, '"--name", "chat"', '"--name", "chat", "--load-s", "1"')
    with subprocess.Popen(
        [LLMSUP, "start", str(home.profile), "--foreground"],
        env=home.environ, cwd=home.root, stderr=subprocess.DEVNULL,
    ) as daemon:  # fmt: skip
        try:
            wait_until(lambda: home.daemon_pid() == daemon.pid, "the lock")
            daemon.send_signal(signal.SIGHUP)
            wait_until(home.paths.control_socket.exists, "the control socket")
            while answer(home)["chat"][1] != "ready":
                daemon.send_signal(signal.SIGHUP)
                time.sleep(0.1)
                assert daemon.poll() is None
            home.wait_state("code", "ready")
            assert answer(home)["chat"][0] == 1, "it was not started twice"
        finally:
            daemon.kill()


def test_a_hang_up_during_the_stop_does_not_stop_it(home: Home) -> None:
    dual(home)
    edit(home, '"--name", "chat"', '"--name", "chat", "--delay-ms", "1500"')
    home.start()
    daemon = home.daemon_pid()
    assert daemon is not None
    in_flight = threading.Thread(target=ask, args=(home,))
    in_flight.start()
    time.sleep(0.3)
    os.kill(daemon, signal.SIGTERM)
    for _ in range(5):
        os.kill(daemon, signal.SIGHUP)
    in_flight.join()
    wait_until(lambda: not is_alive(daemon), "the daemon's end")
    assert home.processes() == []
    assert "not reloaded: the stack is stopping" in home.daemon_log()


def test_a_stop_right_after_a_hang_up_stops(home: Home) -> None:
    dual(home)
    home.start()
    daemon = home.daemon_pid()
    assert daemon is not None
    for pause_s in (0.0, 0.05, 0.3):
        os.kill(daemon, signal.SIGHUP)
        time.sleep(pause_s)
    os.kill(daemon, signal.SIGTERM)
    wait_until(lambda: not is_alive(daemon), "the daemon's end")
    assert home.processes() == []


def test_the_log_of_a_daemon_in_the_foreground_is_there(home: Home) -> None:
    dual(home)
    with foreground(home):
        result = home.cli("logs", "daemon")
        assert "INFO up pid=" in result.stdout
        hang_up(home)
        wait_until(lambda: home.daemon_log().count("INFO up pid=") == 2, "the new daemon's words")
    assert home.paths.daemon_log.stat().st_mode & 0o777 == 0o600
