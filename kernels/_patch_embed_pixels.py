"""How the patch embedding's kernels find a patch in memory, and the weight in the order in which they read pixels.

Row m of the implicit matrix X is patch n of image b, m = b * N + n; column k is a pixel of the patch. Columns are taken
in the order of memory, so that neighbouring columns are neighbouring addresses:

    NCHW            k = (channel, row, column)      runs of pw elements (P = 16, bf16: 32 bytes; P = 14: 28)
    channels_last   k = (row, column, channel)      runs of pw * C elements (96 and 84 bytes)

Nothing is padded: a run is cut into units of VEC elements, the largest power of two that divides the run and all the
strides, and every address is `unit * VEC + lane`. The compiler sees from that how many elements it may load at once,
which it could not see from a stride such as 518; a patch of 14 pixels takes no more instructions and no more columns
than it has. Neighbouring patches of a row are neighbours in memory too, so a warp's loads are whole cache lines.

The weight is read as [D, K] in the same order. Where it lies otherwise (channels_last, a dtype to cast from, rows that
are not whole 16-byte pieces, a normalisation to fold in) `pack_weight` writes it so first, one small launch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_FOLDED_CHANNELS = 4
"""Channels whose mean and std travel as numbers in a launch: no table to copy to the device."""


class Divisor(NamedTuple):
    """Division of an int32 x >= 0 by a number known at run time: `x * multiplier >> shift`, exact."""

    divisor: int
    multiplier: int
    shift: int

    @classmethod
    def of(cls, divisor: int) -> Divisor:
        """The smallest power of two that makes the rounded reciprocal exact for 31 bits."""
        shift = 31 + max(0, divisor - 1).bit_length()
        return cls(divisor, -(-(1 << shift) // divisor), shift)


class Pixels(NamedTuple):
    """Images as the kernels read them. Strides are in units of `vec` elements."""

    tensor: Tensor
    channels_last: bool
    vec: int
    rows: int  # of patches
    columns: int
    stride_b: int
    stride_c: int
    stride_h: int

    @property
    def patches(self) -> int:
        """Patches of one image."""
        return self.rows * self.columns

    @property
    def total(self) -> int:
        """Patches of all images: M."""
        return self.tensor.shape[0] * self.patches

    def arguments(self) -> tuple[int, ...]:
        """The run-time arguments that `patch_starts` and `pixel_offsets` take."""
        return (*Divisor.of(self.patches), *Divisor.of(self.columns), self.stride_b, self.stride_c, self.stride_h)


def as_pixels(images: Tensor, patch_size: tuple[int, int]) -> Pixels:
    """See images (B, C, H, W) as patches; copied only where neither pixels of a row nor channels are adjacent."""
    (ph, pw), (channels, height, width) = patch_size, images.shape[1:]
    rows, columns = height // ph, width // pw
    stride_b, stride_c, stride_h, stride_w = images.stride()
    channels_last = False
    if stride_w != 1 and width != 1:
        channels_last = stride_w == channels and (stride_c == 1 or channels == 1)
        if not channels_last:
            images = images.contiguous()
            stride_b, stride_c, stride_h, stride_w = images.stride()
    if images.shape[0] == 1:  # a stride that is not used may be any number
        stride_b = 0
    if channels_last or channels == 1:
        stride_c = 0
    if height == 1:
        stride_h = 0
    run = pw * channels if channels_last else pw
    vec = math.gcd(run, stride_b, stride_c, stride_h, 16)
    return Pixels(images, channels_last, vec, rows, columns, stride_b // vec, stride_c // vec, stride_h // vec)


@triton.jit
def divide(x, multiplier, shift):
    """x // divisor, see `Divisor`."""
    return ((x.to(tl.int64) * multiplier) >> shift).to(tl.int32)


