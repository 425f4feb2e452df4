"""Checks of ViT's arguments, and the names they may go by."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from ..nn import Attention, LayerNorm

Layer = Callable[..., nn.Module]

GLOBAL_POOLS = ("", "avg", "avgmax", "max", "token", "map", "prr")
POS_EMBEDS = ("", "none", "learn")
HEAD_ACTS = (None, "softmax")
NORMS: dict[str, Layer] = {"layernorm": partial(LayerNorm, eps=1e-6), "rmsnorm": partial(nn.RMSNorm, eps=1e-6)}


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"ViT: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_pool(global_pool: str, has_class_token: bool) -> None:
    """Raise ValueError unless the pooling exists and has the token it takes."""
    check_choice("global_pool", global_pool, GLOBAL_POOLS)
    if global_pool == "token" and not has_class_token:
        raise ValueError("ViT: global_pool='token' needs class_token=True, got class_token=False")


def check_heads(embed_dim: int, num_heads: int, depth: int, attn_layer: Any) -> None:
    """Raise ValueError unless the width splits into heads, or attn_layer (a partial) fixes the width of a head."""
    free = "attn_head_dim" in getattr(attn_layer, "keywords", ())
    if embed_dim < 1 or num_heads < 1 or (embed_dim % num_heads and not free):
        raise ValueError(
            f"ViT: embed_dim must be a multiple of num_heads, got embed_dim={embed_dim}, num_heads={num_heads}"
        )
    if depth < 0:
        raise ValueError(f"ViT: depth must not be negative, got {depth}")


def count_patches(patch_embed: nn.Module) -> int:
    """Return the number of patches of an image. Raise ValueError if the image size is open."""
    count = getattr(patch_embed, "num_patches", None)
    if not isinstance(count, int):
        raise ValueError(f"ViT: learned positions need an img_size (a number of patches), got {count}")
    return count


def get_norm_layer(norm_layer: str | Layer | None) -> Layer | None:
    """Return the constructor of a norm, None for "" and None. torch.nn's LayerNorm becomes mmfast's.

    Raises:
        ValueError: the name is unknown.
        TypeError: not a name, a class, a function or a partial.
    """
    if norm_layer is None or norm_layer == "":
        return None
    if isinstance(norm_layer, str):
        name = norm_layer.replace("_", "").lower()
        if name not in NORMS:
            raise ValueError(f"ViT: norm_layer must be one of {', '.join(NORMS)} or a class, got {norm_layer!r}")
        return NORMS[name]
    if not isinstance(norm_layer, (type, types.FunctionType, partial)):
        raise TypeError(f"ViT: norm_layer must be a name or a module class, got {norm_layer!r}")
    if norm_layer is nn.LayerNorm:
        return LayerNorm
    if isinstance(norm_layer, partial) and norm_layer.func is nn.LayerNorm:
        return partial(LayerNorm, *norm_layer.args, **norm_layer.keywords)
    return norm_layer


def get_attn_layer(attn_layer: str | Layer | None) -> Layer:
    """Return the constructor of the attention: `attn_layer` itself, or `Attention` for None, "" and "attn".

    Raises:
        ValueError: a name that is not served.
        TypeError: neither a name nor callable.
    """
    if attn_layer is None or attn_layer in ("", "attn"):
        return Attention
    if isinstance(attn_layer, str):
        raise ValueError(
            f"ViT: attn_layer must be 'attn' or a class with the arguments of mmfast.nn.Attention, got {attn_layer!r}"
        )
    if isinstance(attn_layer, nn.Module) or not callable(attn_layer):
        raise TypeError(f"ViT: attn_layer must be a name or a module class, got {attn_layer!r}")
    return attn_layer


def take_indices(count: int, indices: int | Sequence[int] | None, name: str = "indices") -> list[int]:
    """Return block indices: all for None, the last n for a number, else those given, negative ones from the end.

    Raises:
        ValueError: out of range, or none given.
    """
    if indices is None:
        indices = count
    if isinstance(indices, int):
        if not 0 < indices <= count:
            raise ValueError(f"ViT: {name} (last n blocks) must be in 1..{count}, got {indices}")
        return list(range(count - indices, count))
    found = [index + count if index < 0 else index for index in indices]
    if not found or not all(0 <= index < count for index in found):
        raise ValueError(f"ViT: {name} must be block indices in {-count}..{count - 1}, got {list(indices)}")
    return found
