"""Residual add, LayerScale, drop path and layer normalisation in one pass, forward and backward.

    s = residual + x * gamma * sample      y = LN(s) * weight + bias
    h = ds + LN'(dy)                       dresidual = h,  dx = h * gamma * sample
    dgamma = sum over rows of h * x * sample        dsample = sum over a sample of h * x * gamma

gamma (C,) is LayerScale, sample (B,) a drop-path factor for each sample; either may be absent. LN reads s as it is
stored, rounded to its dtype, so that backward recomputes the same xhat. Forward reads x and residual and writes s and
y: 8 B an element in bf16, against 16 for the separate ops with LayerScale. Backward reads dy, ds and s and writes
dresidual (8 B), plus x and dx where there is a scale (12 B). The shape of the programs is that of `layer_norm`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    AUDIT_DTYPES,
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
from .layer_norm import RowConfig

SCALE_WIDTH = 4096
"""Widest row whose program also has registers for the tiles of a scale; a wider one would spill them."""


def forward_config(width: int) -> RowConfig:
    """8 elements a thread of each of x and residual: 64 KB of loads in flight a multiprocessor, in 32 registers."""
    block_c = triton.next_power_of_2(width)
    return RowConfig(max(1, 1024 // block_c), block_c, min(32, max(4, block_c // 256)))


def backward_config(width: int) -> RowConfig:
    """8 elements a thread: of each there are up to four tiles and three partial sums in registers.

    4 where the width is odd, since each element then has an address of its own; 16 of the widest rows, of which there
    are fewer tiles (`SCALE_WIDTH`).
    """
    block_c = triton.next_power_of_2(width)
    tile = 1024 if width % 4 else 2048
    return RowConfig(max(1, tile // block_c), block_c, min(16, max(8, block_c // 256)))


@triton.jit
def add_layer_norm_forward_kernel(
    x_ptr,  # [rows, C], strides as in Rows
    residual_ptr,  # [rows, C], strides as in Rows
    gamma_ptr,  # [C] or None
    sample_ptr,  # [samples] or None
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    y_ptr,  # [rows, C] contiguous
    s_ptr,  # [rows, C] contiguous
    mean_ptr,  # [rows] float32, or None: not saved
    rstd_ptr,  # [rows] float32
    n_rows,
    rows_per_sample,
    inner_x,
    stride_outer_x,
    stride_inner_x,
    inner_r,
    stride_outer_r,
    stride_inner_r,
    eps,
    C: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.arange(0, BLOCK_C)
    valid = rows < n_rows
    inside = cols < C
    mask = valid[:, None] & inside[None, :]
    x_starts = row_offsets(rows, inner_x, stride_outer_x, stride_inner_x, C)
    r_starts = row_offsets(rows, inner_r, stride_outer_r, stride_inner_r, C)
    x = tl.load(x_ptr + x_starts[:, None] + cols[None, :], mask=mask, other=0.0)
    residual = tl.load(residual_ptr + r_starts[:, None] + cols[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32)  # [BLOCK_ROWS, BLOCK_C]
    if gamma_ptr is not None:
        x *= tl.load(gamma_ptr + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    if sample_ptr is not None:
        sample = tl.load(sample_ptr + rows // rows_per_sample, mask=valid, other=0.0)
        x *= sample.to(tl.float32)[:, None]
    offsets = rows[:, None] * C + cols[None, :]
    s = (residual.to(tl.float32) + x).to(s_ptr.dtype.element_ty)
    tl.store(s_ptr + offsets, s, mask=mask)
    s = s.to(tl.float32)
    mean = tl.sum(s, axis=1) * (1.0 / C)
    centred = tl.where(inside[None, :], s - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) * (1.0 / C) + eps)
    y = centred * rstd[:, None]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
    if mean_ptr is not None:
        tl.store(mean_ptr + rows, mean, mask=valid)
        tl.store(rstd_ptr + rows, rstd, mask=valid)


@triton.jit
def add_layer_norm_backward_kernel(
    dy_ptr,  # [rows, C] contiguous
    ds_ptr,  # [rows, C] contiguous, or None for 0
    s_ptr,  # [rows, C] contiguous
    x_ptr,  # [rows, C] contiguous, or None: no gradient of a scale is wanted
    gamma_ptr,  # [C] or None
    sample_ptr,  # [samples] or None
    weight_ptr,  # [C] or None
    mean_ptr,  # [rows] float32
    rstd_ptr,  # [rows] float32
    dx_ptr,  # [rows, C] contiguous, or None: not wanted, or the same as dresidual
    dresidual_ptr,  # [rows, C] contiguous, or None: not wanted
    dweight_ptr,  # [programs, C] float32, or None
    dbias_ptr,  # [programs, C] float32, or None
    dgamma_ptr,  # [programs, C] float32, or None
    dsample_ptr,  # [rows] float32, or None; summed over the rows of a sample by the launcher
    n_rows,
    rows_per_sample,
    C: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    cols = tl.arange(0, BLOCK_C)
    inside = cols < C
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_C]
    if gamma_ptr is not None:
        gamma = tl.load(gamma_ptr + cols, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_C]
    dweight = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    dbias = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    dgamma = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_ROWS), tl.num_programs(0)):
        rows = block * tl.full((), BLOCK_ROWS, tl.int64) + tl.arange(0, BLOCK_ROWS)
        valid = rows < n_rows
        mask = valid[:, None] & inside[None, :]
        offsets = rows[:, None] * C + cols[None, :]
        s = tl.load(s_ptr + offsets, mask=mask, other=0.0)
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0)
        mean = tl.load(mean_ptr + rows, mask=valid, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=valid, other=0.0)
        dy = dy.to(tl.float32)  # [BLOCK_ROWS, BLOCK_C]
        xhat = tl.where(mask, (s.to(tl.float32) - mean[:, None]) * rstd[:, None], 0.0)
        if dweight_ptr is not None:
            dweight += dy * xhat
        if dbias_ptr is not None:
            dbias += dy
        g = dy
        if weight_ptr is not None:
            g = dy * weight[None, :]
        mean_g = tl.sum(g, axis=1) * (1.0 / C)
        mean_gx = tl.sum(g * xhat, axis=1) * (1.0 / C)
        h = (g - mean_g[:, None] - xhat * mean_gx[:, None]) * rstd[:, None]
        if ds_ptr is not None:
            h += tl.load(ds_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + offsets, h.to(dresidual_ptr.dtype.element_ty), mask=mask)
        if sample_ptr is not None:
            sample = tl.load(sample_ptr + rows // rows_per_sample, mask=valid, other=0.0)
            sample = sample.to(tl.float32)
        if x_ptr is not None:
            hx = tl.where(mask, h, 0.0) * tl.load(x_ptr + offsets, mask=mask, other=0.0)
            if dgamma_ptr is not None:
                if sample_ptr is not None:
                    dgamma += hx * sample[:, None]
                else:
                    dgamma += hx
            if dsample_ptr is not None:
                if gamma_ptr is not None:
                    hx *= gamma[None, :]
                tl.store(dsample_ptr + rows, tl.sum(hx, axis=1), mask=valid)
        if dx_ptr is not None:
            if gamma_ptr is not None:
                h *= gamma[None, :]
            if sample_ptr is not None:
                h *= sample[:, None]
            tl.store(dx_ptr + offsets, h.to(dx_ptr.dtype.element_ty), mask=mask)
    partial = tl.program_id(0).to(tl.int64) * C + cols
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, tl.sum(dweight, axis=0), mask=inside)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, axis=0), mask=inside)
    if dgamma_ptr is not None:
        tl.store(dgamma_ptr + partial, tl.sum(dgamma, axis=0), mask=inside)


def add_layer_norm_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    gamma: Tensor | None,
    sample: Tensor | None,
    *,
    save_stats: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return y and s (..., C) in the wider dtype of x and residual and, with `save_stats`, mean and rstd (...,).

    At most MAX_WIDTH columns.
    """
    width = x.shape[-1]
    dtype = torch.promote_types(x.dtype, residual.dtype)
    s = torch.empty(x.shape, dtype=dtype, device=x.device)
    y = torch.empty_like(s)
    mean = rstd = None
    if save_stats:
        mean = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
        rstd = torch.empty_like(mean)
    if x.numel() == 0:
        return y, s, mean, rstd
    x_rows, r_rows = as_rows(x), as_rows(residual)
    config = forward_config(width)
    with on_device(x):
        add_layer_norm_forward_kernel[(triton.cdiv(x_rows.n_rows, config.block_rows),)](
            x_rows.tensor,
            r_rows.tensor,
            as_vector(gamma),
            as_vector(sample),
            as_vector(weight),
            as_vector(bias),
            y,
            s,
            mean,
            rstd,
            x_rows.n_rows,
            x_rows.n_rows // x.shape[0],
            *x_rows[2:],
            *r_rows[2:],
            eps,
            C=width,
            BLOCK_ROWS=config.block_rows,
            BLOCK_C=config.block_c,
            num_warps=config.num_warps,
        )
    return y, s, mean, rstd


