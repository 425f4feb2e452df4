"""Mean squared error against noise that is made again where it is needed.

    d           = prediction - wanted           wanted = noise, or signal noise - sigma x0 (v), or x0 (sample)
    parts_b     = snr_b / n sum_e d_be^2        snr_b: min-SNR's factor or 1; n: what the reduction divides by
    loss        = sum_b weight_b parts_b        (or weight_b parts_b themselves)
    dprediction = 2 dloss_b weight_b snr_b / n d

Forward reads the prediction (1 element, 2 B in bf16) and writes a float32 number for each program; a second launch of
one program adds them in a fixed order, so that the same input gives the same bits, and applies factors and reduction.
Backward reads the prediction and writes its gradient, in one launch: 3 elements (6 B in bf16) for both passes, where
noise that is kept, cast and compared takes 14. x0, where it is compared with, is read in both. The noise is made twice
and costs arithmetic alone; see `_philox`. How many tiles a forward program takes depends on the sample's size only, and
so does the order in which a sample's squares are added: its loss has the same bits in any batch.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast._layouts import dense, new_like

from ._common import on_device
from ._samples import (
    HOST_NUMBERS,
    LAST,
    SamplePlan,
    add_channel_noise,
    alpha_pair,
    channel_noise,
    sample_key,
    seed_words,
    sigma_squared,
    signal_and_sigma,
    tile_noise,
    tile_offsets,
)

EPSILON, VELOCITY, SAMPLE = 0, 1, 2
TARGETS = {"epsilon": EPSILON, "v_prediction": VELOCITY, "sample": SAMPLE}
_LAST = tl.constexpr(LAST)
_EPSILON, _VELOCITY, _SAMPLE = tl.constexpr(EPSILON), tl.constexpr(VELOCITY), tl.constexpr(SAMPLE)

PARTIALS = 64
"""Programs of a sample that the forward pass aims at: what the second launch has to add up."""
MOST_TILES = 16
"""Tiles that one of them takes at most."""
FINISH = {"BLOCK_B": 64, "BLOCK_P": 64}
"""Samples by partial sums that the second launch's program has in flight: 16 numbers a thread."""

UNSPECIALIZED = [*(name for name in HOST_NUMBERS if name != "stride_prev"), "tiles", "per_program", "batch"]


