"""The torch backend of `ddpm_step` and `ddim_step`: coefficients in float64, then as few passes as PyTorch's ops allow.

Either step is, with coefficients of each sample and z normal,

    m      = u + guidance (c - u)                   classifier-free guidance
    x0     = clip(x0_x x + x0_m m)                  what the model says the sample is
    x_prev = p_x0 x0 + p_x x + p_m m + std z

and without a clip x0's part is in p_x and p_m, in closed forms that do not cancel. The coefficients are functions of
alpha-bar at t and at t_prev, written once for numbers (one t of a CPU's batch, known on the host) and for tensors (B,).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference._philox import Stream
from ._noise import gather_pairs, memory_format
from ._philox_torch import normals
from ._register import stats_dtype
from ._reverse_step import Inputs

STREAM = int(Stream.REVERSE_STEP)  # torch.compile cannot add to an enum
SMALLEST_VARIANCE = 1e-20
"""As in diffusers: a step to timestep -1 has no variance, and its logarithm is taken."""


class Coefficients(NamedTuple):
    """See the formulas above; None where a term is absent."""

    x0_x: Any
    x0_m: Any
    p_x0: Any
    p_x: Any
    p_m: Any
    std: Any = None
    spread: Any = None  # of a variance learned in a range: the deviation is std exp(spread v)


def alpha_bars(table: Tensor, t: Tensor, t_prev: Tensor, at: tuple[int, int] | None) -> tuple[Any, Any]:
    """Alpha-bar at t and t_prev: numbers where `at` is known and the table on the CPU, else float64 (B,)."""
    if at is not None and type(table) is Tensor and table.is_cpu and not torch.compiler.is_compiling():
        return sum(table[at[0] + 1].tolist()), sum(table[at[1] + 1].tolist())
    return gather_pairs(table, t).double().sum(1), gather_pairs(table, t_prev, lowest=-1).double().sum(1)


def tensors(now: Any, before: Any) -> tuple[Any, Any]:
    """The same, as tensors where numbers would raise what is infinite or NaN in a tensor."""
    if isinstance(now, Tensor) or (0.0 <= now < before and now < 1.0):
        return now, before
    return torch.tensor([now], dtype=torch.float64), torch.tensor([before], dtype=torch.float64)


def x0_coefficients(prediction: str, now: Any) -> tuple[Any, Any]:
    """x_0 as a combination of x and the model's output."""
    signal, sigma = root(now), root(1.0 - now)
    if prediction == "epsilon":
        return 1.0 / signal, -sigma / signal
    if prediction == "v_prediction":
        return signal, -sigma
    return None, now * 0.0 + 1.0 if isinstance(now, Tensor) else 1.0  # NaN stays NaN


def root(value: Any) -> Any:
    """Square root."""
    return value.sqrt() if isinstance(value, Tensor) else math.sqrt(value)


def log(value: Any) -> Any:
    """Natural logarithm."""
    return value.log() if isinstance(value, Tensor) else math.log(value)


def at_least(value: Any, lowest: float) -> Any:
    """The value, or `lowest` where that is more."""
    return value.clamp_min(lowest) if isinstance(value, Tensor) else max(value, lowest)


def shaped(k: Coefficients, x: Tensor) -> Coefficients:
    """Tensors of coefficients in the dtype of the arithmetic, shaped to multiply x."""
    shape = (-1, *(1,) * (x.dim() - 1))
    return Coefficients(*(c.to(stats_dtype(x)).view(shape) if isinstance(c, Tensor) else c for c in k))


def noise_of(
    x: Tensor, t: Tensor, at: tuple[int, int] | None, noise: Tensor | None, seeds: Tensor | None, seed: int
) -> Tensor:
    """The noise given, or that of the seeds at timesteps t, in the dtype of the arithmetic."""
    if noise is not None:
        return noise.to(stats_dtype(x))
    return normals(x, seeds, seed, STREAM + 4 * (t.long() if at is None else at[0]))


def split_output(
    model_output: Tensor, x: Tensor, guidance: float | None, learned: bool
) -> tuple[Tensor, Tensor | None]:
    """What the model predicts after guidance, in the dtype of the arithmetic, and its variance."""
    dtype, variance = stats_dtype(x), None
    unconditional, conditional = None, model_output
    if guidance is not None:
        unconditional, conditional = model_output.chunk(2)
    if learned:
        conditional, variance = conditional.chunk(2, dim=1)
        variance = variance.to(dtype)
        if unconditional is not None:
            unconditional = unconditional.chunk(2, dim=1)[0]
    if unconditional is None:
        return conditional.to(dtype), variance
    return torch.lerp(unconditional.to(dtype), conditional.to(dtype), guidance), variance  # type: ignore[arg-type]


