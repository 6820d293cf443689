"""A plan as text for a person. Pure: a plan and a width in, lines out. Sizes are in MiB."""

import textwrap
from collections.abc import Iterator, Sequence

from llmsup.cli.card_bar import bar, free, mib, taken
from llmsup.cli.render import cleaned, model_name
from llmsup.cli.table import Column, Row, cut, fitted, painted, table
from llmsup.core.options import Options
from llmsup.core.plan import Budget, Placement, Plan
from llmsup.core.sizes import Basis, Estimate, Item

WORDS_WIDTH = 100
MODEL_MIN_WIDTH = 12
_BOLD = "1"
_RED = "31"
_YELLOW = "33"
_ASCII = str.maketrans({"█": "#", "▓": "=", "░": ".", "▒": "-", "·": "|", "×": "x", "…": "~"})

_COLUMNS = (
    Column("SERVICE"),
    Column("MODEL"),
    Column("LAYERS", is_number=True),
    Column("EXPERTS", is_number=True),
    Column("CONTEXT", is_number=True),
    Column("CACHE"),
    Column("WEIGHTS", is_number=True),
    Column("KV", is_number=True),
    Column("COMPUTE", is_number=True),
    Column("OVERHEAD", is_number=True),
    Column("TOTAL", is_number=True),
    Column("HOST", is_number=True),
)
_SERVICE, _MODEL, _LAYERS, _EXPERTS, _CONTEXT, _CACHE = range(6)
_WEIGHTS, _KV, _COMPUTE, _OVERHEAD, _TOTAL, _HOST = range(6, 12)
_DISPENSABLE = (_OVERHEAD, _CACHE, _COMPUTE, _KV, _WEIGHTS, _HOST, _CONTEXT)
"""What a narrow terminal does without, in this order."""
_SIDES = (Column("CARD", is_number=True), Column("HOST", is_number=True))


def text(
    plan: Plan, *, width: int | None = None, colour: bool = False, is_verbose: bool = False
) -> str:
    """`llmsup plan`: the card, its bar, the table, and why each service got what it got."""
    words_width = min(width or WORDS_WIDTH, WORDS_WIDTH)
    blocks = [_card(plan, width, colour)]
    if plan.placements:
        blocks.append(_table(plan, width, colour))
        if plan.budget is not None:
            blocks.append(_wrapped(list(_reasons(plan)), words_width))
    if notes := [f"note: {note}" for note in _notes(plan)]:
        blocks.append(_wrapped(notes, words_width))
    if is_verbose:
        blocks += [_breakdown(each, colour) for each in plan.placements]
    return "\n\n".join("\n".join(lines) for lines in blocks if lines)


def in_ascii(shown: str) -> str:
    """The same for a terminal that knows no more characters; nothing moves."""
    return shown.translate(_ASCII)


def context(options: Options) -> str:
    """Tokens for each slot: "8192", "4×2048", or "4 in 8192" where they share them."""
    if options.parallel == 1:
        return str(options.ctx_size)
    if options.kv_unified:
        return f"{options.parallel} in {options.ctx_size}"
    return f"{options.parallel}×{options.ctx_size // options.parallel}"


def _card(plan: Plan, width: int | None, colour: bool) -> list[str]:
    if plan.budget is None:
        words = f"no GPU: {cleaned(plan.no_card)}; everything runs on the CPU"
        return [painted(words, _YELLOW if colour else "")]
    return [_head(plan.budget), *bar(plan, width=width, colour=colour)]


def _head(budget: Budget) -> str:
    name = cleaned(budget.device_name).removeprefix("NVIDIA ").removeprefix("GeForce ")
    return f"{name} · {mib(budget.total_bytes)} MiB · {free(budget.free_bytes)} free"