@triton.jit
def difference(
    prediction_ptr,
    x0_ptr,
    table_ptr,
    channel_noise_ptr,
    t,
    last,
    b,
    i,
    size,
    key_low,
    key_high,
    sample,
    n_channels,
    offset_noise,
    TARGET: tl.constexpr,
    CHANNELS: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Tile i of prediction - wanted, with where it lies in the batch and what of it is inside the sample.

    All are [BLOCK * BLOCK_C], or [BLOCK, BLOCK_C] in the channels_last layouts of two dimensions.
    """
    offsets, inside = tile_offsets(i, size, CHANNELS, LAYOUT, BLOCK, BLOCK_C)
    offsets = b * size + offsets
    d = tl.load(prediction_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if TARGET != _EPSILON:
        x0 = tl.load(x0_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if TARGET == _SAMPLE:
        d -= x0
    else:
        stream = (b * 0).to(tl.uint32)
        noise = tile_noise(i, size, key_low, key_high, sample, stream, CHANNELS, LAYOUT, BLOCK, BLOCK_C)
        noise = add_channel_noise(
            noise, i, size, b, channel_noise_ptr, n_channels, offset_noise, CHANNELS, LAYOUT, BLOCK, BLOCK_C
        )
        if TARGET == _VELOCITY:
            signal, sigma = signal_and_sigma(table_ptr, t, last)
            noise = signal * noise - sigma * x0
        d -= noise
    return d, offsets, inside


@triton.jit
def min_snr(table_ptr, t, last, gamma, TARGET: tl.constexpr):
    """min(snr, gamma) over snr, snr + 1 or 1, with snr = alpha_bar / sigma^2 and alpha_bar + sigma^2 = 1.

    Comparisons are such that NaN, of a timestep out of range, remains; nothing is 0 / 0 at either end of a schedule.
    """
    high, low = alpha_pair(table_ptr, t, 0, last)
    alpha_bar, variance = high + low, sigma_squared(high, low)
    if TARGET == _EPSILON:
        factor = gamma * variance / alpha_bar
        factor = tl.where(factor > 1.0, 1.0, factor)
    elif TARGET == _VELOCITY:
        factor = tl.where(alpha_bar > gamma * variance, gamma * variance, alpha_bar)
    else:
        factor = alpha_bar / variance
        factor = tl.where(factor > gamma, gamma, factor)
    return factor


@triton.jit(do_not_specialize=UNSPECIALIZED[:])
def noise_mse_forward_kernel(
    prediction_ptr,  # [B, size], contiguous or channels_last within a sample
    x0_ptr,  # as prediction_ptr, or None: the target is epsilon
    t_ptr,  # [B] integers, stride_t apart, or None: the target is not v
    table_ptr,  # [T + 1, 2] float32, likewise
    seeds_ptr,  # [B] int64, or None
    channel_noise_ptr,  # [B, C] float32, or None
    partial_ptr,  # [B, blocks] float32
    stride_t,
    last,  # T - 1
    seed_low,
    seed_high,
    size,
    blocks,  # programs of a sample
    tiles,  # of a sample
    per_program,  # tiles
    n_channels,
    offset_noise,
    TARGET: tl.constexpr,
    CHANNELS: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks) * per_program
    t = b * 0
    if t_ptr is not None:
        t = tl.load(t_ptr + b * stride_t).to(tl.int64)
    key_low, key_high, sample = sample_key(seeds_ptr, seed_low, seed_high, b)
    if LAYOUT >= _LAST:
        total = tl.zeros([BLOCK, BLOCK_C], tl.float32)
    else:
        total = tl.zeros([BLOCK * BLOCK_C], tl.float32)
    for i in range(first, min(first + per_program, tiles)):
        d, _, inside = difference(
            prediction_ptr, x0_ptr, table_ptr, channel_noise_ptr, t, last, b, i, size, key_low, key_high, sample,
            n_channels, offset_noise, TARGET, CHANNELS, LAYOUT, BLOCK, BLOCK_C,
        )  # fmt: skip
        total += tl.where(inside, d * d, 0.0)
    if LAYOUT >= _LAST:
        total = tl.sum(total, axis=1)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit(do_not_specialize=UNSPECIALIZED[:])
def noise_mse_finish_kernel(
    partial_ptr,  # [B, blocks] float32
    t_ptr,  # [B] integers, stride_t apart, or None: no min-SNR weights
    table_ptr,  # [T + 1, 2] float32, likewise
    weight_ptr,  # [B] float32, stride_weight apart, or None
    loss_ptr,  # [B] float32 if EACH, else one
    parts_ptr,  # [B] float32, or None: not wanted
    stride_t,
    stride_weight,
    last,
    batch,
    blocks,
    gamma,
    scale,  # 1 / n
    EACH: tl.constexpr,
    TARGET: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    total = tl.zeros([BLOCK_B], tl.float32)
    for start in range(0, batch, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B).to(tl.int64)
        inside = b < batch
        sums = tl.zeros([BLOCK_B, BLOCK_P], tl.float32)
        for begin in range(0, blocks, BLOCK_P):
            p = begin + tl.arange(0, BLOCK_P)
            mask = inside[:, None] & (p < blocks)[None, :]
            sums += tl.load(partial_ptr + b[:, None] * blocks + p[None, :], mask=mask, other=0.0)
        parts = tl.sum(sums, axis=1) * scale  # [BLOCK_B]
        if t_ptr is not None:
            t = tl.load(t_ptr + b * stride_t, mask=inside, other=0).to(tl.int64)
            parts *= min_snr(table_ptr, t, last, gamma, TARGET)
        if parts_ptr is not None:
            tl.store(parts_ptr + b, parts, mask=inside)
        if weight_ptr is not None:
            parts *= tl.load(weight_ptr + b * stride_weight, mask=inside, other=0.0)
        if EACH:
            tl.store(loss_ptr + b, parts, mask=inside)
        else:
            total += tl.where(inside, parts, 0.0)
    if not EACH:
        tl.store(loss_ptr, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=UNSPECIALIZED[:])
def noise_mse_backward_kernel(
    dloss_ptr,  # [B] float32, stride_dloss apart
    prediction_ptr,  # [B, size], contiguous or channels_last within a sample
    x0_ptr,  # as prediction_ptr, or None: the target is epsilon
    t_ptr,  # [B] integers, stride_t apart, or None: the target is not v and there is no gamma
    table_ptr,  # [T + 1, 2] float32, likewise
    weight_ptr,  # [B] float32, stride_weight apart, or None
    seeds_ptr,  # [B] int64, or None
    channel_noise_ptr,  # [B, C] float32, or None
    dprediction_ptr,  # as prediction_ptr
    stride_dloss,
    stride_t,
    stride_weight,
    last,
    seed_low,
    seed_high,
    size,
    blocks,
    n_channels,
    offset_noise,
    gamma,  # or None
    scale,  # 2 / n
    TARGET: tl.constexpr,
    CHANNELS: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks
    factor = scale  # small: the product of all stays small for longest
    t = b * 0
    if t_ptr is not None:
        t = tl.load(t_ptr + b * stride_t).to(tl.int64)
    if weight_ptr is not None:
        factor *= tl.load(weight_ptr + b * stride_weight)
    if gamma is not None:
        factor *= min_snr(table_ptr, t, last, gamma, TARGET)
    factor *= tl.load(dloss_ptr + b * stride_dloss)
    key_low, key_high, sample = sample_key(seeds_ptr, seed_low, seed_high, b)
    d, offsets, inside = difference(
        prediction_ptr, x0_ptr, table_ptr, channel_noise_ptr, t, last, b, i, size, key_low, key_high, sample,
        n_channels, offset_noise, TARGET, CHANNELS, LAYOUT, BLOCK, BLOCK_C,
    )  # fmt: skip
    tl.store(dprediction_ptr + offsets, (factor * d).to(dprediction_ptr.dtype.element_ty), mask=inside)


def noise_mse_forward(
    prediction: Tensor,
    x0: Tensor | None,
    t: Tensor | None,
    table: Tensor | None,
    weight: Tensor | None,
    seeds: Tensor | None,
    seed: int,
    target: str,
    snr_gamma: float | None,
    offset_noise: float,
    reduction: str,
    *,
    count: int,
    save_parts: bool = False,
    plan: SamplePlan | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The loss in float32, () or (B,) for reduction "none", and parts (B,), its gradient by the weight.

    x0 is None for target "epsilon"; t (B,) and `table` are needed for "v_prediction" and `snr_gamma`; t and weight may
    have any stride. `count` is what a sum of squares is divided by.
    """
    prediction = dense(prediction)
    device, batch, each = prediction.device, len(prediction), reduction == "none"
    shape = (batch,) if each else ()
    if prediction.numel() == 0:
        loss = torch.full(shape, 0.0 if count else math.nan, dtype=torch.float32, device=device)
        return loss, loss.new_full((batch,), 0.0 if count else math.nan) if save_parts else None
    plan = plan or SamplePlan.of(prediction, made=target != "sample")
    size = prediction[0].numel()
    tiles = plan.blocks(size)
    per_program = tiles_per_program(tiles)
    blocks = triton.cdiv(tiles, per_program)
    loss = torch.empty(shape, dtype=torch.float32, device=device)
    parts = torch.empty(batch, dtype=torch.float32, device=device) if save_parts else None
    partial = torch.empty((batch, blocks), dtype=torch.float32, device=device)
    last = 0 if table is None else len(table) - 2
    stride_t = 0 if t is None else t.stride(0)
    velocity, snr = target == "v_prediction", snr_gamma is not None
    with on_device(prediction):
        channels = None if target == "sample" else channel_noise(prediction, seeds, seed, offset_noise)
        noise_mse_forward_kernel[(blocks * batch,)](
            prediction,
            None if x0 is None else dense(x0, prediction),
            t if velocity else None,
            table if velocity else None,
            None if seeds is None else seeds.contiguous(),
            channels,
            partial,
            stride_t,
            last,
            *seed_words(seed),
            size,
            blocks,
            tiles,
            per_program,
            prediction.shape[1] if channels is not None else 1,
            offset_noise,
            TARGET=TARGETS[target],
            **plan.constants,
            num_warps=plan.num_warps,
        )
        noise_mse_finish_kernel[(1,)](
            partial,
            t if snr else None,
            table if snr else None,
            weight,
            loss,
            parts,
            stride_t,
            0 if weight is None else weight.stride(0),
            last,
            batch,
            blocks,
            snr_gamma if snr else 0.0,
            1.0 / count,
            EACH=each,
            TARGET=TARGETS[target],
            **FINISH,
            num_warps=8,
        )
    return loss, parts


def tiles_per_program(tiles: int) -> int:
    """Tiles that a forward program takes of a sample's."""
    return min(MOST_TILES, triton.cdiv(tiles, PARTIALS))


def noise_mse_backward(
    dloss: Tensor,
    prediction: Tensor,
    x0: Tensor | None,
    t: Tensor | None,
    table: Tensor | None,
    weight: Tensor | None,
    seeds: Tensor | None,
    seed: int,
    target: str,
    snr_gamma: float | None,
    offset_noise: float,
    reduction: str,
    *,
    count: int,
    plan: SamplePlan | None = None,
) -> Tensor:
    """The prediction's gradient in its dtype and layout; dloss is () or (B,) float32 of any stride."""
    prediction = dense(prediction)
    dprediction = new_like(prediction)
    if dprediction.numel() == 0:
        return dprediction
    plan = plan or SamplePlan.of(prediction, made=target != "sample")
    size = prediction[0].numel()
    blocks = plan.blocks(size)
    dloss = dloss.expand(len(prediction))
    with on_device(prediction):
        channels = None if target == "sample" else channel_noise(prediction, seeds, seed, offset_noise)
        noise_mse_backward_kernel[(blocks * len(prediction),)](
            dloss,
            prediction,
            None if x0 is None else dense(x0, prediction),
            t,
            table,
            weight,
            None if seeds is None else seeds.contiguous(),
            channels,
            dprediction,
            dloss.stride(0),
            0 if t is None else t.stride(0),
            0 if weight is None else weight.stride(0),
            0 if table is None else len(table) - 2,
            *seed_words(seed),
            size,
            blocks,
            prediction.shape[1] if channels is not None else 1,
            offset_noise,
            snr_gamma,
            2.0 / count,
            TARGET=TARGETS[target],
            **plan.constants,
            num_warps=plan.num_warps,
        )
    return dprediction
