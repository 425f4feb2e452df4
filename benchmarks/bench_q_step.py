"""`q_step` beside the formula as it is written in PyTorch, its torch.compile; and its cost on a CPU.

Noise is new in every call of every provider.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from mmfast import NoiseSchedule, ops
from mmfast.benchmarks import _harness, _kernels
from mmfast.benchmarks._harness import DTYPES, Options, Shapes, Spec
from mmfast.ops.q_step import cost

GPU_SHAPES: Shapes = (
    ((64, 4, 64, 64), "bf16"),
    ((64, 3, 256, 256), "bf16"),
    ((16, 4, 128, 128), "bf16"),
    ((64, 4, 64, 64), "fp32"),
    ((64, 3, 256, 256), "fp32"),
    ((16, 4, 128, 128), "fp32"),
)
CPU_SHAPES: Shapes = (((16, 4, 32, 32), "fp32"), ((8, 3, 64, 64), "fp32"))

SCHEDULE = NoiseSchedule()


def eager(x: Tensor, t: Tensor, betas: Tensor, noise: Tensor | None = None) -> Tensor:
    """As a lecture's notebook writes it: coefficients gathered, cast to x's dtype."""
    beta = betas[t].view(-1, *(1,) * (x.dim() - 1))
    noise = torch.randn_like(x) if noise is None else noise
    return (1 - beta).sqrt().to(x.dtype) * x + beta.sqrt().to(x.dtype) * noise


def mmfast(x: Tensor, t: Tensor, betas: Tensor, noise: Tensor | None = None) -> Tensor:
    return ops.q_step(x, t, SCHEDULE, noise=noise)


PROVIDERS: dict[str, Callable[[], Callable[..., Tensor]]] = {
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
    yield from _harness.specs("q_step", options, shapes, ("forward", "backward"), providers)
    yield from _harness.specs("q_step", options, (((2, 4, 8, 8), "fp32"),), ("host",), providers)


@_kernels.forced
def test_q_step(spec: Spec, pass_number: int, options: Options, measure: Callable[..., None]) -> None:
    fn = PROVIDERS[spec.provider]()
    SCHEDULE.to(options.device)
    x = _harness.randn(spec.shape, spec, options.device)
    args = (x, torch.randint(1000, spec.shape[:1], device=options.device), SCHEDULE.betas)
    if pass_number == 0:  # with noise given, since it differs otherwise
        given = (*args, torch.randn_like(x, requires_grad=False))
        found, truth = (_harness.call_of(spec.mode, f, given)() for f in (fn, eager))
        _harness.check_same(found, truth, DTYPES[spec.dtype], spec.provider)
    call = _harness.call_of(spec.mode, fn, args)
    moved = {"forward": False, "backward": True}
    measure(call, moved=cost(x, backward=moved[spec.mode])["bytes"] if spec.mode in moved else 0)


@pytest.mark.parametrize("mode", ["forward", "training"])
def test_is_never_slower_than_the_formula_on_a_cpu(mode: str) -> None:
    """With new noise, as by default, beside the formula in PyTorch: a ratio of at least 0.97."""
    schedule = NoiseSchedule()
    x, t, betas = torch.randn(16, 3, 64, 64, requires_grad=True), torch.randint(1000, (16,)), schedule.betas
    grad = torch.randn(16, 3, 64, 64)

    def run(step: Callable[[], Tensor]) -> None:
        y = step()
        if mode == "training":
            torch.autograd.grad(y, x, grad)

    with _harness.one_thread():
        ratio = _harness.interleaved_ratio(
            lambda: run(lambda: eager(x, t, betas)), lambda: run(lambda: ops.q_step(x, t, schedule))
        )
    assert ratio >= 0.97, f"the formula takes {ratio:.3f} of the time of q_step"
