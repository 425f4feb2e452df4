"""Launchers of csrc/add_layer_norm_*.cu: those of `mmfast.kernels.add_layer_norm`, by name, arguments and results.

At most 8192 columns. Host time counts here: no more than a few operations a call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import DTYPES, current, extension, programs
from .layer_norm import Arguments, result_arguments, row_arguments, vector_arguments

_NO_ROWS: Arguments = (0, 0, 0, 0)


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
    """Return y and s (..., C) in the wider dtype of x and residual and, with `save_stats`, mean and rstd (...,)."""
    shape, device = x.shape, x.device
    dtype = x.dtype if x.dtype == residual.dtype else torch.promote_types(x.dtype, residual.dtype)
    s = torch.empty(shape, dtype=dtype, device=device)
    y = torch.empty_like(s)
    mean = rstd = None
    if save_stats:
        mean = torch.empty(shape[:-1], dtype=torch.float32, device=device)
        rstd = torch.empty_like(mean)
    count, width = s.numel(), shape[-1]
    if count == 0:
        return y, s, mean, rstd
    n_rows = count // width
    x, x_arguments = row_arguments(x, n_rows, width)
    residual, residual_arguments = row_arguments(residual, n_rows, width)
    gamma, gamma_arguments = vector_arguments(gamma)
    sample, sample_arguments = vector_arguments(sample)
    weight, weight_arguments = vector_arguments(weight)
    bias, bias_arguments = vector_arguments(bias)
    extension().add_layer_norm_forward(
        *x_arguments,
        DTYPES[x.dtype],
        *residual_arguments,
        DTYPES[residual.dtype],
        *gamma_arguments,
        *sample_arguments,
        *weight_arguments,
        *bias_arguments,
        y.data_ptr(),
        s.data_ptr(),
        0 if mean is None else mean.data_ptr(),
        0 if rstd is None else rstd.data_ptr(),
        n_rows,
        n_rows // shape[0],
        width,
        eps,
        DTYPES[dtype],
        *current(s),
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
    shape, device = s.shape, s.device
    count, width = s.numel(), shape[-1]
    make = torch.empty if count else torch.zeros
    dx = None if dx_dtype is None else torch.empty(shape, dtype=dx_dtype, device=device)
    dresidual = None if dresidual_dtype is None else torch.empty(shape, dtype=dresidual_dtype, device=device)
    dweight = None if dweight_dtype is None else make(width, dtype=dweight_dtype, device=device)
    dbias = None if dbias_dtype is None else make(width, dtype=dbias_dtype, device=device)
    dgamma = None if dgamma_dtype is None else make(width, dtype=dgamma_dtype, device=device)
    if count == 0:
        dsample = None if dsample_dtype is None or sample is None else torch.zeros_like(sample)
        return dx, dresidual, dweight, dbias, dgamma, dsample
    n_rows = count // width
    s = s.contiguous()
    dy, dy_arguments = row_arguments(dy, n_rows, width)
    ds_arguments = x_arguments = _NO_ROWS
    if ds is not None:
        ds, ds_arguments = row_arguments(ds, n_rows, width)
    if x is not None:
        x, x_arguments = row_arguments(x, n_rows, width)
    gamma, gamma_arguments = vector_arguments(gamma)
    sample, sample_arguments = vector_arguments(sample)
    weight, weight_arguments = vector_arguments(weight)
    blocks = programs(s)
    workspace = by_row = None
    if dweight is not None or dbias is not None or dgamma is not None:
        workspace = torch.empty(3 * blocks * width, dtype=torch.float32, device=device)
    if dsample_dtype is not None:
        by_row = torch.empty(n_rows, dtype=torch.float32, device=device)
    extension().add_layer_norm_backward(
        *dy_arguments,
        *ds_arguments,
        *x_arguments,
        0 if x is None else DTYPES[x.dtype],
        s.data_ptr(),
        *gamma_arguments,
        *sample_arguments,
        *weight_arguments,
        mean.data_ptr(),
        rstd.data_ptr(),
        *result_arguments(dx),
        *result_arguments(dresidual),
        *result_arguments(dweight),
        *result_arguments(dbias),
        *result_arguments(dgamma),
        0 if by_row is None else by_row.data_ptr(),
        0 if workspace is None else workspace.data_ptr(),
        blocks,
        n_rows,
        n_rows // shape[0],
        width,
        DTYPES[s.dtype],
        *current(s),
    )
    dsample = None if by_row is None else by_row.view(shape[0], -1).sum(1).to(dsample_dtype)
    return dx, dresidual, dweight, dbias, dgamma, dsample
