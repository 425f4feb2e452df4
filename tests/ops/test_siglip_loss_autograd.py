"""`siglip_loss` as a part of PyTorch: derivatives, transforms, compilation, memory; who serves; what it refuses."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import mmfast
from mmfast import ops, reference
from mmfast.ops import _siglip_loss_torch as chunked
from tests.grading import BACKENDS
from tests.ops.test_siglip_loss import SERVED, close, draw, gradients

op: Any = importlib.import_module("mmfast.ops.siglip_loss")  # the name is also the function's


@pytest.mark.parametrize("backend", [None, "torch"])
def test_gradcheck(backend: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "LEAST_ROWS", 2)
    monkeypatch.setattr(chunked, "CHUNK", {"cpu": 1})
    inputs = [x.detach().double().requires_grad_() for x in draw(5, width=4)]
    labels = torch.arange(5) // 2
    for kwargs in ({}, {"normalize": True}, {"image_ids": labels, "text_ids": labels, "normalize": True}):

        def fn(*args: Tensor, kwargs: Any = kwargs) -> Tensor:
            return ops.siglip_loss(*args, **kwargs)

        with mmfast.backend(backend):
            assert torch.autograd.gradcheck(fn, inputs)
            assert torch.autograd.gradgradcheck(fn, inputs)


@pytest.mark.parametrize("backend", SERVED)
def test_differentiable_twice(backend: str | None, device: torch.device) -> None:
    inputs = draw(6, device=device)

    def penalty(fn: Any) -> list[Tensor]:
        grads = torch.autograd.grad(fn(*inputs, normalize=True).sin(), inputs, create_graph=True)
        return gradients(sum(g.square().sum() for g in grads), inputs)

    with mmfast.backend(backend):
        found = penalty(ops.siglip_loss)
    close(found, penalty(reference.siglip_loss), atol=1e-5)


@pytest.mark.parametrize("ids", [False, True], ids=["diagonal", "ids"])
@pytest.mark.parametrize("backend", [None, "torch"])
def test_transforms(backend: str | None, ids: bool) -> None:
    """grad, vmap over batches, and forward mode, as of the reference."""
    image, text, scale, bias = (x.detach() for x in draw(4, width=6))
    images, texts = torch.randn(2, 3, 4, 6)
    labels = torch.arange(4) // 2
    kwargs = {"image_ids": labels, "text_ids": labels} if ids else {}
    results = []
    for fn in (ops.siglip_loss, reference.siglip_loss):

        def loss(*args: Tensor, fn: Any = fn) -> Tensor:
            return fn(*args, **kwargs)

        with mmfast.backend(backend):
            found = [*torch.func.grad(loss, (0, 1, 2, 3))(image, text, scale, bias)]
            found.append(torch.func.vmap(loss, (0, 0, None, None))(images, texts, scale, bias))
            found.append(torch.func.vmap(torch.func.grad(loss), (0, 0, None, None))(images, texts, scale, bias))
            found += torch.func.jvp(loss, (image, text, scale, bias), (text, image, bias, scale))
        results.append(found)
    close(*results, atol=1e-5)


@pytest.mark.triton
def test_transforms_refuse_a_forced_kernel(device: torch.device) -> None:
    inputs = [x.detach() for x in draw(4, device=device)]
    with mmfast.backend("triton"), pytest.raises(mmfast.BackendError, match=r"siglip_loss: .*torch\.func"):
        torch.func.grad(ops.siglip_loss)(*inputs)


def saved_bytes(batch: int, backend: str, device: torch.device) -> int:
    kept: dict[int, int] = {}

    def count(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    inputs = [x.detach().half().requires_grad_() for x in draw(batch, width=8, device=device)[:2]]
    with mmfast.backend(backend), torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        ops.siglip_loss(*inputs, 10.0, -10.0, normalize=True)
    return sum(kept.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_saved_bytes_are_linear_in_the_batch(backend: str, device: torch.device) -> None:
    """The features themselves, and their gradients in float32: 2 x (2 + 4) bytes a value."""
    sizes = [saved_bytes(batch, backend, device) for batch in (32, 64, 96)]
    assert all(size <= 12 * 8 * batch + 64 for size, batch in zip(sizes, (32, 64, 96), strict=True))
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0] == 12 * 8 * 32


class Largest(TorchDispatchMode):
    """The largest tensor that any op inside returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def test_the_matrix_never_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK", {"cpu": 1})
    batch = 1100  # more than SMALL
    inputs = draw(batch, width=8)
    largest = Largest()
    monkeypatch.setattr(op, "_siglip_loss_forward", under(op._siglip_loss_forward, largest))
    loss = ops.siglip_loss(*inputs)
    found = gradients(loss, inputs)
    assert 0 < largest.numel <= 3 * chunked.LEAST_ROWS * batch < batch * batch / 4
    expected = reference.siglip_loss(*inputs)
    close([loss, *found], [expected, *gradients(expected, inputs)])


