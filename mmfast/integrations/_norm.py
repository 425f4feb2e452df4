"""`add_norm`: the residual sum, LayerScale, drop path and norm that fused blocks compute in one step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import backends
from ..nn import LayerNorm
from ..nn.activation import any_global_hook
from ..ops import add_layer_norm
from ._swap import Accelerated, called, fits, plain_tensor

NORMS: dict[type, str] = {nn.LayerNorm: "", LayerNorm: ""}
"""Layer norms -> the flag, if any, under which they compute something else. Integrations add theirs."""

FLOAT32_NORMS: set[type] = set()
"""Layer norms that compute in float32 whatever the dtype of the input."""

SCALES: dict[type, str] = {nn.Identity: ""}
"""LayerScale classes -> the name of their factor."""

DROP_PATHS: set[type] = {nn.Identity}
"""Modules that in training multiply each sample by a random factor, with probability `drop_prob` 0."""


def refuses_norm(module: Any) -> str | None:
    """Why `mmfast.ops.layer_norm` cannot compute this layer norm, whose type is in NORMS, or None."""
    if len(module.normalized_shape) != 1:
        return f"normalises over {len(module.normalized_shape)} dimensions"
    if not 0.0 < module.eps < float("inf"):
        return f"has eps {module.eps}, which must be positive"
    flag = NORMS[type(module)]
    return f"has {flag} set" if flag and getattr(module, flag) else None


class FusedBlock(Accelerated):
    """Mixin of transformer blocks that compute their first residual sum and second norm with `add_norm`.

    `bypassed` has the norm, then the LayerScale and the drop path if there are any.
    """

    mmfast_op = "add_layer_norm"

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        """Why this block cannot be fused, or None."""
        for name, why_not in zip(cls.bypassed, (_norm_called, _scale_called, _drop_path_called), strict=False):
            reason = why_not(module._modules.get(name))
            if reason is not None:
                return f"{name} {reason}"
        return None


def add_norm(
    branch: Tensor, residual: Tensor, norm: Any, scale: Any = None, drop_path: Any = None
) -> tuple[Tensor, Tensor]:
    """Return `norm(s)` and `s = residual + drop_path(scale(branch))`.

    One `mmfast.ops.add_layer_norm` where that is the same; the modules themselves where one of them is of a type that
    is not known, or has a hook, or the op does not take the tensors: asked at each call, since hooks come and go. A
    block has its LayerScale and drop path as modules, nn.Identity where they are off; None is for none at all.
    """
    tensors = not backends.torch_serves(branch) and plain_tensor(branch) and plain_tensor(residual)
    if tensors and _replaceable(norm, scale, drop_path):
        gamma = None if scale is None else _gamma(scale)
        weight, bias = norm.weight, norm.bias
        if _takes(branch, residual, norm, gamma):
            factors = None if drop_path is None else _factors(branch, gamma, drop_path)
            pair = None if gamma is None and factors is None else (gamma, factors)
            return add_layer_norm(branch, residual, weight, bias, norm.eps, scale=pair)
    if scale is not None:
        branch = scale(branch)
    if drop_path is not None:
        branch = drop_path(branch)
    s = residual + branch
    return norm(s), s


def _replaceable(norm: Any, scale: Any, drop_path: Any) -> bool:
    """Whether a call of these modules does nothing but what `add_layer_norm` does."""
    return (
        _norm_called(norm) is None
        and (scale is None or _scale_called(scale) is None)
        and (drop_path is None or _drop_path_called(drop_path) is None)
        and not any_global_hook()
    )


# Why a module has to be called, or None if `add_norm` may stand in for it.


def _norm_called(module: Any) -> str | None:
    return called(module, *NORMS) or refuses_norm(module)


def _scale_called(module: Any) -> str | None:
    return called(module, *SCALES)


def _drop_path_called(module: Any) -> str | None:
    return called(module, *DROP_PATHS)


def _gamma(scale: Any) -> Tensor | None:
    name = SCALES[type(scale)]
    return getattr(scale, name) if name else None


def _factors(branch: Tensor, gamma: Tensor | None, drop_path: Any) -> Tensor | None:
    """The drop path's own random factors, (B, 1, ...): the module is asked for them, so its draw is the same."""
    if not drop_path.training or type(drop_path) is nn.Identity or not drop_path.drop_prob:
        return None
    dtype = branch.dtype if gamma is None else torch.promote_types(branch.dtype, gamma.dtype)
    return drop_path(branch.new_ones((branch.shape[0],) + (1,) * (branch.dim() - 1), dtype=dtype))


def _takes(branch: Tensor, residual: Tensor, norm: Any, gamma: Tensor | None) -> bool:
    """Whether `add_layer_norm` takes these tensors. Sums that broadcast and odd mixtures of dtypes it does not."""
    if branch.shape != residual.shape or branch.dim() < 2:
        return False
    dtype = branch.dtype if branch.dtype == residual.dtype else torch.promote_types(branch.dtype, residual.dtype)
    if not (fits(norm.weight, dtype) and fits(norm.bias, dtype)):
        return False
    if dtype == torch.float64 and type(norm) in FLOAT32_NORMS:
        return False
    return gamma is None or (fits(gamma, branch.dtype) and gamma.shape == branch.shape[-1:])
