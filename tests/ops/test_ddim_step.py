from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mmfast
from mmfast import ops, reference
from mmfast.noise_schedule import NoiseSchedule
from mmfast.ops.ddim_step import coefficients as float64_factors
from mmfast.reference.ddim_step import cases
from tests.grading import ALL_BACKENDS, CUDA, DTYPES, check_against_reference

LABELS = [case.label for case in cases(torch.float32, torch.device("cpu"), large=False)]
GPU_LABELS = [case.label for case in cases(torch.float32, torch.device("meta"), large=True)][len(LABELS) :]
SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {},
    "scaled_linear": {"beta_start": 0.00085, "beta_end": 0.012, "set_alpha_to_one": False},
    "squaredcos_cap_v2": {},
}


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("label", [*LABELS, *(pytest.param(x, marks=pytest.mark.gpu) for x in GPU_LABELS)])
@pytest.mark.usefixtures("poisoned")
def test_matches_the_reference(label: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    case = next(c for c in cases(dtype, device, large=label in GPU_LABELS) if c.label == label)
    check_against_reference(ops.ddim_step, reference.ddim_step, case.args, case.kwargs, backend, dtype)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("clip", [None, 0.6], ids=["no clip", "clip"])
@pytest.mark.parametrize("again", [False, True], ids=["as predicted", "from the clipped x0"])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.usefixtures("poisoned")
def test_every_option(
    prediction: str, eta: float, again: bool, clip: float | None, backend: str, device: torch.device
) -> None:
    x, m, noise = torch.randn(3, 3, 5, device=device)
    t = torch.tensor([2, 400, 990], device=device)
    args = (m, t, t - 2, x, NoiseSchedule(prediction_type=prediction, clip_sample=False).to(device))
    kwargs = {"eta": eta, "noise": noise, "use_clipped_model_output": again, "clip_sample": clip, "return_x0": True}
    if eta == 0.0:
        del kwargs["noise"]
    check_against_reference(ops.ddim_step, reference.ddim_step, args, kwargs, backend, torch.float32)


@pytest.mark.parametrize("eta", [0.0, 0.5], ids=["eta 0", "eta 0.5"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("stride", [1, 20])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("backend", [None, CUDA])
def test_coefficients_at_every_timestep(
    backend: str | None, name: str, stride: int, prediction: str, eta: float, device: torch.device
) -> None:
    """Of each of 1000 samples, three elements hold x = 1, m = 1 and noise = 1: the step gives its coefficients."""
    schedule = NoiseSchedule(name, prediction_type=prediction, clip_sample=False, **SCHEDULES[name]).to(device)
    with mmfast.backend(backend or (None if device.type == "cuda" else "torch")):
        found, wanted = coefficients(ops.ddim_step, reference.ddim_step, schedule, stride, eta=eta)
    assert_close_in_relation(found, wanted, 1e-6)


def coefficients(op: Any, formula: Any, schedule: NoiseSchedule, stride: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Found in float32 and wanted in float64, (1000, 3) each."""
    device = schedule.alpha_table.device
    x, m, noise = torch.eye(3, device=device).unsqueeze(1).repeat(1, 1000, 1)
    t, t_prev = timesteps(stride, device)
    found = op(m, t, t_prev, x, schedule, noise=noise, **options)
    return found, formula(m.double(), t, t_prev, x.double(), schedule, noise=noise.double(), **options)


def timesteps(stride: int, device: torch.device) -> tuple[Tensor, Tensor]:
    t = torch.arange(1000, device=device)
    return t, (t - stride).clamp_min(-1)


def assert_close_in_relation(found: Tensor, wanted: Tensor, bound: float, where: str = "") -> None:
    """Relative error; where the coefficient is zero, so is what was found."""
    assert found.dtype == torch.float32
    error = ((found.double() - wanted).abs() / wanted.abs()).nan_to_num(nan=0.0)
    assert error.max() < bound, f"{where} {error.max():.3g} at {int(error.argmax())}"


@pytest.mark.triton
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("stride", [1, 20])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_kernels_coefficients_at_every_timestep(
    name: str, stride: int, prediction: str, eta: float, device: torch.device
) -> None:
    """The kernel's own float32 arithmetic, of all its factors, against the same formulas in float64."""
    from tests.ops.step_factors import kernel_factors

    schedule = NoiseSchedule(name, **SCHEDULES[name]).to(device)
    t, t_prev = timesteps(stride, device)
    for clipped, again in ((False, False), (True, False), (True, True)):
        found = kernel_factors(schedule, t, t_prev, prediction, eta=eta, clipped=clipped, again=again)
        wanted = float64_factors(schedule.alpha_table, t, t_prev, prediction, eta, again, clipped=clipped)._asdict()
        compared = [key for key in found if wanted[key] is not None]
        assert compared == [key for key in wanted if wanted[key] is not None]
        for key in compared:
            assert_close_in_relation(found[key], wanted[key], 1e-6, key)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_close_timesteps_in_16_bits_are_not_the_same(backend: str, device: torch.device) -> None:
    """A schedule in float16 says that nothing happens between early timesteps; this one is right to one rounding."""
    schedule = NoiseSchedule(clip_sample=False).to(device)
    x, m = torch.randn(2, 4, 64, device=device).half()
    t = torch.tensor([0, 1, 3, 10], device=device)
    with mmfast.backend(backend):
        found = ops.ddim_step(m, t, t - 1, x, schedule)
    wanted = reference.ddim_step(m.double(), t, t - 1, x.double(), schedule)
    assert (found.double() - x.double()).norm() > 0.9 * (wanted - x.double()).norm()
    torch.testing.assert_close(found.double(), wanted, rtol=2**-11, atol=2**-24)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_eta_of_one_is_ddpm(backend: str, device: torch.device) -> None:
    """With all the noise that fits, DDIM is ancestral sampling, over any stride: the same noise and the same mean."""
    schedule = NoiseSchedule(clip_sample=False).to(device)
    x, m = torch.randn(2, 4, 3, 5, device=device)
    t = torch.tensor([40, 300, 800, 999], device=device)
    with mmfast.backend(backend):
        for stride in (1, 40):
            ddim = ops.ddim_step(m, t, t - stride, x, schedule, eta=1.0, seed=9)
            ddpm = ops.ddpm_step(m, t, t - stride, x, schedule, seed=9)
            torch.testing.assert_close(ddim, ddpm, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_inversion_goes_back(backend: str, device: torch.device) -> None:
    """A step to a later timestep is the inverse of the step to the earlier one, for the same noise prediction."""
    schedule = NoiseSchedule(clip_sample=False).to(device)
    x, m = torch.randn(2, 2, 3, 5, device=device)
    with mmfast.backend(backend):
        for t in (500, torch.tensor([500, 30], device=device)):
            there = ops.ddim_step(m, t, t - 20, x, schedule)
            torch.testing.assert_close(ops.ddim_step(m, t - 20, t, there, schedule), x, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(there, x, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_a_perfect_model_lands_on_the_sample(backend: str, device: torch.device) -> None:
    """Who predicts the noise that was added is at x_0 after any number of steps, and says so at each."""
    schedule = NoiseSchedule(clip_sample=False).to(device)
    x0, noise = torch.randn(2, 2, 3, 5, device=device)
    x = ops.q_sample(x0, 999, schedule, noise=noise)
    for t, t_prev in ((999, 600), (600, 150), (150, 20), (20, -1)):
        with mmfast.backend(backend):
            x, predicted = ops.ddim_step(noise, t, t_prev, x, schedule, return_x0=True)
        torch.testing.assert_close(predicted, x0, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(x, x0, rtol=1e-3, atol=1e-3)


def test_formula_of_the_paper() -> None:
    """Equation 12 by hand, with alpha-bar of 0.36 at t and 0.64 before it."""
    betas = [1 - 0.64, 1 - 0.36 / 0.64]
    schedule = NoiseSchedule(trained_betas=betas, clip_sample=False)
    x, m, noise = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, -1.0]]), torch.tensor([[1.0, 3.0]])
    x0 = (x - 0.8 * m) / 0.6
    found = ops.ddim_step(m, 1, 0, x, schedule, return_x0=True)
    torch.testing.assert_close(found, (0.8 * x0 + 0.6 * m, x0))
    s = 0.5 * (0.36 / 0.64 * (1 - 0.36 / 0.64)) ** 0.5
    wanted = 0.8 * x0 + (0.36 - s**2) ** 0.5 * m + s * noise
    torch.testing.assert_close(ops.ddim_step(m, 1, 0, x, schedule, eta=0.5, noise=noise), wanted)
    torch.testing.assert_close(ops.ddim_step(m, 1, 0, x, schedule, clip_sample=1.0), 0.8 * x0.clamp(-1, 1) + 0.6 * m)


@pytest.mark.parametrize(
    ("eta", "kind", "message"),
    [
        ("1", TypeError, "eta must be a number, got str"),
        (True, TypeError, "eta must be a number, got bool"),
        (-0.1, ValueError, "eta must be at least 0, got -0.1"),
        (float("inf"), ValueError, "eta must be finite, got inf"),
    ],
    ids=str,
)
def test_bad_eta(eta: Any, kind: type[Exception], message: str) -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(kind, match=f"ddim_step: {message}"):
        ops.ddim_step(x, 5, 4, x, NoiseSchedule(), eta=eta)