def add_layer_norm_backward(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    gamma: Tensor | None,
    sample: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    *,
    dx_dtype: torch.dtype | None,
    dresidual_dtype: torch.dtype | None,
    dweight_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
    dgamma_dtype: torch.dtype | None,
    dsample_dtype: torch.dtype | None,
) -> tuple[Tensor | None, ...]:
    """Return dx, dresidual (..., C), dweight, dbias, dgamma (C,) and dsample (samples,) in the dtypes given.

    None where no dtype is given. x may be None unless dgamma or dsample is wanted.
    """
    width, device = s.shape[-1], s.device
    if width > SCALE_WIDTH and (gamma is not None or sample is not None):
        asked = {"dresidual_dtype": torch.float32, "dweight_dtype": dweight_dtype, "dbias_dtype": dbias_dtype}
        none = dict.fromkeys(("dx_dtype", "dgamma_dtype", "dsample_dtype"))
        plain = add_layer_norm_backward(dy, ds, s, None, weight, None, None, mean, rstd, **asked, **none)
        dtypes = (dx_dtype, dresidual_dtype, dgamma_dtype, dsample_dtype)
        h = cast(Tensor, plain[1])  # asked for above
        dx, dresidual, dgamma, dsample = _scale_backward(h, x, gamma, sample, dtypes)
        return dx, dresidual, plain[2], plain[3], dgamma, dsample
    tiles = [
        None if dtype is None else torch.empty(s.shape, dtype=dtype, device=device)
        for dtype in (dx_dtype, dresidual_dtype)
    ]
    make = torch.empty if s.numel() else torch.zeros
    vectors = [
        None if dtype is None else make(width, dtype=dtype, device=device)
        for dtype in (dweight_dtype, dbias_dtype, dgamma_dtype)
    ]
    if s.numel() == 0:
        dsample = None if dsample_dtype is None or sample is None else torch.zeros_like(sample)
        return (*tiles, *vectors, dsample)
    count = s.numel() // width
    config = backward_config(width)
    programs = min(triton.cdiv(count, config.block_rows), resident_programs(device))
    partials = [
        None if out is None else torch.empty((programs, width), dtype=torch.float32, device=device) for out in vectors
    ]
    by_row = None if dsample_dtype is None else torch.empty(count, dtype=torch.float32, device=device)
    with on_device(s):
        add_layer_norm_backward_kernel[(programs,)](
            dy.contiguous(),
            None if ds is None else ds.contiguous(),
            s,
            None if x is None else x.contiguous(),
            as_vector(gamma),
            as_vector(sample),
            as_vector(weight),
            mean,
            rstd,
            *tiles,
            *partials,
            by_row,
            count,
            count // s.shape[0],
            C=width,
            BLOCK_ROWS=config.block_rows,
            BLOCK_C=config.block_c,
            num_warps=config.num_warps,
        )
        column_sums(list(zip(partials, vectors, strict=True)))
    dsample = None if by_row is None else by_row.view(s.shape[0], -1).sum(1).to(dsample_dtype)
    return (*tiles, *vectors, dsample)


