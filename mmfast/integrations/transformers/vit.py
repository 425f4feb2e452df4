"""Accelerated classes of transformers' ViT, from 4.50 to 5.23: its layer has had three forms since."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.vit import modeling_vit

from ... import backends
from .._norm import FusedBlock, add_norm
from .._swap import Unknown, known
from ._embeddings import PATCHES
from ._embeddings import ViTEmbeddings as _Embeddings
from ._parts import ATTENTIONS, Intermediate, Mlp, known_attention


class _Layer(FusedBlock):
    """From 5.10: attention returns its output and weights."""

    outlines = frozenset(
        {
            "layernorm_before(hidden_states) attention($1,attention_mask,others=**kwargs) dropout($2[0])"
            " $3+hidden_states layernorm_after($4) mlp($5) dropout($6) $4+$7 -> $8"
        }
    )
    bypassed = ("layernorm_after",)
    layernorm_before: Any
    attention: Any
    dropout: Any
    mlp: Any

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        if backends.torch_serves(hidden_states):
            return super().forward(hidden_states, attention_mask, **kwargs)
        x, _ = self.attention(self.layernorm_before(hidden_states), attention_mask, **kwargs)
        y, x = add_norm(self.dropout(x), hidden_states, self.layernorm_after)
        return self.dropout(self.mlp(y)) + x


class _Layer4(FusedBlock):
    """From 4.56: attention returns its output, and the second residual sum is in the submodule `output`."""

    outlines = frozenset(
        f"layernorm_before(hidden_states) attention({inputs}) $2+hidden_states layernorm_after($3) intermediate($4)"
        " output($5,$3) -> $6"
        for inputs in ("$1", "$1,head_mask", "$1,others=**kwargs")
    )
    bypassed = ("layernorm_after",)
    layernorm_before: Any
    attention: Any
    intermediate: Any
    output: Any

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, N, C) -> (B, N, C); the other arguments are attention's."""
        if backends.torch_serves(hidden_states):
            return super().forward(hidden_states, *args, **kwargs)
        x = self.attention(self.layernorm_before(hidden_states), *args, **kwargs)
        y, x = add_norm(x, hidden_states, self.layernorm_after)
        return self.output(self.intermediate(y), x)


class _Layer4Tuple(FusedBlock):
    """To 4.55: a tuple of the output and, if asked for, the attention weights."""

    outlines = frozenset(
        {
            "layernorm_before(hidden_states) attention($1,head_mask,output_attentions=output_attentions)"
            " $2[0]+hidden_states layernorm_after($3) intermediate($4) output($5,$3) $6,*$2[1:] -> $7"
        }
    )
    bypassed = ("layernorm_after",)
    layernorm_before: Any
    attention: Any
    intermediate: Any
    output: Any

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """(B, N, C) -> ((B, N, C), attention weights, if asked for); the other arguments are attention's."""
        if backends.torch_serves(hidden_states):
            return super().forward(hidden_states, *args, **kwargs)
        x, *weights = self.attention(self.layernorm_before(hidden_states), *args, **kwargs)
        y, x = add_norm(x, hidden_states, self.layernorm_after)
        return (self.output(self.intermediate(y), x), *weights)


FORMS = (_Layer, _Layer4, _Layer4Tuple)

# To 5.9 ViTAttention holds a ViTSelfAttention, and there are ViTIntermediate and ViTOutput in place of ViTMLP.
_one_module = not hasattr(modeling_vit, "ViTSelfAttention")
_self_attention = modeling_vit.ViTAttention if _one_module else modeling_vit.ViTSelfAttention
_mlp = modeling_vit.ViTMLP if _one_module else modeling_vit.ViTIntermediate

_LayerForm: Any = known(modeling_vit.ViTLayer, *FORMS)
_AttentionForm: Any = known_attention(_self_attention, *ATTENTIONS)
_MlpForm: Any = known(_mlp, Mlp, Intermediate)
_PatchForm: Any = known(modeling_vit.ViTPatchEmbeddings, *PATCHES)
_EmbeddingsForm: Any = known(modeling_vit.ViTEmbeddings, _Embeddings)


class ViTLayer(_LayerForm, modeling_vit.ViTLayer):
    """In place of `ViTLayer`."""

    mmfast_original = modeling_vit.ViTLayer


class ViTPatchEmbeddings(_PatchForm, modeling_vit.ViTPatchEmbeddings):
    """In place of `ViTPatchEmbeddings`."""

    mmfast_original = modeling_vit.ViTPatchEmbeddings


class ViTEmbeddings(_EmbeddingsForm, modeling_vit.ViTEmbeddings):
    """In place of `ViTEmbeddings`."""

    mmfast_original = modeling_vit.ViTEmbeddings
    patches = () if issubclass(_PatchForm, Unknown) else (modeling_vit.ViTPatchEmbeddings, ViTPatchEmbeddings)


if _one_module:

    class ViTAttention(_AttentionForm, modeling_vit.ViTAttention):
        """In place of `ViTAttention`."""

        mmfast_original = modeling_vit.ViTAttention

    class ViTMLP(_MlpForm, modeling_vit.ViTMLP):
        """In place of `ViTMLP`."""

        mmfast_original = modeling_vit.ViTMLP

    CLASSES = (ViTLayer, ViTPatchEmbeddings, ViTEmbeddings, ViTAttention, ViTMLP)
else:

    class ViTSelfAttention(_AttentionForm, modeling_vit.ViTSelfAttention):
        """In place of `ViTSelfAttention`."""

        mmfast_original = modeling_vit.ViTSelfAttention

    class ViTIntermediate(_MlpForm, modeling_vit.ViTIntermediate):
        """In place of `ViTIntermediate`."""

        mmfast_original = modeling_vit.ViTIntermediate

    CLASSES = (ViTLayer, ViTPatchEmbeddings, ViTEmbeddings, ViTSelfAttention, ViTIntermediate)
