"""Reference of `attention`, and the inputs it is verified on."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from ._case import Case, Inputs, normal


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`softmax(scale * q k^T + mask) v` over the last two dimensions, in q's dtype; 0 where all keys are masked.

    Raises ValueError for dropout_p above 0, which has no one answer.
    """
    if dropout_p:
        raise ValueError(f"attention: the reference has no dropout, got dropout_p {dropout_p}")
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], dim=-3) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
    none = scores.amax(-1, keepdim=True) == -math.inf
    return scores.masked_fill(none, 0.0).softmax(-1).masked_fill(none, 0.0) @ v


# Queries, keys, batch, heads, heads of k and v, head_dim.
SHAPES = (
    (1, 1, 1, 1, 1, 16),
    (17, 17, 2, 2, 2, 16),
    (65, 65, 1, 1, 1, 64),
    (20, 77, 1, 4, 2, 40),
    (33, 300, 1, 1, 1, 24),
)
"""Small shapes, for the interpreter."""

SHAPES_GPU = (
    (197, 197, 256, 12, 12, 64),
    (257, 257, 64, 16, 16, 64),
    (577, 577, 16, 16, 16, 64),
    (50, 50, 1024, 12, 12, 64),
    (257, 257, 8, 16, 16, 88),
    (257, 257, 8, 16, 16, 80),
    (256, 256, 8, 16, 16, 72),
    (257, 257, 8, 16, 16, 104),
    (4096, 77, 4, 8, 8, 40),
    (1024, 77, 4, 8, 8, 80),
    (256, 77, 4, 8, 8, 160),
    (32, 257, 8, 12, 12, 64),
    (300, 300, 2, 4, 4, 256),
    (2048, 2048, 2, 8, 2, 128),
    (4, 16384, 1, 16, 4, 128),
    (192, 192, 8, 8, 8, 64),
)
"""Of ViTs, a U-Net's cross-attention, a Q-Former, a long sequence and a decoder's step."""


def cases(dtype: torch.dtype, device: torch.device, *, large: bool) -> list[Case]:
    """Inputs for `verify`: each shape plain, and the first ones masked and causal."""
    return [
        Case(
            "x".join(map(str, shape)) + (f" {option}" if option else ""),
            partial(_draw, shape, option, dtype, device),
            ("attn_mask",),
        )
        for index, shape in enumerate(SHAPES + (SHAPES_GPU if large else ()))
        for option in (("", "padding", "mask", "causal") if index % 5 == 1 else ("",))
    ]


def _draw(shape: tuple[int, ...], option: str, dtype: torch.dtype, device: torch.device) -> Inputs:
    n_q, n_k, batch, heads, kv_heads, width = shape
    q = normal((batch, heads, n_q, width), dtype, device)
    k, v = (normal((batch, kv_heads, n_k, width), dtype, device) for _ in range(2))
    options: dict[str, object] = {"is_causal": option == "causal", "enable_gqa": heads != kv_heads}
    if option == "padding":
        options["attn_mask"] = torch.rand(batch, 1, 1, n_k, device=device) > 0.3
    elif option == "mask":
        options["attn_mask"] = normal((heads, n_q, n_k), dtype, device)
    return (q, k, v), options
