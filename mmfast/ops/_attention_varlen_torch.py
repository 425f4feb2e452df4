"""The torch backend of `attention_varlen`: one sequence after the other, or PyTorch's own op for all on a GPU."""

from __future__ import annotations

import inspect
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ._attention import MAX_HEAD_DIM, backward_torch, forward_torch


def attention_varlen_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """The torch backend: PyTorch's attention of each sequence, or its FlashAttention of all of them on a GPU."""
    if _flash_serves(q):
        return _flash(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, is_causal, scale)
    outs = []
    group = q.shape[1] // k.shape[1]
    for q_i, k_i, v_i, hidden in _sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, is_causal):
        if k_i.shape[2] == 0:  # zeros from empty sums; PyTorch's attention would let a NaN of padding through
            no_keys, no_values = (x.repeat_interleave(group, dim=1) for x in (k_i, v_i))
            out = (q_i @ no_keys.mT) @ no_values
        else:
            square = hidden is not None and hidden.shape[0] == hidden.shape[1]
            attn_mask = None if square or hidden is None else ~hidden
            gqa = {"enable_gqa": True} if group > 1 else {}
            out = F.scaled_dot_product_attention(q_i, k_i, v_i, attn_mask, is_causal=square, scale=scale, **gqa)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


def _sequences(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, is_causal: bool
) -> list[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Views q, k, v of each sequence, (1, H, n, d), and which pairs a causal one hides; q of all are the rows of q.

    Queries that see no key, the first of a causal sequence with fewer keys than queries and the padding of the
    buffer, are sequences of their own without keys.
    """
    lengths_q, lengths_k = lengths(cu_seqlens_q.tolist()), lengths(cu_seqlens_k.tolist())
    pairs = []
    for n_q, n_k in zip(lengths_q, lengths_k, strict=True):
        if is_causal and n_q > n_k:
            pairs.append((n_q - n_k, 0))
            n_q = n_k
        pairs.append((n_q, n_k))
    padding = q.shape[0] - sum(lengths_q)
    if padding or not pairs:
        pairs.append((padding, 0))
    split_q = q.split([n_q for n_q, _ in pairs])
    rest = k.shape[0] - sum(lengths_k)
    split_k, split_v = (x.split([*(n_k for _, n_k in pairs), rest])[:-1] for x in (k, v))
    hidden = [
        torch.ones(n_q, n_k, dtype=torch.bool, device=q.device).triu(n_k - n_q + 1) if is_causal and n_k else None
        for n_q, n_k in pairs
    ]
    heads = ([x.transpose(0, 1).unsqueeze(0) for x in xs] for xs in (split_q, split_k, split_v))
    return list(zip(*heads, hidden, strict=True))


def lengths(cu_seqlens: list[int]) -> list[int]:
    """Of the sequences."""
    return [end - start for start, end in pairwise(cu_seqlens)]


@cache
def _varlen_attn() -> Any:
    """PyTorch's varlen_attn where it takes what is needed here: a scale, causal as a window, fewer heads of k."""
    try:
        from torch.nn.attention import varlen
    except ImportError:
        return None
    needed = {"scale", "window_size", "enable_gqa"}
    return varlen.varlen_attn if needed <= set(inspect.signature(varlen.varlen_attn).parameters) else None


def _flash_serves(q: Tensor) -> bool:
    return (
        q.is_cuda
        and q.dtype in (torch.float16, torch.bfloat16)
        and 0 < q.shape[2] <= MAX_HEAD_DIM
        and q.shape[2] % 8 == 0
        and q.numel() > 0
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and torch.version.hip is None
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
        and _varlen_attn() is not None
    )


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """`varlen_attn`, which leaves rows of padding and their gradients as they happen to be, with zeros there."""
    row = torch.arange(max(q.shape[0], k.shape[0]), device=q.device)[:, None, None]
    inside_q, inside_k = row[: q.shape[0]] < cu_seqlens_q[-1], row[: k.shape[0]] < cu_seqlens_k[-1]
    zero = q.new_zeros(())
    out = _varlen_attn()(
        torch.where(inside_q, q, zero),
        torch.where(inside_k, k, zero),
        torch.where(inside_k, v, zero),
        cu_seqlens_q,
        cu_seqlens_k,
        max(1, max_q),
        max(1, max_k),
        scale=scale,
        window_size=(-1, 0 if is_causal else -1),
        enable_gqa=k.shape[1] != q.shape[1],
    )
    return torch.where(inside_q, out, zero)


# For the registered ops, with statistics.


def forward_varlen_torch(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and lse, in plain torch ops that can be differentiated."""
    found = [
        forward_torch(q_i, k_i, v_i, None if hidden is None else ~hidden, False, scale)
        for q_i, k_i, v_i, hidden in _sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, is_causal)
    ]
    return torch.cat([out[0].transpose(0, 1) for out, _ in found]), torch.cat([lse[0] for _, lse in found], dim=1)


def backward_varlen_torch(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward_varlen_torch`."""
    sequences = _sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, is_causal)
    sizes = [q_i.shape[2] for q_i, *_ in sequences]
    douts, outs = ([y.transpose(0, 1).unsqueeze(0) for y in x.split(sizes)] for x in (dout, out))
    lses = lse.unsqueeze(0).split(sizes, dim=2)
    found = [
        backward_torch(dout_i, q_i, k_i, v_i, out_i, lse_i, None if hidden is None else ~hidden, False, scale)
        for (q_i, k_i, v_i, hidden), dout_i, out_i, lse_i in zip(sequences, douts, outs, lses, strict=True)
    ]
    dq, dk, dv = (torch.cat([g[0].transpose(0, 1) for g in side]) for side in zip(*found, strict=True))
    rest = k.shape[0] - dk.shape[0]
    if rest:
        dk, dv = (F.pad(g, (0, 0, 0, 0, 0, rest)) for g in (dk, dv))
    return dq, dk, dv
