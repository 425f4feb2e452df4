"""Networks for the tests of GaussianDiffusion that are small, exact, or behave in one way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import mmfast
from mmfast.models import GaussianDiffusion

SHAPE = (2, 4, 3)
PREDICTIONS = ("epsilon", "v_prediction", "sample")


class Pointwise(nn.Module):
    """Every element alone, so that a sample does not depend on its batch, nor on how it is computed."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.label = nn.Embedding(classes + 1, 1)
        self.dropout = nn.Dropout(0.5)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        shape = (-1, *(1,) * (x.dim() - 1))
        out = self.dropout(x * self.scale + (t.to(x.dtype) / 1000).view(shape))
        if label is not None:
            self.seen.append(label)
            out = out + self.label(label).view(shape)
        return out


class OnePoint(nn.Module):
    """The best prediction there can be where all images are one: sampling has to find it."""

    def __init__(self, image: Tensor, schedule: mmfast.NoiseSchedule) -> None:
        super().__init__()
        self.image, self.schedule = image, schedule

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        alpha_bar = self.schedule.alphas_cumprod_double[1 + t].view(-1, *(1,) * (x.dim() - 1))
        epsilon = (x - alpha_bar.sqrt() * self.image) / (1 - alpha_bar).sqrt()
        return {
            "epsilon": epsilon,
            "sample": self.image.expand_as(x),
            "v_prediction": alpha_bar.sqrt() * epsilon - (1 - alpha_bar).sqrt() * self.image,
        }[self.schedule.prediction_type].to(x.dtype)


class Function(nn.Module):
    """Calls a function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def make(prediction_type: str = "epsilon", **options: Any) -> GaussianDiffusion:
    schedule = mmfast.NoiseSchedule("squaredcos_cap_v2", prediction_type=prediction_type)
    return GaussianDiffusion(Pointwise(), schedule, image_shape=SHAPE, null_condition=4, **options)


def images(n: int = 5) -> Tensor:
    return torch.rand(n, *SHAPE) * 2 - 1
