"""`PatchEmbed`: an image to a sequence of patch embeddings; `resample_patch_embed` for another patch size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends
from ..ops import patch_embed
from ..ops._patch_embed_torch import normalised
from .activation import _plain_tensor, any_global_hook, hooked
from .layer_norm import LayerNorm

Size = int | tuple[int, int]
FORMATS = ("NCHW", "NHWC", "NCL", "NLC")


def pair_of_sizes(owner: str, name: str, size: Size) -> tuple[int, int]:
    """Return `size` as (height, width).

    Raises:
        ValueError: not one or two positive integers.
    """
    sizes = (size, size) if isinstance(size, int) else tuple(size)
    if len(sizes) != 2 or not all(isinstance(s, int) and s > 0 for s in sizes):
        raise ValueError(f"{owner}: {name} must be a positive integer or a pair of them, got {size!r}")
    return sizes[0], sizes[1]


def check_normalisation(
    owner: str, mean: Sequence[float] | None, std: Sequence[float] | None, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return mean and std as tuples of `channels` numbers, or None where neither is given.

    Raises:
        ValueError: one is given without the other, has another length, is not finite, or std is not positive.
    """
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        missing = "mean" if mean is None else "std"
        raise ValueError(f"{owner}: mean and std must be given together, got no {missing}")
    found = tuple(float(m) for m in mean), tuple(float(s) for s in std)
    for name, values in zip(("mean", "std"), found, strict=True):
        if len(values) != channels:
            raise ValueError(f"{owner}: {name} must have in_chans={channels} numbers, got {len(values)}")
        if not all(map(math.isfinite, values)) or (name == "std" and min(values) <= 0.0):
            wanted = "positive and finite" if name == "std" else "finite"
            raise ValueError(f"{owner}: {name} must be {wanted}, got {values}")
    return found


