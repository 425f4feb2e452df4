"""Modules with torch.nn's or timm's signatures, initialisation and state_dict."""

from .activation import QuickGELU, get_act_layer
from .attention import Attention, AttentionPoolLatent, AttentionPoolPrr
from .cross_attention import CrossAttention
from .drop import DropPath, PatchDropout
from .layer_norm import LayerNorm
from .layer_scale import LayerScale
from .mlp import GEGLU, GluMlp, Mlp, SwiGLU, SwiGLUPacked
from .multihead_attention import MultiheadAttention
from .patch_embed import NormedPatchEmbed, PatchEmbed, resample_patch_embed

__all__ = [
    "GEGLU",
    "Attention",
    "AttentionPoolLatent",
    "AttentionPoolPrr",
    "CrossAttention",
    "DropPath",
    "GluMlp",
    "LayerNorm",
    "LayerScale",
    "Mlp",
    "MultiheadAttention",
    "NormedPatchEmbed",
    "PatchDropout",
    "PatchEmbed",
    "QuickGELU",
    "SwiGLU",
    "SwiGLUPacked",
    "get_act_layer",
    "resample_patch_embed",
]
