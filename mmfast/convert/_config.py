"""Constructor arguments of `mmfast.models.ViT` from a canonical state dict and what is known beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .timm import check

# Facts that are arguments of ViT as they are.
_AS_GIVEN = ("dynamic_img_size", "pos_embed_resample", "pos_embed_antialias")
ACTS = {"gelu", "gelu_tanh", "quick_gelu", "relu", "silu"}


def infer(state: Mapping[str, Tensor], facts: Mapping[str, Any], who: str = "vit_config") -> dict[str, Any]:
    """Return the arguments for which a ViT has exactly the parameters in `state`.

    Read off the shapes: embed_dim, depth, patch_size, in_chans, num_classes, mlp_ratio, mlp_layer and the presence of
    each optional part. Not in a state dict, so taken from `facts`: num_heads, eps, act_layer, img_size of another shape
    than a square, no_embed_class where the number of positions allows both.

    Raises ValueError for what is missing or contradicts the shapes.
    """
    sizes = check(state, who)
    for name in ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc2.weight"):
        if name not in state:
            raise ValueError(f"{who}: {name} is missing, so this is not a whole ViT")
    facts = {key: value for key, value in facts.items() if value is not None}
    width, class_token = sizes["D"], "cls_token" in state
    config: dict[str, Any] = {
        "img_size": None,
        "patch_size": _square(sizes["P"], sizes["Q"]),
        "in_chans": sizes["C"],
        "num_classes": sizes.get("K", 0),
        "global_pool": _pooling(state, sizes, facts, who),
        "embed_dim": width,
        "depth": 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        "num_heads": _heads(sizes, facts, who),
        "mlp_ratio": _ratio(sizes.get("F", sizes["H"]), width),
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "class_token": class_token,
        "reg_tokens": sizes.get("R", 0),
        "pre_norm": "norm_pre.weight" in state,
        "init_values": float(facts.get("init_values", 1e-5)) if "blocks.0.ls1.gamma" in state else None,
    }
    config["no_embed_class"], config["img_size"] = _positions(state, sizes, config, facts, who)
    config |= _optional(state, sizes, config, facts, who)
    config |= _layers(state, sizes, config, facts, who)
    config |= {name: rate for name, rate in facts.items() if name.endswith("_rate") and rate}
    config |= {name: facts[name] for name in _AS_GIVEN if name in facts}
    return config


def _square(height: int, width: int) -> int | tuple[int, int]:
    return height if height == width else (height, width)


def _heads(sizes: Mapping[str, int], facts: Mapping[str, Any], who: str) -> int:
    heads = facts.get("num_heads")
    if heads is None:
        if "d" not in sizes:
            raise ValueError(
                f"{who}: num_heads is not in a state dict: pass num_heads=, config= or the model itself "
                f"(the attention is {sizes['A']} wide)"
            )
        heads = sizes["A"] // sizes["d"]  # the norms of q and k have a head's width
    if (
        not isinstance(heads, int)
        or heads < 1
        or sizes["A"] % heads
        or sizes["A"] // heads != sizes.get("d", sizes["A"] // heads)
    ):
        raise ValueError(f"{who}: num_heads must divide the attention's width {sizes['A']}, got {heads}")
    return heads


def _ratio(hidden: int, width: int) -> float:
    """Return hidden / width, or just above it where int(width * ratio) would fall short."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def _pooling(state: Mapping[str, Tensor], sizes: Mapping[str, int], facts: Mapping[str, Any], who: str) -> str:
    pool: str | None = facts.get("global_pool")
    if pool is None:
        averaged = "fc_norm.weight" in state or "cls_token" not in state
        pool = "map" if "attn_pool.latent" in state else "avg" if averaged else "token"
    if "attn_pool.mlp.fc1.weight" in state and sizes["M"] != sizes.get("F", sizes["H"]):
        raise ValueError(f"{who}: attn_pool.mlp must be as wide as the blocks' mlp, got {sizes['M']}")
    if pool == "token" and "cls_token" not in state:
        raise ValueError(f"{who}: global_pool='token' needs cls_token, which is not there")
    if (pool == "map") != ("attn_pool.latent" in state):
        raise ValueError(f"{who}: global_pool='map' and attn_pool.latent need each other, got global_pool={pool!r}")
    return pool


