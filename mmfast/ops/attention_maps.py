"""`attention_maps`: the attention probabilities themselves, of chosen heads, for people to look at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ._attention import check_mask, check_options, refusal
from ._register import autocasts, register, stats_dtype
from ._validate import check_tensor

OP = "attention_maps"


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
    """Attention probabilities, `softmax(scale * q k^T + mask)`: what `attention` multiplies the values by.

    The kernel never stores the scores: with `lse` it makes one pass over the keys, without it two. Its memory is the
    result's: choose heads where they are many.

    Args:
        q: (..., H, Nq, d), float32, float16, bfloat16 or float64, any strides.
        k: (..., Hk, Nk, d), in q's dtype; H is a multiple of Hk, and each head of k serves H / Hk consecutive ones of
            q; other leading dimensions of 1 broadcast.
        attn_mask: broadcastable to (..., H, Nq, Nk); boolean (True attends), or float32 or q's dtype, added to the
            scaled scores.
        is_causal: query i sees keys 0..i; together with attn_mask, both hold.
        scale: of the scores, by default 1/sqrt(d).
        heads: which heads of q, in this order, negative ones from the end; one, several, or None for all.
        lse: (..., H, Nq) as `attention(q, k, v, ..., return_lse=True)` returns it for the same arguments, float32
            (float64 for float64). Only a saving: it has no gradient, and it is not used with an attn_mask that is
            added, next to whose values it may have lost its digits.
        dtype: of the result: q's (the default) or float32.

    Returns:
        (..., number of heads, Nq, Nk), contiguous. A row whose keys are all masked is 0. Under autocast the scores and
        the result have the autocast dtype. Gradients flow to q and k, and through PyTorch's own ops to attn_mask.

    Raises:
        TypeError: an argument is not a tensor, or a dtype does not fit.
        ValueError: a shape, a device, a head or scale does not fit.
        BackendError: a forced backend cannot serve.

    Source: the second pass of Dao et al., "FlashAttention", arXiv:2205.14135, algorithm 4 (probabilities from lse).
    """
    lead = _check(q, k, attn_mask, scale, lse, dtype)
    chosen = _check_heads(q, heads)
    if autocasts(q.device) and q.dtype != torch.float64:
        q, k = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k))
    scale = 1.0 / math.sqrt(max(1, q.shape[-1])) if scale is None else float(scale)
    if chosen is not None:
        group = q.shape[-3] // k.shape[-3]
        q, k = _select(q, chosen, -3), _select(k, [head // group for head in chosen], -3)
        if lse is not None:
            lse = _select(lse, chosen, -2)
        if attn_mask is not None and attn_mask.dim() > 2 and attn_mask.shape[-3] != 1:
            attn_mask = _select(attn_mask, chosen, -3)
    dtype = dtype or q.dtype
    if backends.torch_serves(q) or backends.choose(OP, _facts(q, k, attn_mask)) == "torch":
        return attention_maps_torch(q, k, attn_mask, is_causal, scale, dtype)
    q, k = (x if x.shape[:-3] == lead else x.expand(*lead, *x.shape[-3:]) for x in (q, k))
    if attn_mask is not None:
        if q.dim() > 4 and attn_mask.dim() > 3:
            attn_mask = attn_mask.expand(*lead, *attn_mask.shape[-3:])
        attn_mask = _four(attn_mask)
    if lse is not None:
        lse = lse.reshape(-1, q.shape[-3] if q.dim() > 2 else 1, q.shape[-2])
    found = _attention_maps(_four(q), _four(k), attn_mask, lse, is_causal, scale, dtype)
    return found.reshape(*q.shape[:-1], k.shape[-2])


def attention_maps_torch(
    q: Tensor, k: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float, dtype: torch.dtype
) -> Tensor:
    """The torch backend: the unfused formula of timm, scores in q's dtype."""
    if q.dim() > 2 and k.shape[-3] != q.shape[-3]:
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3)
    scores = (q * scale) @ k.transpose(-2, -1)
    if attn_mask is not None:
        masks = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -math.inf) if masks else scores + attn_mask
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
    none = None
    if attn_mask is not None and scores.shape[-1]:
        none = scores.detach().amax(dim=-1, keepdim=True) == -math.inf
        scores = scores.masked_fill(none, 0.0)  # softmax of such a row would be NaN, and so would its gradient
    p = scores.softmax(dim=-1, dtype=torch.float32) if dtype == torch.float32 else scores.softmax(dim=-1)
    return (p if none is None else p.masked_fill(none, 0.0)).to(dtype)


