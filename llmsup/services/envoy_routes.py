"""Envoy's route table (RDS): which path and model go where, and what Envoy answers by itself."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import quote

from llmsup.core.routing import Route
from llmsup.services.envoy import (
    ACTIVATOR,
    ALIVE_PATH,
    LISTENER,
    METADATA,
    TYPE,
    Document,
    cluster_name,
    discovery,
)
from llmsup.services.envoy_errors import (
    ASKED_MODEL,
    error,
    header,
    literal,
    retry_after,
)
from llmsup.services.envoy_origins import REFUSAL, of_strangers

RETRY_UNSENT = "connect-failure,refused-stream,reset-before-request"
RETRY_UNANSWERED = f"{RETRY_UNSENT},reset"
RETRY_HEADER = "x-llmsup-retry"
"""In an answer of the activator: an upstream answers now."""
LOAD_PATH = "/models/load"
UNLOAD_PATH = "/models/unload"
DIRECT_RESPONSE_MAX_BYTES = 1024 * 1024

# Envoy refuses a regex of more than 100 steps, hence more than one.
REPEATABLE = (
    r"(/v1)?/(chat/)?completions|/completion|/v1/messages(/count_tokens)?",
    r"(/v1)?/(embeddings|infill|(de)?tokenize|apply-template|rerank(ing)?)|/embedding",
)
"""Known to answer and to keep nothing. Anything else is assumed to have side effects.

Of llama-server's own paths, outside `/v1/`, those that show or change the server are left out.
"""

# No "%": an escaped path could reach the server as another one than was matched here.
EXPOSED = (*REPEATABLE, r"/v1/[A-Za-z0-9/_-]+")
CONTROLLING = r"/v1/stream.*|/v1/chat/completions/control(/.*)?"
"""What steers the requests of others: llama-server's streams and their control. Never exposed."""


@dataclass(frozen=True)
class Health:
    """What Envoy answers by itself about services: for `/health` the wanted ones that are not
    ready, and for `/v1/models` the status of each route, by its name.
    """

    not_ready: Sequence[str] = ()
    statuses: Mapping[str, str] = field(default_factory=dict)


def route_table(
    routes: Sequence[Route],
    api_keys: Sequence[str],
    health: Health,
    allowed_origins: Sequence[str] = (),
    *,
    admin_keys: Sequence[str] = (),
) -> Document:
    """RDS. With an admin key everything may be done, with an API key all but loading models."""
    if api_keys:
        api_keys = tuple(dict.fromkeys((*api_keys, *admin_keys)))
    host: Document = {
        "name": LISTENER,
        "domains": ["*"],
        "response_headers_to_remove": [RETRY_HEADER],
        "routes": [
            _open(_says("alive", {"path": ALIVE_PATH}, 200, {"status": "alive"}), api_keys),
            _open(_health(health.not_ready), api_keys),
            _says("origin", of_strangers(allowed_origins), 403, REFUSAL),
            _nowhere("not exposed", {"safe_regex": {"regex": CONTROLLING}}),
            *_control(admin_keys),
            *_models(routes, health.statuses),
            *_problems(),
            *(entry for route in routes for entry in _by_model(route)),
            *_unknown(routes),
        ],
    }
    if api_keys:
        host["typed_per_filter_config"] = {"envoy.filters.http.api_key_auth": _keys(api_keys)}
    return discovery(
        {
            "@type": TYPE + "envoy.config.route.v3.RouteConfiguration",
            "name": LISTENER,
            "virtual_hosts": [host],
            # The default of 4 KiB is too small for a list of models.
            "max_direct_response_body_size_bytes": DIRECT_RESPONSE_MAX_BYTES,
        }
    )


def _keys(api_keys: Sequence[str]) -> Document:
    """The keys a client may use. They are hidden from the services."""
    return {
        "@type": TYPE + "envoy.extensions.filters.http.api_key_auth.v3.ApiKeyAuthPerRoute",
        "credentials": [
            {"key": key, "client": f"client-{number}"} for number, key in enumerate(api_keys, 1)
        ],
        "key_sources": [{"header": "authorization"}, {"header": "x-api-key"}],
        "forwarding": {"hide_credentials": True},
    }


def _open(entry: Document, api_keys: Sequence[str]) -> Document:
    """The entry, answered without a key."""
    if not api_keys:
        return entry
    disabled = {"@type": TYPE + "envoy.config.route.v3.FilterConfig", "disabled": True}
    return entry | {"typed_per_filter_config": {"envoy.filters.http.api_key_auth": disabled}}


def _says(name: str, match: Document, status: int, body: Document, *headers: Document) -> Document:
    """A fixed answer."""
    return {
        "name": name,
        "match": match,
        "direct_response": {"status": status, "body": {"inline_string": json.dumps(body)}},
        "response_headers_to_add": [header("content-type", "application/json"), *headers],
    }


def _health(not_ready: Sequence[str]) -> Document:
    match = {"path": "/health"}
    if not not_ready:
        return _says("health", match, 200, {"status": "ok"})
    message = f"not ready: {', '.join(not_ready)}"
    body = {
        "status": "unavailable",
        "not_ready": list(not_ready),
        **error(message, "not_ready", kind="unavailable_error"),
    }
    return _says("health", match, 503, body, retry_after())


