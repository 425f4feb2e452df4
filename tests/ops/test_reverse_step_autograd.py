"""Gradients, torch.compile, opcheck, torch.func and autocast of `ddpm_step` and `ddim_step`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import mmfast
from mmfast import reference
from mmfast.noise_schedule import NoiseSchedule
from tests.grading import ALL_BACKENDS, BACKENDS, outputs_and_gradients
from tests.ops.test_reverse_step import NOISY, OPS, call, draw


@pytest.fixture
def schedule(device: torch.device) -> NoiseSchedule:
    return NoiseSchedule(clip_sample=False).to(device)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("clip", [False, True], ids=["linear", "clipped"])
@pytest.mark.parametrize("op", OPS)
def test_gradients_of_what_requires_them(op: str, clip: bool, backend: str, device: torch.device) -> None:
    """Each input alone, of each output alone; and without a clip the graph holds no sample."""
    schedule = NoiseSchedule().to(device)
    t = torch.tensor([800, 30], device=device)
    for wanted in range(3):
        for index in range(2):
            results = []
            for name in (backend, None):
                torch.manual_seed(1)
                values = [*draw((4, 6), 1, device), *draw((2, 6), 2, device)]
                values[wanted].requires_grad_()
                m, x, noise = values
                options = {"guidance": 1.5, "noise": noise, "clip_sample": clip, "return_x0": True, **NOISY[op]}
                if name is None:
                    x_prev = getattr(reference, op)(m, t, t - 20, x, schedule, **options)[index]
                else:
                    with mmfast.backend(name):
                        x_prev = call(op)(m, t, t - 20, x, schedule, **options)[index]
                    if backend != "torch" and not clip and x_prev.requires_grad:
                        saved = [s for s in x_prev.grad_fn.saved_tensors if s is not None]
                        assert all(s.shape in ((2,), schedule.alpha_table.shape) for s in saved)
                if wanted == 2 and index == 1:
                    continue  # x_0 does not depend on the noise
                results.append(torch.autograd.grad(x_prev.square().sum(), values[wanted])[0])
            if results:
                torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_differentiable_twice(op: str, backend: str, device: torch.device) -> None:
    schedule = NoiseSchedule(clip_sample_range=0.9).to(device)
    inputs = [value.requires_grad_() for value in [*draw((4, 3), 1, device), *draw((2, 3), 2, device)]]
    t = torch.tensor([800, 30], device=device)

    def penalty(fn: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        m, x, noise = inputs
        y = fn(m, t, t - 20, x, schedule, guidance=2.0, noise=noise, **NOISY[op])
        grads = torch.autograd.grad(y.sin().sum(), inputs, create_graph=True)
        return torch.autograd.grad(torch.stack([g.square().sum() for g in grads]).sum(), inputs)

    with mmfast.backend(backend):
        found = penalty(call(op))
    for got, want in zip(found, penalty(getattr(reference, op)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("op", OPS)
def test_formulas_in_float64(op: str, prediction: str) -> None:
    schedule = NoiseSchedule(prediction_type=prediction, clip_sample_range=0.7)
    m, x, noise = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (4, 2, 2))
    t = torch.tensor([700, 30])
    extra = ("fixed_large",) if op == "ddpm_step" else (0.5, False)
    for clip in (0.0, 0.7):

        def public(m: Tensor, x: Tensor, noise: Tensor, clip: float = clip) -> Any:
            options = {"guidance": 1.5, "noise": noise, "clip_sample": clip or False, "return_x0": True}
            return call(op)(m, t, t - 20, x, schedule, duplicate=True, **options, **NOISY[op])

        def registered(m: Tensor, x: Tensor, noise: Tensor, clip: float = clip) -> Any:
            rest = (noise, None, 0, prediction, 1.5, clip, True, True, True)
            return getattr(torch.ops.mmfast, op)(m, t, t - 20, x, schedule.alpha_table, *rest, *extra)

        for fn in (public, registered):
            assert torch.autograd.gradcheck(fn, (m, x, noise))
        assert torch.autograd.gradgradcheck(registered, (m, x, noise))


def op_arguments(op: str, index: int, device: torch.device) -> tuple[Any, ...]:
    x, m, noise = (value.requires_grad_() for value in draw((2, 4, 2, 2), 3, device))
    t, table = torch.tensor([9, 500], device=device), NoiseSchedule().to(device).alpha_table
    seeds = torch.tensor([1, 2], device=device)
    extra = ("fixed_small",) if op == "ddpm_step" else (0.5, False)
    last = x.detach().contiguous(memory_format=torch.channels_last)
    both = torch.cat((m, x)).detach().requires_grad_()
    return (
        (m, t, t - 1, x, table, noise, None, 0, "epsilon", None, 0.0, True, True, False, *extra),
        (both, t, t - 1, last, table, None, seeds, 0, "v_prediction", 2.0, 1.0, True, False, True, *extra),
        (m.detach(), t, t - 1, x.detach(), table, None, None, 7, "sample", None, 1.0, True, True, False, *extra),
    )[index]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "index"), [("ddpm_step", 0), ("ddpm_step", 1), ("ddim_step", 1), ("ddim_step", 2)])
def test_opcheck(op: str, index: int, backend: str, device: torch.device) -> None:
    args = op_arguments(op, index, device)
    op += "_forward" if index == 2 else ""  # without gradients both are the same
    with mmfast.backend(backend):
        opcheck(getattr(torch.ops.mmfast, op).default, args)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("op", "backend"),
    [
        ("ddim_step", "torch"),
        pytest.param("ddim_step", "triton", marks=pytest.mark.triton),
        pytest.param("ddim_step", "cuda", marks=(pytest.mark.cuda, pytest.mark.slow)),
        pytest.param("ddpm_step", "torch", marks=pytest.mark.slow),
        pytest.param("ddpm_step", "triton", marks=(pytest.mark.triton, pytest.mark.slow)),
    ],
)
def test_compiled_equals_eager(
    op: str, compiler: str, backend: str, device: torch.device, schedule: NoiseSchedule
) -> None:
    """Full graph, forward and backward; another batch size, or t as an int instead of a tensor."""

    def fn(m: Tensor, x: Tensor, t: Any, t_prev: Any, noise: Tensor | None = None, seed: Tensor | None = None) -> Any:
        options = {"guidance": 3.0, "duplicate": True, "return_x0": True, "clip_sample": 0.5, **NOISY[op]}
        return call(op)(m * 2, t, t_prev, x, schedule, noise=noise, seed=seed, **options)

    compiled = torch.compile(fn, fullgraph=True, backend=compiler, dynamic=True)
    with mmfast.backend(backend):
        for batch, number in ((2, None), (3, None) if op == "ddim_step" else (2, 500)):
            t: Any = torch.randint(20, 1000, (batch,), device=device) if number is None else number
            (m,), (x, given) = draw((2 * batch, 3, 4), 1, device), draw((batch, 3, 4), 2, device)
            # To trace PyTorch's own Philox takes long, and is no matter of these ops.
            noise = {"noise": given} if backend == "torch" else {"seed": torch.arange(batch, device=device)}
            args = (m, x, t, t - 20)
            eager = outputs_and_gradients(fn, args, noise)
            for got, want in zip(outputs_and_gradients(compiled, args, noise), eager, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", OPS)
def test_torch_func_transforms_take_pytorchs_ops(op: str, device: torch.device, schedule: NoiseSchedule) -> None:
    """vmap over the model's output alone, gradients, and forward mode."""
    x, m, noise, tangent = draw((2, 3), 4, device)

    def step(m: Tensor) -> Tensor:
        return call(op)(m, 500, 480, x, schedule, noise=noise, clip_sample=1.0, **NOISY[op])

    stacked = torch.stack((m, 2 * m))
    torch.testing.assert_close(torch.func.vmap(step)(stacked), torch.stack((step(m), step(2 * m))))
    grad = torch.func.grad(lambda m: step(m).square().sum())(m)
    leaf = m.clone().requires_grad_()
    torch.testing.assert_close(grad, torch.autograd.grad(step(leaf).square().sum(), leaf)[0])
    found = torch.func.jvp(step, (m,), (tangent,))[1]
    close = (step(m.double() + 1e-4 * tangent) - step(m.double() - 1e-4 * tangent)) / 2e-4
    torch.testing.assert_close(found, close.float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_autocast_changes_nothing(op: str, backend: str, device: torch.device, schedule: NoiseSchedule) -> None:
    x, u, c = draw((2, 3, 4, 4), 3, device)
    args, options = (torch.cat((u, c)), 900, 880, x, schedule), {"guidance": 3.0, "seed": 4, **NOISY[op]}
    with mmfast.backend(backend):
        wanted = call(op)(*args, **options)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            assert torch.equal(call(op)(*args, **options), wanted)
