"""Attention of learned queries, the same for each sample, as `torch.nn.MultiheadAttention` has it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.activation import any_global_hook
from ._attention import attend, split_heads
from ._swap import called, multiplies, plain_tensor
from .torch_nn import MultiheadAttention


def refuses_probe(attn: Any) -> str | None:
    """Why `attend_from` cannot stand in for this attention, or None."""
    reason = called(attn, nn.MultiheadAttention, MultiheadAttention)
    if reason is not None:
        return reason
    if not attn.batch_first:
        return "has the sequence first"
    return "has keys and values of two widths" if attn.kdim != attn.vdim else MultiheadAttention.refuses(attn)


def attend_from(attn: Any, probe: Tensor, x: Tensor) -> Tensor | None:
    """`attn(probe, x, x)` without weights: (B, n, E) of probe (n, E) and x (B, N, kdim), or None where it is called.

    The queries are projected once, not once a sample.
    """
    if refuses_probe(attn) is not None or any_global_hook() or (attn.training and attn.dropout > 0.0):
        return None
    if not (plain_tensor(x) and plain_tensor(probe) and x.dim() == 3 and x.shape[-1] == attn.kdim and x.numel()):
        return None
    if probe.dim() != 2 or probe.shape[1] != attn.embed_dim:
        return None
    if probe.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        return None
    width = attn.embed_dim
    if attn._qkv_same_embed_dim:
        sizes = [width, 2 * width]
        weights = attn.in_proj_weight.split(sizes)
    else:
        sizes = [width] * 3
        weights = (attn.q_proj_weight, attn.k_proj_weight, attn.v_proj_weight)
    biases: Any = [None] * 3 if attn.in_proj_bias is None else attn.in_proj_bias.split(sizes)
    pairs = list(zip(weights, biases, strict=False))
    out_proj = attn.out_proj
    if not (multiplies(probe, *pairs[0]) and all(multiplies(x, *pair) for pair in pairs[1:])):
        return None
    if not multiplies(x, out_proj.weight, out_proj.bias):
        return None
    q = F.linear(probe, *pairs[0])
    projected = [F.linear(x, *pair) for pair in pairs[1:]]
    k, v = projected if len(projected) == 2 else projected[0].chunk(2, dim=-1)
    q, k, v = (split_heads(part, attn.num_heads) for part in (q[None], k, v))
    return F.linear(attend(q.expand(x.shape[0], -1, -1, -1), k, v), out_proj.weight, out_proj.bias)
