"""The image towers of CLIP: a ViT with open_clip's parameter names, and SigLIP's with timm's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends
from ..nn import PatchDropout
from ..nn.activation import _plain_tensor
from ..nn.patch_embed import Size, check_normalisation, pair_of_sizes, plain_projection, takes_pixels
from ..ops import patch_embed
from ..ops._patch_embed_torch import normalised
from ._clip_block import Transformer, act_layer, norm_layer
from ._clip_config import VisionConfig, trunk_arguments
from ._pos_embed import resample_pos_embed
from .vit import ViT


class VisionTransformer(nn.Module):
    """CLIP's ViT: a convolution without bias, a class token, norms before and after the blocks, a projection.

    Patches, class token and positions are one `mmfast.ops.patch_embed`. With `pool_type="tok"` the last block computes
    the class token alone.

    Args:
        config: the tower.
        embed_dim: width of the features.
        quick_gelu: QuickGELU instead of GELU.
        mean: of the channels; with std, uint8 images are accepted and become `(images / 255 - mean) / std`.
        std: likewise.
        factory: device and dtype of the parameters.

    Source: open_clip's `VisionTransformer`: parameters `class_embedding`, `positional_embedding`, `proj`, `conv1`,
    `ln_pre`, `transformer`, `ln_post`; its initialisation, drawing the same numbers.
    """

    def __init__(
        self,
        config: VisionConfig,
        embed_dim: int,
        quick_gelu: bool,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        factory: dict[str, Any],
    ) -> None:
        super().__init__()
        width, norm = config.width, norm_layer(config.norm_kwargs)
        self.image_size = _pair("image_size", config.image_size)
        self.patch_size = _pair("patch_size", config.patch_size)
        self.grid_size = _grid(self.image_size, self.patch_size)
        self.output_dim = embed_dim
        self.pool_type = config.pool_type
        self.final_ln_after_pool = config.final_ln_after_pool
        self.normalisation = check_normalisation("CLIP", mean, std, 3)
        layers: Any = config.layers  # a number, as checked
        scale, positions = width**-0.5, self.grid_size[0] * self.grid_size[1] + 1
        self.conv1 = nn.Conv2d(3, width, self.patch_size, stride=self.patch_size, bias=False, **factory)
        self.class_embedding = _drawn(scale, width, **factory)
        self.positional_embedding = _drawn(scale, positions, width, **factory)
        self.patch_dropout = (
            PatchDropout(config.patch_dropout, num_prefix_tokens=1) if config.patch_dropout > 0.0 else nn.Identity()
        )
        self.ln_pre = nn.Identity() if config.no_ln_pre else norm(width, **factory)
        self.transformer = Transformer(
            width,
            layers,
            width // config.head_width,
            config.mlp_ratio,
            config.ls_init_value,
            act_layer(quick_gelu, config.act_kwargs),
            norm,
            factory,
        )
        self.ln_post = norm(width, **factory)
        self.proj = _drawn(scale, width, embed_dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to features (B, embed_dim)."""
        x = self._embed(x)
        if self.pool_type == "tok":
            return self.transformer.one_token(x, 0, norm=self.ln_post) @ self.proj
        if self.final_ln_after_pool:
            return self.pool(self.transformer(x)) @ self.proj
        return self.transformer(x, norm=self.ln_post)[:, 1:].mean(dim=1) @ self.proj

    def pool(self, x: Tensor) -> Tensor:
        """Pool the output of the blocks, (B, 1 + N, width), and normalise: (B, width)."""
        if self.pool_type == "tok":
            return self.ln_post(x[:, 0])
        return self.ln_post(x[:, 1:].mean(dim=1)) if self.final_ln_after_pool else self.ln_post(x)[:, 1:].mean(dim=1)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to normalised tokens (B, 1 + N, width), the class token first."""
        return self.transformer(self._embed(x), norm=self.ln_post)

    def _embed(self, x: Tensor) -> Tensor:
        check_images(x, self.image_size, self.normalisation)
        dtype = self._pixel_dtype(x)
        tokens, positions = self.class_embedding.to(dtype), self.positional_embedding.to(dtype)
        fused = (
            not backends.torch_serves(x)
            and plain_projection(self.conv1)
            and takes_pixels(x, self.conv1)
            and all(_plain_tensor(t) and t.device == x.device for t in (tokens, positions))
        )
        mean, std = self.normalisation if x.dtype == torch.uint8 and self.normalisation else (None, None)
        if fused:
            x = patch_embed(x, self.conv1.weight, pos_embed=positions, prefix_tokens=tokens[None], mean=mean, std=std)
        else:
            if x.dtype == torch.uint8:
                x = normalised(x, mean, std, 255.0, self.conv1.weight.dtype)
            x = self.conv1(x).flatten(2).transpose(1, 2)
            x = torch.cat([tokens.expand(x.shape[0], 1, -1), x], dim=1) + positions
        return self.ln_pre(self.patch_dropout(x))

    def _pixel_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype of the embedded patches: the convolution's, also under autocast."""
        device = x.device.type
        dtype = self.conv1.weight.dtype if x.dtype == torch.uint8 else x.dtype
        if dtype != torch.float64 and device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return dtype

    @torch.no_grad()
    def set_input_size(self, image_size: Size) -> None:
        """Change the image size; positions are resampled in place, bicubic with antialiasing."""
        size = _pair("image_size", image_size)
        new, old = _grid(size, self.patch_size), self.grid_size
        if new != old:
            positions = resample_pos_embed(self.positional_embedding[None], new, old, 1)[0]
            self.positional_embedding = nn.Parameter(positions, self.positional_embedding.requires_grad)
        self.image_size, self.grid_size = size, new

    def lock(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freeze all but the last groups: stem, each block but the last, last block with ln_post, projection."""
        stem = [self.conv1, self.class_embedding, self.positional_embedding, self.ln_pre]
        blocks = list(self.transformer.resblocks)
        groups: list[list[Any]] = [stem, *([block] for block in blocks[:-1]), [blocks[-1], self.ln_post], [self.proj]]
        lock_groups(groups, unlocked_groups)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.transformer.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should leave alone."""
        return {"positional_embedding", "class_embedding"}


class TrunkTower(nn.Module):
    """SigLIP's image tower: `mmfast.models.ViT` as `trunk`, and a `head` that is empty or one projection.

    Args:
        config: the tower; its `timm_model_name` or `trunk` says which ViT.
        embed_dim: width of the features.
        mean: of the channels; with std, uint8 images are accepted.
        std: likewise.
        factory: device and dtype of the parameters.

    Source: open_clip's `TimmModel`.
    """

    def __init__(
        self,
        config: VisionConfig,
        embed_dim: int,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        factory: dict[str, Any],
    ) -> None:
        super().__init__()
        arguments = trunk_arguments(config.timm_model_name) if config.timm_model_name else {}
        arguments = {**arguments, **(config.trunk or {}), "mean": mean, "std": std, **factory}
        if config.timm_pool:
            arguments["global_pool"] = config.timm_pool
        if config.timm_drop_path is not None:
            arguments["drop_path_rate"] = config.timm_drop_path
        if config.patch_dropout > 0.0:
            arguments["patch_drop_rate"] = config.patch_dropout
        self.trunk = ViT(num_classes=0 if config.timm_proj else embed_dim, **arguments)
        self.normalisation = self.trunk.patch_embed.mean, self.trunk.patch_embed.std
        self.output_dim = embed_dim if config.timm_proj != "none" else self.trunk.num_features
        if self.output_dim != embed_dim:
            raise ValueError(
                f"CLIP: embed_dim must be the width {self.output_dim} of an image tower without projection, "
                f"got {embed_dim}"
            )
        self.head = nn.Sequential()
        if config.timm_proj == "linear":
            self.head.add_module("drop", nn.Dropout(config.timm_drop))
            self.head.add_module(
                "proj", nn.Linear(self.trunk.num_features, embed_dim, bias=config.timm_proj_bias, **factory)
            )

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the images."""
        return self.trunk.patch_embed.img_size

    @property
    def grid_size(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return self.trunk.patch_embed.grid_size

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to features (B, embed_dim)."""
        return self.head(self.trunk(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to normalised tokens (B, N, width)."""
        return self.trunk.forward_features(x)

    def set_input_size(self, image_size: Size) -> None:
        """Change the image size; positions are resampled in place, bicubic with antialiasing."""
        self.trunk.set_input_size(image_size)

    def lock(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freeze the trunk but for its last groups: stem, each block but the last, last block with norm, pool."""
        trunk = self.trunk
        stem = [trunk.patch_embed, trunk.norm_pre, *(t for t in (trunk.cls_token, trunk.reg_token) if t is not None)]
        stem += [trunk.pos_embed] if trunk.pos_embed is not None else []
        rest = [m for m in (trunk.attn_pool, trunk.fc_norm, trunk.head) if m is not None]
        blocks = list(trunk.blocks)
        groups: list[list[Any]] = [stem, *([block] for block in blocks[:-1]), [*blocks[-1:], trunk.norm], rest]
        lock_groups([group for group in groups if any(map(_count, group))], unlocked_groups)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.trunk.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should leave alone: none, as in open_clip."""
        return set()


def check_images(x: object, image_size: tuple[int, int], normalisation: tuple[Any, Any] | None) -> None:
    """Raise TypeError or ValueError unless x are images that the tower takes."""
    if not isinstance(x, Tensor):
        raise TypeError(f"CLIP: images must be a tensor, got {type(x).__name__}")
    if x.dim() != 4 or x.shape[1] != 3 or tuple(x.shape[-2:]) != image_size:
        expected = f"(B, 3, {image_size[0]}, {image_size[1]})"
        raise ValueError(
            f"CLIP: images must have shape {expected} (visual.set_input_size() changes it), got {tuple(x.shape)}"
        )
    if not x.is_floating_point() and (x.dtype != torch.uint8 or normalisation is None):
        hint = " (give mean and std to CLIP for uint8 images)" if x.dtype == torch.uint8 else ""
        raise TypeError(f"CLIP: images must be floating point{hint}, got {x.dtype}")


def lock_groups(groups: Sequence[Sequence[Any]], unlocked: int) -> None:
    """Freeze groups of modules and parameters but for the last `unlocked`, where there are as many.

    Raises:
        ValueError: the number is negative.
    """
    if unlocked < 0:
        raise ValueError(f"CLIP: the number of unlocked groups must not be negative, got {unlocked}")
    for index, group in enumerate(groups):
        for member in group:
            for parameter in (member,) if isinstance(member, nn.Parameter) else member.parameters():
                parameter.requires_grad = index >= len(groups) - unlocked


def _count(member: nn.Module | nn.Parameter) -> int:
    return 1 if isinstance(member, nn.Parameter) else sum(1 for _ in member.parameters())


def _drawn(scale: float, *shape: int, **factory: Any) -> nn.Parameter:
    return nn.Parameter(scale * torch.randn(shape, **factory))


def _pair(name: str, size: Any) -> tuple[int, int]:
    return pair_of_sizes("CLIP", name, tuple(size) if isinstance(size, list) else size)


def _grid(image_size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[int, int]:
    rows, columns = (s // p for s, p in zip(image_size, patch_size, strict=True))
    if not rows or not columns:
        raise ValueError(f"CLIP: image_size must be at least patch_size {patch_size}, got {image_size}")
    return rows, columns
