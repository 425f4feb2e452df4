"""What `ddpm_step` and `ddim_step` have in common before any arithmetic: the checks of a call and what it asks for."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..noise_schedule import PREDICTION_TYPES, VARIANCE_TYPES, NoiseSchedule
from . import _noise
from ._noise import INTEGERS, check_noise, check_schedule, check_seed, check_timesteps, memory_format, new_like
from ._register import stats_dtype
from ._validate import check_input, check_tensor

SCHEMA = (
    "Tensor model_output, Tensor t, Tensor t_prev, Tensor x, Tensor table, Tensor? noise, Tensor? seeds, SymInt seed, "
    "str prediction, float? guidance, float clip, bool noisy, bool return_x0, bool duplicate"
)
"""The types of `Inputs`."""

LEARNED = ("learned", "learned_range")
"""Variance types that the model predicts in the second half of its channels."""


class Inputs(NamedTuple):
    """The arguments that the registered ops of both steps begin with."""

    model_output: Tensor
    t: Tensor  # (B,) integer, on the samples' device
    t_prev: Tensor  # (B,) integer
    x: Tensor
    table: Tensor  # a schedule's alpha_table
    noise: Tensor | None
    seeds: Tensor | None  # (B,)
    seed: int  # instead of seeds
    prediction: str
    guidance: float | None
    clip: float  # the range of x_0, 0 for none
    noisy: bool  # whether noise is added
    return_x0: bool
    duplicate: bool


class Step(NamedTuple):
    """A checked call."""

    inputs: Inputs
    at: tuple[int, int] | None  # t and t_prev, where they are one number each that the host knows
    drawn: bool  # the noise to be added is neither given nor seeded
    threshold: tuple[float, float] | None  # ratio and largest value of dynamic thresholding


def check_step(
    op: str,
    model_output: Any,
    t: Any,
    t_prev: Any,
    x: Tensor,
    schedule: NoiseSchedule,
    *,
    guidance: Any,
    noise: Any,
    seed: Any,
    prediction_type: str | None,
    clip_sample: Any,
    return_x0: bool,
    duplicate: bool,
    noisy: bool = True,
    learned: bool = False,
) -> Step:
    """Raise unless the arguments fit, and return what the call asks for.

    `noisy`: the step may add noise, and so goes from a later timestep to an earlier one. `learned`: the model's output
    has the variance in its second half of channels.
    """
    check_input(op, "x", x)
    check_schedule(op, schedule, x)
    if guidance is not None:
        check_number(op, "guidance", guidance)
        guidance = float(guidance)
    _check_model_output(op, model_output, x, guidance is not None, learned)
    prediction = schedule.prediction_type if prediction_type is None else prediction_type
    if prediction not in PREDICTION_TYPES:
        raise ValueError(f"{op}: prediction_type must be one of {', '.join(PREDICTION_TYPES)}, got {prediction!r}")
    t, t_prev = _known(t, x), _known(t_prev, x)
    steps = check_timesteps(op, "t", t, x, schedule)
    previous = check_timesteps(op, "t_prev", t_prev, x, schedule, lowest=-1)
    at = (t, t_prev) if isinstance(t, int) and isinstance(t_prev, int) else None
    if at is not None and noisy and at[1] >= at[0]:
        raise ValueError(f"{op}: t_prev must be before t, got t={at[0]} and t_prev={at[1]}")
    if schedule.zero_terminal_snr and prediction == "epsilon":
        _check_signal(op, t, schedule)
    seeds, number = None, 0
    if noise is not None:
        check_noise(op, noise, x)
        if seed is not None:
            raise ValueError(f"{op}: noise and seed are both given: it takes one of them")
    elif seed is not None:
        seeds, number = check_seed(op, seed, x)
    if op == "ddpm_step" and at is not None and at[0] == 0:  # adds nothing, but a gradient has to come to its zeros
        noisy = isinstance(noise, Tensor) and noise.requires_grad
    inputs = Inputs(
        *(model_output, steps, previous, x, schedule.alpha_table, noise if noisy else None, seeds, number),
        *(prediction, guidance, _clip(op, clip_sample, schedule), noisy, bool(return_x0), bool(duplicate)),
    )
    threshold = (schedule.dynamic_thresholding_ratio, schedule.sample_max_value) if schedule.thresholding else None
    return Step(inputs, at, noisy and noise is None and seed is None, threshold)


def check_number(op: str, name: str, value: object, lowest: float = -math.inf) -> None:
    """Raise unless `value` is a finite number, at least `lowest`."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{op}: {name} must be finite, got {value}")
    if value < lowest:
        raise ValueError(f"{op}: {name} must be at least {lowest}, got {value}")


