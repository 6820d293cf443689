"""`llmsup start` with a bad profile: exit 2, one line a problem, and what was up stays up."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.home import Home, free_ports, stub

SERVICE = '[service.{name}]\nkind = "command"\ncommand = ["sleep", "1000"]\n'


def service(name: str, *lines: str) -> str:
    return SERVICE.format(name=name) + "".join(f"{line}\n" for line in lines)


@pytest.fixture(scope="module")
def stack() -> Iterator[Home]:
    """A stack that is up throughout: none of the bad profiles may touch it."""
    place = Home()
    try:
        (port,) = free_ports(1)
        command = stub("upstream.py", "--port", port, "--name", "chat")
        place.write(place.command("chat", command, port=port))
        place.start()
        yield place
        assert place.cli("stop").returncode == 0
    finally:
        place.close()


def refuse(stack: Home, text: str | bytes, *said: str) -> list[str]:
    """Start a profile of this text; returns the problems it was refused with."""
    bad = stack.root / "bad.toml"
    bad.write_bytes(text.encode() if isinstance(text, str) else text)
    return refuse_file(stack, bad, *said)


def refuse_file(stack: Home, path: Path, *said: str) -> list[str]:
    before = stack.status()["services"]
    result = stack.cli("start", str(path))
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    for words in said:
        assert words in result.stderr
    problems = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert problems
    after = stack.status()["services"]
    assert [each["pid"] for each in after] == [each["pid"] for each in before]
    return problems


def test_unknown_keys_and_wrong_types_are_listed_together(stack: Home) -> None:
    text = service("a", 'restrat = "x"', "port = 'eight'", 'grace_period = "10 parsecs"')
    problems = refuse(stack, text, "restrat", "restart", "service.a.port", "parsecs")
    assert len(problems) == 3
    assert all("bad.toml" in problem for problem in problems)


def test_a_missing_model_says_where_it_was_looked_for(stack: Home) -> None:
    text = '[models]\ndirs = ["/models"]\n[service.a]\nkind = "llama-server"\nmodel = "x.gguf"\n'
    refuse(stack, text, "service.a.model", "x.gguf", "/models")


def test_two_services_on_one_port(stack: Home) -> None:
    refuse(stack, service("a", "port = 8771") + service("b", "port = 8771"), "8771", "service.b")


def test_a_dependency_cycle_is_refused_with_its_path(stack: Home) -> None:
    text = service("a", 'depends_on = ["b"]') + service("b", 'depends_on = ["a"]')
    refuse(stack, text, "a -> b -> a")


def test_a_file_that_cannot_be_read(stack: Home) -> None:
    refuse_file(stack, stack.root / "missing.toml", "missing.toml")
    refuse_file(stack, stack.root / "logs", "logs")
    fifo = stack.root / "fifo.toml"
    os.mkfifo(fifo)
    refuse_file(stack, fifo, "fifo.toml")


def test_ten_megabytes_of_noise(stack: Home) -> None:
    refuse(stack, os.urandom(10 * 1024 * 1024))
    refuse(stack, os.urandom(100_000))
    refuse(stack, "[" * 500_000)


def test_an_open_gateway_without_keys_must_be_said_twice(stack: Home) -> None:
    text = '[gateway]\nlisten = "0.0.0.0:8799"\n' + service("a")
    refuse(stack, text, "gateway.listen", "api_keys_file", "listen_without_api_keys")


def test_a_taken_port_names_its_holder(home: Home) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        home.write(service("a", f"port = {port}"))
        result = home.cli("start", str(home.profile))
    assert result.returncode == 2
    assert f"{port} is taken by pid {os.getpid()}" in result.stderr
    assert "service.a.port" in result.stderr
    assert home.daemon_pid() is None
