"""One ancestral sampling step in plain torch, and the inputs that `verify` uses; parts that `ddim_step` shares."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..noise_schedule import NoiseSchedule
from ._case import Case, Inputs, normal
from ._philox import Stream
from .noise_like import SHAPES, SHAPES_GPU, draw_samples, draw_seed, layouts
from .noise_like import noise as make_noise


def ddpm_step(
    model_output: Tensor,
    t: Tensor,
    t_prev: Tensor,
    x: Tensor,
    schedule: NoiseSchedule,
    *,
    guidance: float | None = None,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    prediction_type: str | None = None,
    variance_type: str | None = None,
    clip_sample: bool | float | None = None,
    return_x0: bool = False,
    duplicate: bool = False,
) -> Any:
    """See `mmfast.ops.ddpm_step`; t and t_prev are (B,).

    Written as samplers write it, in x's dtype, but for the coefficients, which are computed in float64.
    """
    variance_type = (variance_type or schedule.variance_type).removesuffix("_log")
    model_output, predicted = guided(model_output, x, guidance, variance_type.startswith("learned"))
    now, before = alpha_bars(schedule, t, t_prev, x)
    beta = 1.0 - now / before
    x0, _ = predict(model_output, x, now, prediction_type or schedule.prediction_type)
    x0 = clipped(x0, schedule, clip_sample)
    x_prev = (before.sqrt() * beta / (1.0 - now)).to(x.dtype) * x0
    x_prev = x_prev + ((now / before).sqrt() * (1.0 - before) / (1.0 - now)).to(x.dtype) * x
    small = ((1.0 - before) / (1.0 - now) * beta).clamp_min(1e-20)
    adds = per_sample(t > 0, x)
    if variance_type == "fixed_small":
        deviation = small.sqrt().to(x.dtype)
    elif variance_type == "fixed_large":
        deviation = beta.sqrt().to(x.dtype)
    elif variance_type == "learned":
        deviation = torch.where(adds, predicted, 1.0).sqrt()  # type: ignore[arg-type]
    else:
        between = (predicted + 1.0) / 2.0  # type: ignore[operator]
        log_variance = between * beta.log().to(x.dtype) + (1.0 - between) * small.log().to(x.dtype)
        deviation = torch.exp(0.5 * log_variance)
    if noise is None:
        noise = make_noise(x, seed, stream=Stream.REVERSE_STEP + 4 * t.long())  # type: ignore[arg-type]
    x_prev = x_prev + torch.where(adds, deviation * noise.to(x.dtype), 0.0)
    return results(x_prev, x0, return_x0, duplicate)


def guided(
    model_output: Tensor, x: Tensor, guidance: float | None, learned: bool = False
) -> tuple[Tensor, Tensor | None]:
    """What the model predicts after guidance, in x's dtype, and its variance."""
    model_output, variance = model_output.to(x.dtype), None
    if guidance is None:
        return model_output.chunk(2, 1) if learned else (model_output, None)  # type: ignore[return-value]
    unconditional, conditional = model_output.chunk(2)
    if learned:
        unconditional, (conditional, variance) = unconditional.chunk(2, 1)[0], conditional.chunk(2, 1)
    return unconditional + guidance * (conditional - unconditional), variance