def _control(admin_keys: Sequence[str]) -> Iterator[Document]:
    """Loading and unloading models, for those who have a key for it."""
    if not admin_keys:
        return
    post = {"name": ":method", "string_match": {"exact": "POST"}}
    for path in (LOAD_PATH, UNLOAD_PATH):
        yield {
            "name": path,
            "match": {"path": path, "headers": [post]},
            "route": {"cluster": ACTIVATOR, "timeout": "30s"},
            "typed_per_filter_config": {"envoy.filters.http.api_key_auth": _keys(admin_keys)},
        }


def _models(routes: Sequence[Route], statuses: Mapping[str, str]) -> Iterator[Document]:
    known = [
        {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "llmsup",
            "status": {"value": statuses.get(route.name, "unloaded")},
        }
        for route in routes
        for name in route.names
    ]
    yield _says("models", {"path": "/v1/models"}, 200, {"object": "list", "data": known})
    for model in known:
        name = str(model["id"])
        for path in sorted({quote(name, safe="/:@"), quote(name, safe="")}):
            yield _says(f"model {name}", {"path": f"/v1/models/{path}"}, 200, model)
    unknown = error("This model does not exist.", "model_not_found", param="model")
    yield _says("no such model", {"prefix": "/v1/models/"}, 404, unknown)


def _metadata(key: str, value: Document, **more: bool) -> Document:
    return {"filter": METADATA, "path": [{"key": key}], "value": value, **more}


def _by_path(pattern: str, *metadata: Document) -> Document:
    return {"safe_regex": {"regex": pattern}, "dynamic_metadata": list(metadata)}


def _problems() -> Iterator[Document]:
    """Bodies in which there is no model to route by."""
    malformed = error("The body is not JSON that the gateway can read.", "invalid_json")
    missing = error(
        'The request names no model: "model" must be a short string.',
        "missing_model",
        param="model",
    )
    not_text = error("The model must be a string.", "invalid_model", param="model")
    text = {"string_match": {"safe_regex": {"regex": "(?s).*"}}}
    for name, body, metadata in (
        ("malformed", malformed, _metadata("problem", {"string_match": {"exact": "malformed"}})),
        ("missing", missing, _metadata("problem", {"string_match": {"exact": "missing"}})),
        ("not text", not_text, _metadata("model", text, invert=True)),
    ):
        for pattern in EXPOSED:
            yield _says(name, _by_path(pattern, metadata), 400, body)


def _by_model(route: Route) -> Iterator[Document]:
    """To the cluster of the route, for its name and its aliases."""
    names = [{"string_match": {"exact": name}} for name in route.names]
    model = _metadata("model", {"or_match": {"value_matchers": names}} if names[1:] else names[0])
    for pattern in EXPOSED:
        retry_on = RETRY_UNANSWERED if pattern in REPEATABLE else RETRY_UNSENT
        yield {
            "name": route.name,
            "match": _by_path(pattern, model),
            "route": {
                "cluster": cluster_name(route.name),
                "timeout": "0s",
                "idle_timeout": "0s",
                "retry_policy": _retry_policy(retry_on, len(route.services)),
            },
        }


def _retry_policy(retry_on: str, services: int) -> Document:
    """Repeat what has not been answered, at once and on the next upstream of the list.

    No status is in `retry_on`: a 4xx or a 503 of a server is an answer.
    """
    return {
        "retry_on": f"{retry_on},retriable-headers",
        "retriable_headers": [{"name": RETRY_HEADER, "present_match": True}],
        # Each service once, then the activator, and the first once more: a request that crashes
        # servers was given six tries, and crashed each of two servers three times. At least three:
        # each of the daemons of a profile's trial may hold it once.
        "num_retries": max(services + 1, 3),
        "retry_back_off": {"base_interval": "0.001s", "max_interval": "0.1s"},
        # Without it every retry goes to the upstream that has just died.
        "retry_priority": {
            "name": "envoy.retry_priorities.previous_priorities",
            "typed_config": {
                "@type": TYPE + "envoy.extensions.retry.priority.previous_priorities.v3."
                "PreviousPrioritiesConfig",
                "update_frequency": 1,
            },
        },
    }


def _unknown(routes: Sequence[Route]) -> Iterator[Document]:
    known = ", ".join(name for route in routes for name in route.names)
    message = f"The model '{ASKED_MODEL}' does not exist. Known models: {literal(known)}."
    for pattern in EXPOSED:
        yield {
            "name": "unknown model",
            "match": _by_path(pattern),
            "direct_response": {
                "status": 404,
                "body_format": {
                    "json_format": error(message, "model_not_found", param="model"),
                    "content_type": "application/json",
                },
            },
        }
    yield _nowhere("unknown path", {"prefix": "/"})


def _nowhere(name: str, match: Document) -> Document:
    return _says(name, match, 404, error("There is nothing at this path.", "not_found"))
