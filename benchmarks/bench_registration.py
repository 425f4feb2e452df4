"""Host time of a call, for each way to register an op with torch, and what `mmfast.ops.layer_norm` adds.

On a tensor of 64 numbers everything is overhead. The ways do the same work, `native_layer_norm` and its backward:

- `F.layer_norm`: PyTorch's own op, in C++;
- `autograd.Function`: called directly, which torch.compile and torch.export see through only in part;
- `define/impl`: an op of `torch.library` whose Autograd kernel is such a function: what mmfast does;
- `custom_op`: `torch.library.custom_op` with `register_autograd`;
- `mmfast.ops.layer_norm`: validation and the choice of a backend, then that backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast import ops
from mmfast.benchmarks import _harness
from mmfast.benchmarks._harness import Options, Spec

EPS = 1e-5
SHAPE = (4, 16)
BOUND = 10e-6  # seconds that mmfast.ops.layer_norm may add to F.layer_norm

Triple = tuple[Tensor, Tensor, Tensor]


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Triple:
    return torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)


def backward(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> Triple:
    run = torch.ops.aten.native_layer_norm_backward.default
    return run(dy, x, x.shape[-1:], mean, rstd, weight, bias, [True, True, True])


class Direct(torch.autograd.Function):
    """Runs its passes as plain functions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, mean, rstd = forward(x, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*backward(grads[0], *ctx.saved_tensors), None)


_KEEP: list[torch.library.Library] = []  # a definition lives as long as its Library object


@cache
def defined() -> Callable[..., Tensor]:
    library = torch.library.Library("mmfast_benchmark", "FRAGMENT")
    _KEEP.append(library)
    library.define("forward(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)")
    library.define(
        "backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor bias)"
        " -> (Tensor, Tensor, Tensor)"
    )
    library.define("norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor")
    namespace = torch.ops.mmfast_benchmark
    for name, run in (("forward", forward), ("backward", backward)):
        library.impl(name, run, "CompositeExplicitAutograd")
        library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    first, second = namespace.forward.default, namespace.backward.default

    class Registered(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
            y, mean, rstd = first(x, weight, bias, eps)
            ctx.save_for_backward(x, mean, rstd, weight, bias)
            return y

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            return (*second(grads[0], *ctx.saved_tensors), None)

    library.impl("norm", lambda *args: forward(*args)[0], "CompositeExplicitAutograd")
    library.impl("norm", Registered.apply, "Autograd")
    return namespace.norm.default


@cache
def custom() -> Callable[..., Tensor]:
    whole = torch.library.custom_op("mmfast_benchmark::custom", forward, mutates_args=())
    back = torch.library.custom_op("mmfast_benchmark::custom_backward", backward, mutates_args=())

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, bias, _ = inputs
        ctx.save_for_backward(x, output[1], output[2], weight, bias)

    whole.register_autograd(lambda ctx, dy, *_: (*back(dy, *ctx.saved_tensors), None), setup_context=setup)
    return lambda *args: whole(*args)[0]


WAYS: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "F.layer_norm": lambda: lambda x, weight, bias, eps: F.layer_norm(x, SHAPE[-1:], weight, bias, eps),
    "autograd.Function": lambda: Direct.apply,
    "define/impl": defined,
    "custom_op": custom,
    "mmfast.ops.layer_norm": lambda: ops.layer_norm,
}


def calls(mode: str, names: list[str] | None = None) -> dict[str, Callable[[], Any]]:
    """The ways as calls on a tiny CPU tensor with gradient: its forward, or forward and backward."""
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in (SHAPE, SHAPE[-1:], SHAPE[-1:]))
    kind = "host" if mode == "forward" else mode
    return {name: _harness.call_of(kind, WAYS[name](), (x, weight, bias, EPS)) for name in names or WAYS}


def measurements(options: Options) -> Iterator[tuple[Spec, int]]:
    for mode in ("host", "host forward+backward"):
        for number in range(options.passes):
            for name in WAYS:
                yield Spec("registration", name, mode, SHAPE, "fp32"), number


def test_registration(spec: Spec, pass_number: int, measure: Callable[..., None]) -> None:
    mode = "forward" if spec.mode == "host" else "forward+backward"
    found = calls(mode, ["F.layer_norm", spec.provider])
    _harness.check_same(found[spec.provider](), found["F.layer_norm"](), torch.float32, spec.provider)
    measure(found[spec.provider])


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
def test_layer_norm_adds_at_most_10_us(mode: str) -> None:
    """Host time with gradient above `F.layer_norm`'s: the least of interleaved repeats, three attempts."""
    added = float("inf")
    for _ in range(3):
        least = _harness.smallest_times(calls(mode, ["F.layer_norm", "mmfast.ops.layer_norm"]))
        added = min(added, least["mmfast.ops.layer_norm"] - least["F.layer_norm"])
        if added <= BOUND:
            break
    assert added <= BOUND, f"mmfast.ops.layer_norm adds {1e6 * added:.1f} us to F.layer_norm"
