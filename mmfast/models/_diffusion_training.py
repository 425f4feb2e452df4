"""What `GaussianDiffusion` draws at random, and its loss where the target is kept."""

from __future__ import annotations

import torch
from torch import Tensor

from ..noise_schedule import NoiseSchedule
from ..ops._noise import check_seed, fresh_seeds, sample_seeds
from ..ops._noise_mse_torch import reduce_sums, sample_factor, sample_sums
from ..reference import _philox


def seeds_of(seed: object, n: int, device: torch.device) -> Tensor:
    """int64 (n,) on the device: new seeds if `seed` is None, those derived from an int, or the given ones."""
    samples = torch.empty(n, 0, device=device)
    if seed is None:
        return fresh_seeds(samples)
    seeds, number = check_seed("GaussianDiffusion", seed, samples)
    # Derived on the host: one copy instead of a hundred small kernels.
    return sample_seeds(number, n).to(device, non_blocking=True) if seeds is None else seeds


def timesteps_of(seeds: Tensor | None, n: int, count: int, device: torch.device) -> Tensor:
    """int64 (n,), uniform from 0 to count - 1: of the seeds, or without them of PyTorch's generator."""
    if seeds is None:
        return torch.randint(count, (n,), device=device)
    return (_words(seeds)[0] * count) >> 32


def left_out(seeds: Tensor | None, n: int, probability: float, device: torch.device) -> Tensor:
    """bool (n,), true with `probability`: of the seeds, or without them of PyTorch's generator."""
    if seeds is None:
        return torch.rand(n, device=device) < probability
    return _words(seeds)[1] < round(probability * 2**32)


def _words(seeds: Tensor) -> tuple[Tensor, ...]:
    low, high = seeds & _philox.MASK, (seeds >> 32) & _philox.MASK
    return _philox.philox(low, high, torch.zeros_like(seeds), 0, 0, _philox.Stream.TRAINING)


def kept_loss(
    prediction: Tensor,
    target: Tensor,
    t: Tensor,
    schedule: NoiseSchedule,
    weight: Tensor | None,
    snr_gamma: float | None,
    reduction: str,
) -> Tensor:
    """What `ops.noise_mse` computes, of a target that is there: on a CPU, to make it again takes longer."""
    dtype = torch.promote_types(target.dtype, torch.float32)
    squares = (prediction.to(dtype) - target.to(dtype)).square()
    factor = sample_factor(t, schedule.alpha_table, weight, schedule.prediction_type, snr_gamma, dtype)
    if factor is None and reduction != "none":
        return squares.mean() if reduction == "mean" else squares.sum()
    return reduce_sums(sample_sums(squares), factor, prediction, reduction)
