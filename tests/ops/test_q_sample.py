from __future__ import annotations

import importlib
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import mmfast
from mmfast import NoiseSchedule, ops, reference
from mmfast.ops._launchers import launchers
from mmfast.reference.q_sample import cases
from tests.grading import ALL_BACKENDS, DTYPES, check_against_reference

LABELS = [case.label for case in cases(torch.float32, torch.device("cpu"), large=False)]
GPU_LABELS = [case.label for case in cases(torch.float32, torch.device("cpu"), large=True)][len(LABELS) :]
TARGETS = (None, "epsilon", "v_prediction", "sample")


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("label", [*LABELS, *(pytest.param(x, marks=pytest.mark.gpu) for x in GPU_LABELS)])
@pytest.mark.usefixtures("poisoned")
def test_matches_the_reference(label: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    case = next(c for c in cases(dtype, device, large=label in GPU_LABELS) if c.label == label)
    check_against_reference(ops.q_sample, reference.q_sample, case.args, case.kwargs, backend, dtype)


def draw(device: torch.device, batch: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Any]:
    x0 = torch.randn(batch, 3, 4, 6, device=device).to(dtype)
    return x0, torch.tensor([0, 999, 300][:batch], device=device), NoiseSchedule().to(device)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("origin", ["seed", "seeds", "noise"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.usefixtures("poisoned")
def test_every_target_and_origin_of_the_noise(
    target: str | None, origin: str, backend: str, device: torch.device
) -> None:
    x0, t, schedule = draw(device)
    options: dict[str, Any] = {
        "seed": {"seed": 11, "offset_noise": 0.2},
        "seeds": {"seed": torch.tensor([4, -1, 1 << 50], device=device)},
        "noise": {"noise": torch.randn_like(x0)},
    }[origin]
    kwargs = {**options, "target": target}
    check_against_reference(ops.q_sample, reference.q_sample, (x0, t, schedule), kwargs, backend, torch.float32)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sigma_is_right_at_every_timestep(
    beta_schedule: str, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """x_t of x_0 = 0 and noise 1 is sigma: diffusers casts alpha-bar first, and has 0 there at some timesteps."""
    schedule = NoiseSchedule(beta_schedule).to(device)
    interpreted = backend == "triton" and device.type == "cpu"  # takes a few ms a sample
    t = torch.tensor([*range(8), 50, 300, 700, 950, 999] if interpreted else range(1000), device=device)
    zero, one = (torch.full((len(t), 2), value, device=device, dtype=dtype) for value in (0.0, 1.0))
    exact = schedule.alphas_cumprod_double[t + 1, None]
    eps = {torch.float32: 4e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    with mmfast.backend(backend):
        sigma = ops.q_sample(zero, t, schedule, noise=one).double()
        signal = ops.q_sample(one, t, schedule, noise=zero).double()
    assert ((sigma / (1 - exact).sqrt() - 1).abs() <= eps).all()
    assert ((signal - exact.sqrt()).abs() <= eps * exact.sqrt() + 6e-8).all()  # float16 ends at 6e-8


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.usefixtures("poisoned")
def test_noise_is_that_of_noise_like(backend: str, device: torch.device) -> None:
    x0, t, schedule = draw(device)
    with mmfast.backend(backend):
        _, epsilon = ops.q_sample(x0, t, schedule, seed=3, target="epsilon", offset_noise=0.3)
        torch.testing.assert_close(epsilon, ops.noise_like(x0, 3, offset_noise=0.3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.usefixtures("poisoned")
def test_layout_is_kept(last: bool, backend: str, device: torch.device) -> None:
    x0, t, schedule = draw(device)
    noise = torch.randn_like(x0)
    x = x0.contiguous(memory_format=torch.channels_last) if last else x0.transpose(2, 3).contiguous().transpose(2, 3)
    for options in ({"seed": 5}, {"noise": noise}):
        with mmfast.backend(backend):
            found = ops.q_sample(x, t, schedule, target="v_prediction", **options)
            wanted = ops.q_sample(x0, t, schedule, target="v_prediction", **options)
        for value, plain in zip(found, wanted, strict=True):
            assert value.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
            torch.testing.assert_close(value, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", [None, *ALL_BACKENDS])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
def test_timesteps_of_any_kind(dtype: torch.dtype, backend: str | None, device: torch.device) -> None:
    x0, _, schedule = draw(device)
    with mmfast.backend(backend):
        wanted = ops.q_sample(x0, 200, schedule, seed=1)
        for t in (
            torch.tensor(200, device=device).to(dtype),
            torch.full((3,), 200, device=device).to(dtype),
            torch.full((6,), 200, device=device).to(dtype)[::2],
            torch.full((3,), 200).to(dtype),
        ):
            assert torch.equal(ops.q_sample(x0, t, schedule, seed=1), wanted)


@pytest.mark.parametrize("backend", ALL_BACKENDS[1:])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_out_of_range_is_nan_in_a_kernel(layout: torch.memory_format, backend: str, device: torch.device) -> None:
    """On a GPU nobody can look at the timesteps without waiting: these samples become NaN, the others are right."""
    kernels = launchers(backend, "q_sample")
    x0 = torch.randn(5, 3, 4, 4, device=device).contiguous(memory_format=layout)
    schedule = NoiseSchedule().to(device)
    t = torch.tensor([-1, 5, 1000, 1 << 40, -(1 << 40)], device=device)
    y, v = kernels.q_sample_forward(x0, t, schedule.alpha_table, None, None, 1, target="v_prediction")
    dx, _ = kernels.q_sample_backward(x0, None, t, schedule.alpha_table)
    for value in (y, v, dx):
        assert value is not None
        assert value[[0, 2, 3, 4]].isnan().all()
        assert value[1].isfinite().all()


def test_out_of_range_is_nan_where_pytorch_serves() -> None:
    schedule = NoiseSchedule()
    t = torch.tensor([-1, 5, 1000])
    y, _ = torch.ops.mmfast.q_sample(torch.ones(3, 2), t, schedule.alpha_table, None, None, 1, None, 0.0)
    assert y.isnan().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("backend", [None, *ALL_BACKENDS])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.usefixtures("poisoned")
def test_gradients(target: str | None, backend: str | None, device: torch.device) -> None:
    """Of x_0 and given noise, from each output alone and from both, with a gradient of stride 0."""
    x0, t, schedule = draw(device)
    noise = torch.randn_like(x0)

    def gradients(fn: Any, which: int) -> tuple[Tensor, ...]:
        inputs = (x0.clone().requires_grad_(), noise.clone().requires_grad_())
        found = fn(inputs[0], t, schedule, noise=inputs[1], target=target)
        found = found if isinstance(found, tuple) else (found,)
        value = [found[0].sum(), found[-1].square().sum(), found[0].square().sum() + found[-1].sum()][which]
        return torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)

    for which in range(3):
        with mmfast.backend(backend):
            found = gradients(ops.q_sample, which)
        for value, wanted in zip(found, gradients(reference.q_sample, which), strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.usefixtures("poisoned")
def test_saves_no_samples(backend: str, device: torch.device) -> None:
    """The op is linear: its backward needs the timesteps alone."""
    x0, t, schedule = draw(device)
    saved: list[Tensor] = []
    with mmfast.backend(None if backend == "torch" else backend):
        if backend == "torch":
            y, _ = torch.ops.mmfast.q_sample(x0.requires_grad_(), t, schedule.alpha_table, None, None, 1, None, 0.0)
        else:
            with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
                y = ops.q_sample(x0.requires_grad_(), t, schedule, seed=1)
            assert max(x.numel() for x in saved) <= schedule.alpha_table.numel()
        (grad,) = torch.autograd.grad(y.sum(), x0)
    exact = schedule.alphas_cumprod_double[t + 1].sqrt().float()
    torch.testing.assert_close(grad, exact.view(-1, 1, 1, 1).expand_as(grad))


@pytest.mark.parametrize("backend", [None, "torch"])
def test_gradcheck(backend: str | None) -> None:
    x0, t, schedule = draw(torch.device("cpu"))
    inputs = (x0.double()[:2, :1].clone().requires_grad_(), torch.randn(2, 1, 4, 6).double().requires_grad_())

    def fn(x0: Tensor, noise: Tensor) -> Any:
        return ops.q_sample(x0, t[:2], schedule, noise=noise, target="v_prediction")

    with mmfast.backend(backend):
        assert torch.autograd.gradcheck(fn, inputs)
        assert torch.autograd.gradgradcheck(fn, inputs)


@pytest.mark.parametrize("backend", ALL_BACKENDS[1:])
def test_differentiable_twice(backend: str, device: torch.device) -> None:
    x0, t, schedule = draw(device)
    x0.requires_grad_()

    def penalty(fn: Any) -> Tensor:
        (grad,) = torch.autograd.grad(fn(x0, t, schedule, seed=2).square().sum(), x0, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x0)[0]

    with mmfast.backend(backend):
        found = penalty(ops.q_sample)
    torch.testing.assert_close(found, penalty(reference.q_sample), rtol=1e-5, atol=1e-5)


def test_opcheck_and_compile() -> None:
    x0, t, schedule = draw(torch.device("cpu"))
    table, op = schedule.alpha_table, torch.ops.mmfast.q_sample.default
    opcheck(op, (x0.clone().requires_grad_(), t, table, None, None, 1, "v_prediction", 0.1))
    opcheck(op, (x0, t, table, x0.clone(), None, 0, None, 0.0))
    opcheck(op, (x0.half(), t, table, None, torch.arange(3), 0, "epsilon", 0.0))
    opcheck(torch.ops.mmfast.q_sample_backward.default, (x0, x0.clone(), t, table, "v_prediction", [True, True]))

    def fn(x0: Tensor, t: Tensor, seed: int) -> Any:
        return ops.q_sample(x0, t, schedule, seed=seed, target="v_prediction")

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for seed in (1, 2):
        leaves = [x0.clone().requires_grad_() for _ in range(2)]
        results = [f(x, t, seed) for f, x in zip((compiled, fn), leaves, strict=True)]
        for found, wanted in zip(*results, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
        grads = [torch.autograd.grad(y.sum() + 2 * v.sum(), x)[0] for (y, v), x in zip(results, leaves, strict=True)]
        torch.testing.assert_close(*grads)


def test_transforms() -> None:
    """grad and vmap with given noise, as of the reference."""
    x0, t, schedule = draw(torch.device("cpu"))
    noise = torch.randn_like(x0)

    def loss(fn: Any) -> Any:
        return lambda x: fn(x, t, schedule, noise=noise).square().sum()

    found, wanted = (torch.func.grad(loss(fn))(x0) for fn in (ops.q_sample, reference.q_sample))
    torch.testing.assert_close(found, wanted)
    batched = torch.stack((x0, 2 * x0))
    found, wanted = (
        torch.func.vmap(lambda x, fn=fn: fn(x, t, schedule, noise=noise))(batched)
        for fn in (ops.q_sample, reference.q_sample)
    )
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_autocast_changes_nothing(backend: str, device: torch.device) -> None:
    x0, t, schedule = draw(device)
    with mmfast.backend(backend):
        wanted = ops.q_sample(x0, t, schedule, seed=1)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            assert torch.equal(ops.q_sample(x0, t, schedule, seed=1), wanted)


def test_without_a_seed_on_a_cpu_it_is_diffusers_noise() -> None:
    """The same numbers as torch.randn_like, so that a seeded script's noise stays what it was."""
    x0, t, schedule = draw(torch.device("cpu"))
    torch.manual_seed(4)
    found = ops.q_sample(x0, t, schedule)
    torch.manual_seed(4)
    torch.testing.assert_close(found, ops.q_sample(x0, t, schedule, noise=torch.randn_like(x0)))


@pytest.mark.parametrize("backend", [None, *ALL_BACKENDS])
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0)], ids=str)
def test_empty(shape: tuple[int, ...], backend: str | None, device: torch.device) -> None:
    schedule = NoiseSchedule().to(device)
    x0 = torch.empty(shape, device=device, requires_grad=True)
    with mmfast.backend(backend):
        y, v = ops.q_sample(x0, torch.zeros(shape[0], dtype=torch.long), schedule, seed=1, target="v_prediction")
        (grad,) = torch.autograd.grad(y.sum() + v.sum(), x0)
    assert y.shape == v.shape == grad.shape == shape


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_nan_and_infinity_stay_where_they_are(backend: str, device: torch.device) -> None:
    x0, t, schedule = draw(device)
    x0[1, 2, 3, 4], x0[0, 0, 0, 0] = float("nan"), float("inf")
    with mmfast.backend(backend):
        y = ops.q_sample(x0, t, schedule, seed=1)
    assert y.isnan().nonzero().tolist() == [[1, 2, 3, 4]]
    assert y.isinf().nonzero().tolist() == [[0, 0, 0, 0]]


@pytest.mark.gpu
def test_one_launch_and_no_wait(device: torch.device) -> None:
    x0, t, schedule = draw(device)
    ops.q_sample(x0, t, schedule, seed=1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            ops.q_sample(x0, t, schedule, seed=1, target="v_prediction")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum(event.count for event in profile.key_averages()) == 1


def call(x0: Tensor, *args: Any, **kwargs: Any) -> None:
    schedule = kwargs.pop("schedule", NoiseSchedule())
    ops.q_sample(x0, *(args or (0,)), schedule, **{"seed": 1, **kwargs})


@pytest.mark.parametrize(
    ("error", "message", "wrong"),
    [
        (ValueError, "t must be from 0 to 999, got 1000", lambda x: call(x, 1000)),
        (ValueError, "t must be from 0 to 999, got -1", lambda x: call(x, -1)),
        (
            ValueError,
            "t must be from 0 to 999, got values from -3 to 1000",
            lambda x: call(x, torch.tensor([1000, -3])),
        ),
        (ValueError, "t must have shape (2,) or (), got (3,)", lambda x: call(x, torch.arange(3))),
        (TypeError, "t must be an integer tensor, got torch.float32", lambda x: call(x, torch.zeros(2))),
        (TypeError, "t must be an int or an integer tensor, got float", lambda x: call(x, 1.0)),
        (TypeError, "schedule must be a mmfast.NoiseSchedule, got dict", lambda x: call(x, schedule={})),
        (
            ValueError,
            "schedule must be on cpu like the samples, got meta",
            lambda x: call(x, schedule=NoiseSchedule().to("meta")),
        ),
        (ValueError, "target must be None or one of epsilon, v_prediction, sample", lambda x: call(x, target="eps")),
        (ValueError, "noise must have shape (2, 3), got (2, 4)", lambda x: call(x, seed=None, noise=torch.ones(2, 4))),
        (TypeError, "noise must be a tensor, got float", lambda x: call(x, seed=None, noise=1.0)),
        (ValueError, "noise is given: it takes the place of seed and offset_noise", lambda x: call(x, noise=x)),
        (
            TypeError,
            "seed must be an int or an int64 tensor of one seed a sample, got str",
            lambda x: call(x, seed="1"),
        ),
        (TypeError, "x0 must be floating point, got torch.int64", lambda x: call(x.long())),
        (ValueError, "x0 must have at least 1 dimension, got 0", lambda x: call(x[0, 0])),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors(error: type[Exception], message: str, wrong: Any) -> None:
    with pytest.raises(error, match=re.escape(f"q_sample: {message}")):
        wrong(torch.zeros(2, 3))


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_large_16_bit_samples_on_a_cpu(last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cast to float32 in pieces: the same numbers, with a rest of samples at the end."""
    x0, _, schedule = draw(torch.device("cpu"), dtype=torch.bfloat16)
    x0 = x0.repeat(3, 1, 1, 1)[:7].contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    t, noise = torch.arange(7) * 140, torch.randn(7, 3, 4, 6)
    wanted = ops.q_sample(x0, t, schedule, noise=noise, target="v_prediction")
    module: Any = importlib.import_module("mmfast.ops.q_sample")
    monkeypatch.setattr(module, "CACHED", 4 * 2 * x0[0].numel())  # pieces of two samples
    with torch.no_grad():
        found = ops.q_sample(x0, t, schedule, noise=noise, target="v_prediction")
    for value, whole in zip(found, wanted, strict=True):
        assert torch.equal(value, whole)
        assert value.stride() == x0.stride()
