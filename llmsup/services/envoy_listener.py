"""Envoy's listener (LDS): what happens to a request before it is routed."""

from llmsup.core.routing import Endpoint
from llmsup.services.envoy import (
    LISTENER,
    METADATA,
    TYPE,
    Document,
    Layout,
    discovery,
    file_source,
    http_filter,
)
from llmsup.services.envoy_errors import local_replies

REQUEST_BODY_MAX_BYTES = 64 * 1024 * 1024


def listeners(layout: Layout, listen: Endpoint) -> Document:
    """LDS: the one listener."""
    filters = [
        # The keys come with the routes, and enable it. So the listener is the same with and
        # without keys: old connections would otherwise keep the old filters, and ask for keys that
        # the new routes do not have.
        {**http_filter("api_key_auth", "ApiKeyAuth", {}), "disabled": True},
        _json_to_metadata(),
        http_filter("router", "Router", {"suppress_envoy_headers": True}),
    ]
    manager = {
        "@type": TYPE + "envoy.extensions.filters.network.http_connection_manager.v3."
        "HttpConnectionManager",
        "stat_prefix": LISTENER,
        "rds": {"route_config_name": LISTENER, "config_source": file_source(layout.routes)},
        "http_filters": filters,
        "local_reply_config": local_replies(),
        "early_header_mutation_extensions": [_ignore_client_headers()],
        "http_protocol_options": {"accept_http_10": True},
        "server_header_transformation": "PASS_THROUGH",
        "generate_request_id": False,
        "skip_xff_append": True,
        "normalize_path": True,
        # A server may take "//" for "/", and would repeat what the route table does not.
        "merge_slashes": True,
        # A generation may be silent for as long as it takes.
        "stream_idle_timeout": "0s",
        "request_headers_timeout": "30s",
        "delayed_close_timeout": "0.05s",
    }
    return discovery(
        {
            "@type": TYPE + "envoy.config.listener.v3.Listener",
            "name": LISTENER,
            "address": {
                "socket_address": {"address": listen.host, "port_value": listen.port},
            },
            # With SO_REUSEPORT a second Envoy on the port would share its traffic in silence.
            "enable_reuse_port": False,
            "per_connection_buffer_limit_bytes": REQUEST_BODY_MAX_BYTES,
            "filter_chains": [
                {
                    "filters": [
                        {
                            "name": "envoy.filters.network.http_connection_manager",
                            "typed_config": manager,
                        }
                    ]
                }
            ],
        }
    )


def _json_to_metadata() -> Document:
    """Reads `model` from the body. What is wrong with it goes under a key of its own, so that no
    model name is taken for an error.
    """
    rule = {
        "selectors": [{"key": "model"}],
        "on_present": {"metadata_namespace": METADATA, "key": "model"},
        "on_missing": {"metadata_namespace": METADATA, "key": "problem", "value": "missing"},
        "on_error": {"metadata_namespace": METADATA, "key": "problem", "value": "malformed"},
    }
    rules = {
        "rules": [rule],
        # The default compares exactly, and "application/json; charset=utf-8" would not be read.
        "allow_content_types_regex": {"regex": ".*"},
        "allow_empty_content_type": True,
    }
    return http_filter("json_to_metadata", "JsonToMetadata", {"request_rules": rules})


def _ignore_client_headers() -> Document:
    """Headers with which a client could change retries and timeouts, or pretend to be us."""
    return {
        "name": "envoy.http.early_header_mutation.header_mutation",
        "typed_config": {
            "@type": TYPE + "envoy.extensions.http.early_header_mutation.header_mutation.v3."
            "HeaderMutation",
            "mutations": [
                {"remove_on_match": {"key_matcher": {"prefix": prefix}}}
                for prefix in ("x-envoy-", "x-llmsup-")
            ],
        },
    }