def under(fn: Any, mode: TorchDispatchMode) -> Any:
    """`fn`'s implementation with every op in it seen by the mode, which does not look into a registered op."""

    def call(*args: Any) -> Any:
        with mode:
            return op._forward(*args)

    assert fn is not None
    return call


def test_who_serves() -> None:
    """Few logits: PyTorch's ops on the matrix; more: chunks; and a float32 kernel is not the choice on a GPU."""
    inputs = [x.detach() for x in draw(8)]
    (choice,) = mmfast.explain(ops.siglip_loss, *inputs)
    assert (choice.backend, choice.reason) == ("torch", "triton: 8 x 8 logits are few")
    many = [torch.randn(1100, 4) for _ in range(2)]
    (choice,) = mmfast.explain(ops.siglip_loss, *many, 1.0, 0.0)
    assert choice.backend == "torch"
    assert "CPU tensor" in choice.reason


def op_arguments(device: torch.device) -> list[tuple[str, tuple]]:
    leaf = draw(6, width=8, device=device)
    plain = [x.detach() for x in leaf]
    labels = torch.arange(6, device=device) // 2
    f32, f16 = torch.float32, torch.float16
    halves = [x.detach().half().requires_grad_() for x in leaf[:2]]
    kept = [torch.randn(6, 8, device=device), torch.empty(0, device=device), *torch.randn(2, device=device)]
    return [
        ("siglip_loss", (*leaf, None, None, False, False, f32, "", 1.0)),
        ("siglip_loss", (*leaf, labels, labels, True, True, f32, "", 2.0)),
        ("siglip_loss", (*halves, *leaf[2:], None, None, True, True, f16, "", 1.0)),
        ("siglip_loss", (plain[0], *leaf[1:], None, None, False, False, f32, "", 1.0)),
        ("siglip_loss", (*plain, None, None, False, True, f32, "", 1.0)),
        ("siglip_loss_forward", (*plain, None, None, True, True, f32, "", [True, True, True, True])),
        ("siglip_loss_forward", (*plain, labels, labels, False, False, f32, "", [False, True, False, True])),
        ("siglip_loss_backward", (plain[2], plain[3], *kept, 2.0, f16, f32)),
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index", range(8))
def test_opcheck(index: int, backend: str, device: torch.device) -> None:
    name, args = op_arguments(device)[index]
    with mmfast.backend(backend):
        opcheck(getattr(torch.ops.mmfast, name).default, args)


@pytest.mark.parametrize(
    ("compiler", "backend", "half"),
    [
        ("aot_eager", None, False),
        ("aot_eager", "torch", True),
        pytest.param("aot_eager", "triton", True, marks=pytest.mark.triton),
        pytest.param("inductor", "torch", False, marks=pytest.mark.slow),
    ],
)
def test_compiled_equals_eager(compiler: str, backend: str | None, half: bool, device: torch.device) -> None:
    """Full graph, forward and backward, metrics too, then another batch size under dynamic shapes."""

    def fn(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        loss, metrics = ops.siglip_loss(image * 2, text, scale.exp(), bias, normalize=True, return_metrics=True)
        return loss, metrics["positive_loss"]

    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, backend=compiler, dynamic=True)
    with mmfast.backend(backend):
        for batch in (5, 9):
            inputs = [x.detach() for x in draw(batch, device=device)]
            inputs[2] = inputs[2].log()
            inputs[:2] = [x.half() for x in inputs[:2]] if half else inputs[:2]
            results = []
            for call in (fn, compiled):
                leaves = [x.clone().requires_grad_() for x in inputs]
                loss, metric = call(*leaves)
                results.append([loss, metric, *gradients(loss, leaves)])
            close(*results, rtol=2e-3 if half else 1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", SERVED)
def test_autocast(backend: str | None, device: torch.device) -> None:
    """Products in autocast's dtype (PyTorch's ops on few logits in float32), a float32 loss, gradients in x's dtype."""
    inputs = draw(33, device=device)
    half = torch.float16 if device.type == "cpu" else torch.bfloat16
    with torch.autocast(device.type, dtype=half), mmfast.backend(backend):
        loss = ops.siglip_loss(*inputs)
        mixed = ops.siglip_loss(inputs[0], inputs[1].to(half), *inputs[2:])
        found = gradients(loss, inputs)
    assert loss.dtype == mixed.dtype == torch.float32
    assert [x.dtype for x in found] == [torch.float32] * 4
    expected = reference.siglip_loss(*inputs)
    close([loss, mixed], [expected] * 2, rtol=1e-2)
    for got, want in zip(found, gradients(expected, inputs), strict=True):
        assert float((got - want).norm() / want.norm()) < 2e-3
    if backend == "triton":
        assert not torch.equal(loss, expected)


def test_float64_stays(device: torch.device) -> None:
    inputs = draw(5, device=device, dtype=torch.float64)
    for backend in (None, "torch"):
        with mmfast.backend(backend):
            loss = ops.siglip_loss(*inputs)
        assert loss.dtype == torch.float64
        torch.testing.assert_close(loss, reference.siglip_loss(*inputs), rtol=1e-12, atol=1e-12)


X = torch.zeros(3, 4)
IDS = torch.arange(3)
WRONG: dict[str, tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = {
    "no tensor": (TypeError, "siglip_loss: image_features must be a tensor, got list", ([1.0], X, 1.0, 0.0), {}),
    "three dimensions": (ValueError, r"must have shape \(B, D\), got \(1, 3, 4\)", (X[None], X, 1.0, 0.0), {}),
    "widths": (ValueError, "text_features must have 4 columns like image_features, got 2", (X, X[:, :2], 1.0, 0.0), {}),
    "dtypes": (TypeError, "text_features must be torch.float32", (X, X.half(), 1.0, 0.0), {}),
    "no ids": (ValueError, "siglip_loss: 3 images and 2 texts need image_ids and text_ids", (X, X[:2], 1.0, 0.0), {}),
    "ids alone": (ValueError, "text_ids must be given beside image_ids", (X, X, 1.0, 0.0), {"image_ids": IDS}),
    "float ids": (
        TypeError,
        "image_ids must be a tensor of integers",
        (X, X, 1.0, 0.0),
        {"image_ids": X[:, 0], "text_ids": IDS},
    ),
    "scale": (ValueError, r"logit_scale must have shape \(\) or \(1,\), got \(2,\)", (X, X, torch.ones(2), 0.0), {}),
    "bias": (TypeError, "logit_bias must be a number or a tensor, got str", (X, X, 1.0, "0"), {}),
    "reduction": (
        ValueError,
        "reduction must be one of mean, sum, got 'none'",
        (X, X, 1.0, 0.0),
        {"reduction": "none"},
    ),
    "grad_reduction": (ValueError, "must be one of ddp_mean, sum", (X, X, 1.0, 0.0), {"grad_reduction": "mean"}),
    "group": (TypeError, "group: expected a torch.distributed process group", (X, X, 1.0, 0.0), {"group": 3.0}),
}


@pytest.mark.parametrize("name", WRONG)
def test_says_what_is_wrong(name: str) -> None:
    kind, message, args, kwargs = WRONG[name]
    with pytest.raises(kind, match=message):
        ops.siglip_loss(*args, **kwargs)


def test_cost() -> None:
    x = torch.empty(100, 8, dtype=torch.bfloat16)
    unit = 2 * 100 * 100 * 8
    assert op.cost(x, x) == {"flops": unit, "bytes": 2 * 1600}
    assert op.cost(x, x, backward=True) == {"flops": 2 * unit, "bytes": 2 * 1600}


@pytest.mark.gpu
@pytest.mark.parametrize("ids", [False, True], ids=["diagonal", "ids"])
def test_no_host_sync_and_cuda_graph(ids: bool, device: torch.device) -> None:
    """Nothing waits for the GPU, so a step can be captured and replayed on new data."""
    inputs = [x.detach().bfloat16().requires_grad_() for x in draw(1500, width=64, device=device)[:2]]
    scalars = [torch.tensor(value, device=device, requires_grad=True) for value in (10.0, -10.0)]
    labels = torch.arange(1500, device=device) // 2
    kwargs = {"image_ids": labels, "text_ids": labels} if ids else {}

    def step() -> tuple[Tensor, ...]:
        loss = ops.siglip_loss(*inputs, *scalars, **kwargs)
        return loss, *torch.autograd.grad(loss, [*inputs, *scalars])

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        inputs[0].copy_(inputs[0].flip(0))
    graph.replay()
    close(captured, step(), rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [262144])
def test_a_batch_whose_matrix_would_not_fit(batch: int, device: torch.device) -> None:
    """262144 pairs in less than 3 GB, where the matrix alone takes 275 GB in float32."""
    inputs = [F.normalize(torch.randn(batch, 512, device=device), dim=-1).bfloat16().requires_grad_() for _ in range(2)]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = ops.siglip_loss(*inputs, 10.0, -10.0)
    found = torch.autograd.grad(loss, inputs)
    assert torch.cuda.max_memory_allocated() - before < 3 << 30
    # Random directions: logits are -10 + N(0, 100 / 512), of which softplus is nearly the exponential.
    wanted = batch * math.exp(-10 + 50 / 512)
    assert abs(loss.item() - 10 - wanted) < 0.05 * wanted + 0.1
    assert all(x.isfinite().all() for x in found)
