"""What a ViT shows of its inside: intermediate features, with timm's signatures, and attention maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from ..nn import Attention
from ._vit_args import check_choice, take_indices
from ._vit_block import Block

if TYPE_CHECKING:
    from .vit import ViT

FUSIONS = (None, "mean", "max", "min")


class ViTFeatures(nn.Module):
    """The methods of `ViT` that return more than its output."""

    def forward_intermediates(
        self: Any,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """Run the blocks and return the outputs of chosen ones.

        Args:
            x: images (B, C, H, W).
            indices: the last n blocks, those of these indices, or None for all. They come in ascending order.
            return_prefix_tokens: also return each block's class and register tokens.
            norm: apply the final norm to every one.
            stop_early: leave out the blocks after the last that is wanted.
            output_fmt: "NCHW" for (B, D, rows, columns), "NLC" for (B, N, D).
            intermediates_only: leave out the final features.
            output_dict: return a dict with `image_intermediates`, `image_intermediates_prefix` and `image_features`.
            attn_mask: as in `Attention`.
            is_causal: as in `Attention`.

        Returns:
            (features, intermediates), or what the options above say. With `return_prefix_tokens` an intermediate
            is a pair (patch tokens, prefix tokens (B, P, D)).

        Raises:
            ValueError: an index or output_fmt is invalid, or patches are dropped and no grid is left for "NCHW".

        Source: timm `VisionTransformer.forward_intermediates`.
        """
        model = cast("ViT", self)
        check_choice("output_fmt", output_fmt, ("NCHW", "NLC"))
        taken = take_indices(len(model.blocks), indices)
        states: list[Tensor] = []
        height, width = x.shape[-2:]
        features = model._run_blocks(
            model._embed(x),
            attn_mask,
            is_causal,
            norm=None if intermediates_only else model.norm,
            count=max(taken) + 1 if stop_early else None,
            states=states,
        )
        wanted = set(taken)
        found = [model.norm(s) if norm else s for i, s in enumerate(states) if i in wanted]
        count = model.num_prefix_tokens
        prefixes = [s[:, :count] for s in found] if count else None
        found = [s[:, count:] for s in found]
        if output_fmt == "NCHW":
            found = [_as_images(s, model.patch_embed.dynamic_feat_size((height, width))) for s in found]
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": found}
            if prefixes is not None and return_prefix_tokens:
                result["image_intermediates_prefix"] = prefixes
            if not intermediates_only:
                result["image_features"] = features
            return result
        pairs: list[Any] = list(found)
        if prefixes is not None and return_prefix_tokens:
            pairs = list(zip(found, prefixes, strict=True))
        return pairs if intermediates_only else (features, pairs)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        attn_mask: Tensor | None = None,
    ) -> Any:
        """Return outputs of the last n blocks, or of those in n, with DINO's interface: see `forward_intermediates`."""
        return self.forward_intermediates(
            x,
            n,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
            attn_mask=attn_mask,
        )

    def prune_intermediate_layers(
        self: Any, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last wanted one, the final norm and the head where asked; return the indices."""
        model = cast("ViT", self)
        taken = take_indices(len(model.blocks), indices)
        model.blocks = model.blocks[: max(taken) + 1]
        if prune_norm:
            model.norm = nn.Identity()
        if prune_head:
            model.fc_norm = nn.Identity()
            model.reset_classifier(0, "")
        return taken

    def attention_maps(
        self: Any,
        x: Tensor,
        layers: Sequence[int] = (-1,),
        head_fusion: str | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        heads: int | Sequence[int] | None = None,
    ) -> list[Tensor]:
        """Return the attention probabilities of chosen blocks and heads, recomputed from their q and k.

        The other blocks run as always, and no block after the last that is wanted.

        Args:
            x: images (B, C, H, W).
            layers: block indices, negative ones from the end.
            head_fusion: None, or "mean", "max" or "min" over the heads that were chosen.
            attn_mask: as in `Attention`.
            is_causal: as in `Attention`.
            heads: one head, or several in this order, negative ones from the end; None for all. The others are not
                computed.

        Returns:
            For each of `layers`, (B, number of heads, N, N), or (B, N, N) with fused heads: row i is what token i
            looks at. N counts the prefix tokens.

        Raises:
            ValueError: a layer, a head or head_fusion is invalid.
            TypeError: a chosen block is not `Block` with mmfast's `Attention`.
        """
        model = cast("ViT", self)
        check_choice("head_fusion", head_fusion, FUSIONS)
        taken = take_indices(len(model.blocks), list(layers), "layers")
        for index in taken:
            block: Any = model.blocks[index]
            if not isinstance(block, Block) or not isinstance(block.attn, Attention):
                raise TypeError(f"ViT: attention_maps needs a Block with Attention, got {type(block).__name__} {index}")
        states = [model._embed(x)]
        model._run_blocks(states[0], attn_mask, is_causal, count=max(taken), states=states)
        maps = {}
        for index in set(taken):
            block = model.blocks[index]
            found = block.attn.probabilities(block.norm1(states[index]), attn_mask, is_causal, heads)
            maps[index] = found if head_fusion is None else _fuse(found, head_fusion)
        return [maps[index] for index in taken]


def _fuse(maps: Tensor, how: str) -> Tensor:
    if how == "mean":
        return maps.mean(dim=1)
    return maps.amax(dim=1) if how == "max" else maps.amin(dim=1)


def _as_images(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Turn (B, N, D) into (B, D, rows, columns)."""
    rows, columns = grid
    if tokens.shape[1] != rows * columns:
        raise ValueError(
            f"ViT: output_fmt='NCHW' needs all {rows} * {columns} patches, got {tokens.shape[1]} "
            "(patch dropout is active; use 'NLC')"
        )
    return tokens.reshape(tokens.shape[0], rows, columns, -1).permute(0, 3, 1, 2).contiguous()