class PatchEmbed(nn.Module):
    """Split images into P x P patches and project each: a convolution whose stride is its kernel.

    Where tokens are returned and `proj` is a plain convolution without hooks, they are one `mmfast.ops.patch_embed`.

    Args:
        img_size: (height, width) of the images, or one number for both; None accepts any.
        patch_size: (height, width) of a patch, or one number for both.
        in_chans: channels of the images.
        embed_dim: width D of a patch embedding.
        norm_layer: constructor of a norm of the embeddings, or None.
        flatten: return (B, N, D); otherwise (B, D, H/P, W/P).
        output_fmt: "NCHW", "NHWC", "NCL" or "NLC"; overrides flatten.
        bias: of the projection.
        strict_img_size: accept images of img_size only; otherwise of any multiple of patch_size.
        dynamic_img_pad: pad images with zeros at the right and the bottom to multiples of patch_size.
        device: of the parameters.
        dtype: of the parameters.
        mean: in_chans numbers; with std, uint8 images are accepted and become `(images / 255 - mean) / std`. Floating
            images are taken as they are.
        std: likewise. Both are plain attributes, not parameters or buffers.

    Raises:
        ValueError: a size, output_fmt, mean or std is invalid; in forward, the image does not fit.
        TypeError: in forward, the image is neither floating point nor, with mean and std, uint8.

    Source: timm's `PatchEmbed`: parameters `proj`, `norm`.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __init__(
        self,
        img_size: Size | None = 224,
        patch_size: Size = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Callable[..., nn.Module] | None = None,
        flatten: bool = True,
        output_fmt: str | None = None,
        bias: bool = True,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if output_fmt is not None and output_fmt not in FORMATS:
            raise ValueError(f"PatchEmbed: output_fmt must be one of {', '.join(FORMATS)}, got {output_fmt!r}")
        self.patch_size = pair_of_sizes("PatchEmbed", "patch_size", patch_size)
        self._set_img_size(img_size)
        self.flatten = flatten and output_fmt is None
        self.output_fmt = output_fmt or "NCHW"
        self.strict_img_size = strict_img_size
        self.dynamic_img_pad = dynamic_img_pad
        self.proj = nn.Conv2d(
            in_chans, embed_dim, self.patch_size, stride=self.patch_size, bias=bias, device=device, dtype=dtype
        )
        self.norm = norm_layer(embed_dim, device=device, dtype=dtype) if norm_layer else nn.Identity()
        normalisation = check_normalisation("PatchEmbed", mean, std, in_chans)
        if normalisation is not None:
            self.mean, self.std = normalisation

    def _set_img_size(self, img_size: Size | None) -> None:
        self.img_size: tuple[int, int] | None = None
        self.grid_size: tuple[int, int] | None = None
        self.num_patches: int | None = None
        if img_size is None:
            return
        self.img_size = pair_of_sizes("PatchEmbed", "img_size", img_size)
        rows, columns = (s // p for s, p in zip(self.img_size, self.patch_size, strict=True))
        if not rows or not columns:
            raise ValueError(f"PatchEmbed: img_size must be at least patch_size {self.patch_size}, got {self.img_size}")
        self.grid_size, self.num_patches = (rows, columns), rows * columns

    @torch.no_grad()
    def set_input_size(self, img_size: Size | None = None, patch_size: Size | None = None) -> None:
        """Change the image size, the patch size or both; the kernel is resampled to a new patch size."""
        if patch_size is not None:
            size = pair_of_sizes("PatchEmbed", "patch_size", patch_size)
            if size != self.patch_size:
                old = self.proj
                new = nn.Conv2d(
                    old.in_channels, old.out_channels, size, stride=size, bias=old.bias is not None, device="meta"
                )
                new.weight = nn.Parameter(resample_patch_embed(old.weight, size), old.weight.requires_grad)
                if old.bias is not None:
                    new.bias = old.bias
                self.proj = new.train(old.training)
                self.patch_size = size
        self._set_img_size(self.img_size if img_size is None else img_size)

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Return pixels per token, the larger of both sides or (height, width)."""
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Return the grid (rows, columns) of an image of this (height, width)."""
        (height, width), (patch_h, patch_w) = img_size, self.patch_size
        if self.dynamic_img_pad:
            return math.ceil(height / patch_h), math.ceil(width / patch_w)
        return height // patch_h, width // patch_w

    def _check(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.proj.in_channels:
            expected = f"(B, {self.proj.in_channels}, H, W)"
            raise ValueError(f"PatchEmbed: images must have shape {expected}, got {tuple(x.shape)}")
        if not x.is_floating_point() and (x.dtype != torch.uint8 or self.mean is None):
            hint = "normalise them first, or give mean and std" if x.dtype == torch.uint8 else "normalise them first"
            raise TypeError(f"PatchEmbed: images must be floating point ({hint}), got {x.dtype}")
        if self.img_size is None:
            return
        height, width = x.shape[-2:]
        if self.strict_img_size:
            if height != self.img_size[0] or width != self.img_size[1]:
                raise ValueError(
                    f"PatchEmbed: image size must be {self.img_size}, got {(height, width)} "
                    "(dynamic_img_size=True accepts any, set_input_size() changes it)"
                )
        elif not self.dynamic_img_pad and (height % self.patch_size[0] or width % self.patch_size[1]):
            raise ValueError(
                f"PatchEmbed: image size must be a multiple of patch_size {self.patch_size}, "
                f"got {(height, width)} (dynamic_img_pad=True pads it)"
            )

    def prepare(self, x: Tensor, *, fold: bool) -> Tensor:
        """Check images and pad them. uint8 ones are normalised, unless `fold` says that an op will and none is padded.

        A padded pixel is zero after the normalisation.
        """
        self._check(x)
        pads = [0, 0]
        if self.dynamic_img_pad:
            pads = [-size % patch for size, patch in zip(x.shape[-2:], self.patch_size, strict=True)]
        if x.dtype == torch.uint8 and (not fold or any(pads)):
            x = normalised(x, self.mean, self.std, 255.0, self.proj.weight.dtype)
        return F.pad(x, (0, pads[1], 0, pads[0])) if self.dynamic_img_pad else x

    def op_serves(self, x: Tensor) -> bool:
        """Whether `mmfast.ops.patch_embed` may stand in for `proj`: on a CPU its own call is as good."""
        return not backends.torch_serves(x) and plain_projection(self.proj) and takes_pixels(x, self.proj)

    def tokens(self, x: Tensor, **added: Tensor | None) -> Tensor:
        """Embed prepared images by the op: (B, N, D), with what `mmfast.ops.patch_embed` adds."""
        mean, std = (self.mean, self.std) if x.dtype == torch.uint8 else (None, None)
        return patch_embed(x, self.proj.weight, self.proj.bias, mean=mean, std=std, **added)

    def forward(self, x: Tensor) -> Tensor:
        """Embed images (B, C, H, W) as (B, N, D), or in `output_fmt`."""
        tokens = self.flatten or self.output_fmt in ("NLC", "NHWC")
        if tokens and isinstance(x, Tensor) and x.dim() == 4 and self.op_serves(x):
            x = self.prepare(x, fold=True)
            y = self.tokens(x)
            if not self.flatten and self.output_fmt == "NHWC":
                y = y.unflatten(1, (x.shape[2] // self.patch_size[0], x.shape[3] // self.patch_size[1]))
            return self.norm(y)
        x = self.proj(self.prepare(x, fold=False))
        if self.flatten or self.output_fmt == "NLC":
            x = x.flatten(2).transpose(1, 2)
        elif self.output_fmt == "NHWC":
            x = x.permute(0, 2, 3, 1)
        elif self.output_fmt == "NCL":
            x = x.flatten(2)
        return self.norm(x)


def plain_projection(proj: Any) -> bool:
    """Whether a call of `proj` is a convolution whose stride is its kernel and nothing else: no hooks, no wrapper."""
    return (
        type(proj) is nn.Conv2d
        and proj.stride == proj.kernel_size
        and proj.padding in ((0, 0), "valid")
        and proj.dilation == (1, 1)
        and proj.groups == 1
        and not hooked(proj)
        and not any_global_hook()
    )


def takes_pixels(x: Tensor, proj: nn.Conv2d) -> bool:
    """Whether the op takes these images with this weight: plain tensors, and dtypes that a convolution takes too."""
    tensors = [t for t in (x, proj.weight, proj.bias) if t is not None]
    if not all(_plain_tensor(t) and t.device == x.device for t in tensors):
        return False
    kinds = {t.dtype for t in tensors if t.is_floating_point()}
    casts = x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)
    return len(kinds) == 1 or (casts and torch.float64 not in kinds)


class NormedPatchEmbed(PatchEmbed):
    """`PatchEmbed` with a LayerNorm of each patch's pixels before the projection and one after it.

    Arguments as `PatchEmbed`; norm_layer (LayerNorm by default) makes both norms, `norm_in` over the C*P*P pixels of a
    patch in the order of the kernel (channel, row, column) and `norm` over the embedding.

    Raises:
        ValueError: as `PatchEmbed`.

    Source: vit-pytorch's `to_patch_embedding`.
    """

    def __init__(
        self,
        img_size: Size | None = 224,
        patch_size: Size = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Any = None,
        **kwargs: Any,
    ) -> None:
        norm_layer = norm_layer or LayerNorm
        super().__init__(img_size, patch_size, in_chans, embed_dim, norm_layer, **kwargs)
        factory = {name: kwargs.get(name) for name in ("device", "dtype")}
        self.norm_in = norm_layer(in_chans * self.patch_size[0] * self.patch_size[1], **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Embed images (B, C, H, W) as (B, N, D), or in `output_fmt`."""
        x, (ph, pw) = self.prepare(x, fold=False), self.patch_size
        batch, channels, height, width = x.shape
        rows, columns = height // ph, width // pw
        x = x[..., : rows * ph, : columns * pw].reshape(batch, channels, rows, ph, columns, pw)
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3)  # [B, rows, columns, C * P * P]
        x = self.norm(F.linear(self.norm_in(x), self.proj.weight.flatten(1), self.proj.bias))
        if self.flatten or self.output_fmt == "NLC":
            return x.flatten(1, 2)
        if self.output_fmt == "NHWC":
            return x
        x = x.permute(0, 3, 1, 2)
        return x.flatten(2) if self.output_fmt == "NCL" else x


