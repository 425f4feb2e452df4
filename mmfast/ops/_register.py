"""Registration of ops with torch.library.

`register` takes the schema, the implementation, a fake (shape) function, an autograd function and an autocast
rule, and defines the op `torch.ops.mmfast.<name>`: `Library.define` and `impl`, with the autograd function at the
Autograd key. Of the ways that give torch.compile, torch.export, opcheck and dispatch modes an op to see, it costs the
host least. Median microseconds of a call with gradient on a CPU tensor of 4 x 16, forward / forward and backward, from
benchmarks/results/amd-epyc-2026-11-22.csv (`mmfast bench registration`):

    F.layer_norm, in C++                               13 /  72
    autograd.Function called directly, no op           37 / 114
    Library.define and impl with such a function       56 / 127     this
    torch.library.custom_op with register_autograd    119 / 227
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

_LIBRARY = torch.library.Library("mmfast", "DEF")  # definitions live as long as this object

Autocast = Literal["keep", "lower_precision"]


def register(
    schema: str,
    implementation: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    autograd: Callable[..., Any] | None = None,
    autocast: Autocast = "keep",
) -> Any:
    """Define `torch.ops.mmfast.<name>` and return its overload, which is what callers should call.

    Args:
        schema: as in native_functions.yaml, e.g. `"relu(Tensor x) -> Tensor"`.
        implementation: computes the result on any device, without autograd.
        fake: returns empty results of the right shapes, strides and dtypes.
        autograd: computes the result with autograd (`SomeFunction.apply`). Without it the op is one half of
            such a function, and gradients do not flow through it.
        autocast: "keep" runs the op on its inputs as they are, and no torch op inside it is autocast;
            "lower_precision" casts floating inputs to the autocast dtype first.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.mmfast, name).default
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mmfast::{name}", fake, lib=_LIBRARY)
    _LIBRARY.impl(name, autograd or torch.library.fallthrough_kernel, "Autograd")
    for device in ("cuda", "cpu"):  # halves too: a backward pass may run where autocast is on
        _LIBRARY.impl(name, _autocast(op, device, autocast), f"Autocast{device.upper()}")
    return op


def _autocast(op: Any, device: str, rule: Autocast) -> Callable[..., Any]:
    key = torch._C.DispatchKey.AutocastCUDA if device == "cuda" else torch._C.DispatchKey.AutocastCPU
    keys = torch._C.DispatchKeySet(key)

    def kernel(*args: Any) -> Any:
        if rule == "lower_precision":
            dtype = torch.get_autocast_dtype(device)
            args = tuple(_cast(arg, dtype) for arg in args)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*args)

    return kernel


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64:
        return value.to(dtype)
    return value


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for the device; never where PyTorch has none, as on "meta", or ours has no rule."""
    return device.type in ("cuda", "cpu") and torch.is_autocast_enabled(device.type)


def stats_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of an op's statistics: float32, or float64 for a float64 x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def differentiable_backward(
    fn: Callable[..., Any], inputs: tuple[Any, ...], grads: tuple[Any, ...], needs: tuple[bool, ...]
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of the torch ops in `fn(*inputs)` that can be differentiated again.

    An autograd function whose backward runs a kernel calls this for `create_graph=True`.
    """
    outputs = fn(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [value for value, need in zip(inputs, needs, strict=True) if need]
    pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if g is not None]
    found = iter(
        torch.autograd.grad([y for y, _ in pairs], wanted, [g for _, g in pairs], create_graph=True, allow_unused=True)
    )
    return tuple(next(found) if need else None for need in needs)
