"""Self-attention of packed projections: the kernels of `attention` on views of one tensor.

q, k and v are read where they lie in (B, N, 3 * H * d), the output is written as (B, N, H * d) and the gradient as
(B, N, 3 * H * d): no transpose, no copy, no concatenation either way.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._attention_audit import shape_configurations
from ._common import AUDIT_DTYPES, Compilation
from .attention import attention_backward, attention_forward


def attention_qkv_forward(
    qkv: Tensor, num_heads: int, attn_mask: Tensor | None, *, is_causal: bool, scale: float, precision: str = "ieee"
) -> tuple[Tensor, Tensor]:
    """Output (B, N, H * d) and lse as `attention_forward` returns it, for qkv (B, N, 3 * H * d)."""
    q, k, v = _split(qkv, num_heads)
    out = torch.empty((*qkv.shape[:2], qkv.shape[2] // 3), dtype=qkv.dtype, device=qkv.device)
    lse = attention_forward(
        q, k, v, attn_mask, is_causal=is_causal, scale=scale, precision=precision, out=_heads(out, num_heads)
    )[1]
    return out, lse


def attention_qkv_backward(
    dout: Tensor,
    qkv: Tensor,
    num_heads: int,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    *,
    is_causal: bool,
    scale: float,
    precision: str = "ieee",
) -> Tensor:
    """The gradient of qkv, packed."""
    q, k, v = _split(qkv, num_heads)
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    attention_backward(
        _heads(dout, num_heads),
        q,
        k,
        v,
        _heads(out, num_heads),
        lse,
        attn_mask,
        is_causal=is_causal,
        scale=scale,
        precision=precision,
        grads=_split(dqkv, num_heads),
    )
    return dqkv


def _split(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views q, k, v, each (B, H, N, d)."""
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """View of x (B, N, H * d) as (B, H, N, d)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def audit_configurations() -> Iterator[Compilation]:
    """The kernels of `attention`, which audits them at more shapes, at those of ViT-B/16 and DINOv2."""
    for dtype in AUDIT_DTYPES:
        yield from shape_configurations((197, 197, 64), dtype)
    yield from shape_configurations((261, 261, 64), torch.bfloat16)
