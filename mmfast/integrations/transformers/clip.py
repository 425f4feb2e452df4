"""Accelerated classes of transformers' CLIP, of both towers."""

from __future__ import annotations

from typing import Any

from transformers.models.clip import modeling_clip

from .._swap import known
from ._clip import ATTENTIONS, LAYERS, ClipEmbeddings
from ._parts import MLPS, known_attention

_LayerForm: Any = known(modeling_clip.CLIPEncoderLayer, *LAYERS)
_AttentionForm: Any = known_attention(modeling_clip.CLIPAttention, *ATTENTIONS)
_MlpForm: Any = known(modeling_clip.CLIPMLP, *MLPS)
_EmbeddingsForm: Any = known(modeling_clip.CLIPVisionEmbeddings, ClipEmbeddings)


class CLIPEncoderLayer(_LayerForm, modeling_clip.CLIPEncoderLayer):
    """In place of `CLIPEncoderLayer`."""

    mmfast_original = modeling_clip.CLIPEncoderLayer


class CLIPAttention(_AttentionForm, modeling_clip.CLIPAttention):
    """In place of `CLIPAttention`."""

    mmfast_original = modeling_clip.CLIPAttention


class CLIPMLP(_MlpForm, modeling_clip.CLIPMLP):
    """In place of `CLIPMLP`."""

    mmfast_original = modeling_clip.CLIPMLP


class CLIPVisionEmbeddings(_EmbeddingsForm, modeling_clip.CLIPVisionEmbeddings):
    """In place of `CLIPVisionEmbeddings`."""

    mmfast_original = modeling_clip.CLIPVisionEmbeddings


CLASSES = (CLIPEncoderLayer, CLIPAttention, CLIPMLP, CLIPVisionEmbeddings)
