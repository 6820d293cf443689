"""The documents that Envoy is given: the settings whose absence was seen to hurt."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmsup.config.listen import is_loopback, parse_listen
from llmsup.core.routing import Endpoint, Route, Upstream
from llmsup.errors import GatewayError
from llmsup.gateway import Gateway
from llmsup.host import inotify
from llmsup.host.replace import fingerprint, replace_file
from llmsup.services import envoy_admin, envoy_errors
from llmsup.services.envoy import (
    ALIVE_PATH,
    PARENT,
    Layout,
    base_id,
    bootstrap,
    cluster_name,
    launch,
    successor,
)
from llmsup.services.envoy_clusters import clusters, upstreams
from llmsup.services.envoy_listener import listeners
from llmsup.services.envoy_routes import Health, route_table

LAYOUT = Layout(Path("/run/user/1000/llm sup/gateway"))
LISTEN = Endpoint("127.0.0.1", 8000)
ROUTES = (Route("chat-7b", ("chat", "code"), ("gpt-4o-mini",)), Route("a/b:c", ("code",)))


def resource(document: dict[str, Any]) -> dict[str, Any]:
    return dict(document["resources"][0])


def manager() -> dict[str, Any]:
    listener = resource(listeners(LAYOUT, LISTEN))
    return dict(listener["filter_chains"][0]["filters"][0]["typed_config"])


def entries(**keys: Any) -> list[dict[str, Any]]:
    arguments: dict[str, Any] = {"routes": ROUTES, "api_keys": (), "health": Health()} | keys
    return list(resource(route_table(**arguments))["virtual_hosts"][0]["routes"])


def proxied() -> list[dict[str, Any]]:
    return [entry for entry in entries() if "route" in entry]


# --- bootstrap and process


def test_admin_is_a_private_socket() -> None:
    address = bootstrap(LAYOUT)["admin"]["address"]

    assert address == {"pipe": {"path": str(LAYOUT.admin_socket), "mode": 0o600}}


def test_only_an_envoy_that_can_hold_streams_is_given_the_filter() -> None:
    assert "wasm" not in json.dumps(clusters(LAYOUT, ROUTES))
    *of_routes, activator = clusters(LAYOUT, ROUTES, hold_module=b"x")["resources"]
    assert all("wasm" in json.dumps(each) for each in of_routes)
    assert (activator["name"], "wasm" in json.dumps(activator)) == (".activator", False)
    for holds, file in ((False, LAYOUT.clusters), (True, LAYOUT.holding_clusters)):
        sources = bootstrap(LAYOUT, holds=holds)["dynamic_resources"]
        assert sources["cds_config"]["path_config_source"]["path"] == str(file)


def test_headers_are_held_next_to_the_client_of_those_that_name_the_service() -> None:
    """Answers pass the filters from the last to the first: the names are those of who answered."""
    (cluster, *_) = clusters(LAYOUT, ROUTES, hold_module=b"x")["resources"]
    (options,) = cluster["typed_extension_protocol_options"].values()

    names = [each["name"].rpartition(".")[2] for each in options["http_filters"]]

    assert names == ["wasm", "header_mutation", "upstream_codec"]


def test_files_are_watched_one_by_one() -> None:
    """A watched directory makes Envoy read every list at each rename."""
    documents = [
        bootstrap(LAYOUT),
        clusters(LAYOUT, ROUTES),
        listeners(LAYOUT, LISTEN),
    ]

    assert "watched_directory" not in json.dumps(documents)


def test_files_are_renamed_from_a_directory_that_is_not_watched() -> None:
    watched = {LAYOUT.upstreams("x").parent, LAYOUT.routes.parent, LAYOUT.bootstrap.parent}

    assert LAYOUT.temporary not in watched


@pytest.mark.parametrize(
    ("host", "probed"),
    [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::", "::1"), ("::1", "::1")],
)
def test_launch_probes_envoy_itself(host: str, probed: str) -> None:
    made = launch("/bin/envoy", LAYOUT.directory, Endpoint(host, 8000))

    assert (made.target.host, made.target.port, made.target.path) == (probed, 8000, ALIVE_PATH)
    assert made.ports == (8000,)
    assert made.argv[: len(PARENT)] == PARENT
    assert made.argv[len(PARENT) :][:3] == ("/bin/envoy", "-c", str(LAYOUT.bootstrap))
    assert "--reject-unknown-dynamic-fields" in made.argv


def test_base_id_times_ten_is_a_positive_32_bit_number() -> None:
    ids = {base_id(Path(f"/home/{number}/gateway")) for number in range(1000)}

    assert len(ids) > 990
    assert min(ids) >= 0
    assert max(ids) * 10 + 2 < 2**31


def test_successor_is_told_its_epoch_and_is_otherwise_the_same_process() -> None:
    made = launch("/bin/envoy", LAYOUT.directory, LISTEN)

    later = successor(made, 7, drain_timeout_s=2.5)

    assert later.once[:4] == ("--restart-epoch", "7", "--parent-shutdown-time-s", "3")
    assert later.digest == made.digest
    assert launch("/bin/envoy", LAYOUT.directory, LISTEN, holds=True).digest != made.digest
    assert replace(made, configuration="another bootstrap").digest != made.digest


# --- names


@pytest.mark.parametrize(
    "route", ["", ".", "..", "../../etc/passwd", "a/b", "a:b", "é" * 300, "x" * 300, "a b", "a\nb"]
)
def test_cluster_name_is_safe_as_a_file(route: str) -> None:
    name = cluster_name(route)

    assert LAYOUT.upstreams(route).parent == LAYOUT.upstreams("chat").parent
    assert name.isascii()
    assert name.strip(".")
    assert len(name) < 100
    assert not set(name) & set("/: \n\x00")


def test_cluster_names_differ_where_routes_differ() -> None:
    routes = ["a/b", "a:b", "a_b", "a b", "a.b", cluster_name("a/b"), cluster_name("a.b")]

    assert len({cluster_name(route) for route in routes}) == len(routes)


def test_plain_name_is_left_as_it_is() -> None:
    assert cluster_name("chat-7b") == "chat-7b"


# --- listener


def test_no_timeout_cuts_a_long_generation() -> None:
    assert manager()["stream_idle_timeout"] == "0s"
    assert {entry["route"]["timeout"] for entry in proxied()} == {"0s"}
    assert {entry["route"]["idle_timeout"] for entry in proxied()} == {"0s"}
    assert "max_stream_duration" not in json.dumps(entries())


def test_port_is_never_shared() -> None:
    assert resource(listeners(LAYOUT, LISTEN))["enable_reuse_port"] is False


def test_bodies_up_to_64_mib_are_kept_for_repetition() -> None:
    listener = resource(listeners(LAYOUT, LISTEN))

    assert listener["per_connection_buffer_limit_bytes"] == 64 * 1024 * 1024


def test_key_filter_is_first_and_the_keys_of_the_routes_enable_it() -> None:
    filters = manager()["http_filters"]

    assert filters[0]["name"].rpartition(".")[2] == "api_key_auth"
    assert [it["name"] for it in filters if it.get("disabled")] == [filters[0]["name"]]


# --- clusters and lists


def test_retries_are_not_cut_by_the_default_limit_of_three() -> None:
    for cluster in clusters(LAYOUT, ROUTES)["resources"][: len(ROUTES)]:
        assert cluster["circuit_breakers"]["thresholds"][0]["max_retries"] == 1024


def test_no_active_checks_and_no_ejection() -> None:
    text = json.dumps(clusters(LAYOUT, ROUTES))

    assert "health_checks" not in text
    assert "outlier_detection" not in text


def test_idle_connections_are_closed_before_llama_server_does() -> None:
    (options,) = clusters(LAYOUT, ROUTES)["resources"][0][
        "typed_extension_protocol_options"
    ].values()

    assert options["common_http_protocol_options"]["idle_timeout"] == "4s"


def test_list_keeps_its_order_as_priorities() -> None:
    document = upstreams(
        "chat-7b",
        (
            Upstream("chat", Endpoint("127.0.0.1", 8001), is_fallback=False, is_draining=True),
            Upstream("code", Endpoint("127.0.0.1", 8004), is_fallback=True),
        ),
        Path("/run/activator.sock"),
    )

    *endpoints, activator = resource(document)["endpoints"]
    listed = [
        (
            it["priority"],
            it["lb_endpoints"][0]["endpoint"]["address"]["socket_address"]["port_value"],
            it["lb_endpoints"][0]["health_status"],
            it["lb_endpoints"][0]["metadata"]["filter_metadata"]["llmsup"],
        )
        for it in endpoints
    ]
    assert listed == [
        (0, 8001, "DRAINING", {"service": "chat", "fallback": "false"}),
        (1, 8004, "HEALTHY", {"service": "code", "fallback": "true"}),
    ]
    assert activator["priority"] == 2
    (endpoint,) = activator["lb_endpoints"]
    assert endpoint["endpoint"]["address"] == {"pipe": {"path": "/run/activator.sock"}}
    assert resource(document)["cluster_name"] == "chat-7b"


# --- routes


def test_statuses_are_answers_and_never_repeated() -> None:
    for entry in proxied():
        policy = entry["route"]["retry_policy"]
        unanswered = {"connect-failure", "refused-stream", "reset-before-request", "reset"}
        assert set(policy["retry_on"].split(",")) <= unanswered | {"retriable-headers"}
        told = [header["name"] for header in policy["retriable_headers"]]
        assert told == ["x-llmsup-retry"], "which only the activator sends"


@pytest.mark.parametrize(
    ("path", "is_repeated"),
    [
        ("/v1/chat/completions", True),
        ("/v1/completions", True),
        ("/v1/embeddings", True),
        ("/v1/rerank", True),
        ("/v1/reranking", True),
        ("/v1/messages", True),
        ("/v1/messages/count_tokens", True),
        ("/v1/infill", True),
        ("/v1/tokenize", True),
        ("/v1/detokenize", True),
        ("/v1/apply-template", True),
        ("/completion", True),
        ("/chat/completions", True),
        ("/embedding", True),
        ("/detokenize", True),
        ("/v1/responses", False),
        ("/v1/responses/resp_1/cancel", False),
        ("/v1/chat/completions/", False),
        ("/v1/audio/transcriptions", False),
        ("/v1/whatever", False),
        ("/messages", None),
        ("/slots", None),
    ],
)
def test_only_known_inference_paths_are_repeated_once_sent(
    path: str, is_repeated: bool | None
) -> None:
    matching = [
        "reset" in entry["route"]["retry_policy"]["retry_on"].split(",")
        for entry in proxied()
        if entry["name"] == "chat-7b" and re.fullmatch(entry["match"]["safe_regex"]["regex"], path)
    ]

    assert matching[:1] == ([] if is_repeated is None else [is_repeated])


def test_a_request_is_tried_twice_more_than_there_are_services() -> None:
    """Once the activator, and once again a service: with more, one request that crashes servers
    crashes each of two servers three times. A lone one is left to three daemons in a row.
    """
    tries = {entry["name"]: entry["route"]["retry_policy"]["num_retries"] for entry in proxied()}

    assert tries == {"chat-7b": 3, "a/b:c": 3}


def test_every_regex_is_short_enough_for_envoy() -> None:
    """Envoy rejects the whole route table for one of more than 100 steps of RE2."""
    patterns = set(re.findall(r'"regex": "(.*?)"', json.dumps(entries())))

    assert max(map(len, patterns)) < 100


def test_keys_are_asked_for_everywhere_but_at_health() -> None:
    disabled = [
        entry["name"] for entry in entries(api_keys=("sk-1",)) if "typed_per_filter_config" in entry
    ]

    assert disabled == ["alive", "health"]


def test_models_are_loaded_with_an_admin_key_only_and_it_opens_the_rest() -> None:
    def keys(entry: dict[str, Any]) -> list[str]:
        config = entry["typed_per_filter_config"]["envoy.filters.http.api_key_auth"]
        return [each["key"] for each in config["credentials"]]

    table = resource(route_table(ROUTES, ("sk-1",), Health(), admin_keys=("sk-2", "sk-1")))
    (host,) = table["virtual_hosts"]
    of_models = [it for it in host["routes"] if it["name"].startswith("/models/")]

    assert [it["name"] for it in of_models] == ["/models/load", "/models/unload"]
    assert [keys(it) for it in of_models] == [["sk-2", "sk-1"]] * 2
    assert keys(host) == ["sk-1", "sk-2"], "Envoy refuses a key that is there twice"


def test_every_name_of_a_route_has_its_status() -> None:
    listed = next(
        it for it in entries(health=Health((), {"chat-7b": "loading"})) if it["name"] == "models"
    )

    models = json.loads(listed["direct_response"]["body"]["inline_string"])["data"]
    assert {it["id"]: it["status"]["value"] for it in models} == {
        "chat-7b": "loading",
        "gpt-4o-mini": "loading",
        "a/b:c": "unloaded",
    }


def test_percent_in_a_known_name_is_no_command_of_envoy() -> None:
    routes = (Route("100%REQ(authorization)%", ("chat",)),)
    unknown = next(it for it in entries(routes=routes) if it["name"] == "unknown model")

    message = unknown["direct_response"]["body_format"]["json_format"]["error"]["message"]
    assert "100%%REQ(authorization)%%" in message


def test_literal_doubles_percent() -> None:
    assert envoy_errors.literal("100%") == "100%%"


# --- answers of the admin interface


def test_clusters_are_read_in_order_of_priority() -> None:
    activator = {"address": {"pipe": {"path": "/run/activator.sock"}}, "priority": 2}

    def host(port: int, **keys: Any) -> dict[str, Any]:
        return {"address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}} | keys

    body = {
        "cluster_statuses": [
            {
                "name": "chat-7b",
                "host_statuses": [
                    activator,
                    host(8004, priority=1, health_status={"eds_health_status": "HEALTHY"}),
                    host(
                        8001,
                        health_status={"eds_health_status": "DRAINING"},
                        stats=[
                            {"name": "rq_active", "value": "2"},
                            {"name": "rq_total", "value": "9"},
                            {"name": "rq_error"},
                        ],
                    ),
                ],
            },
            {"name": "empty", "added_via_api": True},
        ]
    }

    seen = envoy_admin.parse_clusters(json.dumps(body).encode())

    assert seen["empty"] == ()
    assert [it.host for it in seen["chat-7b"]] == [
        envoy_admin.Host(Endpoint("127.0.0.1", 8001), is_draining=True),
        envoy_admin.Host(Endpoint("127.0.0.1", 8004), is_draining=False),
        envoy_admin.Host(Path("/run/activator.sock"), is_draining=False),
    ]
    assert [(it.requests_active, it.requests_total) for it in seen["chat-7b"]] == [
        (2, 9),
        (0, 0),
        (0, 0),
    ]


@pytest.mark.parametrize("body", [b"", b"no", b"[]", b'{"cluster_statuses": [{}]}'])
def test_other_answers_are_refused(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        envoy_admin.parse_clusters(body)
    with pytest.raises(ValueError, match=r"."):
        envoy_admin.parse_requests_active(body)


# --- preparing


def test_files_are_written_in_an_order_that_envoy_can_read(tmp_path: Path) -> None:
    """A cluster whose list is missing when Envoy reads the clusters is rejected for good."""
    order: list[str] = []
    gateway = Gateway(
        tmp_path,
        ROUTES,
        ("127.0.0.1", 8000),
        write=lambda path, _temporary, _content: order.append(path.name),
    )

    gateway.prepare()

    lists = [f"{cluster_name(route.name)}.json" for route in ROUTES]
    tables = ["clusters.json", "clusters.hold.json", "routes.json", "listeners.json"]
    assert order == lists + tables + ["bootstrap.json", "bootstrap.hold.json"]


def test_socket_path_that_is_too_long_is_refused(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path / ("x" * 100), ROUTES, ("127.0.0.1", 8000))

    with pytest.raises(GatewayError, match="too long") as caught:
        gateway.prepare()

    assert "LLMSUP_HOME" in caught.value.hint


def test_more_routes_than_inotify_instances_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given one instance too few, Envoy would abort at start without saying why."""
    gateway = Gateway(tmp_path, ROUTES, ("127.0.0.1", 8000))
    monkeypatch.setattr(inotify, "instances_left", lambda: len(ROUTES) + 2)

    with pytest.raises(GatewayError, match="inotify") as caught:
        gateway.prepare()

    assert "sysctl fs.inotify.max_user_instances" in caught.value.hint
    monkeypatch.setattr(inotify, "instances_left", lambda: len(ROUTES) + 3)
    gateway.prepare()


