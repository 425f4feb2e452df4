"""Reference of `attention_varlen`, and the inputs it is verified on."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._case import Case, Inputs, normal


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention over all packed rows at once, `softmax(scale * q k^T + mask) v`, in q's dtype.

    The mask lets a query see the keys of its own sequence, and with `is_causal` those up to its own place counted from
    the sequence's end. Rows that see no key are 0.
    """
    sequence_q, left_q = _places(cu_seqlens_q, q.shape[0])
    sequence_k, left_k = _places(cu_seqlens_k, k.shape[0])
    visible = (sequence_q[:, None] == sequence_k) & (sequence_q[:, None] < len(cu_seqlens_q) - 1)
    if is_causal:
        visible &= left_k >= left_q[:, None]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[2] ** -0.5 if scale is None else scale)
    none = ~visible.any(-1, keepdim=True)
    p = scores.masked_fill(~visible, -math.inf).masked_fill(none, 0.0).softmax(-1).masked_fill(none, 0.0)
    return torch.einsum("hqk,khd->qhd", p, v)


def _places(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Each row's sequence, B for padding, and how many rows of it come after."""
    rows = torch.arange(total, device=cu_seqlens.device)
    sequence = torch.bucketize(rows, cu_seqlens[1:].long(), right=True)
    ends = torch.cat((cu_seqlens[1:], cu_seqlens.new_full((1,), total)))
    return sequence, ends[sequence] - 1 - rows


class Ragged(NamedTuple):
    """A batch to verify: lengths of the sequences, heads of q and of k, head_dim."""

    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    padding: int = 0  # rows of the buffers beyond the last sequence
    options: dict[str, Any] | None = None


_NAFLEX = (64, 100, 144, 196, 225, 256, 77, 128)

BATCHES = {
    "3 images": Ragged((5, 1, 12), (5, 1, 12), 2, 2, 16),
    "one image": Ragged((19,), (19,), 1, 1, 64),
    "images longer than a tile": Ragged((70, 3, 64), (70, 3, 64), 1, 1, 24),
    "queries on images": Ragged((4, 4), (9, 66), 1, 1, 40),
    "grouped heads": Ragged((6,), (11,), 4, 2, 16),
    "padding": Ragged((6, 11), (7, 5), 1, 1, 16, padding=9),
    "empty sequences": Ragged((0, 5, 6, 0), (3, 0, 7, 0), 2, 1, 16),
    "causal": Ragged((6, 11), (6, 11), 1, 1, 16, options={"is_causal": True}),
    "causal, more keys": Ragged((3, 4), (8, 70), 1, 1, 16, options={"is_causal": True}),
    "causal, fewer keys": Ragged((8, 5), (3, 0), 2, 1, 16, options={"is_causal": True}),
    "scale": Ragged((6, 11), (6, 11), 1, 1, 72, options={"scale": 0.4}),
}
"""Small, for the interpreter."""

BATCHES_GPU = {
    "ViT-B, 64 to 256 tokens": Ragged(_NAFLEX, _NAFLEX, 12, 12, 64),
    "SigLIP, 64 to 256 tokens": Ragged(_NAFLEX, _NAFLEX, 8, 8, 72),
    "long images": Ragged((16, 1024, 577), (16, 1024, 577), 4, 4, 64, padding=100),
    "long images, causal": Ragged((16, 1024, 577), (577, 1024, 16), 4, 2, 128, options={"is_causal": True}),
    "Q-Former": Ragged((32,) * 8, _NAFLEX, 12, 12, 64),
    "widest heads": Ragged((100, 257), (257, 100), 4, 4, 256),
}


def cases(dtype: torch.dtype, device: torch.device, *, large: bool) -> list[Case]:
    """Inputs for `verify`: lengths, heads and options, each in a batch of its own."""
    batches = {**BATCHES, **(BATCHES_GPU if large else {})}
    return [Case(label, partial(_draw, batch, dtype, device)) for label, batch in batches.items()]


def _draw(batch: Ragged, dtype: torch.dtype, device: torch.device) -> Inputs:
    cu_seqlens = [
        torch.tensor([0, *lengths], device=device).cumsum(0).int() for lengths in (batch.lengths_q, batch.lengths_k)
    ]
    total_q, total_k = (sum(lengths) + batch.padding for lengths in (batch.lengths_q, batch.lengths_k))
    q = normal((total_q, batch.heads, batch.head_dim), dtype, device, std=1.5)
    k, v = (normal((total_k, batch.kv_heads, batch.head_dim), dtype, device, std=1.5) for _ in range(2))
    return (q, k, v, *cu_seqlens, max(batch.lengths_q), max(batch.lengths_k)), batch.options or {}
