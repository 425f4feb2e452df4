"""The factors that the sampling steps' kernels compute, for many timesteps in one program."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels._reverse_step import PREDICTIONS, step_scalars, x0_factors
from mmfast.kernels.ddim_step import ddim_factors
from mmfast.kernels.ddpm_step import VARIANCES, ddpm_factors
from mmfast.noise_schedule import NoiseSchedule


@triton.jit
def _factors_kernel(
    t_ptr,
    prev_ptr,
    table_ptr,
    out_ptr,
    count,
    last,
    eta,
    PREDICTION: tl.constexpr,
    DDIM: tl.constexpr,
    NOISY: tl.constexpr,
    CLIPPED: tl.constexpr,
    USE_CLIPPED: tl.constexpr,
    VARIANCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.arange(0, BLOCK)
    b = tl.where(b < count, b, 0)
    _, now, rest_now, before, rest_before, difference = step_scalars(t_ptr, prev_ptr, table_ptr, 1, 1, last, b)
    x0_x, x0_m = x0_factors(now, rest_now, PREDICTION)
    if DDIM:
        p_x0, p_x, p_m, deviation = ddim_factors(
            now, rest_now, before, rest_before, difference, eta, PREDICTION, NOISY, CLIPPED, USE_CLIPPED
        )
    else:
        p_x0, p_x, deviation, p_m = ddpm_factors(now, rest_now, before, rest_before, difference, VARIANCE)
    tl.store(out_ptr + 0 * BLOCK + b, x0_x)
    tl.store(out_ptr + 1 * BLOCK + b, x0_m)
    tl.store(out_ptr + 2 * BLOCK + b, p_x0)
    tl.store(out_ptr + 3 * BLOCK + b, p_x)
    tl.store(out_ptr + 4 * BLOCK + b, p_m)
    tl.store(out_ptr + 5 * BLOCK + b, deviation)


def kernel_factors(
    schedule: NoiseSchedule,
    t: Tensor,
    t_prev: Tensor,
    prediction: str,
    *,
    eta: float | None = None,
    clipped: bool = False,
    again: bool = False,
    variance: str = "fixed_small",
) -> dict[str, Tensor]:
    """Each factor at timesteps t, float32: of `ddim_step` where eta is given, else of `ddpm_step`."""
    block = triton.next_power_of_2(len(t))
    out = torch.empty(6, block, device=t.device)
    options: dict[str, Any] = {"DDIM": eta is not None, "NOISY": bool(eta), "CLIPPED": clipped, "USE_CLIPPED": again}
    _factors_kernel[(1,)](
        *(t, t_prev, schedule.alpha_table, out, len(t), schedule.num_train_timesteps - 1, float(eta or 0.0)),
        **options,
        PREDICTION=PREDICTIONS[prediction],
        VARIANCE=VARIANCES[variance],
        BLOCK=block,
    )
    last = "p_m" if eta is not None else "spread"
    names = ("x0_x", "x0_m", "p_x0", "p_x", last, "std")
    return dict(zip(names, out[:, : len(t)], strict=True))
