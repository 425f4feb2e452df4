"""`add_layer_norm` beside the steps it replaces: LayerScale, residual add and LayerNorm, each an op of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch.nn.functional as F
from torch import Tensor

from mmfast import ops
from mmfast.benchmarks import _harness, _kernels
from mmfast.benchmarks._harness import DTYPES, MODES, Options, Shapes, Spec
from mmfast.ops.add_layer_norm import cost

EPS = 1e-5

GPU_SHAPES: Shapes = (
    ((256, 197, 768), "bf16"),
    ((256, 257, 1024), "bf16"),
    ((8, 197, 768), "bf16"),
    ((1, 197, 768), "bf16"),
    ((256, 197, 768), "fp32"),
)
CPU_SHAPES: Shapes = (((8, 197, 192), "fp32"),)

Result = tuple[Tensor, Tensor]


def eager(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor | None) -> Result:
    s = residual + (x if gamma is None else x * gamma)
    return F.layer_norm(s, s.shape[-1:], weight, bias, EPS), s


def mmfast(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor | None) -> Result:
    return ops.add_layer_norm(x, residual, weight, bias, EPS, scale=gamma)


PROVIDERS: dict[str, Callable[[], Callable[..., Result]]] = {
    "eager": lambda: eager,
    "compile": lambda: _harness.compiled(eager),
    "mmfast": lambda: mmfast,
    **_kernels.rows(mmfast),
    "mmfast+compile": lambda: _harness.compiled(mmfast),
}


def measurements(options: Options) -> Iterator[tuple[Spec, int]]:
    providers = _kernels.names(PROVIDERS, options)
    shapes = GPU_SHAPES if options.device == "cuda" else CPU_SHAPES
    for op in ("add_layer_norm", "add_layer_norm+gamma"):
        chosen = shapes[:1] if options.quick or "gamma" in op else shapes
        yield from _harness.specs(op, options, chosen, MODES, providers)
    yield from _harness.specs("add_layer_norm", options, (((2, 4, 64), "fp32"),), ("host",), providers)


@_kernels.forced
def test_add_layer_norm(spec: Spec, pass_number: int, options: Options, measure: Callable[..., None]) -> None:
    fn = PROVIDERS[spec.provider]()
    x, residual = (_harness.randn(spec.shape, spec, options.device) for _ in range(2))
    weight, bias, gamma = (_harness.randn(spec.shape[-1:], spec, options.device) for _ in range(3))
    scaled = "gamma" in spec.op
    args = (x, residual, weight, bias, gamma if scaled else None)
    call = _harness.call_of(spec.mode, fn, args)
    if pass_number == 0:
        truth = _harness.call_of(spec.mode, eager, args)()
        _harness.check_same(call(), truth, DTYPES[spec.dtype], spec.provider)
    moved = {"forward": (False,), "backward": (True,), "forward+backward": (False, True)}.get(spec.mode, ())
    measure(call, moved=sum(cost(x, scaled=scaled, backward=backward)["bytes"] for backward in moved))
