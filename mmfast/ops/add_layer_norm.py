"""`add_layer_norm`: residual add, LayerScale, drop path and layer normalisation in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ._launchers import launchers
from ._register import differentiable_backward, register, stats_dtype
from ._validate import check_eps, check_input, check_tensor, check_vector
from .layer_norm import layer_norm, layer_norm_torch

Scale = Tensor | tuple[Tensor | None, Tensor | None] | None


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    scale: Scale = None,
) -> tuple[Tensor, Tensor]:
    """The end of one residual branch and the normalisation that opens the next, as (y, s).

    `s = residual + scale * x` and `y = layer_norm(s, weight, bias, eps)`.

    Args:
        x: (B, ..., C), output of the branch; float32, float16, bfloat16 or float64, any strides.
        residual: x's shape; x's dtype or another of these.
        weight: (C,) in the dtype of s or float32, or None for 1.
        bias: (C,) in the dtype of s or float32, or None for 0.
        eps: positive; added to the variance.
        scale: None; LayerScale's gamma, (C,); a factor for each sample (drop path), (B,), (B, 1) or
            (B, 1, 1); or a pair (gamma, factors), either of which may be None. In x's dtype or float32. A
            vector of length B = C is a gamma; give factors as (B, 1).

    Returns:
        y and s, (B, ..., C), contiguous, in the wider dtype of x and residual.

    Raises:
        TypeError: an argument is not a tensor, or its dtype does not fit.
        ValueError: a shape, a device or eps does not fit.
        BackendError: a forced backend cannot serve.

    Source: the residual branch of timm's `Block`: `x + drop_path(ls(branch))`, then `norm`.
    """
    op = "add_layer_norm"
    check_input(op, "x", x)
    check_input(op, "residual", residual)
    if residual.shape != x.shape:
        raise ValueError(f"{op}: residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    if residual.device != x.device:
        raise ValueError(f"{op}: residual must be on {x.device} like x, got {residual.device}")
    dtype = x.dtype if x.dtype == residual.dtype else torch.promote_types(x.dtype, residual.dtype)
    width = x.shape[-1]
    check_vector(op, "weight", weight, x, width, dtype)
    check_vector(op, "bias", bias, x, width, dtype)
    check_eps(op, eps)
    gamma, sample = (None, None) if scale is None else _split_scale(op, scale, x)
    if backends.torch_serves(x):
        s = _add(x, residual, gamma, sample)
        return layer_norm_torch(s, weight, bias, eps), s
    if backends.choose(op, backends.Facts(x.device, dtype, width)) == "torch":
        s = _add(x, residual, gamma, sample)
        return layer_norm(s, weight, bias, eps), s
    return _add_layer_norm(x, residual, weight, bias, eps, gamma, sample)


def cost(x: Tensor, *, scaled: bool = False, backward: bool = False) -> dict[str, int]:
    """Bytes through device memory that the op cannot do without; its arithmetic is negligible."""
    # Forward: x, residual, y, s. Backward: dy, ds, s, dresidual, and with a scale also x and dx.
    tensors = 4 + 2 * (scaled and backward)
    return {"bytes": tensors * x.numel() * x.element_size()}


def _split_scale(op: str, scale: Any, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return `scale` as gamma (C,) and factors (B,)."""
    width = x.shape[-1]
    if isinstance(scale, (tuple, list)):
        if len(scale) != 2:
            raise ValueError(f"{op}: scale must be a tensor or a pair, got {len(scale)} elements")
        gamma, sample = scale
    else:
        check_tensor(op, "scale", scale)
        is_gamma = scale.dim() == 1 and scale.shape[0] == width
        gamma, sample = (scale, None) if is_gamma else (None, scale)
    check_vector(op, "scale (gamma)", gamma, x, width)
    if sample is None:
        return gamma, None
    check_tensor(op, "scale (per sample)", sample)
    shape = tuple(sample.shape)
    if x.dim() < 2 or not 0 < len(shape) <= x.dim() or shape != (x.shape[0], *[1] * (len(shape) - 1)):
        wanted = f"({width},) or ({x.shape[0]}, 1, ...)" if x.dim() > 1 else f"({width},)"
        raise ValueError(f"{op}: scale must have shape {wanted}, got {shape}")
    sample = sample.reshape(-1)
    check_vector(op, "scale (per sample)", sample, x, x.shape[0])
    return gamma, sample


def _add(x: Tensor, residual: Tensor, gamma: Tensor | None, sample: Tensor | None) -> Tensor:
    """The torch backend's residual stream: the same steps as the modules replaced."""
    dtype = torch.promote_types(x.dtype, residual.dtype)
    if gamma is not None:
        x = x * gamma
    if sample is not None:
        x = x * sample.view(-1, *[1] * (x.dim() - 1))
    s = residual + x
    return s.contiguous() if s.dtype == dtype else s.to(dtype).contiguous()


