"""How a kernel sees a batch of samples (B, ...): tiles of one sample each, with their noise and their coefficients.

A program works on one tile of one sample, so its seed, timestep and coefficients are scalars: they are loaded once, and
nothing is divided. Elements are numbered within the sample in (C, H, W) order, whatever the memory layout, and noise
depends on that number alone. There are five ways to lay a tile over a sample:

    LINE     channels_last, few channels, a power of two: as LAST, but taken as one run of memory, as it is.
    WIDE     contiguous, and the size a multiple of 16. Each element asks for the four normals of its own chunk and
             takes one; a thread holds whole chunks, so the compiler computes each once, and nothing moves.
    FLAT     contiguous, any size: normals of a tile of chunks, which then change threads to where elements are.
    LAST     channels_last, and H x W a multiple of 4: a tile of pixels by channels; four pixels make a chunk.
    LAST_ODD channels_last, else: chunks do not begin at a row of the tile; each element makes four normals for one.

The schedule's table holds alpha-bar as a pair of float32 numbers (`mmfast.NoiseSchedule.alpha_table`), so that
1 - alpha-bar and differences of two keep their digits. An out-of-range timestep gives NaN.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._philox import normals4

LINE, WIDE, FLAT, LAST, LAST_ODD = -1, 0, 1, 2, 3  # from LAST on tiles have two dimensions
_LINE, _WIDE, _LAST, _LAST_ODD = tl.constexpr(LINE), tl.constexpr(WIDE), tl.constexpr(LAST), tl.constexpr(LAST_ODD)

HOST_NUMBERS = ["blocks", "stride_t", "stride_prev", "last", "seed_low", "seed_high"]
"""Arguments of kernels for whose values Triton shall not compile anew (`do_not_specialize`)."""


@dataclass(frozen=True)
class SamplePlan:
    """How tiles lie over each sample. `channels` and `block_c` are 1 where the layout is contiguous."""

    layout: int
    block: int  # elements of a contiguous tile, or pixels of a channels_last one
    block_c: int
    channels: int
    num_warps: int

    @classmethod
    def of(cls, x: Tensor, *, made: bool = True, line: bool = True) -> SamplePlan:
        """8 elements a thread: one 16-byte load in 16 bits, two chunks of noise; 4 warps where a sample is large.

        Where no noise is made, the order of elements does not matter, and any dense layout is one run of memory.
        Without `line` a channels_last tile knows the channels, for kernels that need them.
        """
        size = x[0].numel()
        if x.is_contiguous() or not made:
            wide = size % 16 == 0 and x.data_ptr() % 16 == 0
            block = min(1024, max(32, triton.next_power_of_2(size)))
            return cls(WIDE if wide else FLAT, block, 1, 1, max(1, block // 256))
        channels = x.shape[1]
        pixels = size // channels
        block_c = min(32, triton.next_power_of_2(channels))
        block = min(max(4, 1024 // block_c), max(4, triton.next_power_of_2(pixels)))
        layout = LAST_ODD if pixels % 4 else LINE if line and block_c == channels else LAST
        return cls(layout, block, block_c, channels, max(1, block * block_c // 256))

    def with_block(self, block: int) -> SamplePlan:
        """The same with tiles of another size."""
        return replace(self, block=block, num_warps=max(1, block * self.block_c // 256))

    def blocks(self, size: int) -> int:
        """Tiles of a sample of `size` elements."""
        pixels = size // self.channels
        return triton.cdiv(pixels, self.block) * triton.cdiv(self.channels, self.block_c)

    @property
    def whole_vectors(self) -> bool:
        """Whether every thread reads and writes 16 bytes at once."""
        return (
            self.layout == WIDE
            or (self.channels * self.block % 16 == 0 and self.layout == LINE)
            or (self.layout == LAST and self.channels % 16 == 0)
        )

    @property
    def normals(self) -> float | None:
        """Elements a thread of a kernel that makes noise, for the audit; None where each costs a Philox of its own."""
        return None if self.layout == LAST_ODD else self.block * self.block_c / (32 * self.num_warps)

    @property
    def constants(self) -> dict[str, int]:
        """The kernels' constexpr arguments."""
        return {"CHANNELS": self.channels, "LAYOUT": self.layout, "BLOCK": self.block, "BLOCK_C": self.block_c}


