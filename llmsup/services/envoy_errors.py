"""What Envoy itself answers, in OpenAI's shape: `{"error": {message, type, param, code}}`."""

from typing import Any

RETRY_AFTER_S = 5
MODEL_NAME_MAX_LENGTH = 200
ASKED_MODEL = f"%DYNAMIC_METADATA(llmsup:model):{MODEL_NAME_MAX_LENGTH}%"
"""The model that the client asked for. Only for `json_format`, which escapes it."""


def error(
    message: str, code: str, *, kind: str = "invalid_request_error", param: str | None = None
) -> dict[str, Any]:
    """The body of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def literal(text: str) -> str:
    """`text` as it must stand in a format string of Envoy."""
    return text.replace("%", "%%")


def retry_after() -> dict[str, Any]:
    """The header that says when another try is worth while."""
    return header("retry-after", str(RETRY_AFTER_S))


def header(key: str, value: str) -> dict[str, Any]:
    """One response header, in place of any other of that name."""
    return {
        "header": {"key": key, "value": value},
        "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
    }


def local_replies() -> dict[str, Any]:
    """The answers of Envoy that no route asked for. The first that matches is sent."""
    no_key = error("The API key is missing or wrong.", "invalid_api_key")
    too_large = error("The request body is larger than 64 MiB.", "request_too_large")
    unavailable = error(
        f"The model '{ASKED_MODEL}' is unavailable: none of its services is ready.",
        "model_unavailable",
        kind="server_error",
        param="model",
    )
    rejected = error("The request was not accepted: %LOCAL_REPLY_BODY%", "bad_request")
    return {
        "mappers": [
            _mapper(_status("EQ", 401), no_key, header("www-authenticate", "Bearer")),
            _mapper(_status("EQ", 413), too_large),
            # Only answers with a flag: a 503 of the route /health has none.
            _mapper(_all(_status("GE", 500), _flagged()), unavailable, retry_after(), status=503),
            # Headers too large or too slow carry no flag.
            _mapper(_any(_flagged(), _status("EQ", 431), _status("EQ", 408)), rejected),
        ]
    }


def _mapper(
    when: dict[str, Any], body: dict[str, Any], *headers: dict[str, Any], status: int | None = None
) -> dict[str, Any]:
    mapper: dict[str, Any] = {
        "filter": when,
        "body_format_override": {"json_format": body, "content_type": "application/json"},
        "headers_to_add": list(headers),
    }
    if status is not None:
        mapper["status_code"] = status
    return mapper


def _status(op: str, status: int) -> dict[str, Any]:
    value = {"default_value": status, "runtime_key": "none"}
    return {"status_code_filter": {"comparison": {"op": op, "value": value}}}


def _flagged() -> dict[str, Any]:
    return {"response_flag_filter": {}}


def _all(*filters: dict[str, Any]) -> dict[str, Any]:
    return {"and_filter": {"filters": list(filters)}}


def _any(*filters: dict[str, Any]) -> dict[str, Any]:
    return {"or_filter": {"filters": list(filters)}}
