"""What all accelerated classes have in common.

An accelerated class is a subclass of the class it stands in for, under the same name, importable from its integration.
So a swap of `module.__class__` keeps isinstance, repr, pickling and whatever goes by the names of classes, and nothing
is written on the module: what it was stands on its class.

Each forward first asks `backends.torch_serves`: on a CPU with nothing forced the original code runs, after that one
question. Then it asks whether the op computes the same: hooks come and go, so at each call. Where the answer is no the
original code runs too.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..nn.activation import any_global_hook, hooked
from ._outline import outline


class Accelerated(nn.Module):
    """Mixin of the classes that `mmfast.accelerate` puts in place of others."""

    mmfast_original: ClassVar[type[nn.Module]]
    mmfast_op: ClassVar[str]
    variants: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    """How to outline the original class: the arguments of `outline`, once for each case that has steps of its own."""
    outlines: ClassVar[frozenset[str]] = frozenset()
    """What the original class may do, its variants joined with " | ", for this class to do the same."""
    bypassed: ClassVar[tuple[str, ...]] = ()
    """Submodules, by path, that the op stands in for."""

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether `module`, of the original class, is one of those this class is for."""
        return True

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        """Why `module`, of the original class, cannot take this class, or None."""
        raise NotImplementedError

    @classmethod
    def parts(cls, module: nn.Module) -> tuple[str, ...]:
        """Submodules of `module`, by path, that the op stands in for."""
        return cls.bypassed


class Unknown(Accelerated):
    """In place of a class whose code mmfast does not know, and leaves as it is."""

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        """The reason, always."""
        return f"this version of {cls.mmfast_original.__name__}.forward is not known to mmfast"


def steps(original: type[nn.Module], variants: tuple[dict[str, Any], ...]) -> str:
    """What `original` does in each variant."""
    return " | ".join(outline(original, **variant) for variant in variants)


def known(original: type[nn.Module], *candidates: type[Accelerated]) -> Any:
    """The candidate whose original does what the installed `original` does, or a subclass of Unknown."""
    for candidate in candidates:
        if steps(original, candidate.variants) in candidate.outlines:
            return candidate
    return type("Unknown", (Unknown,), {"mmfast_op": candidates[0].mmfast_op if candidates else ""})


def plain_tensor(x: object) -> bool:
    """Whether `x` is a dense tensor: no DTensor, nested tensor or other wrapper, and no symbol of a tracer."""
    return isinstance(x, Tensor) and not x.is_nested and (type(x) is Tensor or not is_traceable_wrapper_subclass(x))


def fits(parameter: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether a norm of tensors of `dtype` takes this parameter: in the same dtype, or in float32."""
    if parameter is None or parameter.dtype == dtype:
        return True
    return parameter.dtype == torch.float32 and dtype != torch.float64


def multiplies(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether a product op takes these tensors: plain ones of x's dtype, or of any that autocast converts."""
    for parameter in (weight, bias):
        if parameter is None:
            continue
        if not (plain_tensor(parameter) and parameter.device == x.device):
            return False
        converted = torch.is_autocast_enabled(x.device.type) and torch.float64 not in (parameter.dtype, x.dtype)
        if parameter.dtype != x.dtype and not converted:
            return False
    return x.is_floating_point()


HOOKED = "has hooks or a forward of its own"


def called(module: object, *types: type) -> str | None:
    """Why `module` has to be called, unless it is of one of `types` and without hooks: then None."""
    if module is None:
        return "is missing"
    if type(module) not in types:
        return f"is a {type(module).__name__}"
    return HOOKED if isinstance(module, nn.Module) and hooked(module) else None


def skipped_identity(module: object) -> bool:
    """Whether `module` is missing, or an nn.Identity that nobody watches: there is nothing to call."""
    return module is None or (type(module) is nn.Identity and not hooked(module) and not any_global_hook())
