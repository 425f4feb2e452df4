"""Noised samples and training targets.

    x_t = signal x0 + sigma noise          signal = sqrt(alpha_bar_t), sigma = sqrt(1 - alpha_bar_t)
    v   = signal noise - sigma x0          (or the noise itself: the target epsilon)
    dx0 = signal dx_t - sigma dv           dnoise = sigma dx_t + signal dv

`q_step`, one step of the Markov chain, is the same with sqrt(1 - beta_t) and sqrt(beta_t), and another stream of noise.

One pass: 2 elements of traffic (4 B in bf16), 3 with a target or given noise. With noise from seeds a 16-bit call is
bound by its arithmetic, a float32 one by memory about as much; see `_philox` for what a normal costs. Coefficients are
gathered by the program from the schedule's table and stay in float32. The backward pass is two scaled sums.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast._layouts import dense, new_like

from ._common import AUDIT_DTYPES, Compilation, on_device, triton_type
from ._samples import (
    HOST_NUMBERS,
    SamplePlan,
    add_channel_noise,
    channel_noise,
    meta_samples,
    sample_key,
    seed_arguments,
    seed_words,
    signal_and_sigma,
    step_signal_and_sigma,
    tile_noise,
    tile_offsets,
)

STREAM_Q_STEP = tl.constexpr(1)  # and four times the timestep on top


@triton.jit(do_not_specialize=[name for name in HOST_NUMBERS if name != "stride_prev"])
def q_sample_forward_kernel(
    x_ptr,  # [B, size], contiguous or channels_last within a sample
    t_ptr,  # [B] integers, stride_t apart
    table_ptr,  # [T + 1, 2] float32
    noise_ptr,  # as x_ptr, or None: made of seeds
    seeds_ptr,  # [B] int64, or None
    channel_noise_ptr,  # [B, C] float32, or None
    y_ptr,  # as x_ptr
    target_ptr,  # as x_ptr, or None
    stride_t,
    last,  # T - 1
    seed_low,
    seed_high,
    size,
    blocks,
    n_channels,
    offset_noise,
    STEP: tl.constexpr,  # one Markov step
    VELOCITY: tl.constexpr,  # the target is v, not epsilon
    CHANNELS: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks
    t = tl.load(t_ptr + b * stride_t).to(tl.int64)
    if STEP:
        signal, sigma = step_signal_and_sigma(table_ptr, t, last)
        stream = (4 * t + STREAM_Q_STEP).to(tl.uint32)
    else:
        signal, sigma = signal_and_sigma(table_ptr, t, last)
        stream = (b * 0).to(tl.uint32)
    offsets, inside = tile_offsets(i, size, CHANNELS, LAYOUT, BLOCK, BLOCK_C)
    start = b * size
    x = tl.load(x_ptr + start + offsets, mask=inside, other=0.0).to(tl.float32)  # [BLOCK] or [BLOCK, BLOCK_C]
    if noise_ptr is not None:
        noise = tl.load(noise_ptr + start + offsets, mask=inside, other=0.0).to(tl.float32)
    else:
        key_low, key_high, sample = sample_key(seeds_ptr, seed_low, seed_high, b)
        noise = tile_noise(i, size, key_low, key_high, sample, stream, CHANNELS, LAYOUT, BLOCK, BLOCK_C)
        noise = add_channel_noise(
            noise, i, size, b, channel_noise_ptr, n_channels, offset_noise, CHANNELS, LAYOUT, BLOCK, BLOCK_C
        )
    y = signal * x + sigma * noise
    tl.store(y_ptr + start + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)
    if target_ptr is not None:
        if VELOCITY:
            target = signal * noise - sigma * x
        else:  # said with x, so that the compiler lays the noise out as x: see WIDE in _samples
            target = tl.where(inside, noise, x)
        tl.store(target_ptr + start + offsets, target.to(target_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["stride_t", "last", "blocks"])
def q_sample_backward_kernel(
    dy_ptr,  # [B, size], contiguous or channels_last within a sample
    dv_ptr,  # as dy_ptr: the gradient of the target v; or None
    t_ptr,  # [B] integers, stride_t apart
    table_ptr,  # [T + 1, 2] float32
    dx_ptr,  # as dy_ptr, or None: not wanted
    dnoise_ptr,  # as dy_ptr, or None: not wanted
    stride_t,
    last,
    size,
    blocks,
    STEP: tl.constexpr,
    CHANNELS: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks
    t = tl.load(t_ptr + b * stride_t).to(tl.int64)
    if STEP:
        signal, sigma = step_signal_and_sigma(table_ptr, t, last)
    else:
        signal, sigma = signal_and_sigma(table_ptr, t, last)
    offsets, inside = tile_offsets(i, size, CHANNELS, LAYOUT, BLOCK, BLOCK_C)
    offsets = b * size + offsets
    dy = tl.load(dy_ptr + offsets, mask=inside, other=0.0).to(tl.float32)  # [BLOCK] or [BLOCK, BLOCK_C]
    dx = signal * dy
    dnoise = sigma * dy
    if dv_ptr is not None:
        dv = tl.load(dv_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        dx -= sigma * dv
        dnoise += signal * dv
    if dx_ptr is not None:
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if dnoise_ptr is not None:
        tl.store(dnoise_ptr + offsets, dnoise.to(dnoise_ptr.dtype.element_ty), mask=inside)


def q_sample_forward(
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    seed: int,
    *,
    target: str | None = None,
    offset_noise: float = 0.0,
    step: bool = False,
    plan: SamplePlan | None = None,
) -> tuple[Tensor, Tensor | None]:
    """x_t and the target (None, "epsilon" or "v_prediction") in x0's dtype and layout; with `step`, one Markov step.

    t is (B,), of any stride; `table` the schedule's alpha_table. Without `noise` it is made of `seeds`, int64 (B,), or
    of `seed` and the samples' indices.
    """
    x0 = dense(x0)
    y = new_like(x0)
    extra = None if target is None else new_like(x0)
    if y.numel() == 0:
        return y, extra
    plan = plan or SamplePlan.of(x0, made=noise is None)
    size = x0[0].numel()
    blocks = plan.blocks(size)
    with on_device(x0):
        channels = channel_noise(x0, seeds, seed, offset_noise) if noise is None else None
        q_sample_forward_kernel[(blocks * len(x0),)](
            x0,
            t,
            table,
            None if noise is None else dense(noise, x0),
            None if seeds is None else seeds.contiguous(),
            channels,
            y,
            extra,
            t.stride(0),
            len(table) - 2,
            *seed_words(seed),
            size,
            blocks,
            x0.shape[1] if channels is not None else 1,
            offset_noise,
            STEP=step,
            VELOCITY=target == "v_prediction",
            **plan.constants,
            num_warps=plan.num_warps,
        )
    return y, extra


def q_sample_backward(
    dy: Tensor,
    dv: Tensor | None,
    t: Tensor,
    table: Tensor,
    *,
    need_dx0: bool = True,
    need_dnoise: bool = False,
    step: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x0 and of given noise in dy's dtype and layout, None where not needed; dv is the target v's."""
    dy = dense(dy)
    dx = new_like(dy) if need_dx0 else None
    dnoise = new_like(dy) if need_dnoise else None
    if dy.numel() == 0 or (dx is None and dnoise is None):
        return dx, dnoise
    plan = SamplePlan.of(dy, made=False)
    size = dy[0].numel()
    blocks = plan.blocks(size)
    with on_device(dy):
        q_sample_backward_kernel[(blocks * len(dy),)](
            dy,
            None if dv is None else dense(dv, dy),
            t,
            table,
            dx,
            dnoise,
            t.stride(0),
            len(table) - 2,
            size,
            blocks,
            STEP=step,
            **plan.constants,
            num_warps=plan.num_warps,
        )
    return dx, dnoise