@triton.jit
def patch_starts(
    image,  # [BLOCK] int32: which image
    patch,  # [BLOCK] int32: which of its patches
    columns,
    columns_multiplier,
    columns_shift,
    stride_b,
    stride_h,
    C: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    VEC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Element offsets of the first pixels of patches, int64."""
    row = divide(patch, columns_multiplier, columns_shift)
    column = patch - row * columns
    run: tl.constexpr = PW * C if CHANNELS_LAST else PW
    units = image.to(tl.int64) * stride_b + row.to(tl.int64) * PH * stride_h + column.to(tl.int64) * (run // VEC)
    return units * VEC


@triton.jit
def pixel_offsets(
    k,  # [BLOCK] int32
    stride_c,
    stride_h,
    C: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    VEC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Element offsets of pixels k from the start of their patch, int64."""
    if CHANNELS_LAST:
        units: tl.constexpr = PW * C // VEC
        unit = k // VEC
        starts = (unit // units).to(tl.int64) * stride_h + unit % units
    else:
        line_units: tl.constexpr = PW // VEC
        unit = k // VEC
        line = unit // line_units
        starts = (line // PH).to(tl.int64) * stride_c + (line % PH).to(tl.int64) * stride_h + unit % line_units
    return starts * VEC + k % VEC


@triton.jit
def channel_of(k, C: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """The channel of pixels k."""
    if CHANNELS_LAST:
        channel = k % C
    else:
        channel = k // (PH * PW)
    return channel


@triton.jit
def weight_offsets(
    k,
    stride_c,
    stride_h,
    stride_w,
    C: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Element offsets of pixels k within a row (C, PH, PW) of the weight."""
    if CHANNELS_LAST:
        row, column = k // (PW * C), k // C % PW
    else:
        row, column = k // PW % PH, k % PW
    return channel_of(k, C, PH, PW, CHANNELS_LAST) * stride_c + row * stride_h + column * stride_w


@triton.jit
def of_channel(channel, first, second, third, fourth):
    """The one of four numbers that belongs to each channel."""
    return tl.where(channel == 0, first, tl.where(channel == 1, second, tl.where(channel == 2, third, fourth)))


@triton.jit
def pack_weight_kernel(
    weight_ptr,  # [D, C, PH, PW], any strides
    bias_ptr,  # [D] or None
    packed_ptr,  # [D, PITCH]
    folded_ptr,  # [D] float32: the bias with the mean folded in, or None
    stride_d,
    stride_c,
    stride_h,
    stride_w,
    shift_0,
    shift_1,
    shift_2,
    shift_3,
    scale_0,
    scale_1,
    scale_2,
    scale_3,
    C: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    PITCH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    GAIN: tl.constexpr,  # see Fold
    BLOCK_K: tl.constexpr,
):
    """One row of the weight in the order of the pixels, times scale and GAIN; columns past K are zero."""
    K: tl.constexpr = C * PH * PW
    row = tl.program_id(0).to(tl.int64)
    moved = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, PITCH, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        offsets = weight_offsets(k, stride_c, stride_h, stride_w, C, PH, PW, CHANNELS_LAST)
        value = tl.load(weight_ptr + row * stride_d + offsets, mask=k < K, other=0.0).to(tl.float32)  # [BLOCK_K]
        if folded_ptr is not None:
            channel = channel_of(k, C, PH, PW, CHANNELS_LAST)
            value *= of_channel(channel, scale_0, scale_1, scale_2, scale_3) * GAIN
            rounded = value.to(packed_ptr.dtype.element_ty)
            shift = of_channel(channel, shift_0, shift_1, shift_2, shift_3)
            moved += tl.where(k < K, rounded.to(tl.float32) * shift, 0.0)
        else:
            rounded = value.to(packed_ptr.dtype.element_ty)
        tl.store(packed_ptr + row * PITCH + k, rounded, mask=k < PITCH)
    if folded_ptr is not None:
        bias = tl.sum(moved, axis=0) * (-1.0 / GAIN)
        if bias_ptr is not None:
            bias += tl.load(bias_ptr + row).to(tl.float32)
        tl.store(folded_ptr + row, bias)


class Fold(NamedTuple):
    """`(x - shift) * scale` a channel: what the normalisation does to the pixels as they lie in memory.

    The scale of 0..255 would take small weights below float16's normal numbers: the packed weight is `gain`, a power of
    two, times larger, and the products are divided by it.
    """

    shift: tuple[float, ...]
    scale: tuple[float, ...]
    gain: int

    @classmethod
    def of(
        cls, mean: Sequence[float] | None, std: Sequence[float] | None, divisor: float, channels: int
    ) -> Fold | None:
        """The fold of `(x / divisor - mean) / std`; None where that is x. At most four channels with mean or std."""
        if mean is None and std is None and divisor == 1.0:
            return None
        count = channels if mean is not None or std is not None else MAX_FOLDED_CHANNELS  # the last serves the rest
        mean, std = mean or [0.0] * count, std or [1.0] * count
        shift, scale = (divisor * m for m in mean), (1.0 / (divisor * s) for s in std)
        return cls(tuple(shift), tuple(scale), 1 if divisor == 1.0 else 256)

    def arguments(self) -> tuple[float, ...]:
        """Four shifts and four scales."""
        rest = MAX_FOLDED_CHANNELS - len(self.shift)
        return (*self.shift, *(0.0,) * rest, *self.scale, *(0.0,) * rest)


NO_FOLD = (0.0,) * (2 * MAX_FOLDED_CHANNELS)


class Packed(NamedTuple):
    """The weight as [D, pitch] in the order of the pixels, and the bias that goes with it."""

    weight: Tensor
    bias: Tensor | None
    pitch: int
    gain: int


def pack_weight(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype, channels_last: bool, fold: Fold | None
) -> Packed:
    """The weight in `dtype` and in the order of the pixels: as it lies where it can be read so, else a copy."""
    width, channels, ph, pw = weight.shape
    columns = channels * ph * pw
    strides = (columns, 1, pw * channels, channels) if channels_last else (columns, ph * pw, pw, 1)
    in_order = all(n == 1 or have == want for n, have, want in zip(weight.shape, weight.stride(), strides, strict=True))
    if fold is None and in_order and weight.dtype == dtype and columns * dtype.itemsize % 16 == 0:
        return Packed(weight, bias, columns, 1)
    pitch = triton.cdiv(columns, 64) * 64
    packed = torch.empty((width, pitch), dtype=dtype, device=weight.device)
    folded = None if fold is None else torch.empty(width, dtype=torch.float32, device=weight.device)
    gain = 1 if fold is None else fold.gain
    block = min(1024, triton.next_power_of_2(pitch))
    pack_weight_kernel[(width,)](
        weight,
        bias,
        packed,
        folded,
        *weight.stride(),
        *(NO_FOLD if fold is None else fold.arguments()),
        C=channels,
        PH=ph,
        PW=pw,
        PITCH=pitch,
        CHANNELS_LAST=channels_last,
        GAIN=gain,
        BLOCK_K=block,
        num_warps=4,
    )
    return Packed(packed, bias if folded is None else folded, pitch, gain)