def _scale_backward(
    h: Tensor, x: Tensor | None, gamma: Tensor | None, sample: Tensor | None, dtypes: tuple[torch.dtype | None, ...]
) -> tuple[Tensor | None, ...]:
    """dx, dresidual, dgamma and dsample from h = dresidual in float32, in torch ops: rows too wide for the kernel."""
    column = None if sample is None else sample.float().view(-1, *[1] * (h.dim() - 1))
    dx, hx = h, None if x is None else h * x
    dgamma, dsample = hx, hx
    if gamma is not None:
        dx, dsample = dx * gamma, None if dsample is None else dsample * gamma
    if column is not None:
        dx, dgamma = dx * column, None if dgamma is None else dgamma * column
    dgamma = None if dgamma is None else dgamma.flatten(0, -2).sum(0)
    dsample = None if dsample is None else dsample.flatten(1).sum(1)
    found = (dx, h, dgamma, dsample)
    return tuple(
        g.to(dtype) if g is not None and dtype is not None else None for g, dtype in zip(found, dtypes, strict=True)
    )


def audit_configurations() -> Iterator[Compilation]:
    """What `mmfast audit` compiles: each width and dtype with everything asked for, and lesser calls at 768."""
    scales = {"no scale": ("gamma", "sample"), "gamma": ("sample",), "sample": ("gamma",)}
    for width, dtype in AUDIT_ROWS:
        yield _audit_forward("forward", width, dtype)
        if width <= SCALE_WIDTH:
            yield _audit_backward("backward", width, dtype)
    for width in AUDIT_MIXED_WIDTHS:  # autocast: a 16-bit branch, a float32 residual stream
        yield _audit_forward("forward, fp32 residual", width, torch.bfloat16, residual=torch.float32)
        if width <= SCALE_WIDTH:
            yield _audit_backward("backward, fp32 residual", width, torch.bfloat16, residual=torch.float32)
    for width, dtype in (*((768, dtype) for dtype in AUDIT_DTYPES), *((8192, dtype) for dtype in AUDIT_DTYPES)):
        yield _audit_backward("backward, no scale", width, dtype, missing=("gamma", "sample", "x", "dx"))
    yield _audit_backward(
        "backward, wide", 8192, torch.bfloat16, missing=("gamma", "sample", "x", "dx"), h_float32=True
    )
    for dtype in (torch.float32, torch.bfloat16):
        for label, missing in scales.items():
            yield _audit_forward(f"forward, {label}", 768, dtype, missing=missing)
        yield _audit_forward("forward, inference", 768, dtype, missing=("mean", "rstd"))
        yield _audit_forward("forward, strided", 768, dtype, strided=True)
        yield _audit_backward("backward, gamma", 768, dtype, missing=("sample", "dsample"))
        yield _audit_backward("backward, sample", 768, dtype, missing=("gamma", "dgamma", "x", "dsample"))


