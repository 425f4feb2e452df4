"""`ddpm_step` with noise from a seed beside diffusers' scheduler; and its cost on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from mmfast import ops
from mmfast.benchmarks import _harness, _kernels
from mmfast.benchmarks._harness import DTYPES, Options, Shapes, Spec, Unavailable
from mmfast.noise_schedule import NoiseSchedule
from mmfast.ops.ddpm_step import cost

T = 500

# Latents of Stable Diffusion and SDXL, and pixels.
GPU_SHAPES: Shapes = tuple(
    (shape, dtype) for dtype in ("bf16", "fp32") for shape in ((64, 4, 64, 64), (16, 4, 128, 128), (64, 3, 256, 256))
)
CPU_SHAPES: Shapes = (((8, 4, 64, 64), "fp32"), ((2, 4, 64, 64), "fp32"))


@cache
def scheduler() -> Any:
    try:
        from diffusers import DDPMScheduler
    except ImportError as missing:
        raise Unavailable(f"diffusers: {missing}") from missing
    found = DDPMScheduler()  # every timestep, x_0 clipped
    found.set_timesteps(1000)
    return found


@cache
def schedule(device: str) -> NoiseSchedule:
    return NoiseSchedule().to(device)


def diffusers(model_output: Tensor, x: Tensor, t: int) -> Tensor:
    return scheduler().step(model_output, t, x, return_dict=False)[0]


@cache
def formula() -> Callable[..., Tensor]:
    """The step written out, as torch.compile likes it best: coefficients are constants."""
    table = [float(value) for value in schedule("cpu").alphas_cumprod_double]

    def step(model_output: Tensor, x: Tensor, t: int) -> Tensor:
        now, before = table[1 + t], table[t]
        beta = 1 - now / before
        x0 = ((x - (1 - now) ** 0.5 * model_output) / now**0.5).clamp(-1, 1)
        mean = before**0.5 * beta / (1 - now) * x0 + (now / before) ** 0.5 * (1 - before) / (1 - now) * x
        return mean + ((1 - before) / (1 - now) * beta) ** 0.5 * torch.randn_like(x) if t > 0 else mean

    return step


def mmfast(model_output: Tensor, x: Tensor, t: int) -> Tensor:
    """With a seed on a GPU; on a CPU, where Philox costs more than PyTorch's generator, with the noise of the peers."""
    return ops.ddpm_step(model_output, t, t - 1, x, schedule(x.device.type), seed=None if x.is_cpu else 7)


PROVIDERS: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "eager": lambda: diffusers,
    "compile": lambda: _harness.compiled(formula()),
    "mmfast": lambda: mmfast,
    **_kernels.rows(mmfast),
    "mmfast+compile": lambda: _harness.compiled(mmfast),
}


def measurements(options: Options) -> Iterator[tuple[Spec, int]]:
    providers = _kernels.names(PROVIDERS, options)
    shapes = GPU_SHAPES if options.device == "cuda" else CPU_SHAPES
    if options.quick:
        shapes = shapes[:1]
    yield from _harness.specs("ddpm_step", options, shapes, ("forward",), providers)


@_kernels.forced
def test_ddpm_step(spec: Spec, pass_number: int, options: Options, measure: Callable[..., None]) -> None:
    fn = PROVIDERS[spec.provider]()
    if spec.provider == "eager":
        scheduler()
    x, model_output = (_harness.randn(spec.shape, spec, options.device, gradient=False) for _ in range(2))
    if pass_number == 0:  # at timestep 0 there is no noise, which is each provider's own
        truth = formula()(model_output.float(), x.float(), 0).to(x.dtype)
        _harness.check_same(fn(model_output, x, 0), truth, DTYPES[spec.dtype], spec.provider)
    call = _harness.call_of("forward", fn, (model_output, x, T))
    measure(call, moved=cost(x, model_output)["bytes"], normals=x.numel())


CPU_CALLS: dict[str, dict[str, Any]] = {"clipped": {}, "plain": {"clip_sample": False}, "x0": {"return_x0": True}}


@pytest.mark.parametrize("batch", [2, 8])
@pytest.mark.parametrize("what", CPU_CALLS)
def test_never_slower_than_diffusers_on_a_cpu(what: str, batch: int) -> None:
    """The torch backend in one interleaved benchmark with the step it replaces: a ratio of at least 0.97."""
    try:
        from diffusers import DDPMScheduler
    except ImportError:
        pytest.skip("diffusers is not installed")
    peer = DDPMScheduler(clip_sample=what != "plain")
    x, m = torch.randn(2, batch, 4, 64, 64)
    mine = schedule("cpu")
    with _harness.one_thread(), torch.no_grad():
        ratio = _harness.interleaved_ratio(
            lambda: peer.step(m, T, x), lambda: ops.ddpm_step(m, T, T - 1, x, mine, **CPU_CALLS[what])
        )
    assert ratio >= 0.97, f"diffusers takes {ratio:.3f} of the time of mmfast.ops.ddpm_step"
