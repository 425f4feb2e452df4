"""What accelerated attention modules share: which masks and widths the ops take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import attention, attention_qkv
from ..ops.attention import MAX_HEAD_DIM
from ._swap import Accelerated, plain_tensor


class FusedAttention(Accelerated):
    """Mixin of attention modules."""

    mmfast_op = "attention"

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        """Why this attention is left alone, or None."""
        return refuses_head_dim(getattr(module, "head_dim", 0))


def refuses_head_dim(head_dim: Any) -> str | None:
    """Why no kernel serves heads of this width, or None."""
    if isinstance(head_dim, int) and head_dim > MAX_HEAD_DIM:
        return f"has heads of width {head_dim}, above {MAX_HEAD_DIM}"
    return None


def takes_mask(attn_mask: Any, dtype: torch.dtype) -> bool:
    """Whether the ops take this mask, with semantics of F.scaled_dot_product_attention, beside queries of `dtype`."""
    if attn_mask is None:
        return True
    if not plain_tensor(attn_mask) or not 2 <= attn_mask.dim() <= 4:
        return False
    if attn_mask.requires_grad and torch.is_grad_enabled():
        return False
    return attn_mask.dtype in (torch.bool, torch.float32, dtype)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, H * d) -> (B, H, N, d), a view."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """`mmfast.ops.attention` of heads (B, H, N, d), side by side again: (B, N, H * d)."""
    out = attention(q, k, v, attn_mask, is_causal=is_causal, scale=scale)
    return out.transpose(1, 2).flatten(2)


def attend_packed(qkv: Tensor, num_heads: int, attn_mask: Tensor | None = None, *, is_causal: bool = False) -> Tensor:
    """`mmfast.ops.attention_qkv` of (B, N, 3 * H * d)."""
    return attention_qkv(qkv, num_heads, attn_mask, is_causal=is_causal)
