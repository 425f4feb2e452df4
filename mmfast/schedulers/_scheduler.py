"""What DDPM and DDIM have in common: tables, timesteps, noising and the noise of a step."""

from __future__ import annotations

import copy
import numbers
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..noise_schedule import WORDS, NoiseSchedule
from ._config import ConfigObject

_SETTINGS = (
    *("prediction_type", "variance_type", "clip_sample", "clip_sample_range", "thresholding"),
    *("dynamic_thresholding_ratio", "sample_max_value", "timestep_spacing", "steps_offset"),
)


class Output:
    """What a scheduler's output, a named tuple, has besides: diffusers' ways to read it."""

    def __getitem__(self, key: Any) -> Any:
        return getattr(self, key) if isinstance(key, str) else super().__getitem__(key)  # type: ignore[misc]

    def keys(self) -> tuple[str, ...]:
        """The names of what is there."""
        return tuple(name for name in self._fields if getattr(self, name) is not None)  # type: ignore[attr-defined]

    def to_tuple(self) -> tuple[Any, ...]:
        """What is there, as a plain tuple."""
        return tuple(getattr(self, name) for name in self.keys())


class Scheduler(ConfigObject):
    """A schedule and the timesteps that sampling visits.

    The tables `betas`, `alphas` and `alphas_cumprod` are float32 on the CPU and stay there. `schedule` holds what the
    ops read: it moves to the device of the first samples that come, and again should they come from another.
    """

    order = 1
    init_noise_sigma = 1.0
    """The standard deviation of the noise that sampling starts from."""
    num_inference_steps: int | None

    def __init__(self) -> None:
        super().__init__()
        self.schedule = NoiseSchedule(**{word: self._config[word] for word in WORDS if word in self._config})
        self.betas = self.schedule.betas
        self.alphas = self.schedule.alphas
        self._alphas_cumprod = self.schedule.alphas_cumprod.clone()
        self._first = self.schedule.alpha_table[0, 0].clone()
        self.num_inference_steps = None
        self.timesteps = torch.arange(self.schedule.num_train_timesteps - 1, -1, -1)

    @property
    def alphas_cumprod(self) -> Tensor:
        """float32 (T,) on the CPU. Assign another to change the schedule; writing into it changes nothing."""
        return self._alphas_cumprod

    @alphas_cumprod.setter
    def alphas_cumprod(self, values: Tensor) -> None:
        self._retable(self._first, values)
        self._alphas_cumprod = values

    @property
    def timesteps(self) -> Tensor:
        """int64 (steps,), descending: what `step` is called with, one after the other."""
        return self._timesteps

    @timesteps.setter
    def timesteps(self, values: Tensor) -> None:
        self._visit(values, values.tolist())

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """Return the sample itself: the model's input needs no scaling here."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise samples to timesteps: `sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise`, by `mmfast.ops.q_sample`.

        Args:
            original_samples: x_0 (B, ...), floating.
            noise: (B, ...).
            timesteps: integers (B,), (1,) or () on any device.

        Returns:
            (B, ...) in the dtype that x_0 and the noise promote to. Coefficients are float32 until the end, where
            diffusers rounds them to x_0's dtype.
        """
        x0, noise, t = self._alike("add_noise", original_samples, noise, timesteps)
        return ops.q_sample(x0, t, self._schedule(x0), noise=noise)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The target of v-prediction, `sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0`, of `add_noise`'s arguments."""
        x0, noise, t = self._alike("get_velocity", sample, noise, timesteps)
        # The velocity is the noise, noised with -x_0.
        return ops.q_sample(noise, t, self._schedule(x0), noise=-x0)

    def __len__(self) -> int:
        return self.schedule.num_train_timesteps

    def _alike(self, what: str, x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The arguments in one dtype and shape, as PyTorch's arithmetic would promote them."""
        for name, value in (("samples", x0), ("noise", noise), ("timesteps", t)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{type(self).__name__}.{what}: {name} must be a tensor, got {type(value).__name__}")
        if t.device != x0.device and t.device.type != "cpu":
            t = t.to(x0.device)
        if x0.dtype != noise.dtype:
            dtype = torch.promote_types(x0.dtype, noise.dtype)
            x0, noise = x0.to(dtype), noise.to(dtype)
        if t.dim() != 1 or len(t) != len(x0) or x0.shape != noise.shape:
            t = t.reshape(-1)
            shape = torch.broadcast_shapes(x0.shape, noise.shape, (len(t), *(1,) * (x0.dim() - 1)))
            x0, noise, t = x0.expand(shape), noise.expand(shape), t.expand(shape[0])
        return x0, noise, t

    def _visit(self, values: Tensor, known: list[int]) -> None:
        self._timesteps = values
        self._known = known
        self._stamp = None if values.is_inference() else values._version

    def _schedule(self, x: Tensor) -> NoiseSchedule:
        """The schedule on x's device."""
        if x.is_meta:
            return copy.deepcopy(self.schedule).to(x.device)  # from there it would not come back
        if self.schedule.alpha_table.device != x.device:
            self.schedule.to(x.device)
        return self.schedule

    def _settings_changed(self) -> None:
        for word in _SETTINGS:
            if word in self._config:
                setattr(self.schedule, word, self._config[word])

    def _retable(self, first: Tensor, values: Tensor) -> None:
        """Read the schedule off the tables that were assigned; what was not changed keeps its low part."""
        given = torch.cat([z.detach().to("cpu", torch.float64) for z in (first.reshape(1), values)])
        high, low = self.schedule.alpha_table.detach().cpu().double().unbind(1)
        if given.shape != high.shape:
            shape, own = tuple(values.shape), (len(high) - 1,)
            raise ValueError(f"{type(self).__name__}: alphas_cumprod must have shape {own}, got {shape}")
        exact = torch.where(given == high, high + low, given)
        table = torch.stack((exact.float(), (exact - exact.float().double()).float()), 1)
        self.schedule.load_state_dict({"alpha_table": table})

    def _at(self, timestep: Any) -> Any:
        """A timestep as an int, where the host knows it without waiting for a GPU; else the tensor."""
        if isinstance(timestep, (numbers.Integral, torch.SymInt)) and not isinstance(timestep, bool):
            return timestep if isinstance(timestep, torch.SymInt) else int(timestep)
        if not isinstance(timestep, Tensor) or timestep.is_floating_point() or timestep.dtype == torch.bool:
            kind = timestep.dtype if isinstance(timestep, Tensor) else type(timestep).__name__
            raise TypeError(f"{type(self).__name__}: timestep must be an int or an integer tensor, got {kind}")
        if timestep.dim() or torch.compiler.is_compiling():
            return timestep
        if timestep.is_cpu:
            return timestep.item()
        place = self._place(timestep) if timestep.is_cuda else None
        return timestep if place is None else self._known[place]

    def _place(self, timestep: Tensor) -> int | None:
        """Which of `timesteps` this scalar is a view of: a loop over them tells the host where it is."""
        steps = self._timesteps
        if steps.device != timestep.device or steps.dtype != timestep.dtype or self._stamp is None:
            return None
        place = (timestep.storage_offset() - steps.storage_offset()) // max(steps.stride(0), 1)
        if not 0 <= place < len(steps) or not steps[place].is_set_to(timestep) or steps._version != self._stamp:
            return None
        return place

    def _noise(self, what: str, x: Tensor, dtype: torch.dtype, generator: Any, seed: Any) -> Tensor | None:
        """The numbers that diffusers draws for a step; None where the op is to make them."""
        if seed is not None:
            if generator is not None:
                raise ValueError(f"{what}: generator and seed are both given: it takes one of them")
            return None
        if generator is None:
            return torch.randn(x.shape, dtype=dtype) if x.is_cpu else None
        if not isinstance(generator, (list, tuple)):
            generator = [generator]
        if len(generator) not in (1, len(x)):
            raise ValueError(f"{what}: generator must be one or a list of {len(x)}, got {len(generator)}")
        rows = torch.Size((1, *x.shape[1:])) if len(generator) > 1 else x.shape
        drawn = []
        for one in generator:
            # Like diffusers: a generator on the CPU gives the same numbers for a GPU.
            device = one.device if one.device.type == "cpu" else x.device
            drawn.append(torch.randn(rows, generator=one, device=device, dtype=dtype))
        noise = drawn[0] if len(drawn) == 1 else torch.cat(drawn)
        return noise.to(x.device, non_blocking=True)
