"""`GaussianDiffusion`: training and sampling of a denoising diffusion model, around any network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..noise_schedule import NoiseSchedule
from ..ops._noise import per_sample
from ._diffusion_graphs import LoopGraphs
from ._diffusion_loop import Options, denoise, dtype_of, empty_like_weights, evaluating
from ._diffusion_training import kept_loss, left_out, seeds_of, timesteps_of

__all__ = ["GaussianDiffusion"]

REDUCTIONS = ("mean", "sum", "none")
# Where noise comes from PyTorch's generator and is kept for the loss: on a CPU, to make it twice takes longer.
STORED = ("cpu",)


class GaussianDiffusion(nn.Module):
    """Trains a network to denoise, and samples with it.

        diffusion = GaussianDiffusion(unet, image_shape=(3, 64, 64))
        loss = diffusion(images)            # images (B, 3, 64, 64) from -1 to 1
        images = diffusion.sample(16)

    With a condition, a class for instance:

        diffusion = GaussianDiffusion(unet, image_shape=(3, 64, 64), null_condition=10)
        loss = diffusion(images, labels)    # one label in ten becomes 10, "no class"
        images = diffusion.sample(4, condition=torch.tensor([0, 1, 2, 3]), guidance=2.0)

    The network is called as `model(x, t)` or `model(x, t, condition)` with x (B, *image_shape) and t int64 (B,), and
    returns what the schedule's `prediction_type` says in x's shape: a tensor, an object with `.sample` (diffusers'
    U-Nets) or a tuple that begins with it. Noise is never stored on a GPU: it is made again from a seed of each
    sample.

    Args:
        model: the network.
        schedule: how much noise there is at each timestep, what the network predicts and how sampling clips; by
            default `NoiseSchedule()`. It moves with this module, and its tables stay in float32.
        image_shape: of one sample, of any rank: (C, H, W) of images.
        condition_name: the network's keyword for the condition, such as "class_labels"; None: the third argument.
        null_condition: what says "no condition": an int for conditions that are labels, a tensor of one sample's
            condition else. It is what the network gets where no condition is given; guidance needs it.
        condition_dropout: in training, the share of samples whose condition becomes `null_condition`.
        snr_gamma: min-SNR weights of the loss (see `ops.noise_mse`); None for none.
        offset_noise: of the training noise (see `ops.noise_like`).

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range.

    Source: Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", arXiv:2006.11239; classifier-free guidance of
    Ho and Salimans, arXiv:2207.12598.
    """

    null_condition: Tensor | int | None

    def __init__(
        self,
        model: nn.Module,
        schedule: NoiseSchedule | None = None,
        *,
        image_shape: Sequence[int],
        condition_name: str | None = None,
        null_condition: Tensor | int | None = None,
        condition_dropout: float = 0.1,
        snr_gamma: float | None = None,
        offset_noise: float = 0.0,
    ) -> None:
        super().__init__()
        schedule = NoiseSchedule() if schedule is None else schedule
        if not callable(model):
            raise TypeError(f"GaussianDiffusion: model must be callable, got {type(model).__name__}")
        if not isinstance(schedule, NoiseSchedule):
            hint = "; of a diffusers scheduler make one by NoiseSchedule.from_diffusers"
            raise TypeError(f"GaussianDiffusion: schedule must be a NoiseSchedule, got {type(schedule).__name__}{hint}")
        if not isinstance(image_shape, Sequence) or not all(type(size) is int and size > 0 for size in image_shape):
            raise ValueError(f"GaussianDiffusion: image_shape must be positive ints, got {image_shape!r}")
        if isinstance(null_condition, bool) or not isinstance(null_condition, (Tensor, int, type(None))):
            kind = type(null_condition).__name__
            raise TypeError(f"GaussianDiffusion: null_condition must be a tensor, an int or None, got {kind}")
        if not 0.0 <= condition_dropout <= 1.0:
            raise ValueError(f"GaussianDiffusion: condition_dropout must be from 0 to 1, got {condition_dropout}")
        if snr_gamma is not None and not snr_gamma > 0.0:
            raise ValueError(f"GaussianDiffusion: snr_gamma must be positive, got {snr_gamma}")
        self.model = model
        self.schedule = schedule
        self.image_shape = tuple(image_shape)
        self.condition_name = condition_name
        if isinstance(null_condition, Tensor):
            self.register_buffer("null_condition", null_condition.detach().clone(), persistent=False)
        else:
            self.null_condition = null_condition
        self.condition_dropout = condition_dropout
        self.snr_gamma = snr_gamma
        self.offset_noise = offset_noise
        self._graphs = LoopGraphs()

    def forward(
        self,
        images: Tensor,
        condition: Tensor | int | None = None,
        *,
        t: Tensor | int | None = None,
        seed: Tensor | int | None = None,
        weight: Tensor | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """Return the training loss: noise images to random timesteps, and compare the prediction with its target.

        Args:
            images: (B, *image_shape), floating, usually from -1 to 1.
            condition: (B, ...), or an int for one label for all.
            t: timesteps, an int or an integer tensor () or (B,); by default drawn uniformly.
            seed: an int, or int64 (B,) of one seed a sample, which decides noise, timesteps and dropout of the
                condition, on any device alike; by default all are new, from PyTorch's generator.
            weight: float32 (B,), multiplies each sample's squares.
            reduction: "mean", "sum", or "none" for the mean of each sample (B,).

        Raises:
            TypeError: an argument is of the wrong type or dtype.
            ValueError: a shape or a timestep does not fit, or the schedule's variance is learned.
        """
        op, schedule, prediction_type = "GaussianDiffusion", self.schedule, self.schedule.prediction_type
        self._check_images("images", images)
        if schedule.variance_type.startswith("learned"):
            raise ValueError(f"{op}: training needs a fixed variance_type, got {schedule.variance_type!r}")
        if reduction not in REDUCTIONS:
            raise ValueError(f"{op}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
        n, device = len(images), images.device
        stored = device.type in STORED
        seeds = None if stored and seed is None else seeds_of(seed, n, device)
        given = None if seed is None else seeds
        if t is None:
            t = timesteps_of(given, n, schedule.num_train_timesteps, device)
        condition = self._condition(condition, n, device)
        if condition is not None and self.training and self.condition_dropout and self.null_condition is not None:
            dropped = left_out(given, n, self.condition_dropout, device)
            condition = torch.where(per_sample(dropped, condition), self._null(condition), condition)
        options: dict[str, Any] = {"seed": seeds, "offset_noise": self.offset_noise}
        if stored:
            noised, target = ops.q_sample(images, t, schedule, target=prediction_type, **options)
        else:
            noised = ops.q_sample(images, t, schedule, **options)
        steps = schedule._index[t + 1] if isinstance(t, int) else t.to(device, torch.int64, non_blocking=True)
        steps = steps.expand(n)
        prediction = self._predict(noised.to(dtype_of(self.model)), steps, condition)
        if prediction.shape != images.shape:
            found = tuple(prediction.shape)
            raise ValueError(f"{op}: the network's output must have shape {tuple(images.shape)}, got {found}")
        if stored:
            return kept_loss(prediction, target, steps, schedule, weight, self.snr_gamma, reduction)
        return ops.noise_mse(
            prediction,
            target=prediction_type,
            x0=images,
            t=steps,
            schedule=schedule,
            weight=weight,
            snr_gamma=self.snr_gamma,
            reduction=reduction,
            **options,
        )

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        condition: Tensor | int | None = None,
        steps: int = 25,
        sampler: str = "ddim",
        eta: float = 0.0,
        guidance: float | None = None,
        seed: Tensor | int | None = None,
        return_all: bool = False,
        batch_size: int | None = None,
        cuda_graph: bool | None = None,
    ) -> Any:
        """Make n samples from noise.

        A sample depends on its seed and condition, not on the batch it is made in, as far as the network's does not:
        the first of eight are the same as the first of three, and `batch_size` changes nothing.

        Args:
            n: how many.
            condition: (n, ...), or an int for one label for all.
            steps: how many of the schedule's timesteps are visited, spaced as the schedule says.
            sampler: "ddim" or "ddpm". DDIM derives the noise again from the clipped x_0, without which strong guidance
                spoils the samples.
            eta: how much noise DDIM adds in each step: 0 for none, 1 for as much as DDPM.
            guidance: strength of classifier-free guidance, for which the network sees each sample twice; None or 1
                for the condition alone.
            seed: an int, or int64 (n,) of one seed a sample; by default new ones from PyTorch's generator.
            return_all: return what the loop went through.
            batch_size: how many to make at a time; by default all.
            cuda_graph: on a GPU, whether the whole loop runs as one CUDA graph (`mmfast.cuda_graph`): True, False, or
                None to capture it when it is asked for a second time with the same options and shapes. Weights may
                change in place; seeds and conditions are always those of the call. A network that waits for results on
                the host cannot be captured: an error for True, a warning for None.

        Returns:
            (n, *image_shape) in the network's dtype, in the range of the training images: x_0 is clipped in every step
            where the schedule says so, and nothing else is done to it. With `return_all` a pair
            (steps + 1, n, *image_shape): x_t from noise to the sample, and the x_0 predicted at each, the last the
            sample itself.

        Raises:
            TypeError: an argument is of the wrong type.
            ValueError: an argument is out of range or does not fit.
        """
        _check_count("n", n, 0)
        options = Options(steps, None, sampler, eta, guidance, return_all)
        return self._run(None, n, condition, seed, options, batch_size, cuda_graph)

    @torch.no_grad()
    def denoise(
        self,
        x: Tensor,
        t: int,
        *,
        condition: Tensor | int | None = None,
        steps: int = 25,
        sampler: str = "ddim",
        eta: float = 0.0,
        guidance: float | None = None,
        seed: Tensor | int | None = None,
        return_all: bool = False,
        batch_size: int | None = None,
        cuda_graph: bool | None = None,
    ) -> Any:
        """Take samples x (B, *image_shape) at timestep t to x_0: `sample`, begun in the middle.

        After t come those of the schedule's `steps` timesteps that are before it. The other arguments and the result
        are those of `sample`; with `return_all`, as many entries as there are steps left, and one.
        """
        self._check_images("x", x)
        if not isinstance(t, int) or isinstance(t, bool):
            raise TypeError(f"GaussianDiffusion: t must be an int, got {type(t).__name__}")
        last = self.schedule.num_train_timesteps - 1
        if not 0 <= t <= last:
            raise ValueError(f"GaussianDiffusion: t must be from 0 to {last}, got {t}")
        x = x.detach().to(dtype_of(self.model))
        options = Options(steps, t, sampler, eta, guidance, return_all)
        return self._run(x, len(x), condition, seed, options, batch_size, cuda_graph)

    @torch.no_grad()
    def interpolate(
        self,
        x1: Tensor,
        x2: Tensor,
        t: int | None = None,
        weight: float | Sequence[float] | Tensor = 0.5,
        *,
        condition: Tensor | int | None = None,
        steps: int = 25,
        sampler: str = "ddim",
        eta: float = 0.0,
        guidance: float | None = None,
        seed: Tensor | int | None = None,
        batch_size: int | None = None,
        cuda_graph: bool | None = None,
    ) -> Tensor:
        """Mix images through their noised states: both are noised to t with the same noise, mixed and denoised.

        Args:
            x1: (B, *image_shape).
            x2: likewise.
            t: the timestep to mix at; the later, the less the result keeps of both. By default the middle one.
            weight: of x2, from 0 to 1; several make a row of mixes.
            condition: of the mixes, (B, ...) or an int.
            seed: one a pair: the mixes of a row share their noise.

        The other arguments are those of `sample`.

        Returns:
            (B, *image_shape), or (W, B, *image_shape) for W weights.
        """
        self._check_images("x1", x1)
        self._check_images("x2", x2)
        if x1.shape != x2.shape:
            raise ValueError(
                f"GaussianDiffusion: x1 and x2 must have one shape, got {tuple(x1.shape)}, {tuple(x2.shape)}"
            )
        t = self.schedule.num_train_timesteps // 2 if t is None else t
        n, row = len(x1), not isinstance(weight, (int, float))
        weights = torch.as_tensor(weight, dtype=torch.float32).to(x1.device).flatten()
        count = len(weights)
        seeds = seeds_of(seed, n, x1.device).repeat(count)
        if isinstance(condition, Tensor):
            condition = condition.repeat(count, *(1,) * (condition.dim() - 1))
        # Noising is linear and both would get the same noise, so the mix of the noised is the noised mix.
        mixes = torch.lerp(x1.float(), x2.float(), weights.view(-1, *(1,) * x1.dim())).flatten(0, 1)
        made: Tensor = self.denoise(
            *(self.q_sample(mixes, t, seed=seeds), t),
            condition=condition,
            steps=steps,
            sampler=sampler,
            eta=eta,
            guidance=guidance,
            seed=seeds,
            batch_size=batch_size,
            cuda_graph=cuda_graph,
        )
        return made.unflatten(0, (count, n)) if row else made

    def q_sample(self, images: Tensor, t: Tensor | int, *, seed: Tensor | int | None = None) -> Tensor:
        """Noise images (B, *image_shape) to timesteps t: an int, or an integer tensor (B,). See `ops.q_sample`."""
        self._check_images("images", images)
        seeds = None if seed is None else seeds_of(seed, len(images), images.device)
        noised: Tensor = ops.q_sample(images, t, self.schedule, seed=seeds)
        return noised

    def release_graphs(self) -> None:
        """Give the memory of the CUDA graphs of sampling back."""
        self._graphs.release()

    def _run(
        self,
        x: Tensor | None,
        n: int,
        condition: Tensor | int | None,
        seed: Tensor | int | None,
        options: Options,
        batch_size: int | None,
        cuda_graph: bool | None,
    ) -> Any:
        """Sample, `batch_size` at a time."""
        if batch_size is not None:
            _check_count("batch_size", batch_size, 1)
        options = options.checked(self.schedule)
        if options.guidance is not None and (self.null_condition is None or condition is None):
            missing = "null_condition" if self.null_condition is None else "condition"
            raise ValueError(f"GaussianDiffusion: guidance needs a {missing}, and there is none")
        device = self.schedule.alpha_table.device if x is None else x.device
        tensors = x, seeds_of(seed, n, device), self._condition(condition, n, device)
        size, made = batch_size or max(1, n), []
        with evaluating(self):
            for start in range(0, max(1, n), size):
                parts = (None if y is None else y[start : start + size] for y in tensors)
                made.append(self._graphs(self, self._loop, *parts, *options, wanted=cuda_graph))
        if len(made) == 1:
            return made[0]
        return (
            tuple(torch.cat(parts, 1) for parts in zip(*made, strict=True)) if options.return_all else torch.cat(made)
        )

    def _loop(self, x: Tensor | None, seeds: Tensor, condition: Tensor | None, *options: Any) -> Any:
        """What a CUDA graph may hold: begin with x, or with noise from the seeds."""
        chosen = Options(*options)
        if x is None:
            x = ops.noise_like(empty_like_weights(self.model, (len(seeds), *self.image_shape), seeds.device), seeds)
        if chosen.guidance is not None and condition is not None:
            condition = torch.cat((self._null(condition), condition))
        return denoise(self._predict, self.schedule, x, seeds, condition, chosen)

    def _predict(self, x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        if condition is None:
            output = self.model(x, t)
        elif self.condition_name is None:
            output = self.model(x, t, condition)
        else:
            output = self.model(x, t, **{self.condition_name: condition})
        if not isinstance(output, Tensor):
            output = output[0] if isinstance(output, (tuple, list)) else output.sample
        return output

    def _condition(self, condition: Tensor | int | None, n: int, device: torch.device) -> Tensor | None:
        """The condition as a tensor (n, ...) on the device, or None where the network takes none."""
        condition = self.null_condition if condition is None else condition
        if condition is None:
            return None
        if condition is self.null_condition and isinstance(condition, Tensor):
            return condition.to(device).expand(n, *condition.shape)
        if isinstance(condition, int) and not isinstance(condition, bool):
            return torch.full((n,), condition, device=device)
        if not isinstance(condition, Tensor):
            kind = type(condition).__name__
            raise TypeError(f"GaussianDiffusion: condition must be a tensor, an int or None, got {kind}")
        if condition.dim() == 0 or len(condition) != n:
            raise ValueError(f"GaussianDiffusion: condition must have shape ({n}, ...), got {tuple(condition.shape)}")
        null = self.null_condition
        if isinstance(null, Tensor) and null.shape != condition.shape[1:]:
            raise ValueError(
                f"GaussianDiffusion: condition must have shape {(n, *null.shape)} as null_condition says, "
                f"got {tuple(condition.shape)}"
            )
        return condition.to(device, non_blocking=True)

    def _null(self, condition: Tensor) -> Tensor:
        """The null condition of as many samples."""
        if isinstance(self.null_condition, Tensor):
            return self.null_condition.to(condition.dtype).expand_as(condition)
        return torch.full_like(condition, self.null_condition)  # type: ignore[arg-type]

    def _check_images(self, name: str, images: object) -> None:
        if not isinstance(images, Tensor):
            raise TypeError(f"GaussianDiffusion: {name} must be a tensor, got {type(images).__name__}")
        if images.shape[1:] != self.image_shape or images.dim() != len(self.image_shape) + 1:
            wanted = ", ".join(map(str, ("B", *self.image_shape)))
            raise ValueError(f"GaussianDiffusion: {name} must have shape ({wanted}), got {tuple(images.shape)}")
        if not images.is_floating_point():
            raise TypeError(f"GaussianDiffusion: {name} must be floating, from -1 to 1, got {images.dtype}")

    def _apply(self, fn: Any, recurse: bool = True) -> GaussianDiffusion:
        """Move or cast; graphs hold the addresses that were."""
        self._graphs.release()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles begin without graphs."""
        return {**self.__dict__, "_graphs": LoopGraphs()}

    def extra_repr(self) -> str:
        """The settings that are not the schedule's or the network's."""
        shown = [f"image_shape={self.image_shape}"]
        if self.null_condition is not None:
            null = self.null_condition
            name = f"tensor{tuple(null.shape)}" if isinstance(null, Tensor) else str(null)
            shown.append(f"null_condition={name}, condition_dropout={self.condition_dropout}")
        if self.snr_gamma is not None:
            shown.append(f"snr_gamma={self.snr_gamma}")
        if self.offset_noise:
            shown.append(f"offset_noise={self.offset_noise}")
        return ", ".join(shown)


def _check_count(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"GaussianDiffusion: {name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"GaussianDiffusion: {name} must be at least {least}, got {value}")
