from collections.abc import Iterable
from typing import Any

import pytest

from llmsup.config.flags import owned_flags
from llmsup.config.rules import findings
from llmsup.config.schema import (
    Command,
    Gateway,
    Liveness,
    LlamaServer,
    Profile,
    Qdrant,
    Readiness,
    Restart,
    Route,
    Service,
)
from llmsup.config.wording import dotted

CHAT = LlamaServer(model="/m/chat.gguf", port=8001)
CODE = LlamaServer(model="/m/code.gguf", port=8004)
QDRANT = Qdrant()


def needing(*names: str) -> Command:
    return Command(command=("x",), depends_on=names)


def found(profile: Profile) -> dict[str, str]:
    return {dotted(key): message for key, message in findings(profile, profile.service.keys())}


def of_services(**services: Service) -> dict[str, str]:
    return found(Profile(service=services))


def of_gateway(gateway: Gateway) -> dict[str, str]:
    return found(Profile(service={"chat": CHAT}, gateway=gateway))


def of_routes(**routes: Route) -> dict[str, str]:
    services: dict[str, Service] = {
        "chat": CHAT,
        "code": CODE,
        "store": QDRANT,
        "batch": Command(command=("x",)),
        "embedding": LlamaServer(model="/m/e.gguf", pinned=True),
    }
    return found(Profile(service=services, route=routes))


def route(*services: str, aliases: Iterable[str] = ()) -> Route:
    return Route(services=services, aliases=tuple(aliases))


def test_a_sound_profile_has_no_findings() -> None:
    assert of_services(chat=CHAT, code=CODE, qdrant=QDRANT, rag=needing("qdrant", "chat")) == {}


def test_a_cycle_is_refused_with_its_path() -> None:
    result = of_services(rag=needing("embedding", "code"), embedding=needing("rag"), code=CODE)

    assert list(result) == ["service.embedding.depends_on"]
    assert "embedding -> rag -> embedding" in result["service.embedding.depends_on"]


def test_every_cycle_is_listed() -> None:
    result = of_services(a=needing("a"), b=needing("c"), c=needing("d"), d=needing("b"))

    assert sorted(result) == ["service.a.depends_on", "service.b.depends_on"]
    assert "a -> a" in result["service.a.depends_on"]
    assert "b -> c -> d -> b" in result["service.b.depends_on"]


@pytest.mark.parametrize("timeout_s", [0.0, 2.0, 30.0])
def test_liveness_is_off_or_long_enough_to_look_more_than_once(timeout_s: float) -> None:
    chat = LlamaServer(model="/m/chat.gguf", liveness=Liveness(timeout_s=timeout_s))
    assert of_services(chat=chat) == {}
    assert of_gateway(Gateway(liveness_timeout_s=timeout_s)) == {}


def test_a_liveness_timeout_too_short_to_judge_is_refused() -> None:
    chat = LlamaServer(model="/m/chat.gguf", liveness=Liveness(timeout_s=0.5))
    message = 'expected 2s or more, or "0s" for never; got 500ms'
    assert of_services(chat=chat) == {"service.chat.liveness.timeout": message}
    gateway = Gateway(liveness_timeout_s=0.5)
    assert of_gateway(gateway) == {"gateway.liveness_timeout": message}


def test_a_long_chain_of_dependencies_is_no_trouble() -> None:
    chain: dict[str, Service] = {f"s{n}": needing(f"s{n + 1}") for n in range(3000)}

    assert found(Profile(service={**chain, "s3000": CHAT})) == {}


def test_an_unknown_dependency_names_the_nearest_service() -> None:
    result = of_services(qdrant=QDRANT, rag=needing("qdrnt"))

    assert result["service.rag.depends_on[0]"] == 'no service "qdrnt"; did you mean "qdrant"?'


@pytest.mark.parametrize("name", ["gateway", "daemon", "all"])
def test_a_reserved_name_is_refused(name: str) -> None:
    assert "reserved" in of_services(**{name: CHAT})[f"service.{name}"]


def test_a_port_has_one_owner_the_gateway_included() -> None:
    result = of_services(
        a=CHAT, b=CHAT, c=LlamaServer(model="/m", port=8000), d=Qdrant(port=6334), e=needing()
    )

    assert set(result) == {"service.b.port", "service.c.port", "service.d.grpc_port"}
    assert "8001 is the port of service.a.port" in result["service.b.port"]
    assert "gateway.listen" in result["service.c.port"]


