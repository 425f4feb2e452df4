"""`q_sample` beside `torch.randn_like` with diffusers' `add_noise` and `get_velocity`, and torch.compile of these.

The mode says what is returned: "forward" x_t alone, "forward epsilon" and "forward v_prediction" the target too, and
"forward given" x_t of noise that exists. mmfast is given per-sample seeds, its peers draw from PyTorch's generator.
The share of the limit is of what takes longer: the bytes at the speed of a copy, or the noise at that of the generator
alone, both measured in the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mmfast import NoiseSchedule, ops
from mmfast.benchmarks import _harness, _kernels
from mmfast.benchmarks._harness import DTYPES, Options, Shapes, Spec
from mmfast.ops.q_sample import cost

SIZES = ((256, 3, 64, 64), (64, 3, 256, 256), (64, 4, 64, 64), (512, 3, 32, 32))
GPU_SHAPES: Shapes = tuple((size, dtype) for dtype in ("bf16", "fp32") for size in SIZES)
CPU_SHAPES: Shapes = (((16, 4, 32, 32), "fp32"), ((8, 3, 64, 64), "fp32"))
MODES = ("forward", "forward v_prediction", "forward epsilon", "forward given", "backward")

SCHEDULE = NoiseSchedule()


def eager(x0: Tensor, t: Tensor, alphas: Tensor, seeds: Tensor, noise: Tensor | None, target: str | None) -> Any:
    """As a training script: noise, `add_noise`, `get_velocity`, whose coefficients are cast to x0's dtype first."""
    noise = torch.randn_like(x0) if noise is None else noise
    alphas = alphas.to(x0.dtype)
    shape = (-1, *(1,) * (x0.dim() - 1))
    signal, sigma = (alphas[t] ** 0.5).view(shape), ((1 - alphas[t]) ** 0.5).view(shape)
    noised = signal * x0 + sigma * noise
    if target == "v_prediction":
        return noised, signal * noise - sigma * x0
    return (noised, noise) if target else noised


def mmfast(x0: Tensor, t: Tensor, alphas: Tensor, seeds: Tensor, noise: Tensor | None, target: str | None) -> Any:
    return ops.q_sample(x0, t, SCHEDULE, noise=noise, seed=seeds if noise is None else None, target=target)


PROVIDERS: dict[str, Callable[[], Callable[..., Any]]] = {
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
    yield from _harness.specs("q_sample", options, shapes, MODES, providers)
    yield from _harness.specs("q_sample", options, (((2, 4, 8, 8), "fp32"),), ("host",), providers)


@_kernels.forced
def test_q_sample(spec: Spec, pass_number: int, options: Options, measure: Callable[..., None]) -> None:
    SCHEDULE.to(options.device)
    fn = PROVIDERS[spec.provider]()
    mode, _, kind = spec.mode.partition(" ")
    x0 = _harness.randn(spec.shape, spec, options.device, gradient=mode == "backward")
    t = torch.randint(1000, spec.shape[:1], device=options.device)
    seeds = torch.arange(len(x0), device=options.device)
    target = kind if kind in ("epsilon", "v_prediction") else None
    noise, alphas = ops.noise_like(x0, seeds), SCHEDULE.alphas_cumprod
    if pass_number == 0:
        # With the noise given, where providers agree; and mmfast with seeds, which make this noise.
        truth = eager(x0.detach().float(), t, alphas, seeds, noise.float(), target)
        ours = "mmfast" in spec.provider
        for given in (noise, None) if ours else (noise,):
            found = _harness.call_of("host", fn, (x0, t, alphas, seeds, given, target))()
            _harness.check_same(found, truth, x0.dtype, spec.provider)
    call = _harness.call_of(mode, fn, (x0, t, alphas, seeds, noise if kind == "given" else None, target))
    drawn = mode == "forward" and kind != "given"
    moved = cost(x0, target=target is not None, noise=kind == "given", backward=mode == "backward")["bytes"]
    measure(call, moved=0 if mode == "host" else moved, normals=drawn * x0.numel())


@pytest.mark.parametrize("given", [False, True], ids=["drawn", "given"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_is_never_slower_than_add_noise_on_a_cpu(dtype: str, given: bool) -> None:
    """Beside `torch.randn_like` and diffusers' formula in x0's dtype: a ratio of at least 0.97."""
    SCHEDULE.to("cpu")
    x0 = torch.randn(16, 3, 64, 64).to(DTYPES[dtype])
    t, noise = torch.randint(1000, (16,)), torch.randn_like(x0) if given else None
    alphas = SCHEDULE.alphas_cumprod
    with _harness.one_thread():
        ratio = _harness.interleaved_ratio(
            lambda: eager(x0, t, alphas, t, noise, None), lambda: ops.q_sample(x0, t, SCHEDULE, noise=noise)
        )
    assert ratio >= 0.97, f"add_noise takes {ratio:.3f} of the time of q_sample"
