"""Lists on their way to Envoy: whatever is lost or fails, Envoy ends up with what is desired."""

import asyncio
import json
import selectors
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llmsup.core.routing import Endpoint, Member, Route, desired
from llmsup.core.service import State
from llmsup.gateway import Gateway
from llmsup.services.envoy import Layout, cluster_name
from llmsup.services.envoy_admin import CLUSTERS_PATH, parse_clusters
from llmsup.services.envoy_clusters import upstreams as upstreams_file

DIRECTORY = Path("/gateway")
LAYOUT = Layout(DIRECTORY)
ROUTES = (
    Route("chat-7b", ("chat", "code")),
    Route("code-7b", ("code",)),
    Route("odd/name", ("embedding", "chat", "code")),
)
PORTS = {"chat": 8001, "code": 8004, "embedding": 8003}
ROUTABLE = {State.READY, State.UNREADY, State.DRAINING}


def members(states: dict[str, State]) -> dict[str, Member]:
    return {
        name: Member(Endpoint("127.0.0.1", PORTS[name]), state) for name, state in states.items()
    }


class FakeEnvoy:
    """A disk, and an Envoy that reads a list when it is told that the file was renamed."""

    def __init__(self) -> None:
        self.disk: dict[Path, Any] = {}
        self.lists: dict[str, list[dict[str, Any]]] = {}
        self.is_up = True
        self.is_disk_full = False
        self.is_deaf = False
        self.is_silent = False
        self.asks = 0
        self.foreign: dict[Path, bytes] = {}

    def spoil(self, path: Path) -> None:
        """Somebody else writes a file, which Envoy refuses."""
        self.foreign[path] = b"garbage"

    def fingerprint(self, path: Path) -> bytes | None:
        return self.foreign.get(path)

    def write(self, path: Path, temporary: Path, content: bytes) -> None:
        assert temporary.parent != path.parent
        if self.is_disk_full:
            raise OSError(28, "No space left on device")
        self.disk[path] = json.loads(content)
        self.foreign.pop(path, None)
        if self.is_up and not self.is_deaf:
            self.read(path)

    def read(self, path: Path) -> None:
        for resource in self.disk[path].get("resources", ()):  # a bootstrap has none
            if "cluster_name" in resource:
                self.lists[resource["cluster_name"]] = resource["endpoints"]

    def start(self) -> None:
        self.is_up = True
        self.lists.clear()
        for route in ROUTES:
            self.read(LAYOUT.upstreams(route.name))

    async def ask(self, method: str, path: str) -> bytes:
        self.asks += 1
        assert method == "GET"
        assert path == CLUSTERS_PATH or self.is_silent
        if not self.is_up:
            raise ConnectionRefusedError
        if self.is_silent:
            raise TimeoutError
        return self.clusters()

    def clusters(self) -> bytes:
        statuses = [
            {
                "name": name,
                "host_statuses": [
                    {
                        "address": priority["lb_endpoints"][0]["endpoint"]["address"],
                        "priority": priority["priority"],
                        "health_status": {
                            "eds_health_status": priority["lb_endpoints"][0]["health_status"]
                        },
                        "stats": [{"name": "rq_active", "value": "1"}, {"name": "rq_total"}],
                    }
                    for priority in reversed(priorities)
                ],
            }
            for name, priorities in self.lists.items()
        ]
        return json.dumps({"cluster_statuses": statuses}).encode()

    def services(self, route: str) -> list[str]:
        """The services in the file of a route; the activator stands behind them."""
        (resource,) = self.disk[LAYOUT.upstreams(route)]["resources"]
        *upstreams, activator = (
            priority["lb_endpoints"][0]["metadata"]["filter_metadata"]["llmsup"]
            for priority in resource["endpoints"]
        )
        assert activator == {"route": cluster_name(route)}
        return [upstream["service"] for upstream in upstreams]

    def health(self) -> int:
        """The status of /health in the route table; 200 in the one it starts with."""
        if LAYOUT.routes not in self.disk:
            return 200
        (table,) = self.disk[LAYOUT.routes]["resources"]
        routes = table["virtual_hosts"][0]["routes"]
        (health,) = [route for route in routes if route["match"].get("path") == "/health"]
        return int(health["direct_response"]["status"])


def gateway(envoy: FakeEnvoy, clock: Any) -> Gateway:
    """A gateway over a fake Envoy, its files written."""
    made = Gateway(
        DIRECTORY,
        ROUTES,
        ("127.0.0.1", 8000),
        write=envoy.write,
        fingerprint=envoy.fingerprint,
        ask=envoy.ask,
        clock=clock,
    )
    for route in ROUTES:
        envoy.disk[LAYOUT.upstreams(route.name)] = upstreams_file(
            route.name, (), LAYOUT.activator_socket
        )
        made.published[route.name] = made.desired[route.name] = ()
    envoy.start()
    return made


