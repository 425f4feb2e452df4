"""`attention_qkv`: self-attention of packed projections, without a transpose or a copy either way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ._attention import attention_torch, backward_torch, check_mask, check_options, forward_torch, no_cuda, refusal
from ._launchers import launchers
from ._register import autocasts, differentiable_backward, register
from ._validate import check_tensor


def attention_qkv(
    qkv: Tensor,
    num_heads: int,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Self-attention of packed projections: `attention` of the H heads of q, k, v, with the heads side by side.

    The kernels read q, k and v where they lie in qkv, write the output as the next linear layer takes it, and write
    one packed gradient.

    Args:
        qkv: (B, N, 3 * H * d), the q of all heads, then k, then v (timm, open_clip, torch.nn's in_proj); float32,
            float16, bfloat16 or float64, any strides.
        num_heads: H.
        attn_mask: broadcastable to (B, H, N, N), as in `attention`.
        dropout_p: as in `attention`.
        is_causal: as in `attention`.
        scale: as in `attention`.

    Returns:
        (B, N, H * d) in qkv's dtype, contiguous.

    Raises:
        TypeError: an argument is not a tensor, or its dtype does not fit.
        ValueError: a shape, a device, num_heads, dropout_p or scale does not fit.
        BackendError: a forced backend cannot serve.

    Source: the attention between `qkv` and `proj` in timm's `Attention`.
    """
    check_tensor("attention_qkv", "qkv", qkv)
    if not isinstance(num_heads, int) or isinstance(num_heads, bool) or num_heads < 1:
        raise ValueError(f"attention_qkv: num_heads must be a positive integer, got {num_heads!r}")
    if qkv.dim() != 3 or qkv.shape[-1] % (3 * num_heads):
        expected = f"(B, N, 3 * {num_heads} * d)"
        raise ValueError(f"attention_qkv: qkv must have shape {expected}, got {tuple(qkv.shape)}")
    check_options("attention_qkv", dropout_p, scale)
    if attn_mask is not None:
        batch, length, _ = qkv.shape
        check_mask("attention_qkv", attn_mask, qkv, (batch, num_heads, length, length))
    if (
        backends.torch_serves(qkv)
        or backends.choose("attention_qkv", _facts(qkv, num_heads, attn_mask, dropout_p, is_causal)) == "torch"
    ):
        return attention_qkv_torch(qkv, num_heads, attn_mask, dropout_p, is_causal, scale)
    if attn_mask is not None:
        while attn_mask.dim() < 4:
            attn_mask = attn_mask.unsqueeze(0)
    scale = _width(qkv, num_heads) ** -0.5 if scale is None else float(scale)
    return _attention_qkv(qkv, num_heads, attn_mask, is_causal, scale)[0]


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views q, k, v, each (B, H, N, d), of packed projections (B, N, 3 * H * d)."""
    q, k, v = qkv.unflatten(-1, (3, num_heads, _width(qkv, num_heads))).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def attention_qkv_torch(
    qkv: Tensor,
    num_heads: int,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The torch backend: PyTorch's own attention of the three views."""
    q, k, v = split_heads(qkv, num_heads)
    out = attention_torch(q, k, v, attn_mask, dropout_p, is_causal, scale, False)
    return out.transpose(1, 2).reshape(qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3)


