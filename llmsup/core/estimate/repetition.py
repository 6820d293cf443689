"""Which layers have to be in the graph. A buffer is as large for 4 equal layers as for 40.

The allocator takes and gives back the same for each of a run of equal layers, and is where it
was before from the second or third one on; so the middle of a run is left out. The first ones
stay, and the last ones, since some inputs of the graph last until their last use. Of some 7000
random loads, ten came out otherwise than with all layers, by 12 MiB at most.
"""

from llmsup.core.estimate.effective import Effective
from llmsup.core.estimate.weights import expert_is_on_card
from llmsup.core.shape import Block, ModelShape

_PERIOD_MAX = 8
_KEPT_FIRST = 2
_KEPT_ROUNDS = 2

Key = tuple[object, ...]


def layers_that_count(shape: ModelShape, options: Effective) -> list[int]:
    """The numbers of layers that give the same peak as all of them."""
    if _leaves_holes(shape, options):
        return list(range(shape.trunk))
    keys = [_key(shape, number, options) for number in range(shape.trunk)]
    sees_windows = _sees_windows(shape, options)
    chosen: list[int] = []
    at = 0
    while at < len(keys):
        period, rounds = _repetition(keys, at)
        end = at + period * rounds
        if period == 1:
            last = 1 if sees_windows else _last_of_each_window(shape.blocks, at, end)
            chosen += range(at, min(at + _KEPT_FIRST, end))
            chosen += range(max(at + _KEPT_FIRST, end - last), end)
        else:
            chosen += range(at, at + period * min(rounds, _KEPT_ROUNDS))
        at = end
    if chosen and chosen[-1] != shape.trunk - 1:
        chosen[-1] = shape.trunk - 1
    return chosen


def _leaves_holes(shape: ModelShape, options: Effective) -> bool:
    """Whether equal layers may leave the allocator in another state each time."""
    if shape.traits.recurrence in ("all", "beside") or shape.traits.has_streams:
        return True
    is_whole = options.first_block == 0 and not options.n_cpu_moe
    return not options.kv_offload or not (options.flash_attn or is_whole)


def _key(shape: ModelShape, number: int, options: Effective) -> Key:
    structure, exact = shape.kinds[number]
    block = shape.blocks[number]
    on_card = options.on_card(number)
    experts_on_card = expert_is_on_card(number, options)
    is_whole = on_card and (experts_on_card or not block.has_experts)
    window = block.window if _sees_windows(shape, options) or not on_card else 0
    turns = shape.traits.rope == "not each 4th" and number % 4 == 3
    return structure, 0 if is_whole else exact, on_card, experts_on_card, window, turns


def _sees_windows(shape: ModelShape, options: Effective) -> bool:
    """Whether a window makes a difference for a layer whose cache is on the card."""
    if shape.traits.rope == "sliding" or not options.flash_attn or not options.kv_offload:
        return True
    return options.k_type != 1 or options.v_type != 1


def _repetition(keys: list[Key], at: int) -> tuple[int, int]:
    """The period that repeats from `at` on, and how often; (1, 1) where nothing does."""
    for period in range(1, _PERIOD_MAX + 1):
        pattern = keys[at : at + period]
        end = at + period
        while keys[end : end + period] == pattern:
            end += period
        rounds = (end - at) // period
        if rounds > (_KEPT_FIRST if period == 1 else _KEPT_ROUNDS):
            return period, rounds
    return 1, 1


def _last_of_each_window(blocks: tuple[Block, ...], begin: int, end: int) -> int:
    """How many layers of a run, counted from its end, have a layer of each of its windows."""
    missing = {block.window for block in blocks[begin:end]}
    count = 0
    while missing:
        count += 1
        missing.discard(blocks[end - count].window)
    return max(1, count)
