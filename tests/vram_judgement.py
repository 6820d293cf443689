"""How far an estimate may be from what was measured. MiB."""

from collections.abc import Callable, Iterable

from llmsup.core.estimate import estimate
from llmsup.core.shape import ModelShape
from tests.vram_cells import Cell

MIB = 1024 * 1024
BUFFER_MAX_MIB = 0.1
TYPICAL_P95_MIB, TYPICAL_MAX_MIB, TYPICAL_UNDER_MIB = 16.0, 64.0, 32.0


def is_typical(cell: Cell) -> bool:
    return cell.options.flash_attn == "auto" and cell.options.ubatch == 512


def errors(cell: Cell, shape: ModelShape) -> tuple[float, float, float]:
    """Estimated less measured, of weights, cache and the total."""
    device = estimate(shape, cell.options).device
    weights = device.weights_bytes / MIB - cell.weights_mib
    cache = device.kv_cache_bytes / MIB - cell.kv_cache_mib
    return weights, cache, device.total_bytes / MIB - cell.total_mib


def judge(cells: Iterable[Cell], shape_of: Callable[[str], ModelShape]) -> list[float]:
    """Asserts what must hold of every cell; gives the errors of the typical totals."""
    typical = []
    for cell in cells:
        weights, cache, total = errors(cell, shape_of(cell.model))
        assert abs(weights) <= BUFFER_MAX_MIB, (cell, weights)
        assert abs(cache) <= BUFFER_MAX_MIB, (cell, cache)
        if is_typical(cell):
            assert -TYPICAL_UNDER_MIB <= total <= TYPICAL_MAX_MIB, (cell, total)
            typical.append(total)
    return typical


def share_within(totals: list[float], limit_mib: float) -> float:
    return sum(abs(each) <= limit_mib for each in totals) / len(totals)
