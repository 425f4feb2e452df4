"""The sampling loop of `GaussianDiffusion`: from noise to samples, without a look at any value on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from .._layouts import memory_format
from ..noise_schedule import NoiseSchedule

SAMPLERS = ("ddim", "ddpm")


class Options(NamedTuple):
    """How to sample."""

    steps: int
    start: int | None  # the first timestep, where that is not the schedule's choice
    sampler: str
    eta: float
    guidance: float | None
    return_all: bool

    def checked(self, schedule: NoiseSchedule) -> Options:
        """The same in the types that they stand for. Raises ValueError for what cannot be."""
        if self.sampler not in SAMPLERS:
            raise ValueError(f"GaussianDiffusion: sampler must be one of {', '.join(SAMPLERS)}, got {self.sampler!r}")
        if self.sampler == "ddpm" and self.eta:
            raise ValueError(f"GaussianDiffusion: eta is DDIM's, got eta={self.eta} with sampler 'ddpm'")
        self.visited(schedule)
        guidance = None if self.guidance == 1.0 else self.guidance  # 1 is the conditional prediction alone
        return self._replace(eta=float(self.eta), guidance=guidance, return_all=bool(self.return_all))

    def visited(self, schedule: NoiseSchedule) -> list[int]:
        """The timesteps, from the noisiest."""
        found: list[int] = schedule.timesteps(self.steps).tolist()
        return found if self.start is None else [self.start, *(t for t in found if t < self.start)]


def denoise(
    predict: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    schedule: NoiseSchedule,
    x: Tensor,
    seeds: Tensor,
    condition: Tensor | None,
    options: Options,
) -> Any:
    """Take x (n, ...) to samples; with `return_all` return all states and all predictions of x_0.

    With guidance, the condition is `cat([null, condition])` (2n, ...).
    """
    n, guided = len(x), options.guidance is not None
    doubled = torch.cat((x, x)) if guided else x  # what the network gets
    states, predictions = [x], []
    step: Callable[..., Any] = ops.ddpm_step
    settings: dict[str, Any] = {"guidance": options.guidance, "seed": seeds, "return_x0": options.return_all}
    if options.sampler == "ddim":
        step = ops.ddim_step
        settings |= {"eta": options.eta, "use_clipped_model_output": True}
    for t, t_prev in pairwise((*options.visited(schedule), -1)):
        output = predict(doubled, schedule._index[t + 1].expand(len(doubled)), condition)
        if options.sampler == "ddim" and schedule.variance_type.startswith("learned"):
            output = output.chunk(2, 1)[0]
        # Every step's noise comes from the same seeds, and from its timestep.
        doubled = step(output, t, t_prev, x, schedule, duplicate=guided and t_prev >= 0, **settings)
        if options.return_all:
            doubled, x0 = doubled
            predictions.append(x0)
            states.append(doubled[:n])
        x = doubled[:n]
    return (torch.stack(states), torch.stack((*predictions, x))) if options.return_all else x


def dtype_of(model: Any) -> torch.dtype:
    """That of a network's weights."""
    return next((p.dtype for p in _parameters(model) if p.is_floating_point()), torch.float32)


def empty_like_weights(model: Any, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """An empty batch in the dtype of a network's weights and, if some are channels_last, in that layout."""
    layouts = (memory_format(p) for p in _parameters(model) if p.dim() == len(shape))
    layout = next((layout for layout in layouts if layout != torch.contiguous_format), torch.contiguous_format)
    return torch.empty(shape, dtype=dtype_of(model), device=device, memory_format=layout)


def _parameters(model: Any) -> Iterator[Tensor]:
    return iter(model.parameters() if isinstance(model, nn.Module) else ())


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards each part is in the mode that it was in."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