def _positions(
    state: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    config: Mapping[str, Any],
    facts: Mapping[str, Any],
    who: str,
) -> tuple[bool, int | tuple[int, int]]:
    """Return (no_embed_class, img_size) for the number of positions."""
    patch = (sizes["P"], sizes["Q"])
    prefix = int(config["class_token"]) + config["reg_tokens"]
    size = facts.get("img_size")
    grid = None
    if size is not None:
        size = (size, size) if isinstance(size, int) else tuple(size)
        grid = size[0] // patch[0], size[1] // patch[1]
    if "pos_embed" not in state:
        if size is None:
            raise ValueError(f"{who}: img_size= is needed, since there is no pos_embed to tell it")
        return bool(facts.get("no_embed_class", False)), _square(*size)
    length = sizes["L"]
    known = facts.get("no_embed_class")
    choices = (known,) if known is not None else (False, True) if prefix else (False,)
    fits = []
    for no_embed_class in choices:
        patches = length if no_embed_class else length - prefix
        side = math.isqrt(max(patches, 0))
        if grid is not None and grid[0] * grid[1] == patches:
            fits.append((bool(no_embed_class), _square(*size)))  # type: ignore[misc]
        elif grid is None and side and side * side == patches:
            fits.append((bool(no_embed_class), _square(side * patch[0], side * patch[1])))
    if len(fits) == 1:
        return fits[0]
    what = f"pos_embed has {length} positions, with {prefix} prefix token(s)"
    if fits:
        raise ValueError(f"{who}: {what}, which fits no_embed_class=True and False: pass no_embed_class=")
    if grid is None:
        raise ValueError(f"{who}: {what}, which is not a square grid of patches: pass img_size=(height, width)")
    raise ValueError(f"{who}: img_size {size} must have the patches of pos_embed, but {what}, got {grid[0]}x{grid[1]}")


def _optional(
    state: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    config: Mapping[str, Any],
    facts: Mapping[str, Any],
    who: str,
) -> dict[str, Any]:
    """The parts that most models have not: named only where they differ from ViT's defaults."""
    found: dict[str, Any] = {}
    norm, fc_norm = "norm.weight" in state, "fc_norm.weight" in state
    if norm and fc_norm:
        raise ValueError(f"{who}: norm and fc_norm exclude each other, got both")
    if fc_norm != (config["global_pool"] in ("avg", "avgmax", "max")):
        found["fc_norm"] = fc_norm
    if not norm and not fc_norm:
        found["final_norm"] = False
    if "pos_embed" not in state:
        found["pos_embed"] = "none"
    if facts.get("pool_include_prefix"):
        found["pool_include_prefix"] = True
    if "blocks.0.attn.q_norm.weight" in state:
        found["qk_norm"] = True
    if "blocks.0.attn.norm.weight" in state:
        found["scale_attn_norm"] = True
    if "blocks.0.mlp.norm.weight" in state:
        found["scale_mlp_norm"] = True
    biases = ("blocks.0.attn.proj.bias" in state, "blocks.0.mlp.fc2.bias" in state)
    if biases[0] != biases[1]:
        raise ValueError(f"{who}: attn.proj and mlp.fc2 must both have a bias or neither, got {biases}")
    if not biases[0]:
        found["proj_bias"] = False
    if config["pre_norm"] == ("patch_embed.proj.bias" in state):
        raise ValueError(
            f"{who}: patch_embed.proj has a bias exactly where there is no norm_pre, got norm_pre={config['pre_norm']}"
        )
    return found


def _layers(
    state: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    config: Mapping[str, Any],
    facts: Mapping[str, Any],
    who: str,
) -> dict[str, Any]:
    """The constructors: norm, activation, MLP, and attention and patch embedding where they are special."""
    from ..nn import Attention, LayerNorm, NormedPatchEmbed  # not for those who only rename keys

    act = facts.get("act_layer")
    if act is None and facts.get("ambiguous_act"):
        raise ValueError(
            f"{who}: the activation is not in this state dict: pass act_layer='quick_gelu' (OpenAI's weights and "
            "models called quickgelu) or act_layer='gelu', config= or the model itself"
        )
    split, packed = "blocks.0.mlp.fc1_g.weight" in state, sizes.get("F") == 2 * sizes["H"]
    act = act or ("silu" if split or packed else "gelu")
    if isinstance(act, str) and act not in ACTS:
        raise ValueError(f"{who}: act_layer must be one of {', '.join(sorted(ACTS))} or a class, got {act!r}")
    eps = facts.get("eps")
    if eps is None:
        eps = 1e-5 if config["pre_norm"] else 1e-6  # timm's own for its CLIP towers and for the rest
    norm_layer = partial(LayerNorm, eps=eps)
    found: dict[str, Any] = {"norm_layer": norm_layer, "act_layer": act}
    if split or packed:
        found["mlp_layer"] = "swiglu" if split else "swiglu_packed"
    if "patch_embed.norm.weight" in state:
        found["embed_norm_layer"] = norm_layer
    if "patch_embed.norm_in.weight" in state:
        found["embed_layer"] = NormedPatchEmbed
    special: dict[str, Any] = {}
    if sizes["A"] != sizes["D"]:
        special["attn_head_dim"] = sizes["A"] // config["num_heads"]
    if "blocks.0.attn.gate.weight" in state:
        special["gated"] = True
    if special:
        found["attn_layer"] = partial(Attention, **special)
    return found


def dtype_and_device(state: Mapping[str, Tensor]) -> tuple[torch.dtype, torch.device]:
    """Return the dtype and device of the patch projection, which stand for the model's."""
    weight = state["patch_embed.proj.weight"]
    return weight.dtype, weight.device
