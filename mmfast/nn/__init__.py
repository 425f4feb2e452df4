"""Modules with torch.nn's or timm's signatures, initialisation and state_dict."""

from .activation import QuickGELU, get_act_layer
from .attention import Attention, AttentionPoolLatent, AttentionPoolPrr
from .drop import DropPath, PatchDropout
from .layer_norm import LayerNorm
from .layer_scale import LayerScale
from .mlp import GluMlp, Mlp, SwiGLU, SwiGLUPacked
from .patch_embed import NormedPatchEmbed, PatchEmbed, resample_patch_embed

__all__ = [
    "Attention",
    "AttentionPoolLatent",
    "AttentionPoolPrr",
    "DropPath",
    "GluMlp",
    "LayerNorm",
    "LayerScale",
    "Mlp",
    "NormedPatchEmbed",
    "PatchDropout",
    "PatchEmbed",
    "QuickGELU",
    "SwiGLU",
    "SwiGLUPacked",
    "get_act_layer",
    "resample_patch_embed",
]
