"""DINOv2 as Meta released it (the `dinov2` repository and its checkpoints).

timm's names with these differences: blocks may be in chunks (`blocks.chunk.i.`, i counting through), the MLP of
ViT-g is `mlp.w12` (value and gate packed, gate first) and `mlp.w3`, there is a `mask_token`, and a model with
`register_tokens` gives the class token but not the registers a position. The canonical model has positions for the
patches alone there (`no_embed_class`), so the class token's position is added to the token: the same sum, and
timm's way. It cannot be taken apart again: written back, the class token's position is 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._names import ConvertedState, Reasons, Rule, read, restore_aside, write
from .timm import SHAPES

NAME = "dinov2"
FACTS: dict[str, Any] = {"eps": 1e-6, "act_layer": "gelu", "global_pool": "token", "dynamic_img_size": True}

_SAME = tuple(
    name
    for name in SHAPES
    if re.match(
        r"cls_token|pos_embed|patch_embed\.proj|blocks.*(norm[12]|attn\.(qkv|proj)|ls[12])\.|norm\.|head\.", name
    )
)

RULES: tuple[Rule, ...] = (
    *(Rule(name, name) for name in _SAME),
    Rule("reg_token", "register_tokens"),
    Rule("blocks.{i}.mlp.fc1.{p}", "blocks.{i}.mlp.fc1.{p}", "mlp"),
    Rule("blocks.{i}.mlp.fc2.{p}", "blocks.{i}.mlp.fc2.{p}", "mlp"),
    Rule("blocks.{i}.mlp.fc1.{p}", "blocks.{i}.mlp.w12.{p}", "swiglu"),
    Rule("blocks.{i}.mlp.fc2.{p}", "blocks.{i}.mlp.w3.{p}", "swiglu"),
)

REASONS = Reasons(
    aside={r"mask_token": "only masked pre-training uses the mask token"},
    refused={r"linear_head\..*": "the linear head reads the class token and the mean of the patches"},
)

_PREFIXES = ("teacher.backbone.", "student.backbone.", "backbone.", "")
_CHUNKED = re.compile(r"blocks\.\d+\.(\d+)\.")


def detect(keys: Sequence[str]) -> bool:
    """Whether the keys are of this layout."""
    return any(
        re.search(r"(^|\.)(register_tokens|blocks\.\d+\.\d+\..*|blocks\.\d+\.mlp\.(w12|w3)\..*)$", key)
        or (re.search(r"(^|\.)mask_token$", key) and "embeddings." not in key)
        for key in keys
    ) and any(key.endswith("patch_embed.proj.weight") for key in keys)


def to_timm(state: Mapping[str, Tensor], *, strict: bool = True) -> ConvertedState:
    """Read DINOv2's names; of a training checkpoint, the backbone (heads are kept aside)."""
    prefix = next(p for p in _PREFIXES if any(k.startswith(f"{p}patch_embed.") for k in state) or p == "")
    outside = "not the backbone" if prefix else None
    whole = {_CHUNKED.sub(r"blocks.\1.", key): tensor for key, tensor in state.items()}
    if len(whole) != len(state):
        raise ValueError(f"to_timm({NAME}): chunked blocks must be numbered through, but two have the same number")
    out = read(NAME, RULES, whole, prefix=prefix, outside=outside, reasons=REASONS, strict=strict)
    out.facts.update(FACTS, no_embed_class=fold_class_position(out))
    # Meta resamples positions with an offset and without antialiasing, but not where there are registers.
    out.facts["pos_embed_resample"] = "timm" if "reg_token" in out else "dinov2"
    if out.dialect == "swiglu":
        out.facts["act_layer"] = "silu"
    return out


def fold_class_position(state: ConvertedState) -> bool:
    """Where there are registers, add the class token's position to it and drop that position; return whether."""
    if "reg_token" not in state:
        return False
    position = state["pos_embed"]
    state["cls_token"] = state["cls_token"].detach() + position[:, :1].detach()
    state["pos_embed"] = position[:, 1:]
    return True


def unfold_class_position(state: Mapping[str, Tensor], who: str) -> dict[str, Tensor]:
    """Give the class token of a model with registers a position again, of 0."""
    out = dict(state)
    if "reg_token" in out:
        if "cls_token" not in out or "pos_embed" not in out:
            raise ValueError(f"{who}: a model with registers must have cls_token and pos_embed")
        position = out["pos_embed"]
        out["pos_embed"] = torch.cat((torch.zeros_like(position[:, :1]), position), dim=1)
    return out


def from_timm(
    state: Mapping[str, Tensor], *, prefix: str | None = None, dialect: str | None = None
) -> dict[str, Tensor]:
    """Write DINOv2's names, unchunked. dialect: "mlp" or "swiglu", by default what the shapes say."""
    if isinstance(state, ConvertedState) and state.source == NAME:
        prefix = state.prefix if prefix is None else prefix
    if dialect is None:
        dialect = "swiglu" if is_gated(state) else "mlp"
    flat = unfold_class_position(state, f"from_timm({NAME})")
    out = write(NAME, RULES, flat, dialect=dialect, prefix=prefix or "")
    return restore_aside(out, state, NAME)


def is_gated(state: Mapping[str, Tensor]) -> bool:
    """Whether the MLP packs a gate: fc1 has twice as many rows as fc2 has columns."""
    first, second = (state.get(f"blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
    return first is not None and second is not None and first.shape[0] == 2 * second.shape[1]
