"""Keeps the prompt caches of servers that give way, and puts them back when they return.

A llama-server that ends in good order is asked to save its slots before SIGTERM; the next process
that can use them gets them back before it gets any request. Nothing here is ever in the way of
either: each has a time limit, and whatever goes wrong, the server starts with an empty cache.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from llmsup.config.units import duration
from llmsup.core import warmth
from llmsup.core.options import Options
from llmsup.core.service import Service
from llmsup.core.shape import shape_of
from llmsup.core.warmth import Saved
from llmsup.errors import LlmsupError
from llmsup.host import gguf, model_slots, procfs, slot_files
from llmsup.host.journal import Journal
from llmsup.host.replace import fingerprint
from llmsup.services.launch import Launch, Slots
from llmsup.services.llama_server import FIRST_TOKEN

log = logging.getLogger(__name__)

SAVE_TIMEOUT_S = 2.0
PUT_BACK_TIMEOUT_S = 5.0
TRIAL_TIMEOUT_S = 3.0
LOOK_PERIOD_S = 30.0
MIB = 2**20


class Warmth:
    """The saved slots of one stack, in `directory`; `index` tells what is in them.

    `wall_time` in Unix seconds: an hour in which the machine sleeps is an hour, too.
    """

    def __init__(
        self,
        directory: Path,
        index: Path,
        journal: Journal,
        *,
        wall_time: Callable[[], float] = time.time,
    ) -> None:
        self._directory = directory
        self._index = index
        self._journal = journal
        self._wall_time = wall_time
        self._saves: tuple[Saved, ...] = ()
        self._unfit: set[str] = set()  # keys of servers that begin anew in spite of it
        self._counts: dict[str, tuple[int, int]] = {}  # by service: generation, tokens
        self._fed: dict[str, frozenset[str]] = {}  # by service: the keys of what it got last
        self._has_saves = asyncio.Event()

    def begin(self, services: Collection[str]) -> None:
        """Take over what an earlier daemon kept of these services; remove everything else."""
        saves = slot_files.load(self._index)
        self._take(warmth.kept(saves, services, self._wall_time()))
        slot_files.remove_others(self._directory, {each.file for each in self._saves})

    async def keep(self) -> None:
        """Remove what has been kept for long enough, until cancelled."""
        while True:
            await self._has_saves.wait()
            await asyncio.sleep(LOOK_PERIOD_S)
            now_time = self._wall_time()
            stale = [each for each in self._saves if not warmth.is_current(each, now_time)]
            await self._drop(stale)

    def tokens(self, service: Service) -> int:
        """How many tokens its process got back, by its own word; 0: it started with none."""
        generation, tokens = self._counts.get(service.name, (0, 0))
        return tokens if generation == service.generation else 0

    def was_fed(self, service: Service) -> bool:
        """Whether its process was given anything back, whatever it made of it."""
        return self._counts.get(service.name, (0, 0))[0] == service.generation

    def distrust(self, service: Service) -> None:
        """It may have died of what it was given: the next one like it begins anew."""
        self._unfit |= self._fed.get(service.name, frozenset())

    # --- saving

    async def save(self, service: Service, launch: Launch | None) -> None:
        """Save what the slots of a server hold that has no requests any more and is to end.

        `launch`: by which it was started, as far as that is known. Takes `SAVE_TIMEOUT_S` at most.
        """
        if launch is None or launch.slots is None or service.pid is None:
            return
        began_at, before = time.monotonic(), self._saves
        try:
            async with asyncio.timeout(SAVE_TIMEOUT_S):
                await self._save(service.name, service.pid, launch, launch.slots)
        except Exception as error:
            _tell(error, service, "its slots are not saved")
        new = [e for e in self._saves if e.service == service.name and e not in before]
        if new:
            size_bytes = sum(each.size_bytes for each in new)
            self._journal.write(
                "saved",
                service=service.name,
                generation=service.generation,
                why=f"{_tokens(sum(each.tokens for each in new))} are kept for "
                f"{duration(launch.slots.keep_s)} ({size_bytes / MIB:.0f} MiB, "
                f"{time.monotonic() - began_at:.2f} s)",
            )

    async def _save(self, name: str, pid: int, launch: Launch, slots: Slots) -> None:
        key, port = await asyncio.to_thread(_key, slots, pid), launch.ports[0]
        if not key or key in self._unfit:
            return
        held = [
            each
            for each in await model_slots.look(port)
            if each.n_prompt_tokens >= warmth.TOKENS_MIN and not each.is_processing
        ]
        count = sum(each.n_prompt_tokens for each in held)
        if not held or not await asyncio.to_thread(self._has_use, launch, slots.options, count):
            return
        await self._drop([each for each in self._saves if each.key == key])
        for each in sorted(held, key=lambda each: -each.n_prompt_tokens):
            saved = await self._save_slot(name, key, port, each.id, slots.keep_s)
            if saved is not None:
                self._take((*self._saves, saved))

    def _has_use(self, launch: Launch, options: Options, tokens: int) -> bool:
        """Whether so many tokens come back if they are saved, and may be."""
        shape = shape_of(gguf.look(launch.models[0]))
        if not warmth.comes_back(shape, options):
            return False
        size_bytes = warmth.size_bytes(shape, options, tokens)
        free_bytes = slot_files.free_bytes(self._directory)
        if not warmth.fits(size_bytes, free_bytes):
            sizes = f"{size_bytes // MIB} MiB, with {free_bytes // MIB} MiB free"
            log.info("%s has no room for saved slots of %s", self._directory, sizes)
            return False
        return True

    async def _save_slot(
        self, name: str, key: str, port: int, slot: int, keep_s: float
    ) -> Saved | None:
        """None where it is not worth it: what it holds is a prompt of our own."""
        file = f"{name}-{key[:16]}-{slot}"
        path, is_kept = self._directory / file, False
        try:
            count, size_bytes = await model_slots.save(port, slot, file, SAVE_TIMEOUT_S)
            mark, tokens = await asyncio.to_thread(slot_files.read, path)
            if len(tokens) != count or path.stat().st_size != size_bytes:
                raise ValueError(f"{file} is not what was to be written")
            if {*tokens} == {FIRST_TOKEN}:
                return None
            is_kept = True
        finally:
            if not is_kept:
                slot_files.remove(self._directory, [file])
        now_time = self._wall_time()
        return Saved(file, name, key, slot, count, size_bytes, now_time, now_time + keep_s, mark)

    # --- putting back

    async def put_back(self, service: Service, launch: Launch) -> None:
        """Restore the slots of a server that has just got ready, before anybody asks it.

        What was saved is gone then, however that ends. Takes `PUT_BACK_TIMEOUT_S` at most.
        """
        if launch.slots is None or service.pid is None or not self._saves:
            return
        began_at = time.monotonic()
        try:
            key = await asyncio.to_thread(_key, launch.slots, service.pid)
            if saves := warmth.usable(self._saves, key, self._wall_time()):
                await self._feed(service, launch.ports[0], saves)
        except Exception as error:
            _tell(error, service, "not all is put back into its cache")
        if count := self.tokens(service):
            self._journal.write(
                "warmed",
                service=service.name,
                generation=service.generation,
                why=f"{_tokens(count)} are in its cache again "
                f"({time.monotonic() - began_at:.2f} s)",
            )

    async def _feed(self, service: Service, port: int, saves: Collection[Saved]) -> None:
        self._take([each for each in self._saves if each not in saves])
        count = 0
        self._counts[service.name] = (service.generation, count)
        self._fed[service.name] = frozenset(each.key for each in saves)
        try:
            async with asyncio.timeout(PUT_BACK_TIMEOUT_S):
                for each in saves:
                    count += await self._put_back(port, each)
        finally:
            slot_files.remove(self._directory, [each.file for each in saves])
            self._counts[service.name] = (service.generation, count)

    async def _put_back(self, port: int, saved: Saved) -> int:
        """How many tokens the server says it has of it."""
        path, timeout_s = self._directory / saved.file, PUT_BACK_TIMEOUT_S
        mark, tokens = await asyncio.to_thread(slot_files.read, path)
        if mark != saved.fingerprint:
            raise ValueError(f"{saved.file} was written to")
        await model_slots.restore(port, saved.slot, saved.file, timeout_s)
        try:
            cached = await model_slots.cached(port, saved.slot, tokens, TRIAL_TIMEOUT_S)
        except TimeoutError:
            cached = 0  # it computes the whole prompt anew
        if not warmth.is_shown(tokens, cached):
            self._unfit.add(saved.key)
            raise ValueError(f"the server had {cached} of {len(tokens)} tokens")
        # Once more: not every cache can take back the token that was tried.
        return await model_slots.restore(port, saved.slot, saved.file, timeout_s)

    # --- what is kept

    def _take(self, saves: Iterable[Saved]) -> None:
        """From now on these are what is kept."""
        taken = tuple(saves)
        if taken == self._saves:
            return
        self._saves = taken
        if self._saves:
            self._has_saves.set()
        else:
            self._has_saves.clear()
        try:
            slot_files.save(self._index, self._saves)
        except OSError as error:  # a daemon that follows this one removes them
            log.info("what is kept of slots cannot be written down: %s", error)

    async def _drop(self, saves: Collection[Saved]) -> None:
        if saves:
            self._take([each for each in self._saves if each not in saves])
            files = [each.file for each in saves]
            await asyncio.to_thread(slot_files.remove, self._directory, files)


def _key(slots: Slots, pid: int) -> str:
    """Stands for all that a prompt cache of this process depends on.

    Empty where it is not known: a file that was written to since it started may not be what it has
    in its memory.
    """
    began_time = time.time() - procfs.age_s(pid)
    marks = []
    for file in slots.files:
        found = file.stat()
        if found.st_ctime > began_time:
            return ""
        marks.append((str(file), fingerprint(file)))
    said = repr((slots.essence, marks))
    return hashlib.sha256(said.encode(errors="surrogateescape")).hexdigest()


def _tell(error: Exception, service: Service, what: str) -> None:
    if isinstance(error, TimeoutError):
        log.info("service=%s %s: that takes too long", service.name, what)
    elif isinstance(error, OSError | ValueError | LlmsupError):
        log.info("service=%s %s: %s", service.name, what, error)
    else:
        log.error("service=%s %s", service.name, what, exc_info=error)


def _tokens(count: int) -> str:
    return f"{count} tokens of earlier conversations"
