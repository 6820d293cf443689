"""How CUDA orders a split anew, to compute the shared expert together with the routed ones."""

from llmsup.core.estimate.graph import CARD, Tensor
from llmsup.core.estimate.splits import Split
from llmsup.core.ggml import TYPES

_ROUTED = ("mul_mat_id", "mul_mat_id", "glu")
_SHARED = ("mul_mat", "mul_mat", "glu")


def group_shared_experts(splits: list[Split], kept: dict[Tensor, list[Tensor]]) -> None:
    """Moves the shared expert up to the routed ones where one kernel does both.

    What the routed ones read lasts until both are done.
    """
    for each in splits:
        if each.backend != CARD:
            continue
        steps = each.steps
        at = 0
        while at + 5 < len(steps):
            if steps[at][0].op != _ROUTED[0]:
                at += 1
                continue
            shared = _shared_at(steps, at) if _is(steps, at, _ROUTED) else None
            if shared is None:
                at += 1
                continue
            steps[at + 3 : shared + 3] = steps[shared : shared + 3] + steps[at + 3 : shared]
            up = steps[at + 2][0].srcs[1]
            kept.setdefault(steps[at + 5][0], []).extend(up.srcs[1:3])
            at += 6


def _is(steps: list[tuple[Tensor, tuple[Tensor, ...]]], at: int, ops: tuple[str, ...]) -> bool:
    return all(
        at + number < len(steps) and steps[at + number][0].op == op for number, op in enumerate(ops)
    )


def _shared_at(steps: list[tuple[Tensor, tuple[Tensor, ...]]], routed: int) -> int | None:
    for at in range(routed + 3, len(steps) - 2):
        if _is(steps, at, _ROUTED[:2]):
            return None
        if _is(steps, at, _SHARED) and _are_alike(steps[routed + 2][0], steps[at + 2][0]):
            return at
    return None


def _are_alike(routed: Tensor, shared: Tensor) -> bool:
    if len(routed.srcs) != 2 or len(shared.srcs) != 2:
        return False
    up, shared_up = routed.srcs[1], shared.srcs[1]
    if up.op != "mul_mat_id" or shared_up.op != "mul_mat":
        return False
    matrix, shared_matrix = up.srcs[0], shared_up.srcs[0]
    return (
        matrix.home == CARD
        and matrix.type_id == shared_matrix.type_id
        and matrix.type_id in TYPES
        and TYPES[matrix.type_id].block > 1
        and matrix.shape[:2] == shared_matrix.shape[:2]
        and up.srcs[1].srcs[:1] == shared_up.srcs[1:2]
    )
