"""`attention_varlen`: attention of a ragged batch, its sequences packed one after another without padding."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ._attention import check_options, refusal
from ._attention_varlen_torch import (
    attention_varlen_torch,
    backward_varlen_torch,
    forward_varlen_torch,
    lengths,
)
from ._register import autocasts, differentiable_backward, register, stats_dtype
from ._validate import check_tensor

OP = "attention_varlen"


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
    """Attention within each sequence of a packed batch, as NaFlex and NaViT have it: `softmax(scale * q k^T) v`.

    Sequence b has the queries cu_seqlens_q[b] .. cu_seqlens_q[b + 1] - 1, and its keys likewise. The same as
    flash_attn's `flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, causal=is_causal,
    softmax_scale=scale)`. No length is read by the host where a kernel serves.

    `is_causal` is aligned at the bottom right, as flash_attn's is and `attention`'s is not: of n_q queries and n_k
    keys, query i sees key j where j <= i + n_k - n_q: the last query sees all keys. For n_q = n_k both are the same.

    Args:
        q: (total_q, H, d), float32, float16, bfloat16 or float64, any strides.
        k: (total_k, Hk, d), in q's dtype; each of its heads serves H / Hk consecutive ones of q.
        v: like k. Views of packed projections (total, 3, H, d) are read where they lie.
        cu_seqlens_q: (B + 1,) int32 on q's device, from 0, not decreasing, the last at most total_q. A sequence may be
            empty; rows beyond the last sequence are padding of the buffer.
        cu_seqlens_k: the same of the keys.
        max_q: the longest sequence of queries, or more.
        max_k: the longest sequence of keys, or more.
        is_causal: see above.
        scale: of the scores, by default 1/sqrt(d).

    Returns:
        (total_q, H, d) in q's dtype, contiguous. Rows without a key are 0: of a sequence without keys, the first
        n_q - n_k of a causal one with fewer keys than queries, and padding, whose gradient is 0 as well.

    Raises:
        TypeError: an argument is not a tensor or an integer, or its dtype does not fit.
        ValueError: a shape, a device or scale does not fit; for CPU tensors also where the values of cu_seqlens or
            max_q and max_k do not. On a GPU that would need a host synchronisation, and they are trusted.
        BackendError: a forced backend cannot serve.

    Source: Dao, "FlashAttention-2", arXiv:2307.08691; Dehghani et al., "Patch n' Pack: NaViT", arXiv:2307.06304.
    """
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale)
    readable = _readable(cu_seqlens_q) and _readable(cu_seqlens_k)
    if readable and q.is_cpu:
        _check_lengths("q", cu_seqlens_q, q.shape[0], max_q)
        _check_lengths("k", cu_seqlens_k, k.shape[0], max_k)
    if autocasts(q.device) and q.dtype != torch.float64:
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    scale = 1.0 / math.sqrt(max(1, q.shape[-1])) if scale is None else float(scale)
    if (backends.torch_serves(q) or backends.choose(OP, _facts(q, k)) == "torch") and readable:
        return attention_varlen_torch(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, is_causal, scale)
    return _attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, is_causal, scale)[0]


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float | None,
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(OP, name, x)
        if x.dim() != 3:
            expected = "(total_q, H, d)" if x is q else "(total_k, Hk, d)"
            raise ValueError(f"{OP}: {name} must have shape {expected}, got {tuple(x.shape)}")
        if x.device != q.device:
            raise ValueError(f"{OP}: {name} must be on {q.device} like q, got {x.device}")
        if x.dtype != q.dtype and not autocasts(q.device):
            raise TypeError(f"{OP}: {name} must be {q.dtype} like q, got {x.dtype}")
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"{OP}: k must have head_dim {q.shape[2]} like q, got {k.shape[2]}")
    if v.shape != k.shape:
        raise ValueError(f"{OP}: v must have shape {tuple(k.shape)} like k, got {tuple(v.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{OP}: k's heads must divide q's {q.shape[1]}, got {k.shape[1]}")
    for name, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if not isinstance(cu_seqlens, Tensor):
            raise TypeError(f"{OP}: {name} must be a tensor, got {type(cu_seqlens).__name__}")
        if cu_seqlens.dtype != torch.int32:
            raise TypeError(f"{OP}: {name} must be torch.int32, got {cu_seqlens.dtype}")
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
            raise ValueError(f"{OP}: {name} must have shape (B + 1,), got {tuple(cu_seqlens.shape)}")
        if cu_seqlens.device != q.device:
            raise ValueError(f"{OP}: {name} must be on {q.device} like q, got {cu_seqlens.device}")
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        expected = f"shape {tuple(cu_seqlens_q.shape)} like cu_seqlens_q"
        raise ValueError(f"{OP}: cu_seqlens_k must have {expected}, got {tuple(cu_seqlens_k.shape)}")
    for name, longest in (("max_q", max_q), ("max_k", max_k)):
        if not isinstance(longest, (int, torch.SymInt)) or isinstance(longest, bool):
            raise TypeError(f"{OP}: {name} must be an integer, got {type(longest).__name__}")
        if longest < 0:
            raise ValueError(f"{OP}: {name} must be at least 0, got {longest}")
    check_options(OP, 0.0, scale)


def _check_lengths(side: str, cu_seqlens: Tensor, total: int, longest: int) -> None:
    """Raise unless the values of a CPU tensor describe sequences of at most `longest` in `total` rows."""
    found = cu_seqlens.tolist()
    name = f"cu_seqlens_{side}"
    if found[0] != 0:
        raise ValueError(f"{OP}: {name} must start with 0, got {found[0]}")
    if found[-1] > total:
        raise ValueError(f"{OP}: {name} must end with at most the {total} rows of {side}, got {found[-1]}")
    for index, length in enumerate(lengths(found)):
        if length < 0:
            raise ValueError(f"{OP}: {name} must not decrease, got {found[index + 1]} after {found[index]}")
        if length > longest:
            raise ValueError(
                f"{OP}: max_{side} must be at least {length}, the length of sequence {index}, got {longest}"
            )


def _readable(cu_seqlens: Tensor) -> bool:
    """Whether the host can read values: not while compiling or exporting, nor of a fake or a meta tensor."""
    return type(cu_seqlens) is Tensor and not cu_seqlens.is_meta and not torch.compiler.is_compiling()


class AttentionVarlenFunction(torch.autograd.Function):
    """Autograd of `attention_varlen`: saves the inputs, the output and one statistic a row."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_q: int,
        max_k: int,
        is_causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        options = (max_q, max_k, is_causal, scale)
        out, lse = _attention_varlen_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, *options)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k)
        ctx.options = options
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        if torch.is_grad_enabled():  # create_graph=True

            def again(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return forward_varlen_torch(q, k, v, cu_seqlens_q, cu_seqlens_k, *ctx.options[2:])[0]

            found = differentiable_backward(again, (q, k, v), grads[:1], tuple(needs))
        else:
            found = _attention_varlen_backward(
                grads[0], q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, *ctx.options, needs
            )
        return (*(g if need else None for g, need in zip(found, needs, strict=True)), *(None,) * 6)


# What the registered ops run. lse is `attention`'s of each row, (H, total_q); a gradient that is not wanted is empty.


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    if backends.pick(OP, _facts(q, k)) == "torch":
        return forward_varlen_torch(q, k, v, cu_seqlens_q, cu_seqlens_k, is_causal, scale)
    from ..kernels.attention_varlen import attention_varlen_forward

    options: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "precision": backends.product_precision()}
    return attention_varlen_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, **options)


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor | None, ...]
    if backends.pick(OP, _facts(q, k)) == "torch":
        found = backward_varlen_torch(dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, is_causal, scale)
    else:
        from ..kernels.attention_varlen import attention_varlen_backward

        found = attention_varlen_backward(
            dout,
            q,
            k,
            v,
            out,
            lse,
            cu_seqlens_q,
            cu_seqlens_k,
            max_q,
            max_k,
            is_causal=is_causal,
            scale=scale,
            precision=backends.product_precision(),
            need_dkv=needs[1] or needs[2],
        )
    dq, dk, dv = (q.new_empty(0) if g is None or not need else g for g, need in zip(found, needs, strict=True))
    return dq, dk, dv


def _facts(q: Tensor, k: Tensor) -> backends.Facts:
    """What the choice of a backend looks at: not the lengths, since no library is better at short sequences."""
    width = q.shape[2]
    return backends.Facts(q.device, q.dtype, width, refusal=refusal(width, width, None, 0.0, q.numel() and k.numel()))


def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=stats_dtype(q))


def _backward_fake(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape if need else 0) for x, need in zip((q, k, v), needs, strict=True))
    return dq, dk, dv


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, {}Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_q, SymInt max_k, "
    "bool is_causal, float scale"
)
_attention_varlen = register(
    f"attention_varlen({_ARGUMENTS.format('')}) -> (Tensor, Tensor)",
    _forward,
    fake=_forward_fake,
    autograd=AttentionVarlenFunction.apply,
    autocast="lower_precision",
)
_attention_varlen_forward = register(
    f"attention_varlen_forward({_ARGUMENTS.format('')}) -> (Tensor, Tensor)", _forward, fake=_forward_fake
)
_attention_varlen_backward = register(
    f"attention_varlen_backward(Tensor dout, {_ARGUMENTS.format('Tensor out, Tensor lse, ')}, bool[3] needs)"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    fake=_backward_fake,
)
