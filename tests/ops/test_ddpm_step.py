from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mmfast
from mmfast import ops, reference
from mmfast.noise_schedule import NoiseSchedule
from mmfast.ops.ddpm_step import coefficients as float64_factors
from mmfast.reference.ddpm_step import cases
from tests.grading import ALL_BACKENDS, CUDA, DTYPES, check_against_reference
from tests.ops.test_ddim_step import SCHEDULES, assert_close_in_relation, coefficients, timesteps

LABELS = [case.label for case in cases(torch.float32, torch.device("cpu"), large=False)]
GPU_LABELS = [case.label for case in cases(torch.float32, torch.device("meta"), large=True)][len(LABELS) :]


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("label", [*LABELS, *(pytest.param(x, marks=pytest.mark.gpu) for x in GPU_LABELS)])
@pytest.mark.usefixtures("poisoned")
def test_matches_the_reference(label: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    case = next(c for c in cases(dtype, device, large=label in GPU_LABELS) if c.label == label)
    check_against_reference(ops.ddpm_step, reference.ddpm_step, case.args, case.kwargs, backend, dtype)


VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("clip", [None, 0.6], ids=["no clip", "clip"])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.usefixtures("poisoned")
def test_every_option(prediction: str, variance: str, clip: float | None, backend: str, device: torch.device) -> None:
    """A timestep of 0 is among them, where a learned variance may be anything: nothing is added."""
    x, m, noise = torch.randn(3, 4, 2, 3, device=device)
    t = torch.tensor([2, 400, 990, 0], device=device)
    if variance.startswith("learned"):
        v = torch.rand_like(m)
        v[3] = 0.5 if variance == "learned_range" else -1.0
        m = torch.cat((m, v), 1)
    args = (m, t, (t - 2).clamp_min(-1), x, NoiseSchedule(prediction_type=prediction, clip_sample=False).to(device))
    kwargs = {"noise": noise, "variance_type": variance, "clip_sample": clip, "return_x0": True}
    check_against_reference(ops.ddpm_step, reference.ddpm_step, args, kwargs, backend, torch.float32)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("stride", [1, 20])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("backend", [None, CUDA])
def test_coefficients_at_every_timestep(
    backend: str | None, name: str, stride: int, prediction: str, variance: str, device: torch.device
) -> None:
    """As of `ddim_step`: the factors of x, of the model's output and of the noise at all 1000 timesteps."""
    schedule = NoiseSchedule(name, prediction_type=prediction, clip_sample=False, **SCHEDULES[name]).to(device)
    with mmfast.backend(backend or (None if device.type == "cuda" else "torch")):
        found, wanted = coefficients(ops.ddpm_step, reference.ddpm_step, schedule, stride, variance_type=variance)
    assert_close_in_relation(found, wanted, 1e-6)


@pytest.mark.triton
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("stride", [1, 20])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_kernels_coefficients_at_every_timestep(
    name: str, stride: int, variance: str, device: torch.device
) -> None:
    """The kernel's own float32 arithmetic against the same formulas in float64; at 0 the kernel adds no noise."""
    from tests.ops.step_factors import kernel_factors

    schedule = NoiseSchedule(name, **SCHEDULES[name]).to(device)
    t, t_prev = timesteps(stride, device)
    for prediction in ("epsilon", "sample", "v_prediction"):
        found = kernel_factors(schedule, t, t_prev, prediction, variance=variance)
        wanted = float64_factors(schedule.alpha_table, t, t_prev, prediction, variance, clipped=True)._asdict()
        for key in ("x0_x", "x0_m", "p_x0", "p_x", "std"):
            if wanted[key] is not None:
                assert_close_in_relation(found[key][1:], wanted[key][1:], 1e-6, key)
    if variance == "learned_range":  # a logarithm: what counts is what its rounding does to exp(spread)
        torch.testing.assert_close(found["spread"][1:].double(), wanted["spread"][1:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("variance", ["learned", "learned_range"])
@pytest.mark.usefixtures("poisoned")
def test_learned_variance_with_guidance(
    variance: str, memory: torch.memory_format, backend: str, device: torch.device
) -> None:
    """The variance is the conditional half's; the unconditional one's is not read and has no gradient."""
    schedule = NoiseSchedule(variance_type=variance).to(device)
    x, u, c, spread = torch.randn(4, 2, 3, 5, 3, device=device)
    t, seeds = torch.tensor([40, 900], device=device), torch.tensor([5, 6], device=device)
    spread, poison = spread.sigmoid(), torch.full_like(spread, float("nan"))
    output = torch.cat((torch.cat((u, poison), 1), torch.cat((c, spread), 1))).contiguous(memory_format=memory)
    output = output.requires_grad_()
    x = x.contiguous(memory_format=memory)
    with mmfast.backend(backend):
        found = ops.ddpm_step(output, t, t - 20, x, schedule, guidance=3.0, seed=seeds)
        (grad,) = torch.autograd.grad(found.square().sum(), output)
        alone = ops.ddpm_step(torch.cat((u + 3.0 * (c - u), spread), 1), t, t - 20, x, schedule, seed=seeds)
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)
    assert found.is_contiguous(memory_format=memory)
    assert not grad[:2, 3:].any()
    leaf = torch.cat((torch.cat((u, spread), 1), torch.cat((c, spread), 1))).double().requires_grad_()
    wanted = reference.ddpm_step(leaf, t, t - 20, x.double(), schedule, guidance=3.0, seed=seeds)
    torch.testing.assert_close(grad.double(), torch.autograd.grad(wanted.square().sum(), leaf)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_learned_range_ends_at_the_fixed_variances(backend: str, device: torch.device) -> None:
    schedule = NoiseSchedule(clip_sample=False).to(device)
    x, m = torch.randn(2, 3, 2, 4, device=device)
    t = torch.tensor([2, 300, 999], device=device)
    with mmfast.backend(backend):
        for value, fixed in ((-1.0, "fixed_small"), (1.0, "fixed_large")):
            learned = torch.cat((m, torch.full_like(m, value)), 1)
            found = ops.ddpm_step(learned, t, t - 2, x, schedule, seed=3, variance_type="learned_range")
            wanted = ops.ddpm_step(m, t, t - 2, x, schedule, seed=3, variance_type=fixed)
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_a_learned_variance_at_timestep_0_is_not_used(variance: str, backend: str, device: torch.device) -> None:
    """Where alpha-bar before timestep 0 is alpha-bar at 0, beta is 0 and its logarithm infinite; v may be anything."""
    schedule = NoiseSchedule(set_alpha_to_one=False, clip_sample=False, variance_type=variance).to(device)
    output = torch.randn(2, 6, 5, device=device).requires_grad_()
    x, t = torch.randn(2, 3, 5, device=device), torch.tensor([0, 40], device=device)
    with mmfast.backend(backend):
        for steps in ((t, (t - 20).clamp_min(-1)), (0, -1)):
            x_prev, x0 = ops.ddpm_step(output.abs() * -1, *steps, x, schedule, seed=1, return_x0=True)
            torch.testing.assert_close(x_prev[0], x[0], rtol=1e-5, atol=1e-5)  # alpha-bar stays what it is, so does x
            assert x0[0].isfinite().all()
            assert torch.autograd.grad(x_prev[0].sum(), output)[0][0].isfinite().all()


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_the_step_from_timestep_0_adds_nothing(backend: str, device: torch.device) -> None:
    schedule = NoiseSchedule().to(device)
    x, m = torch.randn(2, 2, 3, 4, device=device)
    with mmfast.backend(backend):
        for t in (0, torch.tensor([0, 0], device=device)):
            found, x0 = ops.ddpm_step(m, t, -1, x, schedule, seed=3, return_x0=True)
            torch.testing.assert_close(found, x0, rtol=1e-5, atol=1e-6)
        mixed = ops.ddpm_step(m, torch.tensor([0, 5], device=device), -1, x, schedule, variance_type="fixed_large")
    torch.testing.assert_close(mixed[0], x0[0], rtol=1e-5, atol=1e-6)
    assert not torch.isclose(mixed[1], ops.ddpm_step(m, 5, -1, x, schedule)[1]).any()


def test_formula_of_the_paper() -> None:
    """Ho et al.: the mean is (x - beta / sqrt(1 - alpha-bar) m) / sqrt(alpha), and sigma^2 is beta or beta tilde."""
    betas = [0.1, 0.2, 0.3]
    schedule = NoiseSchedule(trained_betas=betas, clip_sample=False)
    x, m, noise = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, -1.0]]), torch.tensor([[1.0, 3.0]])
    before, now = 0.9 * 0.8, 0.9 * 0.8 * 0.7
    mean = (x - 0.3 / (1 - now) ** 0.5 * m) / 0.7**0.5
    tilde = (1 - before) / (1 - now) * 0.3
    for variance, value in (("fixed_small", tilde), ("fixed_large", 0.3)):
        found = ops.ddpm_step(m, 2, 1, x, schedule, noise=noise, variance_type=variance)
        torch.testing.assert_close(found, mean + value**0.5 * noise)
    clipped = ops.ddpm_step(m, 2, 1, x, schedule, noise=torch.zeros_like(x), clip_sample=1.0)
    x0 = ((x - (1 - now) ** 0.5 * m) / now**0.5).clamp(-1, 1)
    wanted = before**0.5 * 0.3 / (1 - now) * x0 + 0.7**0.5 * (1 - before) / (1 - now) * x
    torch.testing.assert_close(clipped, wanted)