@triton.jit
def tile_offsets(i, size, CHANNELS: tl.constexpr, LAYOUT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr):
    """Offsets of tile i within its sample, and which of them are inside: [BLOCK * BLOCK_C] or [BLOCK, BLOCK_C].

    `size` is the number of elements of a sample.
    """
    if LAYOUT >= _LAST:
        pixels, channels = _pixels_and_channels(i, CHANNELS, BLOCK, BLOCK_C)
        offsets = pixels[:, None] * CHANNELS + channels[None, :]
        inside = (pixels < size // CHANNELS)[:, None] & (channels < CHANNELS)[None, :]
    elif LAYOUT == _LINE:
        offsets = i * (BLOCK * BLOCK_C) + tl.arange(0, BLOCK * BLOCK_C)
        inside = offsets < size
    else:
        offsets = i * BLOCK + tl.arange(0, BLOCK)
        inside = offsets < size
    return offsets, inside


@triton.jit
def _pixels_and_channels(i, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr):
    WIDTH: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    pixels = (i // WIDTH) * BLOCK + tl.arange(0, BLOCK)
    channels = (i % WIDTH) * BLOCK_C + tl.arange(0, BLOCK_C)
    return pixels, channels


@triton.jit
def tile_noise(
    i,
    size,
    key_low,
    key_high,
    sample,
    stream,
    CHANNELS: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Standard normal numbers of the elements of tile i, in the shape that `tile_offsets` gives."""
    if LAYOUT == _WIDE:
        element = i * BLOCK + tl.arange(0, BLOCK)
        noise = _take(key_low, key_high, element, sample, stream)
    elif LAYOUT == _LAST_ODD:
        pixels, channels = _pixels_and_channels(i, CHANNELS, BLOCK, BLOCK_C)
        element = channels[None, :] * (size // CHANNELS) + pixels[:, None]
        noise = _take(key_low, key_high, element, sample, stream)
    elif LAYOUT == _LAST or LAYOUT == _LINE:
        WIDTH: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
        fours = (i // WIDTH) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
        channels = (i % WIDTH) * BLOCK_C + tl.arange(0, BLOCK_C)
        chunk = channels[None, :] * (size // CHANNELS // 4) + fours[:, None]  # [BLOCK / 4, BLOCK_C]
        a, b, c, d = normals4(key_low, key_high, chunk, sample, stream)
        four = tl.join(tl.join(a, c), tl.join(b, d))  # [BLOCK / 4, BLOCK_C, 2, 2]
        four = tl.permute(four, (0, 2, 3, 1))
        if LAYOUT == _LINE:
            noise = tl.reshape(four, [BLOCK * BLOCK_C])
        else:
            noise = tl.reshape(four, [BLOCK, BLOCK_C])
    else:
        chunk = i * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
        a, b, c, d = normals4(key_low, key_high, chunk, sample, stream)
        noise = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [BLOCK])
    return noise


@triton.jit
def _take(key_low, key_high, element, sample, stream):
    a, b, c, d = normals4(key_low, key_high, element // 4, sample, stream)
    lane = element % 4
    return tl.where(lane < 2, tl.where(lane == 0, a, b), tl.where(lane == 2, c, d))


@triton.jit
def add_channel_noise(
    noise,
    i,
    size,
    b,  # int64 index of the sample
    channel_noise_ptr,  # [B, C] float32, or None
    n_channels,
    scale,
    CHANNELS: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Add `scale` times one number a channel: offset noise."""
    if channel_noise_ptr is not None:
        if LAYOUT >= _LAST:
            _, channels = _pixels_and_channels(i, CHANNELS, BLOCK, BLOCK_C)
            row = tl.load(channel_noise_ptr + b * n_channels + channels, mask=channels < CHANNELS, other=0.0)
            noise += scale * row[None, :]
        else:
            element = i * (BLOCK * BLOCK_C) + tl.arange(0, BLOCK * BLOCK_C)
            if LAYOUT == _LINE:
                channels = element % CHANNELS
            else:
                channels = element // (size // n_channels)
            noise += scale * tl.load(channel_noise_ptr + b * n_channels + channels, mask=element < size, other=0.0)
    return noise


@triton.jit
def sample_key(seeds_ptr, seed_low, seed_high, b):
    """Key and sample word of sample b, uint32: its own seed of (B,) int64, or the batch's seed and b."""
    if seeds_ptr is not None:
        seed = tl.load(seeds_ptr + b)
        key_low = seed.to(tl.uint32)
        key_high = (seed >> 32).to(tl.uint32)
        sample = (b * 0).to(tl.uint32)
    else:
        key_low = seed_low.to(tl.uint32)
        key_high = seed_high.to(tl.uint32)
        sample = b.to(tl.uint32)
    return key_low, key_high, sample


@triton.jit
def alpha_pair(table_ptr, t, first, last):
    """alpha-bar at timestep t as (high, low), float32 scalars; NaN where t is outside `first` to `last`."""
    inside = (t >= first) & (t <= last)
    row = table_ptr + (t.to(tl.int64) + 1) * 2
    nan = float("nan")
    return tl.load(row, mask=inside, other=nan), tl.load(row + 1, mask=inside, other=nan)


@triton.jit
def sigma_squared(high, low):
    """1 - alpha-bar, with all its digits."""
    return (1.0 - high) - low


@triton.jit
def signal_and_sigma(table_ptr, t, last):
    """sqrt(alpha-bar) and sqrt(1 - alpha-bar) at timestep t."""
    high, low = alpha_pair(table_ptr, t, 0, last)
    return tl.sqrt(high + low), tl.sqrt(sigma_squared(high, low))


@triton.jit
def step_signal_and_sigma(table_ptr, t, last):
    """sqrt(1 - beta) and sqrt(beta) at timestep t, of the alpha-bars on both sides of it; before timestep 0 it is 1."""
    high, low = alpha_pair(table_ptr, t, 0, last)
    before, before_low = alpha_pair(table_ptr, t - 1, 0, last)
    before = tl.where(t == 0, 1.0, before)
    before_low = tl.where(t == 0, 0.0, before_low)
    beta = ((before - high) + (before_low - low)) / before
    return tl.sqrt(high / before), tl.sqrt(beta)


def seed_words(seed: int) -> tuple[int, int]:
    """Low and high half of a seed as signed 32-bit numbers, so that their type is the same for every value."""
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    return low - ((low >> 31) << 32), high - ((high >> 31) << 32)


def channel_noise(x: Tensor, seeds: Tensor | None, seed: int, offset_noise: float) -> Tensor | None:
    """One normal number a sample and channel, float32 (B, C), or None where `offset_noise` is 0."""
    if not offset_noise:
        return None
    from .noise_like import noise_like_forward

    channels = torch.empty(x.shape[:2], dtype=torch.float32, device=x.device)
    return noise_like_forward(channels, seeds, seed, 0.0, stream=3)


def meta_samples(shape: tuple[int, ...], last: bool) -> Tensor:
    """A tensor without memory, contiguous or channels_last, to make a plan of."""
    memory = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, device="meta", memory_format=memory)


def seed_arguments(seeds: bool) -> dict[str, str | None]:
    """Types of the arguments that `sample_key` takes, for the audit."""
    return {"seeds_ptr": "*i64" if seeds else None, "seed_low": "i32", "seed_high": "i32"}
