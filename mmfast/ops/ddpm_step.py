"""`ddpm_step`: one ancestral sampling step, from the model's output to the less noisy sample, in one pass."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..noise_schedule import NoiseSchedule
from ._launchers import launchers
from ._noise import fresh_seeds
from ._register import register
from ._reverse_step import LEARNED, SCHEMA, Inputs, check_step, draw, facts, step_bytes, step_fake, variance_kind
from ._reverse_step_gradient import needs_gradient, save_step, step_gradients
from ._reverse_step_torch import (
    SMALLEST_VARIANCE,
    Coefficients,
    alpha_bars,
    at_least,
    log,
    reverse_step_torch,
    root,
    tensors,
    x0_coefficients,
)


def ddpm_step(
    model_output: Tensor,
    t: int | Tensor,
    t_prev: int | Tensor,
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
    """Draw x_{t_prev} given x_t and what a model predicts from it: the reverse step of a diffusion model.

        m      = unconditional + guidance (conditional - unconditional)
        x0     = (x - sqrt(1 - alpha_bar_t) m) / sqrt(alpha_bar_t), clipped       (prediction_type "epsilon")
        x_prev = sqrt(alpha_bar_prev) beta / (1 - alpha_bar_t) x0
               + sqrt(alpha) (1 - alpha_bar_prev) / (1 - alpha_bar_t) x + deviation noise (where t > 0)

    with alpha = alpha_bar_t / alpha_bar_prev and beta = 1 - alpha. Coefficients are computed without cancellation in
    float32 whatever the dtype of x, and the result is rounded once. Each timestep of a seed has noise of its own, so
    that one seed serves a whole sampling loop. Nothing is copied to the host.

    Args:
        model_output: (B, ...) of any floating dtype, or with guidance (2B, ...): `cat([unconditional, conditional])`.
            Twice the channels (dimension 1) for a learned variance, which is then the second half.
        t: timesteps of x from 0: an int, or an integer tensor () or (B,). Out of range raises where t is on the CPU; on
            a GPU, where a look at it would have to wait, these samples become NaN.
        t_prev: timesteps to go to, before t, likewise; -1 is the last step, to x_0.
        x: (B, ...), float32, float16, bfloat16 or float64; contiguous and channels_last are read in place.
        schedule: a `NoiseSchedule` on x's device, whose settings hold where an argument is None.
        guidance: strength of classifier-free guidance, 1 for the conditional output alone; None without.
        noise: (B, ...) to add instead of noise from a seed.
        seed: an int, or int64 (B,) of one seed a sample, as in `noise_like`; None draws new noise from PyTorch's
            generator.
        prediction_type: "epsilon", "v_prediction" or "sample".
        variance_type: "fixed_small", "fixed_large", "learned" (the variance itself) or "learned_range" (where between
            the two fixed ones in the logarithm, from -1 to 1); "_log" after a fixed one changes nothing. With guidance
            the conditional output's variance is taken.
        clip_sample: whether, or to which range, x0 is clipped. A schedule with dynamic thresholding does that instead.
        return_x0: also return the x0 that the model predicts.
        duplicate: return x_prev twice, (2B, ...), as the next guided call of the model takes it; x may then be the
            first half of it.

    Returns:
        x_prev in x's shape, dtype and layout, or (x_prev, x0), with gradients to model_output, x and a given noise.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape, a device, a timestep, a setting or a number does not fit; both noise and seed are given;
            or epsilon is predicted where the schedule leaves no signal (on a GPU: anywhere in such a schedule).
        BackendError: a forced backend cannot serve.

    Source: Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", arXiv:2006.11239, equation 7; learned_range
    from Nichol and Dhariwal, arXiv:2102.09672; guidance from Ho and Salimans, arXiv:2207.12598. The same as diffusers'
    `DDPMScheduler.step` after its pipelines' guidance.
    """
    variance = variance_kind("ddpm_step", variance_type, schedule)
    inputs, at, drawn, threshold = check_step(
        *("ddpm_step", model_output, t, t_prev, x, schedule),
        guidance=guidance,
        noise=noise,
        seed=seed,
        prediction_type=prediction_type,
        clip_sample=clip_sample,
        return_x0=return_x0,
        duplicate=duplicate,
        learned=variance in LEARNED,
    )
    if backends.torch_serves(x) or backends.choose("ddpm_step", facts(x, threshold)) == "torch":
        if drawn:
            inputs = inputs._replace(noise=draw(x))
        x_prev, x0 = _ddpm_step_torch(inputs, variance, at, threshold)
    else:
        if drawn:
            inputs = inputs._replace(seeds=fresh_seeds(x))
        x_prev, x0 = _ddpm_step(*inputs, variance)
    return (x_prev, x0) if return_x0 else x_prev


def _ddpm_step_torch(
    inputs: Inputs, variance: str, at: tuple[int, int] | None = None, threshold: tuple[float, float] | None = None
) -> tuple[Tensor, Tensor]:
    """The torch backend, differentiable; the second result is empty without `return_x0`."""
    k = coefficients(
        *(inputs.table, inputs.t, inputs.t_prev, inputs.prediction, variance),
        clipped=bool(inputs.clip) or threshold is not None,
        at=at,
    )
    return reverse_step_torch(inputs, k, at, threshold, variance)


def coefficients(
    table: Tensor,
    t: Tensor,
    t_prev: Tensor,
    prediction: str,
    variance: str,
    *,
    clipped: bool,
    at: tuple[int, int] | None = None,
) -> Coefficients:
    """The step's coefficients, float64 or numbers."""
    now, before = tensors(*alpha_bars(table, t, t_prev, at))
    rest_now, rest_before = 1.0 - now, 1.0 - before
    beta = (before - now) / before
    x0_x, x0_m = x0_coefficients(prediction, now)
    p_x0 = root(before) * beta / rest_now
    p_x = root(now / before) * rest_before / rest_now
    std: Any = 1.0
    spread = None
    small = at_least(rest_before / rest_now * beta, SMALLEST_VARIANCE)
    if variance == "fixed_small":
        std = root(small)
    elif variance == "fixed_large":
        std = root(beta)
    elif variance == "learned_range":
        std, spread = root(root(small) * root(beta)), (log(beta) - log(small)) / 4.0
    if isinstance(now, Tensor):
        std = torch.where(t > 0, std, 0.0)
        spread = spread if spread is None else torch.where(t > 0, spread, 0.0)  # may be infinite at timestep 0
    elif at is not None and at[0] == 0:
        std = 0.0
    if clipped:
        return Coefficients(x0_x, x0_m, p_x0, p_x, None, std, spread)
    p_x = p_x if x0_x is None else p_x + p_x0 * x0_x
    return Coefficients(x0_x, x0_m, None, p_x, p_x0 * x0_m, std, spread)


