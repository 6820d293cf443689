"""Services of one card that a request loads: nobody starves, nobody thrashes, whatever comes."""

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from llmsup.card_queue import CardQueue
from llmsup.core.eviction import Evict, Tenant, Wait, make_room
from llmsup.core.leases import Lease, Leases, Standing, rank

CARD = 10
DWELL_S = 10.0
LOAD_S = 3.0
DRAIN_S = 1.0


@dataclass
class Card:
    """Services with sizes and priorities; who is on it answers all of its requests at once."""

    sizes: dict[str, int]
    priorities: dict[str, int]
    now: float = 0.0
    asked: dict[str, float] = field(default_factory=dict)
    up: dict[str, float] = field(default_factory=dict)
    used: dict[str, float] = field(default_factory=dict)
    loading: tuple[str, float] | None = None
    leaving: dict[str, float] = field(default_factory=dict)
    generations: dict[str, int] = field(default_factory=dict)
    queue: CardQueue = field(default_factory=CardQueue)
    waits_s: list[float] = field(default_factory=list)
    tenures_s: list[float] = field(default_factory=list)

    def leases(self) -> Leases:
        table = {}
        for name in self.sizes:
            if name in self.up or name in self.leaving:
                standing = Standing.HELD
            elif self.loading is not None and self.loading[0] == name:
                standing = Standing.LOADING
            elif name in self.asked:
                standing = Standing.WAITING
            else:
                continue
            generation = self.generations.get(name, 1)
            table[name] = Lease(name, generation, rank(name, self.priorities[name]), standing)
        return Leases(table)

    @property
    def free(self) -> int:
        taken = [*self.up, *self.leaving, *([self.loading[0]] if self.loading else [])]
        return CARD - sum(self.sizes[name] for name in taken)

    def step(self) -> None:
        """Everything that is due now."""
        for name, at in list(self.leaving.items()):
            if at <= self.now:
                del self.leaving[name]
                self.generations[name] = self.generations.get(name, 1) + 1
                self.queue.look_again(self.now)
        if self.loading is not None and self.loading[1] <= self.now:
            self.up[self.loading[0]] = self.now
            self.loading = None
        for name in [name for name in self.asked if name in self.up]:
            self.waits_s.append(self.now - self.asked.pop(name))
            self.used[name] = self.now
        while self.loading is None and not self.queue.is_being_made(self.leases()):
            due = self.queue.next_up(self.leases(), self.now)
            if due is None:
                return
            self.place(due.service)
            assert self.free >= 0

    def place(self, name: str) -> None:
        needed, free = self.sizes[name], self.free
        if needed <= free:
            self.queue.drop(name)
            self.loading = (name, self.now + LOAD_S)
            return
        tenants = [
            Tenant(
                each,
                self.priorities[each],
                self.sizes[each],
                since=self.up.get(each),
                used_at=self.used.get(each, 0.0),
                is_leaving=each in self.leaving,
            )
            for each in (*self.up, *self.leaving)
        ]
        decision = make_room(
            self.priorities[name], tenants, lambda more: needed <= free + more, DWELL_S, self.now
        )
        behind_until = self.queue.behind_until(name, self.leases())
        match decision:
            case Wait(until, _, is_sure):
                self.queue.put_off(name, until, is_sure=is_sure)
            case Evict(_) if behind_until is not None:
                self.queue.put_off(name, behind_until, is_sure=True)
            case Evict(names):
                leaving = {each: self.generations.get(each, 1) for each in names}
                self.queue.promise(name, leaving, self.now)
                for each in names:
                    self.tenures_s.append(self.now - self.up.pop(each))
                    self.leaving[each] = self.now + DRAIN_S
            case None:
                raise AssertionError("it would fit alone")


NAMES = "abcde"
sizes = st.tuples(*[st.integers(1, CARD)] * len(NAMES))
priorities = st.tuples(*[st.integers(-1, 1)] * len(NAMES))
pauses_s = st.tuples(*[st.sampled_from([0.0, 1.0, 7.0, 23.0, 200.0])] * len(NAMES))
"""How long the client of a service pauses between an answer and its next request."""

UNTIL_S = 250.0


def play(card: Card, pauses: dict[str, float]) -> None:
    due = dict(pauses)
    while card.now < UNTIL_S:
        for name, at in due.items():
            if at <= card.now and name not in card.asked:
                card.asked[name] = card.now
        waiting = set(card.asked)
        card.step()
        for name in waiting - set(card.asked):
            due[name] = card.now + pauses[name]
        nexts = [
            *due.values(),
            *card.leaving.values(),
            *([card.loading[1]] if card.loading else []),
        ]
        card.now = min([at for at in nexts if at > card.now] + [card.now + 0.5])


@settings(deadline=None, max_examples=60)
@given(sizes, priorities, pauses_s)
def test_nobody_starves_and_nobody_leaves_before_its_time(
    of_size: tuple[int, ...], of_priority: tuple[int, ...], pauses: tuple[float, ...]
) -> None:
    card = Card(dict(zip(NAMES, of_size, strict=True)), dict(zip(NAMES, of_priority, strict=True)))
    play(card, dict(zip(NAMES, pauses, strict=True)))

    turn_s = DWELL_S + LOAD_S + DRAIN_S + 1.0
    still_s = [card.now - at for at in card.asked.values()]
    assert max(card.waits_s + still_s) <= len(NAMES) * turn_s
    assert all(each >= DWELL_S - 1e-6 for each in card.tenures_s)


def waiting(*names: str) -> Leases:
    return Leases({name: Lease(name, 1, rank(name, 0), Standing.WAITING) for name in names})


def first(queue: CardQueue, leases: Leases, now: float) -> str | None:
    due = queue.next_up(leases, now)
    return None if due is None else due.service


def test_what_others_left_is_for_the_one_for_whom_they_did() -> None:
    """Though another one came earlier, and could not have had them leave."""
    queue, leases = CardQueue(), waiting("a", "b", "c")
    queue.put_off("c", 5.0, is_sure=False)
    queue.promise("b", {"big": 1}, now=1.0)
    queue.look_again(2.0)

    assert first(queue, leases, 2.0) == "b"
    assert queue.why("b") == "waits for big to make room"
    queue.drop("b")
    assert first(queue, waiting("a", "c"), 2.0) == "c", "then those who wait, as they came"
    assert first(queue, waiting("a"), 2.0) == "a"


def test_the_promise_to_one_that_waits_no_more_is_void() -> None:
    queue = CardQueue()
    queue.promise("b", {}, now=1.0)
    queue.drop("b")

    assert first(queue, waiting("a"), 1.0) == "a"


def test_one_that_knows_when_its_turn_is_lets_nobody_past() -> None:
    queue, leases = CardQueue(), waiting("a", "b")
    queue.put_off("b", 5.0, is_sure=True)

    assert queue.behind_until("a", leases) == 5.0
    assert queue.behind_until("b", leases) is None
    queue.put_off("b", 5.0, is_sure=False)
    assert queue.behind_until("a", leases) is None, "it may take for ever"


def test_room_is_made_until_the_last_one_has_gone() -> None:
    queue = CardQueue()
    held = {name: Lease(name, 3, rank(name), Standing.HELD) for name in ("a", "b")}
    queue.promise("c", {"a": 3, "b": 3}, now=0.0)

    assert queue.is_being_made(Leases(held))
    assert queue.is_being_made(Leases({"a": held["a"]}))
    again = Lease("a", 4, rank("a"), Standing.WAITING)
    assert not queue.is_being_made(Leases({"a": again})), "a later generation is another one"
