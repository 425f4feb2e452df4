"""What the contrastive losses share: checks of their arguments, unit rows and their gradient, and float32 products."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._register import autocasts
from ._validate import check_tensor

UNIT_EPS = 1e-12
"""Least norm that a row is divided by, as in `F.normalize`."""
WIDEST_ROW = 8192
"""Columns that one program of a kernel holds; wider rows are PyTorch's."""


def check_features(op: str, image: Tensor, text: Tensor) -> None:
    """Raise unless both are (rows, D) tensors of one floating dtype, width and device."""
    for name, value in (("image_features", image), ("text_features", text)):
        check_tensor(op, name, value)
        if value.dim() != 2:
            raise ValueError(f"{op}: {name} must have shape (B, D), got {tuple(value.shape)}")
    width = image.shape[1]
    if text.shape[1] != width:
        raise ValueError(f"{op}: text_features must have {width} columns like image_features, got {text.shape[1]}")
    if text.device != image.device:
        raise ValueError(f"{op}: text_features must be on {image.device} like image_features, got {text.device}")
    if text.dtype != image.dtype and (torch.float64 in (image.dtype, text.dtype) or not lowered(image)):
        raise TypeError(f"{op}: text_features must be {image.dtype} like image_features, got {text.dtype}")


def check_ids(op: str, image: Tensor, text: Tensor, image_ids: object, text_ids: object) -> None:
    """Raise unless both are None, or integers of the rows of `image` and of `text`."""
    if (image_ids is None) != (text_ids is None):
        missing, given = ("image_ids", "text_ids") if image_ids is None else ("text_ids", "image_ids")
        raise ValueError(f"{op}: {missing} must be given beside {given}")
    for name, ids, x in (("image_ids", image_ids, image), ("text_ids", text_ids, text)):
        if ids is None:
            continue
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
            raise TypeError(f"{op}: {name} must be a tensor of integers, got {kind}")
        if ids.shape != x.shape[:1]:
            raise ValueError(f"{op}: {name} must have shape ({len(x)},), got {tuple(ids.shape)}")
        if ids.device != x.device:
            raise ValueError(f"{op}: {name} must be on {x.device} like the features, got {ids.device}")


def as_scalar(op: str, name: str, value: object, x: Tensor) -> Tensor:
    """A number, or a tensor of shape [] or [1], as a scalar tensor in x's statistics dtype, with its gradient."""
    dtype = statistics_dtype(x.dtype)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.full((), float(value), dtype=dtype, device=x.device)  # a fill, not a copy from the host
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a number or a tensor, got {type(value).__name__}")
    check_tensor(op, name, value)
    if value.shape not in ((), (1,)):
        raise ValueError(f"{op}: {name} must have shape () or (1,), got {tuple(value.shape)}")
    if value.device != x.device:
        raise ValueError(f"{op}: {name} must be on {x.device} like image_features, got {value.device}")
    value = value.reshape(()) if value.dim() else value  # a view costs the host microseconds
    return value if value.dtype == dtype else value.to(dtype)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64 features."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def lowered(x: Tensor) -> bool:
    """Whether autocast would lower the precision of a product of x."""
    return autocasts(x.device) and x.dtype != torch.float64


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which features enter the products: x's, or autocast's. Gradients keep x's own."""
    return torch.get_autocast_dtype(x.device.type) if lowered(x) else x.dtype


def unit_rows(x: Tensor, dtype: torch.dtype, normalize: bool, backend: str = "torch") -> tuple[Tensor, Tensor]:
    """x (B, D) in `dtype`, contiguous, its rows scaled to length 1 if `normalize`, and 1 / length (B,) or empty."""
    if not normalize:
        return x.to(dtype).contiguous(), x.new_empty(0, dtype=statistics_dtype(x.dtype))
    if _kernel_serves(x, backend):
        from ..kernels import _contrastive_rows

        return _contrastive_rows.unit_rows(x, dtype)
    exact = x.to(statistics_dtype(x.dtype))
    rnorm = torch.linalg.vector_norm(exact, dim=1).clamp_min(UNIT_EPS).reciprocal()
    return (exact * rnorm[:, None]).to(dtype), rnorm


class Extra(NamedTuple):
    """What is added to a gradient of unit rows: `pair * partner + weight * mean + offset`."""

    pair: Tensor | None = None  # (B,)
    partner: Tensor | None = None  # (B, D)
    weight: Tensor | None = None  # (B,)
    mean: Tensor | None = None  # (D,)
    offset: Tensor | None = None  # (D,)


def finish_rows(
    x: Tensor,
    rnorm: Tensor,
    gradient: Tensor,
    factor: Tensor,
    extra: Extra | None = None,
    backend: str = "torch",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """From `gradient + extra` (B, D) by unit rows: that by x, times `factor`, and sum(unit row * it) (B,).

    `gradient` may be overwritten. The first result is in `dtype`, x's by default. The gradient of the scale adds up
    from the sum, and that of `F.normalize` needs it.
    """
    extra = extra or Extra()
    if _kernel_serves(x, backend):
        from ..kernels import _contrastive_rows

        given = rnorm if rnorm.numel() else None
        return _contrastive_rows.finish_rows(x, given, gradient, factor, **extra._asdict(), dtype=dtype)
    if extra.pair is not None and extra.partner is not None:
        gradient.addcmul_(extra.pair[:, None], extra.partner.to(gradient.dtype))
    if extra.weight is not None and extra.mean is not None and extra.offset is not None:
        gradient.addcmul_(extra.weight[:, None], extra.mean).add_(extra.offset)
    exact = x.to(gradient.dtype)
    if not rnorm.numel():
        along = torch.linalg.vecdot(exact, gradient)
        return gradient.mul_(factor).to(dtype or x.dtype), along
    unit = exact * rnorm[:, None]
    along = torch.linalg.vecdot(unit, gradient)
    # A row shorter than UNIT_EPS is divided by a constant.
    inside = torch.where(rnorm < 1 / UNIT_EPS, along, 0.0)
    gradient.addcmul_(unit, inside[:, None], value=-1).mul_(rnorm[:, None] * factor)
    return gradient.to(dtype or x.dtype), along


def _kernel_serves(x: Tensor, backend: str) -> bool:
    return backend == "triton" and 0 < x.shape[1] <= WIDEST_ROW


def product(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """`a b^T` in `dtype`, float32 sums of 16-bit products included."""
    if a.dtype == dtype:
        return torch.mm(a, b.T, out=out)
    if a.is_cuda and mm_takes_dtype():
        return torch.mm(a, b.T, out_dtype=dtype)
    return torch.mm(a.to(dtype), b.to(dtype).T, out=out)


def mm_takes_dtype() -> bool:
    """Whether `torch.mm` of 16-bit CUDA tensors can give float32."""
    return "dtype" in torch.ops.aten.mm.overloads()
