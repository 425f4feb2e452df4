"""Rows' and columns' softmax statistics of a matrix of logits that is never stored.

A program goes over blocks of rows r, r + R, ... and, for each, over its share of the column blocks. The statistics of
the rows stay in registers until the share ends; those of the columns are kept for each program in a buffer of its own,
(R, N), which it updates with every block of rows after its first. A second kernel combines the programs' buffers,
always in the same order: no atomics, no locks, and memory linear in the batch, since R is at most the number of
resident programs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._clip_loss_tile import LOG2E, crosses, ids_of, logit_tile
from ._common import column_pieces


@triton.jit(do_not_specialize=["first", "blocks", "steps"])
def clip_loss_statistics_kernel(
    image_ptr,  # [n_rows, D]
    text_ptr,  # [n_columns, D]
    scale_ptr,  # []
    image_ids_ptr,  # [n_rows] int32 or None
    text_ids_ptr,  # [n_columns] int32 or None
    row_max_ptr,  # [splits, n_rows] float32, of base-2 logits like all here
    row_sum_ptr,
    row_positive_ptr,
    row_count_ptr,  # or None: no ids
    row_best_ptr,  # [splits, n_rows] int32, or None
    column_max_ptr,  # [R, n_columns]
    column_sum_ptr,
    column_positive_ptr,  # or None: no ids
    column_count_ptr,
    column_best_ptr,  # or None
    n_rows,
    n_columns,
    first,  # row i's positive is column first + i
    blocks,  # column blocks in a split
    steps,
    D: tl.constexpr,
    EVEN: tl.constexpr,  # whole tiles only
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
):
    PIECE: tl.constexpr = BLOCK_N // PARTS
    program = tl.program_id(0)
    split = tl.program_id(1)
    scale = tl.load(scale_ptr).to(tl.float32) * LOG2E
    last_block = tl.minimum((split + 1) * blocks, tl.cdiv(n_columns, BLOCK_N))
    buffer = program.to(tl.int64) * n_columns
    out = split.to(tl.int64) * n_rows
    for row_block in range(program, tl.cdiv(n_rows, BLOCK_M), tl.num_programs(0)):
        rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        positive = tl.zeros([BLOCK_M], tl.float32)
        count = tl.zeros([BLOCK_M], tl.float32)
        best = tl.zeros([BLOCK_M], tl.int32)
        for block in range(split * blocks, last_block):
            columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
            s = logit_tile(
                *(image_ptr, text_ptr, rows, columns, n_rows, n_columns, scale, steps),
                *(D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K),
            )  # [BLOCK_M, BLOCK_N]
            # In pieces, so that the columns' statistics take few registers at a time.
            pieces = column_pieces(s, PARTS)
            for i in tl.static_range(PARTS):
                top, total, positive, count, best = _piece(
                    *(pieces[i], top, total, positive, count, best, image_ids_ptr, text_ids_ptr, column_max_ptr),
                    *(column_sum_ptr, column_positive_ptr, column_count_ptr, column_best_ptr, buffer),
                    *(row_block * BLOCK_M, block * BLOCK_N + i * PIECE, n_rows, n_columns, first, row_block == program),
                    EVEN=EVEN,
                    BLOCK_M=BLOCK_M,
                    BLOCK_N=PIECE,
                )
        keep = rows < n_rows
        tl.store(row_max_ptr + out + rows, top, mask=keep)
        tl.store(row_sum_ptr + out + rows, total, mask=keep)
        tl.store(row_positive_ptr + out + rows, positive, mask=keep)
        if row_count_ptr is not None:
            tl.store(row_count_ptr + out + rows, count, mask=keep)
        if row_best_ptr is not None:
            tl.store(row_best_ptr + out + rows, best, mask=keep)


@triton.jit
def _piece(
    s,  # [BLOCK_M, BLOCK_N]
    top,  # [BLOCK_M] statistics of the rows so far
    total,
    positive,
    count,
    best,
    image_ids_ptr,
    text_ids_ptr,
    column_max_ptr,
    column_sum_ptr,
    column_positive_ptr,
    column_count_ptr,
    column_best_ptr,
    buffer,
    first_row,
    first_column,
    n_rows,
    n_columns,
    first,
    fresh,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Take a piece of a tile into the statistics; return those of the rows."""
    BEST: tl.constexpr = column_best_ptr is not None
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = first_column + tl.arange(0, BLOCK_N)
    inside = columns < n_columns
    at = buffer + columns
    if image_ids_ptr is not None:
        same = ids_of(image_ids_ptr, rows, n_rows)[:, None] == ids_of(text_ids_ptr, columns, n_columns)[None, :]
        if not EVEN:
            same = same & (rows < n_rows)[:, None] & inside[None, :]
        chosen = tl.where(same, s, 0.0)
        number = same.to(tl.float32)
        positive += tl.sum(chosen, 1)
        count += tl.sum(number, 1)
        _add(column_positive_ptr + at, tl.sum(chosen, 0), inside, fresh)
        _add(column_count_ptr + at, tl.sum(number, 0), inside, fresh)
    else:
        if crosses(first_row, first_column, first, BLOCK_M, BLOCK_N):
            own = ((rows + first)[:, None] == columns[None, :]) & inside[None, :]
            positive += tl.sum(tl.where(own, s, 0.0), 1)
    if not EVEN:
        s = tl.where((rows < n_rows)[:, None] & inside[None, :], s, float("-inf"))
    # Columns: the maximum and the sum of this piece, and what the buffer has of the rows above it.
    if BEST:
        high, where = tl.max(s, 0, return_indices=True, return_indices_tie_break_left=True)
        where += first_row
    else:
        high = tl.max(s, 0)
    sums = tl.sum(tl.exp2(s - high[None, :]), 0)
    if not fresh:
        before = tl.load(column_max_ptr + at, mask=inside, other=0.0)
        sums_before = tl.load(column_sum_ptr + at, mask=inside, other=0.0)
        higher = tl.maximum(before, high)
        sums = sums * tl.exp2(high - higher) + sums_before * tl.exp2(before - higher)
        if BEST:
            where = tl.where(high > before, where, tl.load(column_best_ptr + at, mask=inside, other=0))
        high = higher
    tl.store(column_max_ptr + at, high, mask=inside)
    tl.store(column_sum_ptr + at, sums, mask=inside)
    # Rows: the true running maximum; a fixed one would underflow at a scale of 100.
    if BEST:
        tl.store(column_best_ptr + at, where, mask=inside)
        high_row, place = tl.max(s, 1, return_indices=True, return_indices_tie_break_left=True)
        best = tl.where(high_row > top, place + first_column, best)
    else:
        high_row = tl.max(s, 1)
    higher_row = tl.maximum(top, high_row)
    total = total * tl.exp2(top - higher_row) + tl.sum(tl.exp2(s - higher_row[:, None]), 1)
    # Other threads read the buffer at the next block of rows. Here, not once a tile: else the compiler starts on all
    # pieces at once, for which there are not enough registers.
    tl.debug_barrier()
    return higher_row, total, positive, count, best


