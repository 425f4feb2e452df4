"""Attention in the form that transformers' registry wants, with its masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ... import backends
from ...ops import attention
from .._attention import takes_mask
from .._swap import plain_tensor

NAME = "mmfast"


def register() -> None:
    """Register the function below, and the mask of "sdpa": for a name without one the mask is dropped, silently."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of query (B, H, Nq, d), key and value (B, Hk, Nk, d): ((B, Nq, H, d), no weights).

    transformers' own function for "sdpa" runs where the op has nothing to offer: on a CPU with no backend forced, with
    dropout, or for an option that only it knows (a position bias, a paged cache).
    """
    other = dropout > 0.0 or any(
        kwargs.get(name) is not None for name in ("position_bias", "cache", "softcap", "s_aux")
    )
    takes = plain_tensor(query) and plain_tensor(key) and takes_mask(attention_mask, query.dtype)
    if other or not takes or query.dim() != 4 or key.shape[1] == 0 or backends.torch_serves(query):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # A query that decodes sees all keys; a mask holds whatever causality there is.
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    grouped = query.shape[1] != key.shape[1]
    out = attention(query, key, value, attention_mask, is_causal=causal, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous(), None
