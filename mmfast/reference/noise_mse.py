"""Mean squared error against noise from a seed in plain torch, and the inputs that `verify` uses."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..noise_schedule import NoiseSchedule
from ._case import Case, Inputs
from .noise_like import SHAPES, SHAPES_GPU, draw_samples, draw_seed, layouts
from .noise_like import noise as make_noise


def noise_mse(
    prediction: Tensor,
    seed: int | Tensor,
    *,
    target: str = "epsilon",
    x0: Tensor | None = None,
    t: Tensor | None = None,
    schedule: NoiseSchedule | None = None,
    weight: Tensor | None = None,
    snr_gamma: float | None = None,
    offset_noise: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Mean squared error of `prediction` and the noise of `seed`, or what `target` says; see `mmfast.ops.noise_mse`.

    In float32 or prediction's float64, which is how training loops write it: `F.mse_loss(prediction.float(), ...)`.
    """
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    wanted = make_noise(prediction, seed, offset_noise).to(dtype)
    alpha_bar = torch.ones((), dtype=torch.float64, device=prediction.device)
    if schedule is not None and t is not None:
        alpha_bar = schedule.alphas_cumprod_double.to(prediction.device)[t.long() + 1]
    sigma2 = 1.0 - alpha_bar
    if target == "sample":
        wanted = x0.to(dtype)  # type: ignore[union-attr]
    elif target == "v_prediction":
        signal, sigma = (
            value.sqrt().to(dtype).view(-1, *(1,) * (prediction.dim() - 1)) for value in (alpha_bar, sigma2)
        )
        wanted = signal * wanted - sigma * x0.to(dtype)  # type: ignore[union-attr]
    squares = F.mse_loss(prediction.to(dtype), wanted, reduction="none").reshape(len(prediction), -1)
    factor = squares.new_ones(len(prediction)) if weight is None else weight.to(dtype)
    if snr_gamma is not None:
        snr = alpha_bar / sigma2
        least = snr.clamp(max=snr_gamma)
        # min(snr, gamma) / snr is 1 where there is no signal at all
        ratio = {"epsilon": torch.where(snr == 0, 1.0, least / snr), "v_prediction": least / (snr + 1), "sample": least}
        factor = factor * ratio[target].to(dtype)
    if reduction == "none":
        return squares.mean(1) * factor
    weighted = squares * factor[:, None]
    return weighted.mean() if reduction == "mean" else weighted.sum()


OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"target": "v_prediction", "weight": True},
    {"offset_noise": 0.1, "snr_gamma": 5.0},
    {"target": "sample", "reduction": "none", "snr_gamma": 5.0, "weight": True},
    {"target": "v_prediction", "snr_gamma": 5.0, "reduction": "sum"},
    {"reduction": "none"},
    {"weight": True, "reduction": "sum"},
)
"""Of every option each value, in turn over the shapes."""


def cases(dtype: torch.dtype, device: torch.device, *, large: bool) -> list[Case]:
    """Inputs for `verify`: each shape in each layout, with options and kinds of seeds in turn."""
    found: list[Case] = []
    for shape in SHAPES + (SHAPES_GPU if large else ()):
        for label, last in layouts(shape):
            options, kind = OPTIONS[len(found) % len(OPTIONS)], ("seed", "seeds")[len(found) % 2]
            if len(shape) < 2:
                options = {name: value for name, value in options.items() if name != "offset_noise"}
            names = ", ".join(str(value) if isinstance(value, str) else name for name, value in options.items())
            draw = partial(_draw, shape, last, kind, options, dtype, device)
            found.append(Case(f"{label} {kind} {names or 'plain'}", draw, ("x0", "schedule")))
    return found


def _draw(
    shape: tuple[int, ...],
    last: bool,
    kind: str,
    options: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
) -> Inputs:
    kwargs = {**options, "x0": None}
    if "target" in options:
        kwargs["x0"] = draw_samples(shape, last, dtype, device)
    if "target" in options or "snr_gamma" in options:
        kwargs["t"] = torch.randint(1000, shape[:1], device=device)
        kwargs["schedule"] = NoiseSchedule("scaled_linear", beta_start=0.00085, beta_end=0.012).to(device)
    if "weight" in options:
        kwargs["weight"] = torch.rand(shape[:1], device=device) + 0.5
    return (draw_samples(shape, last, dtype, device), draw_seed(kind, shape[0], device)), kwargs