IMAGES, LATENTS, ODD = (64, 3, 64, 64), (64, 4, 64, 64), (64, 3, 15, 15)


def audit_configurations() -> Iterator[Compilation]:
    """What `mmfast audit` compiles: both layouts, each origin of the noise and each target."""
    for dtype in AUDIT_DTYPES:
        yield audit_forward("forward", IMAGES, dtype)
        yield audit_forward("forward, one seed, offset, v", IMAGES, dtype, seeds=False, offset=True, target="v")
        yield audit_forward("forward, epsilon", IMAGES, dtype, target="epsilon")
        yield audit_forward("forward, noise given", IMAGES, dtype, noise=True)
        yield audit_forward("forward, any size", ODD, dtype)
        yield audit_forward("forward, channels_last, v", (64, 320, 64, 64), dtype, last=True, offset=True, target="v")
        yield audit_forward("forward, channels_last latents", LATENTS, dtype, last=True)
        yield audit_forward("forward, channels_last, any size", ODD, dtype, last=True)
        yield audit_backward("backward", dtype)
        yield audit_backward("backward, v, noise", dtype, everything=True)


def audit_forward(
    label: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    last: bool = False,
    seeds: bool = True,
    offset: bool = False,
    noise: bool = False,
    target: str | None = None,
    step: bool = False,
) -> Compilation:
    plan = SamplePlan.of(meta_samples(shape, last), made=not noise)
    x = triton_type(dtype)
    return Compilation(
        label=f"{label}[{x[1:]}-{'x'.join(map(str, shape))}]",
        kernel=q_sample_forward_kernel,
        arguments={
            **{"x_ptr": x, "t_ptr": "*i64", "table_ptr": "*fp32", "noise_ptr": x if noise else None},
            **seed_arguments(seeds and not noise),
            "channel_noise_ptr": "*fp32" if offset else None,
            **{"y_ptr": x, "target_ptr": x if target else None},
            **dict.fromkeys(("stride_t", "last", "size", "blocks", "n_channels"), "i32"),
            "offset_noise": "fp32",
        },
        constants={"STEP": step, "VELOCITY": target == "v", **plan.constants},
        num_warps=plan.num_warps,
        divisible=("size",) if plan.whole_vectors else (),
        vector_loads=plan.whole_vectors,
        vector_stores=plan.whole_vectors,
        normals=None if noise else plan.normals,
    )


def audit_backward(label: str, dtype: torch.dtype, *, everything: bool = False, step: bool = False) -> Compilation:
    plan = SamplePlan.of(meta_samples(IMAGES, False))
    x = triton_type(dtype)
    more = x if everything else None
    return Compilation(
        label=f"{label}[{x[1:]}-{'x'.join(map(str, IMAGES))}]",
        kernel=q_sample_backward_kernel,
        arguments={
            **{"dy_ptr": x, "dv_ptr": more, "t_ptr": "*i64", "table_ptr": "*fp32", "dx_ptr": x, "dnoise_ptr": more},
            **dict.fromkeys(("stride_t", "last", "size", "blocks"), "i32"),
        },
        constants={"STEP": step, **plan.constants},
        num_warps=plan.num_warps,
        divisible=("size",),
        vector_loads=True,
        vector_stores=True,
    )
