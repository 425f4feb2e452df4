"""Few queries on many keys: the keys of a head are split over programs, whose parts a second kernel puts together.

One token of a decoder, or 32 queries of a Q-Former on a large image, give one small tile of rows a head: too few
programs to pull keys and values through the memory bus. Here a program has a part of the keys, and writes the maximum,
the sum and the unnormalised output of its part in float32; the parts are added in a fixed order. Heads that share one
k and v share a program, so those are read once: row r is query r % n_q of the r // n_q-th head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._attention_tiles import (
    UNSPECIALIZED,
    accumulate,
    head_view,
    hide,
    load_head,
    product,
    rescaled,
    store_head,
    store_lse,
    zero_head,
)

MAX_ROWS = 64
"""Rows of one program: queries times the heads that share k and v."""


@triton.jit(do_not_specialize=UNSPECIALIZED)
def split_forward_kernel(
    q_ptr,  # [B, H, n_q, D]
    k_ptr,  # [B, H / group, n_k, D]
    v_ptr,  # [B, H / group, n_k, D]
    mask_ptr,  # [B, H, n_q, n_k] uint8 (1 attends) or added to the scores, or None
    part_ptr,  # [B * H / group, splits, group * n_q, D] float32, written
    stats_ptr,  # [B * H / group, splits, 2, group * n_q] float32: maximum and sum, written
    stride_q,  # of (batch, head, row), in units of FORM.unit elements; so are stride_k and stride_v
    stride_k,
    stride_v,
    stride_mask,  # of (batch, head, query, key)
    tiles,  # splits
    heads,
    group,
    n_q,
    n_k,
    keys_a_split,  # a multiple of BLOCK_N
    scale,  # times log2(e)
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    kv_heads = heads // group
    index = tl.program_id(0) // tiles
    split = tl.program_id(0) % tiles
    batch = (index // kv_heads).to(tl.int64)
    kv_head = (index % kv_heads).to(tl.int64)
    rows = tl.arange(0, ROWS)
    count = group * n_q
    member = rows // n_q
    q_pos = rows % n_q
    k_view = head_view(k_ptr, stride_k, batch, kv_head, 0, FORM)
    v_view = head_view(v_ptr, stride_v, batch, kv_head, 0, FORM)
    q_start = head_view(q_ptr, stride_q, batch, kv_head * group, 0, FORM)[0]
    starts = (member.to(tl.int64) * stride_q[1] + q_pos * stride_q[2]) * FORM.unit
    q = load_head((q_start + starts[:, None], 0), rows, count, FORM, True)
    if mask_ptr is not None:
        mask_ptr += batch * stride_mask[0] + (kv_head * group + member)[:, None] * stride_mask[1]
    mask = (mask_ptr, stride_mask[2], stride_mask[3])
    size = (tl.where(rows < count, n_q, 0)[:, None], n_k, 0)  # no mask is read for a row beyond the last
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = zero_head(ROWS, FORM)
    begin = split * keys_a_split
    end = tl.minimum(begin + keys_a_split, n_k)
    for first in tl.range(begin, end, BLOCK_N, num_stages=FORM.stages):
        keys = first + tl.arange(0, BLOCK_N)
        k = load_head(k_view, keys, n_k, FORM, True)
        s = product(q, k, FORM)  # [ROWS, BLOCK_N]
        s, factor = hide(s, scale, q_pos[:, None], keys[None, :], mask, size, FORM, True)
        higher = tl.maximum(highest, tl.max(s, axis=1) * factor)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(s * factor - shift[:, None])
        alpha = tl.exp2(highest - shift)
        v = load_head(v_view, keys, n_k, FORM, True)
        acc = accumulate(rescaled(acc, alpha, FORM), p, v, FORM)
        total = total * alpha + tl.sum(p, axis=1)
        highest = higher
    slot = tl.program_id(0).to(tl.int64)
    WIDTH: tl.constexpr = FORM.head_dim
    store_head((part_ptr + slot * count * WIDTH, WIDTH), acc, 1.0, rows, count, FORM, True)
    stats = stats_ptr + slot * 2 * count + rows
    tl.store(stats, highest, mask=rows < count)
    tl.store(stats + count, total, mask=rows < count)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def combine_kernel(
    part_ptr,  # [B * H / group, splits, group * n_q, D] float32
    stats_ptr,  # [B * H / group, splits, 2, group * n_q] float32
    out_ptr,  # [B, H, n_q, D]
    lse_ptr,  # [B, H, n_q] float32 contiguous, or two planes of it for an additive mask
    stride_o,  # of (batch, head, row), in units of FORM.unit elements
    stride_lse,  # of planes
    tiles,  # splits
    heads,
    group,
    n_q,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
):
    kv_heads = heads // group
    index = tl.program_id(0).to(tl.int64)
    batch = index // kv_heads
    kv_head = index % kv_heads
    rows = tl.arange(0, ROWS)
    count = group * n_q
    inside = rows < count
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = zero_head(ROWS, FORM)
    WIDTH: tl.constexpr = FORM.head_dim
    for split in range(tiles):
        slot = index * tiles + split
        stats = stats_ptr + slot * 2 * count + rows
        part_highest = tl.load(stats, mask=inside, other=float("-inf"))
        part_total = tl.load(stats + count, mask=inside, other=0.0)
        higher = tl.maximum(highest, part_highest)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        before = tl.exp2(highest - shift)
        weight = tl.exp2(part_highest - shift)
        part = load_head((part_ptr + slot * count * WIDTH, WIDTH), rows, count, FORM, True)
        acc = _added(rescaled(acc, before, FORM), part, weight, FORM)
        total = total * before + part_total * weight
        highest = higher
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    starts = ((rows // n_q).to(tl.int64) * stride_o[1] + (rows % n_q) * stride_o[2]) * FORM.unit
    start = head_view(out_ptr, stride_o, batch, kv_head * group, 0, FORM)[0]
    store_head((start + starts[:, None], 0), acc, inverse[:, None], rows, count, FORM, True)
    store_lse((lse_ptr + (batch * heads + kv_head * group) * n_q, stride_lse), rows, count, shift, total, FORM)


@triton.jit
def _added(acc, part, weight, FORM: tl.constexpr):
    """`acc + part * weight`, with one weight a row."""
    out = ()
    for i in tl.static_range(len(FORM.pieces)):
        out = out + (acc[i] + part[i] * weight[:, None],)
    return out
