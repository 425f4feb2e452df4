"""Parts of transformers' CLIP and SigLIP, from 4.50 to 5.23 (attention from 4.53): each has had a few forms since."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ... import backends
from ...nn.activation import any_global_hook
from .._attention import FusedAttention, attend, takes_mask
from .._norm import FusedBlock, add_norm
from .._outline import IMAGES
from .._patch import embed, refuses_conv
from .._probe import attend_from, refuses_probe
from .._swap import Accelerated, plain_tensor
from ._parts import _RECORDED, local_heads

_CHANGES = ("output_attentions", "cache", "position_bias", "softcap", "s_aux")
"""Keyword arguments under which an attention function may do something else. "is_causal" is served."""


def _modes(**inputs: object) -> tuple[dict[str, Any], ...]:
    members = {"config": SimpleNamespace(_attn_implementation=_RECORDED)}
    return tuple({"members": members, "inputs": inputs, "training": training} for training in (True, False))


class _Attention(FusedAttention):
    """Of any release. Another implementation than "sdpa" is what the model's owner has asked for."""

    config: Any
    head_dim: int
    scale: float
    dropout: float
    is_causal: bool
    q_proj: Any
    k_proj: Any
    v_proj: Any
    out_proj: Any

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        """Why this attention is left alone, or None."""
        chosen = module.config._attn_implementation
        return super().refuses(module) if chosen == "sdpa" else f"has attention implementation {chosen!r}"

    def _attend(self, x: Tensor, mask: Tensor | None, causal: Any, options: dict[str, Any]) -> Tensor | None:
        """What transformers' sdpa function and the output projection make of x (B, N, C), or None where they have to.

        `causal` holds where there is no mask; None is what the module says.
        """
        if backends.torch_serves(x) or self.refuses(self) is not None or (self.training and self.dropout > 0.0):
            return None
        if any(options.get(name) is not None and options[name] is not False for name in _CHANGES):
            return None
        if not plain_tensor(x) or x.dim() != 3 or not takes_mask(mask, x.dtype):
            return None
        causal = bool(self.is_causal if causal is None else causal) and mask is None
        q, k, v = (local_heads(project(x), self.head_dim) for project in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attend(q, k, v, mask, is_causal=causal, scale=self.scale))


def _attention_steps(call: str, *, width: str, views: tuple[str, ...], mask: str = "attention_mask") -> frozenset[str]:
    """The steps of attention in both modes: the projections before their views or beside them; `call`'s options."""
    q, k, v = "q_proj(hidden_states)", "k_proj(hidden_states)", "v_proj(hidden_states)"
    found = set()
    for view in views:
        before = f"{q} {k} {v} $1.{view} $4.transpose(1,2) $2.{view} $6.transpose(1,2) $3.{view} $8.transpose(1,2)"
        beside = f"{q} $1.{view} $2.transpose(1,2) {k} $4.{view} $5.transpose(1,2) {v} $7.{view} $8.transpose(1,2)"
        for steps, heads in ((before, "$5,$7,$9"), (beside, "$3,$6,$9")):
            for weights in ("$10[1]", "None"):
                found.add(
                    " | ".join(
                        f"{steps} attend({heads},{mask},{call.format(rate)}) $10[0].reshape(2,5,{width}) "
                        f"$11.contiguous() out_proj($12) -> ($13, {weights})"
                        for rate in ("dropout", "0.0")
                    )
                )
    return frozenset(found)


_VIEWS = ("view((2,5,-1,head_dim))", "view(2,5,-1,head_dim)", "view(2,5,num_heads,head_dim)")


class Attention(_Attention):
    """Of CLIP from 5.0: whether it is causal comes with the call."""

    variants = _modes()
    outlines = _attention_steps("scaling=scale,dropout={},others=**kwargs", width="-1", views=_VIEWS)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """(B, N, C) -> ((B, N, C), no attention weights)."""
        y = self._attend(hidden_states, attention_mask, kwargs.get("is_causal"), kwargs)
        return super().forward(hidden_states, attention_mask, **kwargs) if y is None else (y, None)


class OwnAttention(_Attention):
    """Of SigLIP from 4.55: what else comes with the call is dropped."""

    variants = _modes()
    outlines = frozenset().union(
        *(
            _attention_steps("is_causal=is_causal,scaling=scale,dropout={}", width=width, views=_VIEWS)
            for width in ("-1", "7")
        )
    )

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """(B, N, C) -> ((B, N, C), no attention weights)."""
        y = self._attend(hidden_states, attention_mask, None, {})
        return super().forward(hidden_states, attention_mask, **kwargs) if y is None else (y, None)


