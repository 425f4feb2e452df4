"""One DDIM sampling step in plain torch, and the inputs that `verify` uses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..noise_schedule import NoiseSchedule
from ._case import Case
from ._philox import Stream
from .ddpm_step import alpha_bars, clipped, guided, predict, results, step_cases
from .noise_like import noise as make_noise


def ddim_step(
    model_output: Tensor,
    t: Tensor,
    t_prev: Tensor,
    x: Tensor,
    schedule: NoiseSchedule,
    *,
    guidance: float | None = None,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    prediction_type: str | None = None,
    clip_sample: bool | float | None = None,
    return_x0: bool = False,
    duplicate: bool = False,
) -> Any:
    """See `mmfast.ops.ddim_step`; t and t_prev are (B,).

    Written as samplers write it, in x's dtype, but for the coefficients, which are computed in float64.
    """
    model_output, _ = guided(model_output, x, guidance)
    now, before = alpha_bars(schedule, t, t_prev, x)
    x0, epsilon = predict(model_output, x, now, prediction_type or schedule.prediction_type)
    x0 = clipped(x0, schedule, clip_sample)
    if use_clipped_model_output:
        epsilon = (x - now.sqrt().to(x.dtype) * x0) / (1.0 - now).sqrt().to(x.dtype)
    variance = eta**2 * (1.0 - before) / (1.0 - now) * (1.0 - now / before)
    direction = (1.0 - before - variance).clamp_min(0).sqrt()  # rounding may leave a 0 below it
    x_prev = before.sqrt().to(x.dtype) * x0 + direction.to(x.dtype) * epsilon
    if eta > 0:
        if noise is None:
            noise = make_noise(x, seed, stream=Stream.REVERSE_STEP + 4 * t.long())  # type: ignore[arg-type]
        x_prev = x_prev + variance.sqrt().to(x.dtype) * noise.to(x.dtype)
    return results(x_prev, x0, return_x0, duplicate)


OPTIONS: dict[str, dict[str, Any]] = {
    "guided": {"guidance": 7.5, "duplicate": True, "clip_sample": False},
    "clipped": {},
    "v, eta": {"prediction_type": "v_prediction", "clip_sample": False, "return_x0": True, "eta": 0.7},
    "clipped again, eta": {"use_clipped_model_output": True, "eta": 1.0, "return_x0": True},
    "sample": {"prediction_type": "sample", "clip_sample": 0.5, "guidance": 2.0},
    "v, clipped": {"prediction_type": "v_prediction", "clip_sample": 1.5, "duplicate": True},
    "eta": {"clip_sample": False, "eta": 0.3},
    "sample, eta": {"prediction_type": "sample", "clip_sample": False, "eta": 1.0},
}


def cases(dtype: torch.dtype, device: torch.device, *, large: bool) -> list[Case]:
    """Inputs for `verify`: each shape and layout with two sets of options, and each origin of the noise."""
    return step_cases(OPTIONS, dtype, device, large=large)