X = torch.zeros(2, 4, 3, 3)
BAD: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "variance_type": (
        (X, 5, 4, X),
        {"variance_type": "small"},
        "variance_type must be one of fixed_small, fixed_small_log, fixed_large, fixed_large_log, learned, "
        "learned_range, got 'small'",
    ),
    "no variance": (
        (X, 5, 4, X),
        {"variance_type": "learned"},
        "model_output must have shape (2, 8, 3, 3), with the variance in the second half of its channels, "
        "got (2, 4, 3, 3)",
    ),
    "a variance that is not asked for": (
        (torch.cat((X, X), 1), 5, 4, X),
        {},
        "model_output must have shape (2, 4, 3, 3), got (2, 8, 3, 3)",
    ),
    "a learned variance without channels": (
        (torch.zeros(2), 5, 4, torch.zeros(2)),
        {"variance_type": "learned_range"},
        "a learned variance needs channels: x must have at least 2 dimensions, got 1",
    ),
    "t_prev is not before t": ((X, 5, 6, X), {}, "t_prev must be before t, got t=5 and t_prev=6"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what: str) -> None:
    args, kwargs, message = BAD[what]
    with pytest.raises(ValueError) as raised:
        ops.ddpm_step(*args, NoiseSchedule(), **kwargs)
    assert str(raised.value) == f"ddpm_step: {message}"


def test_double_backward_of_a_learned_variance() -> None:
    schedule = NoiseSchedule(clip_sample=False)
    m = torch.rand(2, 4, 2, dtype=torch.float64, requires_grad=True)
    x, t = torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True), torch.tensor([700, 30])
    noise = torch.randn_like(x)
    for variance in ("learned", "learned_range"):

        def registered(m: Tensor, x: Tensor, variance: str = variance) -> Tensor:
            rest = (noise, None, 0, "epsilon", None, 0.0, True, False, False, variance)
            return torch.ops.mmfast.ddpm_step(m, t, t - 20, x, schedule.alpha_table, *rest)[0]

        assert torch.autograd.gradcheck(registered, (m, x))
        assert torch.autograd.gradgradcheck(registered, (m, x))