def cost(q: Tensor, k: Tensor, *, heads: int | None = None, itemsize: int | None = None) -> dict[str, int]:
    """Bytes through device memory and FLOPs that the op cannot do without: q and k are read, the result is written."""
    count = q.shape[-3] if heads is None else heads
    pairs = q.shape[:-3].numel() * count * q.shape[-2] * k.shape[-2]
    read = (q.numel() + k.numel()) * count // q.shape[-3] * q.element_size()
    return {"bytes": read + pairs * (itemsize or q.element_size()), "flops": 2 * pairs * q.shape[-1]}


def _check(
    q: Tensor,
    k: Tensor,
    attn_mask: Tensor | None,
    scale: float | None,
    lse: Tensor | None,
    dtype: torch.dtype | None,
) -> tuple[int, ...]:
    """Return the leading dimensions before the heads, broadcast, or raise."""
    for name, x in (("q", q), ("k", k)):
        check_tensor(OP, name, x)
        if x.dim() < 2 or x.dim() != q.dim():
            least = "at least 2 dimensions" if x is q else f"{q.dim()} dimensions like q"
            raise ValueError(f"{OP}: {name} must have {least}, got {tuple(x.shape)}")
    if k.device != q.device:
        raise ValueError(f"{OP}: k must be on {q.device} like q, got {k.device}")
    if k.dtype != q.dtype and not autocasts(q.device):
        raise TypeError(f"{OP}: k must be {q.dtype} like q, got {k.dtype}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"{OP}: k must have head_dim {q.shape[-1]} like q, got {k.shape[-1]}")
    if q.dim() > 2 and (k.shape[-3] == 0 or q.shape[-3] % k.shape[-3]):
        raise ValueError(f"{OP}: k's heads must divide q's {q.shape[-3]}, got {k.shape[-3]}")
    if any(n != m and 1 not in (n, m) for n, m in zip(q.shape[:-3], k.shape[:-3], strict=True)):
        expected = f"leading dimensions that broadcast with q's {tuple(q.shape[:-3])}"
        raise ValueError(f"{OP}: k must have {expected}, got {tuple(k.shape[:-3])}")
    check_options(OP, 0.0, scale)
    lead = tuple(torch.broadcast_shapes(q.shape[:-3], k.shape[:-3]))
    rows = (*lead, *q.shape[-3:-1])
    if attn_mask is not None:
        check_mask(OP, attn_mask, q, (*rows, k.shape[-2]))
    if lse is not None:
        check_tensor(OP, "lse", lse)
        if lse.shape != rows or lse.device != q.device:
            expected = f"shape {rows} and be on {q.device} like q"
            raise ValueError(f"{OP}: lse must have {expected}, got {tuple(lse.shape)} on {lse.device}")
        if lse.dtype != stats_dtype(q):
            raise TypeError(f"{OP}: lse must be {stats_dtype(q)}, got {lse.dtype}")
    if dtype not in (None, q.dtype, torch.float32):
        raise TypeError(f"{OP}: dtype must be None, {q.dtype} or torch.float32, got {dtype}")
    return lead


def _check_heads(q: Tensor, heads: int | Sequence[int] | None) -> list[int] | None:
    """Return the chosen heads counted from 0, or None for all."""
    if heads is None:
        return None
    count = q.shape[-3] if q.dim() > 2 else 1
    chosen = [heads] if isinstance(heads, int) else list(heads)
    whole = all(isinstance(head, int) and not isinstance(head, bool) for head in chosen)
    if q.dim() < 3 or not chosen or not whole or any(not -count <= head < count for head in chosen):
        raise ValueError(f"{OP}: heads must be head indices in {-count}..{count - 1}, got {heads!r}")
    return [head % count for head in chosen]


def _select(x: Tensor, chosen: list[int], dim: int) -> Tensor:
    """These indices of one dimension: a view where they are evenly spaced, for a list would go through the host."""
    step = chosen[1] - chosen[0] if len(chosen) > 1 else 1
    if step > 0 and all(b - a == step for a, b in pairwise(chosen)):
        return x.transpose(0, dim)[chosen[0] : chosen[-1] + 1 : step].transpose(0, dim)
    return torch.cat([x.narrow(dim, index, 1) for index in chosen], dim)


def _four(x: Tensor) -> Tensor:
    """(B, H, N, d), whatever the number of leading dimensions."""
    while x.dim() < 4:
        x = x.unsqueeze(0)
    return x if x.dim() == 4 else x.flatten(0, -4)


class AttentionMapsFunction(torch.autograd.Function):
    """Autograd of `attention_maps`: saves q, k and the result; the backward is two products of PyTorch's."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        attn_mask: Tensor | None,
        lse: Tensor | None,
        is_causal: bool,
        scale: float,
        dtype: torch.dtype,
    ) -> Tensor:
        p = _attention_maps_forward(q, k, attn_mask, lse, is_causal, scale, dtype)
        ctx.save_for_backward(q, k, p)
        ctx.scale = scale
        return p

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, p = ctx.saved_tensors
        need_q, need_k = ctx.needs_input_grad[:2]
        stats = stats_dtype(q)
        p, dp = p.to(stats), grads[0].to(stats)
        ds = (p * (dp - (dp * p).sum(-1, keepdim=True)) * ctx.scale).to(q.dtype)
        dq = dk = None
        if need_q:
            group = q.shape[1] // k.shape[1]
            dq = ds @ (k if group == 1 else k.repeat_interleave(group, dim=1))
        if need_k:
            dk = (ds.mT @ q).unflatten(1, (k.shape[1], -1)).sum(2)
        return dq, dk, None, None, None, None, None


def _forward(
    q: Tensor,
    k: Tensor,
    attn_mask: Tensor | None,
    lse: Tensor | None,
    is_causal: bool,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    if backends.pick(OP, _facts(q, k, attn_mask)) == "torch":
        return attention_maps_torch(q, k, attn_mask, is_causal, scale, dtype).contiguous()
    from ..kernels.attention_maps import attention_maps_forward

    precision = backends.product_precision()
    return attention_maps_forward(
        q, k, attn_mask, lse, is_causal=is_causal, scale=scale, dtype=dtype, precision=precision
    )


def _fake(
    q: Tensor,
    k: Tensor,
    attn_mask: Tensor | None,
    lse: Tensor | None,
    is_causal: bool,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    return q.new_empty((*q.shape[:3], k.shape[2]), dtype=dtype)


def _facts(q: Tensor, k: Tensor, attn_mask: Tensor | None) -> backends.Facts:
    width = q.shape[-1]
    no = refusal(width, width, attn_mask, 0.0, q.numel() and k.numel())
    return backends.Facts(q.device, q.dtype, width, refusal=no)


_attention_maps = register(
    "attention_maps(Tensor q, Tensor k, Tensor? attn_mask, Tensor? lse, bool is_causal, float scale, "
    "ScalarType dtype) -> Tensor",
    _forward,
    fake=_fake,
    autograd=AttentionMapsFunction.apply,
)
_attention_maps_forward = register(
    "attention_maps_forward(Tensor q, Tensor k, Tensor? attn_mask, Tensor? lse, bool is_causal, float scale, "
    "ScalarType dtype) -> Tensor",
    _forward,
    fake=_fake,
)
