"""`noise_like` beside `torch.randn_like` and what torch.compile makes of that.

The peers' noise comes from PyTorch's generator, whose state moves on; mmfast's is a function of per-sample seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from mmfast import ops
from mmfast.benchmarks import _harness, _kernels
from mmfast.benchmarks._harness import DTYPES, Options, Shapes, Spec
from mmfast.ops.noise_like import cost

# Images of a pixel-space model, of a large one, latents of 512 pixel images, and CIFAR-10.
SIZES = ((256, 3, 64, 64), (64, 3, 256, 256), (64, 4, 64, 64), (512, 3, 32, 32))
GPU_SHAPES: Shapes = tuple((size, dtype) for dtype in ("bf16", "fp32") for size in SIZES)
CPU_SHAPES: Shapes = (((16, 4, 32, 32), "fp32"), ((8, 3, 64, 64), "fp32"))


def eager(x: Tensor, seeds: Tensor) -> Tensor:
    return torch.randn_like(x)


def mmfast(x: Tensor, seeds: Tensor) -> Tensor:
    return ops.noise_like(x, seeds)


PROVIDERS: dict[str, Callable[[], Callable[[Tensor, Tensor], Tensor]]] = {
    "eager": lambda: eager,
    "compile": lambda: _harness.compiled(eager),
    "mmfast": lambda: mmfast,
    **_kernels.rows(mmfast),
    "mmfast+compile": lambda: _harness.compiled(mmfast),
}


def measurements(options: Options) -> Iterator[tuple[Spec, int]]:
    providers = _kernels.names(PROVIDERS, options)
    shapes = GPU_SHAPES if options.device == "cuda" else CPU_SHAPES
    if options.quick:
        shapes = shapes[:1]
    yield from _harness.specs("noise_like", options, shapes, ("forward",), providers)
    yield from _harness.specs("noise_like", options, (((2, 4, 8, 8), "fp32"),), ("host",), providers)


@_kernels.forced
def test_noise_like(spec: Spec, pass_number: int, options: Options, measure: Callable[..., None]) -> None:
    x = torch.empty(spec.shape, dtype=DTYPES[spec.dtype], device=options.device)
    seeds = torch.arange(len(x), device=options.device)
    call = _harness.call_of(spec.mode, PROVIDERS[spec.provider](), (x, seeds))
    found = call()
    if pass_number == 0 and "mmfast" in spec.provider:
        _harness.check_same(found, ops.noise_like(x.cpu(), seeds.cpu()).to(x.device), x.dtype, spec.provider)
    on_device = spec.mode == "forward"
    measure(call, moved=on_device * cost(x)["bytes"], normals=on_device * x.numel())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_is_never_slower_than_randn_on_a_cpu(dtype: str) -> None:
    """Without a seed, as by default: a ratio of at least 0.97."""
    x = torch.empty(16, 3, 64, 64, dtype=DTYPES[dtype])
    with _harness.one_thread():
        ratio = _harness.interleaved_ratio(lambda: torch.randn_like(x), lambda: ops.noise_like(x))
    assert ratio >= 0.97, f"torch.randn_like takes {ratio:.3f} of the time of noise_like"
