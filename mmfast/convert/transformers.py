"""Hugging Face transformers: ViT, DeiT, DINOv2 and DINOv2 with registers.

Two sets of names: those of the files, which version 4 also has in memory ("disk": `encoder.layer.i.attention.
attention.query`), and those of version 5 in memory ("memory": `layers.i.attention.q_proj`). Both are read, also
mixed; `save_pretrained` of version 5 still writes the old ones. A model with a head puts its backbone behind `vit.`,
`deit.` or `dinov2.`.

`pooler.dense` (of ViTModel) is kept aside: it applies after the features that the canonical model returns.
DeiT's distillation token is a register that has a position. DINOv2's class token takes its position with it where
there are registers (see `dinov2`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from torch import Tensor, nn

from ._names import ConvertedState, Reasons, Rule, read, restore_aside, write
from .dinov2 import fold_class_position, is_gated, unfold_class_position

NAME = "transformers"
DIALECTS = tuple(f"{family}/{where}" for family, where in product(("vit", "deit", "dinov2"), ("disk", "memory")))

# hidden_act of a config -> act_layer
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}

_PATCH = "embeddings.patch_embeddings.projection.weight"


def _table(dialect: str, gated: bool, layer: str | None = None) -> list[Rule]:
    """The names of one dialect; `layer` overrides how it calls a layer."""
    family, where = dialect.split("/")
    old = where == "disk"
    layer = layer or ("layers.{i}" if family != "dinov2" and not old else "encoder.layer.{i}")
    norms = ("norm1", "norm2") if family == "dinov2" else ("layernorm_before", "layernorm_after")
    qkv = ("attention.query", "attention.key", "attention.value") if old else ("q_proj", "k_proj", "v_proj")
    first: tuple[str, ...]
    if gated:
        first, second = (("mlp.weights_in",), "mlp.weights_out") if old else (_GATE_UP, "mlp.down_proj")
    elif old and family != "dinov2":
        first, second = ("intermediate.dense",), "output.dense"
    else:
        first, second = ("mlp.fc1",), "mlp.fc2"
    fc1 = tuple(f"{layer}.{name}.{{p}}" for name in first)
    return [
        Rule("cls_token", "embeddings.cls_token"),
        Rule("reg_token", "embeddings.distillation_token" if family == "deit" else "embeddings.register_tokens"),
        Rule("pos_embed", "embeddings.position_embeddings"),
        Rule("patch_embed.proj.{p}", "embeddings.patch_embeddings.projection.{p}"),
        Rule("blocks.{i}.norm1.{p}", f"{layer}.{norms[0]}.{{p}}"),
        Rule("blocks.{i}.attn.qkv.{p}", tuple(f"{layer}.attention.{name}.{{p}}" for name in qkv)),
        Rule("blocks.{i}.attn.proj.{p}", f"{layer}.attention.{'output.dense' if old else 'o_proj'}.{{p}}"),
        Rule("blocks.{i}.ls1.gamma", f"{layer}.layer_scale1.lambda1"),
        Rule("blocks.{i}.norm2.{p}", f"{layer}.{norms[1]}.{{p}}"),
        Rule("blocks.{i}.mlp.fc1.{p}", fc1 if len(fc1) > 1 else fc1[0]),
        Rule("blocks.{i}.mlp.fc2.{p}", f"{layer}.{second}.{{p}}"),
        Rule("blocks.{i}.ls2.gamma", f"{layer}.layer_scale2.lambda1"),
        Rule("norm.{p}", "layernorm.{p}"),
        Rule("head.{p}", "classifier.{p}", bare=True),
    ]


_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")

# Every name within a layer under every name of a layer: versions of transformers between 4 and 5 mix them.
_ALL = tuple(
    dict.fromkeys(
        rule
        for dialect, gated, layer in product(DIALECTS, (False, True), ("layers.{i}", "encoder.layer.{i}"))
        for rule in _table(dialect, gated, layer)
    )
)

REASONS = Reasons(
    aside={
        r"pooler\.dense\.(weight|bias)": "the pooler comes after the features that a ViT returns",
        r"embeddings\.mask_token": "only masked pre-training uses the mask token",
    },
    refused={
        r"(cls|distillation)_classifier\..*": "the logits are the mean of two heads",
        r"decoder\..*": "a decoder for masked pre-training",
    },
)


def detect(keys: Sequence[str]) -> bool:
    """Whether the keys are of this layout."""
    return any(key == _PATCH or key.endswith(f".{_PATCH}") for key in keys)


def to_timm(state: Mapping[str, Tensor], *, strict: bool = True) -> ConvertedState:
    """Read transformers' names, old, new or mixed, with or without the backbone's prefix."""
    prefix = next((key[: -len(_PATCH)] for key in state if key.endswith(_PATCH)), "")
    out = read(NAME, _ALL, state, prefix=prefix, reasons=REASONS, strict=strict)
    _refuse_wide_head(out, strict)
    distilled = any(key.endswith("embeddings.distillation_token") for key in state)
    dinov2 = any(name.endswith(".ls1.gamma") for name in out) or ("reg_token" in out and not distilled)
    old = any(".attention.attention." in key for key in state)
    out.dialect = f"{'dinov2' if dinov2 else 'deit' if distilled else 'vit'}/{'disk' if old else 'memory'}"
    out.facts = {
        "eps": 1e-6 if dinov2 else 1e-12,
        "act_layer": "silu" if is_gated(out) else "gelu",
        "global_pool": "token",
        "no_embed_class": fold_class_position(out) if dinov2 else False,
    }
    if dinov2:  # takes images of any size; without registers it resamples positions without antialiasing
        out.facts |= {"dynamic_img_size": True, "pos_embed_antialias": "reg_token" in out}
    else:
        out.facts["pos_embed_resample"] = "transformers"
    return out


def _refuse_wide_head(state: ConvertedState, strict: bool) -> None:
    """DINOv2's classifier reads the class token beside the mean of the patches: the canonical head cannot."""
    head, patch = state.get("head.weight"), state.get("patch_embed.proj.weight")
    if head is None or patch is None or head.shape[-1] != 2 * patch.shape[0]:
        return
    why = "the classifier reads the class token and the mean of the patches"
    if strict:
        raise ValueError(
            f"to_timm({NAME}): not representable in the ViT layout: classifier.weight ({why}). "
            "strict=False keeps it aside"
        )
    for kind in ("weight", "bias"):
        if f"head.{kind}" in state:
            state.aside[f"classifier.{kind}"] = state.pop(f"head.{kind}")
            state.reasons[f"classifier.{kind}"] = why


