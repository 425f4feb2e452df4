"""Patch embedding: pixels to tokens in one implicit matrix product.

    y[b, P + n] = X[b, n] W^T + bias + pos_embed[n or P + n]        X[b, n]: the C * ph * pw pixels of patch n
    y[b, p]     = prefix_tokens[p] + pos_embed[p]                   p < P, where pos_embed covers them

M = B * N patches by K = C * ph * pw pixels by D. The pixels are read from the image as it lies (`_patch_embed_pixels`)
and tokens are written where they belong, P rows into each image: no unfolded copy, no flatten, transpose, cat or add.
The prefix rows are written by further programs of the same launch. 2MKD FLOPs; bytes: the image, the weight and y.

Accumulators are float32. uint8 pixels, and float32 ones under autocast, are converted as they are loaded; a
normalisation is folded into the weight and the bias, the bias from the weight as it was rounded, since 0..255 is exact
in 16 bits. All column tiles of a row tile follow one another in program order: the pixels of a tile are read from
memory once and then from L2, where the weight stays. The backward is in `_patch_embed_backward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import as_vector, on_device, resident_programs
from ._patch_embed_pixels import (
    Fold,
    as_pixels,
    divide,
    pack_weight,
    patch_starts,
    pixel_offsets,
)


@dataclass(frozen=True)
class TileConfig:
    """Shape of a program: a tile of `block_m` rows by `block_n` columns, `block_k` of the sum at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    @classmethod
    def forward(
        cls,
        rows: int,
        width: int,
        depth: int,
        pixel_dtype: torch.dtype,
        dtype: torch.dtype,
        out_dtype: torch.dtype,
        precision: str,
        programs: int,
    ) -> TileConfig:
        """128 x 128 of 16-bit tokens, 128 x 64 of float32 ones, in 8 warps: both leave room for two programs a
        multiprocessor (128 registers, 98 KB), so that one stores while the other multiplies. Less for small grids.

        `programs` is two a multiprocessor: fewer than half of that leave some idle. Unmeasured.
        """
        if precision == "ieee":  # no tensor core: the tile is what registers hold
            return cls(64, 64, 16, 4, 2)
        step = 32 if torch.float32 in (pixel_dtype, dtype) else 64
        if triton.cdiv(depth, step) * step > 1.05 * triton.cdiv(depth, step // 2) * (step // 2):
            step //= 2  # P = 14: 588 pixels are 19 steps of 32 but 10 of 64
        wide = 128 if out_dtype.itemsize == 2 and -width % 128 < 64 else 64
        stages = 3 if step == 64 else 4
        for block_m, block_n, num_warps in ((128, wide, 8), (64, 64, 4)):
            if triton.cdiv(rows, block_m) * triton.cdiv(width, block_n) >= programs // 2:
                return cls(block_m, block_n, step, num_warps, stages)
        # wgmma wants 64 rows of its first operand, which is the weight where pixels are converted.
        return cls(32, 64, step, 4, 4) if pixel_dtype != dtype else cls(64, 32, step, 4, 4)


@triton.jit
def _patch_tile(
    images_ptr,
    weight_ptr,
    bias_ptr,
    pos_ptr,
    y_ptr,
    tile_m,
    cols,
    n_rows,
    depth,
    patches,
    patches_multiplier,
    patches_shift,
    columns,
    columns_multiplier,
    columns_shift,
    stride_b,
    stride_c,
    stride_h,
    C: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    VEC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    D: tl.constexpr,
    PITCH: tl.constexpr,
    PREFIX: tl.constexpr,
    POS_PREFIX: tl.constexpr,
    GAIN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    K: tl.constexpr = C * PH * PW
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    CONVERT: tl.constexpr = images_ptr.dtype.element_ty != weight_ptr.dtype.element_ty
    inside = cols < D
    clamped = tl.minimum(rows, n_rows - 1)
    image = divide(clamped, patches_multiplier, patches_shift)
    patch = clamped - image * patches
    starts = patch_starts(
        image, patch, columns, columns_multiplier, columns_shift, stride_b, stride_h, C, PH, PW, VEC, CHANNELS_LAST
    )
    images_rows = images_ptr + starts  # [BLOCK_M]
    weight_rows = weight_ptr + tl.minimum(cols, D - 1).to(tl.int64) * PITCH  # [BLOCK_N]
    if CONVERT:
        # The converted operand is the second: it goes through shared memory, where as the first it would go through
        # registers and make wgmma wait. Pixels are loaded one step ahead, since 2-byte loads cannot be asynchronous.
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        k = tl.arange(0, BLOCK_K)
        offsets = pixel_offsets(k, stride_c, stride_h, C, PH, PW, VEC, CHANNELS_LAST)
        x = tl.load(images_rows[:, None] + offsets[None, :], mask=(k < K)[None, :], other=0)  # [BLOCK_M, BLOCK_K]
        for start in range(0, depth, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            if PITCH % BLOCK_K == 0:
                w = tl.load(weight_rows[:, None] + k[None, :])  # [BLOCK_N, BLOCK_K]
            else:
                w = tl.load(weight_rows[:, None] + k[None, :], mask=(k < K)[None, :], other=0.0)
            k += BLOCK_K
            offsets = pixel_offsets(k, stride_c, stride_h, C, PH, PW, VEC, CHANNELS_LAST)
            ahead = tl.load(images_rows[:, None] + offsets[None, :], mask=(k < K)[None, :], other=0)
            acc = tl.dot(w, tl.trans(x.to(weight_ptr.dtype.element_ty)), acc, input_precision=PRECISION)
            x = ahead
        acc = tl.trans(acc)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, depth, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            offsets = pixel_offsets(k, stride_c, stride_h, C, PH, PW, VEC, CHANNELS_LAST)
            if K % BLOCK_K == 0:
                x = tl.load(images_rows[:, None] + offsets[None, :])  # [BLOCK_M, BLOCK_K]
            else:
                x = tl.load(images_rows[:, None] + offsets[None, :], mask=(k < K)[None, :], other=0.0)
            if PITCH % BLOCK_K == 0:
                w = tl.load(weight_rows[None, :] + k[:, None])  # [BLOCK_K, BLOCK_N]
            else:
                w = tl.load(weight_rows[None, :] + k[:, None], mask=(k < K)[:, None], other=0.0)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
    if GAIN != 1:
        acc *= 1.0 / GAIN
    mask = (rows < n_rows)[:, None] & inside[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    if pos_ptr is not None:
        positions = (patch + POS_PREFIX) * D
        acc += tl.load(pos_ptr + positions[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    # Row m is token m + (image + 1) * PREFIX of y: 64 bits for the tile, 32 within it.
    first = tile_m * BLOCK_M
    first_image = divide(first, patches_multiplier, patches_shift)
    y_ptr += (first.to(tl.int64) + (first_image.to(tl.int64) + 1) * PREFIX) * D
    tokens = rows - first + (image - first_image) * PREFIX
    tl.store(y_ptr + (tokens * D)[:, None] + cols[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _prefix_tile(
    prefix_ptr,
    pos_ptr,
    y_ptr,
    tile_m,
    cols,
    n_images,
    patches,
    D: tl.constexpr,
    PREFIX: tl.constexpr,
    POS_PREFIX: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    image, token = rows // PREFIX, rows % PREFIX
    mask = (image < n_images)[:, None] & (cols < D)[None, :]
    offsets = token[:, None] * D + cols[None, :]
    value = tl.load(prefix_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
    if pos_ptr is not None and POS_PREFIX > 0:
        value += tl.load(pos_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tokens = image.to(tl.int64) * (patches + PREFIX) + token
    tl.store(y_ptr + tokens[:, None] * D + cols[None, :], value.to(y_ptr.dtype.element_ty), mask=mask)


UNSPECIALISED = (
    *("n_rows", "n_images", "depth", "patches", "patches_multiplier", "patches_shift"),
    *("columns", "columns_multiplier", "columns_shift"),
)
"""Arguments whose values the compiler should not look at: they change with the batch and the image size."""


@triton.jit(do_not_specialize=UNSPECIALISED)
def patch_embed_forward_kernel(
    images_ptr,  # [B, C, H, W], strides as in Pixels
    weight_ptr,  # [D, PITCH]
    bias_ptr,  # [D] or None
    pos_ptr,  # [POS_PREFIX + N, D] or None
    prefix_ptr,  # [PREFIX, D] or None
    y_ptr,  # [B, PREFIX + N, D] contiguous
    n_rows,  # B * N
    n_images,  # B
    depth,  # K, at run time, so that the loop is not unrolled: it would take half as many registers again
    patches,  # N
    patches_multiplier,
    patches_shift,
    columns,  # patches in a row of them
    columns_multiplier,
    columns_shift,
    stride_b,
    stride_c,
    stride_h,
    C: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    VEC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    D: tl.constexpr,
    PITCH: tl.constexpr,
    PREFIX: tl.constexpr,
    POS_PREFIX: tl.constexpr,  # PREFIX where pos_embed covers the prefix tokens, else 0
    GAIN: tl.constexpr,  # of the weight, see Fold
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    TILES_N: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    tile_m = tl.program_id(0) // TILES_N
    cols = tl.program_id(0) % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    tiles = tl.cdiv(n_rows, BLOCK_M)
    if tile_m < tiles:
        _patch_tile(
            images_ptr,
            weight_ptr,
            bias_ptr,
            pos_ptr,
            y_ptr,
            tile_m,
            cols,
            n_rows,
            depth,
            patches,
            patches_multiplier,
            patches_shift,
            columns,
            columns_multiplier,
            columns_shift,
            stride_b,
            stride_c,
            stride_h,
            C,
            PH,
            PW,
            VEC,
            CHANNELS_LAST,
            D,
            PITCH,
            PREFIX,
            POS_PREFIX,
            GAIN,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
    elif PREFIX > 0:
        _prefix_tile(
            prefix_ptr, pos_ptr, y_ptr, tile_m - tiles, cols, n_images, patches, D, PREFIX, POS_PREFIX, BLOCK_M
        )


def as_table(t: Tensor | None) -> Tensor | None:
    """A (rows, D) or (1, rows, D) parameter as contiguous (rows, D)."""
    return t if t is None else t.reshape(t.shape[-2:]).contiguous()


def patch_embed_forward(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix_tokens: Tensor | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    divisor: float,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    precision: str,
) -> Tensor:
    """Return y (B, P + N, D) in `out_dtype` of `(images / divisor - mean) / std`.

    Products are in `dtype`, float32 ones as `precision` says: "tf32" or "ieee".
    """
    width, channels, ph, pw = weight.shape
    pixels = as_pixels(images, (ph, pw))
    count = 0 if prefix_tokens is None else prefix_tokens.shape[-2]
    batch, patches = images.shape[0], pixels.patches
    y = torch.empty((batch, count + patches, width), dtype=out_dtype, device=images.device)
    if batch == 0:
        return y
    depth = channels * ph * pw
    config = TileConfig.forward(
        pixels.total, width, depth, images.dtype, dtype, out_dtype, precision, resident_programs(images.device)
    )
    covers_prefix = pos_embed is not None and pos_embed.shape[-2] != patches
    fold = Fold.of(mean, std, divisor, channels)
    tiles = triton.cdiv(pixels.total, config.block_m) + triton.cdiv(batch * count, config.block_m)
    with on_device(images):
        packed = pack_weight(weight, as_vector(bias), dtype, pixels.channels_last, fold)
        patch_embed_forward_kernel[(tiles * triton.cdiv(width, config.block_n),)](
            pixels.tensor,
            packed.weight,
            packed.bias,
            as_table(pos_embed),
            as_table(prefix_tokens),
            y,
            pixels.total,
            batch,
            depth,
            *pixels.arguments(),
            C=channels,
            PH=ph,
            PW=pw,
            VEC=pixels.vec,
            CHANNELS_LAST=pixels.channels_last,
            D=width,
            PITCH=packed.pitch,
            PREFIX=count,
            POS_PREFIX=count if covers_prefix else 0,
            GAIN=packed.gain,
            PRECISION=precision,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return y
