"""What the two sampling steps share: a tile's inputs, what the model says x_0 is, and the launch.

A step goes from x_t to x_prev, with m the model's output after guidance, now and before the alpha-bars at t and t_prev:

    m  = u + guidance (c - u)
    x0 = x0_x x + x0_m m, clipped        epsilon: x / signal - sigma / signal m        v: signal x - sigma m        m

Everything that depends on the timestep is a scalar of the program, computed in float32 from the schedule's pairs of
numbers: 1 - now, 1 - before and before - now keep their digits, and no formula below subtracts anything else.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast._layouts import dense, new_like

from ._common import Compilation, on_device, triton_type
from ._samples import (
    HOST_NUMBERS,
    LAST,
    SamplePlan,
    _pixels_and_channels,
    alpha_pair,
    meta_samples,
    sample_key,
    seed_arguments,
    seed_words,
    sigma_squared,
    tile_noise,
)

EPSILON, VELOCITY, SAMPLE = 0, 1, 2
PREDICTIONS = {"epsilon": EPSILON, "v_prediction": VELOCITY, "sample": SAMPLE}
STEP_NUMBERS = [*HOST_NUMBERS, "batch"]
"""Arguments for whose values Triton shall not compile anew."""

_EPSILON, _VELOCITY, _LAST = tl.constexpr(EPSILON), tl.constexpr(VELOCITY), tl.constexpr(LAST)
_STREAM = tl.constexpr(2)  # and four times the timestep on top


@triton.jit
def step_scalars(t_ptr, prev_ptr, table_ptr, stride_t, stride_prev, last, b):
    """t, and of alpha-bar: now, 1 - now, before, 1 - before, before - now."""
    t = tl.load(t_ptr + b * stride_t).to(tl.int64)
    t_prev = tl.load(prev_ptr + b * stride_prev).to(tl.int64)
    now, now_low = alpha_pair(table_ptr, t, 0, last)
    before, before_low = alpha_pair(table_ptr, t_prev, -1, last)
    rest_now = sigma_squared(now, now_low)
    rest_before = sigma_squared(before, before_low)
    return t, now, rest_now, before, rest_before, (before - now) + (before_low - now_low)


@triton.jit
def model_offsets(offsets, i, CHANNELS: tl.constexpr, LAYOUT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr):
    """Offsets of tile i within a sample of a model's output that has twice the channels, for a learned variance."""
    if LAYOUT >= _LAST:
        pixels, channels = _pixels_and_channels(i, CHANNELS, BLOCK, BLOCK_C)
        offsets = pixels[:, None] * (2 * CHANNELS) + channels[None, :]
    return offsets


@triton.jit
def load_output(m_ptr, start, second, guidance, offsets, inside):
    """The model's output after guidance: the sample at `start` is unconditional, that at `second` conditional."""
    m = tl.load(m_ptr + start + offsets, mask=inside, other=0.0).to(tl.float32)
    if guidance is not None:
        m += guidance * (tl.load(m_ptr + second + offsets, mask=inside, other=0.0).to(tl.float32) - m)
    return m


@triton.jit
def load_noise(
    noise_ptr,
    seeds_ptr,
    seed_low,
    seed_high,
    offsets,
    inside,
    i,
    size,
    b,
    t,
    CHANNELS: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Noise of the tile: given, or made of the sample's seed and timestep."""
    if noise_ptr is not None:
        noise = tl.load(noise_ptr + b * size + offsets, mask=inside, other=0.0).to(tl.float32)
    else:
        key_low, key_high, sample = sample_key(seeds_ptr, seed_low, seed_high, b)
        stream = (4 * t + _STREAM).to(tl.uint32)
        noise = tile_noise(i, size, key_low, key_high, sample, stream, CHANNELS, LAYOUT, BLOCK, BLOCK_C)
    return noise


@triton.jit
def x0_factors(now, rest_now, PREDICTION: tl.constexpr):
    """x0_x and x0_m; the first is not used where the model predicts x_0 itself."""
    signal = tl.sqrt(now)
    sigma = tl.sqrt(rest_now)
    if PREDICTION == _EPSILON:
        x0_x = 1.0 / signal
        x0_m = -sigma / signal
    elif PREDICTION == _VELOCITY:
        x0_x = signal
        x0_m = -sigma
    else:
        x0_x = now
        x0_m = now * 0.0 + 1.0  # NaN where t is out of range
    return x0_x, x0_m


@triton.jit
def predict_x0(x, m, x0_x, x0_m, clip, PREDICTION: tl.constexpr):
    """What the model says the sample is; NaN passes a clip, as in PyTorch."""
    x0 = x0_m * m
    if PREDICTION <= _VELOCITY:
        x0 += x0_x * x
    if clip is not None:
        x0 = tl.where(x0 > clip, clip, tl.where(x0 < -clip, -clip, x0))
    return x0


@triton.jit
def store_twice(y_ptr, y, start, second, offsets, inside, DUPLICATE: tl.constexpr):
    """Store a tile, and once more in the second half of the batch."""
    y = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + start + offsets, y, mask=inside)
    if DUPLICATE:
        tl.store(y_ptr + second + offsets, y, mask=inside)


