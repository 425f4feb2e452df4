"""Reference of `patch_embed`, and the inputs it is verified on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._case import Case, Inputs, normal


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pos_embed: Tensor | None = None,
    prefix_tokens: Tensor | None = None,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
) -> Tensor:
    """Normalise, unfold each patch into a row, multiply by the weight, put tokens in front, add positions."""
    dim, channels, ph, pw = weight.shape
    rows, columns = images.shape[2] // ph, images.shape[3] // pw
    x = images[..., : rows * ph, : columns * pw]
    x = x if x.is_floating_point() else x.to(weight.dtype) / 255
    for values, apply in ((mean, torch.sub), (std, torch.div)):
        if values is not None:
            values = torch.as_tensor(values, dtype=x.dtype, device=x.device)
            x = apply(x, values.reshape(channels, 1, 1))
    x = x.unflatten(3, (columns, pw)).unflatten(2, (rows, ph))  # [B, C, rows, ph, columns, pw]
    x = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [B, N, C * ph * pw]
    y = x @ weight.flatten(1).t()
    if bias is not None:
        y = y + bias
    prefix = y.new_empty(0, dim) if prefix_tokens is None else prefix_tokens.reshape(-1, dim)
    if pos_embed is not None:
        pos_embed = pos_embed.reshape(-1, dim)
        y = y + pos_embed[-y.shape[1] :]
        if len(pos_embed) != y.shape[1]:
            prefix = prefix + pos_embed[: len(prefix)]
    return torch.cat([prefix.expand(len(y), -1, -1), y], dim=1)


class Shape(NamedTuple):
    """One call."""

    batch: int
    channels: int
    height: int
    width: int
    patch: tuple[int, int]
    dim: int
    prefix: int = 0
    positions: str = "all"  # "all", "patches" or ""
    uint8: bool = False
    channels_last: bool = False
    bias: bool = True
    normalise: bool = False

    @property
    def label(self) -> str:
        """The call in words."""
        words = [f"{self.batch}x{self.channels}x{self.height}x{self.width} P{self.patch[0]}x{self.patch[1]}"]
        words += [f"D{self.dim} +{self.prefix}", f"positions {self.positions or 'none'}"]
        words += [name for name in ("uint8", "channels_last", "normalise") if getattr(self, name)]
        return " ".join(words if self.bias else [*words, "no bias"])


SMALL = (
    Shape(1, 3, 4, 4, (4, 4), 8, positions=""),
    Shape(2, 1, 32, 48, (16, 16), 40, 1),
    Shape(2, 3, 16, 32, (16, 16), 24, 1, channels_last=True),
    Shape(2, 3, 30, 44, (14, 14), 24, 2, "patches", bias=False),
    Shape(2, 1, 9, 15, (4, 5), 70, 5),
    Shape(2, 3, 16, 24, (8, 8), 24, 1, normalise=True),
    Shape(2, 3, 16, 32, (16, 16), 24, 1, uint8=True, normalise=True),
    Shape(2, 3, 29, 42, (14, 14), 24, 1, "patches", uint8=True, normalise=True, channels_last=True),
    Shape(2, 6, 8, 8, (4, 4), 16, 1, uint8=True, normalise=True),
    Shape(2, 2, 8, 8, (2, 2), 16, uint8=True),
)
"""For the interpreter."""

LARGE = (
    Shape(256, 3, 224, 224, (16, 16), 768, 1),
    Shape(256, 3, 224, 224, (16, 16), 768, 1, uint8=True, normalise=True),
    Shape(64, 3, 224, 224, (14, 14), 1024, 1),
    Shape(64, 3, 224, 224, (14, 14), 1024, 1, uint8=True, normalise=True, channels_last=True),
    Shape(8, 3, 518, 518, (14, 14), 1280, 5, "patches"),
    Shape(32, 3, 224, 224, (8, 8), 384, 1, channels_last=True),
    Shape(1, 3, 224, 224, (16, 16), 768, 1),
)
"""Of ViT-B/16, L/14, DINOv2 with registers, and S/8."""


def cases(dtype: torch.dtype, device: torch.device, *, large: bool) -> list[Case]:
    """Inputs for `verify`."""
    shapes = SMALL + (LARGE if large else ())
    return [Case(shape.label, partial(_draw, shape, dtype, device)) for shape in shapes]


def _draw(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    size = (shape.batch, shape.channels, shape.height, shape.width)
    images = (
        torch.randint(0, 256, size, dtype=torch.uint8, device=device)
        if shape.uint8
        else normal(size, dtype, device, mean=0.4 if shape.normalise else 0.0, std=0.3 if shape.normalise else 1.0)
    )
    if shape.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    ph, pw = shape.patch
    weight = normal((shape.dim, shape.channels, ph, pw), dtype, device, std=(shape.channels * ph * pw) ** -0.5)
    bias = normal((shape.dim,), dtype, device) if shape.bias else None
    patches = (shape.height // ph) * (shape.width // pw)
    named: dict[str, Any] = {}
    if shape.positions:
        rows = patches + (shape.prefix if shape.positions == "all" else 0)
        named["pos_embed"] = normal((rows, shape.dim), dtype, device)
    if shape.prefix:
        named["prefix_tokens"] = normal((shape.prefix, shape.dim), dtype, device)
    if shape.normalise:
        named["mean"] = [0.485, 0.456, 0.406, 0.3, 0.5, 0.4][: shape.channels]
        named["std"] = [0.229, 0.224, 0.225, 0.3, 0.25, 0.2][: shape.channels]
    return (images, weight, bias), named
