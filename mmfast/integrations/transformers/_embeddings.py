"""Embeddings of transformers' ViT and DINOv2, from 4.50 to 5.23: each has had a few forms since."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ... import backends
from .._outline import IMAGES
from .._patch import embed, refuses_conv
from .._swap import Accelerated, called, plain_tensor


class PatchEmbeddings(Accelerated):
    """Of any size of image. DINOv2 converts the pixels to the dtype of the weight."""

    mmfast_op = "patch_embed"
    variants: ClassVar[tuple[dict[str, Any], ...]] = ({"shape": IMAGES, "members": {"num_channels": 3}},)
    outlines = frozenset(
        {
            "projection(pixel_values) $1.flatten(2) $2.transpose(1,2) -> $3",
            "pixel_values.to(projection.weight.dtype) projection($1) $2.flatten(2) $3.transpose(1,2) -> $4",
        }
    )
    bypassed = ("projection",)
    projection: Any
    num_channels: int

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        """Why this patch embedding is left alone, or None."""
        reason = refuses_conv(module.projection)
        return None if reason is None else f"projection {reason}"

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, D)."""
        y = None if backends.torch_serves(pixel_values) else self._tokens(pixel_values)
        return super().forward(pixel_values) if y is None else y

    def _tokens(self, x: Tensor) -> Tensor | None:
        if not plain_tensor(x) or x.dim() != 4 or x.shape[1] != self.num_channels:
            return None
        return embed(x, self.projection)


class SizedPatchEmbeddings(PatchEmbeddings):
    """To 5.9, of ViT: of images of one size, unless the position embedding is interpolated."""

    variants = tuple(
        {
            "shape": IMAGES,
            "members": {"num_channels": 3, "image_size": (32, 32)},
            "inputs": {"interpolate_pos_encoding": interpolated},
        }
        for interpolated in (False, True)
    )
    outlines = frozenset({" | ".join(["projection(pixel_values) $1.flatten(2) $2.transpose(1,2) -> $3"] * 2)})
    image_size: Any

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """(B, C, H, W) -> (B, N, D)."""
        y = None
        if not backends.torch_serves(pixel_values) and isinstance(pixel_values, Tensor):
            fits = interpolate_pos_encoding or tuple(pixel_values.shape[2:]) == tuple(self.image_size)
            y = self._tokens(pixel_values) if fits else None
        return super(PatchEmbeddings, self).forward(pixel_values, interpolate_pos_encoding) if y is None else y


PATCHES = (PatchEmbeddings, SizedPatchEmbeddings)


