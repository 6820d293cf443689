"""Which services come up with the stack, which by a request, and which by a swap."""

import pytest

from llmsup.config.schema import LlamaServer, Profile, Qdrant, Service
from llmsup.units import GATEWAY, active, on_demand, swappable, wanted

CHAT = LlamaServer(model="/m/chat.gguf", priority=10)
CODE = LlamaServer(model="/m/code.gguf")
CODE_ON_DEMAND = LlamaServer(model="/m/code.gguf", start="on-demand")
PINNED = LlamaServer(model="/m/e.gguf", pinned=True, start="on-demand")


def single(code: LlamaServer, **fields: str) -> Profile:
    services: dict[str, Service] = {
        "chat": CHAT, "code": code, "embedding": PINNED, "store": Qdrant(),
    }  # fmt: skip
    return Profile(mode="single", service=services, **fields)  # type: ignore[arg-type]


def test_single_mode_has_one_unpinned_model_up() -> None:
    assert active(single(CODE)) == "chat"
    assert wanted(single(CODE)) == (GATEWAY, "chat", "store")
    assert wanted(single(CODE, active="code")) == (GATEWAY, "code", "store")
    assert wanted(single(CODE_ON_DEMAND, active="code")) == (GATEWAY, "store")


@pytest.mark.parametrize("up", ["chat", "code"])
def test_one_model_on_demand_lets_requests_swap_them_all(up: str) -> None:
    other = {"chat": "code", "code": "chat"}[up]

    assert swappable(single(CODE, active=up)) == set()
    assert swappable(single(CODE_ON_DEMAND, active=up)) == {other}


def test_a_request_starts_no_model_beside_the_one_that_is_up() -> None:
    assert on_demand(single(CODE_ON_DEMAND)) == {"embedding"}
    assert on_demand(single(CODE_ON_DEMAND, active="code")) == {"embedding", "code"}


def test_dual_mode_has_no_turns() -> None:
    services: dict[str, Service] = {"chat": CHAT, "code": CODE_ON_DEMAND}
    dual = Profile(service=services)

    assert active(dual) == ""
    assert swappable(dual) == set()
    assert wanted(dual) == (GATEWAY, "chat")
    assert on_demand(dual) == {"code"}
