"""Ten million normals of fixed seeds, held to what independent standard normal numbers do.

Bounds are four standard deviations of each statistic unless said otherwise: seeds are fixed, so a test that passes
keeps passing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import mmfast
from mmfast import ops
from mmfast.ops._philox_torch import normals
from mmfast.reference._philox import Stream

SAMPLES, SIZE = 10, 1_000_000
N = SAMPLES * SIZE
SEED = 20_240_229


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("torch"),
        pytest.param("triton", marks=[pytest.mark.triton, pytest.mark.gpu]),
        pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.gpu]),
    ],
)
def z(request: pytest.FixtureRequest, device: torch.device) -> Iterator[Tensor]:
    """(10, 10^6): of the torch backend on this device's host, of the kernel on a GPU."""
    x = torch.empty(SAMPLES, SIZE, device="cpu" if request.param == "torch" else device)
    torch.set_num_threads(1)  # the fixture that does so for each test comes later
    with mmfast.backend(request.param):
        yield ops.noise_like(x, SEED)


def test_moments(z: Tensor) -> None:
    mean = float(z.mean(dtype=torch.float64))
    powers = [float((z**k).mean(dtype=torch.float64)) for k in (2, 3, 4)]
    assert abs(mean) <= 4 / math.sqrt(N)
    assert abs(powers[0] - 1) <= 4 * math.sqrt(2 / N)
    assert abs(powers[1] - 3 * mean) <= 4 * math.sqrt(6 / N)  # the skewness
    assert abs(powers[2] - 3 - 6 * (powers[0] - 1)) <= 4 * math.sqrt(24 / N)  # the excess kurtosis


def test_kolmogorov_smirnov(z: Tensor) -> None:
    """At a level of 1 in 1000 over all, of 1 in 10 000 over each of the ten samples."""
    counts = quantile_counts(z)
    assert distance(counts.sum(0)) * math.sqrt(N) <= critical(1e-3)
    for sample in counts:
        assert distance(sample) * math.sqrt(SIZE) <= critical(1e-4)


QUANTILES = 1 << 17


def quantile_counts(z: Tensor) -> Tensor:
    """How many of each row lie between neighbouring quantiles of the normal distribution."""
    cells = (torch.special.ndtr(z.double()) * QUANTILES).long().clamp_(max=QUANTILES - 1)
    cells += QUANTILES * torch.arange(len(z), device=z.device)[:, None]
    return torch.bincount(cells.flatten(), minlength=len(z) * QUANTILES).view(len(z), QUANTILES).cpu()


def distance(counts: Tensor) -> float:
    """Kolmogorov's distance from the normal distribution, taken at the quantiles."""
    steps = torch.arange(1, QUANTILES + 1, dtype=torch.float64) / QUANTILES
    return float((counts.cumsum(0) / counts.sum() - steps).abs().max())


def critical(level: float) -> float:
    """Kolmogorov's distribution times sqrt(n) exceeds this with this probability."""
    return math.sqrt(math.log(2 / level) / 2)


@pytest.mark.parametrize("sigmas", [4, 5])
def test_tails(sigmas: int, z: Tensor) -> None:
    """Counts on both sides within the binomial distribution's 1 in 10 000 from each end."""
    p = math.erfc(sigmas / math.sqrt(2)) / 2
    low, high = binomial_bounds(N, p, 1e-4)
    for count in (int((z > sigmas).sum()), int((z < -sigmas).sum())):
        assert low <= count <= high


def binomial_bounds(n: int, p: float, level: float) -> tuple[int, int]:
    """Counts below and above which a binomial one falls less often than `level`; p is small."""
    total, log_term, low, k = 0.0, n * math.log1p(-p), -1, 0
    while True:
        total += math.exp(log_term)
        if low < 0 and total > level:
            low = k
        if total > 1 - level:
            return low, k
        log_term += math.log((n - k) / (k + 1) * p / (1 - p))
        k += 1


@pytest.mark.parametrize("lag", [1, 2, 3, 4])
def test_neighbours_are_independent(lag: int, z: Tensor) -> None:
    """So are their squares: two of a pair share the radius, and the angle has to undo that."""
    a, b = z[:, :-lag], z[:, lag:]
    n = a.numel()
    assert abs(float((a * b).mean(dtype=torch.float64))) <= 4 / math.sqrt(n)
    squares = (a.square() - 1) * (b.square() - 1)  # of variance 4
    assert abs(float(squares.mean(dtype=torch.float64))) <= 4 * 2 / math.sqrt(n)


def test_samples_are_independent(z: Tensor) -> None:
    """Each pair of the ten: their seed is one, and their numbers follow each other."""
    check_independent(z)


SIBLINGS = {
    "adjacent seeds": [SEED + i for i in range(8)],
    "adjacent high words": [SEED + (i << 32) for i in range(8)],
    "one bit apart": [SEED ^ 1 << bit for bit in (0, 1, 7, 31, 32, 33, 62)],
    "derived": mmfast.sample_seeds(SEED, 8).tolist(),
}


@pytest.mark.parametrize("name", SIBLINGS)
def test_seeds_are_independent(name: str) -> None:
    seeds = torch.tensor(SIBLINGS[name])
    check_independent(normals(torch.empty(len(seeds), SIZE // 4), seeds, 0))


def test_streams_are_independent() -> None:
    """Of one seed: the noise of training, forward and reverse steps at neighbouring timesteps, and offset noise."""
    timesteps = [0, 1, 2, 500, 999]
    streams = [Stream.NOISE, Stream.OFFSET]
    streams += [base + 4 * t for base in (Stream.Q_STEP, Stream.REVERSE_STEP) for t in timesteps]
    assert len(set(streams)) == len(streams)
    x, seeds = torch.empty(len(streams), SIZE // 4), torch.full((len(streams),), SEED)
    check_independent(normals(x, seeds, 0, torch.tensor(streams)))


def check_independent(z: Tensor) -> None:
    """Rows (n, SIZE) do not correlate, in place or shifted by one: 4.5 standard deviations, for the many pairs."""
    n = z.shape[1]
    bound = 4.5 / math.sqrt(n)
    products = z @ z.T / n
    assert products.fill_diagonal_(0).abs().max() <= bound
    shifted = z[:, :-1] @ z[:, 1:].T / n
    assert shifted.abs().max() <= bound


def test_the_statistics_notice_flaws() -> None:
    """Tails cut at 4.2, a standard deviation of 1.002, and 2 % of a sample repeated in another."""
    z = normals(torch.empty(SAMPLES, SIZE), None, SEED)
    p = math.erfc(4 / math.sqrt(2)) / 2
    cut = z.where(z.abs() < 4.2, 0.0)
    assert int((cut > 4).sum()) < binomial_bounds(N, p, 1e-4)[0] < int((z > 4).sum())
    assert distance(quantile_counts(z * 1.002).sum(0)) * math.sqrt(N) > critical(1e-3)
    repeated = z[:, :100_000].clone()
    repeated[1, :2000] = repeated[0, :2000]
    with pytest.raises(AssertionError):
        check_independent(repeated)
