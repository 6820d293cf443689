"""Who gets how much of one card: a `Plan` of a `Budget` and some `Demand`s. Pure.

Pinned services come first, then higher priorities; the order in the file means nothing. Three
rules, in this order:

* What the operator fixed (a number of layers, or a pinned service) is kept free for it before any
  other gets a byte, from whatever rank. If they do not all fit, the lower ranks of them are
  refused, and what cannot be placed takes nothing from anybody.
* A higher rank gets its best choice before a lower one gets any. Layers come first, then what was
  taken from the service for them (`core.ladder`).
* Services of one rank share what is left evenly, in bytes: what one cannot use, be it all that it
  needs or too little for its first layer, goes to the others. The rest that no longer makes a
  layer for each is offered to them in the order of their names.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from llmsup.core import reasons
from llmsup.core.choices import Choice, Choices
from llmsup.core.plan import Budget, Demand, Knob, Placement, Plan

Rank = tuple[bool, int]


@dataclass(frozen=True, slots=True)
class _Refusal:
    """Of one service: the whole sentence, the short one for its own line, and what would help."""

    whole: str = ""
    short: str = ""
    hint: str = ""


def plan(budget: Budget | None, demands: Iterable[Demand], no_card: str = "") -> Plan:
    """The plan. `no_card` says why there is no budget."""
    ranked = sorted(map(Choices, demands), key=lambda each: (_rank(each), each.demand.service))
    if budget is None:
        return _plan_without_card(ranked, no_card)
    kept, refused = _keep(budget.usable_bytes, ranked)
    placements: list[Placement] = []
    left_bytes = budget.usable_bytes
    kept_bytes = sum(kept.values())
    for _, peers in groupby(ranked, key=_rank):
        peers_of_rank = list(peers)
        for each in filter(lambda peer: peer.is_required, peers_of_rank):
            service = each.demand.service
            if service not in kept:
                if each.cheapest is not None:
                    placements.append(_placement(each, each.cheapest, refused[service].short))
                continue
            kept_bytes -= kept[service]
            room_bytes = left_bytes - kept_bytes
            choice = each.best(room_bytes)
            placements.append(_explained(each, choice, room_bytes))
            left_bytes -= choice.device_bytes
        free_to_choose = [each for each in peers_of_rank if not each.is_required]
        shared = _share(free_to_choose, left_bytes - kept_bytes)
        placements += shared
        left_bytes -= sum(each.price.device_bytes for each in shared)
    first = next(iter(refused.values()), _Refusal())
    return Plan(tuple(placements), budget, first.whole, hint=first.hint, refused=tuple(refused))


def insists_on(demand: Demand) -> int:
    """The bytes to keep free for a service that is not placed yet; 0 where it can do without."""
    choices = Choices(demand)
    if not choices.is_required or choices.least is None:
        return 0
    return choices.least.device_bytes


def _rank(choices: Choices) -> Rank:
    return not choices.demand.pinned, -choices.demand.priority


def _keep(
    usable_bytes: int, ranked: Sequence[Choices]
) -> tuple[dict[str, int], dict[str, _Refusal]]:
    """Bytes kept free for what is required, and what of it cannot be."""
    kept: dict[str, int] = {}
    refused: dict[str, _Refusal] = {}
    for each in ranked:
        if not each.is_required:
            continue
        service = each.demand.service
        room_bytes = usable_bytes - sum(kept.values())
        if each.least is not None and each.least.device_bytes <= room_bytes:
            kept[service] = each.least.device_bytes
        else:
            refused[service] = _refuse(each, room_bytes, kept)
    return kept, refused


def _refuse(choices: Choices, room_bytes: int, kept_bytes: Mapping[str, int]) -> _Refusal:
    if choices.cheapest is None:
        return _Refusal(f"{choices.demand.service}: {choices.trouble}")
    instead = Choices(_eased(choices.demand)).best(room_bytes)
    return _Refusal(
        reasons.refusal(choices.demand, choices.cheapest, room_bytes, kept_bytes),
        reasons.refused(choices.cheapest, room_bytes),
        reasons.hint(choices.demand, instead),
    )


def _eased(demand: Demand) -> Demand:
    """The same with nothing fixed: what the profile might say instead."""
    knobs = demand.knobs | {Knob.GPU_LAYERS}
    if demand.has_experts:
        knobs |= {Knob.N_CPU_MOE}
    return replace(demand, knobs=knobs, pinned=False)


def _share(peers: Sequence[Choices], room_bytes: int) -> list[Placement]:
    """Placements of services of one rank that may get anything from all to nothing."""
    chosen = {peer: peer.best(share) for peer, share in _shares(peers, room_bytes).items()}
    while users := [peer for peer, choice in chosen.items() if choice.device_bytes]:
        if len(users) == len(chosen):
            break
        chosen = {peer: peer.best(share) for peer, share in _shares(users, room_bytes).items()}
    left_bytes = room_bytes - sum(choice.device_bytes for choice in chosen.values())
    placements = []
    for peer in peers:
        if peer in chosen:
            left_bytes += chosen[peer].device_bytes
        choice = peer.best(left_bytes)
        placements.append(_explained(peer, choice, left_bytes))
        left_bytes -= choice.device_bytes
    return placements


def _shares(peers: Sequence[Choices], room_bytes: int) -> dict[Choices, int]:
    """Even shares: none gets more than another that could use more."""
    if len(peers) == 1:
        return {peers[0]: room_bytes}
    needs = {peer: peer.need(room_bytes) for peer in peers}
    shares = {}
    for done, peer in enumerate(sorted(peers, key=needs.__getitem__)):
        shares[peer] = min(needs[peer], room_bytes // (len(peers) - done))
        room_bytes -= shares[peer]
    return shares


def _explained(choices: Choices, choice: Choice, room_bytes: int) -> Placement:
    after = choices.at(choice.step + 1, choice.rung) if choice.step < choices.top else None
    next_bytes = None if after is None else after.device_bytes - choice.device_bytes
    reason = reasons.reason(choices, choice, room_bytes, next_bytes)
    return _placement(choices, choice, reason, next_bytes)


def _placement(
    choices: Choices, choice: Choice, reason: str, next_bytes: int | None = None
) -> Placement:
    demand = choices.demand
    return Placement(
        service=demand.service,
        model=demand.model,
        layers=demand.layers,
        options=choice.options,
        price=choice.price,
        reason=reason,
        next_bytes=next_bytes,
    )


def _plan_without_card(ranked: Sequence[Choices], no_card: str) -> Plan:
    """Whoever may goes to the CPU; what the operator fixed is left as it is."""
    placements = []
    refusal = ""
    for each in ranked:
        if Knob.GPU_LAYERS in each.demand.knobs:
            choice = Choices(_eased(each.demand)).at(0, 0)
        else:
            choice = each.at(each.top, 0)
        if choice is not None:
            placements.append(_placement(each, choice, reasons.without_card(each.demand)))
        else:
            refusal = refusal or f"{each.demand.service}: {each.trouble}"
    return Plan(tuple(placements), None, refusal, no_card=no_card)