def cost(
    x: Tensor,
    model_output: Tensor,
    *,
    noise: bool = False,
    return_x0: bool = False,
    duplicate: bool = False,
    clip: bool = False,
    backward: bool = False,
) -> dict[str, int]:
    """Bytes through device memory that the op cannot do without; noise from a seed costs none."""
    moved = step_bytes(
        *(x, model_output),
        noise=noise,
        return_x0=return_x0,
        duplicate=duplicate,
        needs_values=clip,
        backward=backward,
    )
    return {"bytes": moved}


class DDPMStepFunction(torch.autograd.Function):
    """Autograd of `ddpm_step`; see `_reverse_step_gradient`."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        x_prev, x0 = _ddpm_step_forward(*args)
        save_step(ctx, Inputs(*args[:-1]), x0, variance=args[-1])
        return x_prev, x0

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return step_gradients(ctx, grads, partial(coefficients, variance=ctx.variance))


def _autograd(*args: Any) -> tuple[Tensor, Tensor]:
    """Sampling has no gradients: then there is no function to apply."""
    return DDPMStepFunction.apply(*args) if needs_gradient(*args) else _ddpm_step_forward(*args)


def _implementation(*args: Any) -> tuple[Tensor, Tensor]:
    inputs, variance = Inputs(*args[:-1]), args[-1]
    backend = backends.pick("ddpm_step", facts(inputs.x))
    if backend == "torch":
        return _ddpm_step_torch(inputs, variance)
    x_prev, x0 = launchers(backend, "ddpm_step").ddpm_step_forward(*inputs, variance)
    return x_prev, inputs.x.new_empty(0) if x0 is None else x0


_ddpm_step = register(
    f"ddpm_step({SCHEMA}, str variance) -> (Tensor, Tensor)",
    _implementation,
    fake=step_fake,
    autograd=_autograd,
)
_ddpm_step_forward = register(
    f"ddpm_step_forward({SCHEMA}, str variance) -> (Tensor, Tensor)", _implementation, fake=step_fake
)
