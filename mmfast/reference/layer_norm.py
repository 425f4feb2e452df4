"""Reference of `layer_norm`, and the inputs it is verified on."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ._case import Case, Inputs, normal


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """`(x - mean) / sqrt(var + eps) * weight + bias` over the last dimension, in x's dtype."""
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    if weight is not None:
        y = y * weight
    return y if bias is None else y + bias


SHAPES = ((1, 1), (3, 5), (2, 7, 64), (5, 197), (2, 3, 768), (1, 1000))
"""Small shapes, for the interpreter."""

SHAPES_GPU = ((50432, 768), (65792, 1024), (2056, 1280), (257, 8192), (64, 12288), (3, 40000))
"""Shapes of real models (ViT-B/16 and L/14 at batch 256), and wide rows."""


def cases(dtype: torch.dtype, device: torch.device, *, large: bool) -> list[Case]:
    """Inputs for `verify`: each shape with and without weight and bias."""
    return [
        Case("x".join(map(str, shape)) + ("" if affine else " plain"), partial(_draw, shape, affine, dtype, device))
        for shape in SHAPES + (SHAPES_GPU if large else ())
        for affine in (True, False)
    ]


def _draw(shape: tuple[int, ...], affine: bool, dtype: torch.dtype, device: torch.device) -> Inputs:
    x = normal(shape, dtype, device, mean=0.5, std=2.0)
    weight = normal(shape[-1:], dtype, device, mean=1.0, std=0.5) if affine else None
    bias = normal(shape[-1:], dtype, device) if affine else None
    return (x, weight, bias), {}
