"""lucidrains' vit-pytorch: `vit_pytorch.ViT`, its present names and those of its older releases.

Differences from the canonical ViT, and where they go:
- Patches are flattened (row, column, channel) and projected by a linear layer: the same numbers as a convolution whose
  kernel is the permuted weight. Older releases name the layers `to_patch_embedding.1` alone, newer ones 1, 2, 3.
- LayerNorms before and after that projection. The one after it is timm's `patch_embed.norm` (`embed_norm_layer`). The
  one before cannot be folded into the weights, since it divides each patch by its own standard deviation: it is
  `patch_embed.norm_in`, and the model needs `embed_layer=mmfast.nn.NormedPatchEmbed`.
- Heads may be wider or narrower than D / H: the attention then needs `attn_head_dim`.
- With one head of width D there is no output projection: it becomes an identity matrix.
- pool="mean" averages the normalised tokens: global_pool="avg" with fc_norm=False. Present releases have no class
  token then (a parameter of 0 rows, kept aside); older ones keep it and average over it too (pool_include_prefix).
- The oldest releases have the last norm in `mlp_head.0`, after the pooling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._names import ConvertedState, Reasons, Rule, read, restore_aside, write
from .timm import zeros

NAME = "vit_pytorch"
DIALECTS = ("new", "prenorm")
FACTS: dict[str, Any] = {"eps": 1e-5, "act_layer": "gelu", "no_embed_class": False}

_LAYER = "transformer.layers.{i}"


# Names of a layer: dialect -> (norm and projections of the attention, of the MLP).
_LAYERS = {
    "new": ("0.norm", "0.to_qkv", "0.to_out.0", "1.net.0", "1.net.1", "1.net.4"),
    "prenorm": ("0.norm", "0.fn.to_qkv", "0.fn.to_out.0", "1.norm", "1.fn.net.0", "1.fn.net.3"),
}
_CANONICAL = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")


def _table(layers: str, embed: int, head: str, last: str) -> list[Rule]:
    """The names of one release.

    layers: a key of _LAYERS. embed: number of LayerNorms around the patch projection (0 or 2). head: of the classifier.
    last: of the last norm.
    """
    proj = 2 if embed else 1
    rules = [
        Rule("cls_token", "cls_token"),
        Rule("pos_embed", "pos_embedding"),
        Rule("patch_embed.proj.{p}", f"to_patch_embedding.{proj}.{{p}}"),
        *(
            Rule(f"blocks.{{i}}.{name}.{{p}}", f"{_LAYER}.{foreign}.{{p}}")
            for name, foreign in zip(_CANONICAL, _LAYERS[layers], strict=True)
        ),
        Rule("norm.{p}", f"{last}.{{p}}"),
        Rule("fc_norm.{p}", f"{last}.{{p}}"),
        Rule("head.{p}", f"{head}.{{p}}"),
    ]
    if embed:
        rules.append(Rule("patch_embed.norm_in.{p}", "to_patch_embedding.1.{p}"))
        rules.append(Rule("patch_embed.norm.{p}", "to_patch_embedding.3.{p}"))
    return rules


REASONS = Reasons(
    refused={
        r"to_patch_embedding\.0\..*": "a patch embedding that is not vit_pytorch.ViT's",
        r"transformer\.layers\.\d+\.0\.to_(q|kv)\..*": "an attention that is not vit_pytorch.ViT's",
    },
)


def detect(keys: Sequence[str]) -> bool:
    """Whether the keys are of this layout."""
    return any(key.startswith("to_patch_embedding.") for key in keys)


def _release(state: Mapping[str, Tensor]) -> tuple[str, int, str, str]:
    """What `_table` needs to know, read off the foreign names."""
    layers = "prenorm" if any(".fn." in key for key in state) else "new"
    embed = 2 if "to_patch_embedding.3.weight" in state else 0
    head = "mlp_head.1" if "mlp_head.1.weight" in state else "mlp_head"
    last = "mlp_head.0" if "mlp_head.0.weight" in state else "transformer.norm"
    return layers, embed, head, last


def to_timm(
    state: Mapping[str, Tensor], *, strict: bool = True, pool: str | None = None, patch_size: Any = None
) -> ConvertedState:
    """Read vit-pytorch's names.

    pool: "cls" or "mean". By default "cls" if there is a class token; an old release that averages must say "mean".
    patch_size: (height, width) of a patch, or one number for both; by default square patches of 3 channels or else 1.
    """
    if pool not in (None, "cls", "mean"):
        raise ValueError(f"to_timm({NAME}): pool must be 'cls' or 'mean', got {pool!r}")
    release = _release(state)
    out = read(NAME, _table(*release), state, reasons=REASONS, strict=strict)
    out.dialect = ",".join(map(str, release))
    _shape_tokens(out)
    _shape_patch(out, patch_size)
    _unit_projections(out)
    averages = pool == "mean" or (pool is None and "cls_token" not in out)
    out.facts.update(FACTS, global_pool="avg" if averages else "token")
    if averages:
        out.facts["fc_norm"] = release[3] == "mlp_head.0"
        if out.facts["fc_norm"]:
            for kind in ("weight", "bias"):
                out[f"fc_norm.{kind}"] = out.pop(f"norm.{kind}")
        if "cls_token" in out:
            out.facts["pool_include_prefix"] = True
    if "head.weight" not in out:
        out.facts["global_pool"] = ""  # a model without a head returns all tokens
    return out


def _shape_tokens(state: ConvertedState) -> None:
    """Give the class token and the positions three dimensions; an absent class token has 0 rows."""
    token = state.get("cls_token")
    if token is not None and token.shape[-2] == 0:
        state.aside["cls_token"] = state.pop("cls_token")
        state.reasons["cls_token"] = "pool='mean' has no class token: the parameter is empty"
    for name in ("cls_token", "pos_embed"):
        if name in state and state[name].dim() == 2:
            state[name] = state[name][None]
            state.facts["flat_tokens"] = True


def _shape_patch(state: ConvertedState, patch_size: Any) -> None:
    """Turn the linear projection (D, P*P*C) into a kernel (D, C, P, P), a view, and reorder norm_in likewise."""
    weight = state.get("patch_embed.proj.weight")
    if weight is None:
        return
    height, width, channels = _patch_shape(weight.shape[-1], patch_size)
    state["patch_embed.proj.weight"] = weight.reshape(-1, height, width, channels).permute(0, 3, 1, 2)
    for kind in ("weight", "bias"):
        name = f"patch_embed.norm_in.{kind}"
        if name in state:
            state[name] = state[name].reshape(height, width, channels).permute(2, 0, 1).flatten()


def _patch_shape(pixels: int, patch_size: Any) -> tuple[int, int, int]:
    """Split the length of a flattened patch into height, width and channels."""
    if patch_size is not None:
        height, width = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
        if height < 1 or width < 1 or pixels % (height * width):
            raise ValueError(
                f"to_timm({NAME}): patch_size must divide the {pixels} inputs of the patch projection, got {patch_size}"
            )
        return height, width, pixels // (height * width)
    for channels in (3, 1):  # at most one fits: 3 s^2 is never a square
        side = round((pixels / channels) ** 0.5)
        if side * side * channels == pixels:
            return side, side, channels
    raise ValueError(f"to_timm({NAME}): patch_size is needed to split the {pixels} inputs of the patch projection")


def _unit_projections(state: ConvertedState) -> None:
    """Add the identity as output projection where one head of width D has none."""
    for name in [key for key in state if key.endswith(".attn.qkv.weight")]:
        proj = name.replace("qkv", "proj")
        if proj in state:
            continue
        qkv = state[name]
        if qkv.shape[0] != 3 * qkv.shape[1]:
            raise ValueError(f"to_timm({NAME}): {proj} is missing and the attention's width is not the model's")
        state[proj] = torch.eye(qkv.shape[1], dtype=qkv.dtype, device=qkv.device)
        bias = proj.replace("weight", "bias")
        state[bias] = zeros(qkv.shape[1], qkv)
        state.added += [proj, bias]


def from_timm(
    state: Mapping[str, Tensor], *, prefix: str | None = None, dialect: str | None = None
) -> dict[str, Tensor]:
    """Write vit-pytorch's names: the release that the state was read from, or the present one.

    Raises ValueError for a qkv bias that is not zero, and for what vit-pytorch has no name for (LayerScale, registers).
    """
    origin = state if isinstance(state, ConvertedState) and state.source == NAME else None
    release: tuple[str, int, str, str] = ("new", 2, "mlp_head", "transformer.norm")
    if origin is not None and origin.dialect is not None:
        layers, embed, head, last = origin.dialect.split(",")
        release = (layers, int(embed), head, last)
    kept = {key: value for key, value in state.items() if key not in getattr(state, "added", ())}
    who = f"from_timm({NAME})"
    missing = [f"patch_embed.{n}.weight" for n in ("norm_in", "norm") if f"patch_embed.{n}.weight" not in kept]
    if release[1] and missing:
        raise ValueError(f"{who}: vit_pytorch.ViT normalises patches before and after projecting; {missing} missing")
    for name in [key for key in kept if key.endswith("attn.qkv.bias")]:
        if kept[name].is_meta or bool(kept[name].any()):
            raise ValueError(f"{who}: {name} must be zero: the target has no such bias")
        del kept[name]
    weight = kept["patch_embed.proj.weight"]
    kept["patch_embed.proj.weight"] = weight.permute(0, 2, 3, 1).flatten(1)
    for kind in ("weight", "bias"):
        name = f"patch_embed.norm_in.{kind}"
        if name in kept:
            kept[name] = kept[name].reshape(weight.shape[1:]).permute(1, 2, 0).flatten()
    if origin is None or origin.facts.get("flat_tokens"):
        for name in ("cls_token", "pos_embed"):
            if name in kept:
                kept[name] = kept[name][0]
    out = write(NAME, _table(*release), kept)
    if origin is None and "cls_token" not in out:
        out["cls_token"] = kept["pos_embed"].new_empty((0, kept["pos_embed"].shape[-1]))
    return restore_aside(out, state, NAME)


def describe(model: nn.Module) -> dict[str, Any] | None:
    """Return what the state dict of a `vit_pytorch.ViT` does not tell, or None for another class."""
    cls = type(model)
    if cls.__name__ != "ViT" or cls.__module__ not in ("vit_pytorch.vit", "vit_pytorch.vit_pytorch"):
        return None
    m: Any = model
    attention = m.transformer.layers[0][0]
    attention = getattr(attention, "fn", attention)
    facts: dict[str, Any] = {
        "num_heads": attention.heads,
        "pos_drop_rate": m.dropout.p,
        "attn_drop_rate": attention.dropout.p if hasattr(attention, "dropout") else 0.0,
        "proj_drop_rate": attention.to_out[1].p if isinstance(attention.to_out, nn.Sequential) else 0.0,
    }
    return facts


def read_options(model: nn.Module) -> dict[str, Any]:
    """Return the options with which `to_timm` reads this model's state dict."""
    options: dict[str, Any] = {"pool": model.pool}
    if hasattr(model, "patch_size"):
        options["patch_size"] = model.patch_size
    return options
