"""`layer_norm` beside PyTorch's own, torch.compile's and other libraries'; and its cost on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast import ops
from mmfast.benchmarks import _harness, _kernels
from mmfast.benchmarks._harness import DTYPES, MODES, Options, Shapes, Spec, Unavailable
from mmfast.nn import LayerNorm
from mmfast.ops.layer_norm import cost

EPS = 1e-5

# ViT-B/16 and L/14 at batch 256, L/14 at 8 and B/16 at 1 and 8; one narrow and one wide row; fp32 as without autocast.
GPU_SHAPES: Shapes = (
    ((50432, 768), "bf16"),
    ((65792, 1024), "bf16"),
    ((32896, 1408), "bf16"),
    ((2056, 1024), "bf16"),
    ((1576, 768), "bf16"),
    ((197, 768), "bf16"),
    ((131072, 192), "bf16"),
    ((8192, 8192), "bf16"),
    ((50432, 768), "fp32"),
)
CPU_SHAPES: Shapes = (((1576, 192), "fp32"), ((394, 768), "fp32"))


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def mmfast(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ops.layer_norm(x, weight, bias, EPS)


def liger() -> Callable[..., Tensor]:
    try:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction  # type: ignore[import-not-found]
    except ImportError as missing:
        raise Unavailable(f"liger: {missing}") from missing
    return lambda x, weight, bias: LigerLayerNormFunction.apply(x, weight, bias, EPS)


def quack(spec: Spec) -> Callable[..., Tensor]:
    if spec.mode != "forward":
        raise Unavailable("quack: its LayerNorm has no backward")
    try:
        from quack.rmsnorm import layernorm_fwd  # type: ignore[import-not-found]
    except ImportError as missing:
        raise Unavailable(f"quack: {missing}") from missing
    return lambda x, weight, bias: layernorm_fwd(x, weight.float(), bias.float(), EPS)


PROVIDERS: dict[str, Callable[[Spec], Callable[..., Tensor]]] = {
    "eager": lambda spec: eager,
    "compile": lambda spec: _harness.compiled(eager),
    "mmfast": lambda spec: mmfast,
    **{name: lambda spec: mmfast for name in _kernels.rows(mmfast)},
    "mmfast+compile": lambda spec: _harness.compiled(mmfast),
    "liger": lambda spec: liger(),
    "quack": quack,
}


def measurements(options: Options) -> Iterator[tuple[Spec, int]]:
    on_gpu = options.device == "cuda"
    shapes = GPU_SHAPES if on_gpu else CPU_SHAPES
    if options.quick:
        shapes = shapes[:1]
    # The GPU-only peers have nothing to say on a CPU.
    names = [name for name in _kernels.names(PROVIDERS, options) if on_gpu or name not in ("liger", "quack")]
    yield from _harness.specs("layer_norm", options, shapes, MODES, names)
    yield from _harness.specs("layer_norm", options, (((8, 64), "fp32"),), ("host",), names)


@_kernels.forced
def test_layer_norm(spec: Spec, pass_number: int, options: Options, measure: Callable[..., None]) -> None:
    fn = PROVIDERS[spec.provider](spec)
    x = _harness.randn(spec.shape, spec, options.device)
    weight, bias = (_harness.randn(spec.shape[-1:], spec, options.device) for _ in range(2))
    args = (x, weight, bias)
    call: Callable[[], Any] = _served(spec, lambda: _harness.call_of(spec.mode, fn, args))
    if pass_number == 0:
        truth = _harness.call_of(spec.mode, eager, args)()
        _harness.check_same(_served(spec, call), truth, DTYPES[spec.dtype], spec.provider)
    moved = {"forward": (False,), "backward": (True,), "forward+backward": (False, True)}.get(spec.mode, ())
    measure(call, moved=sum(cost(x, backward=backward)["bytes"] for backward in moved))


def _served(spec: Spec, run: Callable[[], Any]) -> Any:
    """What `run` returns; a peer's own failure leaves the others' rows."""
    try:
        return run()
    except Exception as failed:
        if spec.provider in ("liger", "quack"):
            raise Unavailable(f"{spec.provider}: {type(failed).__name__}: {str(failed)[:120]}") from failed
        raise


@pytest.mark.parametrize("mode", ["forward", "training"])
def test_module_is_never_slower_than_torch_on_a_cpu(mode: str) -> None:
    """The torch backend in one interleaved benchmark with the module it replaces: a ratio of at least 0.97."""
    theirs, ours = torch.nn.LayerNorm(768), LayerNorm(768)
    # One set of parameters: where in memory they lie is worth up to 5 % on a CPU.
    ours.weight, ours.bias = theirs.weight, theirs.bias
    x = torch.randn(8, 197, 768, requires_grad=True)  # ViT-B/16 at batch 8
    grad = torch.randn_like(x)

    def run(module: torch.nn.Module) -> None:
        y = module(x)
        if mode == "training":
            y.backward(grad)

    with _harness.one_thread():
        ratio = _harness.interleaved_ratio(lambda: run(theirs), lambda: run(ours))
    assert ratio >= 0.97, f"torch.nn.LayerNorm takes {ratio:.3f} of the time of mmfast.nn.LayerNorm"
