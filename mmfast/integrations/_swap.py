"""What all accelerated classes have in common, and `add_norm`, the one step that fused blocks compute themselves.

An accelerated class is a subclass of the class it stands in for, under the same name, importable from its integration.
So a swap of `module.__class__` keeps isinstance, repr, pickling and whatever goes by the names of classes, and nothing
is written on the module: what it was stands on its class.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _torch_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import backends
from ..nn import LayerNorm
from ..ops import add_layer_norm
from ._outline import outline


class Accelerated(nn.Module):
    """Mixin of the classes that `mmfast.accelerate` puts in place of others."""

    mmfast_original: ClassVar[type[nn.Module]]
    mmfast_op: ClassVar[str]

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        """Why `module`, of the original class, cannot take this class, or None."""
        raise NotImplementedError


NORMS: dict[type, str] = {nn.LayerNorm: "", LayerNorm: ""}
"""Layer norms -> the flag, if any, under which they compute something else. Integrations add theirs."""

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
    """Mixin of transformer blocks that compute their first residual sum and second norm with `add_norm`."""

    mmfast_op = "add_layer_norm"
    outlines: ClassVar[frozenset[str]]
    """What the forward of the original class may be, for the forward of this one to be the same."""
    bypassed: ClassVar[tuple[str, ...]]
    """Submodules that `add_norm` stands in for: the norm, LayerScale and drop path."""

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        """Why this block cannot be fused, or None."""
        if issubclass(cls, UnknownBlock):
            return f"this version of {cls.mmfast_original.__name__}.forward is not known to mmfast"
        for name, why_not in zip(cls.bypassed, (_norm_called, _scale_called, _drop_path_called), strict=False):
            submodule = module._modules.get(name)
            reason = "is missing" if submodule is None else why_not(submodule)
            if reason is not None:
                return f"{name} {reason}"
        return None


class UnknownBlock(FusedBlock):
    """A block whose forward mmfast does not know, and leaves as it is."""

    outlines = frozenset()


def fused(original: type[nn.Module], *candidates: type[FusedBlock]) -> Any:
    """The candidate whose forward does what that of the installed `original` does, or UnknownBlock."""
    steps = outline(original)
    return next((candidate for candidate in candidates if steps in candidate.outlines), UnknownBlock)


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
        if _takes(branch, residual, weight, bias, gamma):
            factors = None if drop_path is None else _factors(branch, gamma, drop_path)
            pair = None if gamma is None and factors is None else (gamma, factors)
            return add_layer_norm(branch, residual, weight, bias, norm.eps, scale=pair)
    if scale is not None:
        branch = scale(branch)
    if drop_path is not None:
        branch = drop_path(branch)
    s = residual + branch
    return norm(s), s


def plain_tensor(x: object) -> bool:
    """Whether `x` is a dense tensor: no DTensor, nested tensor or other wrapper, and no symbol of a tracer."""
    return isinstance(x, Tensor) and not x.is_nested and (type(x) is Tensor or not is_traceable_wrapper_subclass(x))


def fits(parameter: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether an op on tensors of `dtype` takes this parameter: in the same dtype, or in float32."""
    if parameter is None or parameter.dtype == dtype:
        return True
    return parameter.dtype == torch.float32 and dtype != torch.float64


def _hooked(module: nn.Module) -> bool:
    """Whether a call of `module` runs anything but the forward of its class."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _any_global_hook() -> bool:
    return bool(
        _torch_module._global_forward_hooks
        or _torch_module._global_forward_pre_hooks
        or _torch_module._global_backward_hooks
        or _torch_module._global_backward_pre_hooks
    )


def _replaceable(norm: Any, scale: Any, drop_path: Any) -> bool:
    """Whether a call of these modules does nothing but what `add_layer_norm` does."""
    return (
        _norm_called(norm) is None
        and (scale is None or _scale_called(scale) is None)
        and (drop_path is None or _drop_path_called(drop_path) is None)
        and not _any_global_hook()
    )


# Why a module has to be called, or None if `add_norm` may stand in for it.


def _norm_called(module: Any) -> str | None:
    if type(module) not in NORMS:
        return f"is a {type(module).__name__}"
    return _HOOKED if _hooked(module) else refuses_norm(module)


def _scale_called(module: nn.Module) -> str | None:
    if type(module) not in SCALES:
        return f"is a {type(module).__name__}"
    return _HOOKED if _hooked(module) else None


def _drop_path_called(module: nn.Module) -> str | None:
    if type(module) not in DROP_PATHS:
        return f"is a {type(module).__name__}"
    return _HOOKED if _hooked(module) else None


_HOOKED = "has hooks or a forward of its own"


def _gamma(scale: Any) -> Tensor | None:
    name = SCALES[type(scale)]
    return getattr(scale, name) if name else None


def _factors(branch: Tensor, gamma: Tensor | None, drop_path: Any) -> Tensor | None:
    """The drop path's own random factors, (B, 1, ...): the module is asked for them, so its draw is the same."""
    if not drop_path.training or type(drop_path) is nn.Identity or not drop_path.drop_prob:
        return None
    dtype = branch.dtype if gamma is None else torch.promote_types(branch.dtype, gamma.dtype)
    return drop_path(branch.new_ones((branch.shape[0],) + (1,) * (branch.dim() - 1), dtype=dtype))


def _takes(branch: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, gamma: Tensor | None) -> bool:
    """Whether `add_layer_norm` takes these tensors. Sums that broadcast and odd mixtures of dtypes it does not."""
    if branch.shape != residual.shape or branch.dim() < 2:
        return False
    dtype = branch.dtype if branch.dtype == residual.dtype else torch.promote_types(branch.dtype, residual.dtype)
    if not (fits(weight, dtype) and fits(bias, dtype)):
        return False
    return gamma is None or (fits(gamma, branch.dtype) and gamma.shape == branch.shape[-1:])
