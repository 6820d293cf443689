"""Which web pages may ask: a page can send requests to this machine from any browser on it.

A browser says in `Origin` whose page asks, and a page cannot change that. Programs send none, and
extensions and desktop applications one of another scheme.
"""

from collections.abc import Iterable

from llmsup.services.envoy import Document
from llmsup.services.envoy_errors import error

# "null" is what any page gets by asking from a sandboxed frame.
_OF_A_PAGE = r"(?i)null|https?://.*"
_OF_THIS_MACHINE = r"(?i)https?://(([a-z0-9-]+\.)*localhost|127(\.[0-9]+){3}|\[::1\])(:[0-9]+)?"
REFUSAL = error(
    "Requests from this web page are refused. If they are meant, add its origin to "
    "gateway.allowed_origins.",
    "origin_not_allowed",
)


def of_strangers(allowed: Iterable[str]) -> Document:
    """A match of requests by pages that are neither of this machine nor `allowed`."""
    return {
        "prefix": "/",
        "headers": [
            _origin({"safe_regex": {"regex": _OF_A_PAGE}}),
            _origin({"safe_regex": {"regex": _OF_THIS_MACHINE}}, invert_match=True),
            *(_origin({"exact": each, "ignore_case": True}, invert_match=True) for each in allowed),
        ],
    }


def _origin(string_match: Document, **more: bool) -> Document:
    return {"name": "origin", "string_match": string_match, **more}
