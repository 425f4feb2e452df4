"""Noised samples in plain torch, and the inputs that `verify` uses."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..noise_schedule import NoiseSchedule
from ._case import Case, Inputs, normal
from .noise_like import SHAPES, SHAPES_GPU, draw_samples, draw_seed, layouts, noise


def q_sample(
    x0: Tensor,
    t: Tensor,
    schedule: NoiseSchedule,
    *,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    target: str | None = None,
    offset_noise: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """`sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise`; see `mmfast.ops.q_sample`.

    In x0's dtype, which is how training loops write it, but for the schedule, which is exact.
    """
    eps = (_noise(x0, seed, offset_noise) if noise is None else noise).to(x0.dtype)  # type: ignore[arg-type]
    alpha_bar = schedule.alphas_cumprod_double.to(x0.device)[t.long() + 1].view(-1, *(1,) * (x0.dim() - 1))
    signal, sigma = alpha_bar.sqrt().to(x0.dtype), (1.0 - alpha_bar).sqrt().to(x0.dtype)
    noised = signal * x0 + sigma * eps
    if target is None:
        return noised
    return noised, {"epsilon": eps, "v_prediction": signal * eps - sigma * x0, "sample": x0}[target]


_noise = noise


def cases(dtype: torch.dtype, device: torch.device, *, large: bool) -> list[Case]:
    """Inputs for `verify`: each shape, layout, target, and origin of the noise."""
    found: list[Case] = []
    origins = ("seed", "seeds", "noise")
    targets = (None, "epsilon", "v_prediction", "sample")
    for shape in SHAPES + (SHAPES_GPU if large else ()):
        for label, last in layouts(shape):
            origin, target = origins[len(found) % 3], targets[len(found) % 4]
            draw = partial(_draw, shape, last, origin, target, dtype, device)
            found.append(Case(f"{label} {origin}, target {target}", draw, ("schedule",)))
    return found


def _draw(
    shape: tuple[int, ...], last: bool, origin: str, target: str | None, dtype: torch.dtype, device: torch.device
) -> Inputs:
    schedule = NoiseSchedule("scaled_linear", beta_start=0.00085, beta_end=0.012).to(device)
    x0, t = draw_samples(shape, last, dtype, device), torch.randint(1000, shape[:1], device=device)
    kwargs: dict[str, Any] = {"target": target}
    if origin == "noise":
        kwargs["noise"] = normal(shape, dtype, device)
    else:
        kwargs["seed"] = draw_seed(origin, shape[0], device)
        if len(shape) == 4 and last:
            kwargs["offset_noise"] = 0.1
    return (x0, t, schedule), kwargs
