"""Initialisation of a ViT: timm's modes, drawing the same numbers from the same generator state."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..nn._init import trunc_normal_

if TYPE_CHECKING:
    from .vit import ViT

MODES = ("", "skip", "reset", "jax", "jax_nlhb", "moco")
# Standard deviation of a standard normal truncated at two standard deviations.
TRUNCATED_STD = 0.87962566103423978


def init_vit(model: ViT, mode: str, *, needs_reset: bool) -> None:
    """Initialise `model` in place.

    | mode | linear layers | patch embedding | head |
    |---|---|---|---|
    | "" | normal(0.02), truncated at +-2; bias 0 | torch's | as linear |
    | "jax" | Xavier uniform; bias 0, in an MLP normal(1e-6) | LeCun normal | 0 |
    | "jax_nlhb" | as "jax" | as "jax" | 0, bias -log(classes) |
    | "moco" | Xavier uniform, q, k and v apart; bias 0 | torch's | as linear |
    | "reset" | torch's | torch's | torch's |

    Args:
        model: the ViT.
        mode: one of the above.
        needs_reset: also call `reset_parameters` of modules that the mode leaves alone.
    """
    if model.pos_embed is not None:
        trunc_normal_(model.pos_embed, std=0.02)
    if model.cls_token is not None:
        nn.init.normal_(model.cls_token, std=1e-6)
    if model.reg_token is not None:
        nn.init.normal_(model.reg_token, std=1e-6)
    head_bias = -math.log(max(model.num_classes, 1)) if mode == "jax_nlhb" else 0.0
    for name, module in _depth_first(model):
        if not _init_module(module, name, mode, head_bias) and needs_reset and hasattr(module, "reset_parameters"):
            module.reset_parameters()
    if model.fix_init:
        _fix_init(model)


def _depth_first(module: nn.Module, prefix: str = "") -> list[tuple[str, Any]]:
    """All modules below `module`, children before parents: the order fixes which draws go where."""
    found: list[tuple[str, Any]] = []
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        found += [*_depth_first(child, path), (path, child)]
    return found


def _init_module(module: Any, name: str, mode: str, head_bias: float) -> bool:
    """Initialise one module if `mode` says how, and return whether it did."""
    if mode == "reset":
        return False
    if isinstance(module, nn.Linear):
        _init_linear(module, name, mode, head_bias)
    elif isinstance(module, nn.Conv2d) and mode.startswith("jax"):
        _lecun_normal(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif hasattr(module, "init_weights"):
        module.init_weights()
    else:
        return False
    return True


def _init_linear(module: nn.Linear, name: str, mode: str, head_bias: float) -> None:
    bias_std, bias = 0.0, 0.0
    if mode == "":
        trunc_normal_(module.weight, std=0.02)
    elif mode.startswith("jax") and name.startswith("head"):
        nn.init.zeros_(module.weight)
        bias = head_bias
    elif mode == "moco" and "qkv" in name:
        bound = math.sqrt(6.0 / (module.weight.shape[0] // 3 + module.weight.shape[1]))
        nn.init.uniform_(module.weight, -bound, bound)
    else:
        nn.init.xavier_uniform_(module.weight)
        bias_std = 1e-6 if mode.startswith("jax") and "mlp" in name else 0.0
    if module.bias is None:
        return
    if bias_std:
        nn.init.normal_(module.bias, std=bias_std)
    else:
        nn.init.constant_(module.bias, bias)


@torch.no_grad()
def _lecun_normal(weight: Tensor) -> None:
    fan_in = weight[0].numel()
    trunc_normal_(weight).mul_(math.sqrt(1.0 / fan_in) / TRUNCATED_STD)


@torch.no_grad()
def _fix_init(model: ViT) -> None:
    """Scale the output layers of block i by 1 / sqrt(2 (i + 1)) (BEiT)."""
    for index, block in enumerate(model.blocks):
        scale = math.sqrt(2.0 * (index + 1))
        block.attn.proj.weight.div_(scale)
        block.mlp.fc2.weight.div_(scale)
