"""The beta schedules of `NoiseSchedule`, in Python's own float64: nothing here depends on a device or a tensor mode."""

from __future__ import annotations

import math
from itertools import pairwise

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")


def betas_of_name(name: str, count: int, start: float, end: float) -> list[float]:
    """The `count` betas of a schedule in diffusers' words."""
    at = [i / max(count - 1, 1) for i in range(count)]  # from 0 to 1
    if name == "linear":
        return [start + (end - start) * u for u in at]
    if name == "scaled_linear":
        return [(math.sqrt(start) + (math.sqrt(end) - math.sqrt(start)) * u) ** 2 for u in at]
    if name == "sigmoid":
        return [(end - start) / (1.0 + math.exp(6.0 - 12.0 * u)) + start for u in at]
    curve = _cosine if name == "squaredcos_cap_v2" else _laplace
    bars = [curve(i / count) for i in range(count + 1)]
    return [min(1.0 - after / before, 0.999) for before, after in pairwise(bars)]


def _cosine(u: float) -> float:
    """Alpha-bar at u from 0 to 1 (Nichol, Dhariwal, arXiv:2102.09672, equation 17)."""
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace(u: float) -> float:
    """Alpha-bar at u from 0 to 1 whose logarithmic SNR follows a Laplace law (arXiv:2407.03297), as in diffusers."""
    log_snr = -0.5 * math.copysign(1.0, 0.5 - u) * math.log(1.0 - 2.0 * abs(0.5 - u) + 1e-6)
    snr = math.exp(log_snr)
    return math.sqrt(snr / (1.0 + snr))


def with_zero_snr(alphas_cumprod: list[float]) -> list[float]:
    """Alpha-bars with the same first one and a last one of 0 (Lin et al., arXiv:2305.08891, algorithm 1)."""
    roots = [math.sqrt(value) for value in alphas_cumprod]
    first, last = roots[0], roots[-1]
    if not last < first:
        raise ValueError("NoiseSchedule: rescale_betas_zero_snr needs at least 2 timesteps, got 1")
    return [((root - last) * (first / (first - last))) ** 2 for root in roots]


def betas_of_alphas(alphas_cumprod: list[float]) -> list[float]:
    """The betas whose complements' products these are."""
    before = [1.0, *alphas_cumprod[:-1]]
    return [(b - a) / b if b else 1.0 for b, a in zip(before, alphas_cumprod, strict=True)]
