"""Noise from a seed in plain torch, and the inputs that `verify` uses."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._case import Case, Inputs
from ._philox import Stream, normals


def noise_like(x: Tensor, seed: int | Tensor, *, offset_noise: float = 0.0) -> Tensor:
    """Standard normal numbers in x's shape and dtype; see `mmfast.ops.noise_like`."""
    return noise(x, seed, offset_noise).to(x.dtype)


def noise(x: Tensor, seed: int | Tensor, offset_noise: float = 0.0, stream: int | Tensor = Stream.NOISE) -> Tensor:
    """The noise of `noise_like` in float64."""
    per_sample = x[0].numel() if len(x) else 0
    values = normals(len(x), per_sample, seed, stream, device=x.device).view(x.shape)
    if offset_noise:
        channels = normals(len(x), x.shape[1], seed, Stream.OFFSET, device=x.device)
        values = values + offset_noise * channels.view(*x.shape[:2], *(1,) * (x.dim() - 2))
    return values


SHAPES = ((2, 3, 8, 8), (3, 4, 5, 7), (2, 50), (1, 1), (2, 130, 2, 2))
"""Samples whose size is and is not a multiple of 4, for the interpreter."""

SHAPES_GPU = ((64, 4, 64, 64), (16, 3, 256, 256), (5, 7, 33, 31), (1, 5, 4099))


def cases(dtype: torch.dtype, device: torch.device, *, large: bool) -> list[Case]:
    """Inputs for `verify`: each shape in each layout, with each kind of seed."""
    found = []
    for shape in SHAPES + (SHAPES_GPU if large else ()):
        for label, options in layouts(shape):
            for kind in ("seed", "seeds"):
                draw = partial(_draw, shape, options, kind, dtype, device)
                found.append(Case(f"{label} {kind}", draw, ("x",)))
    return found


def layouts(shape: tuple[int, ...]) -> list[tuple[str, bool]]:
    """A label of each memory layout that samples of this shape can have, and whether it is channels_last."""
    name = "x".join(map(str, shape))
    return [(name, False), (f"{name} channels_last", True)] if len(shape) == 4 else [(name, False)]


def draw_samples(shape: tuple[int, ...], last: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal samples in one of the layouts."""
    x = torch.randn(shape, device=device).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if last else x


def draw_seed(kind: str, batch: int, device: torch.device) -> int | Tensor:
    """An int, or one seed a sample."""
    if kind == "seed":
        return 2**63 + 12345
    return torch.randint(-(1 << 63), (1 << 63) - 1, (batch,), device=device)


def _draw(shape: tuple[int, ...], last: bool, kind: str, dtype: torch.dtype, device: torch.device) -> Inputs:
    kwargs: dict[str, Any] = {"offset_noise": 0.1} if len(shape) > 2 and last else {}
    return (draw_samples(shape, last, dtype, device), draw_seed(kind, shape[0], device)), kwargs
