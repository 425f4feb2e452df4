"""Accelerated classes of torch.nn."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends
from .. import nn as mmfast_nn
from ..ops import layer_norm
from ._attention import FusedAttention, refuses_head_dim, takes_mask
from ._mlp import FusedSequential
from ._norm import NORMS, refuses_norm
from ._swap import Accelerated, fits, multiplies, plain_tensor


class LayerNorm(Accelerated, mmfast_nn.LayerNorm):
    """In place of `torch.nn.LayerNorm`."""

    mmfast_original = nn.LayerNorm
    mmfast_op = "layer_norm"

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        """Why this layer norm is left alone, or None."""
        return refuses_norm(module)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise input (..., C): `mmfast.ops.layer_norm`, or torch's where the op does not take the tensors."""
        if backends.torch_serves(input):
            return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
        if plain_tensor(input):
            weight, bias = self.weight, self.bias
            if fits(weight, input.dtype) and fits(bias, input.dtype):
                return layer_norm(input, weight, bias, self.eps)
        elif isinstance(input, torch.fx.Proxy):
            return _leaf(self, nn.LayerNorm.forward, input)
        return nn.LayerNorm.forward(self, input)


class MultiheadAttention(FusedAttention, mmfast_nn.MultiheadAttention):
    """In place of `torch.nn.MultiheadAttention`, for calls with need_weights=False.

    `out_proj` is not called, here as there: its weight and bias are used. Batch first, the result is contiguous where
    torch's is a transposed view, so a dropout after it draws its mask in another order.
    """

    mmfast_original = nn.MultiheadAttention

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        """Why this attention is left alone, or None."""
        if module.bias_k is not None or module.bias_v is not None:
            return "has bias_k and bias_v"
        return "has add_zero_attn set" if module.add_zero_attn else refuses_head_dim(module.head_dim)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `torch.nn.MultiheadAttention.forward`: by mmfast's ops, or by torch's where the ops are not the same."""
        masks = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        given = (query, key, value, key_padding_mask, attn_mask, is_causal)
        if not (need_weights or backends.torch_serves(query)) and self._takes(*given):
            return self._forward(query, key, value, *masks)
        forward = nn.MultiheadAttention.forward
        if isinstance(query, torch.fx.Proxy):
            return _leaf(self, forward, query, key, value, *masks)
        return forward(self, query, key, value, *masks)

    def _takes(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> bool:
        """Whether mmfast's forward gives what torch's does; calls that are errors are torch's too."""
        if not all(plain_tensor(x) and x.dim() == 3 and x.dtype == query.dtype for x in (query, key, value)):
            return False
        if (self.training and self.dropout > 0.0) or self.refuses(self) is not None:
            return False
        widths = (self.embed_dim, self.kdim, self.vdim)
        if tuple(x.shape[2] for x in (query, key, value)) != widths or key.shape[:2] != value.shape[:2]:
            return False
        projections = (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        pairs = [(weight, self.in_proj_bias) for weight in projections]
        if not all(multiplies(query, *pair) for pair in (*pairs, (self.out_proj.weight, self.out_proj.bias))):
            return False
        rows = 1 if self.batch_first else 0
        batch, length, keys = query.shape[1 - rows], query.shape[rows], key.shape[rows]
        if key.shape[1 - rows] != batch or (is_causal and attn_mask is None):
            return False
        if not (takes_mask(attn_mask, query.dtype) and takes_mask(key_padding_mask, query.dtype)):
            return False
        square = (length, keys)
        if attn_mask is not None and attn_mask.shape not in (square, (batch * self.num_heads, *square)):
            return False
        return key_padding_mask is None or key_padding_mask.shape == (batch, keys)


class Sequential(FusedSequential, nn.Sequential):
    """In place of a `torch.nn.Sequential` in which a linear layer is followed by an activation."""

    mmfast_original = nn.Sequential


def _leaf(module: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    """Record a call of the module, as torch.fx does for modules of torch.nn: graphs keep the names of their nodes."""
    tracer = args[0].tracer
    if not isinstance(tracer, torch.fx.Tracer) or tracer.root is module:
        return forward(module, *args, **kwargs)
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)


NORMS[LayerNorm] = ""
CLASSES = (LayerNorm, MultiheadAttention, Sequential)
