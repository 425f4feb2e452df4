"""`embed`: pixels to tokens in one step, with the prefix tokens and the position embedding if they are given."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..nn.activation import any_global_hook
from ..ops import patch_embed
from ._swap import called, multiplies, plain_tensor


def refuses_conv(conv: Any) -> str | None:
    """Why `mmfast.ops.patch_embed` cannot stand in for this convolution, or None."""
    reason = called(conv, nn.Conv2d)
    if reason is not None:
        return reason
    if conv.stride != conv.kernel_size:
        return f"has stride {conv.stride}, and kernel size {conv.kernel_size}"
    if conv.padding not in ((0, 0), "valid") or conv.dilation != (1, 1) or conv.groups != 1:
        return "pads, dilates or has groups"
    return None


def embed(
    images: Any, conv: Any, *, pos_embed: Tensor | None = None, prefix_tokens: Tensor | None = None
) -> Tensor | None:
    """The tokens (B, P + N, D) of images (B, C, H, W), or None where the modules have to be called.

    Args:
        images: in the dtype of the weight, or under autocast.
        conv: the convolution whose weight and bias are used.
        pos_embed: (P + N, D) or (N, D), added.
        prefix_tokens: (P, D), put in front.
    """
    if not (plain_tensor(images) and images.dim() == 4) or any_global_hook() or refuses_conv(conv) is not None:
        return None
    height, width = conv.kernel_size
    channels, rows, columns = images.shape[1:]
    if channels != conv.in_channels or rows % height or columns % width or not images.numel():
        return None
    if not multiplies(images, conv.weight, conv.bias):
        return None
    if not all(extra is None or plain_tensor(extra) for extra in (pos_embed, prefix_tokens)):
        return None
    tokens = (rows // height) * (columns // width)
    prefix = 0 if prefix_tokens is None else prefix_tokens.shape[0]
    if pos_embed is not None and pos_embed.shape[0] not in (tokens, tokens + prefix):
        return None
    return patch_embed(images, conv.weight, conv.bias, pos_embed=pos_embed, prefix_tokens=prefix_tokens)
