"""The patch embedding of timm, and its VisionTransformer, which puts prefix tokens and positions around it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from timm.layers import Format
from timm.models import vision_transformer
from torch import Tensor

from .. import backends
from ._outline import IMAGES
from ._patch import embed, refuses_conv
from ._swap import Accelerated, called, plain_tensor, skipped_identity


def _with_options(**options: object) -> dict[str, Any]:
    size = {"img_size": (32, 32), "patch_size": (16, 16), "strict_img_size": True, "dynamic_img_pad": False}
    return {"shape": IMAGES, "members": {**size, **options}}


class PatchEmbedForm(Accelerated):
    """The convolution as an op."""

    mmfast_op = "patch_embed"
    variants = (_with_options(flatten=True), _with_options(flatten=False, output_fmt=Format.NHWC))
    outlines = frozenset(
        {"proj(x) $1.flatten(2) $2.transpose(1,2) norm($3) -> $4 | proj(x) $1.permute(0,2,3,1) norm($2) -> $3"}
    )
    bypassed = ("proj",)
    proj: Any
    norm: Any
    flatten: bool
    img_size: Any
    strict_img_size: bool
    output_fmt: Any

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        """Why this patch embedding is left alone, or None."""
        reason = refuses_conv(module.proj)
        if reason is not None:
            return f"proj {reason}"
        return None if module.flatten or module.output_fmt == Format.NHWC else f"returns {module.output_fmt.value}"

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, D), or (B, H / P, W / P, D)."""
        y = None if backends.torch_serves(x) else self._tokens(x)
        return super().forward(x) if y is None else self.norm(y)

    def _tokens(self, x: Tensor) -> Tensor | None:
        if not self.flatten and self.output_fmt != Format.NHWC:
            return None
        if not plain_tensor(x) or x.dim() != 4 or not fits_image(self, x):
            return None
        y = embed(x, self.proj)
        if y is None or self.flatten:
            return y
        height, width = self.proj.kernel_size
        return y.unflatten(1, (x.shape[2] // height, x.shape[3] // width))


def fits_image(patch_embed: Any, x: Tensor) -> bool:
    """Whether timm's patch embedding takes images of this size as they are."""
    size = patch_embed.img_size
    return size is None or not patch_embed.strict_img_size or tuple(x.shape[2:]) == tuple(size)


class VisionTransformerForm(Accelerated):
    """Writes the prefix tokens and adds the position embedding where the patches are embedded."""

    mmfast_op = "patch_embed"
    variants = (
        {
            "method": "forward_features",
            "shape": IMAGES,
            "inputs": {"attn_mask": None, "is_causal": False},
            "members": {"grad_checkpointing": False},
        },
        *(
            {
                "method": "_pos_embed",
                "members": {
                    "dynamic_img_size": False,
                    "no_embed_class": patches_alone,
                    **({} if prefix else {"cls_token": None, "reg_token": None}),
                },
            }
            for patches_alone in (True, False)
            for prefix in (True, False)
        ),
    )
    _tokens = "cls_token.expand(2,-1,-1) reg_token.expand(2,-1,-1)"
    outlines = frozenset(
        {
            "patch_embed(x) _pos_embed($1) patch_drop($2) norm_pre($3) blocks($4) norm($5) -> $6 | "
            f"{_tokens} pos_embed+x cat([$1,$2,$3],dim=1) pos_drop($4) -> $5 | "
            "pos_embed+x pos_drop($1) -> $2 | "
            f"{_tokens} cat([$1,$2,x],dim=1) $3+pos_embed pos_drop($4) -> $5 | "
            "pos_embed+x pos_drop($1) -> $2"
        }
    )
    bypassed = ("patch_embed", "patch_embed.proj")
    patches: ClassVar[tuple[type, ...]]
    """Classes of the submodule `patch_embed` that the op may stand in for."""
    patch_embed: Any
    pos_embed: Any
    pos_drop: Any
    patch_drop: Any
    norm_pre: Any
    blocks: Any
    norm: Any
    cls_token: Any
    reg_token: Any
    grad_checkpointing: bool

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        """Why this model embeds its patches by itself, or None."""
        patches = module._modules.get("patch_embed")
        reason = called(patches, *cls.patches)
        if reason is not None:
            return f"patch_embed {reason}"
        if module.pos_embed is None:
            return "has no position embedding to add"
        if module.dynamic_img_size or not patches.flatten:
            return "resamples its position embedding for each image size"
        if not skipped_identity(patches.norm):
            return "normalises the patches"
        reason = refuses_conv(patches.proj)
        return None if reason is None else f"patch_embed.proj {reason}"

    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, C, H, W) -> (B, N, D); the other arguments are an attention mask's."""
        y = None if backends.torch_serves(x) else self._embedded(x, (*args, *kwargs.values()))
        if y is None:
            return super().forward_features(x, *args, **kwargs)  # type: ignore[misc]
        y = self.norm_pre(self.patch_drop(y))
        y = vision_transformer.checkpoint_seq(self.blocks, y) if self.grad_checkpointing else self.blocks(y)
        return self.norm(y)

    def _embedded(self, x: Tensor, masks: tuple[object, ...]) -> Tensor | None:
        """The tokens with all that is put in front of them and added, or None where timm has to do it."""
        if any(mask is not None and mask is not False for mask in masks) or not plain_tensor(x) or x.dim() != 4:
            return None
        if self.refuses(self) is not None or not fits_image(self.patch_embed, x):
            return None
        prefix = [token[0] for token in (self.cls_token, self.reg_token) if token is not None]
        y = embed(
            x,
            self.patch_embed.proj,
            pos_embed=self.pos_embed[0],
            prefix_tokens=(prefix[0] if len(prefix) == 1 else torch.cat(prefix)) if prefix else None,
        )
        return None if y is None else self.pos_drop(y)