class _Embeddings(Accelerated):
    """Writes the class token and adds the position embedding where the patches are embedded."""

    mmfast_op = "patch_embed"
    bypassed = ("patch_embeddings", "patch_embeddings.projection")
    patches: ClassVar[tuple[type, ...]]
    """Classes of the submodule `patch_embeddings` that the op may stand in for."""
    patch_embeddings: Any
    position_embeddings: Any
    cls_token: Any
    dropout: Any

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        """Why these embeddings are left alone, or None."""
        patches = module._modules.get("patch_embeddings")
        reason = called(patches, *cls.patches)
        if reason is not None:
            return f"patch_embeddings {reason}"
        if module.position_embeddings is None:
            return "has no position embedding to add"
        reason = refuses_conv(patches.projection)
        return None if reason is None else f"patch_embeddings.projection {reason}"

    def forward(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, C, H, W) -> (B, 1 + N, D); the other arguments are a mask of patches and whether to interpolate."""
        y = None if backends.torch_serves(pixel_values) else self._tokens(pixel_values, (*args, *kwargs.values()))
        return super().forward(pixel_values, *args, **kwargs) if y is None else self.dropout(y)

    def _tokens(self, x: Tensor, options: tuple[object, ...]) -> Tensor | None:
        """The tokens before dropout, or None where transformers has to make them."""
        if any(option is not None and option is not False for option in options) or torch.jit.is_tracing():
            return None
        if not plain_tensor(x) or x.dim() != 4 or self.refuses(self) is not None:
            return None
        patches = self.patch_embeddings
        grid = tuple(size // step for size, step in zip(x.shape[2:], patches.projection.kernel_size, strict=True))
        positions = self.position_embeddings.shape[1] - 1
        if x.shape[1] != patches.num_channels or not self._fits(x) or grid[0] * grid[1] != positions:
            return None
        prefix, pos_embed = self._added()
        return embed(x, patches.projection, pos_embed=pos_embed, prefix_tokens=prefix)

    def _fits(self, x: Tensor) -> bool:
        """Whether images of this size take the position embedding as it is."""
        return x.shape[2] == x.shape[3]

    def _added(self) -> tuple[Tensor, Tensor]:
        """The prefix tokens, and the position embedding."""
        return self.cls_token[0], self.position_embeddings[0]


def _vit(**inputs: object) -> dict[str, Any]:
    inputs = {"bool_masked_pos": None, "interpolate_pos_encoding": False, **inputs}
    return {"shape": IMAGES, "members": {"image_size": (32, 32)}, "inputs": inputs}


class ViTEmbeddings(_Embeddings):
    """Of ViT: of images of one size, unless the position embedding is interpolated."""

    variants = (_vit(),)
    outlines = frozenset(
        f"patch_embeddings(pixel_values{option}) cls_token.expand(2,-1,-1) cat(($2,$1),dim=1) $3+position_embeddings "
        "dropout($4) -> $5"
        for option in ("", ",interpolate_pos_encoding=False")
    )

    def _fits(self, x: Tensor) -> bool:
        return tuple(x.shape[2:]) == tuple(self.patch_embeddings.image_size)


class Dinov2Embeddings(_Embeddings):
    """Of DINOv2, whose position embedding is interpolated where it has another size."""

    variants = (
        {"shape": IMAGES, "inputs": {"bool_masked_pos": None}},
        {"method": "interpolate_pos_encoding", "inputs": {"height": 32, "width": 32}},
    )
    _steps = (
        "patch_embeddings({}) cls_token.expand(2,-1,-1) cat((${},${}),dim=1) interpolate_pos_encoding(${},32,32) "
        "${}+${} dropout(${}) -> ${} | -> position_embeddings"
    )
    outlines = frozenset(
        {
            _steps.format("pixel_values", 2, 1, 3, 3, 4, 5, 6),
            "pixel_values.to(dtype=patch_embeddings.projection.weight.dtype) "
            + _steps.format("$1", 3, 2, 4, 4, 5, 6, 7),
        }
    )


class Dinov2WithRegistersEmbeddings(_Embeddings):
    """Of DINOv2 with registers, which have no position."""

    variants = Dinov2Embeddings.variants
    outlines = frozenset(
        {
            "patch_embeddings(pixel_values) cls_token.expand(2,-1,-1) cat(($2,$1),dim=1) "
            "interpolate_pos_encoding($3,32,32) $3+$4 register_tokens.expand(2,-1,-1) "
            "cat(($5[:,:1],$6,$5[:,1:]),dim=1) dropout($7) -> $8 | -> position_embeddings",
            "pixel_values.to(dtype=patch_embeddings.projection.weight.dtype) patch_embeddings($1) "
            "cls_token.expand(2,-1,-1) cat(($3,$2),dim=1) interpolate_pos_encoding($4,32,32) $4+$5 "
            "register_tokens.expand(2,-1,-1) cat(($6[:,:1],$7,$6[:,1:]),dim=1) dropout($8) -> $9 | "
            "-> position_embeddings",
        }
    )
    register_tokens: Any

    def _added(self) -> tuple[Tensor, Tensor]:
        positions = self.position_embeddings[0]
        return torch.cat([self.cls_token[0] + positions[:1], self.register_tokens[0]]), positions[1:]
