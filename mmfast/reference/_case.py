"""Inputs of one verified call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Case:
    """Arguments of an op, drawn when they are first asked for.

    Gradients are checked for each floating tensor among them but those whose names are in `constants`.
    """

    label: str
    draw: Callable[[], Inputs]
    constants: tuple[str, ...] = ()

    @cached_property
    def inputs(self) -> Inputs:
        """The positional and the keyword arguments."""
        return self.draw()

    @property
    def args(self) -> tuple[Any, ...]:
        """The positional arguments."""
        return self.inputs[0]

    @property
    def kwargs(self) -> dict[str, Any]:
        """The keyword arguments."""
        return self.inputs[1]


def normal(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    *,
    mean: float = 0.0,
    std: float = 1.0,
) -> Tensor:
    """Normal random values."""
    return (torch.randn(shape, device=device) * std + mean).to(dtype)
