"""Reference of `attention_maps`, and the inputs it is verified on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._case import Case, Inputs, normal


def attention_maps(
    q: Tensor,
    k: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    heads: int | Sequence[int] | None = None,
    lse: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`softmax(scale * q k^T + mask)` of the chosen heads, 0 in rows whose keys are all masked; lse is not needed."""
    if q.dim() > 2:
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
    if heads is not None:
        scores = scores[..., [heads] if isinstance(heads, int) else list(heads), :, :]
    none = (scores == -math.inf).all(-1, keepdim=True)
    return scores.masked_fill(none, 0.0).softmax(-1).masked_fill(none, 0.0).to(dtype or q.dtype)


SHAPES = ((1, 1, 1, 1, 16), (2, 3, 5, 5, 16), (1, 2, 50, 50, 64), (1, 2, 4, 77, 40), (1, 1, 17, 300, 72))
"""(B, H, Nq, Nk, d), small, for the interpreter."""

SHAPES_GPU = (
    (8, 12, 197, 197, 64),
    (4, 16, 257, 257, 64),
    (4, 16, 577, 577, 64),
    (2, 16, 729, 729, 72),
    (2, 8, 4096, 77, 40),
    (2, 8, 256, 77, 160),
    (2, 8, 333, 512, 256),
)
"""ViT-B/16, L/14 and L/16 at 384, SigLIP, U-Net cross-attention, and the widest head."""


def cases(dtype: torch.dtype, device: torch.device, *, large: bool) -> list[Case]:
    """Inputs for `verify`: each shape, and one with each option."""
    small = (1, 4, 20, 33, 24)
    options: dict[str, dict[str, Any]] = {
        "causal": {"is_causal": True},
        "two heads": {"heads": (2, 0)},
        "scale": {"scale": 0.5},
        "float32": {"dtype": torch.float32},
    }
    label = "x".join(map(str, small))
    return [
        *(
            Case("x".join(map(str, shape)), partial(_draw, shape, {}, dtype, device))
            for shape in SHAPES + (SHAPES_GPU if large else ())
        ),
        *(Case(f"{label} {name}", partial(_draw, small, chosen, dtype, device)) for name, chosen in options.items()),
        Case(f"{label} masked", partial(_draw_masked, small, dtype, device)),
        Case(f"{label} lse", partial(_draw_lse, small, dtype, device), constants=("lse",)),
    ]


def _draw(shape: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Inputs:
    batch, heads, rows, keys, width = shape
    q = normal((batch, heads, rows, width), dtype, device, std=1.5)
    return (q, normal((batch, heads, keys, width), dtype, device, std=1.5)), options


def _draw_masked(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Inputs:
    """Pairs that attend, and a row without keys."""
    keep = torch.rand(shape[2:4], device=device) > 0.4
    keep[1] = False
    return _draw(shape, {"attn_mask": keep}, dtype, device)


def _draw_lse(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Inputs:
    (q, k), _ = _draw(shape, {}, dtype, device)
    return (q, k), {"lse": (q.double() @ k.double().mT * shape[-1] ** -0.5).logsumexp(-1).float()}
