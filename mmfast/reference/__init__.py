"""The definition of each op in plain torch: runnable in float64, differentiable, the truth that ops are graded by."""

from .add_layer_norm import add_layer_norm
from .attention import attention
from .attention_maps import attention_maps
from .attention_qkv import attention_qkv
from .attention_varlen import attention_varlen
from .clip_loss import clip_loss
from .ddim_step import ddim_step
from .ddpm_step import ddpm_step
from .layer_norm import layer_norm
from .linear_act import linear_act
from .noise_like import noise_like
from .noise_mse import noise_mse
from .patch_embed import patch_embed
from .q_sample import q_sample
from .q_step import q_step
from .siglip_loss import siglip_loss

__all__ = [
    "add_layer_norm",
    "attention",
    "attention_maps",
    "attention_qkv",
    "attention_varlen",
    "clip_loss",
    "ddim_step",
    "ddpm_step",
    "layer_norm",
    "linear_act",
    "noise_like",
    "noise_mse",
    "patch_embed",
    "q_sample",
    "q_step",
    "siglip_loss",
]
