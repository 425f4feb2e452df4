"""The backward of attention by csrc/attention_backward.cu: one kernel for dq, dk and dv, and a second one for parts."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ._common import current, dtype_code, extension, pointer, programs


class Plan(NamedTuple):
    """How the work is cut; csrc/attention.h has the rule, `attention_backward_plan`."""

    chunk_bands: int  # bands of 16 keys that a block holds at once
    split_bands: int  # of those that it has in all
    key_splits: int = 1  # blocks that share the keys of a head
    query_splits: int = 1  # blocks that share its queries


_limits: dict[int, int] = {}
"""Bytes of shared memory that a block may have, by device."""


@lru_cache(maxsize=256)
def backward_plan(heads_kv: int, group: int, n_q: int, n_k: int, head_dim: int, processors: int, limit: int) -> Plan:
    """The rule for `heads_kv` heads of k (over the batch) with `group` heads of q each, on a machine of so many
    multiprocessors whose blocks may have `limit` bytes of shared memory."""
    return Plan(*extension().attention_backward_plan(heads_kv, group, n_q, n_k, head_dim, processors, limit))


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    *,
    is_causal: bool,
    scale: float,
    precision: str = "ieee",
    need_dkv: bool = True,
    grads: tuple[Tensor, Tensor, Tensor] | None = None,
    plan: tuple[int, int, int, int] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dq, dk and dv, the last two None where not wanted, for tensors and lse as `attention_forward`'s.

    `grads`, whose rows are aligned to 16 bytes, is where to write; otherwise their memory has the heads after the rows.
    `plan` is a `Plan` instead of the rule's; `precision` says nothing here.
    """
    if attn_mask is not None or is_causal:
        raise ValueError("attention_backward: the CUDA C++ kernel serves no mask and is not causal")
    batch, heads, n_q, head_dim = q.shape
    _, kv_heads, n_k, _ = k.shape
    dk: Tensor | None = None
    dv: Tensor | None = None
    if grads is not None:
        dq = grads[0]
        dk, dv = grads[1:] if need_dkv else (None, None)
    else:
        dq = _new_heads(q, batch, heads, n_q, head_dim)
        if need_dkv:
            dk = _new_heads(q, batch, kv_heads, n_k, head_dim)
            dv = _new_heads(q, batch, kv_heads, n_k, head_dim)
    dout, q, k, v, out = aligned(dout), aligned(q), aligned(k), aligned(v), aligned(out)
    kernels = extension()
    device, stream = current(q)
    if plan is None:
        limit = _limits.get(device)
        if limit is None:
            limit = _limits[device] = kernels.shared_limit(device)
        plan = backward_plan(batch * kv_heads, heads // kv_heads, n_q, n_k, head_dim, programs(q, 1), limit)
    chunk_bands, _, key_splits, query_splits = plan
    dq_parts = dkv_parts = None
    if key_splits > 1 or chunk_bands * 16 < n_k:
        dq_parts = torch.empty((key_splits, batch, heads, n_q, head_dim), dtype=torch.float32, device=q.device)
    if query_splits > 1 and need_dkv:
        dkv_parts = torch.empty((query_splits, 2, batch, kv_heads, n_k, head_dim), dtype=torch.float32, device=q.device)
    kernels.attention_backward(
        dout.data_ptr(),
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        out.data_ptr(),
        lse.data_ptr(),
        dq.data_ptr(),
        pointer(dk),
        pointer(dv),
        pointer(dq_parts),
        pointer(dkv_parts),
        batch,
        heads,
        kv_heads,
        n_q,
        n_k,
        head_dim,
        dout.stride(),
        q.stride(),
        k.stride(),
        v.stride(),
        out.stride(),
        dq.stride(),
        (k if dk is None else dk).stride(),
        (v if dv is None else dv).stride(),
        scale,
        plan,
        dtype_code(q),
        device,
        stream,
    )
    return dq, dk, dv


def _new_heads(like: Tensor, batch: int, heads: int, rows: int, width: int) -> Tensor:
    """An empty (B, H, N, d) whose memory has the heads after the rows."""
    return torch.empty((batch, rows, heads, width), dtype=like.dtype, device=like.device).transpose(1, 2)


def aligned(x: Tensor) -> Tensor:
    """x (B, H, N, d) where every row begins at a multiple of 16 bytes and columns are one apart; else a copy."""
    batch, head, row, column = x.stride()
    if column == 1 and not ((batch | head | row) & 7 or x.data_ptr() & 15):
        return x
    return x.clone(memory_format=torch.contiguous_format)