def from_timm(
    state: Mapping[str, Tensor], *, prefix: str | None = None, dialect: str | None = None
) -> dict[str, Tensor]:
    """Write transformers' names.

    dialect: "vit", "deit" or "dinov2", a slash, and "disk" (the names in files, which every version's
    `from_pretrained` reads) or "memory" (version 5's `state_dict()`). By default the one that the state was read
    from, or else "disk" with the family that the keys suggest.
    prefix: of the backbone ("vit."), by default the one that the state was read with.
    """
    origin = state if isinstance(state, ConvertedState) and state.source == NAME else None
    if prefix is None:
        prefix = origin.prefix if origin is not None else ""
    if dialect is None:
        dinov2 = "blocks.0.ls1.gamma" in state or "reg_token" in state
        dialect = (origin.dialect if origin is not None else None) or ("dinov2/disk" if dinov2 else "vit/disk")
    if dialect not in DIALECTS:
        raise ValueError(f"from_timm({NAME}): dialect must be one of {', '.join(DIALECTS)}, got {dialect!r}")
    flat = unfold_class_position(state, f"from_timm({NAME})") if dialect.startswith("dinov2") else state
    out = write(NAME, _table(dialect, is_gated(state)), ConvertedState.like(state, flat), prefix=prefix)
    return restore_aside(out, state, NAME)


_CLASSES = (
    "ViTModel",
    "ViTForImageClassification",
    "DeiTModel",
    "DeiTForImageClassification",
    "Dinov2Model",
    "Dinov2ForImageClassification",
    "Dinov2WithRegistersModel",
    "Dinov2WithRegistersForImageClassification",
)


def describe(model: nn.Module) -> dict[str, Any] | None:
    """Return what the state dict of a transformers model does not tell, or None for another class."""
    cls = type(model)
    known = cls.__name__ in _CLASSES and cls.__module__.startswith("transformers.")
    return facts_of_config(model.config) if known else None


def facts_of_config(config: Any) -> dict[str, Any]:
    """Return the constructor facts in a transformers vision config.

    Raises ValueError for an activation that mmfast has no name for.
    """
    act = config.hidden_act
    if act not in ACTIVATIONS:
        raise ValueError(f"vit_config: hidden_act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
    size = config.image_size
    facts = {
        "num_heads": config.num_attention_heads,
        "eps": config.layer_norm_eps,
        "act_layer": ACTIVATIONS[act],
        "img_size": size if isinstance(size, int) else tuple(size),
    }
    if getattr(config, "use_swiglu_ffn", False):
        facts["act_layer"] = "silu"  # whatever hidden_act says
    return facts
