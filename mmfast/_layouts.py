"""Memory layouts of batches of samples (B, ...): contiguous, or channels_last where a tensor has that alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout that results get: channels_last where x has it and is not contiguous as well, else contiguous."""
    if not x.is_contiguous():
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format


def dense(x: Tensor, like: Tensor | None = None) -> Tensor:
    """x in the layout of `like` or its own: x itself where it has it, else a copy."""
    return x.contiguous(memory_format=memory_format(x if like is None else like))


def new_like(x: Tensor, shape: Any = None, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor with x's device and layout, and x's shape and dtype or others; the rank stays."""
    shape = x.shape if shape is None else shape
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=memory_format(x))
