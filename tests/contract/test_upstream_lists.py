"""Lists published by renaming a file, what Envoy makes of them, and how a lost one is mended."""

import asyncio
import json
import signal
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import httpx
import pytest

from llmsup import gateway
from llmsup.core.routing import Endpoint, Upstream
from llmsup.core.service import State
from llmsup.services.envoy_clusters import upstreams
from llmsup.services.envoy_routes import Health, route_table
from tests.contract.conftest import READY, ROUTES, Stack, wait_until

SLOW = {"x-stub": json.dumps({"delay_ms": 600})}


def ask_slowly(stack: Stack, pool: ThreadPoolExecutor) -> Future[httpx.Response]:
    """A request that `chat` is answering."""
    future = pool.submit(stack.ask, headers=SLOW)
    wait_until(lambda: stack.in_flight("chat") == 1, "the request is in flight")
    return future


def test_published_list_is_confirmed_within_milliseconds(stack: Stack) -> None:
    told: list[tuple[str, float]] = []

    async def publish_and_confirm() -> None:
        keeper = asyncio.create_task(
            stack.gateway.keep_confirmed(lambda route, elapsed_s: told.append((route, elapsed_s)))
        )
        changed = stack.gateway.publish(stack.members({"code": State.READY}))
        assert set(changed) == {route.name for route in ROUTES if "chat" in route.services}
        async with asyncio.timeout(5):
            while len(told) < len(changed):
                await asyncio.sleep(0.001)
        keeper.cancel()
        with suppress(asyncio.CancelledError):
            await keeper

    stack.loop.run_until_complete(publish_and_confirm())

    assert stack.gateway.confirmed["chat-7b"] == ("code",)
    assert min(elapsed_s for _, elapsed_s in told) < 0.25
    assert stack.ask().headers["x-llmsup-fallback"] == "true"


def test_garbage_in_a_list_is_ignored(stack: Stack) -> None:
    path = stack.layout.upstreams("chat-7b")
    for garbage in (b"garbage", b"", b'{"resources": [{"', b'{"resources": [{"unknown": 1}]}'):
        rejected = rejections(stack)
        spoil(stack, path, garbage)
        wait_until(partial(is_more, stack, rejected), f"{garbage!r} is rejected")

        assert stack.ask().headers["x-llmsup-service"] == "chat"

    stack.publish({"code": State.READY})

    assert stack.ask().headers["x-llmsup-service"] == "code"


def is_more(stack: Stack, before: int) -> bool:
    return rejections(stack) > before


def rejections(stack: Stack) -> int:
    text = stack.admin("/stats?filter=cluster.chat-7b.update_(rejected|failure)")
    return sum(int(line.rpartition(" ")[2]) for line in text.splitlines())


def test_list_of_somebody_else_is_mended(stack: Stack) -> None:
    """A lost notification looks the same: Envoy has another list than the one published."""
    chat = Upstream("chat", Endpoint("127.0.0.1", stack.stubs["code"].port), is_fallback=False)
    foreign = stack.layout.temporary / "foreign"
    foreign.write_text(json.dumps(upstreams("chat-7b", (chat,), stack.layout.activator_socket)))
    foreign.rename(stack.layout.upstreams("chat-7b"))
    wait_until(lambda: stack.ask().json()["stub"]["name"] == "code", "Envoy took it")

    stack.gateway.wake()
    stack.settle()

    assert stack.ask().json()["stub"]["name"] == "chat"


def test_draining_upstream_gets_nothing_new_and_finishes_the_old(stack: Stack) -> None:
    with ThreadPoolExecutor(1) as pool:
        old = ask_slowly(stack, pool)

        stack.publish({"chat": State.DRAINING, "code": State.READY})

        for _ in range(10):
            assert stack.ask().headers["x-llmsup-service"] == "code"
        assert stack.in_flight("chat") == 1
        assert old.result().headers["x-llmsup-service"] == "chat"
        assert stack.in_flight("chat") == 0


def test_only_upstream_draining_finishes_the_old_and_new_ones_get_503(stack: Stack) -> None:
    with ThreadPoolExecutor(1) as pool:
        old = ask_slowly(stack, pool)

        stack.publish({"chat": State.DRAINING})

        response = stack.ask()
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "model_unavailable"
        assert stack.in_flight("chat") == 1
        assert old.result().status_code == 200
        assert stack.in_flight("chat") == 0


def test_second_upstream_draining_leaves_the_first_alone(stack: Stack) -> None:
    stack.publish({"chat": State.READY, "code": State.DRAINING})

    assert stack.ask().headers["x-llmsup-service"] == "chat"
    stack.publish({"code": State.DRAINING})
    assert stack.ask().status_code == 503


def test_drained_upstream_can_come_back(stack: Stack) -> None:
    stack.publish({"chat": State.DRAINING, "code": State.READY})
    stack.publish(READY)

    assert stack.ask().headers["x-llmsup-service"] == "chat"


