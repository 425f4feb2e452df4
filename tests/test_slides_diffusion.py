"""The lecture's slides on diffusion: each formula and number of theirs, by the ops that compute it.

Forward: q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I), with beta_1 = 0.0001 and so sigma = 0.01; x_T is
close to pure noise. Reverse: p(x_{t-1} | x_t) = N(mu(x_t, t), Sigma(x_t, t)). The slides count timesteps from 1.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmfast import NoiseSchedule, ops, sample_seeds

IMAGE = (3, 224, 224)
SCHEDULES = [
    pytest.param({}, id="linear"),
    pytest.param({"beta_schedule": "squaredcos_cap_v2"}, id="cosine"),
    pytest.param({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, id="stable-diffusion"),
]


def kolmogorov_smirnov(values: Tensor) -> float:
    """sqrt(n) times the largest distance from the normal distribution: above 1.95 once in a thousand."""
    ordered = values.double().flatten().sort().values
    expected = torch.special.ndtr(ordered)
    steps = torch.arange(1, len(ordered) + 1, dtype=torch.float64) / len(ordered)
    distance = torch.maximum((steps - expected).max(), (expected - steps).max() + 1 / len(ordered))
    return float(distance) * math.sqrt(len(ordered))


def check_standard_normal(values: Tensor, deviations: float = 4.5) -> None:
    """Mean 0, variance 1 and the distribution itself, as far as so many values can tell."""
    values, n = values.double().flatten(), values.numel()
    assert abs(values.mean()) < deviations / math.sqrt(n)
    assert abs(values.var() - 1) < deviations * math.sqrt(2 / n)
    assert kolmogorov_smirnov(values) < 1.95


def test_beta_one() -> None:
    schedule = NoiseSchedule()
    assert schedule.betas[0] == torch.tensor(0.0001)
    assert math.sqrt(schedule.betas[0]) == pytest.approx(0.01, rel=1e-7)
    assert math.sqrt(schedule.alphas[0]) == pytest.approx(math.sqrt(1 - 0.0001), rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
def test_x1_from_x0(dtype: torch.dtype) -> None:
    """x_1 = sqrt(1 - 0.0001) x_0 + epsilon_1 with epsilon_1 = 0.01 z, on an image [3x224x224]."""
    x0 = (torch.rand(1, *IMAGE, dtype=torch.float64) * 2 - 1).to(dtype)
    z = torch.randn(1, *IMAGE, dtype=torch.float64).to(dtype)
    x1 = ops.q_step(x0, 0, NoiseSchedule(), noise=z)
    expected = math.sqrt(1 - 0.0001) * x0.double() + 0.01 * z.double()
    assert x1.shape == (1, *IMAGE)
    assert x1.dtype == dtype
    computed = (1e-11 if dtype == torch.float64 else 2.0**-22) * (x0.double().abs() + 0.01 * z.double().abs())
    rounded = 0.51 * torch.finfo(dtype).eps * expected.abs()
    assert ((x1.double() - expected).abs() <= computed + rounded).all()


def test_noise_of_the_first_step() -> None:
    """Each element of epsilon_1 is drawn from N(0, 0.0001): zero mean, sigma = 0.01, the normal distribution."""
    x0 = torch.rand(1, *IMAGE, dtype=torch.float64) * 2 - 1
    noise = ops.q_step(x0, 0, NoiseSchedule(), seed=1) - math.sqrt(1 - 0.0001) * x0
    assert noise.std().item() == pytest.approx(0.01, rel=4.5 / math.sqrt(2 * noise.numel()))
    check_standard_normal(noise / 0.01)


def test_noise_is_isotropic() -> None:
    """Its covariance over channels and pixels is beta I: the elements are independent, none has more than another."""
    count, t, schedule = 40_000, 10, NoiseSchedule()
    x = torch.zeros(count, 3, 2, 2)
    noise = ops.q_step(x, t, schedule, seed=sample_seeds(2, count)).flatten(1).double()
    covariance = noise.T @ noise / count / schedule.betas[t].double()
    spread = torch.full((12, 12), math.sqrt(1 / count)).fill_diagonal_(math.sqrt(2 / count))
    assert ((covariance - torch.eye(12)).abs() < 4.5 * spread).all()


@pytest.mark.parametrize("words", SCHEDULES)
def test_forward_step_at_every_timestep(words: dict) -> None:
    """q_step scales by sqrt(1 - beta_t) and adds sqrt(beta_t) z: read off with x = 1, z = 0 and the reverse."""
    schedule = NoiseSchedule(**words)
    t = torch.arange(1000)
    ones, zeros = torch.ones(1000, 1, dtype=torch.float64), torch.zeros(1000, 1, dtype=torch.float64)
    scale = ops.q_step(ones, t, schedule, noise=zeros).flatten()
    sigma = ops.q_step(zeros, t, schedule, noise=ones).flatten()
    torch.testing.assert_close(sigma**2, schedule.betas.double(), rtol=1e-7, atol=0)
    torch.testing.assert_close(scale**2 + sigma**2, torch.ones_like(scale), rtol=0, atol=1e-12)

    # Composed from the first step on, they are q_sample's: the Markov chain's closed form.
    signal_now = ops.q_sample(ones, t, schedule, noise=zeros).flatten()
    sigma_now = ops.q_sample(zeros, t, schedule, noise=ones).flatten()
    torch.testing.assert_close(scale.cumprod(0), signal_now, rtol=1e-9, atol=0)
    variance, composed = 0.0, []
    for a, b in zip((scale**2).tolist(), (sigma**2).tolist(), strict=True):
        variance = a * variance + b
        composed.append(variance)
    torch.testing.assert_close(torch.tensor(composed, dtype=torch.float64), sigma_now**2, rtol=1e-9, atol=0)
    torch.testing.assert_close(signal_now**2, schedule.alphas_cumprod_double[1:], rtol=1e-12, atol=0)


def test_chain_of_steps_draws_what_q_sample_draws() -> None:
    """T steps with noise of their own from one seed, against the jump: same mean, variance and distribution."""
    schedule = NoiseSchedule(num_train_timesteps=20, beta_start=0.01, beta_end=0.3)
    x0 = torch.full((4000, 8), 1.5)
    x = x0
    for t in range(20):
        x = ops.q_step(x, t, schedule, seed=3)
    alpha_bar = schedule.alphas_cumprod[-1].item()
    for drawn in (x, ops.q_sample(x0, 19, schedule, seed=3)):
        check_standard_normal((drawn - math.sqrt(alpha_bar) * 1.5) / math.sqrt(1 - alpha_bar))


@pytest.mark.parametrize("words", SCHEDULES)
def test_x_T_is_close_to_pure_noise(words: dict) -> None:
    schedule = NoiseSchedule(**words)
    alpha_bar = schedule.alphas_cumprod[-1].item()
    assert alpha_bar < 0.005
    x0 = torch.rand(1, *IMAGE) * 2 - 1
    x_T = ops.q_sample(x0, 999, schedule, seed=4)
    check_standard_normal(x_T)
    correlation = (x_T * x0).mean() / x0.std()
    assert abs(correlation) < math.sqrt(alpha_bar) + 4.5 / math.sqrt(x0.numel()), "little of the image is left"


def posterior(schedule: NoiseSchedule, t: Tensor, x_t: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of q(x_{t-1} | x_t, x_0) by Bayes' rule: two Gaussians of x_{t-1}, weighted by precision."""
    bars = schedule.alphas_cumprod_double
    now, before = bars[t + 1][:, None], bars[t][:, None]
    alpha, beta = now / before, (before - now) / before
    precision = alpha / beta + 1 / (1 - before)
    return (alpha.sqrt() / beta * x_t + before.sqrt() / (1 - before) * x0) / precision, 1 / precision


