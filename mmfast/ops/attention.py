"""`attention`: softmax(q k^T) v, with `F.scaled_dot_product_attention`'s semantics, registration and autograd."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ._attention import (
    MAX_HEAD_DIM,
    attention_torch,
    backward_torch,
    canonical,
    check_arguments,
    facts,
    forward_torch,
    natural_lse,
    new_heads,
)
from ._launchers import launchers
from ._register import differentiable_backward, register

__all__ = ["MAX_HEAD_DIM", "attention", "cost"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    return_lse: bool = False,
) -> Any:
    """Scaled dot-product attention, `softmax(scale * q k^T + mask) v`.

    The same as `F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa)`. Scores,
    softmax and sums are float32. A row whose keys are all masked gives 0.

    Args:
        q: (..., H, Nq, d), float32, float16, bfloat16 or float64, any strides.
        k: (..., H, Nk, d), in q's dtype; leading dimensions of 1 broadcast.
        v: (..., H, Nk, dv), in q's dtype. A kernel serves dv = d.
        attn_mask: broadcastable to (..., H, Nq, Nk); boolean (True attends), or float32 or q's dtype, added to the
            scaled scores. (B, 1, 1, Nk) is key padding.
        dropout_p: rate of dropout of the probabilities, applied whatever the training mode; PyTorch's op serves it.
        is_causal: query i sees keys 0..i (top-left, also where Nq != Nk); together with attn_mask, both hold.
        scale: of the scores, by default 1/sqrt(d).
        enable_gqa: k and v may have fewer heads, of which each serves H / Hk consecutive heads of q.
        return_lse: return (output, lse), lse the natural logarithm of each row's sum of exponentials, (..., H, Nq) in
            float32 (float64 for float64), -inf for a row whose keys are all masked. It has no gradient.

    Returns:
        (..., H, Nq, dv) in q's dtype; in memory heads come after rows, so `.transpose(1, 2).flatten(2)` copies nothing
        (PyTorch's op may choose another order).

    Raises:
        TypeError: an argument is not a tensor, or its dtype does not fit.
        ValueError: a shape, a device, dropout_p or scale does not fit.
        BackendError: a forced backend cannot serve.

    Source: Dao, "FlashAttention-2", arXiv:2307.08691; `torch.nn.functional.scaled_dot_product_attention`.
    """
    check_arguments("attention", q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if not return_lse and (
        backends.torch_serves(q)
        or backends.choose("attention", facts(q, k, v, attn_mask, dropout_p, is_causal)) == "torch"
    ):
        return attention_torch(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if return_lse:
        if dropout_p:
            raise ValueError(f"attention: return_lse needs dropout_p 0, got {dropout_p}")
        if attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled():
            raise ValueError("attention: return_lse needs an attn_mask without gradient, got one that requires it")
        backends.choose("attention", facts(q, k, v, attn_mask, dropout_p, is_causal))
    scale = 1.0 / math.sqrt(max(1, q.shape[-1])) if scale is None else float(scale)
    lead = torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    out, lse = _attention(*canonical(q, k, v, attn_mask), is_causal, scale)
    if q.dim() != 4:
        out = out.reshape(*lead, *out.shape[1:]) if q.dim() > 4 else out.reshape(*q.shape[:-1], v.shape[-1])
    if not return_lse:
        return out
    lse = natural_lse(lse)
    return out, lse.reshape(out.shape[:-1])


def cost(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, backward: bool = False) -> dict[str, int]:
    """Bytes through device memory and FLOPs that the op cannot do without, and its exponentials."""
    pairs = q.shape[:-1].numel() * k.shape[-2]
    if is_causal:
        n, m = q.shape[-2], k.shape[-2]
        full = min(n, m)
        pairs = q.shape[:-2].numel() * (full * (full + 1) // 2 + (n - full) * m)
    # Forward: two products; reads q, k, v and writes o. Backward: five; reads q, k, v, o, do and writes dq, dk, dv.
    moved = (4 if backward else 2) * q.numel() + 2 * (k.numel() + v.numel()) // (1 if backward else 2)
    return {
        "bytes": moved * q.element_size(),
        "flops": (5 if backward else 2) * 2 * pairs * q.shape[-1],
        "exponentials": pairs,
    }


class AttentionFunction(torch.autograd.Function):
    """Autograd of `attention` on four-dimensional tensors: saves the inputs, the output and one statistic a row."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse = _attention_forward(q, k, v, attn_mask, is_causal, scale)
        ctx.save_for_backward(q, k, v, attn_mask, out, lse)
        ctx.is_causal, ctx.scale = is_causal, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, attn_mask, out, lse = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True

            def again(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return forward_torch(q, k, v, attn_mask, ctx.is_causal, ctx.scale)[0]

            found = differentiable_backward(again, (q, k, v), grads[:1], ctx.needs_input_grad[:3])
            return (*found, None, None, None)
        needs = list(ctx.needs_input_grad[:3])
        found = _attention_backward(grads[0], q, k, v, out, lse, attn_mask, ctx.is_causal, ctx.scale, needs)
        return (*(g if need else None for g, need in zip(found, needs, strict=True)), None, None, None)


# What the registered ops run. lse is the base-2 logarithm of a row's sum, (B, H, Nq), or two planes (2, B, H, Nq) that
# add up to it where the mask is added: next to a mask of -1e30 the logarithm of the sum would be rounded away. It is
# +inf where all keys are masked, so that exp2(score - lse) is 0. A gradient that is not wanted is an empty tensor.


def _forward(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    backend = _pick(q, k, v, attn_mask, is_causal)
    if backend == "torch":
        return forward_torch(q, k, v, attn_mask, is_causal, scale)
    precision = backends.product_precision()
    found: tuple[Tensor, Tensor] = launchers(backend, "attention").attention_forward(
        q, k, v, attn_mask, is_causal=is_causal, scale=scale, precision=precision
    )
    return found


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor | None, Tensor | None, Tensor | None]
    backend = _pick(q, k, v, attn_mask, is_causal)
    if backend == "torch":
        found = backward_torch(dout, q, k, v, out, lse, attn_mask, is_causal, scale)
    else:
        found = launchers(backend, "attention").attention_backward(
            dout,
            q,
            k,
            v,
            out,
            lse,
            attn_mask,
            is_causal=is_causal,
            scale=scale,
            precision=backends.product_precision(),
            need_dkv=needs[1] or needs[2],
        )
    dq, dk, dv = (q.new_empty(0) if g is None or not need else g for g, need in zip(found, needs, strict=True))
    return dq, dk, dv


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    planes = (2,) if attn_mask is not None and attn_mask.dtype != torch.bool else ()
    lse = q.new_empty((*planes, *q.shape[:3]), dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    return new_heads(q, q.shape[1], q.shape[2], v.shape[3]), lse


def _backward_fake(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (
        new_heads(x, x.shape[1], x.shape[2], x.shape[3]) if need else x.new_empty(0)
        for x, need in zip((q, k, v), needs, strict=True)
    )
    return dq, dk, dv


def _pick(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool) -> str:
    return backends.pick("attention", facts(q, k, v, attn_mask, 0.0, is_causal))


_attention = register(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? attn_mask, bool is_causal, float scale) -> (Tensor, Tensor)",
    _forward,
    fake=_forward_fake,
    autograd=AttentionFunction.apply,
    autocast="lower_precision",
)
_attention_forward = register(
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? attn_mask, bool is_causal, float scale)"
    " -> (Tensor, Tensor)",
    _forward,
    fake=_forward_fake,
)
_attention_backward = register(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? attn_mask, "
    "bool is_causal, float scale, bool[3] needs) -> (Tensor, Tensor, Tensor)",
    _backward,
    fake=_backward_fake,
)
