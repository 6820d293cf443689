"""Which service answers, and what Envoy answers by itself."""

import json

import httpx
import pytest

from tests.contract.conftest import ROUTES, Stack, wait_until

NAMES = [name for route in ROUTES for name in route.names]


def answered_by(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["stub"]["name"])


def is_error(response: httpx.Response, status: int, code: str) -> str:
    """Asserts the shape of an error and returns its message."""
    assert (response.status_code, response.headers["content-type"]) == (status, "application/json")
    error = response.json()["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    assert error["code"] == code
    assert "x-llmsup-service" not in response.headers
    return str(error["message"])


@pytest.mark.parametrize(
    ("model", "service"),
    [
        ("chat-7b", "chat"),
        ("gpt-4o-mini", "chat"),
        ("code-7b", "code"),
        ("Qwen/Qwen2.5-3B:latest", "chat"),
        ('od"d %NAME% é', "chat"),
    ],
)
def test_name_and_alias_choose_the_route(stack: Stack, model: str, service: str) -> None:
    assert answered_by(stack.ask(model)) == service


@pytest.mark.parametrize(
    "content_type",
    ["application/json", "application/json; charset=utf-8", "text/plain", "x/y; boundary=1", None],
)
def test_content_type_does_not_matter(stack: Stack, content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    body = json.dumps({"messages": [], "model": "code-7b"}).encode()

    response = stack.client.post("/v1/chat/completions", content=body, headers=headers)

    assert answered_by(response) == "code"


@pytest.mark.parametrize(
    "path",
    [
        "/v1/completions",
        "/v1/embeddings",
        "/v1/responses",
        "/v1/rerank",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/completion",
        "/chat/completions",
        "/infill",
        "/tokenize",
        "/detokenize",
        "/apply-template",
        "/embedding",
        "/embeddings",
        "/rerank",
        "/reranking",
        "/v1/chat/completions?trace=1",
    ],
)
def test_inference_paths_are_exposed(stack: Stack, path: str) -> None:
    response = stack.ask(path=path)

    assert answered_by(response) == "chat"
    assert response.json()["stub"]["path"] == path.partition("?")[0]


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/slots",
        "/slots/0?action=save",
        "/props",
        "/models/load",
        "/lora-adapters",
        "/metrics",
        "/completions/x",
        "/v1/../slots",
        "/v1/%2e%2e/slots",
        "/v1/..%2fslots",
        "/v1/stream",
        "/v1/stream/conv-1",
        "/v1/streams",
        "/v1/streams/lookup",
        "/v1//streams",
        "/v1/chat/completions/control",
        "/v1/chat//completions/control/",
        "/v1/x%2fslots",
    ],
)
def test_paths_that_show_or_change_the_server_are_not_exposed(stack: Stack, path: str) -> None:
    # httpx would tidy the path; the raw target is what an attacker sends.
    url = httpx.URL(str(stack.client.base_url)).copy_with(raw_path=path.encode())

    response = stack.client.post(url, json={"model": "chat-7b"})

    assert response.status_code == 404, response.text
    assert "stub" not in response.json()
    assert "x-llmsup-service" not in response.headers


def test_unknown_model_names_the_known_ones(stack: Stack) -> None:
    message = is_error(stack.ask("gpt-5"), 404, "model_not_found")

    assert "'gpt-5'" in message
    for name in NAMES:
        assert name in message


@pytest.mark.parametrize(
    "name", ['a"b', "back\\slash", "new\nline\x00\x1f", "%REQ(host)% 100%", "né 😀", "x" * 8_000]
)
def test_unknown_model_stays_valid_json_whatever_it_is_called(stack: Stack, name: str) -> None:
    message = is_error(stack.ask(name), 404, "model_not_found")

    assert name[:150] in message
    assert len(message) < 1000


def test_long_model_name_is_not_cut_within_a_character(stack: Stack) -> None:
    is_error(stack.ask("é" * 101), 404, "model_not_found")
    is_error(stack.ask("x" + "é" * 300), 404, "model_not_found")
    is_error(stack.ask("x" + "😀" * 300), 404, "model_not_found")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "missing_model"),
        (b"{}", "missing_model"),
        (b'{"model": null}', "missing_model"),
        (b'{"model": {"a": 1}}', "missing_model"),
        (b'{"model": ["chat-7b"]}', "missing_model"),
        (b'{"messages": [{"model": "chat-7b"}]}', "missing_model"),
        (b'{"model": 7}', "invalid_model"),
        (b'{"model": true}', "invalid_model"),
        (b'{"model": "' + b"x" * 9_000 + b'"}', "missing_model"),
        (b'{"model": "chat-7b"', "invalid_json"),
        (b"model=chat-7b", "invalid_json"),
        (b"\xff\xfe", "invalid_json"),
        (b'{"model": "\xff"}', "invalid_json"),
        (b"[1]", "missing_model"),
    ],
)
def test_body_without_a_usable_model_is_400(stack: Stack, body: bytes, code: str) -> None:
    response = stack.client.post("/v1/chat/completions", content=body)

    is_error(response, 400, code)


