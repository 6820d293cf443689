"""What `get_current_model` answers, by what runs."""

from typing import Any

import pytest

from llmsup.control.wire import ModelInfo, Status
from llmsup.mcp.current import current
from tests.fake_daemon import snapshot


def info(
    service: str, model: str | None, state: str = "ready", route: str | None = None
) -> ModelInfo:
    return {
        "service": service,
        "route": route,
        "model": model,
        "expected_model": "expected.gguf",
        "state": state,
    }


def told(status: Status, models: list[ModelInfo]) -> dict[str, Any]:
    return dict(current(status, models))


def stack(mode: str = "dual") -> Status:
    status = snapshot()
    status["daemon"]["mode"] = mode
    return status


def test_two_that_run_are_dual_whatever_the_profile_says() -> None:
    models = [info("chat", "qwen.gguf"), info("code", "coder.gguf")]

    assert told(stack("single"), models) == {
        "phase": "dual",
        "chat_model": "qwen.gguf",
        "code_model": "coder.gguf",
        "service_chat": "chat",
        "service_code": "code",
        "profile": "demo",
        "mode": "single",
        "services": models,
    }


@pytest.mark.parametrize("state", ["stopped", "failed", "backoff"])
def test_one_that_runs_is_single_whatever_the_profile_says(state: str) -> None:
    models = [info("chat", None, state), info("code", "coder.gguf")]

    assert told(stack("dual"), models) == {
        "phase": "single",
        "current_model": "coder.gguf",
        "model_type": "code",
        "service": "code",
        "profile": "demo",
        "mode": "dual",
        "services": models,
    }


def test_a_server_that_loads_runs_and_tells_of_no_model() -> None:
    found = told(stack(), [info("chat", "qwen.gguf"), info("code", None, "starting")])

    assert (found["phase"], found["chat_model"], found["code_model"]) == ("dual", "qwen.gguf", None)


def test_where_nothing_runs_the_phase_is_that_of_the_profile() -> None:
    models = [info("chat", None, "stopped"), info("code", None, "stopped")]

    dual, single = told(stack("dual"), models), told(stack("single"), models)

    assert (dual["phase"], dual["chat_model"], dual["service_code"]) == ("dual", None, "code")
    assert (single["phase"], single["current_model"], single["model_type"]) == (
        "single", None, None,
    )  # fmt: skip


def test_other_models_do_not_make_it_dual() -> None:
    found = told(stack("single"), [info("chat", "qwen.gguf"), info("embedding", "bge.gguf")])

    assert (found["phase"], found["service"]) == ("single", "chat")


def test_services_of_other_names_are_known_by_the_routes_they_lead() -> None:
    found = told(
        stack(),
        [info("big", "qwen.gguf", route="chat-7b"), info("small", "coder.gguf", route="code")],
    )

    assert (found["service_chat"], found["service_code"]) == ("big", "small")


def test_a_stack_without_models_names_none() -> None:
    found = told(stack("dual"), [])

    assert (found["chat_model"], found["service_chat"], found["services"]) == (None, None, [])
