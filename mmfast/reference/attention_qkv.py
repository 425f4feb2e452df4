"""Reference of `attention_qkv`, and the inputs it is verified on."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ._case import Case, Inputs, normal
from .attention import attention


def attention_qkv(
    qkv: Tensor,
    num_heads: int,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """`attention` of the H heads of q, k, v packed in the last dimension, with the heads side by side again."""
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    return attention(q, k, v, attn_mask, dropout_p, is_causal, scale).transpose(1, 2).flatten(2)


SHAPES = ((1, 1, 1, 16), (2, 17, 2, 16), (1, 65, 1, 40), (1, 80, 2, 32))
"""(batch, length, heads, head_dim), small, for the interpreter."""

SHAPES_GPU = ((256, 197, 12, 64), (64, 257, 16, 64), (16, 577, 16, 64), (1024, 50, 12, 64), (8, 257, 16, 88))
"""Of ViT-B/16, L/14, L/14 at 336 pixels, B/32 and g/14."""


def cases(dtype: torch.dtype, device: torch.device, *, large: bool) -> list[Case]:
    """Inputs for `verify`."""
    return [
        Case("x".join(map(str, shape)), partial(_draw, shape, dtype, device))
        for shape in SHAPES + (SHAPES_GPU if large else ())
    ]


def _draw(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Inputs:
    batch, length, heads, width = shape
    return (normal((batch, length, 3 * heads * width), dtype, device), heads), {}
