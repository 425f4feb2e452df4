"""`layer_norm`: normalise over the last dimension, with torch.library registration and autograd."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ._launchers import launchers
from ._register import differentiable_backward, register, stats_dtype
from ._validate import check_eps, check_input, check_vector


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Layer normalisation over the last dimension: `(x - mean) / sqrt(var + eps) * weight + bias`.

    The same as `F.layer_norm(x, x.shape[-1:], weight, bias, eps)`. Statistics are float32 whatever the
    dtype of x (float64 for float64). Under autocast the output keeps x's dtype.

    Args:
        x: (..., C), float32, float16, bfloat16 or float64, any strides.
        weight: (C,) in x's dtype or float32, or None for 1.
        bias: (C,) in x's dtype or float32, or None for 0.
        eps: positive; added to the variance.

    Returns:
        (..., C) in x's dtype, contiguous.

    Raises:
        TypeError: an argument is not a tensor, or its dtype does not fit.
        ValueError: a shape, a device or eps does not fit.
        BackendError: a forced backend cannot serve.

    Source: Ba, Kiros, Hinton, "Layer Normalization", arXiv:1607.06450.
    """
    check_input("layer_norm", "x", x)
    width = x.shape[-1]
    check_vector("layer_norm", "weight", weight, x, width)
    check_vector("layer_norm", "bias", bias, x, width)
    check_eps("layer_norm", eps)
    if backends.torch_serves(x) or backends.choose("layer_norm", backends.Facts(x.device, x.dtype, width)) == "torch":
        return layer_norm_torch(x, weight, bias, eps)
    return _layer_norm(x, weight, bias, eps)


def layer_norm_torch(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The torch backend: `F.layer_norm`, which also serves float32 parameters of a 16-bit x on a GPU."""
    dtype = x.dtype
    if (weight is None or weight.dtype == dtype) and (bias is None or bias.dtype == dtype):
        y = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
        return y if y.dtype == dtype else y.to(dtype)  # autocast on a GPU promotes to float32
    weight, bias = (p if p is None else p.float() for p in (weight, bias))
    if x.is_cpu and weight is not None and bias is not None:  # a kernel of its own
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps).to(dtype)


def cost(x: Tensor, *, backward: bool = False) -> dict[str, int]:
    """Bytes through device memory that the op cannot do without; its arithmetic is negligible."""
    # Forward reads x and writes y. Backward reads x and dy and writes dx.
    return {"bytes": (3 if backward else 2) * x.numel() * x.element_size()}


class LayerNormFunction(torch.autograd.Function):
    """Autograd of `layer_norm`: saves x and two statistics a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        y, mean, rstd = _layer_norm_forward(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        if torch.is_grad_enabled():  # create_graph=True: PyTorch's own op can be differentiated again
            return differentiable_backward(layer_norm_torch, (x, weight, bias, ctx.eps), grads, ctx.needs_input_grad)
        found = _layer_norm_backward(grads[0], x, weight, bias, mean, rstd, needs)
        return (*(g if need else None for g, need in zip(found, needs, strict=True)), None)


# What the registered ops run. mean and rstd are (...,), float32 (float64 for a float64 x); a gradient that is
# not wanted is an empty tensor, since a schema's results cannot be None.


def _implementation(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    backend = _pick(x)
    if backend == "torch":
        return layer_norm_torch(x, weight, bias, eps)
    y: Tensor = launchers(backend, "layer_norm").layer_norm_forward(x, weight, bias, eps, save_stats=False)[0]
    return y


def _forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    backend = _pick(x)
    if backend != "torch":
        found: tuple[Tensor, Tensor, Tensor] = launchers(backend, "layer_norm").layer_norm_forward(x, weight, bias, eps)
        return found
    stats = stats_dtype(x)
    weight, bias = (p if p is None else p.to(stats) for p in (weight, bias))
    y, mean, rstd = torch.native_layer_norm(x.to(stats), x.shape[-1:], weight, bias, eps)
    return y.to(x.dtype), mean.squeeze(-1), rstd.squeeze(-1)


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    backend = _pick(x)
    if backend != "torch":
        found = launchers(backend, "layer_norm").layer_norm_backward(
            dy,
            x,
            weight,
            mean,
            rstd,
            need_dx=needs[0],
            dweight_dtype=weight.dtype if weight is not None and needs[1] else None,
            dbias_dtype=bias.dtype if bias is not None and needs[2] else None,
        )
    else:
        stats = stats_dtype(x)
        found = torch.ops.aten.native_layer_norm_backward.default(
            dy.to(stats),
            x.to(stats),
            x.shape[-1:],
            mean.unsqueeze(-1),
            rstd.unsqueeze(-1),
            weight if weight is None else weight.to(stats),
            bias if bias is None else bias.to(stats),
            needs,
        )
    dx, dweight, dbias = (x.new_empty(0) if g is None or not need else g for g, need in zip(found, needs, strict=True))
    return (
        dx.to(x.dtype),
        dweight if weight is None else dweight.to(weight.dtype),
        dbias if bias is None else dbias.to(bias.dtype),
    )


def _forward_fake(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    stats = x.new_empty(x.shape[:-1], dtype=stats_dtype(x))
    return x.new_empty(x.shape), stats, torch.empty_like(stats)


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = (
        p.new_empty(p.shape) if p is not None and need else x.new_empty(0)
        for p, need in zip((x, weight, bias), needs, strict=True)
    )
    return dx, dweight, dbias


def _pick(x: Tensor) -> str:
    return backends.pick("layer_norm", backends.Facts(x.device, x.dtype, x.shape[-1]))


_layer_norm = register(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    _implementation,
    fake=lambda x, weight, bias, eps: x.new_empty(x.shape),
    autograd=LayerNormFunction.apply,
)
_layer_norm_forward = register(
    "layer_norm_forward(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
    _forward,
    fake=_forward_fake,
)
_layer_norm_backward = register(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, "
    "bool[3] needs) -> (Tensor, Tensor, Tensor)",
    _backward,
    fake=_backward_fake,
)
