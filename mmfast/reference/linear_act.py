"""Reference of `linear_act`, and the inputs it is verified on."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from ._case import Case, Inputs, normal


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str) -> Tensor:
    """`act(x weight^T + bias)` in x's dtype; geglu is first * gelu(second), swiglu silu(first) * second."""
    h = x @ weight.T
    if bias is not None:
        h = h + bias
    if activation in ("geglu", "swiglu"):
        half = h.shape[-1] // 2
        first, second = h[..., :half], h[..., half:]
        return first * _gelu(second) if activation == "geglu" else first * torch.sigmoid(first) * second
    if activation == "gelu":
        return _gelu(h)
    if activation == "gelu_tanh":
        return 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    if activation == "quick_gelu":
        return h * torch.sigmoid(1.702 * h)
    if activation == "relu":
        return h.clamp_min(0)
    if activation == "silu":
        return h * torch.sigmoid(h)
    return h


def _gelu(h: Tensor) -> Tensor:
    return 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))


ACTIVATIONS = ("none", "gelu", "gelu_tanh", "quick_gelu", "relu", "silu", "geglu", "swiglu")

SHAPES = (((1, 5), 10), ((2, 3, 40), 24), ((70, 33), 130))
"""x and the rows of weight. Small shapes, for the interpreter."""

SHAPES_GPU = (
    ((50432, 768), 3072, "gelu"),
    ((65792, 1024), 4096, "gelu"),
    ((197, 768), 3072, "gelu"),
    ((50432, 768), 3072, "quick_gelu"),
    ((8, 257, 1280), 5120, "gelu_tanh"),
    ((65536, 320), 2560, "geglu"),
    ((1370, 1536), 8192, "swiglu"),
    ((5, 77, 768), 3072, "silu"),
)
"""fc1 of ViT-B and L at batch 256, of ViT-B at batch 1, CLIP's; Stable Diffusion's U-Net; DINOv2 g."""


def cases(dtype: torch.dtype, device: torch.device, *, large: bool) -> list[Case]:
    """Inputs for `verify`: every activation at one shape, GELU and GEGLU at all, without a bias at one."""
    chosen = [
        (shape, width, activation, True)
        for shape, width in SHAPES
        for activation in (ACTIVATIONS if shape == (2, 3, 40) else ("gelu", "geglu"))
    ]
    chosen.append(((2, 3, 40), 24, "gelu", False))
    if large:
        chosen += [(*entry, True) for entry in SHAPES_GPU]
    return [
        Case(
            f"{'x'.join(map(str, shape))}->{width} {activation}" + ("" if biased else " plain"),
            partial(_draw, shape, width, activation, biased, dtype, device),
        )
        for shape, width, activation, biased in chosen
    ]


def _draw(
    shape: tuple[int, ...], width: int, activation: str, biased: bool, dtype: torch.dtype, device: torch.device
) -> Inputs:
    x = normal(shape, dtype, device)
    weight = normal((width, shape[-1]), dtype, device, std=shape[-1] ** -0.5)
    bias = normal((width,), dtype, device) if biased else None
    return (x, weight, bias), {"activation": activation}
