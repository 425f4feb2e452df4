"""Attention by the CUDA C++ kernels: short sequences of float16 and bfloat16 heads, keys and values resident.

The contract of `mmfast.kernels.attention`, without masks. How the kernels work is said in csrc/attention_forward.cuh
and csrc/attention_backward.cuh; how blocks and warps share the work is a rule in C++, where it costs nothing
(`extension().attention_forward_plan`). `mmfast.backends` sends here only what they serve.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._attention_backward import aligned, attention_backward
from ._common import current, dtype_code, extension, programs

__all__ = ["attention_backward", "attention_forward", "waste"]


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    *,
    is_causal: bool,
    scale: float,
    precision: str = "ieee",
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (B, H, n_q, d) and lse, for q (B, H, n_q, d), k and v (B, H / group, n_k, d) of any strides.

    lse is the base-2 logarithm of each row's sum of exponentials, (B, H, n_q) float32. `out`, whose rows are aligned to
    16 bytes, is where to write; otherwise its memory has the heads after the rows. `precision` says nothing here.
    """
    if attn_mask is not None or is_causal:
        raise ValueError("attention_forward: the CUDA C++ kernel serves no mask and is not causal")
    batch, heads, n_q, head_dim = q.shape
    if out is None:
        out = torch.empty((batch, n_q, heads, head_dim), dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty((batch, heads, n_q), dtype=torch.float32, device=q.device)
    q, k, v = aligned(q), aligned(k), aligned(v)
    _, kv_heads, n_k, _ = k.shape
    extension().attention_forward(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        out.data_ptr(),
        lse.data_ptr(),
        batch,
        heads,
        kv_heads,
        n_q,
        n_k,
        head_dim,
        q.stride(),
        k.stride(),
        v.stride(),
        out.stride(),
        scale,
        programs(q, 1),
        dtype_code(q),
        *current(q),
    )
    return out, lse


def waste(n_q: int, n_k: int, head_dim: int) -> float:
    """What the forward computes over what it must: queries padded to 16, keys and columns to 8."""
    issued = -(-n_q // 16) * 16 * (-(-n_k // 8) * 8) * (-(-head_dim // 8) * 8)
    return issued / (n_q * n_k * head_dim)
