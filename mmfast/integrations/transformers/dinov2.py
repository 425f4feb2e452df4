"""Accelerated classes of transformers' DINOv2."""

from __future__ import annotations

from typing import Any

from transformers.models.dinov2 import modeling_dinov2

from .._norm import DROP_PATHS, SCALES
from .._swap import Unknown, known
from ._dinov2 import FORMS
from ._embeddings import PATCHES
from ._embeddings import Dinov2Embeddings as _Embeddings
from ._parts import ATTENTIONS, MLPS, SWIGLUS, known_attention

# To 5.17 Dinov2Attention holds a Dinov2SelfAttention.
_one_module = not hasattr(modeling_dinov2, "Dinov2SelfAttention")
_self_attention = modeling_dinov2.Dinov2Attention if _one_module else modeling_dinov2.Dinov2SelfAttention

_LayerForm: Any = known(modeling_dinov2.Dinov2Layer, *FORMS)
_AttentionForm: Any = known_attention(_self_attention, *ATTENTIONS)
_MlpForm: Any = known(modeling_dinov2.Dinov2MLP, *MLPS)
_SwiGLUForm: Any = known(modeling_dinov2.Dinov2SwiGLUFFN, *SWIGLUS)
_PatchForm: Any = known(modeling_dinov2.Dinov2PatchEmbeddings, *PATCHES)
_EmbeddingsForm: Any = known(modeling_dinov2.Dinov2Embeddings, _Embeddings)


class Dinov2Layer(_LayerForm, modeling_dinov2.Dinov2Layer):
    """In place of `Dinov2Layer`."""

    mmfast_original = modeling_dinov2.Dinov2Layer


class Dinov2MLP(_MlpForm, modeling_dinov2.Dinov2MLP):
    """In place of `Dinov2MLP`."""

    mmfast_original = modeling_dinov2.Dinov2MLP


class Dinov2SwiGLUFFN(_SwiGLUForm, modeling_dinov2.Dinov2SwiGLUFFN):
    """In place of `Dinov2SwiGLUFFN`."""

    mmfast_original = modeling_dinov2.Dinov2SwiGLUFFN


class Dinov2PatchEmbeddings(_PatchForm, modeling_dinov2.Dinov2PatchEmbeddings):
    """In place of `Dinov2PatchEmbeddings`."""

    mmfast_original = modeling_dinov2.Dinov2PatchEmbeddings


class Dinov2Embeddings(_EmbeddingsForm, modeling_dinov2.Dinov2Embeddings):
    """In place of `Dinov2Embeddings`."""

    mmfast_original = modeling_dinov2.Dinov2Embeddings
    patches = () if issubclass(_PatchForm, Unknown) else (modeling_dinov2.Dinov2PatchEmbeddings, Dinov2PatchEmbeddings)


if _one_module:

    class Dinov2Attention(_AttentionForm, modeling_dinov2.Dinov2Attention):
        """In place of `Dinov2Attention`."""

        mmfast_original = modeling_dinov2.Dinov2Attention

    _attention: Any = Dinov2Attention
else:

    class Dinov2SelfAttention(_AttentionForm, modeling_dinov2.Dinov2SelfAttention):
        """In place of `Dinov2SelfAttention`."""

        mmfast_original = modeling_dinov2.Dinov2SelfAttention

    _attention = Dinov2SelfAttention

SCALES[modeling_dinov2.Dinov2LayerScale] = "lambda1"
DROP_PATHS.add(modeling_dinov2.Dinov2DropPath)
CLASSES = (
    _attention,
    Dinov2Layer,
    Dinov2MLP,
    Dinov2SwiGLUFFN,
    Dinov2PatchEmbeddings,
    Dinov2Embeddings,
)