class OwnAttention4(_Attention):
    """Of SigLIP to 4.54: asked for its weights, it is transformers' eager function."""

    variants = _modes(output_attentions=False)
    outlines = OwnAttention.outlines

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool | None = False
    ) -> tuple[Tensor, Tensor | None]:
        """(B, N, C) -> ((B, N, C), attention weights, if asked for)."""
        options = {"output_attentions": output_attentions}
        y = self._attend(hidden_states, attention_mask, None, options)
        return super().forward(hidden_states, attention_mask, output_attentions) if y is None else (y, None)


def _masked_steps(view: str) -> str:
    """The steps with each of the two masks and with both, in both modes."""
    projected = "q_proj(hidden_states) k_proj(hidden_states) v_proj(hidden_states) $1.{0} $4.transpose(1,2) $2.{0} "
    found = []
    for mask in ("attention_mask", "causal_attention_mask", "$10"):
        both = mask == "$10"
        steps = projected.format(view) + f"$6.transpose(1,2) $3.{view} $8.transpose(1,2) "
        steps += "attention_mask+causal_attention_mask " if both else ""
        a, b, c, d = range(11, 15) if both else range(10, 14)
        for rate in ("dropout", "0.0"):
            options = f"is_causal=is_causal,scaling=scale,dropout={rate},output_attentions=False"
            rest = f"${a}[0].reshape(2,5,7) ${b}.contiguous() out_proj(${c}) -> (${d}, None)"
            found.append(f"{steps}attend($5,$7,$9,{mask},{options}) {rest}")
    return " | ".join(found)


class MaskedAttention4(_Attention):
    """Of CLIP to 4.57: there is a causal mask beside the one of padding, which are added."""

    variants = tuple(
        variant
        for masks in ({"causal_attention_mask": None}, {"attention_mask": None}, {})
        for variant in _modes(output_attentions=False, **masks)
    )
    outlines = frozenset(_masked_steps(view) for view in _VIEWS)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        causal_attention_mask: Tensor | None = None,
        output_attentions: bool | None = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, N, C) -> ((B, N, C), attention weights, if asked for)."""
        masks = [mask for mask in (attention_mask, causal_attention_mask) if mask is not None]
        y = None
        if not backends.torch_serves(hidden_states) and all(isinstance(mask, Tensor) for mask in masks):
            mask = masks[0] + masks[1] if len(masks) == 2 else masks[0] if masks else None
            y = self._attend(hidden_states, mask, None, {"output_attentions": output_attentions})
        if y is None:
            return super().forward(hidden_states, attention_mask, causal_attention_mask, output_attentions)
        return y, None


ATTENTIONS = (Attention, OwnAttention, OwnAttention4, MaskedAttention4)

_LAYER = "layer_norm1(hidden_states) self_attn(hidden_states=$1,{}) $2[0]+hidden_states layer_norm2($3) mlp($4) $3+$5"
_MASK = "attention_mask=attention_mask"
_CAUSAL = "causal_attention_mask=causal_attention_mask"


class _Layer(FusedBlock):
    bypassed = ("layer_norm2",)
    layer_norm1: Any
    self_attn: Any
    layer_norm2: Any
    mlp: Any

    def _finish(self, branch: Tensor, residual: Tensor) -> Tensor:
        """All that follows attention."""
        y, x = add_norm(branch, residual, self.layer_norm2)
        return x + self.mlp(y)


class Layer(_Layer):
    """Of CLIP from 5.0, of SigLIP from 4.57."""

    outlines = frozenset({_LAYER.format("attention_mask=attention_mask,others=**kwargs") + " -> $6"})

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        if backends.torch_serves(hidden_states):
            return super().forward(hidden_states, attention_mask, **kwargs)
        y = self.layer_norm1(hidden_states)
        branch, _ = self.self_attn(hidden_states=y, attention_mask=attention_mask, **kwargs)
        return self._finish(branch, hidden_states)


class LayerTuple(_Layer):
    """Of SigLIP to 4.56: a tuple of the output and, if asked for, the attention weights."""

    variants = tuple({"inputs": {"output_attentions": asked}} for asked in (False, True))
    outlines = frozenset(
        {
            " | ".join(
                _LAYER.format(f"attention_mask=attention_mask,output_attentions={asked}") + f" -> ($6{weights})"
                for asked, weights in ((False, ","), (True, ", $2[1]"))
            )
        }
    )

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, output_attentions: bool | None = False
    ) -> tuple[Tensor, ...]:
        """(B, N, C) -> ((B, N, C), attention weights, if asked for)."""
        if backends.torch_serves(hidden_states):
            return super().forward(hidden_states, attention_mask, output_attentions)
        y = self.layer_norm1(hidden_states)
        branch, weights = self.self_attn(
            hidden_states=y, attention_mask=attention_mask, output_attentions=output_attentions
        )
        out = self._finish(branch, hidden_states)
        return (out, weights) if output_attentions else (out,)


class LayerMasks(_Layer):
    """Of CLIP to 4.57: with two masks."""

    variants = LayerTuple.variants
    outlines = frozenset(text.replace(_MASK, f"{_MASK},{_CAUSAL}") for text in LayerTuple.outlines)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        causal_attention_mask: Tensor | None,
        output_attentions: bool | None = False,
    ) -> tuple[Tensor, ...]:
        """(B, N, C) -> ((B, N, C), attention weights, if asked for)."""
        if backends.torch_serves(hidden_states):
            return super().forward(hidden_states, attention_mask, causal_attention_mask, output_attentions)
        branch, weights = self.self_attn(
            hidden_states=self.layer_norm1(hidden_states),
            attention_mask=attention_mask,
            causal_attention_mask=causal_attention_mask,
            output_attentions=output_attentions,
        )
        out = self._finish(branch, hidden_states)
        return (out, weights) if output_attentions else (out,)


LAYERS = (Layer, LayerTuple, LayerMasks)


class _Embeddings(Accelerated):
    """Writes the tokens with their positions where the patches are embedded. The position embedding is called."""

    mmfast_op = "patch_embed"
    variants = ({"shape": IMAGES, "members": {"image_size": 32}, "inputs": {"interpolate_pos_encoding": False}},)
    bypassed = ("patch_embedding",)
    patch_embedding: Any
    position_embedding: Any
    position_ids: Any

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        """Why these embeddings are left alone, or None."""
        reason = refuses_conv(module._modules.get("patch_embedding"))
        return None if reason is None else f"patch_embedding {reason}"

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """(B, C, H, W) -> (B, N, D), with the class token (B, 1 + N, D)."""
        y = None
        if not (backends.torch_serves(pixel_values) or interpolate_pos_encoding):
            y = self._tokens(pixel_values)
        return super().forward(pixel_values, interpolate_pos_encoding) if y is None else y

    def _tokens(self, x: Tensor) -> Tensor | None:
        if torch.jit.is_tracing() or any_global_hook() or self.refuses(self) is not None:
            return None
        if not plain_tensor(x) or x.dim() != 4:
            return None
        prefix = self._prefix()
        side, patch = x.shape[2:], self.patch_embedding.kernel_size
        count = (side[0] // patch[0]) * (side[1] // patch[1]) + (0 if prefix is None else 1)
        if not self._fits(x) or self.position_ids.shape != (1, count):
            return None
        positions = self.position_embedding(self.position_ids)[0]
        return embed(
            x.to(dtype=self.patch_embedding.weight.dtype),
            self.patch_embedding,
            pos_embed=positions,
            prefix_tokens=prefix,
        )

    def _prefix(self) -> Tensor | None:
        """The class token, (1, D)."""
        return None

    def _fits(self, x: Tensor) -> bool:
        """Whether images of this size are the model's."""
        return True


