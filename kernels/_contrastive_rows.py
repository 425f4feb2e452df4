"""Rows of features before and after a contrastive loss: division by their length, and the gradient through it.

    unit = x / max(|x|, 1e-12)            dx = (g - unit <unit, g>) / |x|            <unit, g>, which the scale takes

One pass each, a few rows a program, a row in registers: reads x (and g, float32), writes unit (and dx). What the loss
adds to g without the matrix of logits is added here: the positives' part, and that of label smoothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import Compilation, on_device, triton_type, whole_vectors

EPS = tl.constexpr(1e-12)


@triton.jit
def unit_rows_kernel(
    x_ptr,  # [n_rows, D], rows stride_x apart
    out_ptr,  # [n_rows, D] contiguous
    rnorm_ptr,  # [n_rows] float32
    n_rows,
    stride_x,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    depth = tl.arange(0, BLOCK_D)
    keep = rows < n_rows
    mask = keep[:, None] & (depth < D)[None, :]
    starts = rows.to(tl.int64)[:, None]
    x = tl.load(x_ptr + starts * stride_x + depth[None, :], mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_D]
    rnorm = 1.0 / tl.maximum(tl.sqrt_rn(tl.sum(x * x, 1)), EPS)
    tl.store(out_ptr + starts * D + depth[None, :], (x * rnorm[:, None]).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(rnorm_ptr + rows, rnorm, mask=keep)


@triton.jit
def finish_rows_kernel(
    x_ptr,  # [n_rows, D], rows stride_x apart
    rnorm_ptr,  # [n_rows] or None: rows as they are
    gradient_ptr,  # [n_rows, D] float32
    factor_ptr,  # []
    pair_ptr,  # [n_rows] or None
    partner_ptr,  # [n_rows, D]: the other side's features of the same pairs
    weight_ptr,  # [n_rows] or None
    mean_ptr,  # [D]
    offset_ptr,  # [D]
    out_ptr,  # [n_rows, D] contiguous
    along_ptr,  # [n_rows] float32
    n_rows,
    stride_x,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    depth = tl.arange(0, BLOCK_D)
    keep = rows < n_rows
    wide = depth < D
    mask = keep[:, None] & wide[None, :]
    starts = rows.to(tl.int64)[:, None]
    at = starts * D + depth[None, :]
    x = tl.load(x_ptr + starts * stride_x + depth[None, :], mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_D]
    g = tl.load(gradient_ptr + at, mask=mask, other=0.0)
    if pair_ptr is not None:
        pair = tl.load(pair_ptr + rows, mask=keep, other=0.0)
        g += pair[:, None] * tl.load(partner_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + rows, mask=keep, other=0.0)
        g += weight[:, None] * tl.load(mean_ptr + depth, mask=wide, other=0.0)[None, :]
        g += tl.load(offset_ptr + depth, mask=wide, other=0.0)[None, :]
    factor = tl.load(factor_ptr).to(tl.float32)
    if rnorm_ptr is not None:
        rnorm = tl.load(rnorm_ptr + rows, mask=keep, other=0.0)
        x *= rnorm[:, None]
        along = tl.sum(x * g, 1)
        # A row shorter than EPS is divided by a constant.
        g = (g - x * tl.where(rnorm < 0.999 / EPS, along, 0.0)[:, None]) * (rnorm * factor)[:, None]
    else:
        along = tl.sum(x * g, 1)
        g *= factor
    tl.store(out_ptr + at, g.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(along_ptr + rows, along, mask=keep)


def unit_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x (B, D) divided by its rows' lengths, in `dtype`, and 1 / length (B,) in float32."""
    x = _rows(x)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    rnorm = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    grid, constants = _launch(x)
    with on_device(x):
        unit_rows_kernel[grid](x, out, rnorm, x.shape[0], x.stride(0), **constants, num_warps=4)
    return out, rnorm


def finish_rows(
    x: Tensor,
    rnorm: Tensor | None,
    gradient: Tensor,
    factor: Tensor,
    *,
    pair: Tensor | None = None,
    partner: Tensor | None = None,
    weight: Tensor | None = None,
    mean: Tensor | None = None,
    offset: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """dx (B, D) and <unit row, gradient> (B,), of `gradient + pair * partner + weight * mean + offset`.

    dx is in `dtype`, x's by default; where that is the gradient's, it takes its place.
    """
    x = _rows(x)
    dtype = dtype or x.dtype
    out = gradient if dtype == gradient.dtype else torch.empty(x.shape, dtype=dtype, device=x.device)
    along = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    grid, constants = _launch(x)
    with on_device(x):
        finish_rows_kernel[grid](
            x,
            rnorm,
            gradient,
            factor,
            pair,
            partner,
            weight,
            mean,
            offset,
            out,
            along,
            x.shape[0],
            x.stride(0),
            **constants,
            num_warps=4,
        )
    return out, along


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _launch(x: Tensor) -> tuple[tuple[int], dict[str, int]]:
    block = triton.next_power_of_2(x.shape[1])
    rows = max(1, 2048 // block)
    return (triton.cdiv(x.shape[0], rows),), {"D": x.shape[1], "BLOCK_M": rows, "BLOCK_D": block}


def audit_configurations() -> Iterator[Compilation]:
    """Both kernels at CLIP's widths, with everything added and with nothing."""
    for width, dtype in (
        *((width, torch.bfloat16) for width in (512, 513, 768, 1024, 8192)),
        *((512, dtype) for dtype in (torch.float16, torch.float32)),
    ):
        kind = triton_type(dtype)
        rows = max(1, 2048 // triton.next_power_of_2(width))
        shared: dict[str, Any] = {
            "constants": {"D": width, "BLOCK_M": rows, "BLOCK_D": triton.next_power_of_2(width)},
            "num_warps": 4,
            "divisible": ("stride_x",) if whole_vectors(width, dtype) else (),
            "vector_loads": whole_vectors(width, dtype),
        }
        yield Compilation(
            label=f"unit rows[{kind[1:]}-{width}]",
            kernel=unit_rows_kernel,
            arguments={"x_ptr": kind, "out_ptr": kind, "rnorm_ptr": "*fp32", "n_rows": "i32", "stride_x": "i32"},
            **shared,
        )
        for full in (False, True):
            given = "*fp32" if full else None
            yield Compilation(
                label=f"finish rows{', all' if full else ''}[{kind[1:]}-{width}]",
                kernel=finish_rows_kernel,
                arguments={
                    "x_ptr": kind,
                    "rnorm_ptr": given,
                    "gradient_ptr": "*fp32",
                    "factor_ptr": "*fp32",
                    **dict.fromkeys(("pair_ptr", "weight_ptr", "mean_ptr", "offset_ptr"), given),
                    "partner_ptr": kind if full else None,
                    "out_ptr": kind,
                    "along_ptr": "*fp32",
                    "n_rows": "i32",
                    "stride_x": "i32",
                },
                **shared,
            )
