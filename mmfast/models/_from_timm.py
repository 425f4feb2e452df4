"""Read the configuration of a timm `VisionTransformer` off an instance."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from ..nn import Attention, GluMlp, LayerNorm, SwiGLU
from ..nn.mlp import Mlp


def timm_arguments(model: Any) -> dict[str, Any]:
    """Return the arguments of `ViT` that give a timm `VisionTransformer`'s configuration.

    Raises:
        TypeError: the model is not a `VisionTransformer` of plain blocks, or has a part that ViT does not.
    """
    _expect(model, "model", "VisionTransformer")
    if not len(model.blocks):
        raise TypeError("ViT.from_timm: the model must have at least one block, got none")
    block = model.blocks[0]
    _expect(block, "blocks", "Block")
    _expect(block.attn, "blocks.attn", "Attention")
    _expect(model.patch_embed, "patch_embed", "PatchEmbed")
    attn, mlp, embed = block.attn, block.mlp, model.patch_embed
    hidden = (mlp.fc1_g if hasattr(mlp, "fc1_g") else mlp.fc1).out_features
    norm = block.norm1
    return {
        "img_size": embed.img_size,
        "patch_size": embed.patch_size,
        "in_chans": embed.proj.in_channels,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": attn.num_heads,
        # Half a unit more, so that int(dim * ratio) comes out exactly.
        "mlp_ratio": (hidden + 0.5) / model.embed_dim,
        "qkv_bias": attn.qkv.bias is not None,
        "qk_norm": _is_there(attn.q_norm),
        "scale_attn_norm": _is_there(attn.norm),
        "scale_mlp_norm": _is_there(mlp.norm),
        "proj_bias": attn.proj.bias is not None,
        "init_values": getattr(block.ls1, "init_values", None),
        "class_token": model.cls_token is not None,
        "pos_embed": "none" if model.pos_embed is None else "learn",
        "no_embed_class": model.no_embed_class,
        "reg_tokens": model.num_reg_tokens,
        "pre_norm": _is_there(model.norm_pre),
        "final_norm": _is_there(model.norm) or _is_there(model.fc_norm),
        "fc_norm": _is_there(model.fc_norm),
        "pool_include_prefix": model.pool_include_prefix,
        "dynamic_img_size": model.dynamic_img_size,
        "dynamic_img_pad": embed.dynamic_img_pad,
        "drop_rate": model.head_drop.p,
        "pos_drop_rate": model.pos_drop.p,
        "patch_drop_rate": getattr(model.patch_drop, "prob", 0.0),
        "proj_drop_rate": attn.proj_drop.p,
        "attn_drop_rate": attn.attn_drop.p,
        "drop_path_rate": getattr(model.blocks[-1].drop_path1, "drop_prob", 0.0),
        "embed_norm_layer": _norm_layer(embed.norm) if _is_there(embed.norm) else None,
        "norm_layer": _norm_layer(norm),
        "act_layer": _act_layer(mlp.act),
        "attn_layer": partial(Attention, gated=True) if getattr(attn, "gate", None) is not None else None,
        "mlp_layer": _mlp_layer(mlp),
    }


def timm_normalisation(model: Any) -> dict[str, tuple[float, ...]]:
    """Return the mean and std that a timm model was trained with, from its `pretrained_cfg` or `default_cfg`.

    Raises:
        ValueError: it has none.
    """
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    found = {name: config.get(name) for name in ("mean", "std")}
    if not all(found.values()):
        raise ValueError(
            "ViT.from_timm: uint8=True needs a model with mean and std in pretrained_cfg; give mean and std"
        )
    return {name: tuple(map(float, values)) for name, values in found.items() if values}


def _expect(module: nn.Module, where: str, kind: str) -> None:
    if type(module).__name__ != kind:
        raise TypeError(f"ViT.from_timm: {where} must be a {kind}, got {type(module).__name__}")


def _is_there(module: nn.Module) -> bool:
    return not isinstance(module, nn.Identity)


def _norm_layer(norm: nn.Module) -> Any:
    kind: Any = LayerNorm if isinstance(norm, nn.LayerNorm) and type(norm).__name__ == "LayerNorm" else type(norm)
    return partial(kind, eps=norm.eps) if hasattr(norm, "eps") else kind


def _act_layer(act: nn.Module) -> Any:
    return "gelu_tanh" if isinstance(act, nn.GELU) and act.approximate == "tanh" else type(act)


def _mlp_layer(mlp: Any) -> Any:
    name = type(mlp).__name__
    if name == "GluMlp":
        return partial(GluMlp, gate_last=mlp.gate_last)
    kinds = {"Mlp": Mlp, "SwiGLU": SwiGLU}
    if name not in kinds:
        raise TypeError(f"ViT.from_timm: blocks.mlp must be one of {', '.join(kinds)} or GluMlp, got {name}")
    return kinds[name]
