"""Layer normalisation over the last dimension, forward and backward.

    y  = xhat * weight + bias          xhat = (x - mean) * rstd,  rstd = 1 / sqrt(var + eps)
    dx = rstd * (g - mean(g) - xhat * mean(g * xhat))             g = dy * weight
    dweight = sum over rows of dy * xhat                          dbias = sum over rows of dy

Both passes read each tensor once: forward moves 2 elements (4 B in bf16), backward 3 (6 B), so both are bound by
memory bandwidth. A program holds whole rows in registers, several at once where rows are short, so the variance
is the two-pass one at no extra traffic. The backward is a persistent grid of two programs a multiprocessor: each
keeps its partial dweight and dbias in registers over all its rows and writes them once; a small second kernel adds
them up in a fixed order. No atomics, so the same input gives the same bits. Rows wider than 8192 go to
`_layer_norm_wide`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    AUDIT_MIXED_WIDTHS,
    AUDIT_ROWS,
    Compilation,
    as_rows,
    as_vector,
    column_sums,
    on_device,
    resident_programs,
    row_arguments,
    row_offsets,
    triton_type,
    whole_vectors,
)

MAX_WIDTH = 8192


@dataclass(frozen=True)
class RowConfig:
    """Shape of a program: `block_rows` rows of `block_c` columns over `num_warps` warps."""

    block_rows: int
    block_c: int
    num_warps: int

    @classmethod
    def forward(cls, width: int) -> RowConfig:
        """16 elements a thread: two 16-byte loads in bf16, and enough programs a multiprocessor."""
        block_c = triton.next_power_of_2(width)
        return cls(max(1, 2048 // block_c), block_c, min(16, max(4, block_c // 512)))

    @classmethod
    def backward(cls, width: int, *, need_dx: bool = True) -> RowConfig:
        """16 elements a thread of each of x, dy and the two partial sums: under 128 registers.

        Without dx 8: with 16 the compiler aims at 64 registers and spills a few.
        """
        block_c = triton.next_power_of_2(width)
        return cls(max(1, (4096 if need_dx else 2048) // block_c), block_c, min(16, max(8, block_c // 512)))


@triton.jit
def layer_norm_forward_kernel(
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
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.arange(0, BLOCK_C)
    inside = cols < C
    mask = (rows < n_rows)[:, None] & inside[None, :]
    starts = row_offsets(rows, inner, stride_outer, stride_inner, C)
    x = tl.load(x_ptr + starts[:, None] + cols[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32)  # [BLOCK_ROWS, BLOCK_C]
    mean = tl.sum(x, axis=1) * (1.0 / C)
    centred = tl.where(inside[None, :], x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) * (1.0 / C) + eps)
    y = centred * rstd[:, None]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + rows[:, None] * C + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
    if mean_ptr is not None:
        tl.store(mean_ptr + rows, mean, mask=rows < n_rows)
        tl.store(rstd_ptr + rows, rstd, mask=rows < n_rows)


@triton.jit
def layer_norm_backward_kernel(
    dy_ptr,  # [rows, C], strides as in Rows
    x_ptr,  # [rows, C], strides as in Rows
    weight_ptr,  # [C] or None
    mean_ptr,  # [rows] float32
    rstd_ptr,  # [rows] float32
    dx_ptr,  # [rows, C] contiguous, or None: not wanted
    dweight_ptr,  # [programs, C] float32, or None
    dbias_ptr,  # [programs, C] float32, or None
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
    cols = tl.arange(0, BLOCK_C)
    inside = cols < C
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_C]
    dweight = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    dbias = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_ROWS), tl.num_programs(0)):
        rows = block * tl.full((), BLOCK_ROWS, tl.int64) + tl.arange(0, BLOCK_ROWS)
        valid = rows < n_rows
        mask = valid[:, None] & inside[None, :]
        x_starts = row_offsets(rows, inner_x, stride_outer_x, stride_inner_x, C)
        dy_starts = row_offsets(rows, inner_dy, stride_outer_dy, stride_inner_dy, C)
        x = tl.load(x_ptr + x_starts[:, None] + cols[None, :], mask=mask, other=0.0)
        dy = tl.load(dy_ptr + dy_starts[:, None] + cols[None, :], mask=mask, other=0.0)
        mean = tl.load(mean_ptr + rows, mask=valid, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=valid, other=0.0)
        dy = dy.to(tl.float32)  # [BLOCK_ROWS, BLOCK_C]
        xhat = tl.where(mask, (x.to(tl.float32) - mean[:, None]) * rstd[:, None], 0.0)
        if dweight_ptr is not None:
            dweight += dy * xhat
        if dbias_ptr is not None:
            dbias += dy
        if dx_ptr is not None:
            g = dy
            if weight_ptr is not None:
                g = dy * weight[None, :]
            mean_g = tl.sum(g, axis=1) * (1.0 / C)
            mean_gx = tl.sum(g * xhat, axis=1) * (1.0 / C)
            dx = (g - mean_g[:, None] - xhat * mean_gx[:, None]) * rstd[:, None]
            offsets = rows[:, None] * C + cols[None, :]
            tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    partial = tl.program_id(0).to(tl.int64) * C + cols
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, tl.sum(dweight, axis=0), mask=inside)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, axis=0), mask=inside)


def layer_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, save_stats: bool = True
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return y (..., C) in x's dtype and, with `save_stats`, mean and rstd (...,) in float32."""
    width = x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean = rstd = None
    if save_stats:
        mean = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
        rstd = torch.empty_like(mean)
    if x.numel() == 0:
        return y, mean, rstd
    if width > MAX_WIDTH:
        from ._layer_norm_wide import wide_forward

        wide_forward(x, weight, bias, y, mean, rstd, eps)
        return y, mean, rstd
    rows, weight, bias = as_rows(x), as_vector(weight), as_vector(bias)
    config = RowConfig.forward(width)
    with on_device(x):
        layer_norm_forward_kernel[(triton.cdiv(rows.n_rows, config.block_rows),)](
            rows.tensor,
            weight,
            bias,
            y,
            mean,
            rstd,
            *rows[1:],
            eps,
            C=width,
            BLOCK_ROWS=config.block_rows,
            BLOCK_C=config.block_c,
            num_warps=config.num_warps,
        )
    return y, mean, rstd


