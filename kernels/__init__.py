"""Triton kernels and their launchers, one file an op, installed as `mmfast.kernels`.

Tensors in, tensors out: nothing here knows autograd, modules or which backend to choose. Importing this package
imports Triton; `mmfast` does so on the first call that a kernel serves.
"""

from triton.runtime.jit import JITFunction

from . import (
    add_layer_norm,
    attention,
    attention_maps,
    attention_qkv,
    attention_varlen,
    clip_loss,
    ddim_step,
    ddpm_step,
    layer_norm,
    linear_act,
    noise_like,
    noise_mse,
    patch_embed,
    q_sample,
    q_step,
    siglip_loss,
)

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
    "noise_like",
    "q_sample",
    "ddpm_step",
    "ddim_step",
    "noise_mse",
    "q_step",
)

INTERPRETED = not isinstance(layer_norm.layer_norm_forward_kernel, JITFunction)
"""Whether the kernels were imported under TRITON_INTERPRET=1 and run on CPU tensors."""

__all__ = [
    "INTERPRETED",
    "NAMES",
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
