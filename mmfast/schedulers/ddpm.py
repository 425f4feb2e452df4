"""`DDPMScheduler`: diffusers' scheduler of that name, by `mmfast.ops.ddpm_step`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ._config import registers_config
from ._scheduler import Output, Scheduler


class _Pair(NamedTuple):
    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class DDPMSchedulerOutput(Output, _Pair):
    """x_{t-1} and the predicted x_0, each (B, ...)."""


class DDPMScheduler(Scheduler):
    """Sampling by the reverse Markov chain, in place of `diffusers.DDPMScheduler`.

    It has the same arguments, config, methods and, from the same generator, the same results, and takes besides:
    a timestep for each sample, timesteps on a GPU without waiting for them, and `seed` for noise that does not depend
    on the batch. Coefficients are float32 whatever the samples' dtype. `pipeline.scheduler =
    mmfast.DDPMScheduler.from_config(pipeline.scheduler.config)` puts it into a pipeline.

    `schedule`, the `NoiseSchedule` that the ops read, moves to the device of the first samples that come.

    Args:
        num_train_timesteps: T, how many timesteps the model is trained with.
        beta_start: beta of the first timestep.
        beta_end: beta of the last.
        beta_schedule: "linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid" or "laplace".
        trained_betas: (T,) betas in place of all these.
        variance_type: "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned" or
            "learned_range". ("fixed_large_log" is the same as "fixed_large"; in diffusers it gives NaN.)
        clip_sample: whether to clip the predicted x_0.
        prediction_type: "epsilon", "sample" or "v_prediction".
        thresholding: whether to use dynamic thresholding in place of clipping.
        dynamic_thresholding_ratio: its quantile.
        clip_sample_range: what to clip to.
        sample_max_value: the largest threshold.
        timestep_spacing: "leading", "trailing" or "linspace".
        steps_offset: what "leading" adds to each timestep.
        rescale_betas_zero_snr: shift the schedule so that the last alpha-bar is 0.

    Raises:
        TypeError, ValueError: as `NoiseSchedule` does.
    """

    @registers_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | Tensor | None = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        super().__init__()
        self.variance_type = variance_type
        self.one = self._first
        self.custom_timesteps = False

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the timesteps that sampling visits.

        Args:
            num_inference_steps: how many, spaced as `timestep_spacing` says.
            device: where `timesteps` lies.
            timesteps: or these, descending.

        Raises:
            ValueError: both or neither are given, or they are out of range or order.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("DDPMScheduler.set_timesteps: give one of num_inference_steps and timesteps")
        if num_inference_steps is not None:
            steps = self.schedule.timesteps(num_inference_steps)
            self.num_inference_steps = num_inference_steps
        else:
            steps = self._custom(timesteps)
        self.custom_timesteps = timesteps is not None
        self._visit(steps.to(device), steps.tolist())

    def previous_timestep(self, timestep: int | Tensor) -> Any:
        """The timestep that a step from `timestep` goes to, -1 for the sample itself: an int, or a tensor like it."""
        t = self._at(timestep)
        if not (self.custom_timesteps or self.num_inference_steps):
            return t - 1
        if isinstance(t, int):
            if t not in self._follows:
                raise ValueError(f"DDPMScheduler: timestep must be one of the timesteps, got {t}")
            return self._follows[t]
        return self._look_up(t)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        *,
        seed: int | Tensor | None = None,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """Step from x_t to the timestep before it.

        Args:
            model_output: (B, C, ...), or (B, 2C, ...) with a learned variance.
            timestep: one of `timesteps`: an int, a tensor () or, for each sample its own, (B,), on the samples'
                device or the CPU. One on a GPU that is none of `timesteps` gives NaN.
            sample: x_t (B, C, ...).
            generator: one, or a list of B: its noise is what diffusers would draw. Without, and without `seed`,
                PyTorch's default generator makes it: the numbers that diffusers draws on a CPU, others on a GPU.
            return_dict: return a `DDPMSchedulerOutput`; else a tuple.
            seed: an int or int64 (B,), in place of a generator: see `mmfast.ops.ddpm_step`.

        Returns:
            x_{t-1} and the predicted x_0, in the sample's dtype.

        Raises:
            TypeError, ValueError: as `mmfast.ops.ddpm_step` does; also a timestep on the CPU that is not visited.
        """
        t = self._at(timestep)
        previous = self.previous_timestep(t)
        noise = None
        if isinstance(t, int) and t <= 0:
            seed = 0 if seed is None else seed  # nothing is added: draw nothing
        else:
            noise = self._noise("DDPMScheduler.step", sample, model_output.dtype, generator, seed)
        x, x0 = ops.ddpm_step(
            model_output,
            t,
            previous,
            sample,
            self._schedule(sample),
            noise=noise,
            seed=seed,
            variance_type=self.variance_type,
            return_x0=True,
        )
        return DDPMSchedulerOutput(x, x0) if return_dict else (x, x0)

    def _custom(self, timesteps: Sequence[int] | None) -> Tensor:
        steps = torch.as_tensor(timesteps, dtype=torch.int64, device="cpu")
        last = len(self) - 1
        if steps.dim() != 1 or not len(steps) or bool((steps[1:] >= steps[:-1]).any()):
            raise ValueError(f"DDPMScheduler.set_timesteps: timesteps must be descending, got {timesteps}")
        if not 0 <= steps[-1] <= steps[0] <= last:
            raise ValueError(f"DDPMScheduler.set_timesteps: timesteps must be from 0 to {last}, got {timesteps}")
        return steps

    def _visit(self, values: Tensor, known: list[int]) -> None:
        super()._visit(values, known)
        following = [*known[1:], -1]
        self._follows = dict(zip(reversed(known), reversed(following), strict=True))
        self._table: Tensor | None = None  # made when it is needed

    def _look_up(self, t: Tensor) -> Tensor:
        """The timesteps after t on t's device; out of range where t is none of the timesteps."""
        total = len(self)
        if self._table is None or self._table.device != t.device:
            table = [self._follows.get(i, total) for i in range(total)]
            self._table = torch.tensor(table, device=t.device)
        following = self._table.take(t.long().clamp(0, total - 1))  # a () index would be read on the host
        if t.is_cpu and not torch.compiler.is_compiling() and bool((following == total).any()):
            raise ValueError(f"DDPMScheduler: timestep must be some of the timesteps, got {t.tolist()}")
        return following