def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    *,
    need_dx: bool,
    dweight_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return dx (..., C) in x's dtype, and dweight and dbias (C,) in the dtypes given; None where not wanted."""
    width = x.shape[-1]
    device = x.device
    dx = torch.empty(x.shape, dtype=x.dtype, device=device) if need_dx else None
    if x.numel() == 0:
        zeros = [
            torch.zeros(width, dtype=dtype, device=device) if dtype is not None else None
            for dtype in (dweight_dtype, dbias_dtype)
        ]
        return dx, zeros[0], zeros[1]
    dweight, dbias = (
        torch.empty(width, dtype=dtype, device=device) if dtype is not None else None
        for dtype in (dweight_dtype, dbias_dtype)
    )
    with on_device(x):
        if width > MAX_WIDTH:
            from ._layer_norm_wide import wide_backward

            wide_backward(dy, x, weight, mean, rstd, dx, dweight, dbias)
            return dx, dweight, dbias
        dy_rows, x_rows, weight = as_rows(dy), as_rows(x), as_vector(weight)
        config = RowConfig.backward(width, need_dx=need_dx)
        programs = min(triton.cdiv(x_rows.n_rows, config.block_rows), resident_programs(device))
        partial_dweight, partial_dbias = (
            None if out is None else torch.empty((programs, width), dtype=torch.float32, device=device)
            for out in (dweight, dbias)
        )
        layer_norm_backward_kernel[(programs,)](
            dy_rows.tensor,
            x_rows.tensor,
            weight,
            mean,
            rstd,
            dx,
            partial_dweight,
            partial_dbias,
            x_rows.n_rows,
            *dy_rows[2:],
            *x_rows[2:],
            C=width,
            BLOCK_ROWS=config.block_rows,
            BLOCK_C=config.block_c,
            num_warps=config.num_warps,
        )
        column_sums([(partial_dweight, dweight), (partial_dbias, dbias)])
    return dx, dweight, dbias


