"""The gradients of the patch embedding: of the weight, of the images, and what is left to torch.

    dW[d, k]    = sum over patches m of dy[m, d] * X[m, k]      X: the pixels, read from the image as it lies
    dX[m, k]    = sum over d of dy[m, d] * W[d, k]              written where patch m's pixel k lies, each pixel once
    dbias[d]    = sum over patches m of dy[m, d]
    dpos, dprefix = sums of dy over the batch

2MKD FLOPs each for dW and dX. dW sums over all patches, up to millions, into a D x K that few programs cover: the
patches are split among as many programs as the device runs at once, each writes its partial sum in float32, and a
second kernel adds the partial sums in a fixed order, takes off the mean, scales by 1 / std and writes the weight's own
layout and dtype. No atomics.

Three parts are torch's, by rules that are not measured yet. dbias, dpos and dprefix come from one sum of dy over the
batch, which torch's reduction does at the speed of memory. dy in another dtype than the products (float32 tokens under
autocast) is cast first, as autocast's own backward does. And float32 products on a GPU are cuBLAS's, over unfolded
pixels: wgmma takes float32 operands only where the summed dimension is adjacent, and in both products it is not, so a
tile would be turned over in registers; cuBLAS also honours `torch.get_float32_matmul_precision()`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import on_device, resident_programs
from ._patch_embed_pixels import (
    NO_FOLD,
    Fold,
    Pixels,
    as_pixels,
    channel_of,
    divide,
    of_channel,
    pack_weight,
    patch_starts,
    pixel_offsets,
    weight_offsets,
)

GRID = ("n_rows", "patches", "patches_multiplier", "patches_shift", "columns", "columns_multiplier", "columns_shift")


@triton.jit(do_not_specialize=[*GRID, "rows_per_split"])
def patch_embed_weight_gradient_kernel(
    dy_ptr,  # [B, PREFIX + N, D], D adjacent
    images_ptr,  # [B, C, H, W], strides as in Pixels
    partial_ptr,  # [splits, D, K] float32
    n_rows,  # B * N
    rows_per_split,
    patches,
    patches_multiplier,
    patches_shift,
    columns,
    columns_multiplier,
    columns_shift,
    stride_b,
    stride_c,
    stride_h,
    stride_dyb,
    stride_dyn,
    C: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    VEC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    D: tl.constexpr,
    PREFIX: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    K: tl.constexpr = C * PH * PW
    dtype: tl.constexpr = dy_ptr.dtype.element_ty
    TILES_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    TILES: tl.constexpr = TILES_K * ((D + BLOCK_D - 1) // BLOCK_D)
    split = tl.program_id(0) // TILES  # the tiles of a split run together and share its rows in L2
    tile = tl.program_id(0) % TILES
    d = tile // TILES_K * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tile % TILES_K * BLOCK_K + tl.arange(0, BLOCK_K)
    pixels = pixel_offsets(k, stride_c, stride_h, C, PH, PW, VEC, CHANNELS_LAST)
    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, n_rows)
    acc = tl.zeros([BLOCK_D, BLOCK_K], tl.float32)
    for start in range(first, last, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        valid = (rows < last)[:, None]
        image = divide(rows, patches_multiplier, patches_shift)
        patch = rows - image * patches
        starts = patch_starts(
            image, patch, columns, columns_multiplier, columns_shift, stride_b, stride_h, C, PH, PW, VEC, CHANNELS_LAST
        )
        tokens = image.to(tl.int64) * stride_dyb + (patch + PREFIX).to(tl.int64) * stride_dyn
        dy = tl.load(dy_ptr + tokens[:, None] + d[None, :], mask=valid & (d < D)[None, :], other=0.0)
        x = tl.load(images_ptr + starts[:, None] + pixels[None, :], mask=valid & (k < K)[None, :], other=0)
        # dy [BLOCK_M, BLOCK_D], x [BLOCK_M, BLOCK_K]
        acc = tl.dot(tl.trans(dy), x.to(dtype), acc, input_precision=PRECISION)
    offsets = (split.to(tl.int64) * D + d)[:, None] * K + k[None, :]
    tl.store(partial_ptr + offsets, acc, mask=(d < D)[:, None] & (k < K)[None, :])


@triton.jit(do_not_specialize=["splits"])
def finish_weight_gradient_kernel(
    partial_ptr,  # [splits, D, K] float32, columns in the order of the pixels
    dy_sum_ptr,  # [D] float32: dy summed over all patches, or None: nothing folded in
    dweight_ptr,  # [D, C, PH, PW], any strides
    splits,
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
    CHANNELS_LAST: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the partial sums in order; of pixels (x - shift) * scale the gradient is (sum - shift * dy_sum) * scale."""
    K: tl.constexpr = C * PH * PW
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < D * K
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        total += tl.load(partial_ptr + split * tl.full((), D * K, tl.int64) + index, mask=mask, other=0.0)
    d, k = index // K, index % K
    if dy_sum_ptr is not None:
        channel = channel_of(k, C, PH, PW, CHANNELS_LAST)
        shift = of_channel(channel, shift_0, shift_1, shift_2, shift_3)
        total -= shift * tl.load(dy_sum_ptr + d, mask=mask, other=0.0)
        total *= of_channel(channel, scale_0, scale_1, scale_2, scale_3)
    offsets = d.to(tl.int64) * stride_d + weight_offsets(k, stride_c, stride_h, stride_w, C, PH, PW, CHANNELS_LAST)
    tl.store(dweight_ptr + offsets, total.to(dweight_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[*GRID, "width"])
def patch_embed_image_gradient_kernel(
    dy_ptr,  # [B, PREFIX + N, D], D adjacent
    weight_ptr,  # [D, PITCH], columns in the order of the pixels
    dimages_ptr,  # [B, C, H, W], strides as in Pixels
    n_rows,  # B * N
    width,  # D, at run time, so that the loop is not unrolled
    patches,
    patches_multiplier,
    patches_shift,
    columns,
    columns_multiplier,
    columns_shift,
    stride_b,
    stride_c,
    stride_h,
    stride_dyb,
    stride_dyn,
    C: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    VEC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    D: tl.constexpr,
    PITCH: tl.constexpr,
    PREFIX: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    K: tl.constexpr = C * PH * PW
    TILES_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    rows = tl.program_id(0) // TILES_K * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) % TILES_K * BLOCK_K + tl.arange(0, BLOCK_K)
    clamped = tl.minimum(rows, n_rows - 1)
    image = divide(clamped, patches_multiplier, patches_shift)
    patch = clamped - image * patches
    dy_rows = dy_ptr + image.to(tl.int64) * stride_dyb + (patch + PREFIX).to(tl.int64) * stride_dyn  # [BLOCK_M]
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        if D % BLOCK_D == 0:
            dy = tl.load(dy_rows[:, None] + d[None, :])  # [BLOCK_M, BLOCK_D]
        else:
            dy = tl.load(dy_rows[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0)
        inside = (d < D)[:, None] & (k < K)[None, :]
        w = tl.load(weight_ptr + d.to(tl.int64)[:, None] * PITCH + k[None, :], mask=inside, other=0.0)
        acc = tl.dot(dy, w, acc, input_precision=PRECISION)
    starts = patch_starts(
        image, patch, columns, columns_multiplier, columns_shift, stride_b, stride_h, C, PH, PW, VEC, CHANNELS_LAST
    )
    offsets = starts[:, None] + pixel_offsets(k, stride_c, stride_h, C, PH, PW, VEC, CHANNELS_LAST)[None, :]
    mask = (rows < n_rows)[:, None] & (k < K)[None, :]
    tl.store(dimages_ptr + offsets, acc.to(dimages_ptr.dtype.element_ty), mask=mask)


FINISH_BLOCK = 512


@dataclass(frozen=True)
class GradientConfig:
    """Shape of a program of the two products: its tile, the rows it sums at a time, its warps."""

    block_m: int
    block_d: int
    block_k: int
    num_warps: int
    num_stages: int

    @classmethod
    def weight(cls, width: int, depth: int) -> GradientConfig:
        """128 x 128 of D x K, 64 patches at a time: two programs a multiprocessor. Unmeasured."""
        block_d, block_k = (128 if -size % 128 < 64 else 64 for size in (width, depth))
        return cls(64, block_d, block_k, 8 if block_d == 128 else 4, 3)

    @classmethod
    def images(cls, depth: int) -> GradientConfig:
        """128 patches by 128 pixels, 64 of D at a time: two programs a multiprocessor. Unmeasured."""
        return cls(128, 64, 128 if -depth % 128 < 64 else 64, 8, 3)


def products_by_kernel(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the gradients' products are the kernels': in 16 bits; see the head of this file for float32."""
    return dtype.itemsize == 2 or device.type != "cuda"


def unfold(images: Tensor, patch_size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The pixels of each patch as rows (B * N, C * ph * pw) in the order of the weight, in `dtype`: a copy."""
    (ph, pw), (batch, channels, height, width) = patch_size, images.shape
    rows, columns = height // ph, width // pw
    x = images[..., : rows * ph, : columns * pw].reshape(batch, channels, rows, ph, columns, pw)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch * rows * columns, -1).to(dtype)


def patch_embed_backward(
    dy: Tensor,
    images: Tensor,
    weight: Tensor,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    divisor: float,
    dtype: torch.dtype,
    *,
    count: int,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of the images and the weight, and dy summed over the batch; None where not wanted.

    Args:
        dy: (B, P + N, D), any strides; `count` is P.
        images: as given to `patch_embed_forward`, like all arguments up to `dtype`.
        needs: which of the three are wanted.

    Returns:
        dimages in images' dtype; dweight in weight's dtype and layout; (P + N, D) in float32.
    """
    need_dimages, need_dweight, need_sums = needs
    patch_size = (weight.shape[2], weight.shape[3])
    fold = Fold.of(mean, std, divisor, weight.shape[1])
    pixels = as_pixels(images, patch_size)
    if images.shape[0] == 0:
        return (
            torch.zeros_like(images) if need_dimages else None,
            torch.zeros_like(weight) if need_dweight else None,
            torch.zeros(dy.shape[1:], dtype=torch.float32, device=dy.device) if need_sums else None,
        )
    sums = dy.sum(0, dtype=torch.float32) if need_sums or (need_dweight and fold is not None) else None
    dy = dy.to(dtype)
    if dy.stride(-1) != 1:
        dy = dy.contiguous()
    with on_device(images):
        dimages = _image_gradient(dy, images, weight, fold, count) if need_dimages else None
        dweight = _weight_gradient(dy, pixels, weight, fold, count, sums) if need_dweight else None
    return dimages, dweight, sums if need_sums else None


def _weight_gradient(
    dy: Tensor, pixels: Pixels, weight: Tensor, fold: Fold | None, count: int, sums: Tensor | None
) -> Tensor:
    width, channels, ph, pw = weight.shape
    depth, channels_last = channels * ph * pw, pixels.channels_last
    dy_sum = sums[count:].sum(0) if sums is not None and fold is not None else None
    if products_by_kernel(dy.dtype, dy.device):
        config = GradientConfig.weight(width, depth)
        tiles = triton.cdiv(width, config.block_d) * triton.cdiv(depth, config.block_k)
        blocks = triton.cdiv(pixels.total, config.block_m)
        # As many splits as run at once, of whole blocks of rows, and none of few: each costs a D x K of traffic.
        per_split = triton.cdiv(blocks, max(1, min(resident_programs(dy.device) // tiles, blocks // 4)))
        splits = triton.cdiv(blocks, per_split)
        partial = torch.empty((splits, width, depth), dtype=torch.float32, device=dy.device)
        patch_embed_weight_gradient_kernel[(tiles * splits,)](
            dy,
            pixels.tensor,
            partial,
            pixels.total,
            per_split * config.block_m,
            *pixels.arguments(),
            dy.stride(0),
            dy.stride(1),
            C=channels,
            PH=ph,
            PW=pw,
            VEC=pixels.vec,
            CHANNELS_LAST=channels_last,
            D=width,
            PREFIX=count,
            PRECISION="ieee" if dy.dtype == torch.float32 else "tf32",
            BLOCK_M=config.block_m,
            BLOCK_D=config.block_d,
            BLOCK_K=config.block_k,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    else:
        rows = dy[:, count:].reshape(-1, width)
        partial = torch.mm(rows.t(), unfold(pixels.tensor, (ph, pw), dy.dtype)).float().unsqueeze(0)
        splits, channels_last = 1, False
    dweight = torch.empty_like(weight)
    finish_weight_gradient_kernel[(triton.cdiv(width * depth, FINISH_BLOCK),)](
        partial,
        dy_sum,
        dweight,
        splits,
        *dweight.stride(),
        *(NO_FOLD if fold is None else fold.arguments()),
        C=channels,
        PH=ph,
        PW=pw,
        CHANNELS_LAST=channels_last,
        D=width,
        BLOCK=FINISH_BLOCK,
        num_warps=4,
    )
    return dweight


def _image_gradient(dy: Tensor, images: Tensor, weight: Tensor, fold: Fold | None, count: int) -> Tensor:
    width, channels, ph, pw = weight.shape
    whole = images.shape[2] % ph == 0 and images.shape[3] % pw == 0
    dimages = torch.empty_like(images) if whole else torch.zeros_like(images)
    pixels = as_pixels(dimages, (ph, pw))
    if pixels.tensor is not dimages or not products_by_kernel(dy.dtype, dy.device):
        packed = pack_weight(weight, None, dy.dtype, False, fold)
        products = torch.mm(dy[:, count:].reshape(-1, width), packed.weight.view(width, -1)[:, : channels * ph * pw])
        products = products.view(dy.shape[0], pixels.rows, pixels.columns, channels, ph, pw).permute(0, 3, 1, 4, 2, 5)
        covered = dimages[..., : pixels.rows * ph, : pixels.columns * pw]
        covered.unflatten(3, (-1, pw)).unflatten(2, (-1, ph)).copy_(products)
        return dimages
    packed = pack_weight(weight, None, dy.dtype, pixels.channels_last, fold)
    config = GradientConfig.images(channels * ph * pw)
    patch_embed_image_gradient_kernel[
        (triton.cdiv(pixels.total, config.block_m) * triton.cdiv(channels * ph * pw, config.block_k),)
    ](
        dy,
        packed.weight,
        dimages,
        pixels.total,
        width,
        *pixels.arguments(),
        dy.stride(0),
        dy.stride(1),
        C=channels,
        PH=ph,
        PW=pw,
        VEC=pixels.vec,
        CHANNELS_LAST=pixels.channels_last,
        D=width,
        PITCH=packed.pitch,
        PREFIX=count,
        PRECISION="ieee" if dy.dtype == torch.float32 else "tf32",
        BLOCK_M=config.block_m,
        BLOCK_D=config.block_d,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return dimages
