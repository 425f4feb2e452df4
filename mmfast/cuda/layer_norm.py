"""Launchers of csrc/layer_norm.cu: those of `mmfast.kernels.layer_norm`, by name, arguments and results.

At most 8192 columns. Host time counts here: no more than a few operations a call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import DTYPES, as_rows, current, extension, programs

Arguments = tuple[int, ...]

_NONE = (0, 0)


def layer_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, save_stats: bool = True
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return y (..., C) in x's dtype and, with `save_stats`, mean and rstd (...,) in float32."""
    width, contiguous = x.size(-1), x.is_contiguous()
    y = torch.empty_like(x) if contiguous else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean = rstd = None
    if save_stats:
        mean = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
        rstd = torch.empty_like(mean)
    count = x.numel()
    if count == 0:
        return y, mean, rstd
    n_rows = count // width
    x, rows = (x, (x.data_ptr(), n_rows, 0, width)) if contiguous else row_arguments(x, n_rows, width)
    weight, weight_arguments = vector_arguments(weight)
    bias, bias_arguments = vector_arguments(bias)
    extension().layer_norm_forward(
        *rows,
        *weight_arguments,
        *bias_arguments,
        y.data_ptr(),
        0 if mean is None else mean.data_ptr(),
        0 if rstd is None else rstd.data_ptr(),
        n_rows,
        width,
        eps,
        DTYPES[x.dtype],
        *current(x),
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
    count, width = x.numel(), x.size(-1)
    device = x.device
    make = torch.empty if count else torch.zeros
    dx = None
    if need_dx:
        dx = torch.empty_like(x) if x.is_contiguous() else torch.empty(x.shape, dtype=x.dtype, device=device)
    dweight = None if dweight_dtype is None else make(width, dtype=dweight_dtype, device=device)
    dbias = None if dbias_dtype is None else make(width, dtype=dbias_dtype, device=device)
    if count == 0:
        return dx, dweight, dbias
    n_rows = count // width
    dy, dy_arguments = row_arguments(dy, n_rows, width)
    x, x_arguments = row_arguments(x, n_rows, width)
    weight, weight_arguments = vector_arguments(weight)
    blocks = programs(x)
    workspace = None
    if dweight is not None or dbias is not None:
        workspace = torch.empty(2 * blocks * width, dtype=torch.float32, device=device)
    extension().layer_norm_backward(
        *dy_arguments,
        *x_arguments,
        *weight_arguments,
        mean.data_ptr(),
        rstd.data_ptr(),
        0 if dx is None else dx.data_ptr(),
        *result_arguments(dweight),
        *result_arguments(dbias),
        0 if workspace is None else workspace.data_ptr(),
        blocks,
        n_rows,
        width,
        DTYPES[x.dtype],
        *current(x),
    )
    return dx, dweight, dbias


# Tensors as the extension takes them, with the tensor that a pointer is of: a copy must live until the launch.


def row_arguments(x: Tensor, n_rows: int, width: int) -> tuple[Tensor, Arguments]:
    """Rows of x (..., C): pointer, inner, outer and stride."""
    if x.is_contiguous():
        return x, (x.data_ptr(), n_rows, 0, width)
    rows = as_rows(x)
    if rows.inner < n_rows and n_rows >> 32:  # a row's number is divided in 32 bits
        x = x.contiguous()
        return x, (x.data_ptr(), n_rows, 0, width)
    return rows.tensor, (rows.tensor.data_ptr(), rows.inner, rows.outer, rows.stride)


def vector_arguments(v: Tensor | None) -> tuple[Tensor | None, Arguments]:
    """A parameter (C,): pointer and dtype."""
    if v is None:
        return None, _NONE
    if not v.is_contiguous():
        v = v.contiguous()
    return v, (v.data_ptr(), DTYPES[v.dtype])


def result_arguments(v: Tensor | None) -> Arguments:
    """A fresh tensor: pointer and dtype."""
    return _NONE if v is None else (v.data_ptr(), DTYPES[v.dtype])
