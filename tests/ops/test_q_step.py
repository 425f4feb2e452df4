from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import mmfast
from mmfast import ops, reference
from mmfast.noise_schedule import NoiseSchedule
from mmfast.reference.q_step import cases
from tests.grading import ALL_BACKENDS, BACKENDS, DTYPES, check_against_reference, outputs_and_gradients

LABELS = [case.label for case in cases(torch.float32, torch.device("cpu"), large=False)]
GPU_LABELS = [case.label for case in cases(torch.float32, torch.device("meta"), large=True)][len(LABELS) :]
SHAPE = (3, 5, 4, 7)
LAYOUTS = (
    pytest.param(torch.contiguous_format, id="contiguous"),
    pytest.param(torch.channels_last, id="channels_last"),
)


@pytest.fixture
def schedule(device: torch.device) -> NoiseSchedule:
    return NoiseSchedule().to(device)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("label", [*LABELS, *(pytest.param(x, marks=pytest.mark.gpu) for x in GPU_LABELS)])
@pytest.mark.usefixtures("poisoned")
def test_matches_the_reference(label: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    case = next(c for c in cases(dtype, device, large=label in GPU_LABELS) if c.label == label)
    check_against_reference(ops.q_step, reference.q_step, case.args, case.kwargs, backend, dtype)


def exact_betas(name: str) -> Tensor:
    """As the schedules define them, in float64."""
    if name == "linear":
        return torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    return torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
def test_scale_and_sigma_at_every_timestep(name: str, backend: str, device: torch.device) -> None:
    """sqrt(1 - beta) and sqrt(beta) of the betas that the schedule is made from, to float32 rounding at every t."""
    start, end = (1e-4, 0.02) if name == "linear" else (0.00085, 0.012)
    # Samplers may end on another alpha-bar than 1; the forward process starts from x_0 all the same.
    schedule = NoiseSchedule(name, beta_start=start, beta_end=end, set_alpha_to_one=False).to(device)
    betas = exact_betas(name).to(device)
    t = torch.arange(1000, device=device)[:: 1 if backend == "torch" else 111]
    ones, zeros = torch.ones(len(t), 2, device=device), torch.zeros(len(t), 2, device=device)
    with mmfast.backend(backend):
        scale = ops.q_step(ones, t, schedule, noise=zeros)
        sigma = ops.q_step(zeros, t, schedule, noise=ones)
    for found, wanted in ((scale, (1 - betas[t]).sqrt()), (sigma, betas[t].sqrt())):
        torch.testing.assert_close(found.double(), wanted[:, None].expand(-1, 2), rtol=3e-7, atol=0)


def test_tables_written_to_or_copied_are_seen(device: torch.device) -> None:
    """On a CPU the roots of a table are kept with the schedule, as long as it is the same table."""
    schedule, other = NoiseSchedule().to(device), NoiseSchedule("scaled_linear").to(device)
    x, zeros = torch.ones(2, 3, device=device), torch.zeros(2, 3, device=device)

    def scale(schedule: NoiseSchedule) -> Tensor:
        return ops.q_step(x, 500, schedule, noise=zeros)

    first, wanted = scale(schedule), scale(other)
    assert not torch.equal(first, wanted)
    copied = copy.deepcopy(schedule)
    copied.load_state_dict(other.state_dict())
    torch.testing.assert_close(scale(copied), wanted)
    schedule.alpha_table.copy_(other.alpha_table)
    torch.testing.assert_close(scale(schedule), wanted)
    with torch.inference_mode():
        made = NoiseSchedule("scaled_linear").to(device)
        torch.testing.assert_close(scale(made), wanted)
        fresh = NoiseSchedule("scaled_linear").to(device)
    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(ops.q_step(leaf, 500, schedule, noise=zeros).sum(), leaf)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(scale(fresh), wanted)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_lecture_first_step(backend: str, schedule: NoiseSchedule, device: torch.device) -> None:
    """beta_1 = 1e-4: the image is scaled by sqrt(1 - 1e-4), and the noise has a sigma of 0.01."""
    x = torch.full((1, 3, 4, 4), 2.0, device=device)
    with mmfast.backend(backend):
        y = ops.q_step(x, 0, schedule, noise=torch.full_like(x, 3.0))
    torch.testing.assert_close(y, torch.full_like(x, 2 * (1 - 1e-4) ** 0.5 + 3 * 0.01))


def test_a_chain_of_steps_is_one_jump(device: torch.device) -> None:
    """T steps of unit noise from x_0 give mean sqrt(alpha_bar) x_0 and variance 1 - alpha_bar, and end near N(0, I)."""
    schedule = NoiseSchedule(num_train_timesteps=50, beta_end=0.2).to(device)
    start = torch.full((2000, 8), 3.0, device=device)
    x = start
    seeds = mmfast.ops._noise.sample_seeds(1, len(x), device=device)
    for t in range(50):
        x = ops.q_step(x, t, schedule, seed=seeds)
        if t in (9, 49):
            alpha_bar = float(schedule.alphas_cumprod_double[t + 1])
            jump = ops.q_sample(start, t, schedule, seed=seeds)
            for sample in (x, jump):
                assert float(sample.mean()) == pytest.approx(3 * alpha_bar**0.5, abs=0.04)
                assert float(sample.var()) == pytest.approx(1 - alpha_bar, rel=0.05)
            correlation = torch.corrcoef(torch.stack((x.flatten(), jump.flatten())))[0, 1]
            assert abs(float(correlation)) < 0.04  # the jump's noise is another


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_each_timestep_has_noise_of_its_own(backend: str, schedule: NoiseSchedule, device: torch.device) -> None:
    zeros = torch.zeros(3, 400, device=device)
    seeds = torch.tensor([7, 7, 8], device=device)
    t = torch.tensor([10, 11, 10], device=device)
    with mmfast.backend(backend):
        a, b, c = ops.q_step(zeros, t, schedule, seed=seeds).unbind()
        again = ops.q_step(zeros[:1], 10, schedule, seed=seeds[:1])
        number = ops.q_step(zeros, 10, schedule, seed=7)
    assert torch.equal(again[0], a)
    assert torch.equal(number[0], a)  # an int keys sample 0 as a seed of its own does
    other = ops.noise_like(zeros, seeds)[0]
    for x, y in ((a, b), (a, c), (a, number[1]), (a, other)):
        assert abs(float(torch.corrcoef(torch.stack((x, y)))[0, 1])) < 0.2


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("poisoned")
def test_noise_does_not_depend_on_layout_or_batch(
    layout: torch.memory_format, backend: str, schedule: NoiseSchedule, device: torch.device
) -> None:
    x = torch.randn(SHAPE, device=device)
    t = torch.tensor([0, 999, 400], device=device)
    seeds = torch.tensor([1, -2, 1 << 50], device=device)
    with mmfast.backend(backend):
        y = ops.q_step(x.to(memory_format=layout), t, schedule, seed=seeds)
        alone = ops.q_step(x[1:2], t[1:2], schedule, seed=seeds[1:2])
    assert y.is_contiguous(memory_format=layout)
    torch.testing.assert_close(y, reference.q_step(x.double(), t, schedule, seed=seeds).float())
    torch.testing.assert_close(y[1:2], alone, rtol=0, atol=1e-6 if layout == torch.channels_last else 0)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_without_a_seed_noise_is_new_each_time(backend: str, schedule: NoiseSchedule, device: torch.device) -> None:
    x = torch.zeros(4, 500, device=device)
    with mmfast.backend(backend):
        torch.manual_seed(3)
        first, second = ops.q_step(x, 999, schedule), ops.q_step(x, 999, schedule)
        torch.manual_seed(3)
        again = ops.q_step(x, 999, schedule)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    for y in (first, second):
        assert float(y.var()) == pytest.approx(0.02, rel=0.15)
        assert abs(float(y.mean())) < 0.02


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wanted", ["x", "noise", "both"])
@pytest.mark.usefixtures("poisoned")
def test_gradients(
    wanted: str, layout: torch.memory_format, backend: str, schedule: NoiseSchedule, device: torch.device
) -> None:
    x = torch.randn(SHAPE, device=device).to(memory_format=layout).requires_grad_(wanted != "noise")
    noise = torch.randn(SHAPE, device=device).half().requires_grad_(wanted != "x")
    asked = [leaf for leaf in (x, noise) if leaf.requires_grad]
    t = torch.tensor([0, 999, 400], device=device)
    upstream = torch.randn(SHAPE, device=device)
    with mmfast.backend(backend):
        y = ops.q_step(x, t, schedule, noise=noise)
        found = torch.autograd.grad(y, asked, upstream, retain_graph=True)
        summed = torch.autograd.grad(y.sum(), asked)  # an expanded gradient
    beta = exact_betas("linear").to(device)[t].view(-1, 1, 1, 1)
    for got, plain, leaf in zip(found, summed, asked, strict=True):
        scale = (1 - beta).sqrt() if leaf is x else beta.sqrt()
        assert got.dtype == leaf.dtype
        rtol = 1e-3 if leaf is noise else 1e-6
        torch.testing.assert_close(got.double(), upstream * scale, rtol=rtol, atol=1e-6)
        torch.testing.assert_close(plain.double(), scale.expand(SHAPE), rtol=rtol, atol=0)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.usefixtures("poisoned")
def test_any_strides(backend: str, schedule: NoiseSchedule, device: torch.device) -> None:
    base = torch.randn(4, 8, 7, 6, device=device, requires_grad=True)
    for x in (base[:, :3], base[::2], base.transpose(2, 3), base[:1].expand(3, -1, -1, -1), base[:, 0, 0, 0]):
        with mmfast.backend(backend):
            y = ops.q_step(x, 300, schedule, seed=2)
            (found,) = torch.autograd.grad(y.square().sum(), base, retain_graph=True)
        t = torch.full((len(x),), 300, device=device)
        truth = reference.q_step(x.double(), t, schedule, seed=2)
        torch.testing.assert_close(y.double(), truth, rtol=1e-5, atol=1e-6)
        (wanted,) = torch.autograd.grad(truth.square().sum(), base, retain_graph=True)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", [0, 3, 999])
def test_one_rounding(t: int, dtype: torch.dtype, backend: str, schedule: NoiseSchedule, device: torch.device) -> None:
    """The result is the float64 one rounded to x's dtype, but for ties: nothing between is rounded to 16 bits."""
    x, noise = torch.randn(2, 3, 8, 8, device=device).to(dtype), torch.randn(2, 3, 8, 8, device=device).to(dtype)
    with mmfast.backend(backend):
        y = ops.q_step(x, t, schedule, noise=noise)
    beta = exact_betas("linear")[t].item()
    exact = math.sqrt(1 - beta) * x.double() + math.sqrt(beta) * noise.double()
    assert (
        float(((y.double() - exact).abs() / exact.abs().clamp_min(0.1)).max()) <= torch.finfo(dtype).eps * 0.51 + 3e-7
    )


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (0,)], ids=str)
def test_empty(shape: tuple[int, ...], backend: str, schedule: NoiseSchedule, device: torch.device) -> None:
    x = torch.empty(shape, device=device, requires_grad=True)
    with mmfast.backend(backend):
        for kwargs in ({}, {"seed": 1}, {"noise": torch.empty(shape, device=device)}):
            y = ops.q_step(x, 3, schedule, **kwargs)
            (found,) = torch.autograd.grad(y.sum(), x)
            assert y.shape == found.shape == shape


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.usefixtures("poisoned")
def test_nan_stays_where_it_is(backend: str, schedule: NoiseSchedule, device: torch.device) -> None:
    x = torch.randn(SHAPE, device=device)
    x[1, 2, 3, 4] = math.nan
    with mmfast.backend(backend):
        y = ops.q_step(x, 3, schedule, seed=1)
    assert torch.equal(y.isnan(), x.isnan())


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.usefixtures("poisoned")
def test_timesteps_out_of_range_give_nan(backend: str, schedule: NoiseSchedule, device: torch.device) -> None:
    """Where they cannot be looked at, as on a GPU, and below the public function's checks on a CPU."""
    x = torch.randn(4, 3, 5, device=device, requires_grad=True)
    t = torch.tensor([1000, 5, -1, 0], device=device)
    with mmfast.backend(backend):
        y = torch.ops.mmfast.q_step(x, t, schedule.alpha_table, None, None, 1)
        (found,) = torch.autograd.grad(y.sum(), x)
    for value in (y, found):
        assert value[[0, 2]].isnan().all()
        assert value[[1, 3]].isfinite().all()


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("integers", [torch.uint8, torch.int32], ids=str)
def test_any_integer_timesteps(
    integers: torch.dtype, backend: str, schedule: NoiseSchedule, device: torch.device
) -> None:
    x = torch.randn(3, 4, 5, device=device)
    t = torch.tensor([0, 1, 100], device=device)
    with mmfast.backend(backend):
        y = ops.q_step(x, t.to(integers), schedule, seed=1)
        one = ops.q_step(x, torch.tensor(7, dtype=integers, device=device), schedule, seed=1)
        number = ops.q_step(x, 7, schedule, seed=1)
        strided = ops.q_step(x, torch.stack((t, t), 1).to(integers)[:, 0], schedule, seed=1)
    torch.testing.assert_close(y.double(), reference.q_step(x.double(), t, schedule, seed=1), rtol=1e-5, atol=1e-6)
    assert torch.equal(one, number)
    assert torch.equal(strided, y)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_differentiable_twice(backend: str, schedule: NoiseSchedule, device: torch.device) -> None:
    inputs = tuple(torch.randn(2, 3, 5, device=device, requires_grad=True) for _ in range(2))

    def penalty(fn: Any) -> tuple[Tensor, ...]:
        y = fn(inputs[0], torch.tensor([0, 70], device=device), schedule, noise=inputs[1])
        grads = torch.autograd.grad(y.sin().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)

    with mmfast.backend(backend):
        found = penalty(ops.q_step)
    for got, want in zip(found, penalty(reference.q_step), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_formulas_in_float64(schedule: NoiseSchedule) -> None:
    schedule = schedule.cpu()
    t = torch.tensor([0, 700])
    x, noise = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for fn in (ops.q_step, reference.q_step):
        assert torch.autograd.gradcheck(lambda x, n, fn=fn: fn(x, t, schedule, noise=n), (x, noise))
    assert torch.autograd.gradgradcheck(lambda x, n: ops.q_step(x, t, schedule, noise=n), (x, noise))
    op = torch.ops.mmfast.q_step
    assert torch.autograd.gradcheck(lambda x, n: op(x, t, schedule.alpha_table, n, None, 0), (x, noise))
    y = ops.q_step(x, t, schedule, seed=3)
    torch.testing.assert_close(y, reference.q_step(x, t, schedule, seed=3), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index", range(6))
def test_opcheck(index: int, backend: str, schedule: NoiseSchedule, device: torch.device) -> None:
    x = torch.randn(2, 3, 4, 5, device=device)
    leaf, noise = x.clone().requires_grad_(), torch.randn_like(x).requires_grad_()
    t, table, seeds = torch.tensor([0, 9], device=device), schedule.alpha_table, torch.tensor([1, 2], device=device)
    last = x.to(memory_format=torch.channels_last)
    name, args = (
        ("q_step", (leaf, t, table, None, seeds, 0)),
        ("q_step", (leaf, t, table, noise, None, 0)),
        ("q_step", (last, t.int(), table, None, None, 5)),
        ("q_step_backward", (x, t, table, None, [True, False])),
        ("q_step_backward", (last, t, table, torch.float16, [True, True])),
        ("q_step_backward", (x[:, :2], t, table, torch.float32, [False, True])),
    )[index]
    with mmfast.backend(backend):
        opcheck(getattr(torch.ops.mmfast, name).default, args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_equals_eager(compiler: str, backend: str, schedule: NoiseSchedule, device: torch.device) -> None:
    def fn(x: Tensor, t: Tensor, seeds: Tensor) -> Tensor:
        return ops.q_step(x * 2, t, schedule, seed=seeds)

    compiled = torch.compile(fn, fullgraph=True, backend=compiler, dynamic=True)
    with mmfast.backend(backend):
        for batch in (2, 3):
            t = torch.arange(batch, device=device) * 300
            args = (torch.randn(batch, 3, 5, device=device), t, t + 1)
            eager = outputs_and_gradients(fn, args, {})
            for got, want in zip(outputs_and_gradients(compiled, args, {}), eager, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_seed(backend: str, schedule: NoiseSchedule, device: torch.device) -> None:
    compiled = torch.compile(lambda x: ops.q_step(x, 999, schedule), fullgraph=True, backend="aot_eager")
    x = torch.zeros(4, 500, device=device)
    with mmfast.backend(backend):
        first, second = compiled(x), compiled(x)
    assert float(first.var()) == pytest.approx(0.02, rel=0.15)
    assert not torch.equal(first, second)


def test_torch_func_transforms_take_pytorchs_ops(schedule: NoiseSchedule, device: torch.device) -> None:
    x, noise = torch.randn(3, 2, 4, device=device), torch.randn(3, 2, 4, device=device)
    scale = (1 - exact_betas("linear")[9].item()) ** 0.5

    def fn(x: Tensor, noise: Tensor) -> Tensor:
        return ops.q_step(x, 9, schedule, noise=noise)

    torch.testing.assert_close(torch.func.vmap(fn)(x, noise), fn(x.flatten(0, 1), noise.flatten(0, 1)).view_as(x))
    grad = torch.func.grad(lambda x: fn(x, noise).sum())(x)
    torch.testing.assert_close(grad, torch.full_like(x, scale))
    _, tangent = torch.func.jvp(lambda x: fn(x, noise), (x,), (x,))
    torch.testing.assert_close(tangent, x * scale)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_autocast_keeps_the_dtype(backend: str, schedule: NoiseSchedule, device: torch.device) -> None:
    half = torch.float16 if device.type == "cpu" else torch.bfloat16
    x = torch.randn(4, 16, device=device)
    with torch.autocast(device.type, dtype=half), mmfast.backend(backend):
        y32, y16 = ops.q_step(x, 3, schedule, seed=1), ops.q_step(x.to(half), 3, schedule, seed=1)
    assert (y32.dtype, y16.dtype) == (torch.float32, half)
    with mmfast.backend(backend):
        torch.testing.assert_close(y32, ops.q_step(x, 3, schedule, seed=1))


S, X = NoiseSchedule(), torch.zeros(2, 4)
BAD: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "x is a list": (([1.0], 1, S), {}, TypeError, "x must be a tensor, got list"),
    "x is integer": ((X.long(), 1, S), {}, TypeError, "x must be floating point, got torch.int64"),
    "schedule": ((X, 1, torch.ones(9)), {}, TypeError, "schedule must be a mmfast.NoiseSchedule, got Tensor"),
    "t is too large": ((X, 1000, S), {}, ValueError, "t must be from 0 to 999, got 1000"),
    "t is negative": (
        (X, torch.tensor([-1, 3]), S),
        {},
        ValueError,
        "t must be from 0 to 999, got values from -1 to 3",
    ),
    "t is a float": ((X, 1.0, S), {}, TypeError, "t must be an int or an integer tensor, got float"),
    "t's shape": ((X, torch.zeros(3, dtype=torch.int64), S), {}, ValueError, "t must have shape (2,) or (), got (3,)"),
    "noise's shape": ((X, 1, S), {"noise": X[:1]}, ValueError, "noise must have shape (2, 4), got (1, 4)"),
    "noise is a list": ((X, 1, S), {"noise": [1.0]}, TypeError, "noise must be a tensor, got list"),
    "noise and seed": ((X, 1, S), {"noise": X, "seed": 1}, ValueError, "noise and seed are both given"),
    "seed is a float": ((X, 1, S), {"seed": 1.5}, TypeError, "seed must be an int or an int64 tensor"),
    "seed's shape": (
        (X, 1, S),
        {"seed": torch.zeros(3, dtype=torch.int64)},
        ValueError,
        "seed must have shape (2,), one seed a sample, got (3,)",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what: str) -> None:
    args, kwargs, kind, message = BAD[what]
    with pytest.raises(kind, match=re.escape(f"q_step: {message}")):
        ops.q_step(*args, **kwargs)


@pytest.mark.gpu
def test_cuda_graph_and_no_sync(schedule: NoiseSchedule, device: torch.device) -> None:
    """Captured without a seed, each replay draws new noise; timesteps and seeds on the device are read there."""
    x, t = torch.zeros(64, 4, 32, 32, device=device), torch.full((64,), 999, device=device)
    graph = torch.cuda.CUDAGraph()
    with mmfast.backend("triton"):
        ops.q_step(x, t, schedule)
        with torch.cuda.graph(graph):
            y = ops.q_step(x, t, schedule)
        graph.replay()
        first = y.clone()
        graph.replay()
        assert float(first.var()) == pytest.approx(0.02, rel=0.02)
        assert not torch.equal(first, y)
        torch.cuda.set_sync_debug_mode("error")
        try:
            ops.q_step(x, t, schedule, seed=torch.arange(64).pin_memory().to(device, non_blocking=True))
        finally:
            torch.cuda.set_sync_debug_mode("default")
