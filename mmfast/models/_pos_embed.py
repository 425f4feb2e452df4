"""Position embeddings at another grid, by the three rules in use, and checkpoints of another geometry."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn.patch_embed import pair_of_sizes, resample_patch_embed

if TYPE_CHECKING:
    from .vit import ViT

RULES = ("timm", "transformers", "dinov2")
DINOV2_OFFSET = 0.1


def check_rule(owner: str, rule: str) -> None:
    """Raise ValueError unless `rule` names a resampling rule."""
    if rule not in RULES:
        raise ValueError(f"{owner}: pos_embed_resample must be one of {', '.join(RULES)}, got {rule!r}")


def resample_pos_embed(
    pos_embed: Tensor,
    new_size: tuple[int, int],
    old_size: tuple[int, int],
    num_prefix_tokens: int = 1,
    rule: str = "timm",
    *,
    antialias: bool | None = None,
) -> Tensor:
    """Resample the grid part of a position embedding to another grid, bicubic; the prefix part stays.

    | rule | antialias | computed in | sampling step |
    |---|---|---|---|
    | "timm" | True | float32 | old / new |
    | "transformers" (ViT) | False | its own dtype | old / new |
    | "dinov2" | False | float32 | old / (new + 0.1), DINOv2's guard against rounding down |

    DINOv2 with registers (offset 0, antialias) is the rule "timm".

    Args:
        pos_embed: (1, P + rows * columns, D).
        new_size: (rows, columns) wanted.
        old_size: (rows, columns) of pos_embed.
        num_prefix_tokens: P, positions at the front that belong to no patch.
        rule: one of the above.
        antialias: overrides the rule's own.

    Returns:
        (1, P + new rows * new columns, D) in pos_embed's dtype; `pos_embed` itself where the grid is unchanged.

    Raises:
        ValueError: the rule is unknown, or old_size does not fit pos_embed.

    Source: timm `resample_abs_pos_embed`, transformers `ViTEmbeddings.interpolate_pos_encoding`, DINOv2
    `interpolate_pos_encoding` (`interpolate_offset`, `interpolate_antialias`).
    """
    check_rule("resample_pos_embed", rule)
    if pos_embed.shape[1] != num_prefix_tokens + old_size[0] * old_size[1]:
        raise ValueError(
            f"resample_pos_embed: pos_embed must have {num_prefix_tokens} + {old_size[0]} * {old_size[1]} "
            f"positions, got {pos_embed.shape[1]}"
        )
    # In an export a grid that equals the example's may be another one later.
    if not _exporting() and new_size[0] == old_size[0] and new_size[1] == old_size[1]:
        return pos_embed
    prefix, grid = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
    grid = grid.reshape(1, *old_size, -1).permute(0, 3, 1, 2)
    if rule != "transformers":
        grid = grid.float()
    antialias = rule == "timm" if antialias is None else antialias
    if rule == "dinov2":
        scale = tuple((new + DINOV2_OFFSET) / old for new, old in zip(new_size, old_size, strict=True))
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic", antialias=antialias)
    else:
        grid = F.interpolate(grid, size=new_size, mode="bicubic", antialias=antialias)
    grid = grid.permute(0, 2, 3, 1).flatten(1, 2).to(pos_embed.dtype)
    return torch.cat((prefix, grid), dim=1) if num_prefix_tokens else grid


def _exporting() -> bool:
    is_exporting = getattr(torch.compiler, "is_exporting", None)  # torch >= 2.7
    return bool(is_exporting()) if is_exporting is not None else False


@torch.no_grad()
def resize_checkpoint(
    state_dict: Mapping[str, Tensor],
    model: ViT,
    *,
    old_grid_size: tuple[int, int] | None = None,
    rule: str | None = None,
    antialias: bool | None = None,
) -> dict[str, Tensor]:
    """Fit a ViT checkpoint of another image size, patch size or number of channels to `model`.

    Resamples `pos_embed` to the model's grid and `patch_embed.proj.weight` to its patch size, and sums (one channel
    wanted) or repeats and rescales the input channels. Everything else is passed through.

    Args:
        state_dict: with the names of `ViT`; not changed.
        model: that shall load the result.
        old_grid_size: (rows, columns) of the checkpoint's position grid. By default the model's own where the number
            of positions is equal, else square.
        rule: of `resample_pos_embed`; by default the model's `pos_embed_resample`.
        antialias: overrides the rule's own; by default the model's.

    Returns:
        A new state dict for `model.load_state_dict`.

    Raises:
        ValueError: the checkpoint's grid is not square and old_grid_size is not given, or does not fit.

    Source: timm `checkpoint_filter_fn`, `adapt_input_conv`.
    """
    found = dict(state_dict)
    weight = found.get("patch_embed.proj.weight")
    if weight is not None and weight.dim() == 4:
        weight = adapt_channels(weight, model.in_chans)
        found["patch_embed.proj.weight"] = resample_patch_embed(weight, model.patch_embed.patch_size)
    pos_embed = found.get("pos_embed")
    if pos_embed is not None and model.pos_embed is not None:
        new = model.patch_embed.grid_size
        prefix = 0 if model.no_embed_class else model.num_prefix_tokens
        found["pos_embed"] = resample_pos_embed(
            pos_embed,
            new,
            _old_grid(pos_embed.shape[1] - prefix, new, old_grid_size),
            prefix,
            rule or model.pos_embed_resample,
            antialias=model.pos_embed_antialias if antialias is None else antialias,
        )
    return found


def _old_grid(positions: int, new: tuple[int, int], given: tuple[int, int] | None) -> tuple[int, int]:
    if given is not None:
        return pair_of_sizes("resize_checkpoint", "old_grid_size", given)
    if positions == new[0] * new[1]:
        return new
    side = math.isqrt(max(positions, 0))
    if side * side != positions or not side:
        raise ValueError(
            f"resize_checkpoint: the checkpoint's {positions} patch positions are not a square grid; give old_grid_size"
        )
    return side, side


def adapt_channels(weight: Tensor, in_chans: int) -> Tensor:
    """Fit a kernel (D, C, P, P) to `in_chans` channels: summed for one, else repeated and scaled by C / in_chans."""
    channels = weight.shape[1]
    if channels == in_chans:
        return weight
    if in_chans == 1:
        return weight.float().sum(dim=1, keepdim=True).to(weight.dtype)
    repeated = weight.float().repeat(1, math.ceil(in_chans / channels), 1, 1)[:, :in_chans]
    return (repeated * (channels / in_chans)).to(weight.dtype)
