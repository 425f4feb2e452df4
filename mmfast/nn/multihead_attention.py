"""`MultiheadAttention`: torch.nn's module on mmfast's ops, with its parameters and mask conventions."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends
from ..ops import attention, attention_maps, attention_qkv
from ..ops._attention import facts

NAME = "MultiheadAttention"


class MultiheadAttention(nn.MultiheadAttention):
    """Multi-head attention with `torch.nn.MultiheadAttention`'s arguments, parameters, initialisation and masks.

    Self-attention (query, key and value are one tensor) is one GEMM into `mmfast.ops.attention_qkv`; cross-attention
    (key and value are one tensor) two GEMMs into `mmfast.ops.attention`. Both layouts are read where they lie. Weights,
    where asked for, are a second pass of `mmfast.ops.attention_maps`. On a CPU with no backend forced PyTorch's own
    forward runs, its inference fast path included, but for the cases below.

    PyTorch's own paths differ from one another in three ways; this module does the same on all of them:

    - A query whose keys are all masked: NaN from the fast path and with `need_weights`, 0 without. Here attention is 0
      (the output is out_proj's bias), and so are the weights.
    - `is_causal` without `attn_mask`: an error, but ignored by the fast path. Here it is an error.
    - `is_causal` with `add_bias_kv` or `add_zero_attn`: the added keys are seen with `need_weights`, and hidden without
      from all but the last queries. Here they are seen.

    Dropout of the weights (in training) and nested tensors are served by PyTorch.

    Raises:
        ValueError: a shape or a mask does not fit, or is_causal is given without attn_mask.

    Source: Vaswani et al., "Attention Is All You Need", arXiv:1706.03762; `torch.nn.MultiheadAttention`.
    """

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
        """Attend from query to key and value.

        Args:
            query: (L, B, E), (B, L, E) with batch_first, or (L, E).
            key: (S, B, kdim), (B, S, kdim) or (S, kdim).
            value: (S, B, vdim), (B, S, vdim) or (S, vdim).
            key_padding_mask: (B, S) or (S,); boolean (True hides the key), or added to the scores.
            need_weights: also return the weights.
            attn_mask: (L, S) or (B * num_heads, L, S); boolean (True hides the key from the query), or added.
            average_attn_weights: average the weights over the heads.
            is_causal: a hint that attn_mask is the causal mask, which then is not read.

        Returns:
            The output, of query's layout, and the weights (B, L, S), (B, num_heads, L, S) if not averaged, without B
            if query has none, or None. With dropout the weights are those after it, as torch.nn's.
        """
        if is_causal and attn_mask is None:
            raise ValueError(f"{NAME}: is_causal is a hint about attn_mask and needs one, got attn_mask=None")
        masked = key_padding_mask is not None or attn_mask is not None
        direct = backends.torch_serves(query)
        if (masked or not direct) and not torch.jit.is_tracing() and not any(map(_is_foreign, (query, key, value))):
            if not direct or (key_padding_mask is not None and attn_mask is not None):
                self._check(query, key, value, key_padding_mask, attn_mask)
            if not direct or self._torch_differs(key_padding_mask, attn_mask, need_weights, is_causal):
                return self._forward(
                    query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
                )
        return super().forward(
            query,
            key,
            value,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )

    def _forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        batched = query.dim() == 3
        batch_first = self.batch_first and batched
        extended = self.bias_k is not None or self.add_zero_attn
        causal = is_causal and not extended
        mask = _merge_masks(
            key_padding_mask, None if causal else attn_mask, self.num_heads, query.dtype, batched, self._extra_keys()
        )
        dropout = self.dropout if self.training else 0.0
        packed = query is key and key is value and self._qkv_same_embed_dim
        if packed and not need_weights and not extended:
            qkv = F.linear(query, self.in_proj_weight, self.in_proj_bias)
            out = attention_qkv(self._batch_first(qkv), self.num_heads, mask, dropout, causal)
            return self._project(out, batched, batch_first), None
        q, k, v = self._heads(query, key, value)
        weights = None
        if not need_weights:
            out = attention(q, k, v, mask, dropout, causal)
        elif dropout or backends.pick("attention", facts(q, k, v, mask, 0.0)) == "torch":
            weights = attention_maps(q, k, attn_mask=mask, is_causal=causal)
            weights = F.dropout(weights, dropout) if dropout else weights
            out = weights @ v
        else:
            out, lse = attention(q, k, v, mask, is_causal=causal, return_lse=True)
            weights = attention_maps(q, k, attn_mask=mask, is_causal=causal, lse=lse)
        if weights is not None:
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        return self._project(out.transpose(1, 2).flatten(2), batched, batch_first), weights

    def _torch_differs(
        self, key_padding_mask: Tensor | None, attn_mask: Tensor | None, need_weights: bool, is_causal: bool
    ) -> bool:
        """Whether torch.nn's answer may be one of those that differ: for CPU tensors, whose masks can be looked at."""
        if self._extra_keys():
            return is_causal
        if self.training and not need_weights:
            return False
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return True
        pad, pairs = (
            m if m is None or m.dtype == torch.bool else m == -math.inf for m in (key_padding_mask, attn_mask)
        )
        if pad is None or pairs is None:
            hidden: Any = pairs if pad is None else pad
        elif pairs.dim() == 3:
            hidden = pairs.unflatten(0, (-1, self.num_heads)) | pad.reshape(-1, 1, 1, pad.shape[-1])
        else:
            hidden = pairs | pad.reshape(-1, 1, pad.shape[-1])
        return bool(hidden.all(-1).any())

    def _project(self, out: Tensor, batched: bool, batch_first: bool) -> Tensor:
        """Apply the output projection to (B, L, E), in the layout of the input."""
        if not batched:
            out = out.squeeze(0)
        elif not batch_first:
            out = out.transpose(0, 1).contiguous()  # torch.nn's layout; strided, the bias would be a pass of its own
        return F.linear(out, self.out_proj.weight, self.out_proj.bias)

    def _batch_first(self, x: Tensor) -> Tensor:
        """A view (B, N, D), whatever the layout of the input."""
        if x.dim() == 2:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project to q, k, v, each (B, num_heads, N, head_dim), with the keys that the module adds."""
        width = self.embed_dim
        if not self._qkv_same_embed_dim:
            biases: Any = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            projections = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            found = [F.linear(*pair) for pair in zip((query, key, value), projections, biases, strict=True)]
        elif query is key and key is value:
            found = [*F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)]
        else:
            sizes = [width, 2 * width] if key is value else [width] * 3
            inputs = (query, key) if key is value else (query, key, value)
            bias: Any = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.split(sizes)
            weights = self.in_proj_weight.split(sizes)
            found = [F.linear(x, w, b) for x, w, b in zip(inputs, weights, bias, strict=False)]
            found = [found[0], *found[1].chunk(2, dim=-1)] if key is value else found
        q, k, v = (self._batch_first(x) for x in found)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat((x, extra.to(x.dtype).expand(x.shape[0], 1, -1)), dim=1)
                for x, extra in ((k, self.bias_k), (v, self.bias_v))
            )
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        return q, k, v

    def _extra_keys(self) -> int:
        return int(self.bias_k is not None) + int(self.add_zero_attn)

    def _check(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> None:
        """Raise ValueError unless the shapes fit each other and the module."""
        if query.dim() not in (2, 3):
            raise ValueError(f"{NAME}: query must have 2 or 3 dimensions, got {tuple(query.shape)}")
        for name, x, width in (
            ("query", query, self.embed_dim),
            ("key", key, self.kdim),
            ("value", value, self.vdim),
        ):
            if x.dim() != query.dim() or x.shape[-1] != width:
                raise ValueError(
                    f"{NAME}: {name} must have {query.dim()} dimensions, the last of {width}, got {tuple(x.shape)}"
                )
        if key.shape[:-1] != value.shape[:-1]:
            expected = f"dimensions {tuple(key.shape[:-1])} like key"
            raise ValueError(f"{NAME}: value must have {expected}, got {tuple(value.shape[:-1])}")
        rows = 1 if self.batch_first and query.dim() == 3 else 0
        batch = query.shape[1 - rows] if query.dim() == 3 else 1
        if query.dim() == 3 and key.shape[1 - rows] != batch:
            raise ValueError(f"{NAME}: key must have a batch of {batch} like query, got {key.shape[1 - rows]}")
        length, keys = query.shape[rows], key.shape[rows]
        padding = (batch, keys) if query.dim() == 3 else (keys,)
        if key_padding_mask is not None and key_padding_mask.shape != padding:
            got = tuple(key_padding_mask.shape)
            raise ValueError(f"{NAME}: key_padding_mask must have shape {padding}, got {got}")
        shapes = ((length, keys), (batch * self.num_heads, length, keys))
        if attn_mask is not None and tuple(attn_mask.shape) not in shapes:
            got = tuple(attn_mask.shape)
            raise ValueError(f"{NAME}: attn_mask must have shape {shapes[0]} or {shapes[1]}, got {got}")
        for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
                raise TypeError(f"{NAME}: {name} must be boolean or floating point, got {mask.dtype}")


def _is_foreign(x: Any) -> bool:
    """Whether x is nested, or of a class that overrides torch functions."""
    kind = type(x)
    if kind is Tensor:
        return x.is_nested
    return getattr(kind, "__torch_function__", None) is not torch._C._disabled_torch_function_impl


def _merge_masks(
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    num_heads: int,
    dtype: torch.dtype,
    batched: bool,
    extra_keys: int,
) -> Tensor | None:
    """Return one mask as `attention` takes it (True attends, or added), broadcastable to (B, H, L, S), or None.

    Padding alone stays (B, 1, 1, S). Keys that the module adds are always seen.
    """
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask if batched else key_padding_mask.unsqueeze(0)
        key_padding_mask = _extended(key_padding_mask[:, None, None], extra_keys)
    if attn_mask is not None:
        attn_mask = attn_mask.unflatten(0, (-1, num_heads)) if attn_mask.dim() == 3 else attn_mask[None, None]
        attn_mask = _extended(attn_mask, extra_keys)
    given = [mask for mask in (attn_mask, key_padding_mask) if mask is not None]
    if not given:
        return None
    hidden = [mask for mask in given if mask.dtype == torch.bool]
    added = [
        mask if mask.dtype in (dtype, torch.float32) else mask.to(dtype) for mask in given if mask.dtype != torch.bool
    ]
    if not added:
        return ~(hidden[0] | hidden[1] if len(hidden) == 2 else hidden[0])
    mask = added[0] + added[1] if len(added) == 2 else added[0]
    return mask.masked_fill(hidden[0], -math.inf) if hidden else mask


def _extended(mask: Tensor, extra_keys: int) -> Tensor:
    return F.pad(mask, (0, extra_keys)) if extra_keys else mask
