"""Whether a target fits beside what runs, with a card and a machine that are plain values."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import pytest

from llmsup.card_gate import CardGate
from llmsup.choosing import Change
from llmsup.config.choice import Choice
from llmsup.config.load import Loaded
from llmsup.config.schema import LlamaServer, Profile
from llmsup.core.device import Device
from llmsup.core.service import Service, State, Want
from llmsup.errors import NoRoomError
from llmsup.host import procfs
from llmsup.room import Beside, Room
from tests.unit.test_card_gate import LAYER_MIB, LAYERS, MIB, NO_DRIVER, Stack

Given = ParamSpec("Given")
FULL_MIB = LAYERS * LAYER_MIB


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(procfs, "machine_memory", lambda: (16384 * MIB, 8192 * MIB))


def in_a_loop(test: Callable[Given, Coroutine[Any, Any, None]]) -> Callable[Given, None]:
    @wraps(test)
    def run(*args: Given.args, **kwargs: Given.kwargs) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


def profile(*, switch: str = "auto", port: int | None = None) -> Profile:
    chat = LlamaServer(model="/b.gguf", port=port)
    return Profile(switch=switch, service={"chat": chat})  # type: ignore[arg-type]


def change(new: Profile, generations: dict[str, int]) -> Change:
    loaded = Loaded(new, "p", Path("/p.toml"))
    return Change("chat", Path("/b.gguf"), loaded, loaded, Choice(), (), generations)


async def stack(free_mib: int, *, is_ready: bool = True) -> Stack:
    """chat is up and has what is not free."""
    made = Stack(chat=10)
    state = State.READY if is_ready else State.BACKOFF
    made.change("chat", state=state, want=Want.UP, generation=1)
    made.take(6000 - free_mib)
    return made


async def look(made: Stack, new: Profile | None = None) -> Beside | None:
    room = Room(made.gate, lambda: made.services, lambda _: made.sizer)
    return await room.look(change(new or profile(), {"chat": 1}))


@in_a_loop
async def test_it_fits_where_it_gets_what_it_would_get_alone() -> None:
    beside = await look(await stack(FULL_MIB + 10))
    assert beside is not None
    assert beside.free_bytes == (FULL_MIB + 10) * MIB
    assert beside.grant.device == "GPU-1"
    assert beside.grant.placement is not None
    assert beside.grant.placement.options.gpu_layers == LAYERS
    assert await look(await stack(3000), profile(switch="break-first")) is None
    assert await look(await stack(3000), profile(port=8001)) is None, "two cannot have it"
    assert await look(await stack(3000, is_ready=False)) is None, "nothing serves"


@in_a_loop
async def test_with_less_beside_what_runs_than_with_it_gone_it_does_not_fit() -> None:
    made = await stack(FULL_MIB - 10)
    made.reading = NO_DRIVER
    assert await look(made) is not None
    made = await stack(FULL_MIB - 10)
    held(made, 100)
    assert await look(made) is None
    made = await stack(FULL_MIB - 10)
    assert await look(made) is not None, "it gets no more with it gone: that is on the CPU"


def held(made: Stack, mib: int) -> None:
    """chat has so much of the card."""
    asked = made.gate.recall("chat", "")[0]
    made.gate.adopt("chat", 1, asked, mib * MIB)
    made.gate.note_change(made.services["chat"], made.services["chat"])


@in_a_loop
async def test_what_is_on_its_way_down_has_its_memory_still() -> None:
    made = await stack(FULL_MIB + 10)
    held(made, 100)
    assert await look(made) is not None
    made.services["chat"] = replace(
        made.services["chat"], state=State.DRAINING, want=Want.DOWN, pid=7
    )
    room = Room(made.gate, lambda: made.services, lambda _: made.sizer)
    waiting = asyncio.create_task(room.wait_calm())
    await asyncio.sleep(0)
    assert await look(made) is None
    assert not waiting.done()
    made.services["chat"] = replace(made.services["chat"], state=State.STOPPED, pid=None)
    async with asyncio.timeout(10):
        await waiting


@in_a_loop
async def test_a_machine_that_is_full_has_no_room_for_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(procfs, "machine_memory", lambda: (8192 * MIB, 511 * MIB))
    assert await look(await stack(3000)) is None


@in_a_loop
async def test_what_has_no_room_at_all_is_refused() -> None:
    made = await stack(300)
    made.sizer.fixed["chat"] = LAYERS
    with pytest.raises(NoRoomError):
        await look(made)


@in_a_loop
async def test_what_a_load_took_is_told_by_the_card_before_and_after() -> None:
    made = await stack(3000)
    beside = await look(made)
    assert beside is not None
    assert beside.took_bytes(made.reading) is None, "another program freed as much"
    made.take(1800)
    assert beside.took_bytes(made.reading) == 1800 * MIB
    assert beside.took_bytes(NO_DRIVER) is None


@in_a_loop
async def test_it_waits_until_nothing_loads() -> None:
    made = await stack(3000)
    room = Room(made.gate, lambda: made.services, lambda _: made.sizer)
    made.gate.ask("chat", 1)
    assert await room.look(change(profile(), {"chat": 1})) is None
    assert isinstance(made.gate, CardGate)
    assert isinstance(made.reading, Device)
    made.change("chat", state=State.FAILED)
    await room.wait_calm()
    made.services["chat"] = Service("chat", state=State.READY, generation=2)
    assert await room.look(change(profile(), {"chat": 1})) is not None