def alpha_bars(schedule: NoiseSchedule, t: Tensor, t_prev: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Alpha-bar at t and t_prev in float64, shaped to multiply x."""
    table = schedule.alphas_cumprod_double
    return per_sample(table[1 + t.long()], x), per_sample(table[1 + t_prev.long()], x)


def per_sample(values: Tensor, x: Tensor) -> Tensor:
    """values (B,) shaped to multiply x."""
    return values.view(-1, *(1,) * (x.dim() - 1))


def predict(m: Tensor, x: Tensor, now: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    """x_0 and epsilon that the model's output stands for."""
    signal, sigma = now.sqrt().to(x.dtype), (1.0 - now).sqrt().to(x.dtype)
    if prediction_type == "epsilon":
        return (x - sigma * m) / signal, m
    if prediction_type == "sample":
        return m, (x - signal * m) / sigma
    return signal * x - sigma * m, signal * m + sigma * x


def clipped(x0: Tensor, schedule: NoiseSchedule, clip_sample: bool | float | None) -> Tensor:
    """x_0 with dynamic thresholding or clipping, if the schedule or the call asks for either."""
    if schedule.thresholding:
        values = x0.flatten(1)
        limit = torch.quantile(values.abs().to(torch.float64), schedule.dynamic_thresholding_ratio, dim=1)
        limit = per_sample(limit.clamp(1.0, schedule.sample_max_value), x0).to(x0.dtype)
        return x0.clamp(-limit, limit) / limit
    if clip_sample is None:
        clip_sample = schedule.clip_sample
    ends = schedule.clip_sample_range if clip_sample is True else clip_sample
    return x0.clamp(-ends, ends) if ends else x0


def results(x_prev: Tensor, x0: Tensor, return_x0: bool, duplicate: bool) -> Any:
    """What the op returns."""
    if duplicate:
        x_prev = torch.cat((x_prev, x_prev))
    return (x_prev, x0.clone()) if return_x0 else x_prev


OPTIONS: dict[str, dict[str, Any]] = {
    "clipped": {},
    "guided": {"guidance": 7.5, "duplicate": True, "clip_sample": False, "variance_type": "fixed_large"},
    "v": {"prediction_type": "v_prediction", "clip_sample": False, "return_x0": True},
    "learned range": {"variance_type": "learned_range", "guidance": 3.0},
    "sample": {"prediction_type": "sample", "clip_sample": 0.5, "return_x0": True},
    "learned": {"variance_type": "learned", "clip_sample": False},
}


def cases(dtype: torch.dtype, device: torch.device, *, large: bool) -> list[Case]:
    """Inputs for `verify`: each shape and layout with two sets of options, and each origin of the noise."""
    return step_cases(OPTIONS, dtype, device, large=large)


def step_cases(
    options: dict[str, dict[str, Any]], dtype: torch.dtype, device: torch.device, *, large: bool
) -> list[Case]:
    """Inputs of one of the sampling steps."""
    found: list[Case] = []
    origins, names = ("seed", "seeds", "noise", "seeds"), list(options)
    for shape in SHAPES + (SHAPES_GPU if large else ()):
        for label, last in layouts(shape):
            for _ in range(2):
                origin, name = origins[len(found) % 4], names[len(found) % len(names)]
                draw = partial(_draw, shape, last, origin, options[name], dtype, device)
                found.append(Case(f"{label} {name}, {origin}", draw, ("schedule",)))
    return found


def _draw(
    shape: tuple[int, ...], last: bool, origin: str, options: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> Inputs:
    schedule = NoiseSchedule("scaled_linear", beta_start=0.00085, beta_end=0.012).to(device)
    x = draw_samples(shape, last, dtype, device)
    t = torch.randint(1000, shape[:1], device=device)
    t[0] = 0
    t_prev = (t - 20).clamp_min(-1)
    parts = [draw_samples(shape, last, dtype, device) for _ in range(1 + ("guidance" in options))]
    if options.get("variance_type", "").startswith("learned"):
        spread = draw_samples(
            shape, last, dtype, device
        ).sigmoid()  # from 0 to 1: good as variance and as place between
        parts = [torch.cat((part, spread), 1) for part in parts]
    model_output = torch.cat(parts)
    if last:
        model_output = model_output.contiguous(memory_format=torch.channels_last)
    kwargs = dict(options)
    if origin == "noise":
        kwargs["noise"] = normal(shape, dtype, device)
    else:
        kwargs["seed"] = draw_seed(origin, shape[0], device)
    return (model_output, t, t_prev, x, schedule), kwargs
