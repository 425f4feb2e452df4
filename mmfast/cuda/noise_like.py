"""Launcher of csrc/noise_like.cu: that of `mmfast.kernels.noise_like`."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfast._layouts import memory_format

from ._samples import channel_noise, fill


def noise_like_forward(x: Tensor, seeds: Tensor | None, seed: int, offset_noise: float, *, stream: int = 0) -> Tensor:
    """Noise in x's shape, dtype and layout; `seeds` is int64 (B,), or None for `seed` and the samples' indices."""
    layout = memory_format(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout)
    if y.numel() == 0:
        return y
    seeds = None if seeds is None else seeds.contiguous()
    fill(y, layout, seeds, seed, channel_noise(x, seeds, seed, offset_noise), offset_noise, stream)
    return y