def _audit_forward(
    label: str,
    width: int,
    dtype: torch.dtype,
    *,
    residual: torch.dtype | None = None,
    missing: tuple[str, ...] = (),
    strided: bool = False,
) -> Compilation:
    x, s = triton_type(dtype), triton_type(residual or dtype)
    config = forward_config(width)
    types = {"x": x, "residual": s, "gamma": x, "sample": x, "weight": s, "bias": s, "y": s, "s": s}
    types |= {"mean": "*fp32", "rstd": "*fp32"}
    return Compilation(
        label=f"{label}[{x[1:]}-{width}]",
        kernel=add_layer_norm_forward_kernel,
        arguments={
            **{f"{name}_ptr": None if name in missing else kind for name, kind in types.items()},
            **{"n_rows": "i32", "rows_per_sample": "i32", "eps": "fp32"},
            **row_arguments("_x", strided=strided),
            **row_arguments("_r", strided=strided),
        },
        constants={"C": width, "BLOCK_ROWS": config.block_rows, "BLOCK_C": config.block_c},
        num_warps=config.num_warps,
        divisible=("stride_outer_x", "stride_inner_x", "stride_outer_r", "stride_inner_r"),
        vector_loads=whole_vectors(width, dtype),
        vector_stores=whole_vectors(width, dtype),
    )


def _audit_backward(
    label: str,
    width: int,
    dtype: torch.dtype,
    *,
    residual: torch.dtype | None = None,
    missing: tuple[str, ...] = (),
    h_float32: bool = False,
) -> Compilation:
    x, s = triton_type(dtype), triton_type(residual or dtype)
    if "x" in missing:  # read for the gradients of the scales alone
        missing = (*missing, "dgamma", "dsample")
    config = backward_config(width)
    types = {"dy": s, "ds": s, "s": s, "x": x, "gamma": x, "sample": x, "weight": s, "mean": "*fp32", "rstd": "*fp32"}
    types |= {
        "dx": x,
        "dresidual": "*fp32" if h_float32 else s,
        "dweight": "*fp32",
        "dbias": "*fp32",
        "dgamma": "*fp32",
        "dsample": "*fp32",
    }
    return Compilation(
        label=f"{label}[{x[1:]}-{width}]",
        kernel=add_layer_norm_backward_kernel,
        arguments={
            **{f"{name}_ptr": None if name in missing else kind for name, kind in types.items()},
            **{"n_rows": "i32", "rows_per_sample": "i32"},
        },
        constants={"C": width, "BLOCK_ROWS": config.block_rows, "BLOCK_C": config.block_c},
        num_warps=config.num_warps,
        vector_loads=whole_vectors(width, dtype),
        vector_stores=whole_vectors(width, dtype),
    )
