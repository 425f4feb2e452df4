"""Backward kernels of attention.

    p  = exp2(s * scale * log2(e) - lse)         s = q k^T
    ds = p * (do v^T - delta)                    delta = sum over columns of do * o
    dq = scale * ds k       dk = scale * ds^T q       dv = p^T do

Probabilities are computed again from q, k and lse. `dq` of a tile of queries is a sum over keys, `dk` and `dv` of a
tile of keys are sums over queries: each has its own walk (`_attention_gradients`), so that a program owns what it
writes, there are no atomics, and the same input gives the same bits.

`short_backward_kernel` does both walks for the heads that share one k and v in one program: what the second walk reads
is in L2, delta is computed on the way, and there is one launch. Long sequences and few heads take one program a tile:
`query_gradient_kernel`, which computes and stores delta, then `key_gradient_kernel`.

`stride_x` below are (batch, head, row), in units of `FORM.unit` elements.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._attention_gradients import key_gradient, key_gradient_rest, query_gradient, query_gradient_rest
from ._attention_tiles import UNSPECIALIZED, head_view


@triton.jit(do_not_specialize=UNSPECIALIZED)
def query_gradient_kernel(
    q_ptr,  # [B, H, n_q, D]; [total, H, D] with cu_seqlens
    k_ptr,  # [B, H / group, n_k, D]
    v_ptr,  # [B, H / group, n_k, D]
    mask_ptr,  # [B, H, n_q, n_k] uint8 (1 attends) or added to the scores, or None
    out_ptr,  # [B, H, n_q, D]
    do_ptr,  # [B, H, n_q, D]
    lse_ptr,  # [B, H, n_q] float32 contiguous, or two planes of it for an additive mask; [H, total] with cu_seqlens
    delta_ptr,  # [B, H, n_q] float32, written; [H, total] with cu_seqlens
    dq_ptr,  # [B, H, n_q, D], written
    cu_q_ptr,  # [B + 1] int32 first rows of the sequences, or None: all have n_q and n_k rows
    cu_k_ptr,
    stride_q,
    stride_k,
    stride_v,
    stride_o,
    stride_do,
    stride_dq,
    stride_mask,  # (batch, head, query, key)
    stride_lse,  # of planes; with cu_seqlens of heads
    tiles,  # programs a head
    heads,
    group,
    n_q,
    n_k,
    scale,  # times log2(e)
    grad_scale,
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,  # or 0: there is no full tile
    REST_ROWS: tl.constexpr,  # tiles for what is left of n_q beside tiles of BLOCK
    STEP: tl.constexpr,
    REST: tl.constexpr,  # tiles for what is left of n_k beside tiles of STEP
):
    index = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    batch = (index // heads).to(tl.int64)
    head = (index % heads).to(tl.int64)
    row = index.to(tl.int64) * n_q
    first_q = row * 0
    first_k = row * 0
    offset = 0
    if cu_q_ptr is not None:
        first_q += tl.load(cu_q_ptr + batch)
        first_k += tl.load(cu_k_ptr + batch)
        n_q = (tl.load(cu_q_ptr + batch + 1) - first_q).to(tl.int32)
        n_k = (tl.load(cu_k_ptr + batch + 1) - first_k).to(tl.int32)
        offset = n_k - n_q
        row = head * stride_lse + first_q
        batch = batch * 0
    q = head_view(q_ptr, stride_q, batch, head, first_q, FORM)
    k = head_view(k_ptr, stride_k, batch, head // group, first_k, FORM)
    v = head_view(v_ptr, stride_v, batch, head // group, first_k, FORM)
    out = head_view(out_ptr, stride_o, batch, head, first_q, FORM)
    do = head_view(do_ptr, stride_do, batch, head, first_q, FORM)
    dq = head_view(dq_ptr, stride_dq, batch, head, first_q, FORM)
    if mask_ptr is not None:
        mask_ptr += batch * stride_mask[0] + head * stride_mask[1]
    mask = (mask_ptr, stride_mask[2], stride_mask[3])
    size = (n_q, n_k, offset)
    lse = (lse_ptr + row, stride_lse)
    delta = delta_ptr + row
    count = 0
    if BLOCK > 0:
        count = tl.cdiv(n_q, BLOCK) if FORM.ragged else n_q // BLOCK
        if tile < count:
            query_gradient(
                q, k, v, out, do, dq, lse, delta, tile * BLOCK, scale, grad_scale, mask, size, FORM, BLOCK, FORM.ragged,
                STEP, REST,
            )  # fmt: skip
    for j in tl.static_range(len(REST_ROWS)):
        if tile == count + j:
            query_gradient_rest(
                q, k, v, out, do, dq, lse, delta, count * BLOCK, scale, grad_scale, mask, size, FORM, REST_ROWS, j,
                STEP, REST,
            )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def key_gradient_kernel(
    q_ptr,  # [B, H, n_q, D]; [total, H, D] with cu_seqlens
    k_ptr,  # [B, H / group, n_k, D]
    v_ptr,  # [B, H / group, n_k, D]
    mask_ptr,  # [B, H, n_q, n_k] uint8 (1 attends) or added to the scores, or None
    do_ptr,  # [B, H, n_q, D]
    lse_ptr,  # [B, H, n_q] float32 contiguous, or two planes of it for an additive mask; [H, total] with cu_seqlens
    delta_ptr,  # [B, H, n_q] float32; [H, total] with cu_seqlens
    dk_ptr,  # [B, H / group, n_k, D], written
    dv_ptr,  # [B, H / group, n_k, D], written
    cu_q_ptr,  # [B + 1] int32 first rows of the sequences, or None: all have n_q and n_k rows
    cu_k_ptr,
    stride_q,
    stride_k,
    stride_v,
    stride_do,
    stride_dk,
    stride_dv,
    stride_mask,  # (batch, head, query, key)
    stride_lse,  # of planes; with cu_seqlens of heads
    tiles,  # programs a head
    heads,
    group,
    n_q,
    n_k,
    scale,  # times log2(e)
    grad_scale,
    FORM: tl.constexpr,
    WANTED: tl.constexpr,  # "both", "dk" or "dv": wide heads leave no registers for both
    BLOCK: tl.constexpr,  # or 0: there is no full tile
    REST_ROWS: tl.constexpr,  # tiles for what is left of n_k beside tiles of BLOCK
    STEP: tl.constexpr,
    REST: tl.constexpr,  # tiles for what is left of n_q beside tiles of STEP
):
    kv_heads = heads // group
    index = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    batch = (index // kv_heads).to(tl.int64)
    kv_head = (index % kv_heads).to(tl.int64)
    head = kv_head * group
    row = (batch * heads + head) * n_q
    lse_step = n_q
    first_q = row * 0
    first_k = row * 0
    offset = 0
    if cu_q_ptr is not None:
        first_q += tl.load(cu_q_ptr + batch)
        first_k += tl.load(cu_k_ptr + batch)
        n_q = (tl.load(cu_q_ptr + batch + 1) - first_q).to(tl.int32)
        n_k = (tl.load(cu_k_ptr + batch + 1) - first_k).to(tl.int32)
        offset = n_k - n_q
        row = head * stride_lse + first_q
        lse_step = stride_lse
        batch = batch * 0
    q = head_view(q_ptr, stride_q, batch, head, first_q, FORM)
    k = head_view(k_ptr, stride_k, batch, kv_head, first_k, FORM)
    v = head_view(v_ptr, stride_v, batch, kv_head, first_k, FORM)
    do = head_view(do_ptr, stride_do, batch, head, first_q, FORM)
    dk = head_view(dk_ptr, stride_dk, batch, kv_head, first_k, FORM)
    dv = head_view(dv_ptr, stride_dv, batch, kv_head, first_k, FORM)
    if mask_ptr is not None:
        mask_ptr += batch * stride_mask[0] + head * stride_mask[1]
    mask = (mask_ptr, stride_mask[2], stride_mask[3])
    size = (n_q, n_k, offset)
    lse = (lse_ptr + row, stride_lse, lse_step)
    delta = delta_ptr + row
    q_step = stride_q[1] * FORM.unit
    do_step = stride_do[1] * FORM.unit
    count = 0
    if BLOCK > 0:
        count = tl.cdiv(n_k, BLOCK) if FORM.ragged else n_k // BLOCK
        if tile < count:
            key_gradient(
                q, k, v, do, dk, dv, lse, delta, tile * BLOCK, q_step, do_step, stride_mask[1], group, scale,
                grad_scale, mask, size, FORM, WANTED, BLOCK, FORM.ragged, STEP, REST,
            )  # fmt: skip
    for j in tl.static_range(len(REST_ROWS)):
        if tile == count + j:
            key_gradient_rest(
                q, k, v, do, dk, dv, lse, delta, count * BLOCK, q_step, do_step, stride_mask[1], group, scale,
                grad_scale, mask, size, FORM, WANTED, REST_ROWS, j, STEP, REST,
            )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def short_backward_kernel(
    q_ptr,  # [B, H, n_q, D]
    k_ptr,  # [B, H / group, n_k, D]
    v_ptr,  # [B, H / group, n_k, D]
    mask_ptr,  # [B, H, n_q, n_k] uint8 (1 attends) or added to the scores, or None
    out_ptr,  # [B, H, n_q, D]
    do_ptr,  # [B, H, n_q, D]
    lse_ptr,  # [B, H, n_q] float32 contiguous, or two planes of it for an additive mask
    delta_ptr,  # [B, H, n_q] float32, written
    dq_ptr,  # [B, H, n_q, D], written
    dk_ptr,  # [B, H / group, n_k, D], written
    dv_ptr,  # [B, H / group, n_k, D], written
    stride_q,
    stride_k,
    stride_v,
    stride_o,
    stride_do,
    stride_dq,
    stride_dk,
    stride_dv,
    stride_mask,  # (batch, head, query, key)
    stride_lse,  # of planes
    heads,
    group,
    n_q,
    n_k,
    scale,  # times log2(e)
    grad_scale,
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,  # or 0: there is no full tile
    REST_M: tl.constexpr,  # tiles for what is left of n_q beside tiles of BLOCK
    REST_N: tl.constexpr,
    STEP: tl.constexpr,
    REST_STEP_M: tl.constexpr,  # the same beside tiles of STEP
    REST_STEP_N: tl.constexpr,
):
    kv_heads = heads // group
    batch = (tl.program_id(0) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    k = head_view(k_ptr, stride_k, batch, kv_head, 0, FORM)
    v = head_view(v_ptr, stride_v, batch, kv_head, 0, FORM)
    dk = head_view(dk_ptr, stride_dk, batch, kv_head, 0, FORM)
    dv = head_view(dv_ptr, stride_dv, batch, kv_head, 0, FORM)
    size = (n_q, n_k, 0)
    head = kv_head * group
    full = 0
    if BLOCK > 0:
        full = n_q // BLOCK * BLOCK
    for member in tl.range(group, num_stages=1):
        row = (batch * heads + head + member) * n_q
        q = head_view(q_ptr, stride_q, batch, head + member, 0, FORM)
        out = head_view(out_ptr, stride_o, batch, head + member, 0, FORM)
        do = head_view(do_ptr, stride_do, batch, head + member, 0, FORM)
        dq = head_view(dq_ptr, stride_dq, batch, head + member, 0, FORM)
        lse = (lse_ptr + row, stride_lse)
        mask = (mask_ptr, stride_mask[2], stride_mask[3])
        if mask_ptr is not None:
            member_ptr = mask_ptr + batch * stride_mask[0] + (head + member) * stride_mask[1]
            mask = (member_ptr, stride_mask[2], stride_mask[3])
        if BLOCK > 0:
            for start in tl.range(0, full, BLOCK, num_stages=1):
                query_gradient(
                    q, k, v, out, do, dq, lse, delta_ptr + row, start, scale, grad_scale, mask, size, FORM, BLOCK,
                    False, STEP, REST_STEP_N,
                )  # fmt: skip
        for j in tl.static_range(len(REST_M)):
            query_gradient_rest(
                q, k, v, out, do, dq, lse, delta_ptr + row, full, scale, grad_scale, mask, size, FORM, REST_M, j, STEP,
                REST_STEP_N,
            )  # fmt: skip
    tl.debug_barrier()  # delta is written by other threads of this program
    row = (batch * heads + head) * n_q
    q = head_view(q_ptr, stride_q, batch, head, 0, FORM)
    do = head_view(do_ptr, stride_do, batch, head, 0, FORM)
    lse = (lse_ptr + row, stride_lse, n_q)
    if mask_ptr is not None:
        mask_ptr += batch * stride_mask[0] + head * stride_mask[1]
    mask = (mask_ptr, stride_mask[2], stride_mask[3])
    q_step = stride_q[1] * FORM.unit
    do_step = stride_do[1] * FORM.unit
    if BLOCK > 0:
        full = n_k // BLOCK * BLOCK
        for start in tl.range(0, full, BLOCK, num_stages=1):
            key_gradient(
                q, k, v, do, dk, dv, lse, delta_ptr + row, start, q_step, do_step, stride_mask[1], group, scale,
                grad_scale, mask, size, FORM, "both", BLOCK, False, STEP, REST_STEP_M,
            )  # fmt: skip
    for j in tl.static_range(len(REST_N)):
        key_gradient_rest(
            q, k, v, do, dk, dv, lse, delta_ptr + row, full, q_step, do_step, stride_mask[1], group, scale, grad_scale,
            mask, size, FORM, "both", REST_N, j, STEP, REST_STEP_M,
        )  # fmt: skip