def launch_step(
    kernel: Any,
    model_output: Tensor,
    t: Tensor,
    t_prev: Tensor,
    x: Tensor,
    table: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    seed: int,
    prediction: str,
    guidance: float | None,
    clip: float,
    noisy: bool,
    return_x0: bool,
    duplicate: bool,
    *extra: float,
    learned: bool = False,
    plan: SamplePlan | None = None,
    **constants: Any,
) -> tuple[Tensor, Tensor | None]:
    """Run a step's kernel: x_prev (twice over if `duplicate`) and x_0, or None. `extra` are arguments of one step."""
    x = dense(x)
    batch = len(x)
    y = new_like(x, (batch * (1 + duplicate), *x.shape[1:]))
    x0 = new_like(x) if return_x0 else None
    if x.numel() == 0:
        return y, x0
    plan = plan or step_plan(x, made=noisy and noise is None, learned=learned)
    size = x[0].numel()
    blocks = plan.blocks(size)
    with on_device(x):
        kernel[(blocks * batch,)](
            _narrow(dense(model_output, x)),
            t,
            t_prev,
            x,
            table,
            _narrow(dense(noise, x)) if noisy and noise is not None else None,
            seeds.contiguous() if noisy and seeds is not None else None,
            y,
            x0,
            t.stride(0),
            t_prev.stride(0),
            len(table) - 2,
            *seed_words(seed),
            size,
            blocks,
            batch,
            guidance,
            clip or None,
            *extra,
            PREDICTION=PREDICTIONS[prediction],
            NOISY=noisy,
            DUPLICATE=duplicate,
            **constants,
            **plan.constants,
            num_warps=plan.num_warps,
        )
    return y, x0


def step_plan(x: Tensor, *, made: bool, learned: bool) -> SamplePlan:
    """Tiles over x; a variance beside the mean makes pixels of the model's output longer than those of x."""
    return SamplePlan.of(x, made=made or learned, line=not learned)


def _narrow(x: Tensor) -> Tensor:
    """Kernels read float64 as float32."""
    return x.float() if x.dtype == torch.float64 else x


class AuditStep(NamedTuple):
    """One configuration of a step, for the audit."""

    label: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    model_dtype: torch.dtype | None = None
    last: bool = False  # channels_last
    prediction: int = EPSILON
    guided: bool = False
    clip: bool = False
    noise: str = ""  # "given", "seeds", "seed" or none
    return_x0: bool = False
    duplicate: bool = False
    learned: bool = False


def audit_step(kernel: Any, a: AuditStep, extra: tuple[str, ...] = (), **constants: Any) -> Compilation:
    """How `mmfast audit` compiles one configuration; `extra` names float32 arguments of one step."""
    plan = step_plan(meta_samples(a.shape, a.last), made=a.noise.startswith("seed"), learned=a.learned)
    x = triton_type(a.dtype)
    return Compilation(
        label=f"{a.label}[{x[1:]}-{'x'.join(map(str, a.shape))}]",
        kernel=kernel,
        arguments={
            **{"m_ptr": triton_type(a.model_dtype or a.dtype), "t_ptr": "*i64", "prev_ptr": "*i64", "x_ptr": x},
            **{"table_ptr": "*fp32", "noise_ptr": x if a.noise == "given" else None},
            **seed_arguments(a.noise == "seeds"),
            **{"y_ptr": x, "x0_ptr": x if a.return_x0 else None},
            **dict.fromkeys(("stride_t", "stride_prev", "last", "size", "blocks", "batch"), "i32"),
            **{"guidance": "fp32" if a.guided else None, "clip": "fp32" if a.clip else None},
            **dict.fromkeys(extra, "fp32"),
        },
        constants={
            **{"PREDICTION": a.prediction, "NOISY": bool(a.noise), "DUPLICATE": a.duplicate},
            **constants,
            **plan.constants,
        },
        num_warps=plan.num_warps,
        divisible=("size",) if plan.whole_vectors else (),
        vector_loads=plan.whole_vectors,
        vector_stores=plan.whole_vectors,
        normals=plan.normals if a.noise.startswith("seed") else None,
    )
