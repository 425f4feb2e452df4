"""What the launchers of the diffusion ops share: samples, timesteps and seeds as csrc/samples.cuh takes them.

A pointer says nothing of who owns it: what a function here returns beside pointers must live until the launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmfast._layouts import memory_format

from ._common import DTYPES, current, dtype_code, extension, pointer

KINDS = {torch.int64: 0, torch.int32: 1, torch.int16: 2, torch.int8: 3, torch.uint8: 4}
"""The codes of samples.cuh for the integers that timesteps may be."""
MASK = (1 << 64) - 1


def dense(x: Tensor) -> tuple[Tensor, torch.memory_format]:
    """x, or a copy where it is not dense, and its layout."""
    if x.is_contiguous():  # mostly: host time counts
        return x, torch.contiguous_format
    layout = memory_format(x)
    return x.contiguous(memory_format=layout), layout


def samples(x: Tensor, layout: torch.memory_format) -> tuple[int, int, int, bool]:
    """Of dense x (B, ...): samples, elements of one, its channels (1 if it has none), whether it is channels_last."""
    shape = x.shape
    channels = shape[1] if len(shape) > 1 else 1
    return shape[0], x.numel() // shape[0], channels, layout is not torch.contiguous_format


def timesteps(t: Tensor | None) -> tuple[int, int, int]:
    """Pointer, stride and kind of t (B,)."""
    return (0, 0, 0) if t is None else (t.data_ptr(), t.stride(0), KINDS[t.dtype])


def schedule(table: Tensor | None) -> tuple[int, int]:
    """Pointer of a schedule's alpha_table and its last timestep."""
    return (0, 0) if table is None else (table.data_ptr(), len(table) - 2)


def beside(x: Tensor, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    """x in the samples' layout and a dtype that their kernel reads: theirs or float32, beside float32 also 16 bits."""
    if x.dtype != dtype and (dtype != torch.float32 or x.dtype not in DTYPES):
        x = x.float()
    return x.contiguous(memory_format=layout)


def channel_noise(x: Tensor, seeds: Tensor | None, seed: int, offset_noise: float) -> Tensor | None:
    """One normal number a sample and channel, float32 (B, C), or None where `offset_noise` is 0. `seeds` is dense."""
    if not offset_noise:
        return None
    channels = torch.empty(x.shape[:2], dtype=torch.float32, device=x.device)
    fill(channels, torch.contiguous_format, seeds, seed, None, 0.0, 3)
    return channels


def fill(
    y: Tensor,
    layout: torch.memory_format,
    seeds: Tensor | None,
    seed: int,
    channels: Tensor | None,
    offset_noise: float,
    stream: int,
) -> None:
    """Write the noise of dense `seeds` (B,), or of `seed`, to dense y."""
    extension().noise_like_forward(
        *(y.data_ptr(), pointer(seeds), pointer(channels), seed & MASK, *samples(y, layout), offset_noise, stream),
        *(dtype_code(y), *current(y)),
    )