def audit_configurations() -> Iterator[Compilation]:
    """What `mmfast audit` compiles: each width and dtype with everything asked for, and lesser calls at 768."""
    for width, dtype in AUDIT_ROWS:
        yield _audit_forward("forward", width, dtype)
        yield _audit_backward("backward", width, dtype)
    for width in AUDIT_MIXED_WIDTHS:
        yield _audit_forward("forward, fp32 weight", width, torch.bfloat16, weight=torch.float32)
        yield _audit_backward("backward, fp32 weight", width, torch.bfloat16, weight=torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        yield _audit_forward("forward, inference", 768, dtype, missing=("mean_ptr", "rstd_ptr"))
        yield _audit_forward("forward, plain", 768, dtype, missing=("weight_ptr", "bias_ptr"))
        yield _audit_forward("forward, strided", 768, dtype, strided=True)
        yield _audit_backward("backward, plain", 768, dtype, missing=("weight_ptr", "dweight_ptr", "dbias_ptr"))
        yield _audit_backward("backward, weights only", 768, dtype, missing=("dx_ptr",))
        yield _audit_backward("backward, strided", 768, dtype, strided=True)


def _audit_forward(
    label: str,
    width: int,
    dtype: torch.dtype,
    *,
    weight: torch.dtype | None = None,
    missing: tuple[str, ...] = (),
    strided: bool = False,
) -> Compilation:
    x, w = triton_type(dtype), triton_type(weight or dtype)
    config = RowConfig.forward(width)
    arguments = {
        **{"x_ptr": x, "weight_ptr": w, "bias_ptr": w, "y_ptr": x, "mean_ptr": "*fp32", "rstd_ptr": "*fp32"},
        **dict.fromkeys(missing),
        **{"n_rows": "i32", **row_arguments(strided=strided), "eps": "fp32"},
    }
    return Compilation(
        label=f"{label}[{x[1:]}-{width}]",
        kernel=layer_norm_forward_kernel,
        arguments=arguments,
        constants={"C": width, "BLOCK_ROWS": config.block_rows, "BLOCK_C": config.block_c},
        num_warps=config.num_warps,
        divisible=("stride_outer", "stride_inner"),
        vector_loads=whole_vectors(width, dtype),
        vector_stores=whole_vectors(width, dtype),
    )


def _audit_backward(
    label: str,
    width: int,
    dtype: torch.dtype,
    *,
    weight: torch.dtype | None = None,
    missing: tuple[str, ...] = (),
    strided: bool = False,
) -> Compilation:
    x, w = triton_type(dtype), triton_type(weight or dtype)
    config = RowConfig.backward(width, need_dx="dx_ptr" not in missing)
    arguments = {
        **{"dy_ptr": x, "x_ptr": x, "weight_ptr": w, "mean_ptr": "*fp32", "rstd_ptr": "*fp32", "dx_ptr": x},
        **{"dweight_ptr": "*fp32", "dbias_ptr": "*fp32"},
        **dict.fromkeys(missing),
        **{"n_rows": "i32", **row_arguments("_dy", strided=strided), **row_arguments("_x", strided=strided)},
    }
    return Compilation(
        label=f"{label}[{x[1:]}-{width}]",
        kernel=layer_norm_backward_kernel,
        arguments=arguments,
        constants={"C": width, "BLOCK_ROWS": config.block_rows, "BLOCK_C": config.block_c},
        num_warps=config.num_warps,
        divisible=("stride_outer_dy", "stride_inner_dy", "stride_outer_x", "stride_inner_x"),
        vector_loads=whole_vectors(width, dtype),
        vector_stores=whole_vectors(width, dtype) and "dx_ptr" not in missing,
    )
