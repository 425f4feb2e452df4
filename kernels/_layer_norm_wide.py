"""Layer normalisation of rows wider than a program can hold (above 8192 columns).

Forward: one program a row walks the row twice, first for mean and variance (Chan's merge of per-block means and
squared deviations, which does not cancel), then to normalise; the second read comes from L2. Backward: the same two
walks for dx, and a second kernel, one program a block of columns and a slice of rows, for partial dweight and dbias.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    Compilation,
    as_rows,
    as_vector,
    column_sums,
    on_device,
    row_arguments,
    row_offsets,
    triton_type,
    whole_vectors,
)

BLOCK_C = 4096
NUM_WARPS = 8
SLICE_BLOCK_C = 128  # columns of a program of the dweight / dbias kernel
SLICE_BLOCK_ROWS = 32
SLICES = 32  # slices of the rows, each one row of the partial sums


@triton.jit
def wide_forward_kernel(
    x_ptr,  # [rows, C], strides as in Rows
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    y_ptr,  # [rows, C] contiguous
    mean_ptr,  # [rows] float32, or None: not saved
    rstd_ptr,  # [rows] float32
    n_rows,
    inner,
    stride_outer,
    stride_inner,
    eps,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_row_ptr = x_ptr + row_offsets(row, inner, stride_outer, stride_inner, C)
    mean = 0.0
    squares = 0.0  # sum of squared deviations from the mean so far
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        x = tl.load(x_row_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)  # [BLOCK_C]
        block = tl.minimum(BLOCK_C, C - start).to(tl.float32)
        block_mean = tl.sum(x, axis=0) / block
        centred = tl.where(cols < C, x - block_mean, 0.0)
        delta = block_mean - mean
        share = block / (start + block)
        mean += delta * share
        squares += tl.sum(centred * centred, axis=0) + delta * delta * start * share
    rstd = tl.rsqrt(squares * (1.0 / C) + eps)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        x = tl.load(x_row_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
        y = (x - mean) * rstd
        if weight_ptr is not None:
            y *= tl.load(weight_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * C + cols, y.to(y_ptr.dtype.element_ty), mask=cols < C)


@triton.jit
def wide_backward_kernel(
    dy_ptr,  # [rows, C], strides as in Rows
    x_ptr,  # [rows, C], strides as in Rows
    weight_ptr,  # [C] or None
    mean_ptr,  # [rows] float32
    rstd_ptr,  # [rows] float32
    dx_ptr,  # [rows, C] contiguous
    inner_dy,
    stride_outer_dy,
    stride_inner_dy,
    inner_x,
    stride_outer_x,
    stride_inner_x,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    dy_row_ptr = dy_ptr + row_offsets(row, inner_dy, stride_outer_dy, stride_inner_dy, C)
    x_row_ptr = x_ptr + row_offsets(row, inner_x, stride_outer_x, stride_inner_x, C)
    mean = tl.load(mean_ptr + row)
    rstd = tl.load(rstd_ptr + row)
    sum_g = tl.zeros([BLOCK_C], tl.float32)
    sum_gx = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        mask = cols < C
        g = tl.load(dy_row_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_row_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            g *= tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        sum_g += g
        sum_gx += tl.where(mask, g * (x - mean) * rstd, 0.0)
    mean_g = tl.sum(sum_g, axis=0) * (1.0 / C)
    mean_gx = tl.sum(sum_gx, axis=0) * (1.0 / C)
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        mask = cols < C
        g = tl.load(dy_row_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_row_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            g *= tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        dx = (g - mean_g - (x - mean) * rstd * mean_gx) * rstd
        tl.store(dx_ptr + row * C + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def wide_weight_gradient_kernel(
    dy_ptr,  # [rows, C], strides as in Rows
    x_ptr,  # [rows, C], strides as in Rows
    mean_ptr,  # [rows] float32
    rstd_ptr,  # [rows] float32
    dweight_ptr,  # [slices, C] float32, or None
    dbias_ptr,  # [slices, C] float32, or None
    n_rows,
    inner_dy,
    stride_outer_dy,
    stride_inner_dy,
    inner_x,
    stride_outer_x,
    stride_inner_x,
    C: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    dweight = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    dbias = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    for block in range(tl.program_id(1), tl.cdiv(n_rows, BLOCK_ROWS), tl.num_programs(1)):
        rows = block * tl.full((), BLOCK_ROWS, tl.int64) + tl.arange(0, BLOCK_ROWS)
        valid = rows < n_rows
        mask = valid[:, None] & (cols < C)[None, :]
        dy_starts = row_offsets(rows, inner_dy, stride_outer_dy, stride_inner_dy, C)
        dy = tl.load(dy_ptr + dy_starts[:, None] + cols[None, :], mask=mask, other=0.0)
        dy = dy.to(tl.float32)  # [BLOCK_ROWS, BLOCK_C]
        dbias += dy
        if dweight_ptr is not None:
            x_starts = row_offsets(rows, inner_x, stride_outer_x, stride_inner_x, C)
            x = tl.load(x_ptr + x_starts[:, None] + cols[None, :], mask=mask, other=0.0)
            mean = tl.load(mean_ptr + rows, mask=valid, other=0.0)
            rstd = tl.load(rstd_ptr + rows, mask=valid, other=0.0)
            xhat = tl.where(mask, (x.to(tl.float32) - mean[:, None]) * rstd[:, None], 0.0)
            dweight += dy * xhat
    partial = tl.program_id(1).to(tl.int64) * C + cols
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, tl.sum(dweight, axis=0), mask=cols < C)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, axis=0), mask=cols < C)


def wide_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    eps: float,
) -> None:
    """Fill y and, if given, mean and rstd."""
    rows, weight, bias = as_rows(x), as_vector(weight), as_vector(bias)
    with on_device(x):
        wide_forward_kernel[(rows.n_rows,)](
            rows.tensor,
            weight,
            bias,
            y,
            mean,
            rstd,
            *rows[1:],
            eps,
            C=x.shape[-1],
            BLOCK_C=BLOCK_C,
            num_warps=NUM_WARPS,
        )


def wide_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
) -> None:
    """Fill dx, dweight and dbias, those that are given."""
    width = x.shape[-1]
    dy_rows, x_rows, weight = as_rows(dy), as_rows(x), as_vector(weight)
    if dx is not None:
        wide_backward_kernel[(x_rows.n_rows,)](
            dy_rows.tensor,
            x_rows.tensor,
            weight,
            mean,
            rstd,
            dx,
            *dy_rows[2:],
            *x_rows[2:],
            C=width,
            BLOCK_C=BLOCK_C,
            num_warps=NUM_WARPS,
        )
    if dweight is None and dbias is None:
        return
    slices = min(SLICES, triton.cdiv(x_rows.n_rows, SLICE_BLOCK_ROWS))
    partial_dweight, partial_dbias = (
        None if out is None else torch.empty((slices, width), dtype=torch.float32, device=x.device)
        for out in (dweight, dbias)
    )
    wide_weight_gradient_kernel[(triton.cdiv(width, SLICE_BLOCK_C), slices)](
        dy_rows.tensor,
        x_rows.tensor,
        mean,
        rstd,
        partial_dweight,
        partial_dbias,
        x_rows.n_rows,
        *dy_rows[2:],
        *x_rows[2:],
        C=width,
        BLOCK_ROWS=SLICE_BLOCK_ROWS,
        BLOCK_C=SLICE_BLOCK_C,
        num_warps=4,
    )
    column_sums([(partial_dweight, dweight), (partial_dbias, dbias)])


def audit_configurations() -> Iterator[Compilation]:
    """What `mmfast audit` compiles: the three kernels, with everything asked for."""
    stats = {"mean_ptr": "*fp32", "rstd_ptr": "*fp32"}
    two_rows = {**row_arguments("_dy"), **row_arguments("_x")}
    for width in (8200, 12288, 40001):
        for dtype in (torch.float32, torch.bfloat16):
            x = triton_type(dtype)
            row = {"C": width, "BLOCK_C": BLOCK_C}
            piece = {"C": width, "BLOCK_ROWS": SLICE_BLOCK_ROWS, "BLOCK_C": SLICE_BLOCK_C}
            pointers = {"x_ptr": x, "weight_ptr": x, "bias_ptr": x, "y_ptr": x}
            forward = {**pointers, **stats, "n_rows": "i32", **row_arguments(), "eps": "fp32"}
            pointers = {"dy_ptr": x, "x_ptr": x, "weight_ptr": x}
            backward = {**pointers, **stats, "dx_ptr": x, **two_rows}
            partials = {"dweight_ptr": "*fp32", "dbias_ptr": "*fp32"}
            weights = {"dy_ptr": x, "x_ptr": x, **stats, **partials, "n_rows": "i32", **two_rows}
            for label, kernel, arguments, constants, num_warps in (
                ("wide forward", wide_forward_kernel, forward, row, NUM_WARPS),
                ("wide backward", wide_backward_kernel, backward, row, NUM_WARPS),
                ("wide weight gradient", wide_weight_gradient_kernel, weights, piece, 4),
            ):
                yield Compilation(
                    label=f"{label}[{x[1:]}-{width}]",
                    kernel=kernel,
                    arguments=arguments,
                    constants=constants,
                    num_warps=num_warps,
                    divisible=("stride_outer", "stride_outer_dy", "stride_outer_x"),
                    vector_loads=whole_vectors(width, dtype),
                    vector_stores=whole_vectors(width, dtype) and kernel is not wide_weight_gradient_kernel,
                )
