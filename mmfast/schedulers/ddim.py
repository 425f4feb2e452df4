"""`DDIMScheduler`: diffusers' scheduler of that name, by `mmfast.ops.ddim_step`."""

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


class DDIMSchedulerOutput(Output, _Pair):
    """x_{t-1} and the predicted x_0, each (B, ...)."""


class DDIMScheduler(Scheduler):
    """Sampling without noise, or with `eta` of it, in place of `diffusers.DDIMScheduler`.

    It has the same arguments, config, methods and, from the same generator, the same results, and takes besides:
    a timestep for each sample, timesteps on a GPU without waiting for them, and `seed` for noise that does not depend
    on the batch. Coefficients are float32 whatever the samples' dtype. `pipeline.scheduler =
    mmfast.DDIMScheduler.from_config(pipeline.scheduler.config)` puts it into a pipeline.

    `schedule`, the `NoiseSchedule` that the ops read, moves to the device of the first samples that come.

    Args:
        num_train_timesteps: T, how many timesteps the model is trained with.
        beta_start: beta of the first timestep.
        beta_end: beta of the last.
        beta_schedule: "linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid" or "laplace".
        trained_betas: (T,) betas in place of all these.
        clip_sample: whether to clip the predicted x_0.
        set_alpha_to_one: alpha-bar before timestep 0 is 1; else that of timestep 0.
        steps_offset: what "leading" adds to each timestep.
        prediction_type: "epsilon", "sample" or "v_prediction".
        thresholding: whether to use dynamic thresholding in place of clipping.
        dynamic_thresholding_ratio: its quantile.
        clip_sample_range: what to clip to.
        sample_max_value: the largest threshold.
        timestep_spacing: "leading", "trailing" or "linspace".
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
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        super().__init__()

    @property
    def final_alpha_cumprod(self) -> Tensor:
        """float32 (): alpha-bar before timestep 0. Assign another to change the schedule."""
        return self._first

    @final_alpha_cumprod.setter
    def final_alpha_cumprod(self, value: Tensor) -> None:
        value = torch.as_tensor(value)
        self._retable(value, self._alphas_cumprod)
        self._first = value

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the timesteps that sampling visits.

        Args:
            num_inference_steps: how many, spaced as `timestep_spacing` says.
            device: where `timesteps` lies.

        Raises:
            ValueError: they are out of range.
        """
        steps = self.schedule.timesteps(num_inference_steps)
        self.num_inference_steps = num_inference_steps
        self._visit(steps.to(device), steps.tolist())

    def previous_timestep(self, timestep: int | Tensor) -> Any:
        """The timestep that a step from `timestep` goes to, -1 for the sample itself: an int, or a tensor like it.

        It is `T // num_inference_steps` before it, whatever the spacing.
        """
        if self.num_inference_steps is None:
            raise ValueError("DDIMScheduler: set_timesteps must be called before step")
        t, gap = self._at(timestep), len(self) // self.num_inference_steps
        if isinstance(t, int):
            return max(t - gap, -1)
        return (t.long() - gap).clamp(min=-1)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
        *,
        seed: int | Tensor | None = None,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """Step from x_t to the timestep before it.

        Args:
            model_output: (B, ...).
            timestep: from 0 to T - 1: an int, a tensor () or, for each sample its own, (B,), on the samples' device
                or the CPU. One on a GPU that is out of range gives NaN.
            sample: x_t (B, ...).
            eta: how much noise is added: 0 for none, 1 for as much as DDPM.
            use_clipped_model_output: go on from the noise that the clipped x_0 leaves, not from the predicted.
            generator: one, or a list of B: its noise is what diffusers would draw. Without, and without the next and
                `seed`, PyTorch's default generator makes it: the numbers that diffusers draws on a CPU, others on a
                GPU.
            variance_noise: (B, ...), the noise itself.
            return_dict: return a `DDIMSchedulerOutput`; else a tuple.
            seed: an int or int64 (B,), in place of a generator: see `mmfast.ops.ddim_step`.

        Returns:
            x_{t-1} and the predicted x_0, in the sample's dtype.

        Raises:
            TypeError, ValueError: as `mmfast.ops.ddim_step` does; also before `set_timesteps`.
        """
        t = self._at(timestep)
        previous = self.previous_timestep(t)
        noise = None
        if eta > 0:
            noise = variance_noise
            if noise is None:
                noise = self._noise("DDIMScheduler.step", sample, model_output.dtype, generator, seed)
            elif generator is not None or seed is not None:
                raise ValueError(
                    "DDIMScheduler.step: variance_noise is given: it takes the place of generator and seed"
                )
        else:
            seed = None
        x, x0 = ops.ddim_step(
            model_output,
            t,
            previous,
            sample,
            self._schedule(sample),
            eta=eta,
            use_clipped_model_output=use_clipped_model_output,
            noise=noise,
            seed=seed,
            return_x0=True,
        )
        return DDIMSchedulerOutput(x, x0) if return_dict else (x, x0)
