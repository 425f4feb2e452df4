"""The operators: functions of tensors with autograd, torch.compile and autocast support."""

from .add_layer_norm import add_layer_norm
from .attention import attention
from .attention_maps import attention_maps
from .attention_qkv import attention_qkv
from .attention_varlen import attention_varlen
from .clip_loss import clip_loss
from .layer_norm import layer_norm
from .linear_act import linear_act
from .patch_embed import patch_embed
from .siglip_loss import siglip_loss

NAMES = (
    "layer_norm",
    "add_layer_norm",
    "attention",
    "attention_qkv",
    "attention_maps",
    "attention_varlen",
    "linear_act",
    "patch_embed",
    "clip_loss",
    "siglip_loss",
)
"""Every op. `mmfast.ops.X`, `mmfast.reference.X`, `mmfast.kernels.X` and `benchmarks/bench_X.py` exist for each."""

__all__ = [
    "NAMES",
    "add_layer_norm",
    "attention",
    "attention_maps",
    "attention_qkv",
    "attention_varlen",
    "clip_loss",
    "layer_norm",
    "linear_act",
    "patch_embed",
    "siglip_loss",
]
