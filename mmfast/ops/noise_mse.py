"""`noise_mse`: mean squared error against noise that is made again from its seed, and never stored."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..noise_schedule import NoiseSchedule
from ._launchers import launchers
from ._noise import (
    check_noise,
    check_offset_noise,
    check_schedule,
    check_seed,
    check_timesteps,
    dense,
    facts,
    new_like,
    per_sample,
)
from ._noise_mse_torch import noise_mse_torch, reduce_sums, sample_factor, sample_sums, wanted_torch
from ._register import differentiable_backward, register, stats_dtype
from ._validate import check_input, check_vector

TARGETS = ("epsilon", "v_prediction", "sample")
REDUCTIONS = ("mean", "sum", "none")


def noise_mse(
    prediction: Tensor,
    seed: int | Tensor,
    *,
    target: str = "epsilon",
    x0: Tensor | None = None,
    t: int | Tensor | None = None,
    schedule: NoiseSchedule | None = None,
    weight: Tensor | None = None,
    snr_gamma: float | None = None,
    offset_noise: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Mean squared error of a diffusion model's prediction against the noise that `q_sample` added for the same seed.

    The same as `F.mse_loss(prediction.float(), noise.float())`, with the noise made again in the forward and in the
    backward pass: on a GPU it is never in memory, and both passes together move three tensors (prediction twice, its
    gradient once) where the noise kept and cast takes fourteen. The torch backend makes the noise once and keeps it
    for the backward pass: on a CPU making it takes many times longer than reading it, so that there a training loop
    is faster with the target that `q_sample` returns and `F.mse_loss`.

    Args:
        prediction: (B, ...), float32, float16, bfloat16 or float64; contiguous and channels_last are read in place.
        seed: the seed given to `q_sample`: an int, or int64 (B,) of one seed a sample.
        target: what was predicted: "epsilon" (the noise), "v_prediction" (`sqrt(alpha_bar) noise - sqrt(1 - alpha_bar)
            x0`) or "sample" (x0).
        x0: (B, ...) clean samples, which the targets other than "epsilon" need. No gradient flows to it.
        t: timesteps, an int or an integer tensor () or (B,), which "v_prediction" and `snr_gamma` need. Out of range
            raises where t is on the CPU; on a GPU these samples' losses and gradients become NaN.
        schedule: a `NoiseSchedule` on prediction's device, needed with t. What a call does not need may be given.
        weight: (B,) float32, multiplies each sample's squares; it gets a gradient.
        snr_gamma: min-SNR weighting of this gamma: with snr = alpha_bar / (1 - alpha_bar), a sample's squares are
            multiplied by min(snr, gamma) for "sample", by that over snr for "epsilon" (1 where snr is 0) and over
            snr + 1 for "v_prediction". It multiplies with `weight`.
        offset_noise: as given to `q_sample`.
        reduction: "mean" and "sum" as in `F.mse_loss`, of the weighted squares; "none" is (B,), the mean over each
            sample, times its weights.

    Returns:
        float32 (float64 for a float64 prediction), a scalar or (B,). The gradient has prediction's dtype and layout.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape, a device, a timestep or a number does not fit, or an argument that is needed is missing.
        BackendError: a forced backend cannot serve.

    Source: Ho, Jain, Abbeel, arXiv:2006.11239, equation 14; v from Salimans and Ho, arXiv:2202.00512; weights from
    Hang et al., arXiv:2303.09556, and diffusers' training scripts.
    """
    op = "noise_mse"
    check_input(op, "prediction", prediction)
    seeds, number = check_seed(op, seed, prediction)
    for name, value, known in (("target", target, TARGETS), ("reduction", reduction, REDUCTIONS)):
        if value not in known:
            raise ValueError(f"{op}: {name} must be one of {', '.join(known)}, got {value!r}")
    check_vector(op, "weight", weight, prediction, prediction.shape[0], stats_dtype(prediction))
    check_offset_noise(op, offset_noise, prediction)
    _check_gamma(snr_gamma)
    steps = table = None
    if target == "v_prediction" or snr_gamma is not None:
        if t is None or schedule is None:
            needing = "target 'v_prediction'" if target == "v_prediction" else "snr_gamma"
            missing = "t" if t is None else "schedule"
            raise ValueError(f"{op}: {needing} needs t and schedule, and {missing} is None")
        check_schedule(op, schedule, prediction)
        steps, table = check_timesteps(op, "t", t, prediction, schedule), schedule.alpha_table
    if target == "epsilon":
        x0 = None
    elif x0 is None:
        raise ValueError(f"{op}: target {target!r} needs x0, which is None")
    else:
        check_noise(op, x0, prediction, "x0")
        x0 = x0.detach()
    arguments = (prediction, x0, steps, table, weight, seeds, number, target, snr_gamma, offset_noise, reduction)
    if backends.torch_serves(prediction) or backends.choose(op, facts(prediction)) == "torch":
        return noise_mse_torch(*arguments)
    return _noise_mse(*arguments)


def _check_gamma(snr_gamma: object) -> None:
    if snr_gamma is None:
        return
    if not isinstance(snr_gamma, (int, float)) or isinstance(snr_gamma, bool):
        raise TypeError(f"noise_mse: snr_gamma must be a number, got {type(snr_gamma).__name__}")
    if not 0.0 < snr_gamma < math.inf:
        raise ValueError(f"noise_mse: snr_gamma must be positive and finite, got {snr_gamma}")


