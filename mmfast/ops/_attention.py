"""What the attention ops share: checks, facts for the choice of a backend, and their torch backend."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ._register import autocasts, stats_dtype
from ._validate import check_tensor

MAX_HEAD_DIM = 256
LN2 = math.log(2.0)


def check_arguments(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> None:
    """Raise TypeError or ValueError unless the arguments are those of one attention."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(op, name, x)
        if x.dim() < 2 or x.dim() != q.dim():
            least = "at least 2 dimensions" if x is q else f"{q.dim()} dimensions like q"
            raise ValueError(f"{op}: {name} must have {least}, got {tuple(x.shape)}")
        if x.device != q.device:
            raise ValueError(f"{op}: {name} must be on {q.device} like q, got {x.device}")
        if x.dtype != q.dtype and not autocasts(q.device):
            raise TypeError(f"{op}: {name} must be {q.dtype} like q, got {x.dtype}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"{op}: k must have head_dim {q.shape[-1]} like q, got {k.shape[-1]}")
    if v.shape[-2] != k.shape[-2]:
        raise ValueError(f"{op}: v must have {k.shape[-2]} rows like k, got {v.shape[-2]}")
    grouped = 0
    if enable_gqa and q.dim() >= 3:
        grouped = 1
        heads, kv_heads = q.shape[-3], k.shape[-3]
        if v.shape[-3] != kv_heads or kv_heads == 0 or heads % kv_heads:
            raise ValueError(
                f"{op}: enable_gqa needs k and v with one number of heads that divides q's {heads}, "
                f"got {kv_heads} and {v.shape[-3]}"
            )
    for name, x in (("k", k), ("v", v)):
        for index in range(q.dim() - 2 - grouped):
            if x.shape[index] != q.shape[index] and 1 not in (x.shape[index], q.shape[index]):
                raise ValueError(
                    f"{op}: {name} must have leading dimensions that broadcast with q's {tuple(q.shape[:-2])}, "
                    f"got {tuple(x.shape[:-2])}"
                )
    check_options(op, dropout_p, scale)
    if attn_mask is not None:
        check_mask(op, attn_mask, q, (*q.shape[:-1], k.shape[-2]))


def check_options(op: str, dropout_p: float, scale: float | None) -> None:
    """Raise unless dropout_p is a rate and scale a finite number or None."""
    if not isinstance(dropout_p, (float, int)) or not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{op}: dropout_p must be between 0 and 1, got {dropout_p!r}")
    if scale is not None and not (isinstance(scale, (float, int)) and math.isfinite(scale)):
        raise ValueError(f"{op}: scale must be a finite number or None, got {scale!r}")


def check_mask(op: str, attn_mask: object, q: Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless `attn_mask` is boolean, float32 or q's dtype, on q's device, and broadcasts to `shape`."""
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"{op}: attn_mask must be a tensor or None, got {type(attn_mask).__name__}")
    autocast = autocasts(q.device) and attn_mask.is_floating_point()
    if attn_mask.dtype not in (torch.bool, torch.float32, q.dtype) and not autocast:
        raise TypeError(f"{op}: attn_mask must be torch.bool, torch.float32 or {q.dtype}, got {attn_mask.dtype}")
    if attn_mask.device != q.device:
        raise ValueError(f"{op}: attn_mask must be on {q.device} like q, got {attn_mask.device}")
    fits = 2 <= attn_mask.dim() <= len(shape) and all(
        n in (1, m) for n, m in zip(reversed(attn_mask.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(f"{op}: attn_mask must broadcast to {shape}, got {tuple(attn_mask.shape)}")


def facts(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool = False
) -> backends.Facts:
    """What the choice of a backend looks at."""
    return backends.Facts(
        q.device,
        _compute_dtype(q),
        q.shape[-1],
        q.shape[-2],
        k.shape[-2],
        refusal(q.shape[-1], v.shape[-1], attn_mask, dropout_p, q.numel() and k.numel()),
        no_cuda(attn_mask, is_causal),
    )


def refusal(width: int, width_v: int, attn_mask: Tensor | None, dropout_p: float, elements: int) -> str | None:
    """Why no kernel can serve an attention, or None."""
    if dropout_p:
        return "dropout of the probabilities"
    if attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled():
        return "gradient of attn_mask"
    if width_v != width:
        return f"values of width {width_v} beside keys of width {width}"
    if width > MAX_HEAD_DIM:
        return f"head_dim {width} is above {MAX_HEAD_DIM}"
    if attn_mask is not None and width > 128:
        return f"a mask beside head_dim {width}, above 128"
    return None if elements else "empty tensors"


def no_cuda(attn_mask: Tensor | None, is_causal: bool) -> str | None:
    """Why the CUDA C++ kernels cannot serve an attention that a Triton kernel may, or None."""
    if attn_mask is not None:
        return "a mask"
    return "causal attention" if is_causal else None


def _compute_dtype(q: Tensor) -> torch.dtype:
    if autocasts(q.device) and q.dtype != torch.float64:
        return torch.get_autocast_dtype(q.device.type)
    return q.dtype


def canonical(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return views with four dimensions, (B, H, N, d), batches and heads broadcast, and a mask of as many."""
    lead = torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    if q.dim() >= 3:
        heads = [x.shape[-3] for x in (q, k, v)]
        if 1 in heads and heads[1] == heads[2] * heads[1] // max(1, heads[2]):
            most = max(heads)
            heads = [most if n == 1 and max(heads) > 1 else n for n in heads]
        q, k, v = (x.expand(*lead, n, *x.shape[-2:]) for x, n in zip((q, k, v), heads, strict=True))
    if attn_mask is not None and q.dim() > 4:
        attn_mask = attn_mask.expand(*lead, *attn_mask.shape[-3:]) if attn_mask.dim() > 3 else attn_mask
    return _four(q), _four(k), _four(v), attn_mask if attn_mask is None else _four(attn_mask)


def _four(x: Tensor) -> Tensor:
    while x.dim() < 4:
        x = x.unsqueeze(0)
    return x if x.dim() == 4 else x.flatten(0, -4)


def new_heads(like: Tensor, heads: int, rows: int, width: int) -> Tensor:
    """An empty (B, heads, rows, width) whose memory has the heads after the rows."""
    return like.new_empty((like.shape[0], rows, heads, width)).transpose(1, 2)


def natural_lse(lse: Tensor) -> Tensor:
    """The natural logarithm of what the registered ops return in base 2, -inf for a row without keys."""
    if lse.dim() == 4:
        lse = lse.sum(0)
    lse = lse * LN2
    return torch.where(lse == math.inf, -math.inf, lse)


def attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """The torch backend: PyTorch's own op, which picks cuDNN, FlashAttention, or its C++ kernels."""
    if attn_mask is not None and is_causal:  # older releases refuse both
        visible = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        added = attn_mask.dtype != torch.bool
        attn_mask = attn_mask.masked_fill(~visible, -math.inf) if added else attn_mask & visible
        is_causal = False
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, q.dtype):
        attn_mask = attn_mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


# The registered ops' torch backend, for (B, H, N, d) and with statistics.


def forward_torch(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and lse, in plain torch ops that can be differentiated."""
    shift, log_sum, p = _probabilities(q, k, attn_mask, is_causal, scale)
    out = (p @ _repeat(v, q).to(p.dtype)).to(q.dtype)
    result = new_heads(q, q.shape[1], q.shape[2], v.shape[3]) if not out.requires_grad else None
    out = out if result is None else result.copy_(out)
    two_planes = attn_mask is not None and attn_mask.dtype != torch.bool
    lse = torch.stack((shift, log_sum)) if two_planes else shift + log_sum
    return out, lse.detach()


def backward_torch(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward_torch`."""
    p = _probabilities(q, k, attn_mask, is_causal, scale)[2]
    dout, heads = dout.to(p.dtype), k.shape[1]
    dp = dout @ _repeat(v, q).to(p.dtype).mT
    ds = p * (dp - (dout * out).sum(-1, keepdim=True)) * scale
    dq = ds @ _repeat(k, q).to(p.dtype)
    dk, dv = ds.mT @ q.to(p.dtype), p.mT @ dout
    if heads != q.shape[1]:
        dk, dv = (x.unflatten(1, (heads, -1)).sum(2) for x in (dk, dv))
    found = []
    for x, g in ((q, dq), (k, dk), (v, dv)):
        found.append(new_heads(x, x.shape[1], x.shape[2], x.shape[3]).copy_(g))
    return found[0], found[1], found[2]


def _probabilities(
    q: Tensor, k: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Base-2 maximum and logarithm of the sum of each row, and the probabilities, 0 in a row without keys."""
    dtype = stats_dtype(q)
    scores = (q.to(dtype) * scale) @ _repeat(k, q).to(dtype).mT
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1), -math.inf)
    if not scores.shape[-1]:
        empty = scores.sum(-1)
        return empty + math.inf, empty, scores
    highest = scores.amax(-1, keepdim=True).detach()
    none = highest == -math.inf
    p = (scores - highest.masked_fill(none, 0.0)).exp()
    total = p.sum(-1, keepdim=True)
    shift = (highest / LN2).masked_fill(none, math.inf)
    return shift[..., 0], total.masked_fill(none, 1.0).log2()[..., 0], p / total.masked_fill(none, 1.0)


def _repeat(kv: Tensor, q: Tensor) -> Tensor:
    return kv if kv.shape[1] == q.shape[1] else kv.repeat_interleave(q.shape[1] // kv.shape[1], dim=1)
