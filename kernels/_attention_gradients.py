"""The two walks of attention's backward: dq of a tile of queries over the keys, dk and dv of keys over the queries.

The walk over queries computes the scores transposed, k q^T: its two products with p^T and ds^T then take them as they
come out of a product. To transpose such a result on its way into the next product is a pattern that Triton 3.4 and
later are reported to miscompile on Hopper; seven products instead of five is the price.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._attention_tiles import (
    accumulate,
    hide,
    load_head,
    load_lse,
    probabilities,
    product,
    row_dot,
    store_head,
    zero_head,
)


@triton.jit
def query_gradient(
    q_view,
    k_view,
    v_view,
    out_view,
    do_view,
    dq_view,
    lse,
    delta_ptr,
    start,
    scale,
    grad_scale,
    mask,
    size,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    BOUND: tl.constexpr,
    STEP: tl.constexpr,
    REST: tl.constexpr,
):
    """delta and dq of `ROWS` queries from `start`."""
    rows = start + tl.arange(0, ROWS)
    q = load_head(q_view, rows, size[0], FORM, BOUND)
    do = load_head(do_view, rows, size[0], FORM, BOUND)
    shift, log_sum = load_lse(lse, rows, size[0], FORM)
    delta = row_dot(load_head(out_view, rows, size[0], FORM, BOUND), do, FORM)
    tl.store(delta_ptr + rows, delta, mask=rows < size[0])
    dq = zero_head(ROWS, FORM)
    full = 0
    if STEP > 0:
        full = size[1] // STEP * STEP
        end = size[1] if FORM.ragged else full
        if FORM.causal:  # up to the last key that the last row sees
            end = tl.minimum(end, tl.cdiv(tl.maximum(start + ROWS + size[2], 0), STEP) * STEP)
        for first in tl.range(0, end, STEP, num_stages=FORM.stages):
            dq = _dq_step(
                q,
                do,
                shift,
                log_sum,
                delta,
                dq,
                k_view,
                v_view,
                rows,
                first,
                scale,
                mask,
                size,
                FORM,
                STEP,
                FORM.ragged,
            )
    for j in tl.static_range(len(REST)):
        dq = _dq_rest(q, do, shift, log_sum, delta, dq, k_view, v_view, rows, full, scale, mask, size, FORM, REST, j)
    store_head(dq_view, dq, grad_scale, rows, size[0], FORM, BOUND)


@triton.jit
def query_gradient_rest(
    q_view,
    k_view,
    v_view,
    out_view,
    do_view,
    dq_view,
    lse,
    delta_ptr,
    start,
    scale,
    grad_scale,
    mask,
    size,
    FORM: tl.constexpr,
    REST_M: tl.constexpr,
    J: tl.constexpr,
    STEP: tl.constexpr,
    REST: tl.constexpr,
):
    """`query_gradient` of tile J of what is left of the queries."""
    FIRST: tl.constexpr = REST_M[J][0]
    SIZE: tl.constexpr = REST_M[J][1]
    query_gradient(
        q_view, k_view, v_view, out_view, do_view, dq_view, lse, delta_ptr, start + FIRST, scale, grad_scale, mask,
        size, FORM, SIZE, True, STEP, REST,
    )  # fmt: skip


@triton.jit
def _dq_rest(
    q, do, shift, log_sum, delta, dq, k_view, v_view, rows, first, scale, mask, size, FORM: tl.constexpr,
    REST: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """`_dq_step` with tile J of what is left of the keys."""
    FIRST: tl.constexpr = REST[J][0]
    SIZE: tl.constexpr = REST[J][1]
    return _dq_step(
        q, do, shift, log_sum, delta, dq, k_view, v_view, rows, first + FIRST, scale, mask, size, FORM, SIZE, True
    )


@triton.jit
def _dq_step(
    q, do, shift, log_sum, delta, dq, k_view, v_view, rows, first, scale, mask, size, FORM: tl.constexpr,
    SIZE: tl.constexpr, BOUND: tl.constexpr,
):  # fmt: skip
    """Add what `SIZE` keys from `first` give to dq."""
    keys = first + tl.arange(0, SIZE)
    k = load_head(k_view, keys, size[1], FORM, BOUND)
    v = load_head(v_view, keys, size[1], FORM, BOUND)
    s = product(q, k, FORM)  # [ROWS, SIZE]
    s, factor = hide(s, scale, rows[:, None], keys[None, :], mask, size, FORM, BOUND)
    p = probabilities(s, factor, shift[:, None], log_sum[:, None], FORM)
    ds = p * (product(do, v, FORM) - delta[:, None])
    return accumulate(dq, ds, k, FORM)


@triton.jit
def key_gradient(
    q_view,
    k_view,
    v_view,
    do_view,
    dk_view,
    dv_view,
    lse,
    delta_ptr,
    start,
    q_step,
    do_step,
    mask_step,
    group,
    scale,
    grad_scale,
    mask,
    size,
    FORM: tl.constexpr,
    WANTED: tl.constexpr,
    KEYS: tl.constexpr,
    BOUND: tl.constexpr,
    STEP: tl.constexpr,
    REST: tl.constexpr,
):
    """dk and dv, as `WANTED`, of `KEYS` keys from `start`, summed over the `group` heads of q that they serve."""
    keys = start + tl.arange(0, KEYS)
    k = load_head(k_view, keys, size[1], FORM, BOUND)
    v = load_head(v_view, keys, size[1], FORM, BOUND)
    dk = zero_head(KEYS, FORM)
    dv = zero_head(KEYS, FORM)
    full = 0
    begin = 0
    if STEP > 0:
        full = size[0] if FORM.ragged else size[0] // STEP * STEP
        if FORM.causal:  # from the first query that sees the first key
            begin = tl.minimum(full, tl.maximum(start - size[2], 0) // STEP * STEP)
    for member in tl.range(group, num_stages=1):
        q = (q_view[0] + member * q_step, q_view[1])
        do = (do_view[0] + member * do_step, do_view[1])
        stats = (lse[0] + member * lse[2], lse[1])
        deltas = delta_ptr + member * lse[2]
        hidden = mask
        if mask[0] is not None:
            hidden = (mask[0] + member * mask_step, mask[1], mask[2])
        if STEP > 0:
            for first in tl.range(begin, full, STEP, num_stages=FORM.stages):
                dk, dv = _dkv_step(
                    k,
                    v,
                    dk,
                    dv,
                    q,
                    do,
                    stats,
                    deltas,
                    keys,
                    first,
                    scale,
                    hidden,
                    size,
                    FORM,
                    WANTED,
                    STEP,
                    FORM.ragged,
                )
        for j in tl.static_range(len(REST)):
            dk, dv = _dkv_rest(
                k, v, dk, dv, q, do, stats, deltas, keys, full, scale, hidden, size, FORM, WANTED, REST, j
            )
    if WANTED != "dv":
        store_head(dk_view, dk, grad_scale, keys, size[1], FORM, BOUND)
    if WANTED != "dk":
        store_head(dv_view, dv, 1.0, keys, size[1], FORM, BOUND)


@triton.jit
def key_gradient_rest(
    q_view,
    k_view,
    v_view,
    do_view,
    dk_view,
    dv_view,
    lse,
    delta_ptr,
    start,
    q_step,
    do_step,
    mask_step,
    group,
    scale,
    grad_scale,
    mask,
    size,
    FORM: tl.constexpr,
    WANTED: tl.constexpr,
    REST_N: tl.constexpr,
    J: tl.constexpr,
    STEP: tl.constexpr,
    REST: tl.constexpr,
):
    """`key_gradient` of tile J of what is left of the keys."""
    FIRST: tl.constexpr = REST_N[J][0]
    SIZE: tl.constexpr = REST_N[J][1]
    key_gradient(
        q_view, k_view, v_view, do_view, dk_view, dv_view, lse, delta_ptr, start + FIRST, q_step, do_step, mask_step,
        group, scale, grad_scale, mask, size, FORM, WANTED, SIZE, True, STEP, REST,
    )  # fmt: skip


@triton.jit
def _dkv_rest(
    k, v, dk, dv, q_view, do_view, lse, delta_ptr, keys, first, scale, mask, size, FORM: tl.constexpr,
    WANTED: tl.constexpr, REST: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """`_dkv_step` with tile J of what is left of the queries."""
    FIRST: tl.constexpr = REST[J][0]
    SIZE: tl.constexpr = REST[J][1]
    return _dkv_step(
        k, v, dk, dv, q_view, do_view, lse, delta_ptr, keys, first + FIRST, scale, mask, size, FORM, WANTED, SIZE, True
    )


@triton.jit
def _dkv_step(
    k, v, dk, dv, q_view, do_view, lse, delta_ptr, keys, first, scale, mask, size, FORM: tl.constexpr,
    WANTED: tl.constexpr, SIZE: tl.constexpr, BOUND: tl.constexpr,
):  # fmt: skip
    """Add what `SIZE` queries from `first` give to dk and dv."""
    rows = first + tl.arange(0, SIZE)
    q = load_head(q_view, rows, size[0], FORM, BOUND)
    do = load_head(do_view, rows, size[0], FORM, BOUND)
    shift, log_sum = load_lse(lse, rows, size[0], FORM)
    delta = tl.load(delta_ptr + rows, mask=rows < size[0], other=0.0)
    s = product(k, q, FORM)  # [KEYS, SIZE]
    # A key beyond the last spoils its own row alone, which is not stored.
    s, factor = hide(s, scale, rows[None, :], keys[:, None], mask, size, FORM, False)
    p = probabilities(s, factor, shift[None, :], log_sum[None, :], FORM)
    if WANTED != "dk":
        dv = accumulate(dv, p, do, FORM)
    if WANTED != "dv":
        ds = p * (product(v, do, FORM) - delta[None, :])
        dk = accumulate(dk, ds, q, FORM)
    return dk, dv