def test_a_fingerprint_changes_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    seen = [fingerprint(path)]
    replace_file(path, tmp_path / "new", b"a")
    seen.append(fingerprint(path))
    assert fingerprint(path) == seen[-1]
    replace_file(path, tmp_path / "new", b"b")
    seen.append(fingerprint(path))
    path.write_bytes(b"bb")
    seen.append(fingerprint(path))

    assert len(set(seen)) == 4


def test_inotify_instances_of_this_user_are_counted(tmp_path: Path) -> None:
    limit = tmp_path / "max_user_instances"
    limit.write_text("128\n")
    for process, links in {
        "1": ["anon_inode:inotify", "/dev/null"],
        "2": ["anon_inode:inotify"],
    }.items():
        descriptors = tmp_path / process / "fd"
        descriptors.mkdir(parents=True)
        for number, link in enumerate(links):
            (descriptors / str(number)).symlink_to(link)
    (tmp_path / "3").mkdir()

    assert inotify.instances_left(tmp_path, limit) == 126
    assert inotify.instances_left(tmp_path, tmp_path / "absent") is None


def test_full_disk_is_one_line(tmp_path: Path) -> None:
    def write(_path: Path, _temporary: Path, _content: bytes) -> None:
        raise OSError(28, "No space left on device")

    gateway = Gateway(tmp_path, ROUTES, ("127.0.0.1", 8000), write=write)

    with pytest.raises(GatewayError, match="No space left on device"):
        gateway.prepare()


# --- addresses


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:8000", ("127.0.0.1", 8000)),
        ("0.0.0.0:1", ("0.0.0.0", 1)),
        ("[::1]:65535", ("::1", 65535)),
    ],
)
def test_listen_is_parsed(text: str, address: tuple[str, int]) -> None:
    assert parse_listen(text) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "8000",
        ":8000",
        "127.0.0.1",
        "127.0.0.1:",
        "127.0.0.1:0",
        "127.0.0.1:65536",
        "localhost:8000",
        "::1:8000",
        "[127.0.0.1]:8000",
        "[::1]",
        "127.0.0.1:8000 ",
        "127.0.0.1:+1",
        "[fe80::1%eth0]:1",
    ],
)
def test_other_addresses_are_refused_with_a_valid_one(text: str) -> None:
    with pytest.raises(ValueError, match=r"127\.0\.0\.1:8000"):
        parse_listen(text)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("0.0.0.0", False), ("::", False)],
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
