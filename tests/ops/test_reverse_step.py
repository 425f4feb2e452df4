"""What `ddpm_step` and `ddim_step` have in common: noise, layouts, dtypes, timesteps, backends, errors."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mmfast
from mmfast import ops, reference
from mmfast.noise_schedule import NoiseSchedule
from mmfast.reference._philox import Stream, normals
from tests.grading import ALL_BACKENDS, check_against_reference, outputs_and_gradients

OPS = ("ddpm_step", "ddim_step")
NOISY: dict[str, dict[str, Any]] = {"ddpm_step": {}, "ddim_step": {"eta": 1.0}}
"""What makes each of the two add noise."""


def call(op: str) -> Callable[..., Any]:
    return getattr(ops, op)


def draw(shape: tuple[int, ...], count: int, device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape, device=device).to(dtype) for _ in range(count)]


@pytest.fixture
def schedule(device: torch.device) -> NoiseSchedule:
    return NoiseSchedule(clip_sample=False).to(device)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.usefixtures("poisoned")
def test_noise_is_that_of_the_seed_and_the_timestep(
    op: str, backend: str, device: torch.device, schedule: NoiseSchedule
) -> None:
    """With x = m = 0 the step is its noise alone: element by element the reference's, on the reverse steps' stream."""
    x, t = torch.zeros(3, 2, 5, 3, device=device), torch.tensor([40, 999, 0], device=device)
    seeds = torch.tensor([7, -5, 2**40], device=device)
    for seed in (seeds, 2**63 + 1):
        with mmfast.backend(backend):
            found = call(op)(x, t, t - 1, x, schedule, seed=seed, **NOISY[op])
        noise = normals(3, 30, seed, Stream.REVERSE_STEP + 4 * t).view(x.shape)
        table = schedule.alphas_cumprod_double
        now, before = table[1 + t], table[t]
        deviation = ((1 - before) / (1 - now) * (1 - now / before)).sqrt().view(-1, 1, 1, 1)
        torch.testing.assert_close(found.double(), noise * deviation, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_a_sample_does_not_depend_on_its_batch(
    op: str, backend: str, device: torch.device, schedule: NoiseSchedule
) -> None:
    x, m = draw((5, 3, 4, 4), 2, device)
    t, seeds = torch.tensor([1, 500, 20, 999, 0], device=device), torch.arange(5, device=device) * 12345
    with mmfast.backend(backend):
        whole = call(op)(m, t, t - 1, x, schedule, seed=seeds, **NOISY[op])
        for part in (slice(0, 1), slice(1, 4), slice(3, 5)):
            found = call(op)(m[part], t[part], t[part] - 1, x[part], schedule, seed=seeds[part], **NOISY[op])
            if backend != "torch":
                assert torch.equal(found, whole[part])
            torch.testing.assert_close(found, whole[part], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_without_a_seed_noise_is_new_and_follows_torchs_generator(
    op: str, backend: str, device: torch.device, schedule: NoiseSchedule
) -> None:
    x = torch.zeros(2, 40, device=device)
    found = []
    with mmfast.backend(backend):
        for seed in (1, None, 1):
            if seed is not None:
                torch.manual_seed(seed)
            found.append(call(op)(x, 500, 480, x, schedule, **NOISY[op]))
    assert torch.equal(found[0], found[2])
    assert not torch.isclose(found[0], found[1]).any()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every second column": lambda x: torch.stack((x, x), -1).flatten(-2)[..., ::2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda x: x[:1].expand(x.shape),
    "first half": lambda x: torch.cat((x, x))[: len(x)],
}


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.usefixtures("poisoned")
def test_layouts(op: str, layout: str, backend: str, device: torch.device, schedule: NoiseSchedule) -> None:
    """Any strides give what contiguous tensors give; channels_last is kept, anything else becomes contiguous."""
    change = LAYOUTS[layout]
    x, m, c = draw((2, 4, 6, 3), 3, device)
    t = torch.tensor([3, 700], device=device)
    both = torch.cat((m, c))
    for seed, noise in ((5, None), (None, change(torch.randn_like(x)))):
        options = {"seed": seed, "guidance": 2.0, "duplicate": True, "return_x0": True, **NOISY[op]}
        with mmfast.backend(backend):
            given = noise if noise is None else noise.contiguous()
            plain = call(op)(both, t, t - 1, change(x).contiguous(), schedule, noise=given, **options)
            for output in (both, LAYOUTS["channels_last"](both)):
                found = call(op)(output, t, t - 1, change(x), schedule, noise=noise, **options)
                for got, want in zip(found, plain, strict=True):
                    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
                    last = layout == "channels_last"
                    assert got.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("shape", [(3,), (2, 5), (1, 1), (2, 3, 7), (2, 3, 2, 3, 5)], ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.usefixtures("poisoned")
def test_any_rank(op: str, shape: tuple[int, ...], backend: str, device: torch.device) -> None:
    x, m = draw(shape, 2, device)
    t = torch.randint(20, 1000, shape[:1], device=device)
    layouts = [x] if len(shape) < 5 else [x, x.contiguous(memory_format=torch.channels_last_3d)]
    for sample in layouts:
        args = (m, t, t - 20, sample, NoiseSchedule().to(device))
        kwargs = {"seed": 11, "return_x0": True, **NOISY[op]}
        check_against_reference(call(op), getattr(reference, op), args, kwargs, backend, torch.float32)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_duplicate_is_the_sample_twice(op: str, backend: str, device: torch.device, schedule: NoiseSchedule) -> None:
    x, u, c = draw((2, 3, 4, 5), 3, device)
    options = {"guidance": 5.0, "seed": 3, **NOISY[op]}
    with mmfast.backend(backend):
        once = call(op)(torch.cat((u, c)), 300, 280, x, schedule, **options)
        twice = call(op)(torch.cat((u, c)), 300, 280, x, schedule, duplicate=True, **options)
        again = call(op)(torch.cat((u, c)), 280, 260, twice[:2], schedule, duplicate=True, **options)
        plain = call(op)(u + 5.0 * (c - u), 300, 280, x, schedule, seed=3, **NOISY[op])
        conditional = call(op)(torch.cat((u, c)), 300, 280, x, schedule, **{**options, "guidance": 1})
        wanted = call(op)(c, 300, 280, x, schedule, seed=3, **NOISY[op])
        unguided = call(op)(c, 300, 280, x, schedule, seed=3, duplicate=True, **NOISY[op])
    assert twice.shape == again.shape == (4, 3, 4, 5)
    assert torch.equal(twice[:2], once)
    assert torch.equal(twice[2:], once)
    assert torch.equal(again[:2], again[2:])
    torch.testing.assert_close(once, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(conditional, wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(unguided, torch.cat((wanted, wanted)))


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize(("dtype", "model_dtype"), [("float16", "float32"), ("float32", "float16")], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_model_output_of_another_dtype(
    op: str, dtype: str, model_dtype: str, backend: str, device: torch.device
) -> None:
    (x,), (m,) = draw((2, 3, 4, 4), 1, device, getattr(torch, dtype)), draw((2, 3, 4, 4), 1, device)
    m, t = m.to(getattr(torch, model_dtype)), torch.tensor([40, 900], device=device)
    args, kwargs = (m, t, t - 20, x, NoiseSchedule().to(device)), {"seed": 1, "return_x0": True, **NOISY[op]}
    check_against_reference(call(op), getattr(reference, op), args, kwargs, backend, x.dtype)
    with mmfast.backend(backend):
        x_prev, x0, dm, dx = outputs_and_gradients(call(op), args, kwargs)
    assert (x_prev.dtype, x0.dtype, dx.dtype, dm.dtype) == (x.dtype, x.dtype, x.dtype, m.dtype)


@pytest.mark.parametrize("backend", ALL_BACKENDS[1:])
@pytest.mark.parametrize("op", OPS)
def test_float64_model_output_and_noise_of_a_float32_sample(
    op: str, backend: str, device: torch.device, schedule: NoiseSchedule
) -> None:
    x, m, noise = draw((2, 3, 4, 4), 3, device)
    with mmfast.backend(backend):
        found = call(op)(m.double(), 500, 480, x, schedule, noise=noise.double(), **NOISY[op])
        wanted = call(op)(m, 500, 480, x, schedule, noise=noise, **NOISY[op])
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_timesteps_of_any_kind(op: str, backend: str, device: torch.device, schedule: NoiseSchedule) -> None:
    """An int, a tensor () and tensors (B,) of every integer dtype say the same, on the device and on the CPU."""
    x, m = draw((3, 6), 2, device)
    with mmfast.backend(backend):
        wanted = call(op)(m, 120, 100, x, schedule, seed=3, **NOISY[op])
        for place in {device, torch.device("cpu")}:
            for dtype, shape in ((torch.int64, ()), (torch.uint8, ()), (torch.int32, (3,))):
                t, t_prev = (torch.full(shape, value, dtype=dtype, device=place) for value in (120, 100))
                found = call(op)(m, t, t_prev, x, schedule, seed=3, **NOISY[op])
                torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
            for dtype in (torch.int64, torch.int16, torch.int8):
                t = torch.tensor([120, 50, 120], device=place, dtype=dtype)
                mixed = call(op)(m, t, t - 20, x, schedule, seed=3, **NOISY[op])
                torch.testing.assert_close(mixed[::2], wanted[::2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("op", OPS)
def test_out_of_range_is_nan_where_it_cannot_be_looked_at(
    op: str, prediction: str, backend: str, device: torch.device, schedule: NoiseSchedule
) -> None:
    """Below the public function, whose check needs t on the CPU: as on a GPU. Gradients are NaN too."""
    x, m = (value.requires_grad_() for value in draw((6, 4), 2, device))
    t = torch.tensor([0, 1000, -1, 999, 500, 500], device=device)
    t_prev = torch.tensor([-1, 980, 5, 979, -2, 480], device=device)
    extra = ("fixed_small",) if op == "ddpm_step" else (0.5, False)
    for clip in (0.0, 1.0):
        rest = (torch.zeros_like(x), None, 0, prediction, None, clip, True, True, False)
        with mmfast.backend(backend):
            x_prev, x0 = getattr(torch.ops.mmfast, op)(m, t, t_prev, x, schedule.alpha_table, *rest, *extra)
            dm, dx = torch.autograd.grad(x_prev.sum(), (m, x))
        bad = torch.tensor([False, True, True, False, True, False], device=device)
        assert x_prev[bad].isnan().all()
        assert x_prev[~bad].isfinite().all()
        assert x0[1:3].isnan().all()
        if not clip:
            assert (dx[bad].isnan() | dm[bad].isnan()).all()
        assert dx[~bad].isfinite().all()
        assert dm[~bad].isfinite().all()


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4), (0, 5)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_empty(op: str, shape: tuple[int, ...], backend: str, device: torch.device, schedule: NoiseSchedule) -> None:
    x, m = (torch.empty(shape, device=device, requires_grad=True) for _ in range(2))
    t = torch.full(shape[:1], 5, device=device)
    with mmfast.backend(backend):
        for seed in (None, 1):
            x_prev, x0 = call(op)(m, t, t - 1, x, schedule, seed=seed, return_x0=True, clip_sample=True, **NOISY[op])
            dx, dm = torch.autograd.grad(x_prev.sum() + x0.sum(), (x, m))
        twice = call(op)(torch.cat((m, m)), t, t - 1, x, schedule, guidance=2.0, duplicate=True)
    assert x_prev.shape == x0.shape == dx.shape == dm.shape == shape
    assert twice.shape == (2 * shape[0], *shape[1:])


@pytest.mark.parametrize("op", OPS)
def test_meta_tensors_which_nothing_can_be_read_from(op: str) -> None:
    """Any read of a value (`.item()`, `.tolist()`, a comparison) raises here: as much as a sync on a GPU."""
    schedule = NoiseSchedule().to("meta")
    x, m, noise = (torch.empty(n, 3, 4, 4, device="meta") for n in (2, 4, 2))
    t = torch.empty(2, dtype=torch.int64, device="meta")
    seeds = torch.empty(2, dtype=torch.int64, device="meta")
    for options in ({"noise": noise}, {"seed": seeds}, {"seed": 5}, {}):
        for steps in ((t, t), (500, 480), (torch.tensor(500), torch.tensor(480))):
            twice = call(op)(m, *steps, x, schedule, guidance=2.0, duplicate=True, **options, **NOISY[op])
            x_prev, x0 = call(op)(m[:2], *steps, x, schedule, return_x0=True, **options, **NOISY[op])
            assert (twice.shape, x_prev.shape, x0.shape) == ((4, 3, 4, 4), x.shape, x.shape)


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_no_sync(op: str, device: torch.device, schedule: NoiseSchedule) -> None:
    x, m = draw((2, 3, 4, 4), 2, device)
    t = torch.tensor([500, 40], device=device)
    leaf = m.clone().requires_grad_()
    found = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for seed in (None, 3, torch.arange(2, device=device)):
            for steps in ((t, t - 1), (500, 480), (0, -1)):
                found += call(op)(m, *steps, x, schedule, seed=seed, clip_sample=True, return_x0=True, **NOISY[op])
                call(op)(leaf, *steps, x, schedule, seed=seed, clip_sample=True, **NOISY[op]).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(value.isfinite().all() for value in [*found, leaf.grad])


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_cuda_graph_has_new_noise_each_replay(op: str, device: torch.device, schedule: NoiseSchedule) -> None:
    x = torch.zeros(2, 4, 8, 8, device=device)
    t = torch.tensor([500, 40], device=device)
    step = lambda seed: call(op)(x, t, t - 1, x, schedule, seed=seed, **NOISY[op])  # noqa: E731
    seeds = torch.arange(2, device=device)
    wanted = step(seeds)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fresh, fixed = step(None), step(seeds)
    graph.replay()
    first = fresh.clone()
    graph.replay()
    assert not torch.equal(fresh, first)
    assert torch.equal(fixed, wanted)


@pytest.mark.parametrize("op", OPS)
def test_dynamic_thresholding_is_pytorchs(op: str) -> None:
    schedule = NoiseSchedule(thresholding=True, dynamic_thresholding_ratio=0.8, sample_max_value=2.0)
    x, m = (3 * value for value in draw((3, 2, 5, 5), 2, torch.device("cpu"), torch.float64))
    t = torch.tensor([800, 300, 50])
    args, options = (m, t, t - 20, x, schedule), {"seed": 1, "return_x0": True, **NOISY[op]}
    for got, want in zip(call(op)(*args, **options), getattr(reference, op)(*args, **options), strict=True):
        torch.testing.assert_close(got, want)
    x0 = call(op)(*args, **options)[1]
    assert x0.abs().amax((1, 2, 3)).tolist() == pytest.approx([1.0, 1.0, 1.0])
    (choice,) = mmfast.explain(call(op), *args, **options)
    assert choice.backend == "torch"
    assert "dynamic thresholding" in choice.reason
    with mmfast.backend("triton"), pytest.raises(mmfast.BackendError, match="dynamic thresholding"):
        call(op)(m.float(), t, t - 20, x.float(), schedule)


@pytest.mark.parametrize("backend", ALL_BACKENDS[1:])
@pytest.mark.parametrize("op", OPS)
def test_explains_its_backend(op: str, backend: str, device: torch.device, schedule: NoiseSchedule) -> None:
    x, m = draw((2, 3), 2, device)
    with mmfast.backend(backend):
        assert [c.backend for c in mmfast.explain(call(op), m, 500, 480, x, schedule)] == [backend]
        with pytest.raises(mmfast.BackendError, match="float64 has no kernel"):
            call(op)(m, 500, 480, x.double(), schedule)
    (choice,) = mmfast.explain(call(op), m, 500, 480, x.double(), schedule)
    assert (choice.op, choice.backend) == (op, "torch")


@pytest.mark.parametrize("op", OPS)
def test_zero_terminal_snr(op: str) -> None:
    """alpha-bar is 0 at the last timestep: epsilon says nothing there; v and the sample itself do."""
    schedule = NoiseSchedule(rescale_betas_zero_snr=True, clip_sample=False)
    x, m = draw((2, 3), 2, torch.device("cpu"))
    refusal = re.escape(
        f"{op}: prediction_type 'epsilon' says nothing where the schedule's signal-to-noise ratio is zero"
    )
    for t in (999, torch.tensor(999), torch.tensor([5, 999])):
        with pytest.raises(ValueError, match=refusal):
            call(op)(m, t, 4, x, schedule)
    for t in (998, torch.tensor([5, 998])):
        assert call(op)(m, t, 4, x, schedule, seed=1).isfinite().all()
    for prediction, x0 in (("v_prediction", -m), ("sample", m)):
        for t in (999, torch.tensor([999, 998])):
            found = call(op)(m, t, 979, x, schedule, prediction_type=prediction, return_x0=True, seed=1, **NOISY[op])
            torch.testing.assert_close(found[1][0], x0[0])
            assert found[0].isfinite().all()
    meta = NoiseSchedule(rescale_betas_zero_snr=True).to("meta")
    t = torch.empty(2, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match="cannot be looked at without waiting for it"):
        call(op)(m.to("meta"), t, t, x.to("meta"), meta)
    call(op)(m.to("meta"), 500, 480, x.to("meta"), meta)


X, M = torch.zeros(2, 4, 3, 3), torch.zeros(4, 4, 3, 3)
S = NoiseSchedule()
BAD: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "x is a list": ((X, 5, 4, [0.0], S), {}, TypeError, "x must be a tensor, got list"),
    "x is integer": ((X, 5, 4, X.long(), S), {}, TypeError, "x must be floating point, got torch.int64"),
    "x is a scalar": ((X, 5, 4, X.sum(), S), {}, ValueError, "x must have at least 1 dimension, got 0"),
    "schedule": ((X, 5, 4, X, "linear"), {}, TypeError, "schedule must be a mmfast.NoiseSchedule, got str"),
    "schedule's device": ((X, 5, 4, X, NoiseSchedule().to("meta")), {}, ValueError, "schedule must be on cpu like the"),
    "model_output is None": ((None, 5, 4, X, S), {}, TypeError, "model_output must be a tensor, got NoneType"),
    "model_output is integer": (
        (X.int(), 5, 4, X, S),
        {},
        TypeError,
        "model_output must be floating point, got torch.i",
    ),
    "model_output's shape": (
        (M, 5, 4, X, S),
        {},
        ValueError,
        "model_output must have shape (2, 4, 3, 3), got (4, 4, 3, 3)",
    ),
    "guided model_output's shape": (
        (X, 5, 4, X, S),
        {"guidance": 2.0},
        ValueError,
        "model_output must have shape (4, 4, 3, 3), cat([unconditional, conditional]) for guidance, got (2, 4, 3, 3)",
    ),
    "model_output's device": (
        (X.to("meta"), 5, 4, X, S),
        {},
        ValueError,
        "model_output must be on cpu like x, got meta",
    ),
    "t is a float": ((X, 5.0, 4, X, S), {}, TypeError, "t must be an int or an integer tensor, got float"),
    "t is too late": ((X, 1000, 4, X, S), {}, ValueError, "t must be from 0 to 999, got 1000"),
    "t is negative": ((X, -1, -1, X, S), {}, ValueError, "t must be from 0 to 999, got -1"),
    "a t of a batch": ((X, torch.tensor([5, 1000]), 4, X, S), {}, ValueError, "t must be from 0 to 999, got values"),
    "t's shape": ((X, torch.zeros(3).long(), 4, X, S), {}, ValueError, "t must have shape (2,) or (), got (3,)"),
    "t's dtype": ((X, torch.zeros(2), 4, X, S), {}, TypeError, "t must be an integer tensor, got torch.float32"),
    "t_prev is too early": ((X, 5, -2, X, S), {}, ValueError, "t_prev must be from -1 to 999, got -2"),
    "t_prev's shape": (
        (X, 5, torch.zeros(3).long(), X, S),
        {},
        ValueError,
        "t_prev must have shape (2,) or (), got (3,)",
    ),
    "t_prev is not before t": (
        (X, 5, 5, X, S),
        {"noisy": 1},
        ValueError,
        "t_prev must be before t, got t=5 and t_prev=5",
    ),
    "guidance is a string": ((M, 5, 4, X, S), {"guidance": "7"}, TypeError, "guidance must be a number, got str"),
    "guidance is NaN": ((M, 5, 4, X, S), {"guidance": float("nan")}, ValueError, "guidance must be finite, got nan"),
    "noise and seed": ((X, 5, 4, X, S), {"noise": X, "seed": 1}, ValueError, "noise and seed are both given"),
    "noise's shape": (
        (X, 5, 4, X, S),
        {"noise": M},
        ValueError,
        "noise must have shape (2, 4, 3, 3), got (4, 4, 3, 3)",
    ),
    "seed is a float": ((X, 5, 4, X, S), {"seed": 1.0}, TypeError, "seed must be an int or an int64 tensor"),
    "seed's shape": ((X, 5, 4, X, S), {"seed": torch.zeros(3).long()}, ValueError, "seed must have shape (2,)"),
    "prediction_type": (
        (X, 5, 4, X, S),
        {"prediction_type": "velocity"},
        ValueError,
        "prediction_type must be one of epsilon, sample, v_prediction, got 'velocity'",
    ),
    "clip_sample is a string": (
        (X, 5, 4, X, S),
        {"clip_sample": "1"},
        TypeError,
        "clip_sample must be None, a bool or a number, got str",
    ),
    "clip_sample is negative": (
        (X, 5, 4, X, S),
        {"clip_sample": -1.0},
        ValueError,
        "clip_sample must be positive and finite, got -1.0",
    ),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("op", OPS)
def test_bad_input(op: str, what: str) -> None:
    args, kwargs, kind, message = BAD[what]
    if "noisy" in kwargs:
        kwargs = NOISY[op]
    with pytest.raises(kind, match=re.escape(f"{op}: {message}")):
        call(op)(*args, **kwargs)
