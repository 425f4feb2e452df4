"""Accelerated classes of transformers' DINOv2 with registers."""

from __future__ import annotations

from typing import Any

from transformers.models.dinov2_with_registers import modeling_dinov2_with_registers as modeling

from .._norm import DROP_PATHS, SCALES
from .._swap import Unknown, known
from ._dinov2 import FORMS
from ._embeddings import PATCHES
from ._embeddings import Dinov2WithRegistersEmbeddings as _Embeddings
from ._parts import ATTENTIONS, MLPS, SWIGLUS, known_attention

# To 5.17 Dinov2WithRegistersAttention holds a Dinov2WithRegistersSelfAttention.
_one_module = not hasattr(modeling, "Dinov2WithRegistersSelfAttention")
_self_attention = modeling.Dinov2WithRegistersAttention if _one_module else modeling.Dinov2WithRegistersSelfAttention

_LayerForm: Any = known(modeling.Dinov2WithRegistersLayer, *FORMS)
_AttentionForm: Any = known_attention(_self_attention, *ATTENTIONS)
_MlpForm: Any = known(modeling.Dinov2WithRegistersMLP, *MLPS)
_SwiGLUForm: Any = known(modeling.Dinov2WithRegistersSwiGLUFFN, *SWIGLUS)
_PatchForm: Any = known(modeling.Dinov2WithRegistersPatchEmbeddings, *PATCHES)
_EmbeddingsForm: Any = known(modeling.Dinov2WithRegistersEmbeddings, _Embeddings)


class Dinov2WithRegistersLayer(_LayerForm, modeling.Dinov2WithRegistersLayer):
    """In place of `Dinov2WithRegistersLayer`."""

    mmfast_original = modeling.Dinov2WithRegistersLayer


class Dinov2WithRegistersMLP(_MlpForm, modeling.Dinov2WithRegistersMLP):
    """In place of `Dinov2WithRegistersMLP`."""

    mmfast_original = modeling.Dinov2WithRegistersMLP


class Dinov2WithRegistersSwiGLUFFN(_SwiGLUForm, modeling.Dinov2WithRegistersSwiGLUFFN):
    """In place of `Dinov2WithRegistersSwiGLUFFN`."""

    mmfast_original = modeling.Dinov2WithRegistersSwiGLUFFN


class Dinov2WithRegistersPatchEmbeddings(_PatchForm, modeling.Dinov2WithRegistersPatchEmbeddings):
    """In place of `Dinov2WithRegistersPatchEmbeddings`."""

    mmfast_original = modeling.Dinov2WithRegistersPatchEmbeddings


class Dinov2WithRegistersEmbeddings(_EmbeddingsForm, modeling.Dinov2WithRegistersEmbeddings):
    """In place of `Dinov2WithRegistersEmbeddings`."""

    mmfast_original = modeling.Dinov2WithRegistersEmbeddings
    patches = (
        ()
        if issubclass(_PatchForm, Unknown)
        else (modeling.Dinov2WithRegistersPatchEmbeddings, Dinov2WithRegistersPatchEmbeddings)
    )


if _one_module:

    class Dinov2WithRegistersAttention(_AttentionForm, modeling.Dinov2WithRegistersAttention):
        """In place of `Dinov2WithRegistersAttention`."""

        mmfast_original = modeling.Dinov2WithRegistersAttention

    _attention: Any = Dinov2WithRegistersAttention
else:

    class Dinov2WithRegistersSelfAttention(_AttentionForm, modeling.Dinov2WithRegistersSelfAttention):
        """In place of `Dinov2WithRegistersSelfAttention`."""

        mmfast_original = modeling.Dinov2WithRegistersSelfAttention

    _attention = Dinov2WithRegistersSelfAttention

SCALES[modeling.Dinov2WithRegistersLayerScale] = "lambda1"
DROP_PATHS.add(modeling.Dinov2WithRegistersDropPath)
CLASSES = (
    _attention,
    Dinov2WithRegistersLayer,
    Dinov2WithRegistersMLP,
    Dinov2WithRegistersSwiGLUFFN,
    Dinov2WithRegistersPatchEmbeddings,
    Dinov2WithRegistersEmbeddings,
)
