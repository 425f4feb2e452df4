"""Accelerated classes of transformers' SigLIP, of both towers."""

from __future__ import annotations

from typing import Any

from transformers.models.siglip import modeling_siglip

from .._swap import known
from ._clip import ATTENTIONS, LAYERS, PoolingHead, SiglipEmbeddings
from ._parts import MLPS, known_attention

_LayerForm: Any = known(modeling_siglip.SiglipEncoderLayer, *LAYERS)
_AttentionForm: Any = known_attention(modeling_siglip.SiglipAttention, *ATTENTIONS)
_MlpForm: Any = known(modeling_siglip.SiglipMLP, *MLPS)
_EmbeddingsForm: Any = known(modeling_siglip.SiglipVisionEmbeddings, SiglipEmbeddings)
_HeadForm: Any = known(modeling_siglip.SiglipMultiheadAttentionPoolingHead, PoolingHead)


class SiglipEncoderLayer(_LayerForm, modeling_siglip.SiglipEncoderLayer):
    """In place of `SiglipEncoderLayer`."""

    mmfast_original = modeling_siglip.SiglipEncoderLayer


class SiglipAttention(_AttentionForm, modeling_siglip.SiglipAttention):
    """In place of `SiglipAttention`."""

    mmfast_original = modeling_siglip.SiglipAttention


class SiglipMLP(_MlpForm, modeling_siglip.SiglipMLP):
    """In place of `SiglipMLP`."""

    mmfast_original = modeling_siglip.SiglipMLP


class SiglipVisionEmbeddings(_EmbeddingsForm, modeling_siglip.SiglipVisionEmbeddings):
    """In place of `SiglipVisionEmbeddings`."""

    mmfast_original = modeling_siglip.SiglipVisionEmbeddings


class SiglipMultiheadAttentionPoolingHead(_HeadForm, modeling_siglip.SiglipMultiheadAttentionPoolingHead):
    """In place of `SiglipMultiheadAttentionPoolingHead`."""

    mmfast_original = modeling_siglip.SiglipMultiheadAttentionPoolingHead


CLASSES = (
    SiglipEncoderLayer,
    SiglipAttention,
    SiglipMLP,
    SiglipVisionEmbeddings,
    SiglipMultiheadAttentionPoolingHead,
)