def test_requests_stay_counted_when_the_upstream_changes_its_priority(stack: Stack) -> None:
    stack.publish({"chat": State.DRAINING, "code": State.READY})
    with ThreadPoolExecutor(1) as pool:
        old = pool.submit(stack.ask, headers=SLOW)
        wait_until(lambda: stack.in_flight("code") == 1, "the request is in flight")

        stack.publish({"code": State.DRAINING})

        assert stack.in_flight("code") == 1
        assert old.result().headers["x-llmsup-service"] == "code"


def test_request_in_flight_survives_the_removal_of_its_upstream(stack: Stack) -> None:
    with ThreadPoolExecutor(1) as pool:
        old = ask_slowly(stack, pool)
        stack.publish({"code": State.READY})

        assert old.result().headers["x-llmsup-service"] == "chat"


def test_envoy_started_late_has_the_lists_already(private: Stack) -> None:
    private.gateway.prepare()
    private.gateway.publish(private.members(READY))
    private.start_envoy()

    assert private.ask().headers["x-llmsup-service"] == "chat"


def test_envoy_killed_and_started_again_serves_the_same_lists(private: Stack) -> None:
    private.gateway.prepare()
    private.start_envoy()
    private.publish({"code": State.READY})
    private.envoy.kill()
    assert private.clusters() is None
    assert private.in_flight("code") == 0

    private.start_envoy()

    assert private.ask().headers["x-llmsup-service"] == "code"
    private.gateway.wake()
    private.settle()
    assert private.gateway.confirmed["chat-7b"] == ("code",)


def test_missing_list_at_start_is_mended(private: Stack) -> None:
    """Envoy rejects a cluster whose list is missing, and the list alone does not heal it."""
    private.gateway.prepare()
    private.gateway.publish(private.members(READY))
    private.layout.upstreams("chat-7b").unlink()
    private.start_envoy()
    assert "chat-7b" not in (private.clusters() or {})

    private.settle()

    assert private.ask().headers["x-llmsup-service"] == "chat"


def test_garbage_list_at_start_is_mended(private: Stack) -> None:
    private.gateway.prepare()
    private.gateway.publish(private.members(READY))
    private.layout.upstreams("chat-7b").write_text("garbage")
    private.start_envoy()
    assert private.ask().status_code == 503

    private.settle()

    assert private.ask().headers["x-llmsup-service"] == "chat"


def keep_confirmed(stack: Stack, condition: Callable[[], bool], what: str) -> None:
    """Keep the lists confirmed until the condition holds."""

    async def keep() -> None:
        keeper = asyncio.create_task(stack.gateway.keep_confirmed(lambda _route, _s: None))
        try:
            await asyncio.to_thread(wait_until, condition, what, 15)
        finally:
            keeper.cancel()
            with suppress(asyncio.CancelledError):
                await keeper

    stack.loop.run_until_complete(keep())


def spoil(stack: Stack, path: Path, content: bytes) -> None:
    spoiled = stack.layout.temporary / "spoiled"
    spoiled.write_bytes(content)
    spoiled.rename(path)


@pytest.mark.parametrize("table", ["listeners", "holding_clusters", "routes"])
def test_garbage_table_at_start_is_mended(
    private: Stack, table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Envoy would serve nothing for good, and look alive."""
    monkeypatch.setattr(gateway, "LOOK_AGAIN_S", 0.1)
    private.gateway.prepare()
    private.gateway.publish(private.members(READY))
    spoil(private, getattr(private.layout, table), b"garbage")
    private.spawn_envoy()
    wait_until(lambda: private.clusters() is not None, "Envoy's admin interface")

    def answers() -> bool:
        try:
            return "x-llmsup-service" in private.ask().headers
        except httpx.TransportError:
            return False

    assert not answers()
    keep_confirmed(private, answers, f"an answer after the {table} were mended")


def test_empty_table_of_somebody_else_is_mended_when_envoy_is_started_again(
    private: Stack,
) -> None:
    private.gateway.prepare()
    private.gateway.publish(private.members(READY))
    table = route_table((), (), Health())
    spoil(private, private.layout.routes, json.dumps(table).encode())
    private.start_envoy()
    assert private.ask().status_code == 404

    private.gateway.wake()
    private.settle()

    wait_until(lambda: private.ask().status_code == 200, "the route table is mended")
    assert private.ask().headers["x-llmsup-service"] == "chat"


def test_stopped_envoy_is_not_taken_for_one_without_requests(private: Stack) -> None:
    """It may be answering still, and a drain that took its silence for 0 would cut the answers."""
    private.gateway.prepare()
    private.start_envoy()
    private.publish(READY)
    private.envoy.signal(signal.SIGSTOP)

    assert private.in_flight("chat") == 1

    private.envoy.kill()
    assert private.in_flight("chat") == 0
    assert private.loop.run_until_complete(private.gateway.requests_active()) == 0


@pytest.mark.parametrize("members", [{}, {"chat": State.READY}, READY])
def test_list_always_ends_as_desired(stack: Stack, members: dict[str, State]) -> None:
    stack.publish(members)

    assert stack.gateway.confirmed["chat-7b"] == tuple(members)
    seen = (stack.clusters() or {})["chat-7b"]
    endpoints = [Endpoint("127.0.0.1", stack.stubs[name].port) for name in members]
    assert [it.host.endpoint for it in seen] == [*endpoints, stack.layout.activator_socket]
