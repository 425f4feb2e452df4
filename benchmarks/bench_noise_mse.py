"""`noise_mse` beside PyTorch's loss of noise that was kept, its torch.compile; and its cost on a CPU.

"eager" and "compile" are given the noise: making and storing it is not in their time, but reading it is. mmfast makes
it anew in either pass (on a CPU once), as "steps", `noise_like` and then PyTorch's loss, does once. On a CPU, where
the noise costs more than the rest, who has kept it should use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast import ops
from mmfast.benchmarks import _harness, _kernels
from mmfast.benchmarks._harness import DTYPES, MODES, Options, Shapes, Spec
from mmfast.ops.noise_mse import cost

SEED = 1

# Latents of 512 and 1024 pixel images, and the images of a pixel-space model: the last is bound by memory.
GPU_SHAPES: Shapes = (
    ((64, 4, 64, 64), "bf16"),
    ((64, 3, 256, 256), "bf16"),
    ((16, 4, 128, 128), "bf16"),
    ((64, 4, 64, 64), "fp32"),
    ((64, 3, 256, 256), "fp32"),
    ((16, 4, 128, 128), "fp32"),
)
CPU_SHAPES: Shapes = (((16, 4, 32, 32), "fp32"), ((8, 3, 64, 64), "fp32"))


def eager(prediction: Tensor, noise: Tensor) -> Tensor:
    """As training scripts write it."""
    return F.mse_loss(prediction.float(), noise.float())


def steps(prediction: Tensor, noise: Tensor) -> Tensor:
    return eager(prediction, ops.noise_like(prediction, SEED))


def mmfast(prediction: Tensor, noise: Tensor) -> Tensor:
    return ops.noise_mse(prediction, SEED)


PROVIDERS: dict[str, Callable[[], Callable[[Tensor, Tensor], Tensor]]] = {
    "eager": lambda: eager,
    "compile": lambda: _harness.compiled(eager),
    "steps": lambda: steps,
    "mmfast": lambda: mmfast,
    **_kernels.rows(mmfast),
    "mmfast+compile": lambda: _harness.compiled(mmfast),
}


def measurements(options: Options) -> Iterator[tuple[Spec, int]]:
    providers = _kernels.names(PROVIDERS, options)
    shapes = GPU_SHAPES if options.device == "cuda" else CPU_SHAPES
    if options.quick:
        shapes = shapes[:1]
    # Both passes together first: it is what a training step runs, and their sum is where nothing is stored.
    yield from _harness.specs("noise_mse", options, shapes, MODES[::-1], providers)
    yield from _harness.specs("noise_mse", options, (((2, 4, 8, 8), "fp32"),), ("host",), providers)


@_kernels.forced
def test_noise_mse(spec: Spec, pass_number: int, options: Options, measure: Callable[..., None]) -> None:
    fn = PROVIDERS[spec.provider]()
    prediction = _harness.randn(spec.shape, spec, options.device)
    noise = ops.noise_like(prediction.detach(), SEED)
    call = _harness.call_of(spec.mode, fn, (prediction, noise))
    if pass_number == 0:
        truth = _harness.call_of(spec.mode, eager, (prediction, noise))()
        _harness.check_same(call(), truth, DTYPES[spec.dtype], spec.provider)
    passes = {"forward": (False,), "backward": (True,), "forward+backward": (False, True)}.get(spec.mode, ())
    measure(call, moved=sum(cost(prediction, backward=backward)["bytes"] for backward in passes))


@pytest.mark.parametrize("mode", ["forward", "training"])
def test_is_never_slower_than_its_steps_on_a_cpu(mode: str) -> None:
    """Beside the same noise made by `noise_like` and given to `F.mse_loss`: a ratio of at least 0.97."""
    prediction = torch.randn(16, 4, 32, 32, requires_grad=True)

    def run(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        found = loss(prediction, prediction)
        if mode == "training":
            torch.autograd.grad(found, prediction)

    with _harness.one_thread():
        ratio = _harness.interleaved_ratio(lambda: run(steps), lambda: run(mmfast))
    assert ratio >= 0.97, f"noise_like and F.mse_loss take {ratio:.3f} of the time of noise_mse"
