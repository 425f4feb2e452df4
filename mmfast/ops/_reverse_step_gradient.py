"""Gradients of `ddpm_step` and `ddim_step` in PyTorch's ops, which can be differentiated again.

x_prev is linear in x and the model's output but for the clip of x_0 and a learned variance, so that without these
nothing but timesteps is saved. With g and g0 the gradients of x_prev and x_0, and the coefficients of
`_reverse_step_torch`:

    dx0 = (p_x0 g + g0) where x_0 is not clipped
    dx = p_x g + x0_x dx0        dm = p_m g + x0_m dx0        du = (1 - guidance) dm        dc = guidance dm
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._noise import memory_format
from ._register import stats_dtype
from ._reverse_step import Inputs
from ._reverse_step_torch import Coefficients, deviation, noise_of, shaped, split_output, x0_of


def needs_gradient(*args: Any) -> bool:
    """Whether a gradient can be asked for of a call with these arguments, of which `Inputs` are the first."""
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args[:6])


def save_step(ctx: Any, inputs: Inputs, x0: Tensor, variance: str = "fixed") -> None:
    """Keep what the gradients need: values only beside a clip or a learned variance."""
    ctx.set_materialize_grads(False)
    if not inputs.return_x0:
        ctx.mark_non_differentiable(x0)
    learned = variance.startswith("learned") and inputs.noisy
    values = bool(inputs.clip) or learned
    ctx.save_for_backward(
        inputs.model_output if values else None,
        inputs.t,
        inputs.t_prev,
        inputs.x if inputs.clip else None,
        inputs.table,
        inputs.noise if learned else None,
        inputs.seeds if learned else None,
    )
    ctx.options = inputs[7:]
    ctx.like = tuple((v.dtype, memory_format(v)) for v in (inputs.model_output, inputs.x))
    ctx.noise_dtype = None if inputs.noise is None else inputs.noise.dtype
    ctx.variance = variance


def step_gradients(
    ctx: Any, grads: tuple[Tensor | None, ...], coefficients: Callable[..., Coefficients]
) -> tuple[Tensor | None, ...]:
    """Gradients of `Inputs`; `coefficients(table, t, t_prev, prediction, clipped)` gives the step's."""
    g, g0 = grads
    needs = ctx.needs_input_grad
    model_output, t, t_prev, x, table, noise, seeds = ctx.saved_tensors
    seed, prediction, guidance, clip, noisy, return_x0, duplicate = ctx.options  # the rest of `Inputs`
    (dtype, layout), (x_dtype, x_layout) = ctx.like
    g0 = g0 if return_x0 else None
    if g is None and g0 is None:
        return (None,) * len(needs)
    if g is not None and duplicate:
        first, second = g.chunk(2)
        g = first + second
    sample: Any = g0 if g is None else g  # as x in shape and dtype
    k = shaped(coefficients(table, t, t_prev, prediction, clipped=bool(clip)), sample)
    g, g0 = (v if v is None else v.to(stats_dtype(v)) for v in (g, g0))
    learned = ctx.variance.startswith("learned")
    v = m = None
    if model_output is not None:
        m, v = split_output(model_output, sample, guidance, learned)
    dx0 = g0
    if clip:
        dx0 = _plus(dx0, k.p_x0, g)
        # As `clamp` has it: a value at the end of the range is not clipped.
        dx0 = torch.where(x0_of(k, x.to(m.dtype), m).abs() <= clip, dx0, 0.0)  # type: ignore[union-attr, arg-type]
    dx: Tensor | None = None
    dmodel: Tensor | None = None
    dnoise: Tensor | None = None
    if needs[3]:
        dx = _as(_plus(_times(k.p_x, g), k.x0_x, dx0), sample, x_dtype, x_layout)
    if needs[0]:
        dm = _plus(_times(k.p_m, g), k.x0_m, dx0)
        dv = None
        if learned and noisy and g is not None:
            z = noise_of(sample, t, None, noise, seeds, seed)
            dv = g * z * _slope(k, v, t, ctx.variance)
        dmodel = _model_gradient(dm, dv, sample, guidance, learned, dtype, layout)
    if needs[5] and noisy and g is not None:
        dnoise = (g * deviation(k, v, t, ctx.variance)).to(ctx.noise_dtype)
    return (dmodel, None, None, dx, None, dnoise, *(None,) * (len(needs) - 6))


def _slope(k: Coefficients, v: Tensor | None, t: Tensor, variance: str) -> Tensor:
    """Derivative of the deviation by what the model gives."""
    if variance == "learned_range":
        return k.spread * deviation(k, v, t, variance)
    adds = (t > 0).view(-1, *(1,) * (v.dim() - 1))  # type: ignore[union-attr]
    return 0.5 * k.std / torch.where(adds, v, 1.0).sqrt()  # type: ignore[arg-type]


def _model_gradient(
    dm: Tensor | None,
    dv: Tensor | None,
    sample: Tensor,
    guidance: float | None,
    learned: bool,
    dtype: torch.dtype,
    layout: torch.memory_format,
) -> Tensor:
    """Gradient of the model's whole output from those of its guided prediction and its variance."""
    zero = torch.zeros_like(sample, dtype=stats_dtype(sample))
    dm = zero if dm is None else dm
    parts = [dm] if guidance is None else [(1.0 - guidance) * dm, guidance * dm]
    if learned:
        spare = [zero] * (len(parts) - 1)
        parts = [torch.cat(pair, 1) for pair in zip(parts, [*spare, zero if dv is None else dv], strict=True)]
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return whole.to(dtype).contiguous(memory_format=layout)


def _times(factor: Any, value: Tensor | None) -> Tensor | None:
    return None if factor is None or value is None else factor * value


def _plus(total: Tensor | None, factor: Any, value: Tensor | None) -> Tensor | None:
    """total + factor value, of what there is."""
    term = _times(factor, value)
    return total if term is None else term if total is None else total + term


def _as(value: Tensor | None, sample: Tensor, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    value = torch.zeros_like(sample) if value is None else value
    return value.to(dtype).contiguous(memory_format=layout)
