"""`ddim_step`: one DDIM sampling step, from the model's output to the less noisy sample, in one pass."""

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
from ._reverse_step import SCHEMA, Inputs, check_number, check_step, draw, facts, step_bytes, step_fake
from ._reverse_step_gradient import needs_gradient, save_step, step_gradients
from ._reverse_step_torch import Coefficients, alpha_bars, reverse_step_torch, root, tensors, x0_coefficients


def ddim_step(
    model_output: Tensor,
    t: int | Tensor,
    t_prev: int | Tensor,
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
    """Go from x_t to x_{t_prev}, any number of timesteps, along what a model predicts; with as much noise as eta says.

        m      = unconditional + guidance (conditional - unconditional)
        x0     = (x - sqrt(1 - alpha_bar_t) m) / sqrt(alpha_bar_t), clipped, and e = m       (prediction_type "epsilon")
        x_prev = sqrt(alpha_bar_prev) x0 + sqrt(1 - alpha_bar_prev - s^2) e + s noise
        s      = eta sqrt((1 - alpha_bar_prev) / (1 - alpha_bar_t) (1 - alpha_bar_t / alpha_bar_prev))

    Coefficients are computed without cancellation in float32 whatever the dtype of x, and the result is rounded once.
    Each timestep of a seed has noise of its own, so that one seed serves a whole sampling loop. Nothing is copied to
    the host.

    Args:
        model_output: (B, ...) of any floating dtype, or with guidance (2B, ...): `cat([unconditional, conditional])`.
        t: timesteps of x from 0: an int, or an integer tensor () or (B,). Out of range raises where t is on the CPU; on
            a GPU, where a look at it would have to wait, these samples become NaN.
        t_prev: timesteps to go to, likewise; -1 is the last step, to x_0. Without noise (eta 0) it may be after t,
            which is DDIM inversion.
        x: (B, ...), float32, float16, bfloat16 or float64; contiguous and channels_last are read in place.
        schedule: a `NoiseSchedule` on x's device, whose settings hold where an argument is None.
        guidance: strength of classifier-free guidance, 1 for the conditional output alone; None without.
        eta: 0 for a step without noise, 1 for as much as `ddpm_step` adds; where more leaves no direction, NaN.
        use_clipped_model_output: derive e again from the clipped x0, as GLIDE does.
        noise: (B, ...) to add instead of noise from a seed.
        seed: an int, or int64 (B,) of one seed a sample, as in `noise_like`; None draws new noise from PyTorch's
            generator.
        prediction_type: "epsilon", "v_prediction" or "sample".
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

    Source: Song, Meng, Ermon, "Denoising Diffusion Implicit Models", arXiv:2010.02502, equations 12 and 16; guidance
    from Ho and Salimans, arXiv:2207.12598. The same as diffusers' `DDIMScheduler.step` after its pipelines' guidance.
    """
    check_number("ddim_step", "eta", eta, lowest=0)
    eta = float(eta)
    inputs, at, drawn, threshold = check_step(
        *("ddim_step", model_output, t, t_prev, x, schedule),
        guidance=guidance,
        noise=noise,
        seed=seed,
        prediction_type=prediction_type,
        clip_sample=clip_sample,
        return_x0=return_x0,
        duplicate=duplicate,
        noisy=eta > 0.0,
    )
    if backends.torch_serves(x) or backends.choose("ddim_step", facts(x, threshold)) == "torch":
        if drawn:
            inputs = inputs._replace(noise=draw(x))
        x_prev, x0 = _ddim_step_torch(inputs, eta, bool(use_clipped_model_output), at, threshold)
    else:
        if drawn:
            inputs = inputs._replace(seeds=fresh_seeds(x))
        x_prev, x0 = _ddim_step(*inputs, eta, bool(use_clipped_model_output))
    return (x_prev, x0) if return_x0 else x_prev


def _ddim_step_torch(
    inputs: Inputs,
    eta: float,
    use_clipped: bool,
    at: tuple[int, int] | None = None,
    threshold: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """The torch backend, differentiable; the second result is empty without `return_x0`."""
    k = coefficients(
        *(inputs.table, inputs.t, inputs.t_prev, inputs.prediction, eta, use_clipped),
        clipped=bool(inputs.clip) or threshold is not None,
        at=at,
    )
    return reverse_step_torch(inputs, k, at, threshold)


def coefficients(
    table: Tensor,
    t: Tensor,
    t_prev: Tensor,
    prediction: str,
    eta: float,
    use_clipped: bool,
    *,
    clipped: bool,
    at: tuple[int, int] | None = None,
) -> Coefficients:
    """The step's coefficients, float64 or numbers."""
    now, before = tensors(*alpha_bars(table, t, t_prev, at))
    signal, sigma, rest = root(now), root(1.0 - now), 1.0 - before
    x0_x, x0_m = x0_coefficients(prediction, now)
    towards, direction, std, variance = root(before), root(rest), None, 0.0
    if eta > 0.0:
        ratio = (before - now) / (before * (1.0 - now))
        variance = eta * eta * rest * ratio
        std = root(variance)
        direction = root(rest * ((1.0 - eta) * (1.0 + eta) * ratio + now * rest / (before * (1.0 - now))))
    # sqrt(alpha_bar_prev) sigma - direction signal, which would cancel where the two timesteps are close.
    gap = (before - now + variance * now) / (direction * signal + towards * sigma)
    if clipped and use_clipped:
        return Coefficients(x0_x, x0_m, gap / sigma, direction / sigma, None, std)
    if clipped:
        p_x, p_m = {
            "epsilon": (None, direction),
            "v_prediction": (direction * sigma, direction * signal),
            "sample": (direction / sigma, -direction * signal / sigma),
        }[prediction]
        return Coefficients(x0_x, x0_m, towards, p_x, p_m, std)
    if prediction == "epsilon":
        return Coefficients(x0_x, x0_m, None, towards / signal, -gap / signal, std)
    if prediction == "v_prediction":
        return Coefficients(x0_x, x0_m, None, towards * signal + direction * sigma, -gap, std)
    return Coefficients(x0_x, x0_m, None, direction / sigma, gap / sigma, std)


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


class DDIMStepFunction(torch.autograd.Function):
    """Autograd of `ddim_step`; see `_reverse_step_gradient`."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        x_prev, x0 = _ddim_step_forward(*args)
        save_step(ctx, Inputs(*args[:-2]), x0)
        ctx.eta, ctx.use_clipped = args[-2:]
        return x_prev, x0

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return step_gradients(ctx, grads, partial(coefficients, eta=ctx.eta, use_clipped=ctx.use_clipped))


def _autograd(*args: Any) -> tuple[Tensor, Tensor]:
    """Sampling has no gradients: then there is no function to apply."""
    return DDIMStepFunction.apply(*args) if needs_gradient(*args) else _ddim_step_forward(*args)


def _implementation(*args: Any) -> tuple[Tensor, Tensor]:
    inputs, extra = Inputs(*args[:-2]), args[-2:]
    backend = backends.pick("ddim_step", facts(inputs.x))
    if backend == "torch":
        return _ddim_step_torch(inputs, *extra)
    x_prev, x0 = launchers(backend, "ddim_step").ddim_step_forward(*inputs, *extra)
    return x_prev, inputs.x.new_empty(0) if x0 is None else x0


_ddim_step = register(
    f"ddim_step({SCHEMA}, float eta, bool use_clipped) -> (Tensor, Tensor)",
    _implementation,
    fake=step_fake,
    autograd=_autograd,
)
_ddim_step_forward = register(
    f"ddim_step_forward({SCHEMA}, float eta, bool use_clipped) -> (Tensor, Tensor)", _implementation, fake=step_fake
)
