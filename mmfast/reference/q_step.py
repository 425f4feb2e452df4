"""One step of the forward process in plain torch, and the inputs that `verify` uses."""

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


def q_step(
    x: Tensor,
    t: Tensor,
    schedule: NoiseSchedule,
    *,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """`sqrt(1 - beta_t) x + sqrt(beta_t) noise`; see `mmfast.ops.q_step`.

    In x's dtype, which is how training loops write it, but for the schedule, which is exact.
    """
    if noise is None:
        noise = make_noise(x, seed, stream=Stream.Q_STEP + 4 * t.long())  # type: ignore[arg-type]
    alphas_cumprod = schedule.alphas_cumprod_double.to(x.device)[1:]
    before = torch.cat((torch.ones_like(alphas_cumprod[:1]), alphas_cumprod[:-1]))
    beta = (1.0 - alphas_cumprod / before)[t.long()].view(-1, *(1,) * (x.dim() - 1))
    return (1.0 - beta).sqrt().to(x.dtype) * x + beta.sqrt().to(x.dtype) * noise.to(x.dtype)


def cases(dtype: torch.dtype, device: torch.device, *, large: bool) -> list[Case]:
    """Inputs for `verify`: each shape and layout, with each origin of the noise in turn."""
    found: list[Case] = []
    origins = ("seed", "seeds", "noise")
    for shape in SHAPES + (SHAPES_GPU if large else ()):
        for label, last in layouts(shape):
            origin = origins[len(found) % 3]
            found.append(Case(f"{label} {origin}", partial(_draw, shape, last, origin, dtype, device), ("schedule",)))
    return found


def _draw(shape: tuple[int, ...], last: bool, origin: str, dtype: torch.dtype, device: torch.device) -> Inputs:
    schedule = NoiseSchedule().to(device)
    x, t = draw_samples(shape, last, dtype, device), torch.randint(1000, shape[:1], device=device)
    t[0] = 0
    if origin == "noise":
        return (x, t, schedule), {"noise": normal(shape, dtype, device)}
    kwargs: dict[str, Any] = {"seed": draw_seed(origin, shape[0], device)}
    return (x, t, schedule), kwargs
