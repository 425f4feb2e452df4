"""The image tower of OpenAI's CLIP and of open_clip, from its own state dict or from that of the whole CLIP.

`proj`, a matrix (D, K) without bias, becomes `head.weight` with a zero bias. A tower without `ln_pre` has no bias in
its patch convolution either, so a zero one is added. A tower inside open_clip that is a timm model (`visual.trunk.`)
is timm's layout. The whole CLIP's text tower is kept aside. OpenAI's weights use QuickGELU and most of open_clip's
GELU, with the same names, so a state dict does not tell the activation; only OpenAI's own files do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ._names import ConvertedState, Reasons, Rule, read, restore_aside, write
from .timm import add_bias, drop_bias

NAME = "open_clip"
FACTS: dict[str, Any] = {"eps": 1e-5, "ambiguous_act": True, "no_embed_class": False, "global_pool": "token"}

_LAYER = "transformer.resblocks.{i}"

RULES: tuple[Rule, ...] = (
    Rule("cls_token", "class_embedding", to=lambda t: t[None, None], back=lambda t: t[0, 0]),
    Rule("pos_embed", "positional_embedding", to=lambda t: t[None], back=lambda t: t[0]),
    Rule("patch_embed.proj.{p}", "conv1.{p}"),
    Rule("norm_pre.{p}", "ln_pre.{p}"),
    Rule("blocks.{i}.norm1.{p}", f"{_LAYER}.ln_1.{{p}}"),
    Rule("blocks.{i}.norm2.{p}", f"{_LAYER}.ln_2.{{p}}"),
    Rule("blocks.{i}.attn.qkv.{p}", f"{_LAYER}.attn.in_proj_{{p}}"),
    Rule("blocks.{i}.attn.proj.{p}", f"{_LAYER}.attn.out_proj.{{p}}"),
    Rule("blocks.{i}.ls1.gamma", f"{_LAYER}.ls_1.gamma"),
    Rule("blocks.{i}.ls2.gamma", f"{_LAYER}.ls_2.gamma"),
    Rule("blocks.{i}.mlp.fc1.{p}", f"{_LAYER}.mlp.c_fc.{{p}}"),
    Rule("blocks.{i}.mlp.fc2.{p}", f"{_LAYER}.mlp.c_proj.{{p}}"),
    Rule("norm.{p}", "ln_post.{p}"),
    Rule("fc_norm.{p}", "ln_post.{p}", "fc_norm"),
    Rule("head.weight", "proj", to=lambda t: t.t(), back=lambda t: t.t()),
)

REASONS = Reasons(
    refused={
        r"attn_pool.*": "CoCa's attentional pool",
        r".*\.(ln_attn|attn\.ln|mlp\.ln)\..*": "a norm inside the attention or MLP of a custom block",
        r".*\.attn\.(logit_scale|head_scale)": "scaled cosine attention or scaled heads",
    },
)

# The sizes that OpenAI's own files carry beside the weights: they mean QuickGELU.
_OPENAI = ("input_resolution", "context_length", "vocab_size")


def detect(keys: Sequence[str]) -> bool:
    """Whether the keys are of this layout."""
    return any(key in ("class_embedding", "visual.class_embedding") for key in keys)


def to_timm(state: Mapping[str, Tensor], *, strict: bool = True, fc_norm: bool = False) -> ConvertedState:
    """Read open_clip's names.

    fc_norm: `ln_post` is after the pooling (open_clip's `final_ln_after_pool` with average pooling).
    """
    prefix = "visual." if any(key.startswith("visual.") for key in state) else ""
    outside = "not the image tower" if prefix else None
    out = read(NAME, RULES, state, prefix=prefix, outside=outside, reasons=REASONS, strict=strict)
    if fc_norm:
        for kind in ("weight", "bias"):
            out[f"fc_norm.{kind}"] = out.pop(f"norm.{kind}")
    if "norm_pre.weight" not in out:
        add_bias(out, "patch_embed.proj.bias")
    add_bias(out, "head.bias")
    out.facts.update(FACTS)
    if all(key in state for key in _OPENAI):
        out.facts["act_layer"] = "quick_gelu"
    return out


def from_timm(
    state: Mapping[str, Tensor], *, prefix: str | None = None, dialect: str | None = None
) -> dict[str, Tensor]:
    """Write open_clip's names. Biases that this layout lacks (patch, head) must be zero."""
    if isinstance(state, ConvertedState) and state.source == NAME:
        prefix = state.prefix if prefix is None else prefix
    kept = dict(state)
    for name in ("patch_embed.proj.bias", "head.bias"):
        drop_bias(kept, state, name, f"from_timm({NAME})")
    dialect = dialect or ("fc_norm" if "fc_norm.weight" in kept else None)
    out = write(NAME, RULES, kept, dialect=dialect, prefix=prefix or "")
    return restore_aside(out, state, NAME)


def tower(model: nn.Module) -> nn.Module:
    """Return the image tower of a CLIP, or the model itself."""
    return model.visual if isinstance(getattr(model, "visual", None), nn.Module) else model  # type: ignore[return-value]


def describe(model: nn.Module) -> dict[str, Any] | None:
    """Return what the state dict of an open_clip (or OpenAI) tower does not tell, or None for another class."""
    cls = type(model)
    if not (cls.__module__.split(".")[0] in ("open_clip", "clip") and hasattr(model, "class_embedding")):
        return None
    m: Any = model
    block = m.transformer.resblocks[0]
    pool = getattr(m, "pool_type", "tok")
    activation = type(block.mlp.gelu).__name__
    known = {"QuickGELU": "quick_gelu", "GELU": "gelu", "SiLU": "silu", "ReLU": "relu"}
    if activation not in known:
        raise ValueError(f"vit_from: activation of the open_clip tower must be one of {list(known)}, got {activation}")
    act_layer = known[activation]
    if getattr(block.mlp.gelu, "approximate", "none") == "tanh":
        act_layer = "gelu_tanh"
    size = getattr(m, "image_size", getattr(m, "input_resolution", None))
    facts = {
        "num_heads": block.attn.num_heads,
        "eps": block.ln_1.eps,
        "act_layer": act_layer,
        "global_pool": {"tok": "token", "avg": "avg", "none": ""}[pool],
        "fc_norm": pool == "avg" and bool(getattr(m, "final_ln_after_pool", False)),
    }
    dropout = getattr(getattr(m, "patch_dropout", None), "prob", 0.0)
    if dropout:
        facts["patch_drop_rate"] = dropout
    return facts if size is None else facts | {"img_size": size}