class AttentionQkvFunction(torch.autograd.Function):
    """Autograd of `attention_qkv`: saves the input, the output and one statistic a row."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, num_heads: int, attn_mask: Tensor | None, is_causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse = _attention_qkv_forward(qkv, num_heads, attn_mask, is_causal, scale)
        ctx.save_for_backward(qkv, attn_mask, out, lse)
        ctx.num_heads, ctx.is_causal, ctx.scale = num_heads, is_causal, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv, attn_mask, out, lse = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True

            def again(qkv: Tensor) -> Tensor:
                out = forward_torch(*split_heads(qkv, ctx.num_heads), attn_mask, ctx.is_causal, ctx.scale)[0]
                return out.transpose(1, 2).flatten(2)

            return (*differentiable_backward(again, (qkv,), grads[:1], (True,)), None, None, None, None)
        found = _attention_qkv_backward(grads[0], qkv, ctx.num_heads, out, lse, attn_mask, ctx.is_causal, ctx.scale)
        return found, None, None, None, None


# What the registered ops run; lse as in `attention`.


def _forward(
    qkv: Tensor, num_heads: int, attn_mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    backend = _pick(qkv, num_heads, attn_mask, is_causal)
    if backend == "torch":
        out, lse = forward_torch(*split_heads(qkv, num_heads), attn_mask, is_causal, scale)
        return out.transpose(1, 2).flatten(2), lse
    found: tuple[Tensor, Tensor] = launchers(backend, "attention_qkv").attention_qkv_forward(
        qkv, num_heads, attn_mask, is_causal=is_causal, scale=scale, precision=backends.product_precision()
    )
    return found


def _backward(
    dout: Tensor,
    qkv: Tensor,
    num_heads: int,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    backend = _pick(qkv, num_heads, attn_mask, is_causal)
    if backend == "torch":
        dout, out = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (dout, out))
        q, k, v = split_heads(qkv, num_heads)
        found = backward_torch(dout, q, k, v, out, lse, attn_mask, is_causal, scale)
        return torch.cat([g.transpose(1, 2).flatten(2) for g in found], dim=-1)
    precision = backends.product_precision()
    dqkv: Tensor = launchers(backend, "attention_qkv").attention_qkv_backward(
        dout, qkv, num_heads, out, lse, attn_mask, is_causal=is_causal, scale=scale, precision=precision
    )
    return dqkv


def _forward_fake(
    qkv: Tensor, num_heads: int, attn_mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    batch, length, width = qkv.shape
    planes = (2,) if attn_mask is not None and attn_mask.dtype != torch.bool else ()
    dtype = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    return qkv.new_empty(batch, length, width // 3), qkv.new_empty((*planes, batch, num_heads, length), dtype=dtype)


def _width(qkv: Tensor, num_heads: int) -> int:
    return qkv.shape[-1] // (3 * num_heads)


def _facts(qkv: Tensor, num_heads: int, attn_mask: Tensor | None, dropout_p: float, is_causal: bool) -> backends.Facts:
    width = _width(qkv, num_heads)
    dtype = qkv.dtype
    if autocasts(qkv.device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(qkv.device.type)
    no = refusal(width, width, attn_mask, dropout_p, qkv.numel())
    length = qkv.shape[1]
    return backends.Facts(qkv.device, dtype, width, length, length, no, no_cuda(attn_mask, is_causal))


def _pick(qkv: Tensor, num_heads: int, attn_mask: Tensor | None, is_causal: bool) -> str:
    return backends.pick("attention_qkv", _facts(qkv, num_heads, attn_mask, 0.0, is_causal))


_attention_qkv = register(
    "attention_qkv(Tensor qkv, int num_heads, Tensor? attn_mask, bool is_causal, float scale) -> (Tensor, Tensor)",
    _forward,
    fake=_forward_fake,
    autograd=AttentionQkvFunction.apply,
    autocast="lower_precision",
)
_attention_qkv_forward = register(
    "attention_qkv_forward(Tensor qkv, int num_heads, Tensor? attn_mask, bool is_causal, float scale)"
    " -> (Tensor, Tensor)",
    _forward,
    fake=_forward_fake,
)
_attention_qkv_backward = register(
    "attention_qkv_backward(Tensor dout, Tensor qkv, int num_heads, Tensor out, Tensor lse, Tensor? attn_mask, "
    "bool is_causal, float scale) -> Tensor",
    _backward,
    fake=lambda dout, qkv, num_heads, out, lse, attn_mask, is_causal, scale: qkv.new_empty(qkv.shape),
)
