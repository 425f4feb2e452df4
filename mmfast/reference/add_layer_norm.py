"""Reference of `add_layer_norm`, and the inputs it is verified on."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ._case import Case, Inputs, normal
from .layer_norm import layer_norm


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    scale: Tensor | tuple[Tensor | None, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """`s = residual + x * scale` and `y = layer_norm(s)`, as (y, s).

    A scale of shape (C,) is one factor a channel; any other one has a factor a sample, the first dimension.
    """
    for factor in scale if isinstance(scale, tuple) else (scale,):
        if factor is not None:
            channels = factor.dim() == 1 and factor.shape[0] == x.shape[-1]
            x = x * (factor if channels else factor.reshape(-1, *[1] * (x.dim() - 1)))
    s = residual + x
    return layer_norm(s, weight, bias, eps), s


SHAPES = ((1, 1), (3, 2, 5), (2, 7, 64), (5, 197), (2, 3, 768))
SHAPES_GPU = ((256, 197, 768), (256, 257, 1024), (8, 257, 1408), (1, 257, 8192), (2, 5, 9000))


def cases(dtype: torch.dtype, device: torch.device, *, large: bool) -> list[Case]:
    """Inputs for `verify`: without a scale, with LayerScale, with drop path, and with both."""
    return [
        Case(f"{'x'.join(map(str, shape))} {scaled}".strip(), partial(_draw, shape, scaled, dtype, device))
        for shape in SHAPES + (SHAPES_GPU if large else ())
        for scaled in ("", "gamma", "sample", "both")
        # With B = C a vector of B means channels.
        if shape[0] != shape[-1] or scaled in ("", "gamma")
    ]


def _draw(shape: tuple[int, ...], scaled: str, dtype: torch.dtype, device: torch.device) -> Inputs:
    x, residual = (normal(shape, dtype, device) for _ in range(2))
    gamma = normal(shape[-1:], dtype, device, std=0.3)
    sample = normal((shape[0],), dtype, device, mean=1.0)
    weight = normal(shape[-1:], dtype, device, mean=1.0, std=0.5)
    bias = normal(shape[-1:], dtype, device)
    scale = {"": None, "gamma": gamma, "sample": sample, "both": (gamma, sample)}[scaled]
    return (x, residual, weight, bias), {"scale": scale}