def cost(prediction: Tensor, *, target: str = "epsilon", backward: bool = False) -> dict[str, int]:
    """Bytes through device memory that the op cannot do without; the noise costs none."""
    # Forward reads the prediction, and x0 for the other targets; backward reads them again and writes the gradient.
    tensors = 1 + (target != "epsilon") + backward
    return {"bytes": tensors * prediction.numel() * prediction.element_size()}


class NoiseMseFunction(torch.autograd.Function):
    """Autograd of `noise_mse`: saves what it was given, and with a weight's gradient to come (B,) more; no noise."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        need_prediction, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
        loss, parts = _noise_mse_forward(*args, need_weight)
        ctx.save_for_backward(parts if need_weight else None, *(args[:6] if need_prediction else (None,) * 6))
        ctx.rest = args[6:]
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        parts, *tensors = ctx.saved_tensors
        dprediction = dweight = None
        if tensors[0] is None:
            dweight = grads[0] * parts
        elif torch.is_grad_enabled():  # create_graph=True: PyTorch's own ops can be differentiated again
            found = differentiable_backward(noise_mse_torch, (*tensors, *ctx.rest), grads, ctx.needs_input_grad)
            dprediction, dweight = found[0], found[4]
        else:
            dprediction = _noise_mse_backward(grads[0], *tensors, *ctx.rest)
            dweight = None if parts is None else grads[0] * parts
        return dprediction, None, None, None, dweight, *(None,) * 6


class _Call(NamedTuple):
    """Arguments of the registered ops, in their order."""

    prediction: Tensor
    x0: Tensor | None  # None for target "epsilon"
    t: Tensor | None  # (B,), with `table` where target or snr_gamma needs them
    table: Tensor | None
    weight: Tensor | None
    seeds: Tensor | None
    seed: int
    target: str
    snr_gamma: float | None
    offset_noise: float
    reduction: str

    @property
    def divisor(self) -> int:
        """What a sample's sum of squares is divided by."""
        if self.reduction == "none":
            return math.prod(self.prediction.shape[1:])
        return self.prediction.numel() if self.reduction == "mean" else 1


def _implementation(*args: Any) -> Tensor:
    return _forward(*args, False)[0]


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    """The loss and, where the last argument asks for it, its gradient by the weight (B,)."""
    call, need_weight = _Call(*args[:-1]), args[-1]
    prediction = call.prediction
    backend = backends.pick("noise_mse", facts(prediction))
    if backend != "torch":
        forward = launchers(backend, "noise_mse").noise_mse_forward
        loss, found = forward(*call, count=call.divisor, save_parts=need_weight)
        return loss, prediction.new_empty(0, dtype=loss.dtype) if found is None else found
    wanted = wanted_torch(prediction, call.x0, call.t, call.table, call.seeds, call.seed, *_target(call))
    sums = sample_sums((prediction.to(wanted.dtype) - wanted).square_())
    snr = sample_factor(call.t, call.table, None, call.target, call.snr_gamma, sums.dtype)
    sums = sums if snr is None else sums * snr
    loss = reduce_sums(sums, call.weight, prediction, call.reduction)
    if not need_weight:
        return loss, sums.new_empty(0)
    return loss, sums / call.divisor


def _backward(dloss: Tensor, *args: Any) -> Tensor:
    call = _Call(*args)
    prediction = call.prediction
    backend = backends.pick("noise_mse", facts(prediction))
    if backend != "torch":
        return launchers(backend, "noise_mse").noise_mse_backward(dloss, *call, count=call.divisor)
    wanted = wanted_torch(prediction, call.x0, call.t, call.table, call.seeds, call.seed, *_target(call))
    scale = dloss.expand(len(prediction)) * (2.0 / call.divisor if call.divisor else math.nan)
    factor = sample_factor(call.t, call.table, call.weight, call.target, call.snr_gamma, scale.dtype)
    scale = scale if factor is None else scale * factor
    found = (prediction.to(wanted.dtype) - wanted).mul_(per_sample(scale, prediction))
    return dense(found.to(prediction.dtype), prediction)


def _target(call: _Call) -> tuple[str, float]:
    return call.target, call.offset_noise


def _loss_fake(*args: Any) -> Tensor:
    call = _Call(*args)
    shape = call.prediction.shape[:1] if call.reduction == "none" else ()
    return call.prediction.new_empty(shape, dtype=stats_dtype(call.prediction))


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    loss = _loss_fake(*args[:-1])
    return loss, loss.new_empty(args[0].shape[:1] if args[-1] else 0)


_ARGUMENTS = (
    "Tensor prediction, Tensor? x0, Tensor? t, Tensor? table, Tensor? weight, Tensor? seeds, SymInt seed, "
    "str target, float? snr_gamma, float offset_noise, str reduction"
)
_noise_mse = register(
    f"noise_mse({_ARGUMENTS}) -> Tensor", _implementation, fake=_loss_fake, autograd=NoiseMseFunction.apply
)
_noise_mse_forward = register(
    f"noise_mse_forward({_ARGUMENTS}, bool need_weight) -> (Tensor, Tensor)", _forward, fake=_forward_fake
)
_noise_mse_backward = register(
    f"noise_mse_backward(Tensor dloss, {_ARGUMENTS}) -> Tensor",
    _backward,
    fake=lambda dloss, prediction, *args: new_like(prediction),
)
