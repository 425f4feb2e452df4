"""What the kernels of `clip_loss` share: a tile of logits, and which of its entries are positives."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def logit_tile(
    image_ptr,  # [n_rows, D] contiguous
    text_ptr,  # [n_columns, D] contiguous
    rows,  # [BLOCK_M]
    columns,  # [BLOCK_N]
    n_rows,
    n_columns,
    scale,
    steps,  # ceil(D / BLOCK_K), not a constant: the compiler would unroll the loop
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`scale * image text^T` of some rows and columns; those beyond the end repeat the last."""
    depth = tl.arange(0, BLOCK_K)
    image_ptrs = image_ptr + tl.minimum(rows, n_rows - 1).to(tl.int64)[:, None] * D + depth[None, :]
    text_ptrs = text_ptr + tl.minimum(columns, n_columns - 1).to(tl.int64)[None, :] * D + depth[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(steps):
        if D % BLOCK_K == 0:
            image = tl.load(image_ptrs)  # [BLOCK_M, BLOCK_K]
            text = tl.load(text_ptrs)  # [BLOCK_K, BLOCK_N]
        else:
            inside = depth < D - step * BLOCK_K
            image = tl.load(image_ptrs, mask=inside[None, :], other=0.0)
            text = tl.load(text_ptrs, mask=inside[:, None], other=0.0)
        acc = tl.dot(image, text, acc, input_precision=PRECISION)
        image_ptrs += BLOCK_K
        text_ptrs += BLOCK_K
    return acc * scale


@triton.jit
def ids_of(ids_ptr, places, count):
    """Ids of rows or columns; those beyond the end repeat the last, and are masked by the caller."""
    return tl.load(ids_ptr + tl.minimum(places, count - 1))


@triton.jit
def crosses(first_row, first_column, first, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether a tile has an entry (i, first + i)."""
    place = first_row + first
    return (place < first_column + BLOCK_N) & (place + BLOCK_M > first_column)


@triton.jit
def logit_gradient(
    s,  # [BLOCK_M, BLOCK_N] base-2 logits
    rows,  # [BLOCK_M]
    columns,  # [BLOCK_N]
    n_rows,
    n_columns,
    first,
    row_max_ptr,  # [n_rows] base-2 logits
    column_max_ptr,  # [n_columns]
    row_ptr,  # [n_rows] weights over the sums of exponentials
    column_ptr,  # [n_columns]
    row_target_ptr,  # [n_rows] or None
    column_target_ptr,
    row_ids_ptr,  # [n_rows] or None
    column_ids_ptr,
):
    """`row p + column q` of a tile, without the diagonal's entries, or minus the targets of positives by id.

    p is exp2(s - max) / sum, not exp2(s - lse): a logit of 100 has 2^-17 as its last digit, and an lse too.
    """
    keep_rows = rows < n_rows
    keep_columns = columns < n_columns
    row_max = tl.load(row_max_ptr + rows, mask=keep_rows, other=0.0)
    column_max = tl.load(column_max_ptr + columns, mask=keep_columns, other=0.0)
    row = tl.load(row_ptr + rows, mask=keep_rows, other=0.0)
    column = tl.load(column_ptr + columns, mask=keep_columns, other=0.0)
    g = tl.exp2(s - row_max[:, None]) * row[:, None] + tl.exp2(s - column_max[None, :]) * column[None, :]
    if row_ids_ptr is not None:
        same = ids_of(row_ids_ptr, rows, n_rows)[:, None] == ids_of(column_ids_ptr, columns, n_columns)[None, :]
        row_target = tl.load(row_target_ptr + rows, mask=keep_rows, other=0.0)
        column_target = tl.load(column_target_ptr + columns, mask=keep_columns, other=0.0)
        g = tl.where(same, g - (row_target[:, None] + column_target[None, :]), g)
    else:
        g = tl.where((rows + first)[:, None] == columns[None, :], 0.0, g)
    return g
