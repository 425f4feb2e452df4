"""One DDIM step.

    x_prev = sqrt(before) x0 + direction e + s noise         e: the noise that the model says is in x
    s^2 = eta^2 (1 - before) ratio                           ratio = (before - now) / (before (1 - now))
    direction^2 = 1 - before - s^2 = (1 - before) ((1 - eta^2) ratio + now (1 - before) / (before (1 - now)))

Where x0 is not clipped, x_prev is a sum of x and m alone, whose factors are written with

    gap = sqrt(before) sigma - direction signal = (before - now + s^2 now) / (direction signal + sqrt(before) sigma)

which does not cancel. One pass: with guidance, and x_prev written twice for the next call of the model, 5 elements of
traffic for each of x (two of the model's output, x, and two of x_prev), where one PyTorch op for each operation moves
26. Bound by memory bandwidth; noise from seeds (eta above 0) costs arithmetic as in `_philox`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import AUDIT_DTYPES, Compilation
from ._reverse_step import (
    SAMPLE,
    STEP_NUMBERS,
    VELOCITY,
    AuditStep,
    audit_step,
    launch_step,
    load_noise,
    load_output,
    predict_x0,
    step_scalars,
    store_twice,
    x0_factors,
)
from ._samples import tile_offsets

_EPSILON, _VELOCITY = tl.constexpr(0), tl.constexpr(VELOCITY)


@triton.jit
def ddim_factors(
    now,
    rest_now,
    before,
    rest_before,
    difference,
    eta,
    PREDICTION: tl.constexpr,
    NOISY: tl.constexpr,
    CLIPPED: tl.constexpr,
    USE_CLIPPED: tl.constexpr,
):
    """Factors of x0, x, m and the noise in x_prev. Not to be used: x0's without a clip, m's with `USE_CLIPPED`."""
    signal = tl.sqrt(now)
    sigma = tl.sqrt(rest_now)
    towards = tl.sqrt(before)
    s2 = 0.0 * now
    if NOISY:
        scale = 1.0 / (before * rest_now)
        s2 = eta * eta * rest_before * (difference * scale)
        direction = tl.sqrt(rest_before * scale * ((1.0 - eta) * (1.0 + eta) * difference + now * rest_before))
        gap = (difference + s2 * now) / (direction * signal + towards * sigma)
    else:
        direction = tl.sqrt(rest_before)
        gap = difference / (direction * signal + towards * sigma)
    p_x0 = towards
    if CLIPPED:
        if USE_CLIPPED:
            p_x0 = gap / sigma
            p_x = direction / sigma
            p_m = 0.0 * now
        elif PREDICTION == _EPSILON:
            p_x = 0.0 * now
            p_m = direction
        elif PREDICTION == _VELOCITY:
            p_x = direction * sigma
            p_m = direction * signal
        else:
            p_x = direction / sigma
            p_m = -(direction * signal) / sigma
    else:
        if PREDICTION == _EPSILON:
            p_x = towards / signal
            p_m = -gap / signal
        elif PREDICTION == _VELOCITY:
            p_x = towards * signal + direction * sigma
            p_m = -gap
        else:
            p_x = direction / sigma
            p_m = gap / sigma
    return p_x0, p_x, p_m, tl.sqrt(s2)


@triton.jit(do_not_specialize=STEP_NUMBERS)
def ddim_step_forward_kernel(
    m_ptr,  # [B, size] as x_ptr, or with guidance [2 B, size]: unconditional, then conditional
    t_ptr,  # [B] integers, stride_t apart
    prev_ptr,  # [B] integers, stride_prev apart
    x_ptr,  # [B, size], contiguous or channels_last within a sample
    table_ptr,  # [T + 1, 2] float32
    noise_ptr,  # as x_ptr, or None: made of seeds
    seeds_ptr,  # [B] int64, or None
    y_ptr,  # as x_ptr, or twice over
    x0_ptr,  # as x_ptr, or None: not wanted
    stride_t,
    stride_prev,
    last,  # T - 1
    seed_low,
    seed_high,
    size,
    blocks,
    batch,  # B
    guidance,  # or None
    clip,  # or None
    eta,
    PREDICTION: tl.constexpr,
    NOISY: tl.constexpr,
    DUPLICATE: tl.constexpr,
    USE_CLIPPED: tl.constexpr,
    CHANNELS: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks
    offsets, inside = tile_offsets(i, size, CHANNELS, LAYOUT, BLOCK, BLOCK_C)
    start = b * size
    second = (b + batch) * size
    x = tl.load(x_ptr + start + offsets, mask=inside, other=0.0).to(tl.float32)  # [BLOCK] or [BLOCK, BLOCK_C]
    m = load_output(m_ptr, start, second, guidance, offsets, inside)
    t, now, rest_now, before, rest_before, difference = step_scalars(
        t_ptr, prev_ptr, table_ptr, stride_t, stride_prev, last, b
    )
    CLIPPED: tl.constexpr = clip is not None
    p_x0, p_x, p_m, deviation = ddim_factors(
        now, rest_now, before, rest_before, difference, eta, PREDICTION, NOISY, CLIPPED, USE_CLIPPED
    )
    if clip is not None or x0_ptr is not None:
        x0_x, x0_m = x0_factors(now, rest_now, PREDICTION)
        x0 = predict_x0(x, m, x0_x, x0_m, clip, PREDICTION)
        if x0_ptr is not None:
            tl.store(x0_ptr + start + offsets, x0.to(x0_ptr.dtype.element_ty), mask=inside)
    if CLIPPED:
        y = p_x0 * x0
        if USE_CLIPPED or PREDICTION != _EPSILON:
            y += p_x * x
        if not USE_CLIPPED:
            y += p_m * m
    else:
        y = p_x * x + p_m * m
    if NOISY:
        y += deviation * load_noise(
            noise_ptr, seeds_ptr, seed_low, seed_high, offsets, inside, i, size, b, t, CHANNELS, LAYOUT, BLOCK, BLOCK_C
        )
    store_twice(y_ptr, y, start, second, offsets, inside, DUPLICATE)


def ddim_step_forward(*inputs: Any, **plan: Any) -> tuple[Tensor, Tensor | None]:
    """x_prev in x's dtype and layout, twice over if it is to be duplicated, and x_0 or None.

    The arguments are those of `torch.ops.mmfast.ddim_step`: t and t_prev (B,) of any stride, `table` the schedule's
    alpha_table, and last eta and use_clipped.
    """
    *inputs, eta, use_clipped = inputs  # type: ignore[assignment]
    return launch_step(ddim_step_forward_kernel, *inputs, eta, USE_CLIPPED=use_clipped, **plan)


LATENTS, PIXELS, ODD = (64, 4, 64, 64), (64, 3, 256, 256), (64, 3, 15, 15)


def audit_configurations() -> Iterator[Compilation]:
    """What `mmfast audit` compiles: guidance with duplication, every prediction and clip, noise, layouts."""
    velocity, sample = {"prediction": VELOCITY}, {"prediction": SAMPLE}
    twice = {"guided": True, "duplicate": True}
    for dtype in AUDIT_DTYPES:
        for label, shape, options, use_clipped in (
            ("forward", PIXELS, {}, False),
            ("forward, guided, duplicated", LATENTS, twice, False),
            ("forward, channels_last, guided, duplicated", LATENTS, {**twice, "last": True}, False),
            ("forward, v, seeds, x0", LATENTS, {**velocity, **twice, "noise": "seeds", "return_x0": True}, False),
            ("forward, clipped again, one seed", PIXELS, {"clip": True, "noise": "seed"}, True),
            ("forward, sample, clipped, noise given", PIXELS, {**sample, "clip": True, "noise": "given"}, False),
            ("forward, v, clipped", PIXELS, {**velocity, "clip": True}, False),
            ("forward, channels_last, seeds", LATENTS, {"last": True, "noise": "seeds"}, False),
            ("forward, any size, seeds", ODD, {"noise": "seeds"}, False),
            ("forward, fp32 model output", LATENTS, {**twice, "model_dtype": torch.float32}, False),
        ):
            step = AuditStep(label, shape, dtype, **options)
            yield audit_step(ddim_step_forward_kernel, step, ("eta",), USE_CLIPPED=use_clipped)