def variance_kind(op: str, variance_type: str | None, schedule: NoiseSchedule) -> str:
    """The variance type that a call asks for, the logarithmic ones under the name of what they compute."""
    kind = getattr(schedule, "variance_type", None) if variance_type is None else variance_type
    if kind not in VARIANCE_TYPES and isinstance(schedule, NoiseSchedule):
        raise ValueError(f"{op}: variance_type must be one of {', '.join(VARIANCE_TYPES)}, got {kind!r}")
    return str(kind).removesuffix("_log")


def facts(x: Tensor, threshold: tuple[float, float] | None = None) -> backends.Facts:
    """What the choice of a backend looks at."""
    return _noise.facts(x, None if threshold is None else "dynamic thresholding")


def draw(x: Tensor) -> Tensor:
    """New noise from PyTorch's generator, for the torch backend."""
    return torch.randn_like(x, dtype=stats_dtype(x), memory_format=memory_format(x))


def step_fake(*args: Any) -> tuple[Tensor, Tensor]:
    """Empty results: x_prev, twice over if it is duplicated, and x_0 or nothing."""
    inputs = Inputs(*args[:14])
    x = inputs.x
    shape = (2 * x.shape[0], *x.shape[1:]) if inputs.duplicate else x.shape
    return new_like(x, shape), new_like(x) if inputs.return_x0 else x.new_empty(0)


def step_bytes(
    x: Tensor,
    model_output: Tensor,
    *,
    noise: bool,
    return_x0: bool,
    duplicate: bool,
    needs_values: bool,
    backward: bool,
) -> int:
    """Bytes that a step or its gradient moves: each tensor once; `needs_values` says that the gradient reads inputs."""
    size = x.numel() * x.element_size()
    outputs = (1 + duplicate + return_x0) * size
    inputs = size + model_output.numel() * model_output.element_size()
    if backward:  # reads the gradients of the outputs and writes those of the inputs
        return outputs + inputs + (inputs if needs_values else 0)
    return inputs + outputs + (size if noise else 0)


def _check_model_output(op: str, model_output: object, x: Tensor, guided: bool, learned: bool) -> None:
    check_tensor(op, "model_output", model_output)
    shape = list(x.shape)
    shape[0] *= 1 + guided
    reasons = ["cat([unconditional, conditional]) for guidance"] if guided else []
    if learned:
        if x.dim() < 2:
            raise ValueError(f"{op}: a learned variance needs channels: x must have at least 2 dimensions, got 1")
        shape[1] *= 2
        reasons.append("with the variance in the second half of its channels")
    if list(model_output.shape) != shape:  # type: ignore[attr-defined]
        why = f", {' and '.join(reasons)}" if reasons else ""
        raise ValueError(f"{op}: model_output must have shape {tuple(shape)}{why}, got {tuple(model_output.shape)}")  # type: ignore[attr-defined]
    if model_output.device != x.device:  # type: ignore[attr-defined]
        raise ValueError(f"{op}: model_output must be on {x.device} like x, got {model_output.device}")  # type: ignore[attr-defined]


def _known(t: object, x: Tensor) -> object:
    """Timesteps on the CPU that are all the same as an int: then nothing is gathered, or copied to a GPU."""
    if type(t) is not Tensor or t.device.type != "cpu" or t.dtype not in INTEGERS:
        return t
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return t
    if t.dim() == 0:
        return t.item()
    values = t.tolist() if t.shape == x.shape[:1] else []
    return values[0] if values and values.count(values[0]) == len(values) else t


def _check_signal(op: str, t: object, schedule: NoiseSchedule) -> None:
    """Raise where alpha-bar is 0, or may be: the noise of a sample that is noise alone says nothing of x_0."""
    last = schedule.num_train_timesteps - 1
    if isinstance(t, Tensor):
        if t.device.type == "cpu" and not torch.compiler.is_compiling():
            if not bool((t == last).any()):
                return
            where = f"at t={last}"
        else:
            where = f"at t={last}, and t on {t.device} cannot be looked at without waiting for it"
    elif t != last:
        return
    else:
        where = f"at t={last}"
    raise ValueError(
        f"{op}: prediction_type 'epsilon' says nothing where the schedule's signal-to-noise ratio is zero ({where}); "
        "use 'v_prediction' or 'sample'"
    )


def _clip(op: str, clip_sample: object, schedule: NoiseSchedule) -> float:
    """The range that x_0 is clipped to, or 0."""
    if schedule.thresholding:  # in the place of clipping
        return 0.0
    if clip_sample is None:
        clip_sample = schedule.clip_sample
    if isinstance(clip_sample, bool):
        return float(schedule.clip_sample_range) if clip_sample else 0.0
    if not isinstance(clip_sample, (int, float)):
        raise TypeError(f"{op}: clip_sample must be None, a bool or a number, got {type(clip_sample).__name__}")
    if not 0.0 < clip_sample < math.inf:
        raise ValueError(f"{op}: clip_sample must be positive and finite, got {clip_sample}")
    return float(clip_sample)
