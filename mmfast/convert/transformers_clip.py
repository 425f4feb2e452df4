"""Hugging Face transformers: the image towers of CLIP and SigLIP.

From the tower's own state dict, with or without `vision_model.`, or from that of the whole CLIPModel or SiglipModel
(the text tower is kept aside). CLIP's `visual_projection` becomes `head.weight` with a zero bias; SigLIP's pooling
head becomes `attn_pool`, whose q and kv are separate. CLIP's activation is not in a state dict: OpenAI's weights use
QuickGELU, others GELU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._names import ConvertedState, Reasons, Rule, read, restore_aside, write
from .timm import add_bias, drop_bias
from .transformers import facts_of_config

NAME = "transformers_clip"

_LAYER = "encoder.layers.{i}"
_PATCH = "embeddings.patch_embedding.weight"
_QKV = tuple(f"{_LAYER}.self_attn.{name}_proj.{{p}}" for name in "qkv")

RULES: tuple[Rule, ...] = (
    Rule("cls_token", "embeddings.class_embedding", to=lambda t: t[None, None], back=lambda t: t[0, 0]),
    Rule("pos_embed", "embeddings.position_embedding.weight", to=lambda t: t[None], back=lambda t: t[0]),
    Rule("patch_embed.proj.{p}", "embeddings.patch_embedding.{p}"),
    Rule("norm_pre.{p}", "pre_layrnorm.{p}"),
    Rule("blocks.{i}.norm1.{p}", f"{_LAYER}.layer_norm1.{{p}}"),
    Rule("blocks.{i}.attn.qkv.{p}", _QKV),
    Rule("blocks.{i}.attn.proj.{p}", f"{_LAYER}.self_attn.out_proj.{{p}}"),
    Rule("blocks.{i}.norm2.{p}", f"{_LAYER}.layer_norm2.{{p}}"),
    Rule("blocks.{i}.mlp.fc1.{p}", f"{_LAYER}.mlp.fc1.{{p}}"),
    Rule("blocks.{i}.mlp.fc2.{p}", f"{_LAYER}.mlp.fc2.{{p}}"),
    Rule("norm.{p}", "post_layernorm.{p}"),
    Rule("attn_pool.latent", "head.probe"),
    Rule("attn_pool.qkv.{p}", "head.attention.in_proj_{p}"),
    Rule("attn_pool.proj.{p}", "head.attention.out_proj.{p}"),
    Rule("attn_pool.norm.{p}", "head.layernorm.{p}"),
    Rule("attn_pool.mlp.fc1.{p}", "head.mlp.fc1.{p}"),
    Rule("attn_pool.mlp.fc2.{p}", "head.mlp.fc2.{p}"),
    Rule("head.weight", "visual_projection.weight", bare=True),
)

REASONS = Reasons(aside={r"embeddings\.position_ids": "a buffer that counts the positions"})


def detect(keys: Sequence[str]) -> bool:
    """Whether the keys are of this layout."""
    return any(key in (_PATCH, f"vision_model.{_PATCH}") for key in keys)


def to_timm(state: Mapping[str, Tensor], *, strict: bool = True) -> ConvertedState:
    """Read the names of CLIP's or SigLIP's image tower."""
    prefix = next((key[: -len(_PATCH)] for key in state if key.endswith(_PATCH)), "")
    outside = "not the image tower" if prefix else None
    out = read(NAME, RULES, state, prefix=prefix, outside=outside, reasons=REASONS, strict=strict)
    for kind in ("weight", "bias"):
        packed = out.pop(f"attn_pool.qkv.{kind}", None)
        if packed is not None:
            width = packed.shape[0] // 3
            out[f"attn_pool.q.{kind}"], out[f"attn_pool.kv.{kind}"] = packed[:width], packed[width:]
    clip = "norm_pre.weight" in out
    if clip:
        add_bias(out, "head.bias")
    out.facts = {
        "eps": 1e-5 if clip else 1e-6,
        "act_layer": None if clip else "gelu_tanh",
        "ambiguous_act": clip,
        "pos_embed_resample": "transformers",
        "no_embed_class": False,
        "global_pool": "token" if clip else "map" if "attn_pool.latent" in out else "",
    }
    return out


def from_timm(
    state: Mapping[str, Tensor], *, prefix: str | None = None, dialect: str | None = None
) -> dict[str, Tensor]:
    """Write the names of CLIP's (with `norm_pre`) or SigLIP's image tower. prefix: "" or "vision_model."."""
    if isinstance(state, ConvertedState) and state.source == NAME:
        prefix = state.prefix if prefix is None else prefix
    kept = ConvertedState.like(state, state)
    drop_bias(kept, state, "head.bias", f"from_timm({NAME})")
    for kind in ("weight", "bias"):
        q, kv = kept.pop(f"attn_pool.q.{kind}", None), kept.pop(f"attn_pool.kv.{kind}", None)
        if q is not None and kv is not None:
            kept[f"attn_pool.qkv.{kind}"] = torch.cat((q, kv))
    out = write(NAME, RULES, kept, prefix=prefix or "")
    return restore_aside(out, state, NAME)


_TOWERS = ("CLIPVisionModel", "CLIPVisionModelWithProjection", "SiglipVisionModel")
_WHOLE = ("CLIPModel", "SiglipModel")


def describe(model: nn.Module) -> dict[str, Any] | None:
    """Return what the state dict of a CLIP or SigLIP model does not tell, or None for another class."""
    name = type(model).__name__
    if name not in _TOWERS + _WHOLE or not type(model).__module__.startswith("transformers."):
        return None
    config: Any = model.config
    return facts_of_config(config.vision_config if name in _WHOLE else config)
