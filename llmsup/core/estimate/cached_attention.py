"""Attention through the cache: keys and values are written, and all that is there is read."""

from dataclasses import dataclass
from math import prod

from llmsup.core.estimate.builder import Builder
from llmsup.core.estimate.graph import (
    CARD,
    HOST,
    Tensor,
    cache,
    converted,
    matmul,
    op,
    same,
    view,
    written,
)
from llmsup.core.estimate.kv_cache import row_bytes, widths
from llmsup.core.ggml import TYPES

_F16_ID = 1
_F16, _F32 = 2, 4
_ROW_ELEMENTS = 512


@dataclass(frozen=True, slots=True)
class Asked:
    """Queries, and the keys and values to write first; those of an earlier layer serve without.

    `v_mla` makes values of what latent attention keeps.
    """

    q: Tensor
    k: Tensor | None
    v: Tensor | None
    v_mla: Tensor | None = None
    sinks: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Found:
    """Queries, and the cache as attention reads it; `shown` are the mask and the sinks."""

    q: Tensor
    k: Tensor
    v: Tensor
    shown: tuple[Tensor, ...]
    v_mla: Tensor | None


def mask(b: Builder, cells: int) -> Tensor:
    """Who may see whom, one input for all layers with a window and one for the others."""
    width = _F16 if b.options.flash_attn else _F32
    return b.input("mask_swa" if b.block.window else "mask", width * cells * b.tokens)


def from_cache(b: Builder, asked: Asked) -> Tensor:
    """Writes keys and values to the cache, and attends to all that is in it."""
    k, v = asked.k, asked.v
    block, options = b.block, b.options
    cells = options.window_cells(block.window)
    rows = cells * options.streams
    home = CARD if options.kv_offload and options.on_card(b.cache_owner) else HOST
    key_width, value_width = widths(b.shape, block)
    k_bytes = row_bytes(options.k_type, key_width) * rows
    k_cache = cache(k_bytes, home)
    if k is not None:
        _store(b, "k", view(k, (key_width, b.tokens)), k_cache, 8 * b.tokens)
    k_view = view(k_cache, (), k_bytes + _padding(options.k_type, block.key_length))
    if asked.v_mla is None:
        v_bytes = row_bytes(options.v_type, value_width) * rows
        v_cache = cache(v_bytes, home)
        if v is not None and options.turns_values:
            _store_turned(b, v, v_cache, value_width)
        elif v is not None:
            _store(b, "v", view(v, (value_width, b.tokens)), v_cache, 8 * b.tokens)
        v_view = view(v_cache, (), v_bytes + _padding(options.v_type, block.value_length))
    else:
        rank = int(b.shape.number("attention.kv_lora_rank")) or block.value_length
        unused = row_bytes(options.k_type, key_width) - row_bytes(options.k_type, rank)
        v_view = view(k_view, (), k_bytes - unused + _padding(options.k_type, rank))
    shown = (mask(b, cells),) if asked.sinks is None else (mask(b, cells), asked.sinks)
    found = _Found(
        q=view(view(asked.q, asked.q.shape), asked.q.shape),
        k=view(k_view, (), k_view.size),
        v=view(v_view, (), v_view.size),
        shown=shown,
        v_mla=asked.v_mla,
    )
    return _flash(b, found, rows) if options.flash_attn else _plain(b, found, cells)


def _store(b: Builder, name: str, rows: Tensor, into: Tensor, ids_bytes: int) -> None:
    sliding = "_swa" if b.block.window else ""
    ids = b.input(f"{name}_idxs{sliding}", ids_bytes)
    b.graph.expand(written("set_rows", into, rows, ids))


def _store_turned(b: Builder, v: Tensor, into: Tensor, width: int) -> None:
    """Values that lie column by column: each element has a row of its own."""
    if v.root is not None and prod(v.root.shape) != prod(v.shape):
        v = op("cont", (width, b.tokens), v)
    widest = max(widths(b.shape, each)[1] for each in b.shape.blocks)
    rows = view(view(v, (width, b.tokens)), (1, width * b.tokens))
    _store(b, "v", rows, into, 8 * b.tokens * widest)


def _flash(b: Builder, found: _Found, rows: int) -> Tensor:
    block, options, tokens, v_mla = b.block, b.options, b.tokens, found.v_mla
    heads, kv_heads, value = block.heads, block.kv_heads, block.value_length
    v_type = options.v_type
    if v_mla is not None:
        kv_heads, v_type = 1, options.k_type
        value = int(b.shape.number("attention.kv_lora_rank")) or value
    cur = op("flash_attn", (value, heads, tokens), found.q, found.k, found.v, *found.shown)
    cur.host_only = not options.has_kernel
    # Room for keys and values as half floats. Where the cache is on the card, MLA's are one.
    if options.k_type != _F16_ID and options.has_kernel:
        cur.size += -cur.size % 128 + _F16 * block.key_length * kv_heads * rows
    if v_type != _F16_ID and options.has_kernel and (v_mla is None or found.k.home == HOST):
        cur.size += -cur.size % 128 + _F16 * value * kv_heads * rows
    if v_mla is not None:
        width = v_mla.shape[1]
        cur = matmul(v_mla, view(cur, (value, tokens, heads)), width)
        cur = op("cont", (width, heads, tokens), view(cur, (width, heads, tokens)))
        value = width
    return view(cur, (value * heads, tokens))


def _plain(b: Builder, found: _Found, cells: int) -> Tensor:
    """Without flash attention the scores of all tokens and heads are alive at once."""
    options, heads, value = b.options, b.block.heads, b.block.value_length
    streams, tokens = options.streams, b.tokens // options.streams
    v, v_mla = found.v, found.v_mla
    kq = op("mul_mat", (cells, tokens, heads, streams), found.k, found.q)
    kq = _capped(b, kq)
    kq = same("soft_max", kq, *found.shown)
    if v_mla is not None:
        value = int(b.shape.number("attention.kv_lora_rank")) or value
        size = row_bytes(options.k_type, value) * cells * streams
        v = converted("cont", size, view(v, (), v.size))
    elif not options.turns_values:
        size = row_bytes(options.v_type, value * b.block.kv_heads) * cells * streams
        v = converted("cont", size, view(v, (), v.size))
    kqv = op("mul_mat", (value, tokens, heads, streams), v, kq)
    if v_mla is not None:
        value = v_mla.shape[1]
        kqv = matmul(v_mla, kqv, value)
    cur = op("cont", (value * heads, b.tokens), view(kqv, kqv.shape))
    if not options.kv_offload:
        cur.pinned = HOST
    return cur


def _capped(b: Builder, scores: Tensor) -> Tensor:
    if b.shape.number("attn_logit_softcapping"):
        return same("scale", same("unary", same("scale", scores)))
    return scores


def _padding(type_id: int, width: int) -> int:
    if TYPES[type_id].block == 1 or width % _ROW_ELEMENTS == 0:
        return 0
    return row_bytes(type_id, -width % _ROW_ELEMENTS)
