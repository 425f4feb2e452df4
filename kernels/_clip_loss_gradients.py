"""Gradients of the contrastive loss by the features, from logits that are computed again.

With g the gradient of the logits over `factor * scale`, see `logit_gradient`, dI = g T and dT = g^T I. Two ways:

`logit_gradient_kernel`, wide features: g of a block of at most 8192 x 8192 in 16 bits, by one GEMM with an epilogue;
the caller multiplies it by both sides with cuBLAS. Three products in all.

`feature_gradient_kernel`, narrow features: a program owns rows and keeps their sums in registers, as FlashAttention
does; it computes g tile by tile and multiplies it at once. Run for either side: four products, and g never in memory.
Each multiplies a tile of 2 BLOCK_N D bytes by 4 BLOCK_M BLOCK_N D FLOPs: with the 64 rows that fit beside 512 columns
of sums that is 64 FLOPs a byte of L2, less than Hopper's tensor cores take; 128 rows fit up to a width of 256.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._clip_loss_tile import LOG2E, logit_gradient, logit_tile
from ._common import column_pieces


@triton.jit(do_not_specialize=["first", "steps"])
def logit_gradient_kernel(
    image_ptr,  # [n_rows, D]
    text_ptr,  # [n_columns, D]
    scale_ptr,  # []
    row_max_ptr,  # [n_rows]
    column_max_ptr,  # [n_columns]
    row_ptr,  # [n_rows]
    column_ptr,  # [n_columns]
    row_target_ptr,  # [n_rows] or None
    column_target_ptr,
    image_ids_ptr,  # [n_rows] or None
    text_ids_ptr,
    gradient_ptr,  # [n_rows, n_columns]
    n_rows,
    n_columns,
    first,
    steps,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    RAISE: tl.constexpr,  # float16 has few exponents: small probabilities are raised by this power of two
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
):
    program = tl.program_id(0)
    blocks = tl.cdiv(n_columns, BLOCK_N)
    group = program // (GROUP_M * blocks)
    group_size = tl.minimum(tl.cdiv(n_rows, BLOCK_M) - group * GROUP_M, GROUP_M)
    place = program % (GROUP_M * blocks)
    rows = (group * GROUP_M + place % group_size) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_column = (place // group_size) * BLOCK_N
    columns = first_column + tl.arange(0, BLOCK_N)
    scale = tl.load(scale_ptr).to(tl.float32) * LOG2E
    s = logit_tile(
        *(image_ptr, text_ptr, rows, columns, n_rows, n_columns, scale, steps),
        *(D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K),
    )
    _finish(
        *(s, first_column, rows, n_rows, n_columns, first, row_max_ptr, column_max_ptr, row_ptr),
        *(column_ptr, row_target_ptr, column_target_ptr, image_ids_ptr, text_ids_ptr, gradient_ptr),
        RAISE=RAISE,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        PARTS=PARTS,
    )


@triton.jit
def _finish(
    s,  # [BLOCK_M, BLOCK_N]: PARTS pieces, one after the other
    first_column,
    rows,
    n_rows,
    n_columns,
    first,
    row_max_ptr,
    column_max_ptr,
    row_ptr,
    column_ptr,
    row_target_ptr,
    column_target_ptr,
    image_ids_ptr,
    text_ids_ptr,
    gradient_ptr,
    RAISE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
):
    PIECE: tl.constexpr = BLOCK_N // PARTS
    pieces = column_pieces(s, PARTS)
    for i in tl.static_range(PARTS):
        columns = first_column + i * PIECE + tl.arange(0, PIECE)
        g = logit_gradient(
            *(pieces[i], rows, columns, n_rows, n_columns, first, row_max_ptr, column_max_ptr, row_ptr, column_ptr),
            *(row_target_ptr, column_target_ptr, image_ids_ptr, text_ids_ptr),
        )
        out = gradient_ptr + rows.to(tl.int64)[:, None] * n_columns + columns[None, :]
        keep = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
        tl.store(out, (g * RAISE).to(gradient_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["first", "blocks"])
def feature_gradient_kernel(
    own_ptr,  # [n_rows, D] rows of the side whose gradient this is
    other_ptr,  # [n_columns, D]
    scale_ptr,  # []
    row_max_ptr,  # [n_rows]
    column_max_ptr,  # [n_columns]
    row_ptr,  # [n_rows]
    column_ptr,  # [n_columns]
    row_target_ptr,  # [n_rows] or None
    column_target_ptr,
    own_ids_ptr,  # [n_rows] or None
    other_ids_ptr,
    gradient_ptr,  # [n_rows, D] float32
    n_rows,
    n_columns,
    first,
    blocks,  # ceil(n_columns / BLOCK_N)
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    RAISE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    depth = tl.arange(0, BLOCK_D)
    scale = tl.load(scale_ptr).to(tl.float32) * LOG2E
    own_ptrs = own_ptr + tl.minimum(rows, n_rows - 1).to(tl.int64)[:, None] * D + depth[None, :]
    if D == BLOCK_D:
        own = tl.load(own_ptrs)  # [BLOCK_M, BLOCK_D]
    else:
        own = tl.load(own_ptrs, mask=(depth < D)[None, :], other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for block in range(blocks):
        columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
        other_ptrs = other_ptr + tl.minimum(columns, n_columns - 1).to(tl.int64)[:, None] * D + depth[None, :]
        if D == BLOCK_D:
            other = tl.load(other_ptrs)  # [BLOCK_N, BLOCK_D]
        else:
            other = tl.load(other_ptrs, mask=(depth < D)[None, :], other=0.0)
        s = tl.dot(own, tl.trans(other), input_precision=PRECISION) * scale
        g = logit_gradient(
            *(s, rows, columns, n_rows, n_columns, first, row_max_ptr, column_max_ptr, row_ptr, column_ptr),
            *(row_target_ptr, column_target_ptr, own_ids_ptr, other_ids_ptr),
        )
        g = tl.where((columns < n_columns)[None, :], g * RAISE, 0.0)
        acc = tl.dot(g.to(other.dtype), other, acc, input_precision=PRECISION)
    out = gradient_ptr + rows.to(tl.int64)[:, None] * D + depth[None, :]
    tl.store(out, acc * (1.0 / RAISE), mask=(rows < n_rows)[:, None] & (depth < D)[None, :])