def test_readiness_is_one_way_and_needs_a_port() -> None:
    both = Readiness(http_get="/health", tcp=True)

    assert (
        "got both"
        in of_services(a=Command(command=("x",), port=1, readiness=both))["service.a.readiness"]
    )
    portless = of_services(a=Command(command=("x",), readiness=Readiness(tcp=True)))
    assert "set port" in portless["service.a.readiness.tcp"]


def test_backoff_fits_below_its_maximum() -> None:
    result = of_services(chat=LlamaServer(model="/m", restart=Restart(backoff_s=90)))

    assert "max_backoff (60s)" in result["service.chat.restart.backoff"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--port", "1"), 'use the key "port"'),
        (("--threads", "2", "-ngl", "9"), 'use the key "gpu_layers"'),
        (("-c=2048",), 'use the key "ctx_size"'),
        (("--host", "0.0.0.0"), "gateway.listen"),
        (("-m", "x"), 'use the key "model"'),
        (("--ctx_size", "9"), 'use the key "ctx_size"'),
        (("--n_gpu_layers=9",), 'use the key "gpu_layers"'),
        (("--api_key", "x"), "gateway.api_keys_file"),
        (("--api_key=x",), "gateway.api_keys_file"),
        (("--api-prefix", "/v1"), "below / only"),
        (("--ssl-key-file", "x"), "without TLS"),
        (("--ssl_cert_file", "x"), "without TLS"),
    ],
)
def test_flags_that_llmsup_sets_name_their_key(args: tuple[str, ...], words: str) -> None:
    [(_, message)] = owned_flags(args)

    assert words in message
    assert of_services(chat=LlamaServer(model="/m", args=args))


def test_other_flags_are_the_user_s_own() -> None:
    assert not list(owned_flags(("--embeddings", "--threads", "2", "--temp", "0")))


@pytest.mark.parametrize(
    "gateway",
    [
        Gateway(),
        Gateway(listen="[::1]:8000"),
        Gateway(listen="0.0.0.0:8000", api_keys_file="/keys"),
        Gateway(listen="0.0.0.0:8000", listen_without_api_keys="0.0.0.0:8000"),
    ],
)
def test_a_safe_gateway_is_accepted(gateway: Gateway) -> None:
    assert of_gateway(gateway) == {}


@pytest.mark.parametrize(
    ("gateway", "key", "words"),
    [
        (Gateway(listen="0.0.0.0:8000"), "listen", "say the address twice"),
        (Gateway(listen="8000"), "listen", "expected an IP address and a port"),
        (
            Gateway(listen="0.0.0.0:8000", listen_without_api_keys="0.0.0.0:80"),
            "listen_without_api_keys",
            'again, "0.0.0.0:8000"; got "0.0.0.0:80"',
        ),
        (
            Gateway(api_keys_file="/keys", listen_without_api_keys="127.0.0.1:8000"),
            "listen_without_api_keys",
            "contradicts",
        ),
    ],
)
def test_an_open_or_doubtful_gateway_is_refused(gateway: Gateway, key: str, words: str) -> None:
    result = of_gateway(gateway)

    assert list(result) == [f"gateway.{key}"]
    assert words in result[f"gateway.{key}"]


@pytest.mark.parametrize(
    ("services", "key", "words"),
    [
        (("chta",), "[0]", 'did you mean "chat"'),
        (("chat", "store"), "[1]", "vector store"),
        (("chat", "batch"), "[1]", "set service.batch.port"),
        (("chat", "chat"), "[1]", "named twice"),
        (("embedding", "chat"), "", "pinned and never failed over"),
    ],
)
def test_a_route_names_services_that_can_answer(
    services: tuple[str, ...], key: str, words: str
) -> None:
    result = of_routes(r=route(*services))

    assert list(result) == [f"route.r.services{key}"]
    assert words in result[f"route.r.services{key}"]


def test_a_pinned_service_may_have_a_route_of_its_own() -> None:
    assert of_routes(r=route("embedding"), s=route("chat", "code")) == {}