@torch.no_grad()
def resample_patch_embed(
    weight: Tensor, new_size: tuple[int, int], interpolation: str = "bicubic", antialias: bool = True
) -> Tensor:
    """Resample the kernel of a patch embedding to another patch size.

    The new kernel w' is the one for which resized patches keep their embedding: with R the matrix that resizes a
    patch, `w' = pinv(R)^T w`, so `<w', R x> = <w, x>` where the new patch is larger.

    Args:
        weight: (D, C, P, P), any floating dtype; computed in float32.
        new_size: (height, width) of the new patch.
        interpolation: mode of `F.interpolate`.
        antialias: of `F.interpolate`.

    Returns:
        (D, C, *new_size) in weight's dtype; `weight` itself where the size is unchanged.

    Raises:
        ValueError: weight is not 4-D, or a size is not positive.

    Source: Beyer et al., "FlexiViT: One Model for All Patch Sizes", arXiv:2212.08013; timm's `resample_patch_embed`.
    """
    if weight.dim() != 4:
        raise ValueError(f"resample_patch_embed: weight must be (D, C, P, P), got {tuple(weight.shape)}")
    new_size = pair_of_sizes("resample_patch_embed", "new_size", new_size)
    old_size = tuple(weight.shape[-2:])
    if old_size == new_size:
        return weight
    pixels = old_size[0] * old_size[1]
    basis = torch.eye(pixels, device=weight.device).reshape(pixels, 1, *old_size)
    resized = F.interpolate(basis, size=new_size, mode=interpolation, antialias=antialias, align_corners=False)
    inverse = torch.linalg.pinv(resized.flatten(1).T)  # [P * P, P' * P']
    return (weight.float().flatten(2) @ inverse).reshape(*weight.shape[:2], *new_size).to(weight.dtype)
