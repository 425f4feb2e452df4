"""`noise_like`: standard normal numbers that depend on seed, sample and element alone."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from .._layouts import memory_format, new_like
from ..reference._philox import Stream
from ._launchers import launchers
from ._noise import (
    check_offset_noise,
    check_seed,
    facts,
    fresh_seeds,
)
from ._philox_torch import normals
from ._register import register, stats_dtype
from ._validate import check_input


def noise_like(x: Tensor, seed: int | Tensor | None = None, *, offset_noise: float = 0.0) -> Tensor:
    """Standard normal noise in x's shape, dtype and layout: the noise that `q_sample` adds for the same seed.

    A sample's noise depends on its seed and on each element's index within the sample in (C, H, W) order: not on the
    batch it is in, the device, the memory layout, or the backend, whose results differ by float32 rounding at most.

    Args:
        x: (B, ...), float32, float16, bfloat16 or float64; its values are not read.
        seed: an int, whose sample i has the noise of (seed, i); or int64 (B,), one seed a sample, which alone keys its
            noise; or None for new noise from PyTorch's generator (`torch.manual_seed`). All 64 bits count.
        offset_noise: adds this times one normal number per sample and channel (dimension 1).

    Returns:
        (B, ...) without gradient.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape, a device or a number does not fit.
        BackendError: a forced backend cannot serve.

    Source: Philox4x32-10 (Salmon et al., SC 2011) and Box-Muller, in the layout of `torch.func._random`; offset noise
    is that of diffusers' training scripts.
    """
    check_input("noise_like", "x", x)
    check_offset_noise("noise_like", offset_noise, x)
    if seed is None:
        if backends.torch_serves(x) and not offset_noise:
            # float32 is the fastest to draw on a CPU
            return torch.randn_like(x, dtype=stats_dtype(x), memory_format=memory_format(x)).to(x.dtype)
        seed = fresh_seeds(x)
    seeds, number = check_seed("noise_like", seed, x)
    backends.choose("noise_like", facts(x))
    return _noise_like(x, seeds, number, offset_noise)


def seeded_noise(x: Tensor, seeds: Tensor | None, seed: int, offset_noise: float = 0.0) -> Tensor:
    """The noise of a seed in x's shape and layout, in float32 (float64 for a float64 x), for ops made of PyTorch's."""
    return _noise_like(new_like(x, dtype=stats_dtype(x)), seeds, seed, offset_noise)


def noise_torch(x: Tensor, seeds: Tensor | None, seed: int, offset_noise: float) -> Tensor:
    """The torch backend: the noise in float32 (float64 for a float64 x)."""
    noise = normals(x, seeds, seed)
    if offset_noise and noise.numel():
        channels = normals(x.flatten(2)[..., 0] if x.dim() > 2 else x, seeds, seed, Stream.OFFSET)
        noise += offset_noise * channels.view(*x.shape[:2], *(1,) * (x.dim() - 2))
    return noise


def cost(x: Tensor, *, backward: bool = False) -> dict[str, int]:
    """Bytes through device memory that the op cannot do without: what it writes."""
    return {"bytes": 0 if backward else x.numel() * x.element_size()}


def _implementation(x: Tensor, seeds: Tensor | None, seed: int, offset_noise: float) -> Tensor:
    backend = backends.pick("noise_like", facts(x))
    if backend == "torch":
        return noise_torch(x, seeds, seed, offset_noise).to(x.dtype).contiguous(memory_format=memory_format(x))
    return launchers(backend, "noise_like").noise_like_forward(x, seeds, seed, offset_noise)


_noise_like = register(
    "noise_like(Tensor x, Tensor? seeds, SymInt seed, float offset_noise) -> Tensor",
    _implementation,
    fake=lambda x, seeds, seed, offset_noise: new_like(x),
)