def test_a_model_name_has_one_route() -> None:
    result = of_routes(
        a=route("chat", aliases=["gpt", "b"]), b=route("code", aliases=["gpt", "free"])
    )

    assert set(result) == {"route.a.aliases[1]", "route.b.aliases[0]"}


LOADED = LlamaServer(model="/m/chat.gguf", port=8001, start="on-demand")
IDLING = LlamaServer(model="/m/chat.gguf", port=8001, ttl_s=60.0)


@pytest.mark.parametrize(("chat", "key"), [(LOADED, "start"), (IDLING, "ttl")])
def test_nothing_waits_for_what_a_request_loads(chat: LlamaServer, key: str) -> None:
    assert of_services(chat=chat, code=CODE) == {}
    assert of_services(chat=chat, rag=needing("chat")) == {
        "service.rag.depends_on[0]": '"chat" may be down until a request loads it; '
        f"drop its {key}, or do without"
    }


def test_what_a_request_loads_can_be_reached_by_one() -> None:
    rag = Command(command=("x",), port=8002, start="on-demand")
    words = "no request could load it; name it in a route, or drop it"
    assert of_services(rag=rag, store=Qdrant(ttl_s=1.0)) == {
        "service.rag.start": words,
        "service.store.ttl": words,
    }
    services: dict[str, Service] = {"rag": rag}
    assert found(Profile(service=services, route={"rag": route("rag")})) == {}


def test_single_mode_has_models_on_demand_and_idle_ones() -> None:
    """They take turns, so none of them can be counted on by others."""
    code = LlamaServer(model="/m/c.gguf", ttl_s=60.0)
    services: dict[str, Service] = {"chat": LOADED, "code": code}
    assert found(Profile(mode="single", service=services)) == {}


def test_active_names_an_unpinned_model_in_single_mode() -> None:
    services: dict[str, Service] = {"chat": CHAT, "qdrant": QDRANT}

    assert not found(Profile(mode="single", active="chat", service=services))
    assert not found(Profile(mode="single", service=services))
    single = found(Profile(mode="single", active="qdrant", service=services))
    assert 'expected "chat"' in single["active"]
    assert 'mode = "single"' in found(Profile(active="chat", service=services))["active"]


def model(**keys: Any) -> LlamaServer:
    return LlamaServer(model="/m", **keys)


SHRINKING = {"degrade": ("cache_type", "ubatch", "ctx_size"), "ctx_size_min": 1024}


@pytest.mark.parametrize(
    "chat",
    [
        model(**SHRINKING),
        model(degrade=("ctx_size",), ctx_size=1024, ctx_size_min=1024),
        model(degrade=("ubatch",), flash_attn="off"),
        model(cache_type_k="q8_0", flash_attn="off"),
        model(cache_type_v="bf16", flash_attn="off"),
        model(cache_type_v="q8_0"),
    ],
)
def test_what_a_plan_may_take_is_accepted(chat: LlamaServer) -> None:
    assert of_services(chat=chat) == {}


@pytest.mark.parametrize(
    ("chat", "key", "words"),
    [
        (model(gpu_layers="all", **SHRINKING), "degrade", 'only with gpu_layers = "auto"'),
        (model(gpu_layers=0, **SHRINKING), "degrade", 'only with gpu_layers = "auto"'),
        (model(pinned=True, **SHRINKING), "degrade", "contradicts pinned = true"),
        (model(degrade=("ubatch", "ubatch")), "degrade", "twice"),
        (model(degrade=("ctx_size",)), "degrade", "needs ctx_size_min"),
        (model(degrade=("cache_type",), flash_attn="off"), "degrade", "needs flash attention"),
        (model(cache_type_v="q8_0", flash_attn="off"), "cache_type_v", "needs flash attention"),
        (model(ctx_size_min=1024), "ctx_size_min", 'only with "ctx_size" in degrade'),
        (
            model(degrade=("ctx_size",), ctx_size=1024, ctx_size_min=1025),
            "ctx_size_min",
            "more than ctx_size (1024)",
        ),
    ],
)
def test_what_a_plan_could_not_do_is_refused(chat: LlamaServer, key: str, words: str) -> None:
    result = of_services(chat=chat)

    assert list(result) == [f"service.chat.{key}"]
    assert words in result[f"service.chat.{key}"]
