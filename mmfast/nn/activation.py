"""Activations by name, with timm's names, and the one that torch.nn lacks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

ActLayer = str | Callable[..., nn.Module]


class QuickGELU(nn.Module):
    """`x * sigmoid(1.702 x)`, the GELU of OpenAI's CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply to every element of x."""
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[..., nn.Module]] = {
    "celu": nn.CELU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "hard_sigmoid": nn.Hardsigmoid,
    "hard_swish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "hardswish": nn.Hardswish,
    "identity": nn.Identity,
    "leaky_relu": nn.LeakyReLU,
    "mish": nn.Mish,
    "prelu": partial(nn.PReLU, init=0.25),
    "quick_gelu": QuickGELU,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "selu": nn.SELU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "tanh": nn.Tanh,
}


def get_act_layer(act_layer: ActLayer | None) -> Callable[..., nn.Module]:
    """Return the constructor of an activation: `act_layer` itself, or the one of that name; None or "" is GELU.

    Raises:
        ValueError: the name is unknown.
        TypeError: neither a name nor callable, or a module instead of its class.
    """
    if act_layer is None or act_layer == "":
        return nn.GELU
    if isinstance(act_layer, str):
        if act_layer.lower() not in ACTIVATIONS:
            raise ValueError(f"act_layer: expected one of {', '.join(ACTIVATIONS)}, got {act_layer!r}")
        return ACTIVATIONS[act_layer.lower()]
    if isinstance(act_layer, nn.Module) or not callable(act_layer):
        raise TypeError(f"act_layer: expected a name or a module class, got {act_layer!r}")
    return act_layer