class ClipEmbeddings(_Embeddings):
    """Of CLIP, with a class token, for images of one size."""

    outlines = frozenset(
        {
            "pixel_values.to(dtype=patch_embedding.weight.dtype) patch_embedding($1) $2.flatten(2) $3.transpose(1,2) "
            "class_embedding.expand(2,1,-1) cat([$5,$4],dim=1) position_embedding(position_ids) $6+$7 -> $8"
        }
    )
    class_embedding: Any
    image_size: int

    def _prefix(self) -> Tensor | None:
        return self.class_embedding[None]

    def _fits(self, x: Tensor) -> bool:
        return bool(x.shape[2] == self.image_size and x.shape[3] == self.image_size)


class SiglipEmbeddings(_Embeddings):
    """Of SigLIP, of patches alone."""

    outlines = frozenset(
        {
            "pixel_values.to(dtype=patch_embedding.weight.dtype) patch_embedding($1) $2.flatten(2) $3.transpose(1,2) "
            "position_embedding(position_ids) $4+$5 -> $6"
        }
    )


class PoolingHead(FusedAttention):
    """Of SigLIP: one learned query attends to all tokens. Its weights, which the original drops, are not computed."""

    outlines = frozenset(
        {"probe.repeat(2,1,1) attention($1,hidden_state,hidden_state) layernorm($2[0]) mlp($3) $2[0]+$4 -> $5[:,0]"}
    )
    bypassed = ("attention",)
    probe: Any
    attention: Any
    layernorm: Any
    mlp: Any

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        """Why this head is left alone, or None."""
        reason = refuses_probe(module._modules.get("attention"))
        return None if reason is None else f"attention {reason}"

    def forward(self, hidden_state: Tensor) -> Tensor:
        """(B, N, C) -> (B, C)."""
        x, y = hidden_state, None
        if not backends.torch_serves(x):
            y = attend_from(self.attention, self.probe[0], x)
        return super().forward(x) if y is None else (y + self.mlp(self.layernorm(y)))[:, 0]