class Publication(RuleBasedStateMachine):
    """Any order of state changes, failed writes, lost notifications and deaths of Envoy."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.envoy = FakeEnvoy()
        self.gateway = gateway(self.envoy, lambda: self.now)
        self.states: dict[str, State] = {}
        self.confirmed: list[str] = []

    @rule(service=st.sampled_from(sorted(PORTS)), state=st.sampled_from(State))
    def change(self, service: str, state: State) -> None:
        self.states[service] = state
        self.publish()

    def publish(self) -> None:
        not_ready = tuple(name for name, it in self.states.items() if it is not State.READY)
        before = dict(self.gateway.published)
        written = self.gateway.publish(members(self.states), not_ready)
        after = self.gateway.published
        assert set(written) == {name for name in after if after[name] != before[name]}

    @rule(is_full=st.booleans())
    def fill_disk(self, is_full: bool) -> None:
        self.envoy.is_disk_full = is_full

    @rule(is_deaf=st.booleans())
    def lose_notifications(self, is_deaf: bool) -> None:
        self.envoy.is_deaf = is_deaf

    @precondition(lambda self: self.envoy.is_up)
    @rule()
    def kill_envoy(self) -> None:
        self.envoy.is_up = False

    @precondition(lambda self: not self.envoy.is_up)
    @rule()
    def start_envoy(self) -> None:
        self.envoy.start()
        self.gateway.wake()

    @rule(elapsed_s=st.floats(0, 2))
    def tick(self, elapsed_s: float) -> None:
        self.now += elapsed_s
        self.settle()

    def settle(self) -> bool:
        clusters = parse_clusters(self.envoy.clusters()) if self.envoy.is_up else None
        return self.gateway.settle(clusters, lambda route, _elapsed_s: self.confirmed.append(route))

    @invariant()
    def files_hold_what_is_published(self) -> None:
        for route, upstreams in self.gateway.published.items():
            assert self.envoy.services(route) == [it.service for it in upstreams]

    @invariant()
    def only_routable_services_are_desired_and_all_of_them(self) -> None:
        for route in ROUTES:
            ready = [name for name in route.services if self.states.get(name) in ROUTABLE]
            assert [it.service for it in self.gateway.desired[route.name]] == ready

    @invariant()
    def files_are_current_unless_a_write_failed(self) -> None:
        if not self.gateway.last_error:
            assert self.gateway.published == self.gateway.desired
        else:
            assert "No space left" in self.gateway.last_error

    @invariant()
    def last_word_of_envoy_is_not_invented(self) -> None:
        for route in self.confirmed:
            assert route in self.gateway.desired

    def teardown(self) -> None:
        """Once everything works again, a few steps are enough."""
        self.envoy.is_disk_full = self.envoy.is_deaf = False
        if not self.envoy.is_up:
            self.start_envoy()
        for _ in range(30):
            if not self.settle():
                break
            self.now += 1.0
        else:
            raise AssertionError("does not settle")
        wanted = desired(ROUTES, members(self.states))
        assert self.gateway.published == wanted
        for route in ROUTES:
            seen = parse_clusters(self.envoy.clusters())[cluster_name(route.name)]
            endpoints = [*(it.endpoint for it in wanted[route.name]), LAYOUT.activator_socket]
            assert [it.host.endpoint for it in seen] == endpoints
            services = tuple(it.service for it in wanted[route.name])
            assert self.gateway.confirmed[route.name] == services
        all_ready = all(it is State.READY for it in self.states.values())
        if self.states:
            assert self.envoy.health() == (200 if all_ready else 503)


TestPublication = Publication.TestCase
TestPublication.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


# --- the loop, in virtual time --------------------------------------------------------------------


class JumpingSelector(selectors.DefaultSelector):
    """Waits in no time, and counts how long that would have been."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        events = super().select(0)
        if not events:
            assert timeout is not None, "the loop would wait for ever"
            self.now += timeout
        return events


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in which sleeping takes no time."""

    def __init__(self) -> None:
        self.virtual = JumpingSelector()
        super().__init__(self.virtual)

    def time(self) -> float:
        return self.virtual.now


class Scene:
    """A gateway kept confirmed while a story is told."""

    def __init__(self) -> None:
        self.loop = VirtualLoop()
        self.envoy = FakeEnvoy()
        self.gateway = gateway(self.envoy, self.loop.time)
        self.confirmed: list[tuple[str, float]] = []

    def play(self, story: Coroutine[Any, Any, None]) -> None:
        async def kept() -> None:
            keeper = asyncio.create_task(
                self.gateway.keep_confirmed(lambda *told: self.confirmed.append(told))
            )
            try:
                await story
            finally:
                keeper.cancel()
                with suppress(asyncio.CancelledError):
                    await keeper

        self.run(kept())

    def run(self, story: Coroutine[Any, Any, None]) -> None:
        try:
            self.loop.run_until_complete(story)
        finally:
            self.loop.close()

    def publish(self, **states: State) -> None:
        self.gateway.publish(members(states))


def test_confirmed_lists_cost_one_question_in_ten_seconds() -> None:
    scene = Scene()

    async def story() -> None:
        scene.publish(code=State.READY)
        await asyncio.sleep(1)
        asked = scene.envoy.asks
        await asyncio.sleep(3600)
        assert scene.envoy.asks - asked <= 360

    scene.play(story())

    assert sorted(route for route, _ in scene.confirmed) == ["chat-7b", "code-7b", "odd/name"]
    assert max(elapsed_s for _, elapsed_s in scene.confirmed) < 0.01


def test_unchanged_members_write_and_ask_nothing() -> None:
    scene = Scene()

    async def story() -> None:
        scene.publish(code=State.READY)
        await asyncio.sleep(1)
        asked = scene.envoy.asks
        assert scene.gateway.publish(members({"code": State.READY})) == ()
        await asyncio.sleep(1)
        assert scene.envoy.asks == asked

    scene.play(story())


def test_lost_notification_is_mended_after_a_quarter_of_a_second() -> None:
    scene = Scene()

    async def story() -> None:
        scene.envoy.is_deaf = True
        scene.publish(code=State.READY)
        await asyncio.sleep(0.2)
        scene.envoy.is_deaf = False
        await asyncio.sleep(0.04)
        assert scene.confirmed == []
        await asyncio.sleep(1)

    scene.play(story())

    assert len(scene.confirmed) == 3
    assert 0.25 <= max(elapsed_s for _, elapsed_s in scene.confirmed) < 0.75


def test_absent_envoy_is_asked_ever_more_rarely() -> None:
    scene = Scene()

    async def story() -> None:
        scene.envoy.is_up = False
        scene.publish(code=State.READY)
        await asyncio.sleep(60)

    scene.play(story())

    assert 50 < scene.envoy.asks < 100
    assert scene.gateway.confirmed["chat-7b"] is None
    assert scene.confirmed == []


def test_publication_is_confirmed_at_once_after_a_long_absence() -> None:
    scene = Scene()

    async def story() -> None:
        scene.envoy.is_up = False
        scene.publish(code=State.READY)
        await asyncio.sleep(60.5)
        scene.envoy.start()
        scene.gateway.wake()
        await asyncio.sleep(0.02)
        assert scene.gateway.confirmed["chat-7b"] == ("code",)

    scene.play(story())


def test_failed_write_is_repeated_until_it_succeeds() -> None:
    scene = Scene()

    async def story() -> None:
        scene.envoy.is_disk_full = True
        scene.publish(code=State.READY)
        assert scene.gateway.published["chat-7b"] == ()
        assert "No space left on device" in scene.gateway.last_error
        await asyncio.sleep(10)
        scene.envoy.is_disk_full = False
        await asyncio.sleep(1.1)

    scene.play(story())

    assert [it.service for it in scene.gateway.published["chat-7b"]] == ["code"]
    assert scene.gateway.last_error == ""
    assert scene.gateway.confirmed["chat-7b"] == ("code",)


def test_failed_write_of_health_is_repeated_although_no_list_changed() -> None:
    scene = Scene()

    async def story() -> None:
        scene.envoy.is_disk_full = True
        scene.gateway.publish({}, ("rag",))
        scene.envoy.is_disk_full = False
        await asyncio.sleep(1.1)
        assert scene.envoy.health() == 503

    scene.play(story())


def test_every_table_is_written_again_for_an_envoy_that_was_started() -> None:
    """It may have read garbage, of which its answers about the lists say nothing."""
    scene = Scene()

    async def story() -> None:
        scene.gateway.wake()
        await asyncio.sleep(0.1)

    scene.play(story())

    clusters = {LAYOUT.clusters, LAYOUT.holding_clusters}
    tables = clusters | {LAYOUT.routes, LAYOUT.listeners, LAYOUT.bootstrap}
    assert tables <= scene.envoy.disk.keys()


def test_a_table_that_could_not_be_written_at_the_start_is_written_later() -> None:
    scene = Scene()

    async def story() -> None:
        scene.envoy.is_disk_full = True
        scene.gateway.wake()
        await asyncio.sleep(5)
        assert LAYOUT.listeners not in scene.envoy.disk
        scene.envoy.is_disk_full = False
        await asyncio.sleep(1.1)

    scene.play(story())

    assert LAYOUT.listeners in scene.envoy.disk
    assert scene.gateway.last_error == ""


def test_a_file_that_somebody_else_wrote_is_mended_within_ten_seconds() -> None:
    scene = Scene()

    async def story() -> None:
        scene.publish(code=State.READY)
        await asyncio.sleep(60)
        for path in (LAYOUT.routes, LAYOUT.listeners, LAYOUT.clusters, LAYOUT.upstreams("code-7b")):
            scene.envoy.spoil(path)
        await asyncio.sleep(10.1)
        assert scene.envoy.foreign == {}

    scene.play(story())

    assert scene.envoy.services("code-7b") == ["code"]
    assert len(scene.confirmed) == 3


def test_a_file_is_mended_while_envoy_does_not_come_up_for_it() -> None:
    scene = Scene()

    async def story() -> None:
        scene.envoy.is_up = False
        scene.publish(code=State.READY)
        await asyncio.sleep(30)
        scene.envoy.spoil(LAYOUT.bootstrap)
        await asyncio.sleep(11.1)
        assert scene.envoy.foreign == {}

    scene.play(story())


def test_a_confirmed_list_that_envoy_has_lost_is_mended_within_ten_seconds() -> None:
    scene = Scene()

    async def story() -> None:
        scene.publish(code=State.READY)
        await asyncio.sleep(60)
        scene.envoy.lists[cluster_name("code-7b")] = []
        await asyncio.sleep(11)
        assert len(scene.envoy.lists[cluster_name("code-7b")]) == 2, "code and the activator"

    scene.play(story())

    assert scene.gateway.confirmed["code-7b"] == ("code",)


def test_an_exception_does_not_end_the_confirming(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene()
    told: list[str] = []

    def note(route: str, elapsed_s: float) -> None:
        told.append(route)
        if len(told) <= 2:
            raise ZeroDivisionError("a bug of whoever is told")

    async def story() -> None:
        keeper = asyncio.create_task(scene.gateway.keep_confirmed(note))
        scene.publish(code=State.READY)
        await asyncio.sleep(5)
        assert not keeper.done()
        keeper.cancel()

    scene.run(story())

    assert sorted(told) == ["chat-7b", "code-7b", "odd/name"]
    assert len(caplog.records) == 1


def test_nonsense_from_envoy_is_not_taken_for_an_answer() -> None:
    scene = Scene()
    scene.envoy.clusters = lambda: b'{"cluster_statuses": 7}'  # type: ignore[method-assign]

    async def story() -> None:
        scene.publish(code=State.READY)
        await asyncio.sleep(2)

    scene.play(story())

    assert scene.gateway.confirmed["chat-7b"] is None


def test_in_flight_counts_a_service_over_all_routes() -> None:
    scene = Scene()

    async def story() -> None:
        scene.publish(code=State.READY, chat=State.READY)
        assert await scene.gateway.in_flight("code") == 3
        assert await scene.gateway.in_flight("chat") == 2
        assert await scene.gateway.in_flight("embedding") == 0
        scene.envoy.is_up = False
        assert await scene.gateway.in_flight("code") == 0

    scene.play(story())


def test_in_flight_is_at_least_one_while_envoy_does_not_tell() -> None:
    """A drain that took silence for "nothing in flight" would cut the requests of a busy Envoy."""
    scene = Scene()

    async def story() -> None:
        scene.publish(code=State.READY)
        scene.envoy.is_silent = True
        assert await scene.gateway.in_flight("code") == 1
        assert await scene.gateway.in_flight("rag") == 0
        assert await scene.gateway.requests_active() == 1
        scene.envoy.is_up = False
        assert await scene.gateway.in_flight("code") == 0
        assert await scene.gateway.requests_active() == 0

    scene.play(story())


def test_in_flight_is_not_zero_before_envoy_knows_of_the_drain() -> None:
    """Given a drain that Envoy has not heard of, it may still send the next request."""
    scene = Scene()
    answer = scene.envoy.clusters
    scene.envoy.clusters = lambda: answer().replace(  # type: ignore[method-assign]
        b'"value": "1"', b'"value": "0"'
    )

    async def story() -> None:
        scene.publish(code=State.READY)
        assert await scene.gateway.in_flight("code") == 0
        scene.envoy.is_deaf = True
        scene.publish(code=State.DRAINING)
        assert await scene.gateway.in_flight("code") > 0
        scene.envoy.is_deaf = False
        await asyncio.sleep(1)
        assert await scene.gateway.in_flight("code") == 0

    scene.play(story())
