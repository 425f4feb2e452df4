"""Modules with torch.nn's or timm's signatures, initialisation and state_dict."""

from .activation import QuickGELU, get_act_layer
from .attention import Attention, AttentionPoolLatent, AttentionPoolPrr
from .attention_pool_2d import AttentionPool2d
from .clip_loss import ClipLoss, DistillClipLoss
from .cross_attention import CrossAttention
from .drop import DropPath, PatchDropout
from .layer_norm import LayerNorm
from .layer_scale import LayerScale
from .mlp import GEGLU, GluMlp, Mlp, SwiGLU, SwiGLUPacked
from .multihead_attention import MultiheadAttention
from .patch_embed import NormedPatchEmbed, PatchEmbed, resample_patch_embed
from .siglip_loss import SigLipLoss

__all__ = [
    "GEGLU",
    "Attention",
    "AttentionPool2d",
    "AttentionPoolLatent",
    "AttentionPoolPrr",
    "ClipLoss",
    "CrossAttention",
    "DistillClipLoss",
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
    "SigLipLoss",
    "SwiGLU",
    "SwiGLUPacked",
    "get_act_layer",
    "resample_patch_embed",
]
