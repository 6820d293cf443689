"""What a daemon that takes over an Envoy reads of its files."""

from pathlib import Path

import msgspec
import pytest

from llmsup.core.routing import Endpoint, Route, Upstream
from llmsup.host.envoy_files import read, remove_others
from llmsup.services import envoy_clusters
from llmsup.services.envoy import Layout

CHAT = Upstream("chat", Endpoint("127.0.0.1", 8001), is_fallback=False)
CODE = Upstream("code", Endpoint("127.0.0.1", 8004), is_fallback=True)
GONE = Upstream("gone", Endpoint("127.0.0.1", 8005), is_fallback=True, is_draining=True)
OLD = Route("old", ("chat", "code", "gone"))


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """The files of an Envoy with one route."""
    layout = Layout(tmp_path)
    for directory in layout.directories:
        directory.mkdir(parents=True, exist_ok=True)
    lists = envoy_clusters.upstreams("old", (CHAT, CODE, GONE), layout.activator_socket)
    layout.upstreams("old").write_bytes(msgspec.json.encode(lists))
    clusters = envoy_clusters.clusters(layout, (OLD,))
    layout.clusters.write_bytes(msgspec.json.encode(clusters))
    return layout


def test_a_known_route_keeps_its_list(layout: Layout) -> None:
    last = read(layout, (OLD,))
    assert last.kept == last.lists == {"old": (CHAT, CODE, GONE)}
    assert last.clusters == {"old"}


def test_a_new_route_begins_with_what_answers_now(layout: Layout) -> None:
    """Given its services in another order, and one that gets no new requests."""
    last = read(layout, (Route("new", ("code", "gone", "chat", "never")),))
    first = Upstream("code", CODE.endpoint, is_fallback=False)
    second = Upstream("chat", CHAT.endpoint, is_fallback=True)
    assert (last.kept, last.lists) == ({}, {"new": (first, second)})


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"[]", b"{}", b'{"resources": 1}', b'{"resources": [{"name": []}]}']
)
def test_what_cannot_be_read_is_as_good_as_none(layout: Layout, content: bytes) -> None:
    layout.upstreams("old").write_bytes(content)
    layout.clusters.write_bytes(content)
    last = read(layout, (OLD,))
    assert (last.kept, last.lists, last.clusters) == ({}, {"old": ()}, frozenset())


def test_only_the_lists_of_others_are_removed(layout: Layout) -> None:
    layout.upstreams("other").touch()
    remove_others(layout, (OLD,))
    assert list(layout.upstreams("").parent.iterdir()) == [layout.upstreams("old")]
