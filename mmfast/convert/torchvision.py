"""torchvision's VisionTransformer (`vit_b_16` and its like), with the MLP names of torchvision 0.12 and before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ._names import ConvertedState, Reasons, Rule, read, restore_aside, write

NAME = "torchvision"
FACTS: dict[str, Any] = {"eps": 1e-6, "act_layer": "gelu", "no_embed_class": False, "global_pool": "token"}

_LAYER = "encoder.layers.encoder_layer_{i}"

RULES: tuple[Rule, ...] = (
    Rule("cls_token", "class_token"),
    Rule("pos_embed", "encoder.pos_embedding"),
    Rule("patch_embed.proj.{p}", "conv_proj.{p}"),
    Rule("blocks.{i}.norm1.{p}", f"{_LAYER}.ln_1.{{p}}"),
    Rule("blocks.{i}.norm2.{p}", f"{_LAYER}.ln_2.{{p}}"),
    Rule("blocks.{i}.attn.qkv.{p}", f"{_LAYER}.self_attention.in_proj_{{p}}"),
    Rule("blocks.{i}.attn.proj.{p}", f"{_LAYER}.self_attention.out_proj.{{p}}"),
    Rule("blocks.{i}.mlp.fc1.{p}", f"{_LAYER}.mlp.0.{{p}}", "new"),
    Rule("blocks.{i}.mlp.fc2.{p}", f"{_LAYER}.mlp.3.{{p}}", "new"),
    Rule("blocks.{i}.mlp.fc1.{p}", f"{_LAYER}.mlp.linear_1.{{p}}", "old"),
    Rule("blocks.{i}.mlp.fc2.{p}", f"{_LAYER}.mlp.linear_2.{{p}}", "old"),
    Rule("norm.{p}", "encoder.ln.{p}"),
    Rule("head.{p}", "heads.head.{p}"),
)

REASONS = Reasons(
    refused={
        r"heads\.pre_logits\.(weight|bias)": "a representation layer with tanh before the head",
        r"conv_proj\..*conv_bn_relu.*": "a stem of several convolutions with BatchNorm",
    },
)


def detect(keys: Sequence[str]) -> bool:
    """Whether the keys are of this layout."""
    return any(key.startswith("encoder.layers.encoder_layer_") for key in keys)


def to_timm(state: Mapping[str, Tensor], *, strict: bool = True) -> ConvertedState:
    """Read torchvision's names."""
    out = read(NAME, RULES, state, reasons=REASONS, strict=strict)
    out.facts.update(FACTS)
    return out


def from_timm(state: Mapping[str, Tensor], *, dialect: str | None = None) -> dict[str, Tensor]:
    """Write torchvision's names. dialect: "new" (`mlp.0`, `mlp.3`) or "old" (`mlp.linear_1`, `mlp.linear_2`)."""
    if dialect is None and isinstance(state, ConvertedState) and state.source == NAME:
        dialect = state.dialect
    out = write(NAME, RULES, state, dialect=dialect or "new")
    return restore_aside(out, state, NAME)


def describe(model: nn.Module) -> dict[str, Any] | None:
    """Return what a torchvision VisionTransformer's state dict does not tell, or None for another class."""
    cls = type(model)
    if cls.__name__ != "VisionTransformer" or not cls.__module__.startswith("torchvision."):
        return None
    m: Any = model
    block = m.encoder.layers[0]
    return {
        "num_heads": block.num_heads,
        "eps": block.ln_1.eps,
        "img_size": m.image_size,
        "pos_drop_rate": m.encoder.dropout.p,
        "proj_drop_rate": block.dropout.p,
        "attn_drop_rate": block.self_attention.dropout,
    }
