"""`ddim_step` with guidance beside diffusers' scheduler; and its cost on a CPU.

One step of a guided sampler: from the model's output for both halves of the batch to the next input of the model.
"""

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
from mmfast.ops.ddim_step import cost

GUIDANCE, T, T_PREV = 7.5, 501, 481
BETAS: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
}

# Latents of Stable Diffusion and SDXL, and pixels.
GPU_SHAPES: Shapes = tuple(
    (shape, dtype) for dtype in ("bf16", "fp32") for shape in ((64, 4, 64, 64), (16, 4, 128, 128), (64, 3, 256, 256))
)
CPU_SHAPES: Shapes = (((8, 4, 64, 64), "fp32"), ((2, 4, 64, 64), "fp32"))


@cache
def scheduler() -> Any:
    try:
        from diffusers import DDIMScheduler
    except ImportError as missing:
        raise Unavailable(f"diffusers: {missing}") from missing
    found = DDIMScheduler(**BETAS)
    found.set_timesteps(50)
    return found


@cache
def schedule(device: str) -> NoiseSchedule:
    return NoiseSchedule(**BETAS).to(device)


def diffusers(model_output: Tensor, x: Tensor) -> Tensor:
    """What a pipeline does."""
    unconditional, conditional = model_output.chunk(2)
    guided = unconditional + GUIDANCE * (conditional - unconditional)
    (x_prev, _) = scheduler().step(guided, T, x, return_dict=False)
    return torch.cat((x_prev, x_prev))


@cache
def formula() -> Callable[..., Tensor]:
    """The same written out, as torch.compile likes it best: coefficients are constants."""
    now, before = (float(schedule("cpu").alphas_cumprod_double[1 + t]) for t in (T, T_PREV))

    def step(model_output: Tensor, x: Tensor) -> Tensor:
        unconditional, conditional = model_output.chunk(2)
        m = unconditional + GUIDANCE * (conditional - unconditional)
        x0 = (x - (1 - now) ** 0.5 * m) / now**0.5
        x_prev = before**0.5 * x0 + (1 - before) ** 0.5 * m
        return torch.cat((x_prev, x_prev))

    return step


def mmfast(model_output: Tensor, x: Tensor) -> Tensor:
    where = schedule(x.device.type)
    return ops.ddim_step(model_output, T, T_PREV, x, where, guidance=GUIDANCE, duplicate=True)


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
    yield from _harness.specs("ddim_step", options, shapes, ("forward",), providers)
    yield from _harness.specs("ddim_step", options, (((1, 4, 8, 8), "fp32"),), ("host",), providers)


@_kernels.forced
def test_ddim_step(spec: Spec, pass_number: int, options: Options, measure: Callable[..., None]) -> None:
    fn = PROVIDERS[spec.provider]()
    if spec.provider == "eager":
        scheduler()
    x = _harness.randn(spec.shape, spec, options.device, gradient=False)
    model_output = torch.cat([_harness.randn(spec.shape, spec, options.device, gradient=False) for _ in range(2)])
    call = _harness.call_of("forward", fn, (model_output, x))
    if pass_number == 0:
        truth = formula()(model_output.float(), x.float()).to(x.dtype)
        _harness.check_same(call(), truth, DTYPES[spec.dtype], spec.provider)
    measure(call, moved=cost(x, model_output, duplicate=True)["bytes"] if spec.mode == "forward" else 0)


CPU_CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"clip_sample": True},
    "x0": {"return_x0": True},
    "eta": {"eta": 1.0},
    "guided": {"guidance": GUIDANCE, "duplicate": True},
}


@pytest.mark.parametrize(("what", "batch"), [*((what, 8) for what in CPU_CALLS), ("plain", 2), ("guided", 2)])
def test_never_slower_than_diffusers_on_a_cpu(what: str, batch: int) -> None:
    """The torch backend in one interleaved benchmark with the step it replaces: a ratio of at least 0.97."""
    options = dict(CPU_CALLS[what])
    diffusers_options = {key: options[key] for key in ("eta",) if key in options}
    try:
        from diffusers import DDIMScheduler
    except ImportError:
        pytest.skip("diffusers is not installed")
    peer = DDIMScheduler(**{**BETAS, "clip_sample": what == "clipped"})
    peer.set_timesteps(50)
    mine = schedule("cpu")
    x, m = torch.randn(2, batch, 4, 64, 64)
    both = torch.cat((x, m))

    def theirs() -> Any:
        if what != "guided":
            return peer.step(m, T, x, **diffusers_options)
        unconditional, conditional = both.chunk(2)
        x_prev = peer.step(unconditional + GUIDANCE * (conditional - unconditional), T, x).prev_sample
        return torch.cat((x_prev, x_prev))

    def ours() -> Any:
        return ops.ddim_step(both if what == "guided" else m, T, T_PREV, x, mine, **options)

    with _harness.one_thread(), torch.no_grad():
        ratio = _harness.interleaved_ratio(theirs, ours)
    assert ratio >= 0.97, f"diffusers takes {ratio:.3f} of the time of mmfast.ops.ddim_step"