class AddLayerNormFunction(torch.autograd.Function):
    """Autograd of `add_layer_norm`: saves s and two statistics a row, and x where a scale has a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        gamma: Tensor | None,
        sample: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        y, s, mean, rstd = _add_layer_norm_forward(x, residual, weight, bias, eps, gamma, sample)
        keep_x = ctx.needs_input_grad[5] or ctx.needs_input_grad[6]
        ctx.save_for_backward(x if keep_x else None, s, weight, bias, gamma, sample, mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.dtypes = eps, (x.dtype, residual.dtype)
        return y, s

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, s, weight, bias, gamma, sample, mean, rstd = ctx.saved_tensors
        dy, ds = grads
        if dy is None and ds is None:
            return (None,) * 7
        needs = list(ctx.needs_input_grad[:4] + ctx.needs_input_grad[5:])
        if torch.is_grad_enabled():  # create_graph=True
            found = _differentiable_backward(dy, ds, s, x, weight, bias, gamma, sample, ctx.eps, ctx.dtypes, needs)
        else:
            dy = torch.zeros_like(s) if dy is None else dy
            found = _add_layer_norm_backward(dy, ds, s, x, weight, bias, gamma, sample, mean, rstd, *ctx.dtypes, needs)
        if _one_gradient(gamma, sample, *ctx.dtypes):
            both = found[1] if needs[1] else found[0]
            found = (both, both, *found[2:])
        wanted = [g if need else None for g, need in zip(found, needs, strict=True)]
        return (*wanted[:4], None, *wanted[4:])


def _one_gradient(
    gamma: Tensor | None, sample: Tensor | None, x_dtype: torch.dtype, residual_dtype: torch.dtype
) -> bool:
    """Whether dx and dresidual are the same numbers; then only one of them is computed."""
    return gamma is None and sample is None and x_dtype == residual_dtype


def _differentiable_backward(
    dy: Tensor | None,
    ds: Tensor | None,
    s: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    gamma: Tensor | None,
    sample: Tensor | None,
    eps: float,
    dtypes: tuple[torch.dtype, torch.dtype],
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """The backward in torch ops, which can be differentiated again; s carries the graph of x and residual."""
    h = torch.zeros_like(s) if ds is None else ds
    dweight = dbias = dgamma = dsample = None
    if dy is not None:
        normed, dweight, dbias, _ = differentiable_backward(
            layer_norm_torch, (s, weight, bias, eps), (dy,), (True, needs[2], needs[3], False)
        )
        h = h if normed is None else h + normed
    column = None if sample is None else sample.view(-1, *[1] * (s.dim() - 1))
    dx = h
    for factor in (gamma, column):
        dx = dx if factor is None else dx * factor
    if x is not None and gamma is not None and needs[4]:
        hx = h * x if column is None else h * x * column
        dgamma = hx.flatten(0, -2).sum(0).to(gamma.dtype)
    if x is not None and sample is not None and needs[5]:
        hx = h * x if gamma is None else h * x * gamma
        dsample = hx.flatten(1).sum(1).to(sample.dtype)
    return dx.to(dtypes[0]), h.to(dtypes[1]), dweight, dbias, dgamma, dsample


# What the registered ops run. A gradient that is not wanted is an empty tensor, since a schema's results cannot be
# None; so is dx where it equals dresidual (`_one_gradient`), since results must not share memory.


def _implementation(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    gamma: Tensor | None,
    sample: Tensor | None,
) -> tuple[Tensor, Tensor]:
    backend = _pick(torch.promote_types(x.dtype, residual.dtype), x)
    if backend == "torch":
        s = _add(x, residual, gamma, sample)
        return layer_norm_torch(s, weight, bias, eps), s
    launch = launchers(backend, "add_layer_norm").add_layer_norm_forward
    y, s, _, _ = launch(x, residual, weight, bias, eps, gamma, sample, save_stats=False)
    return y, s


def _forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    gamma: Tensor | None,
    sample: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    backend = _pick(torch.promote_types(x.dtype, residual.dtype), x)
    if backend != "torch":
        launch = launchers(backend, "add_layer_norm").add_layer_norm_forward
        found: tuple[Tensor, Tensor, Tensor, Tensor] = launch(x, residual, weight, bias, eps, gamma, sample)
        return found
    s = _add(x, residual, gamma, sample)
    y = layer_norm_torch(s, weight, bias, eps)
    var, mean = torch.var_mean(s.to(stats_dtype(s)), -1, correction=0)
    return y, s, mean, (var + eps).rsqrt()


def _backward(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    gamma: Tensor | None,
    sample: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    one = _one_gradient(gamma, sample, x_dtype, residual_dtype)
    wanted = [needs[0] and not (one and needs[1]), *needs[1:]]
    likes = (x_dtype, residual_dtype, weight, bias, gamma, sample)
    dtypes = [
        (like if isinstance(like, torch.dtype) else like.dtype) if want and like is not None else None
        for like, want in zip(likes, wanted, strict=True)
    ]
    backend = _pick(s.dtype, s)
    if backend != "torch":
        found = launchers(backend, "add_layer_norm").add_layer_norm_backward(
            dy,
            ds,
            s,
            x,
            weight,
            gamma,
            sample,
            mean,
            rstd,
            **dict(zip(_GRADIENT_DTYPES, dtypes, strict=True)),
        )
    else:
        found = _torch_backward(dy, ds, s, x, weight, bias, gamma, sample, mean, rstd, dtypes)
    return tuple(s.new_empty(0) if g is None else g for g in found)


_GRADIENT_DTYPES = (
    "dx_dtype",
    "dresidual_dtype",
    "dweight_dtype",
    "dbias_dtype",
    "dgamma_dtype",
    "dsample_dtype",
)


def _torch_backward(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    gamma: Tensor | None,
    sample: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dtypes: list[torch.dtype | None],
) -> tuple[Tensor | None, ...]:
    stats = stats_dtype(s)
    weight, bias, gamma, x, ds = (t if t is None else t.to(stats) for t in (weight, bias, gamma, x, ds))
    column = None if sample is None else sample.to(stats).view(-1, *[1] * (s.dim() - 1))
    h, dweight, dbias = torch.ops.aten.native_layer_norm_backward.default(
        dy.to(stats),
        s.to(stats),
        s.shape[-1:],
        mean.unsqueeze(-1),
        rstd.unsqueeze(-1),
        weight,
        bias,
        [True, dtypes[2] is not None, dtypes[3] is not None],
    )
    h = h if ds is None else h + ds
    dx, hx = h, None if x is None else h * x
    dgamma, dsample = hx, hx
    if gamma is not None:
        dx, dsample = dx * gamma, None if dsample is None else dsample * gamma
    if column is not None:
        dx, dgamma = dx * column, None if dgamma is None else dgamma * column
    dgamma = None if dgamma is None else dgamma.flatten(0, -2).sum(0)
    dsample = None if dsample is None or s.dim() < 2 else dsample.flatten(1).sum(1)
    found = (dx, h.clone() if dx is h else h, dweight, dbias, dgamma, dsample)
    return tuple(
        g.to(dtype) if g is not None and dtype is not None else None for g, dtype in zip(found, dtypes, strict=True)
    )


def _forward_fake(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    gamma: Tensor | None,
    sample: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    s = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    mean = x.new_empty(x.shape[:-1], dtype=stats_dtype(s))
    return torch.empty_like(s), s, mean, torch.empty_like(mean)


def _backward_fake(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    gamma: Tensor | None,
    sample: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    one = _one_gradient(gamma, sample, x_dtype, residual_dtype)
    tiles = (
        s.new_empty(s.shape, dtype=x_dtype) if needs[0] and not (one and needs[1]) else s.new_empty(0),
        s.new_empty(s.shape, dtype=residual_dtype) if needs[1] else s.new_empty(0),
    )
    vectors = (
        p.new_empty(p.shape) if p is not None and need else s.new_empty(0)
        for p, need in zip((weight, bias, gamma, sample), needs[2:], strict=True)
    )
    return (*tiles, *vectors)


def _pick(dtype: torch.dtype, x: Tensor) -> str:
    return backends.pick("add_layer_norm", backends.Facts(x.device, dtype, x.shape[-1]))


_ARGUMENTS = "Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, Tensor? gamma, Tensor? sample"
_add_layer_norm = register(
    f"add_layer_norm({_ARGUMENTS}) -> (Tensor, Tensor)",
    _implementation,
    fake=lambda *args: _forward_fake(*args)[:2],
    autograd=AddLayerNormFunction.apply,
)
_add_layer_norm_forward = register(
    f"add_layer_norm_forward({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    fake=_forward_fake,
)
_add_layer_norm_backward = register(
    "add_layer_norm_backward(Tensor dy, Tensor? ds, Tensor s, Tensor? x, Tensor? weight, Tensor? bias, "
    "Tensor? gamma, Tensor? sample, Tensor mean, Tensor rstd, ScalarType x_dtype, "
    "ScalarType residual_dtype, bool[6] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    fake=_backward_fake,
)
