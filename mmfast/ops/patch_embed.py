"""`patch_embed`: images to patch tokens with prefix tokens and positions, with registration and autograd."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ._patch_embed_torch import PerChannel, patch_embed_backward_torch, patch_embed_torch, per_channel
from ._register import autocasts, differentiable_backward, register, stats_dtype
from ._validate import check_tensor

FOLDED_CHANNELS = 4
"""Channels whose mean and std travel to a kernel as numbers; of more, the weight is folded by torch ops."""


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pos_embed: Tensor | None = None,
    prefix_tokens: Tensor | None = None,
    mean: PerChannel = None,
    std: PerChannel = None,
) -> Tensor:
    """Cut images into patches, project each, put prefix tokens first and add positions.

    The same as `F.conv2d(images, weight, bias, stride=patch)`, `flatten(2)`, `transpose(1, 2)`, `cat` with the prefix
    tokens and `+ pos_embed`. Pixels to the right of and below the last whole patch do not count, as in a convolution.

    uint8 images mean `(images / 255 - mean) / std`: torchvision's `ToTensor` and `Normalize`. Floating images are what
    `ToTensor` returns, or normalised already: they become `(images - mean) / std` where mean or std is given, and are
    taken as they are otherwise. So one picture has the same tokens as uint8 and as floats in 0..1.

    Products are computed in images' dtype, of uint8 images in weight's, under autocast in autocast's; sums are float32.
    The result has the dtype that `conv2d`, `cat` and `+` give: that dtype, promoted with those of pos_embed and
    prefix_tokens. So float32 positions and tokens under autocast give float32 tokens, as they do in PyTorch.

    Args:
        images: (B, C, H, W), contiguous, channels_last or with other strides; float32, float16, bfloat16, float64 or
            uint8. There is no gradient of uint8 images.
        weight: (D, C, ph, pw), that of a convolution whose stride is its kernel; in the dtype of floating images or
            float32, or any under autocast.
        bias: (D,) in weight's dtype or float32, or None.
        pos_embed: (P + N, D), or (N, D) for the N = (H // ph) * (W // pw) patches alone, with or without a leading 1,
            of any floating dtype; or None.
        prefix_tokens: (P, D), with or without a leading 1, of any floating dtype: class and register tokens; or None.
        mean: C numbers, or a tensor of C elements, whose gradient is computed; None for 0.
        std: likewise; None for 1.

    Returns:
        (B, P + N, D), contiguous where a kernel serves.

    Raises:
        TypeError: an argument is not a tensor, or its dtype does not fit.
        ValueError: a shape, a device, mean or std does not fit.
        BackendError: a forced backend cannot serve.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv:2010.11929, equation 1; `no_embed_class` of timm.
    """
    _check(images, weight, bias, pos_embed, prefix_tokens)
    channels = weight.shape[1]
    mean = _check_per_channel("mean", mean, channels, images)
    std = _check_per_channel("std", std, channels, images)
    divisor = 1.0 if images.is_floating_point() else 255.0
    dtype = _product_dtype(images, weight)
    if backends.torch_serves(images) or backends.choose("patch_embed", _facts(images, weight, dtype)) == "torch":
        return patch_embed_torch(images, weight, bias, pos_embed, prefix_tokens, mean, std, divisor, dtype)
    if isinstance(mean, Tensor) or isinstance(std, Tensor) or not _fits_launch(channels, mean, std):
        weight, bias, divisor = _fold(weight, bias, mean, std, divisor, dtype)
        mean, std = None, None
    return _patch_embed(images, weight, bias, pos_embed, prefix_tokens, mean, std, divisor, dtype)


def cost(images: Tensor, weight: Tensor, *, prefix: int = 0, out_dtype: torch.dtype | None = None) -> dict[str, int]:
    """Bytes through device memory, and FLOPs, that the op cannot do without, with P = `prefix` tokens in `out_dtype`.

    Forward reads the image and the weight and writes the tokens. Backward, of the weight and of the sums over tokens,
    reads the image and the tokens' gradient and writes the weight's: as many, and a product of the same size.
    """
    batch, channels, height, width = images.shape
    dim, _, ph, pw = weight.shape
    patches = (height // ph) * (width // pw)
    moved = images.numel() * images.element_size() + weight.numel() * weight.element_size()
    moved += batch * (prefix + patches) * dim * (out_dtype or weight.dtype).itemsize
    return {"bytes": moved, "flops": 2 * batch * patches * dim * channels * ph * pw}


def _check(images: object, weight: object, bias: object, pos_embed: object, prefix_tokens: object) -> None:
    if not isinstance(images, Tensor):
        raise TypeError(f"patch_embed: images must be a tensor, got {type(images).__name__}")
    if images.dtype != torch.uint8:
        if not images.is_floating_point():
            raise TypeError(f"patch_embed: images must be floating point or torch.uint8, got {images.dtype}")
        check_tensor("patch_embed", "images", images)
    kernel = _tensor("weight", weight)
    if kernel.dim() != 4 or not kernel.numel():
        raise ValueError(f"patch_embed: weight must have shape (D, C, ph, pw), got {tuple(kernel.shape)}")
    width, channels, ph, pw = kernel.shape
    if images.dim() != 4 or images.shape[1] != channels:
        raise ValueError(f"patch_embed: images must have shape (B, {channels}, H, W), got {tuple(images.shape)}")
    if images.shape[2] < ph or images.shape[3] < pw:
        raise ValueError(
            f"patch_embed: images must be at least one patch {(ph, pw)} large, got {tuple(images.shape[2:])}"
        )
    if bias is not None and _tensor("bias", bias).shape != (width,):
        raise ValueError(f"patch_embed: bias must have shape ({width},), got {tuple(_tensor('bias', bias).shape)}")
    _check_dtypes(images, kernel, bias)
    count = _check_rows("prefix_tokens", prefix_tokens, width, None)
    patches = (images.shape[2] // ph) * (images.shape[3] // pw)
    _check_rows("pos_embed", pos_embed, width, (count + patches, patches))
    for name, value in (("weight", weight), ("bias", bias), ("pos_embed", pos_embed), ("prefix_tokens", prefix_tokens)):
        if isinstance(value, Tensor) and value.device != images.device:
            raise ValueError(f"patch_embed: {name} must be on {images.device} like images, got {value.device}")


def _tensor(name: str, value: object) -> Tensor:
    check_tensor("patch_embed", name, value)
    return value  # type: ignore[return-value]


def _check_dtypes(images: Tensor, weight: Tensor, bias: object) -> None:
    if _autocast_dtype(images, weight) is not None:
        return
    wide = images.dtype == torch.float64
    if images.is_floating_point() and weight.dtype != images.dtype and (weight.dtype != torch.float32 or wide):
        wanted = images.dtype if wide or images.dtype == torch.float32 else f"{images.dtype} or torch.float32"
        raise TypeError(f"patch_embed: weight must be {wanted}, got {weight.dtype}")
    if isinstance(bias, Tensor) and bias.dtype not in (weight.dtype, images.dtype, torch.float32):
        raise TypeError(f"patch_embed: bias must be {weight.dtype} or torch.float32, got {bias.dtype}")


def _check_rows(name: str, value: object, width: int, rows: tuple[int, int] | None) -> int:
    """Raise unless `value` is None or (rows, D), with or without a leading 1; return its number of rows."""
    if value is None:
        return 0
    shape = tuple(_tensor(name, value).shape)
    fits = len(shape) in (2, 3) and shape[-1] == width and (len(shape) == 2 or shape[0] == 1)
    if rows is None:
        if not fits:
            raise ValueError(f"patch_embed: {name} must have shape (P, {width}), got {shape}")
    elif not fits or shape[-2] not in rows:
        wanted = " or ".join(f"({count}, {width})" for count in dict.fromkeys(rows))
        raise ValueError(f"patch_embed: {name} must have shape {wanted}, got {shape}")
    return shape[-2]


def _check_per_channel(name: str, values: PerChannel, channels: int, images: Tensor) -> PerChannel:
    """Raise unless there is a number a channel; return a tensor as it is and a sequence as a list of floats."""
    if values is None:
        return None
    if isinstance(values, Tensor):
        check_tensor("patch_embed", name, values)
        if values.numel() != channels:
            raise ValueError(f"patch_embed: {name} must have {channels} elements, got shape {tuple(values.shape)}")
        if values.device != images.device:
            raise ValueError(f"patch_embed: {name} must be on {images.device} like images, got {values.device}")
        return values
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"patch_embed: {name} must be a sequence of numbers or a tensor, got {type(values).__name__}")
    found = [float(value) for value in values]
    if len(found) != channels:
        raise ValueError(f"patch_embed: {name} must have {channels} elements, got {len(found)}")
    if not all(-math.inf < value < math.inf and (name == "mean" or value != 0.0) for value in found):
        wanted = "finite and not zero" if name == "std" else "finite"
        raise ValueError(f"patch_embed: {name} must be {wanted}, got {found}")
    return found


def _autocast_dtype(images: Tensor, weight: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives a convolution of these, or None where it leaves them alone."""
    if not autocasts(images.device) or torch.float64 in (images.dtype, weight.dtype):
        return None
    return torch.get_autocast_dtype(images.device.type)


def _product_dtype(images: Tensor, weight: Tensor) -> torch.dtype:
    own = images.dtype if images.is_floating_point() else weight.dtype
    return _autocast_dtype(images, weight) or own


def _facts(images: Tensor, weight: Tensor, dtype: torch.dtype) -> backends.Facts:
    return backends.Facts(images.device, dtype, weight.shape[0])


def _precision(dtype: torch.dtype) -> str:
    """How a kernel multiplies float32: only where a backend is forced is it at full precision, see backends.py."""
    return "ieee" if dtype == torch.float32 and backends.ieee_products() else "tf32"


def _fits_launch(channels: int, mean: PerChannel, std: PerChannel) -> bool:
    """Whether mean and std are few enough numbers to travel with a launch."""
    return channels <= FOLDED_CHANNELS or (mean is None and std is None)


def _fold(
    weight: Tensor, bias: Tensor | None, mean: PerChannel, std: PerChannel, divisor: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, float]:
    """Weight and bias, in float32, of the pixels over a power of two, which is returned too.

    The bias is computed from the weight as it will be rounded: the pixels' mean would amplify the rounding.
    """
    power = 1.0 if divisor == 1.0 else 256.0
    wide = weight.float() * (power / divisor)
    wide = wide if std is None else wide / per_channel(std, wide)
    folded = wide.new_zeros(wide.shape[0]) if bias is None else bias.float()
    if mean is not None:
        shift = per_channel(mean, wide) * (divisor / power)
        rounded = wide + (wide.to(dtype).float() - wide).detach()  # a gradient rounded on its way back would show
        folded = folded - (rounded * shift).sum((1, 2, 3))
    return wide, folded, power


class PatchEmbedFunction(torch.autograd.Function):
    """Autograd of `patch_embed`: saves its inputs and nothing else."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        pos_embed: Tensor | None,
        prefix_tokens: Tensor | None,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        divisor: float,
        dtype: torch.dtype,
    ) -> Tensor:
        tensors = (images, weight, bias, pos_embed, prefix_tokens)
        ctx.save_for_backward(*tensors)
        ctx.rest = (mean, std, divisor, dtype)
        return _patch_embed_forward(*tensors, *ctx.rest)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        images, weight, bias, pos_embed, prefix_tokens = tensors = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: PyTorch's own ops can be differentiated again
            return differentiable_backward(patch_embed_torch, (*tensors, *ctx.rest), grads, ctx.needs_input_grad)
        needs = ctx.needs_input_grad
        count = 0 if prefix_tokens is None else prefix_tokens.shape[-2]
        dimages, dweight, sums = _patch_embed_backward(
            grads[0], images, weight, *ctx.rest, count, [needs[0], needs[1], any(needs[2:5])]
        )
        found: list[Tensor | None] = [dimages if needs[0] else None, dweight if needs[1] else None, None, None, None]
        if needs[2]:
            found[2] = sums[count:].sum(0).to(bias.dtype)
        if needs[3]:
            whole = pos_embed.shape[-2] == sums.shape[0]
            found[3] = (sums if whole else sums[count:]).reshape(pos_embed.shape).to(pos_embed.dtype)
        if needs[4]:
            found[4] = sums[:count].reshape(prefix_tokens.shape).to(prefix_tokens.dtype)
        return (*found, None, None, None, None)


# What the registered ops run. `mean` and `std` are in units of `images / divisor`; products are in `dtype`.


def _implementation(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix_tokens: Tensor | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    divisor: float,
    dtype: torch.dtype,
) -> Tensor:
    if _pick(images, weight, mean, std, dtype) == "torch":
        y = patch_embed_torch(images, weight, bias, pos_embed, prefix_tokens, mean, std, divisor, dtype)
        return y.contiguous()
    from ..kernels.patch_embed import patch_embed_forward

    out_dtype = _out_dtype(dtype, pos_embed, prefix_tokens)
    return patch_embed_forward(
        images, weight, bias, pos_embed, prefix_tokens, mean, std, divisor, dtype, out_dtype, _precision(dtype)
    )


def _backward(
    dy: Tensor,
    images: Tensor,
    weight: Tensor,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    divisor: float,
    dtype: torch.dtype,
    count: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    if _pick(images, weight, mean, std, dtype) == "torch":
        found = patch_embed_backward_torch(dy, images, weight, mean, std, divisor, dtype, count, needs)
    else:
        from ..kernels._patch_embed_backward import patch_embed_backward

        found = patch_embed_backward(dy, images, weight, mean, std, divisor, dtype, count=count, needs=needs)
    dimages, dweight, sums = (images.new_empty(0, dtype=dy.dtype) if g is None else g for g in found)
    return dimages, dweight, sums


def _forward_fake(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix_tokens: Tensor | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    divisor: float,
    dtype: torch.dtype,
) -> Tensor:
    count = 0 if prefix_tokens is None else prefix_tokens.shape[-2]
    patches = (images.shape[2] // weight.shape[2]) * (images.shape[3] // weight.shape[3])
    shape = (images.shape[0], count + patches, weight.shape[0])
    return images.new_empty(shape, dtype=_out_dtype(dtype, pos_embed, prefix_tokens))


def _backward_fake(
    dy: Tensor,
    images: Tensor,
    weight: Tensor,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    divisor: float,
    dtype: torch.dtype,
    count: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    none = images.new_empty(0, dtype=dy.dtype)
    return (
        torch.empty_like(images) if needs[0] else none,
        torch.empty_like(weight) if needs[1] else torch.empty_like(none),
        dy.new_empty(dy.shape[1:], dtype=stats_dtype(dy)) if needs[2] else torch.empty_like(none),
    )


def _out_dtype(dtype: torch.dtype, pos_embed: Tensor | None, prefix_tokens: Tensor | None) -> torch.dtype:
    for value in (pos_embed, prefix_tokens):
        if value is not None:
            dtype = torch.promote_types(dtype, value.dtype)
    return dtype


def _pick(
    images: Tensor,
    weight: Tensor,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    dtype: torch.dtype,
) -> str:
    if not _fits_launch(weight.shape[1], mean, std):
        return "torch"  # the public function folds them into the weight
    return backends.pick("patch_embed", _facts(images, weight, dtype))


_SCHEMA = (
    "(Tensor images, Tensor weight, Tensor? bias, Tensor? pos_embed, Tensor? prefix_tokens, float[]? mean, "
    "float[]? std, float divisor, ScalarType dtype) -> Tensor"
)
_patch_embed = register(f"patch_embed{_SCHEMA}", _implementation, fake=_forward_fake, autograd=PatchEmbedFunction.apply)
_patch_embed_forward = register(f"patch_embed_forward{_SCHEMA}", _implementation, fake=_forward_fake)
_patch_embed_backward = register(
    "patch_embed_backward(Tensor dy, Tensor images, Tensor weight, float[]? mean, float[]? std, float divisor, "
    "ScalarType dtype, int count, bool[3] needs) -> (Tensor, Tensor, Tensor)",
    _backward,
    fake=_backward_fake,
)
