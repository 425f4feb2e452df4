"""`noise_mse` under autograd's other modes, compilers and transforms; its errors; and what only a GPU shows."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

import mmfast
from mmfast import ops, reference
from mmfast.noise_schedule import NoiseSchedule
from tests.grading import ALL_BACKENDS, BACKENDS, outputs_and_gradients

TARGETS = ("epsilon", "v_prediction", "sample")
SHAPE = (2, 3, 4, 5)


@pytest.fixture
def schedule(device: torch.device) -> NoiseSchedule:
    return NoiseSchedule().to(device)


@pytest.fixture
def others(schedule: NoiseSchedule, device: torch.device) -> dict[str, Any]:
    t = torch.tensor([40, 700], device=device)
    return {"x0": torch.randn(SHAPE, device=device), "t": t, "schedule": schedule, "snr_gamma": 5.0}


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("target", TARGETS)
def test_differentiable_twice(target: str, backend: str, others: dict[str, Any], device: torch.device) -> None:
    """A gradient penalty: backward of a backward made with create_graph=True."""
    prediction = torch.randn(SHAPE, device=device, requires_grad=True)
    weight = torch.rand(2, device=device, requires_grad=True)

    def penalty(fn: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        loss = fn(prediction, 1, target=target, weight=weight, **others)
        grads = torch.autograd.grad(loss.sin(), (prediction, weight), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), (prediction, weight))

    with mmfast.backend(backend):
        found = penalty(ops.noise_mse)
    for got, want in zip(found, penalty(reference.noise_mse), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("target", TARGETS)
def test_formulas_in_float64(target: str, reduction: str) -> None:
    schedule = NoiseSchedule(rescale_betas_zero_snr=True)
    t = torch.tensor([40, 999])
    x0, prediction = torch.randn(2, 3, 2, dtype=torch.float64), torch.randn(2, 3, 2, dtype=torch.float64)
    inputs = (prediction.requires_grad_(), torch.rand(2, dtype=torch.float64, requires_grad=True))

    def call(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        options = {"target": target, "x0": x0, "t": t, "schedule": schedule, "snr_gamma": 5.0, "reduction": reduction}
        return lambda prediction, weight: fn(prediction, 1, weight=weight, offset_noise=0.1, **options)

    for fn in (ops.noise_mse, reference.noise_mse):
        assert torch.autograd.gradcheck(call(fn), inputs)
    assert torch.autograd.gradgradcheck(call(ops.noise_mse), inputs)
    torch.testing.assert_close(call(ops.noise_mse)(*inputs), call(reference.noise_mse)(*inputs), rtol=1e-7, atol=1e-9)
    # Below the public function, which sends float64 to PyTorch's ops: the registered autograd formula.
    given = None if target == "epsilon" else x0
    rest = (None, 1, target, 5.0, 0.1, reduction)
    op = torch.ops.mmfast.noise_mse
    assert torch.autograd.gradcheck(lambda p, w: op(p, given, t, schedule.alpha_table, w, *rest), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index", range(6))
def test_opcheck(index: int, backend: str, others: dict[str, Any], device: torch.device) -> None:
    x0, t, table = others["x0"], others["t"], others["schedule"].alpha_table
    leaf = torch.randn(SHAPE, device=device, requires_grad=True)
    last = leaf.detach().to(memory_format=torch.channels_last)
    weight, seeds = torch.rand(2, device=device, requires_grad=True), torch.tensor([1, 2], device=device)
    plain = (None, None, None, None, None, 3, "epsilon", None, 0.0)
    full = (x0, t, table, weight, seeds, 0, "v_prediction", 5.0, 0.1)
    name, args = (
        ("noise_mse", (leaf, *full, "none")),
        ("noise_mse", (last, *full, "sum")),
        ("noise_mse_forward", (last, *full, "mean", True)),
        ("noise_mse_forward", (leaf.detach(), *plain, "none", False)),
        ("noise_mse_backward", (torch.ones((), device=device), last, *full, "mean")),
        ("noise_mse_backward", (torch.ones(2, device=device), leaf.detach()[:, :2], *plain, "none")),
    )[index]
    args = tuple(a.detach() if isinstance(a, Tensor) and name != "noise_mse" else a for a in args)
    with mmfast.backend(backend):
        opcheck(getattr(torch.ops.mmfast, name).default, args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_equals_eager(compiler: str, backend: str, schedule: NoiseSchedule, device: torch.device) -> None:
    def fn(prediction: Tensor, weight: Tensor, x0: Tensor, t: Tensor, seeds: Tensor) -> Tensor:
        options = {"target": "v_prediction", "x0": x0, "t": t, "schedule": schedule, "snr_gamma": 5.0}
        return ops.noise_mse(prediction * 2, seeds, weight=weight, offset_noise=0.1, **options)

    compiled = torch.compile(fn, fullgraph=True, backend=compiler, dynamic=True)
    with mmfast.backend(backend):
        for batch in (2, 3):
            t = torch.arange(batch, device=device) * 300 + 1
            prediction, x0 = torch.randn(2, batch, 3, 4, 4, device=device)
            inputs = (prediction.requires_grad_(), torch.rand(batch, device=device, requires_grad=True))
            found, wanted = (
                (y, *torch.autograd.grad(y, inputs)) for y in (f(*inputs, x0, t, t * 3) for f in (compiled, fn))
            )
            for got, want in zip(found, wanted, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_new_seed_does_not_compile_again(backend: str, device: torch.device) -> None:
    """The noise is one op to the compiler, and an int seed a number that may change."""
    graphs: list[torch.fx.GraphModule] = []

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x, seed: ops.noise_mse(x, seed), fullgraph=True, backend=compiler)
    x = torch.randn(2, 3, 4, device=device)
    with mmfast.backend(backend):
        for seed in (5, 6, 7, 2**40):
            torch.testing.assert_close(compiled(x, seed), F.mse_loss(x, ops.noise_like(x, seed)))
    assert len(graphs) <= 2
    called = [str(node.target) for node in graphs[-1].graph.nodes if node.op == "call_function"]
    assert [name for name in called if "mmfast" in name] == [
        "mmfast.noise_like.default" if backend == "torch" else "mmfast.noise_mse.default"
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_export(backend: str, device: torch.device) -> None:
    class Module(torch.nn.Module):
        def forward(self, prediction: Tensor, seeds: Tensor) -> Tensor:
            return ops.noise_mse(prediction, seeds)

    prediction, seeds = torch.randn(2, 3, 8, device=device), torch.tensor([1, 2], device=device)
    with mmfast.backend(backend):
        program = torch.export.export(Module(), (prediction, seeds))
        found = program.module()(prediction * 2, seeds + 1)
        torch.testing.assert_close(found, Module()(prediction * 2, seeds + 1))


def test_torch_func_transforms_take_pytorchs_ops(others: dict[str, Any], device: torch.device) -> None:
    prediction = torch.randn(3, *SHAPE, device=device)

    def loss(prediction: Tensor) -> Tensor:
        return ops.noise_mse(prediction, 1, target="v_prediction", **others)

    found = torch.func.vmap(torch.func.grad(loss))(prediction)
    _, tangent = torch.func.jvp(loss, (prediction[0],), (prediction[1],))
    leaf = prediction.clone().requires_grad_()
    wanted = torch.stack([torch.autograd.grad(loss(p), leaf)[0][i] for i, p in enumerate(leaf)])
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(tangent, (wanted[0] * prediction[1]).sum())


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_autocast_changes_nothing(backend: str, others: dict[str, Any], device: torch.device) -> None:
    """The loss is float32 for 16-bit predictions and not cast for float32 ones; gradients neither."""
    half = torch.float16 if device.type == "cpu" else torch.bfloat16
    for dtype in (half, torch.float32):
        prediction = torch.randn(SHAPE, device=device).to(dtype)
        with mmfast.backend(backend):
            plain = outputs_and_gradients(
                lambda x: ops.noise_mse(x, 1, target="v_prediction", **others), (prediction,), {}
            )
            with torch.autocast(device.type, dtype=half):
                cast = outputs_and_gradients(
                    lambda x: ops.noise_mse(x, 1, target="v_prediction", **others), (prediction,), {}
                )
        assert [x.dtype for x in cast] == [torch.float32, dtype]
        for got, want in zip(cast, plain, strict=True):
            torch.testing.assert_close(got, want)


X, S = torch.zeros(2, 4), NoiseSchedule()
T = torch.zeros(2, dtype=torch.int64)
V: dict[str, Any] = {"target": "v_prediction", "x0": X, "t": T, "schedule": S}
BAD: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "prediction is a list": (([1.0], 1), {}, TypeError, "prediction must be a tensor, got list"),
    "prediction is integer": ((T, 1), {}, TypeError, "prediction must be floating point, got torch.int64"),
    "prediction is a scalar": (
        (torch.zeros(()), 1),
        {},
        ValueError,
        "prediction must have at least 1 dimension, got 0",
    ),
    "seed is None": ((X, None), {}, TypeError, "seed must be an int or an int64 tensor"),
    "seed is a float": ((X, 1.5), {}, TypeError, "seed must be an int or an int64 tensor"),
    "seed's dtype": ((X, T.int()), {}, TypeError, "seed must be an int or an int64 tensor, got torch.int32"),
    "seed's shape": ((X, T[:1]), {}, ValueError, "seed must have shape (2,), one seed a sample, got (1,)"),
    "seed is too large": ((X, 1 << 64), {}, ValueError, "seed must fit in 64 bits"),
    "target": ((X, 1), {"target": "eps"}, ValueError, "target must be one of epsilon, v_prediction, sample, got 'eps'"),
    "reduction": ((X, 1), {"reduction": "max"}, ValueError, "reduction must be one of mean, sum, none, got 'max'"),
    "no t": ((X, 1), V | {"t": None}, ValueError, "target 'v_prediction' needs t and schedule, and t is None"),
    "no schedule": ((X, 1), {"snr_gamma": 5.0, "t": T}, ValueError, "snr_gamma needs t and schedule, and schedule is"),
    "no x0": ((X, 1), V | {"x0": None}, ValueError, "target 'v_prediction' needs x0, which is None"),
    "no x0 of sample": ((X, 1), {"target": "sample"}, ValueError, "target 'sample' needs x0, which is None"),
    "x0's shape": ((X, 1), V | {"x0": X[:1]}, ValueError, "x0 must have shape (2, 4), got (1, 4)"),
    "x0's dtype": ((X, 1), V | {"x0": X.long()}, TypeError, "x0 must be floating point, got torch.int64"),
    "t is too large": (
        (X, 1),
        V | {"t": T + 1000},
        ValueError,
        "t must be from 0 to 999, got values from 1000 to 1000",
    ),
    "schedule's type": ((X, 1), V | {"schedule": 3}, TypeError, "schedule must be a mmfast.NoiseSchedule, got int"),
    "weight's shape": ((X, 1), {"weight": torch.ones(3)}, ValueError, "weight must have shape (2,), got (3,)"),
    "weight's dtype": (
        (X, 1),
        {"weight": torch.ones(2).half()},
        TypeError,
        "weight must be torch.float32, got torch.f",
    ),
    "snr_gamma is 0": ((X, 1), {"snr_gamma": 0}, ValueError, "snr_gamma must be positive and finite, got 0"),
    "snr_gamma is a string": ((X, 1), {"snr_gamma": "5"}, TypeError, "snr_gamma must be a number, got str"),
    "offset_noise is NaN": ((X, 1), {"offset_noise": float("nan")}, ValueError, "offset_noise must be finite, got nan"),
    "offset_noise of numbers": ((X[:, 0], 1), {"offset_noise": 0.1}, ValueError, "offset_noise needs samples with"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what: str) -> None:
    args, kwargs, kind, message = BAD[what]
    with pytest.raises(kind, match=re.escape(f"noise_mse: {message}")):
        ops.noise_mse(*args, **kwargs)


def test_what_a_call_does_not_need_may_be_given() -> None:
    """So that a training loop passes the same arguments for every target."""
    prediction, x0, t = torch.randn(2, 4), torch.randn(2, 4), torch.tensor([5, 7])
    wanted = ops.noise_mse(prediction, 1)
    assert torch.equal(ops.noise_mse(prediction, 1, x0=x0, t=t, schedule=S), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("target", TARGETS)
def test_peak_memory_has_no_noise(target: str, device: torch.device) -> None:
    """A forward pass allocates next to nothing, and a backward pass the gradient."""
    schedule = NoiseSchedule().to(device)
    shape = (64, 4, 128, 128)
    prediction, x0 = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
    prediction.requires_grad_()
    t = torch.randint(1000, (64,), device=device)
    size = prediction.numel() * prediction.element_size()

    def call() -> Tensor:
        return ops.noise_mse(prediction, 1, target=target, x0=x0, t=t, schedule=schedule, snr_gamma=5.0)

    call().backward()
    prediction.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = call()
    assert torch.cuda.max_memory_allocated() - before < 0.01 * size
    loss.backward()
    assert torch.cuda.max_memory_allocated() - before < 1.02 * size


@pytest.mark.gpu
def test_cuda_graph_and_no_sync(device: torch.device) -> None:
    """Captured once, both passes read new seeds, weights and timesteps at each replay, and none is looked at."""
    schedule = NoiseSchedule().to(device)
    prediction = torch.randn(16, 4, 32, 32, device=device, requires_grad=True)
    x0, weight = torch.randn_like(prediction), torch.rand(16, device=device)
    seeds, t = torch.arange(16, device=device), torch.randint(1000, (16,), device=device)
    options = {"target": "v_prediction", "x0": x0, "schedule": schedule, "snr_gamma": 5.0, "offset_noise": 0.1}

    def call() -> tuple[Tensor, Tensor]:
        loss = ops.noise_mse(prediction, seeds, t=t, weight=weight, **options)
        return loss.detach(), torch.autograd.grad(loss, prediction)[0]

    with mmfast.backend("triton"):
        call()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        seeds += 100
        t.copy_(t.flip(0))
        weight.mul_(2)
        graph.replay()
        for got, want in zip(captured, call(), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.gpu
def test_offsets_beyond_31_bits(device: torch.device) -> None:
    """2^31 elements and more: the last samples' losses and gradients are right."""
    prediction = torch.zeros(2**21 + 3, 1024, device=device, dtype=torch.bfloat16, requires_grad=True)
    seeds = torch.arange(len(prediction), device=device)
    loss = ops.noise_mse(prediction, seeds, reduction="none")
    (found,) = torch.autograd.grad(loss.sum(), prediction)
    for rows in (slice(0, 2), slice(2**21, 2**21 + 3)):
        part = torch.zeros(len(seeds[rows]), 1024, device=device, requires_grad=True)
        wanted = reference.noise_mse(part, seeds[rows], reduction="none")
        torch.testing.assert_close(loss[rows], wanted)
        (gradient,) = torch.autograd.grad(wanted.sum(), part)
        torch.testing.assert_close(found[rows].float(), gradient, rtol=1e-2, atol=1e-5)
