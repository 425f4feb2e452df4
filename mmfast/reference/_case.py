"""Inputs of one verified call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    """Arguments of an op. Gradients are checked for each floating tensor among them."""

    label: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def normal(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    *,
    mean: float = 0.0,
    std: float = 1.0,
) -> Tensor:
    """Normal random values, the same on every device for the same torch seed."""
    return (torch.randn(shape) * std + mean).to(device, dtype)
