"""The torch backend of `noise_mse`, differentiable as often as one likes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._noise import dense, gather_pairs, signal_and_sigma
from ._register import stats_dtype
from .noise_like import seeded_noise


def noise_mse_torch(
    prediction: Tensor,
    x0: Tensor | None,
    t: Tensor | None,
    table: Tensor | None,
    weight: Tensor | None,
    seeds: Tensor | None,
    seed: int,
    target: str,
    snr_gamma: float | None,
    offset_noise: float,
    reduction: str,
) -> Tensor:
    """The loss. What is compared with is kept for the backward pass: on a CPU, making it again takes longer."""
    wanted = wanted_torch(prediction, x0, t, table, seeds, seed, target, offset_noise)
    prediction = prediction.to(wanted.dtype)
    factor = sample_factor(t, table, weight, target, snr_gamma, wanted.dtype)
    if not prediction.is_contiguous():  # F.mse_loss would make a gradient in another layout
        sums = sample_sums((prediction - wanted).square())
    elif factor is not None or reduction == "none":
        sums = sample_sums(F.mse_loss(prediction, wanted, reduction="none"))
    else:
        return F.mse_loss(prediction, wanted, reduction=reduction)
    return reduce_sums(sums, factor, prediction, reduction)


def wanted_torch(
    prediction: Tensor,
    x0: Tensor | None,
    t: Tensor | None,
    table: Tensor | None,
    seeds: Tensor | None,
    seed: int,
    target: str,
    offset_noise: float,
) -> Tensor:
    """What a prediction is compared with, in its layout, in float32 (float64 for a float64 prediction)."""
    dtype = stats_dtype(prediction)
    if target == "sample":
        return dense(x0.detach().to(dtype), prediction)  # type: ignore[union-attr]
    noise = seeded_noise(prediction, seeds, seed, offset_noise)
    if target == "epsilon":
        return noise
    signal, sigma = signal_and_sigma(table, t, prediction)  # type: ignore[arg-type]
    return torch.addcmul(signal * noise, sigma, x0.detach().to(dtype), value=-1)  # type: ignore[union-attr]


def sample_factor(
    t: Tensor | None,
    table: Tensor | None,
    weight: Tensor | None,
    target: str,
    snr_gamma: float | None,
    dtype: torch.dtype,
) -> Tensor | None:
    """(B,) by which a sample's squares are multiplied, or None for 1."""
    if snr_gamma is None or t is None or table is None:
        return weight
    high, low = gather_pairs(table, t).to(dtype).unbind(1)
    alpha_bar, sigma2 = high + low, (1.0 - high - low).clamp_min(0)
    # With snr = alpha_bar / sigma2 and alpha_bar + sigma2 = 1, and no 0 / 0 at either end of a schedule:
    if target == "epsilon":  # min(snr, gamma) / snr
        factor = (snr_gamma * sigma2 / alpha_bar).clamp_max(1.0)
    elif target == "v_prediction":  # min(snr, gamma) / (snr + 1)
        factor = torch.minimum(alpha_bar, snr_gamma * sigma2)
    else:
        factor = (alpha_bar / sigma2).clamp_max(snr_gamma)
    return factor if weight is None else factor * weight


def sample_sums(values: Tensor) -> Tensor:
    """(B,) sums over each sample."""
    return values.sum(tuple(range(1, values.dim()))) if values.dim() > 1 else values


def reduce_sums(sums: Tensor, factor: Tensor | None, prediction: Tensor, reduction: str) -> Tensor:
    """The loss from the samples' sums of squares and their factors."""
    if factor is not None:
        sums = sums * factor
    if reduction == "none":
        return sums / prediction[0].numel() if len(prediction) else sums
    total = sums.sum()
    return total / prediction.numel() if reduction == "mean" else total