@pytest.mark.parametrize("words", SCHEDULES)
def test_reverse_mean_and_variance(words: dict) -> None:
    """With the true noise, or x_0, or v, predicted, ddpm_step has the mean and variance that Bayes' rule gives."""
    schedule = NoiseSchedule(**words)
    t = torch.arange(1, 1000)
    x0, z = torch.randn(2, 999, 4, dtype=torch.float64)
    for prediction in ("epsilon", "sample", "v_prediction"):
        x_t, target = ops.q_sample(x0, t, schedule, noise=z, target=prediction)
        mean, variance = posterior(schedule, t, x_t, x0)

        def step(noise: Tensor, kind: str = "fixed_small", x_t: Tensor = x_t, target: Tensor = target) -> Tensor:
            words = {"prediction_type": prediction, "variance_type": kind, "clip_sample": False}  # noqa: B023
            return ops.ddpm_step(target, t, t - 1, x_t, schedule, noise=noise, **words)

        found = step(torch.zeros_like(x0))
        torch.testing.assert_close(found, mean, rtol=1e-7, atol=1e-7)
        deviation = step(torch.ones_like(x0)) - found
        torch.testing.assert_close(deviation**2, variance.expand_as(x0), rtol=1e-6, atol=1e-12)
        # "Often fixed or simplified in practice": to beta_t, the largest there can be.
        deviation = step(torch.ones_like(x0), "fixed_large") - found
        torch.testing.assert_close(deviation**2, schedule.betas[1:, None].double().expand_as(x0), rtol=1e-6, atol=0)


