"""The torch backend of `patch_embed`, forward and backward, and the normalisation of images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

PerChannel = Sequence[float] | Tensor | None
"""A number a channel: a sequence of them, a tensor of C elements in any shape, or None for the neutral one."""


def normalised(images: Tensor, mean: PerChannel, std: PerChannel, divisor: float, dtype: torch.dtype) -> Tensor:
    """`(images / divisor - mean) / std` in `dtype`, computed in at least float32 where it is not images itself.

    Of uint8 images and divisor 255 these are the operations of torchvision's `ToTensor` and `Normalize`.
    """
    if mean is None and std is None and divisor == 1.0:
        return images.to(dtype)
    x = images.to(torch.float64 if dtype == torch.float64 else torch.float32)
    if divisor != 1.0:
        x = x / divisor
    if mean is not None:
        x = x - per_channel(mean, x)
    if std is not None:
        x = x / per_channel(std, x)
    return x.to(dtype)


def per_channel(values: Sequence[float] | Tensor, like: Tensor) -> Tensor:
    """The numbers as (C, 1, 1) in the dtype and on the device of `like`."""
    if isinstance(values, Tensor):
        return values.to(like.dtype).reshape(-1, 1, 1)
    if like.is_cuda and not torch.compiler.is_compiling():  # no copy from the host, which a CUDA graph cannot capture
        found = torch.stack([torch.full((), value, dtype=like.dtype, device=like.device) for value in values])
    else:
        found = torch.tensor(values, dtype=like.dtype, device=like.device)
    return found.view(-1, 1, 1)


def patch_embed_torch(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix_tokens: Tensor | None,
    mean: PerChannel,
    std: PerChannel,
    divisor: float,
    dtype: torch.dtype,
) -> Tensor:
    """Normalise, convolve in `dtype`, flatten, and add positions and put tokens in front as torch promotes them."""
    x = normalised(images, mean, std, divisor, dtype)
    x = F.conv2d(x, weight.to(dtype), bias if bias is None else bias.to(dtype), stride=weight.shape[2:])
    x = x.flatten(2).transpose(1, 2)
    if pos_embed is not None and pos_embed.shape[-2] == x.shape[1]:
        x, pos_embed = x + pos_embed, None
    if prefix_tokens is not None and prefix_tokens.shape[-2]:
        x = torch.cat([prefix_tokens.expand(x.shape[0], -1, -1), x], dim=1)
    return x if pos_embed is None else x + pos_embed


def patch_embed_backward_torch(
    dy: Tensor,
    images: Tensor,
    weight: Tensor,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    divisor: float,
    dtype: torch.dtype,
    count: int,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the images and the weight, and dy (B, P + N, D) summed over the batch; None where not wanted."""
    sums = dy.sum(0, dtype=torch.float64 if dy.dtype == torch.float64 else torch.float32) if needs[2] else None
    dimages: Tensor | None = None
    dweight: Tensor | None = None
    if images.shape[0] == 0:
        dimages = torch.zeros_like(images) if needs[0] else None
        return dimages, torch.zeros_like(weight) if needs[1] else None, sums
    if needs[0] or needs[1]:
        size = [images.shape[axis] // weight.shape[axis] for axis in (2, 3)]
        grad = dy[:, count:].to(dtype).transpose(1, 2).unflatten(2, size)
        dx, dw, _ = torch.ops.aten.convolution_backward.default(
            grad,
            normalised(images, mean, std, divisor, dtype),
            weight.to(dtype),
            None,
            list(weight.shape[2:]),
            [0, 0],
            [1, 1],
            False,
            [0, 0],
            1,
            [needs[0], needs[1], False],
        )
        if needs[0]:
            if std is not None:
                dx = dx / per_channel(std, dx)
            dimages = _laid_out_as(dx if divisor == 1.0 else dx / divisor, images)
        if needs[1]:
            dweight = _laid_out_as(dw, weight)
    return dimages, dweight, sums


def _laid_out_as(value: Tensor, like: Tensor) -> Tensor:
    """`value` with the dtype and the strides that `torch.empty_like(like)` has, as the fake kernel says."""
    return torch.empty_like(like).copy_(value)