def reverse_step_torch(
    inputs: Inputs,
    k: Coefficients,
    at: tuple[int, int] | None = None,
    threshold: tuple[float, float] | None = None,
    variance: str = "fixed",
) -> tuple[Tensor, Tensor]:
    """x_prev, twice over if it is to be duplicated, and x_0 (empty unless asked for); differentiable."""
    model_output, x, t = inputs.model_output, inputs.x, inputs.t
    clip, return_x0 = inputs.clip, inputs.return_x0
    k = shaped(k, x)
    m, v = split_output(model_output, x, inputs.guidance, variance.startswith("learned"))
    z = x.to(m.dtype)
    x0: Any = None
    if k.p_x0 is not None or return_x0:
        x0 = x0_of(k, z, m)
        if threshold is not None:
            x0 = _thresholded(x0, *threshold)
        elif clip:
            x0 = x0.clamp(-clip, clip) if x0 is m or _transformed() else x0.clamp_(-clip, clip)
    terms: list[tuple[Any, Any]] = [(k.p_x, z), (k.p_m, m)]
    if k.p_x0 is not None:
        terms.append((k.p_x0, x0))
    if inputs.noisy:
        terms.append((deviation(k, v, t, variance), noise_of(x, t, at, *inputs[5:8])))
    x_prev = _finished(_sum(*terms), x)
    if inputs.duplicate:
        x_prev = torch.cat((x_prev, x_prev))
    if not return_x0:
        return x_prev, x.new_empty(0)
    # A result must not be an argument, which a prediction of the sample itself would be.
    return x_prev, _finished(x0.clone() if x0 is model_output else x0, x)


def x0_of(k: Coefficients, x: Tensor, m: Tensor) -> Tensor:
    """What the model says the sample is; m itself where it predicts that."""
    return _sum((k.x0_x, x), (k.x0_m, m))


def deviation(k: Coefficients, v: Tensor | None, t: Tensor, variance: str) -> Any:
    """Standard deviation of the noise: one a sample, or one an element where the model predicts it."""
    if variance == "learned_range":
        return k.std * torch.exp(v * k.spread)
    if variance == "learned":
        if not isinstance(k.std, Tensor):
            return v.sqrt() if k.std else k.std  # type: ignore[union-attr]
        # At timestep 0 nothing is added: no root of what may be negative there.
        adds = (t > 0).view(-1, *(1,) * (v.dim() - 1))  # type: ignore[union-attr]
        return torch.where(adds, v, 1.0).sqrt() * k.std  # type: ignore[arg-type]
    return k.std


def _sum(*terms: tuple[Any, Any]) -> Tensor:
    """The sum of factor times tensor, in place from the second on, where that may be."""
    total: Tensor | None = None
    fresh = False
    in_place = not _transformed()
    for factor, value in terms:
        if factor is None:
            continue
        if total is None:
            fresh = not (isinstance(factor, float) and factor == 1.0)
            total = value * factor if fresh else value
        elif isinstance(factor, Tensor):
            total = total.addcmul_(value, factor) if fresh and in_place else torch.addcmul(total, value, factor)
            fresh = True
        else:
            total = total.add_(value, alpha=factor) if fresh and in_place else torch.add(total, value, alpha=factor)
            fresh = True
    return total  # type: ignore[return-value]


def _transformed() -> bool:
    """Whether torch.func transforms are active, under which vmap allows no op in place on what it does not see."""
    return torch._C._are_functorch_transforms_active()


def _finished(value: Tensor, x: Tensor) -> Tensor:
    """In x's dtype and layout."""
    return value.to(x.dtype).contiguous(memory_format=memory_format(x))


def _thresholded(x0: Tensor, ratio: float, largest: float) -> Tensor:
    """Clipped to a quantile of each sample's absolute values, if above 1, and divided by it (arXiv:2205.11487)."""
    if x0.numel() == 0:
        return x0
    limit = torch.quantile(x0.abs().reshape(len(x0), -1), ratio, dim=1)
    limit = limit.clamp(1.0, largest).view(-1, *(1,) * (x0.dim() - 1))
    return x0.clamp(-limit, limit) / limit
