"""Activations by name, with timm's names, and the one that torch.nn lacks; and linear layers fused with one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _torch_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import backends
from ..ops import linear_act

ActLayer = str | Callable[..., nn.Module]


class QuickGELU(nn.Module):
    """`x * sigmoid(1.702 x)`, the GELU of OpenAI's CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply to every element of x."""
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[..., nn.Module]] = {
    "celu": nn.CELU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "hard_sigmoid": nn.Hardsigmoid,
    "hard_swish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "hardswish": nn.Hardswish,
    "identity": nn.Identity,
    "leaky_relu": nn.LeakyReLU,
    "mish": nn.Mish,
    "prelu": partial(nn.PReLU, init=0.25),
    "quick_gelu": QuickGELU,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "selu": nn.SELU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "tanh": nn.Tanh,
}


def get_act_layer(act_layer: ActLayer | None) -> Callable[..., nn.Module]:
    """Return the constructor of an activation: `act_layer` itself, or the one of that name; None or "" is GELU.

    Raises:
        ValueError: the name is unknown.
        TypeError: neither a name nor callable, or a module instead of its class.
    """
    if act_layer is None or act_layer == "":
        return nn.GELU
    if isinstance(act_layer, str):
        if act_layer.lower() not in ACTIVATIONS:
            raise ValueError(f"act_layer: expected one of {', '.join(ACTIVATIONS)}, got {act_layer!r}")
        return ACTIVATIONS[act_layer.lower()]
    if isinstance(act_layer, nn.Module) or not callable(act_layer):
        raise TypeError(f"act_layer: expected a name or a module class, got {act_layer!r}")
    return act_layer


KNOWN_ACTIVATIONS: dict[type[nn.Module], str | Callable[[Any], str | None]] = {
    nn.GELU: lambda module: {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate),
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    QuickGELU: "quick_gelu",
}
"""Modules -> the activation of `mmfast.ops.linear_act` that they compute, or a function that says so or None. By exact
type: a subclass may compute anything. Integrations add those of other libraries."""

GATES = {("gelu", True): "geglu", ("silu", False): "swiglu"}
"""The activation of the gate, and whether the gate is the second half -> the gated activation of `linear_act`."""


def plain_activation(module: nn.Module | None) -> str | None:
    """The activation of `mmfast.ops.linear_act` that a call of `module` computes; None if it may do anything else.

    Hooks, a forward of its own and settings that the op lacks are something else.
    """
    known = KNOWN_ACTIVATIONS.get(type(module))  # type: ignore[arg-type]
    if known is None or module is None or hooked(module):
        return None
    return known if isinstance(known, str) else known(module)


def plain_linear(module: nn.Module | None) -> bool:
    """Whether a call of `module` is `F.linear` with its weight and bias and nothing else.

    Not so a subclass or a wrapper (LoRA, quantized, parametrized), nor a layer with hooks (pruned, weight-normalised).
    """
    return type(module) is nn.Linear and not hooked(module)


def linear_then(linear: Any, act: Any, x: Tensor, *, gate_last: bool | None = None) -> Tensor | None:
    """`act(linear(x))` by `mmfast.ops.linear_act`, or None where the modules have to be called one by one.

    Args:
        linear: the linear layer.
        act: the activation that follows it, or that of the gate.
        x: (..., K).
        gate_last: of a gated unit, whether the gate is the second half of the linear layer's output; None is no gate.

    Asked at each call, since hooks come and go. None on a CPU, where the op would call what the modules do, and for
    tensors that the op does not take: DTensor and other wrappers, mixtures of dtypes, symbols of a tracer.
    """
    if backends.torch_serves(x):
        return None
    name = plain_activation(act)
    if name is not None and gate_last is not None:
        name = GATES.get((name, gate_last))
    if name is None or not _plain_tensor(x) or not plain_linear(linear) or any_global_hook():
        return None
    weight, bias = linear.weight, linear.bias
    if not (_plain_tensor(weight) and _takes(x, weight) and (bias is None or _takes(x, bias))):
        return None
    return linear_act(x, weight, bias, activation=name)


def hooked(module: nn.Module) -> bool:
    """Whether a call of `module` runs anything but the forward of its class."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def any_global_hook() -> bool:
    """Whether a call of any module runs hooks."""
    return bool(
        _torch_module._global_forward_hooks
        or _torch_module._global_forward_pre_hooks
        or _torch_module._global_backward_hooks
        or _torch_module._global_backward_pre_hooks
    )


def _plain_tensor(x: object) -> bool:
    """Whether `x` is a dense tensor: no DTensor, nested tensor or other wrapper, and no symbol of a tracer."""
    return isinstance(x, Tensor) and not x.is_nested and (type(x) is Tensor or not is_traceable_wrapper_subclass(x))


def _takes(x: Tensor, parameter: Tensor) -> bool:
    """Whether the op takes this parameter with x. What it does not take is the modules' to compute or to refuse."""
    if parameter.device != x.device or (parameter.dim() == 2 and x.shape[-1:] != parameter.shape[1:]):
        return False
    if parameter.dtype == x.dtype:
        return True
    casts = x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)
    return casts and torch.float64 not in (parameter.dtype, x.dtype)
