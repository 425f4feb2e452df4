"""Self-attention of packed projections: the kernels of `attention` on views of one tensor.

q, k and v are read where they lie in (B, N, 3 * H * d), the output is written as (B, N, H * d) and the gradient as
(B, N, 3 * H * d): no transpose, no copy, no concatenation either way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import current, dtype_code, extension, programs
from .attention import attention_backward


def attention_qkv_forward(
    qkv: Tensor, num_heads: int, attn_mask: Tensor | None, *, is_causal: bool, scale: float, precision: str = "ieee"
) -> tuple[Tensor, Tensor]:
    """Output (B, N, H * d) and lse as `attention_forward` returns it, for qkv (B, N, 3 * H * d)."""
    if attn_mask is not None or is_causal:
        raise ValueError("attention_qkv_forward: the CUDA C++ kernel serves no mask and is not causal")
    batch, length, packed = qkv.shape
    width = packed // 3
    head_dim = width // num_heads
    out = torch.empty((batch, length, width), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((batch, num_heads, length), dtype=torch.float32, device=qkv.device)
    by_image, by_token, column = qkv.stride()
    start = qkv.data_ptr()
    if column != 1 or (by_image | by_token) & 7 or start & 15:
        qkv = qkv.clone(memory_format=torch.contiguous_format)
        by_image, by_token, _ = qkv.stride()
        start = qkv.data_ptr()
    strides = (by_image, head_dim, by_token, 1)
    size = 2 * width  # bytes of q, k or v of a token
    extension().attention_forward(
        start,
        start + size,
        start + 2 * size,
        out.data_ptr(),
        lse.data_ptr(),
        batch,
        num_heads,
        num_heads,
        length,
        length,
        head_dim,
        strides,
        strides,
        strides,
        (length * width, head_dim, width, 1),
        scale,
        programs(qkv, 1),
        dtype_code(qkv),
        *current(qkv),
    )
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
        grads=_split(dqkv, num_heads),
    )
    return dqkv


def _split(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views q, k, v, each (B, H, N, d)."""
    batch, length, packed = qkv.shape
    q, k, v = qkv.view(batch, length, 3, num_heads, packed // (3 * num_heads)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """View of x (B, N, H * d) as (B, H, N, d)."""
    batch, length, width = x.shape
    return x.view(batch, length, num_heads, width // num_heads).transpose(1, 2)