def test_get_without_body_is_400(stack: Stack) -> None:
    is_error(stack.client.get("/v1/chat/completions"), 400, "missing_model")


@pytest.mark.parametrize("name", ["__missing__", "__error__", "missing", "malformed"])
def test_model_named_like_a_marker_is_just_unknown(stack: Stack, name: str) -> None:
    is_error(stack.ask(name), 404, "model_not_found")


def test_models_are_listed(stack: Stack) -> None:
    response = stack.client.get("/v1/models")

    assert response.headers["content-type"] == "application/json"
    assert [model["id"] for model in response.json()["data"]] == NAMES
    assert {model["owned_by"] for model in response.json()["data"]} == {"llmsup"}


@pytest.mark.parametrize(
    "path", ["chat-7b", "gpt-4o-mini", "Qwen/Qwen2.5-3B:latest", "Qwen%2FQwen2.5-3B%3Alatest"]
)
def test_one_model_is_shown(stack: Stack, path: str) -> None:
    url = stack.client.base_url.copy_with(raw_path=f"/v1/models/{path}".encode())

    response = stack.client.get(url)

    assert response.status_code == 200
    assert response.json()["id"] == path.replace("%2F", "/").replace("%3A", ":")


def test_unknown_model_is_not_shown(stack: Stack) -> None:
    is_error(stack.client.get("/v1/models/gpt-5"), 404, "model_not_found")


def test_headers_tell_the_service_and_cannot_be_spoofed(stack: Stack) -> None:
    lies = {"x-llmsup-service": "liar", "x-llmsup-fallback": "perhaps", "x-envoy-lie": "1"}

    response = stack.ask(headers={"x-stub": json.dumps({"headers": lies}), **lies})

    assert response.headers.get_list("x-llmsup-service") == ["chat"]
    assert response.headers.get_list("x-llmsup-fallback") == ["false"]
    assert not lies.keys() & response.json()["stub"]["headers"].keys()


def test_request_and_response_are_left_alone(stack: Stack) -> None:
    """Nothing is added for the server, and only the two headers for the client."""
    spoof = {"x-envoy-retry-on": "5xx", "x-envoy-upstream-rq-timeout-ms": "1"}

    response = stack.ask(headers={"user-agent": "me", "x-own": "kept", **spoof})

    assert sorted(response.json()["stub"]["headers"]) == [
        "accept",
        "accept-encoding",
        "content-length",
        "content-type",
        "host",
        "user-agent",
        "x-own",
    ]
    assert sorted(response.headers) == [
        "content-length",
        "content-type",
        "date",
        "x-llmsup-fallback",
        "x-llmsup-service",
    ]


def test_health_lists_what_is_not_ready(stack: Stack) -> None:
    assert stack.client.get("/health").json() == {"status": "ok"}

    stack.gateway.publish(stack.members({}), ("chat", "rag"))
    stack.settle()

    def says_unavailable() -> bool:
        return stack.client.get("/health").status_code == 503

    wait_until(says_unavailable, "/health says 503")
    response = stack.client.get("/health")
    assert response.json()["not_ready"] == ["chat", "rag"]
    assert int(response.headers["retry-after"]) > 0
    assert sorted(response.json()["error"]) == ["code", "message", "param", "type"]
    assert stack.client.get("/llmsup/alive").status_code == 200


def test_nothing_ready_is_503_with_retry_after(stack: Stack) -> None:
    stack.publish({})

    response = stack.ask("gpt-4o-mini")

    assert "'gpt-4o-mini'" in is_error(response, 503, "model_unavailable")
    assert response.json()["error"]["type"] == "server_error"
    assert int(response.headers["retry-after"]) > 0


def test_body_over_64_mib_is_413(stack: Stack) -> None:
    body = b'{"model": "chat-7b", "prompt": "' + b"x" * (65 * 1024 * 1024) + b'"}'

    response = stack.client.post("/v1/completions", content=body)

    is_error(response, 413, "request_too_large")


def test_headers_too_large_are_answered_in_the_same_shape(stack: Stack) -> None:
    response = stack.client.get("/health", headers={"x-big": "x" * 200_000})

    is_error(response, 431, "bad_request")
