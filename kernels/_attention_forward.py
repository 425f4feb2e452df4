"""Forward kernels of attention: `short_forward_kernel` in one pass, `forward_kernel` for any length.

`short_forward_kernel`: the keys and values of one head lie in shared memory, loaded once, while a program walks over
the queries, so a head's q, k, v and o cross the memory bus once. All scores of a row are there at the same time, so its
maximum is known before the first exponential and nothing is rescaled.

`forward_kernel`: the online softmax of FlashAttention-2. A program has one tile of queries and walks over the keys;
the accumulator is divided by the row's sum at the end. Full tiles come first, in a loop without bounds checks; what is
left of a length is covered by tiles of 64, 32 and 16.

Both compute exp2(s * scale * log2(e) - m): log2(e) is folded into the scale by the launcher, and the multiplication by
it into the subtraction.
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


@triton.jit(do_not_specialize=UNSPECIALIZED)
def short_forward_kernel(
    q_ptr,  # [B, H, n_q, D]
    k_ptr,  # [B, H / group, n_k, D]
    v_ptr,  # [B, H / group, n_k, D]
    mask_ptr,  # [B, H, n_q, n_k] uint8 (1 attends) or added to the scores, or None
    out_ptr,  # [B, H, n_q, D]
    lse_ptr,  # [B, H, n_q] float32 contiguous, or two planes of it for an additive mask
    stride_q,  # of (batch, head, row), in units of FORM.unit elements; so are stride_k, stride_v and stride_o
    stride_k,
    stride_v,
    stride_o,
    stride_mask,  # of (batch, head, query, key)
    stride_lse,  # of planes; with cu_seqlens of heads
    tiles,  # programs a head
    heads,
    group,
    n_q,
    n_k,
    scale,  # times log2(e)
    FORM: tl.constexpr,
    TILES: tl.constexpr,  # of the keys
    RAGGED: tl.constexpr,  # whether the last tile has keys beyond n_k
    BLOCK_M: tl.constexpr,  # or 0: there is no full tile
    TAIL_M: tl.constexpr,  # rows of the tile for what n_q // BLOCK_M tiles leave, or 0
):
    index = tl.program_id(0) // tiles
    split = tl.program_id(0) % tiles
    batch = (index // heads).to(tl.int64)
    head = (index % heads).to(tl.int64)
    q = head_view(q_ptr, stride_q, batch, head, 0, FORM)
    k_view = head_view(k_ptr, stride_k, batch, head // group, 0, FORM)
    v_view = head_view(v_ptr, stride_v, batch, head // group, 0, FORM)
    out = head_view(out_ptr, stride_o, batch, head, 0, FORM)
    lse = (lse_ptr + index.to(tl.int64) * n_q, stride_lse)
    if mask_ptr is not None:
        mask_ptr += batch * stride_mask[0] + head * stride_mask[1]
    mask = (mask_ptr, stride_mask[2], stride_mask[3])
    size = (n_q, n_k, 0)
    k = ()
    v = ()
    for j in tl.static_range(len(TILES)):
        k = k + (_load_keys(k_view, n_k, FORM, TILES, j, RAGGED),)
        v = v + (_load_keys(v_view, n_k, FORM, TILES, j, RAGGED),)
    full = 0
    if BLOCK_M > 0:
        full = n_q // BLOCK_M * BLOCK_M
    # The tail first: its small tensor core instructions want keys in registers, which are free before the loop.
    if TAIL_M > 0:
        if split == tiles - 1:
            _one_pass(q, k, v, out, lse, full, scale, mask, size, FORM, TILES, RAGGED, TAIL_M, True)
    if BLOCK_M > 0:
        for start in tl.range(split * BLOCK_M, full, tiles * BLOCK_M, num_stages=FORM.stages):
            _one_pass(q, k, v, out, lse, start, scale, mask, size, FORM, TILES, RAGGED, BLOCK_M, False)


@triton.jit
def _load_keys(view, n_k, FORM: tl.constexpr, TILES: tl.constexpr, J: tl.constexpr, RAGGED: tl.constexpr):
    FIRST: tl.constexpr = TILES[J][0]
    SIZE: tl.constexpr = TILES[J][1]
    BOUND: tl.constexpr = RAGGED and len(TILES) - 1 == J
    return load_head(view, FIRST + tl.arange(0, SIZE), n_k, FORM, BOUND)


@triton.jit
def _one_pass(
    q_view,
    k,
    v,
    out,
    lse,
    start,
    scale,
    mask,
    size,
    FORM: tl.constexpr,
    TILES: tl.constexpr,
    RAGGED: tl.constexpr,
    ROWS: tl.constexpr,
    BOUND: tl.constexpr,
):
    """Output and lse of `ROWS` queries from `start`, over all tiles of the keys at once."""
    rows = start + tl.arange(0, ROWS)
    q = load_head(q_view, rows, size[0], FORM, BOUND)
    s = ()
    factor = scale
    for j in tl.static_range(len(TILES)):
        tile, factor = _tile_scores(q, k[j], rows, scale, mask, size, FORM, TILES, j, RAGGED)
        s = s + (tile,)
    highest = tl.max(s[0], axis=1)
    for j in tl.static_range(1, len(TILES)):
        highest = tl.maximum(highest, tl.max(s[j], axis=1))
    shift = highest * factor  # [ROWS]
    if mask[0] is not None:  # else each row has a key
        shift = tl.where(highest == float("-inf"), 0.0, shift)
    total = tl.zeros([ROWS], tl.float32)
    acc = zero_head(ROWS, FORM)
    for j in tl.static_range(len(TILES)):
        p = tl.exp2(s[j] * factor - shift[:, None])
        total += tl.sum(p, axis=1)
        acc = accumulate(acc, p, v[j], FORM)
    store_lse(lse, rows, size[0], shift, total, FORM)
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    store_head(out, acc, inverse[:, None], rows, size[0], FORM, BOUND)


@triton.jit
def _tile_scores(
    q, k, rows, scale, mask, size, FORM: tl.constexpr, TILES: tl.constexpr, J: tl.constexpr, RAGGED: tl.constexpr
):
    """Masked scores of tile J of the keys, and what they are still to be multiplied by."""
    FIRST: tl.constexpr = TILES[J][0]
    SIZE: tl.constexpr = TILES[J][1]
    BOUND: tl.constexpr = RAGGED and len(TILES) - 1 == J
    keys = FIRST + tl.arange(0, SIZE)
    s = product(q, k, FORM)  # [ROWS, SIZE]
    return hide(s, scale, rows[:, None], keys[None, :], mask, size, FORM, BOUND)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def forward_kernel(
    q_ptr,  # [B, H, n_q, D]; [total, H, D] with cu_seqlens
    k_ptr,  # [B, H / group, n_k, D]
    v_ptr,  # [B, H / group, n_k, D]
    mask_ptr,  # [B, H, n_q, n_k] uint8 (1 attends) or added to the scores, or None
    out_ptr,  # [B, H, n_q, D]
    lse_ptr,  # [B, H, n_q] float32 contiguous, or two planes of it for an additive mask; [H, total] with cu_seqlens
    cu_q_ptr,  # [B + 1] int32 first rows of the sequences, or None: all have n_q and n_k rows
    cu_k_ptr,
    stride_q,  # of (batch, head, row), in units of FORM.unit elements; so are stride_k, stride_v and stride_o
    stride_k,
    stride_v,
    stride_o,
    stride_mask,  # of (batch, head, query, key)
    stride_lse,  # of planes; with cu_seqlens of heads
    tiles,  # programs a head
    heads,
    group,
    n_q,
    n_k,
    scale,  # times log2(e)
    FORM: tl.constexpr,
    BLOCK_M: tl.constexpr,  # or 0: there is no full tile
    BLOCK_N: tl.constexpr,
    REST_M: tl.constexpr,  # tiles for what is left of n_q beside tiles of BLOCK_M
    REST_N: tl.constexpr,
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
    lse = (lse_ptr + row, stride_lse)
    if mask_ptr is not None:
        mask_ptr += batch * stride_mask[0] + head * stride_mask[1]
    mask = (mask_ptr, stride_mask[2], stride_mask[3])
    size = (n_q, n_k, offset)
    if FORM.causal:  # the longest rows first
        tile = tiles - 1 - tile
    count = 0
    if BLOCK_M > 0:
        count = tl.cdiv(n_q, BLOCK_M) if FORM.ragged else n_q // BLOCK_M
        if tile < count:
            _rows(q, k, v, out, lse, tile * BLOCK_M, scale, mask, size, FORM, BLOCK_M, FORM.ragged, BLOCK_N, REST_N)
    for j in tl.static_range(len(REST_M)):
        if tile == count + j:
            _rest_rows(q, k, v, out, lse, count * BLOCK_M, scale, mask, size, FORM, REST_M, j, BLOCK_N, REST_N)


@triton.jit
def _rest_rows(
    q,
    k,
    v,
    out,
    lse,
    start,
    scale,
    mask,
    size,
    FORM: tl.constexpr,
    REST_M: tl.constexpr,
    J: tl.constexpr,
    BLOCK_N: tl.constexpr,
    REST_N: tl.constexpr,
):
    """`_rows` of tile J of what is left of the queries."""
    FIRST: tl.constexpr = REST_M[J][0]
    SIZE: tl.constexpr = REST_M[J][1]
    _rows(q, k, v, out, lse, start + FIRST, scale, mask, size, FORM, SIZE, True, BLOCK_N, REST_N)


@triton.jit
def _rows(
    q_view,
    k_view,
    v_view,
    out,
    lse,
    start,
    scale,
    mask,
    size,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    BOUND: tl.constexpr,
    BLOCK_N: tl.constexpr,
    REST_N: tl.constexpr,
):
    """Output and lse of `ROWS` queries from `start`."""
    rows = start + tl.arange(0, ROWS)
    q = load_head(q_view, rows, size[0], FORM, BOUND)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = zero_head(ROWS, FORM)
    full = 0
    if BLOCK_N > 0:
        full = size[1] // BLOCK_N * BLOCK_N
        end = size[1] if FORM.ragged else full
        if FORM.causal:  # up to the last key that the last row sees
            end = tl.minimum(end, tl.cdiv(tl.maximum(start + ROWS + size[2], 0), BLOCK_N) * BLOCK_N)
        for first in tl.range(0, end, BLOCK_N, num_stages=FORM.stages):
            acc, highest, total = _step(
                q, k_view, v_view, acc, highest, total, rows, first, scale, mask, size, FORM, BLOCK_N, FORM.ragged
            )
    for j in tl.static_range(len(REST_N)):
        acc, highest, total = _rest_step(
            q, k_view, v_view, acc, highest, total, rows, full, scale, mask, size, FORM, REST_N, j
        )
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    store_head(out, acc, inverse[:, None], rows, size[0], FORM, BOUND)
    store_lse(lse, rows, size[0], shift, total, FORM)


@triton.jit
def _rest_step(
    q,
    k_view,
    v_view,
    acc,
    highest,
    total,
    rows,
    first,
    scale,
    mask,
    size,
    FORM: tl.constexpr,
    REST_N: tl.constexpr,
    J: tl.constexpr,
):
    """`_step` with tile J of what is left of the keys."""
    FIRST: tl.constexpr = REST_N[J][0]
    SIZE: tl.constexpr = REST_N[J][1]
    return _step(q, k_view, v_view, acc, highest, total, rows, first + FIRST, scale, mask, size, FORM, SIZE, True)


@triton.jit
def _step(
    q,
    k_view,
    v_view,
    acc,
    highest,
    total,
    rows,
    first,
    scale,
    mask,
    size,
    FORM: tl.constexpr,
    SIZE: tl.constexpr,
    BOUND: tl.constexpr,
):
    """Add `SIZE` keys from `first` to the running output, maximum and sum of each row."""
    keys = first + tl.arange(0, SIZE)
    k = load_head(k_view, keys, size[1], FORM, BOUND)
    s = product(q, k, FORM)  # [ROWS, SIZE]
    s, factor = hide(s, scale, rows[:, None], keys[None, :], mask, size, FORM, BOUND)
    higher = tl.maximum(highest, tl.max(s, axis=1) * factor)
    shift = higher
    if mask[0] is not None or FORM.causal:  # else each row has met a key
        shift = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp2(s * factor - shift[:, None])
    alpha = tl.exp2(highest - shift)
    v = load_head(v_view, keys, size[1], FORM, BOUND)
    acc = accumulate(rescaled(acc, alpha, FORM), p, v, FORM)
    return acc, higher, total * alpha + tl.sum(p, axis=1)
