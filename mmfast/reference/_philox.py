"""Philox4x32-10 and the normal numbers made of it, in plain torch: the definition that every backend follows.

A sample's noise depends on its seed, the element's index within the sample in (C, H, W) order, and a stream, which
keeps apart the noises of one seed. It does not depend on the batch, the device, the memory layout or how a kernel was
launched. Element e is number e % 4 of the four normals made from the counter (e // 4, ., sample, stream).

Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011; the counter's layout and
the uniforms x * 2^-32 + 2^-33 are those of `torch.func._random`.
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
SEEDS = MASK
"""The stream that `sample_seeds` reads."""


class Stream(IntEnum):
    """The last word of the counter: `Q_STEP` and `REVERSE_STEP` take four times the timestep on top."""

    NOISE = 0
    Q_STEP = 1
    REVERSE_STEP = 2
    OFFSET = 3
    TRAINING = 7  # timesteps and dropout of GaussianDiffusion


def philox(
    key_low: Tensor | int, key_high: Tensor | int, c0: Tensor, c1: Tensor | int, c2: Tensor | int, c3: Tensor | int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words of Philox4x32-10, as int64 tensors of values 0 to 2^32 - 1."""
    counter = (torch.as_tensor(c, device=c0.device) for c in (c0, c1, c2, c3))
    w0, w1, w2, w3 = torch.broadcast_tensors(*counter)
    for _ in range(ROUNDS):
        a, b = w0 * MULTIPLIERS[0], w2 * MULTIPLIERS[1]  # the low 64 bits of products below 2^64: exact
        w0, w1 = ((b >> 32) & MASK) ^ w1 ^ key_low, b & MASK
        w2, w3 = ((a >> 32) & MASK) ^ w3 ^ key_high, a & MASK
        key_low, key_high = (key_low + WEYL[0]) & MASK, (key_high + WEYL[1]) & MASK
    return w0, w1, w2, w3


def normals(
    batch: int,
    per_sample: int,
    seed: int | Tensor,
    stream: int | Tensor = Stream.NOISE,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Normal numbers (batch, per_sample) of `seed`: an int, or int64 (batch,) of one seed a sample.

    `stream` is one number or int64 (batch,).
    """
    if isinstance(seed, Tensor):
        key = seed.to(device).view(-1, 1)
        sample = torch.zeros(1, 1, dtype=torch.int64, device=device)
    else:
        key = torch.full((1, 1), signed(seed), dtype=torch.int64, device=device)
        sample = torch.arange(batch, device=device).view(-1, 1)
    chunks = torch.arange((per_sample + 3) // 4, device=device).expand(batch, -1)
    if isinstance(stream, Tensor):
        stream = stream.to(device).view(-1, 1) & MASK
    words = philox(key & MASK, (key >> 32) & MASK, chunks & MASK, chunks >> 32, sample, stream)
    return box_muller(words, dtype).flatten(1)[:, :per_sample]


def box_muller(words: tuple[Tensor, Tensor, Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """Four normals (..., 4) of four words. Uniforms are float32 numbers in (0, 1], the same bits on every backend."""
    u0, u1, u2, u3 = ((word.float() * 2.0**-32 + 2.0**-33).to(dtype) for word in words)
    r0, r1 = (torch.sqrt(-2.0 * torch.log(u)) for u in (u0, u2))
    a0, a1 = (2.0 * math.pi * u for u in (u1, u3))
    return torch.stack((r0 * torch.cos(a0), r0 * torch.sin(a0), r1 * torch.cos(a1), r1 * torch.sin(a1)), dim=-1)


def signed(seed: int) -> int:
    """The int64 with the same 64 bits."""
    seed &= (1 << 64) - 1
    return seed - (1 << 64) if seed >> 63 else seed
