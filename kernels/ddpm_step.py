"""One ancestral sampling step.

    x_prev = p_x0 x0 + p_x x + deviation noise               (noise where t > 0)
    p_x0 = sqrt(before) beta / (1 - now)                     beta = (before - now) / before
    p_x  = sqrt(now / before) (1 - before) / (1 - now)
    deviation^2 = beta (1 - before) / (1 - now) (fixed_small), beta (fixed_large), what the model says (learned), or
                  between the two fixed ones in the logarithm, at what the model says from -1 to 1 (learned_range)

One pass: x and the model's output are read and x_prev is written. Where x0 is not clipped, it is part of the factors
of x and m. Noise comes from seeds and is never stored; in 16 bits it is what the time goes into (see `_philox`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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
    model_offsets,
    predict_x0,
    step_scalars,
    store_twice,
    x0_factors,
)
from ._samples import LAST, tile_offsets

VARIANCES = {"fixed_small": 0, "fixed_large": 1, "learned": 2, "learned_range": 3}
_SMALL, _LARGE, _LEARNED, _RANGE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
_VELOCITY, _LAST = tl.constexpr(VELOCITY), tl.constexpr(LAST)


@triton.jit
def ddpm_factors(now, rest_now, before, rest_before, difference, VARIANCE: tl.constexpr):
    """Factors of x0, x and the noise in x_prev, and the spread of a variance that is learned in a range."""
    beta = difference / before
    inverse = 1.0 / rest_now
    p_x0 = tl.sqrt(before) * beta * inverse
    p_x = tl.sqrt(now / before) * rest_before * inverse
    small = tl.maximum(rest_before * inverse * beta, 1e-20)
    spread = 0.0 * now
    if VARIANCE == _SMALL:
        deviation = tl.sqrt(small)
    elif VARIANCE == _LARGE:
        deviation = tl.sqrt(beta)
    elif VARIANCE == _RANGE:
        deviation = tl.sqrt(tl.sqrt(small) * tl.sqrt(beta))
        spread = 0.25 * tl.log(beta / small)
    else:
        deviation = 0.0 * now + 1.0
    return p_x0, p_x, deviation, spread


@triton.jit(do_not_specialize=STEP_NUMBERS)
def ddpm_step_forward_kernel(
    m_ptr,  # [B, size] as x_ptr, or with guidance [2 B, size]: unconditional, then conditional; learned: 2 size long
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
    PREDICTION: tl.constexpr,
    NOISY: tl.constexpr,
    DUPLICATE: tl.constexpr,
    VARIANCE: tl.constexpr,
    CHANNELS: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks
    LEARNED: tl.constexpr = VARIANCE >= _LEARNED
    offsets, inside = tile_offsets(i, size, CHANNELS, LAYOUT, BLOCK, BLOCK_C)
    start = b * size
    second = (b + batch) * size
    x = tl.load(x_ptr + start + offsets, mask=inside, other=0.0).to(tl.float32)  # [BLOCK] or [BLOCK, BLOCK_C]
    if LEARNED:
        places = model_offsets(offsets, i, CHANNELS, LAYOUT, BLOCK, BLOCK_C)
        m = load_output(m_ptr, 2 * start, 2 * second, guidance, places, inside)
        if NOISY:
            conditional = start
            if guidance is not None:
                conditional = second
            if LAYOUT >= _LAST:
                places += CHANNELS
            else:
                places += size
            v = tl.load(m_ptr + 2 * conditional + places, mask=inside, other=0.0).to(tl.float32)
    else:
        m = load_output(m_ptr, start, second, guidance, offsets, inside)
    t, now, rest_now, before, rest_before, difference = step_scalars(
        t_ptr, prev_ptr, table_ptr, stride_t, stride_prev, last, b
    )
    p_x0, p_x, deviation, spread = ddpm_factors(now, rest_now, before, rest_before, difference, VARIANCE)
    x0_x, x0_m = x0_factors(now, rest_now, PREDICTION)
    if clip is not None or x0_ptr is not None:
        x0 = predict_x0(x, m, x0_x, x0_m, clip, PREDICTION)
        if x0_ptr is not None:
            tl.store(x0_ptr + start + offsets, x0.to(x0_ptr.dtype.element_ty), mask=inside)
    if clip is not None:
        y = p_x0 * x0 + p_x * x
    elif PREDICTION <= _VELOCITY:
        y = (p_x + p_x0 * x0_x) * x + (p_x0 * x0_m) * m
    else:
        y = p_x * x + (p_x0 * x0_m) * m
    if NOISY:
        noise = load_noise(
            noise_ptr, seeds_ptr, seed_low, seed_high, offsets, inside, i, size, b, t, CHANNELS, LAYOUT, BLOCK, BLOCK_C
        )
        noise *= deviation
        if VARIANCE == _RANGE:
            noise *= tl.exp(spread * v)
        elif VARIANCE == _LEARNED:
            noise *= tl.sqrt(v)
        y += tl.where(t > 0, noise, 0.0)
    store_twice(y_ptr, y, start, second, offsets, inside, DUPLICATE)


def ddpm_step_forward(*inputs: Any, **plan: Any) -> tuple[Tensor, Tensor | None]:
    """x_prev in x's dtype and layout, twice over if it is to be duplicated, and x_0 or None.

    The arguments are those of `torch.ops.mmfast.ddpm_step`: t and t_prev (B,) of any stride, `table` the schedule's
    alpha_table, and last the kind of variance.
    """
    *inputs, variance = inputs  # type: ignore[assignment]
    learned = variance.startswith("learned")
    return launch_step(ddpm_step_forward_kernel, *inputs, learned=learned, VARIANCE=VARIANCES[variance], **plan)


LATENTS, PIXELS, ODD = (64, 4, 64, 64), (64, 3, 256, 256), (64, 3, 15, 15)


def audit_configurations() -> Iterator[Compilation]:
    """What `mmfast audit` compiles: each variance, prediction and clip, guidance, noise, layouts."""
    clip, seeds = {"clip": True}, {"noise": "seeds"}
    learned = {"learned": True, **seeds}
    twice = {"guided": True, "duplicate": True, **seeds}
    given = {"prediction": VELOCITY, "noise": "given", "return_x0": True}
    for dtype in AUDIT_DTYPES:
        for label, shape, options, variance in (
            ("forward, clipped, seeds", PIXELS, {**clip, **seeds}, "fixed_small"),
            ("forward, one seed", PIXELS, {"noise": "seed"}, "fixed_large"),
            ("forward, guided, duplicated, seeds", LATENTS, twice, "fixed_small"),
            ("forward, v, noise given, x0", PIXELS, given, "fixed_small"),
            ("forward, learned range, guided", PIXELS, {**learned, **clip, "guided": True}, "learned_range"),
            ("forward, sample, learned", PIXELS, {**learned, "prediction": SAMPLE}, "learned"),
            ("forward, learned range, channels_last", PIXELS, {**learned, "last": True}, "learned_range"),
            ("forward, channels_last, seeds", LATENTS, {**seeds, "last": True}, "fixed_small"),
            ("forward, last step", PIXELS, {}, "fixed_small"),
            ("forward, any size, seeds", ODD, seeds, "fixed_small"),
        ):
            step = AuditStep(label, shape, dtype, **options)
            yield audit_step(ddpm_step_forward_kernel, step, VARIANCE=VARIANCES[variance])