@triton.jit
def _add(ptrs, value, inside, fresh):
    """Add to a buffer, or start it."""
    if not fresh:
        value += tl.load(ptrs, mask=inside, other=0.0)
    tl.store(ptrs, value, mask=inside)


@triton.jit
def clip_loss_combine_kernel(
    max_ptr,  # [parts, count] float32, base 2
    sum_ptr,
    positive_ptr,  # or None
    count_ptr,  # or None
    best_ptr,  # [parts, count] int32 or None
    max_out_ptr,  # [count]
    sum_out_ptr,
    positive_out_ptr,
    count_out_ptr,
    best_out_ptr,  # [count] int64
    parts,
    size,
    BLOCK: tl.constexpr,
):
    """Statistics of all columns' (or rows') parts: the maximum, the sum beside it, and sums over the parts."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = places < size
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    positive = tl.zeros([BLOCK], tl.float32)
    number = tl.zeros([BLOCK], tl.float32)
    best = tl.zeros([BLOCK], tl.int32)
    at = places
    for _ in range(parts):
        high = tl.load(max_ptr + at, mask=keep, other=0.0)
        if best_ptr is not None:
            found = tl.load(best_ptr + at, mask=keep, other=0)
            best = tl.where((high > top) | ((high == top) & (found < best)), found, best)
        higher = tl.maximum(top, high)
        total = total * tl.exp2(top - higher) + tl.load(sum_ptr + at, mask=keep, other=0.0) * tl.exp2(high - higher)
        top = higher
        if positive_ptr is not None:
            positive += tl.load(positive_ptr + at, mask=keep, other=0.0)
        if count_ptr is not None:
            number += tl.load(count_ptr + at, mask=keep, other=0.0)
        at += size
    tl.store(max_out_ptr + places, top, mask=keep)
    tl.store(sum_out_ptr + places, total, mask=keep)
    if positive_ptr is not None:
        tl.store(positive_out_ptr + places, positive, mask=keep)
    if count_ptr is not None:
        tl.store(count_out_ptr + places, number, mask=keep)
    if best_ptr is not None:
        tl.store(best_out_ptr + places, best.to(tl.int64), mask=keep)