def test_learned_variance() -> None:
    """Sigma(x_t, t) predicted by the model, between the two fixed ones in the logarithm."""
    schedule = NoiseSchedule()
    x, output = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    zeros, ones = torch.zeros_like(x), torch.ones_like(x)

    def deviation(kind: str, predicted: Tensor | None = None) -> Tensor:
        model = output if predicted is None else torch.cat((output, predicted), 1)
        words = {"variance_type": kind, "clip_sample": False}
        drawn, mean = (ops.ddpm_step(model, 500, 499, x, schedule, noise=z, **words) for z in (ones, zeros))
        return drawn - mean

    torch.testing.assert_close(deviation("learned_range", -ones), deviation("fixed_small"))
    torch.testing.assert_close(deviation("learned_range", ones), deviation("fixed_large"))
    middle = (deviation("fixed_small") * deviation("fixed_large")).sqrt()
    torch.testing.assert_close(deviation("learned_range", zeros), middle)
    torch.testing.assert_close(deviation("learned", 0.09 * ones), 0.3 * ones)


def test_reverse_step_is_gaussian() -> None:
    """x_{t-1} is drawn from N(mean, variance I), and what forward noised to t, reverse brings to t - 1."""
    schedule = NoiseSchedule(num_train_timesteps=50, beta_start=0.01, beta_end=0.2)
    t, x0 = 30, torch.full((4000, 8), 0.7, dtype=torch.float64)
    x_t, noise = ops.q_sample(x0, t, schedule, seed=5, target="epsilon")
    x = ops.ddpm_step(noise, t, t - 1, x_t, schedule, seed=5, clip_sample=False)
    mean, variance = posterior(schedule, torch.tensor([t]), x_t, x0)
    check_standard_normal((x - mean) / variance.sqrt())
    before = schedule.alphas_cumprod_double[t].item()
    check_standard_normal((x - math.sqrt(before) * x0) / math.sqrt(1 - before))


def test_reverse_process_recovers_the_data() -> None:
    """From x_T, steps with the noise that leads to x_0 end there: by DDPM with fresh noise and by DDIM with none."""
    schedule = NoiseSchedule(num_train_timesteps=50, beta_start=0.001, beta_end=0.3)
    x0 = torch.rand(6, 3, 4, 4, dtype=torch.float64) * 2 - 1
    x, y = (ops.q_sample(x0, 49, schedule, seed=6) for _ in range(2))
    for t in range(49, -1, -1):
        alpha_bar = schedule.alphas_cumprod_double[t + 1].item()
        signal, sigma = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
        x = ops.ddpm_step((x - signal * x0) / sigma, t, t - 1, x, schedule, seed=6)
        y = ops.ddim_step((y - signal * x0) / sigma, t, t - 1, y, schedule)
    torch.testing.assert_close(x, x0, rtol=0, atol=1e-9)
    torch.testing.assert_close(y, x0, rtol=0, atol=1e-9)