def _table(plan: Plan, width: int | None, colour: bool) -> list[str]:
    used = [column for column in range(len(_COLUMNS)) if column not in set(_needless(plan))]
    columns = [_COLUMNS[column] for column in used]
    all_rows = [_row(each, has_card=plan.budget is not None) for each in plan.placements]
    rows = [tuple(row[column] for column in used) for row in all_rows]
    model = used.index(_MODEL)
    shown, limits = fitted(
        columns,
        rows,
        width,
        elastic={model: MODEL_MIN_WIDTH},
        dispensable=[used.index(column) for column in _DISPENSABLE if column in used],
    )
    lines = table(
        [columns[column] for column in shown],
        [tuple(cut(row[column], limits.get(column)) for column in shown) for row in rows],
    )
    if colour:
        lines[0] = painted(lines[0], _BOLD)
        for position, each in enumerate(plan.placements, start=1):
            if each.service in plan.refused:
                lines[position] = painted(lines[position], _RED)
    return lines


def _needless(plan: Plan) -> Iterator[int]:
    """The columns that would say nothing about this plan."""
    if all(each.options.n_cpu_moe == 0 for each in plan.placements):
        yield _EXPERTS
    if plan.budget is None:
        yield from (_LAYERS, _OVERHEAD, _HOST)


def _row(each: Placement, *, has_card: bool) -> Row:
    """The sizes are those of the card; of the host where there is none."""
    options, price = each.options, each.price
    sizes = price.estimate.device if has_card else price.estimate.host
    total_bytes = price.device_bytes if has_card else sizes.total_bytes
    types = dict.fromkeys((options.cache_type_k, options.cache_type_v))
    return (
        each.service,
        model_name(each.model),
        f"{options.gpu_layers} of {each.layers}",
        f"{options.n_cpu_moe} on host" if options.n_cpu_moe else "-",
        context(options),
        "/".join(types),
        _mib(sizes.weights_bytes),
        _mib(sizes.kv_cache_bytes),
        _mib(sizes.compute_bytes),
        _mib(price.overhead_bytes),
        taken(total_bytes) if total_bytes else "-",
        _mib(price.estimate.host.total_bytes),
    )


def _mib(size_bytes: int) -> str:
    return mib(size_bytes) if size_bytes else "-"


def _reasons(plan: Plan) -> Iterator[str]:
    for each in plan.placements:
        if each.reason:
            yield f"{each.service}: {cleaned(each.reason)}"


def _notes(plan: Plan) -> Iterator[str]:
    for each in plan.placements:
        estimate = each.price.estimate
        if estimate.basis is Basis.BOUND and not each.price.is_measured:
            yield f"{each.service}: {estimate.basis.value}"
        yield from (f"{each.service}: {cleaned(note)}" for note in estimate.notes)


def _breakdown(each: Placement, colour: bool) -> list[str]:
    """What one estimate consists of, and what it rests on."""
    price = each.price
    items = () if price.is_measured else price.estimate.items
    items = items or _buffers(price.estimate)
    rows = [
        (f"  {item.what}", _tenths(item.device_bytes), _tenths(item.host_bytes)) for item in items
    ]
    if price.overhead_bytes:
        rows.append(("  driver: context and pools", _tenths(price.overhead_bytes), "-"))
    host_bytes = price.estimate.host.total_bytes
    rows.append(("  total", _tenths(price.device_bytes), _tenths(host_bytes)))
    basis = "as measured at a load before" if price.is_measured else "by estimate"
    columns = (Column(f"{each.service}, {basis}"), *_SIDES)
    head, *lines = table(columns, rows)
    return [painted(head, _BOLD if colour else ""), *lines]


def _buffers(estimate: Estimate) -> tuple[Item, ...]:
    device, host = estimate.device, estimate.host
    return (
        Item("weights", device.weights_bytes, host.weights_bytes),
        Item("KV cache", device.kv_cache_bytes, host.kv_cache_bytes),
        Item("compute buffer", device.compute_bytes, host.compute_bytes),
    )


def _tenths(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.1f}" if size_bytes else "-"


def _wrapped(sentences: Sequence[str], width: int) -> list[str]:
    return [
        line
        for sentence in sentences
        for line in textwrap.wrap(
            sentence, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
    ]
