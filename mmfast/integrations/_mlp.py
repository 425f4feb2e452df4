"""MLPs that compute a linear layer and its activation in one step."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from .. import backends
from ..nn.activation import KNOWN_ACTIVATIONS, linear_then
from ._swap import HOOKED, Accelerated, called, hooked, plain_tensor


def activation_name(module: Any) -> str | None:
    """What `mmfast.ops.linear_act` calls this activation, or None."""
    name = KNOWN_ACTIVATIONS.get(type(module))
    return name if name is None or isinstance(name, str) else name(module)


def refuses_linear(linear: Any, act: Any, names: tuple[str, ...]) -> str | None:
    """Why these two modules, of these names, have to be called, or None if `linear_act` may stand in for them."""
    reason = called(linear, nn.Linear)
    if reason is not None:
        return f"{names[0]} {reason}"
    if act is None:
        return f"{names[1]} is missing"
    if activation_name(act) is None:
        return f"{names[1]} is a {type(act).__name__}, which linear_act does not have"
    return f"{names[1]} {HOOKED}" if hooked(act) else None


def activated(linear: Any, act: Any, x: Tensor) -> Any:
    """`act(linear(x))`: one `mmfast.ops.linear_act` where that is the same, asked at each call."""
    y = fused_linear(linear, act, x)
    return act(linear(x)) if y is None else y


def fused_linear(linear: Any, act: Any, x: Tensor, *, gate_last: bool | None = None) -> Tensor | None:
    """`mmfast.nn`'s `linear_then`, which says None where the modules have to be called.

    Asked of tensors alone: a tracer would record that a symbol's weight was looked at.
    """
    return linear_then(linear, act, x, gate_last=gate_last) if plain_tensor(x) else None


class FusedMlp(Accelerated):
    """Mixin of MLPs. `bypassed` has the linear layer and the activation that are one step."""

    mmfast_op = "linear_act"

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        """Why this MLP cannot be fused, or None."""
        linear, act = (module._modules.get(name) for name in cls.bypassed)
        return refuses_linear(linear, act, cls.bypassed)


class FusedSequential(Accelerated):
    """Mixin of nn.Sequential in which a linear layer is followed by an activation."""

    mmfast_op = "linear_act"

    @classmethod
    def matches(cls, module: Any) -> bool:
        """Whether there is a linear layer followed by an activation."""
        return bool(_pairs(module))

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        """Why none of the linear layers can be fused with its activation, or None."""
        children = list(module._modules.items())
        reason: str | None = "has no linear layer followed by an activation"
        for index in _pairs(module):
            (name, linear), (act_name, act) = children[index : index + 2]
            reason = refuses_linear(linear, act, (name, act_name))
            if reason is None:
                return None
        return reason

    @classmethod
    def parts(cls, module: Any) -> tuple[str, ...]:
        """The linear layers and activations that are fused."""
        children = list(module._modules.items())
        pairs = [children[index : index + 2] for index in _pairs(module)]
        return tuple(
            name
            for (first, linear), (second, act) in pairs
            if refuses_linear(linear, act, (first, second)) is None
            for name in (first, second)
        )

    def forward(self, input: Any) -> Any:
        """Each module in turn, a linear layer together with the activation after it."""
        if backends.torch_serves(input):
            return super().forward(input)
        children: list[Any] = list(self._modules.values())
        pairs = _pairs(self)
        index = 0
        while index < len(children):
            if index in pairs:
                input = activated(children[index], children[index + 1], input)
                index += 2
            else:
                input = children[index](input)
                index += 1
        return input


def _pairs(module: nn.Module) -> tuple[int, ...]:
    """Indices of the linear layers that are followed by an activation."""
    return tuple(
        index
        for index, (first, second) in enumerate(pairwise(module._modules.values()))
        if type(first) is nn.Linear and activation_name(second) is not None
    )
