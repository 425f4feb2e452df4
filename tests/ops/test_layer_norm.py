from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import mmfast
from mmfast import ops, reference
from mmfast.reference.layer_norm import cases
from tests.grading import (
    ALL_BACKENDS,
    ATOL,
    CUDA,
    DTYPES,
    check_against_reference,
    outputs_and_gradients,
)

KERNELS = (pytest.param("triton", marks=pytest.mark.triton), CUDA)
LABELS = [case.label for case in cases(torch.float32, torch.device("cpu"), large=False)]
GPU_LABELS = [case.label for case in cases(torch.float32, torch.device("meta"), large=True)][len(LABELS) :]


def parameters(width: int, device: torch.device, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [(torch.randn(width) * 0.5 + 1).to(device, dtype), torch.randn(width).to(device, dtype)]


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("label", [*LABELS, *(pytest.param(x, marks=pytest.mark.gpu) for x in GPU_LABELS)])
@pytest.mark.usefixtures("poisoned")
def test_matches_the_reference(label: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    case = next(c for c in cases(dtype, device, large=label in GPU_LABELS) if c.label == label)
    if backend == "cuda" and case.args[0].shape[-1] > 8192:
        with mmfast.backend("cuda"), pytest.raises(mmfast.BackendError, match="above 8192"):
            ops.layer_norm(*case.args)
        return
    check_against_reference(ops.layer_norm, reference.layer_norm, case.args, case.kwargs, backend, dtype)


@pytest.mark.triton
@pytest.mark.parametrize(
    "shape", [(50, 1000), (13, 8192), (2, 8193), pytest.param((70, 9000), marks=pytest.mark.slow)], ids=str
)
@pytest.mark.usefixtures("poisoned", "wide_sums")
def test_many_rows_and_wide_rows(shape: tuple[int, int], device: torch.device) -> None:
    """More blocks of rows than programs, the widest register-resident row, and the kernels beyond it."""
    x = torch.randn(shape, device=device) * 3 - 1
    args = (x, *parameters(shape[1], device))
    check_against_reference(ops.layer_norm, reference.layer_norm, args, {}, "triton", torch.float32)


LAYOUTS = {
    "without class token": lambda x: x[:, 1:],
    "class token": lambda x: x[:, 0],
    "every second image": lambda x: x[::2],
    "transposed tokens": lambda x: x.transpose(0, 1),
    "channels first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "slice of channels": lambda x: x[..., 4:20],
    "expanded": lambda x: x[:1].expand(3, -1, -1),
    "three strides": lambda x: x.view(2, 2, 7, 24)[:, :1, 1:].transpose(0, 2),
    "one row": lambda x: x[0, 0],
}


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("poisoned")
def test_any_strides(layout: str, backend: str, device: torch.device) -> None:
    base = torch.randn(4, 7, 24, device=device, requires_grad=True)
    weight, bias = parameters(LAYOUTS[layout](base).shape[-1], device)
    with mmfast.backend(backend):
        y = ops.layer_norm(LAYOUTS[layout](base), weight, bias)
        (found,) = torch.autograd.grad(y.square().sum(), base)
    assert y.is_contiguous()
    wanted = F.layer_norm(LAYOUTS[layout](base), weight.shape, weight, bias)
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(found, torch.autograd.grad(wanted.square().sum(), base)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.usefixtures("poisoned")
def test_gradient_of_stride_zero_and_strided_parameters(backend: str, device: torch.device) -> None:
    """`.sum().backward()` passes an expanded gradient; a parameter may be every second element of a tensor."""
    x = torch.randn(6, 24, device=device, requires_grad=True)
    weight, bias = (p.requires_grad_() for p in torch.randn(2, 48, device=device)[:, ::2])
    inputs = (x, weight, bias)
    with mmfast.backend(backend):
        found = torch.autograd.grad(ops.layer_norm(*inputs).sum(), inputs)
    wanted = torch.autograd.grad(F.layer_norm(x, (24,), weight, bias).sum(), inputs)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 1, 0)], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_only_the_gradients_asked_for(wanted: tuple[int, ...], backend: str, device: torch.device) -> None:
    inputs = [torch.randn(5, 12, device=device), *parameters(12, device)]
    for tensor, want in zip(inputs, wanted, strict=True):
        tensor.requires_grad_(bool(want))
    ys = []
    for name in (backend, "torch"):
        with mmfast.backend(name):
            y = ops.layer_norm(*inputs)
            asked = [t for t in inputs if t.requires_grad]
            ys.append(torch.autograd.grad(y.square().sum(), asked))
    for got, want in zip(*ys, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("given", ["weight", "bias", "neither"])
@pytest.mark.usefixtures("poisoned")
def test_weight_or_bias_alone(given: str, backend: str, device: torch.device) -> None:
    x = torch.randn(5, 12, device=device)
    weight, bias = parameters(12, device)
    args = (x, weight if given == "weight" else None, bias if given == "bias" else None)
    check_against_reference(ops.layer_norm, reference.layer_norm, args, {}, backend, torch.float32)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.usefixtures("poisoned")
def test_float32_parameters_of_a_16_bit_input(backend: str, device: torch.device) -> None:
    """As in mixed-precision training: the output is 16-bit, gradients of the parameters are float32."""
    x = torch.randn(9, 40, device=device).half()
    args = (x, *parameters(40, device))
    check_against_reference(ops.layer_norm, reference.layer_norm, args, {}, backend, torch.float16)
    with mmfast.backend(backend):
        y, dx, dweight, dbias = outputs_and_gradients(ops.layer_norm, args, {})
    assert (y.dtype, dx.dtype) == (torch.float16, torch.float16)
    assert (dweight.dtype, dbias.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0), (0, 9000)], ids=str)
def test_empty(shape: tuple[int, ...], backend: str, device: torch.device) -> None:
    if backend == "cuda" and shape[-1] > 8192:
        shape = (0, 8192)
    x = torch.empty(shape, device=device, requires_grad=True)
    weight, bias = (p.requires_grad_() for p in parameters(shape[-1], device))
    with mmfast.backend(backend):
        y = ops.layer_norm(x, weight, bias)
        dx, dweight, dbias = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert y.shape == dx.shape == shape
    assert not dweight.any()
    assert not dbias.any()


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("width", [12, 16, pytest.param(9000, id="wide")])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_nan_and_inf_stay_in_their_row(value: float, width: int, backend: str, device: torch.device) -> None:
    if backend == "cuda" and width > 8192:
        width = 8192
    x = torch.randn(4, width, device=device)
    x[1, 3] = value
    with mmfast.backend(backend):
        y = ops.layer_norm(x, *parameters(width, device))
    assert y[1].isnan().all()
    assert y[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("width", [60, pytest.param(8400, id="wide")])
@pytest.mark.usefixtures("wide_sums")
def test_large_mean_does_not_cancel(width: int, backend: str, device: torch.device) -> None:
    """With a mean of 100 standard deviations, E[x^2] - E[x]^2 in float32 loses four digits."""
    if backend == "cuda" and width > 8192:
        width = 8188
    x = torch.randn(8, width, device=device) + 100
    args = (x, *parameters(width, device))
    check_against_reference(ops.layer_norm, reference.layer_norm, args, {}, backend, torch.float32)


@pytest.mark.parametrize("backend", KERNELS)
def test_same_bits_twice(backend: str, device: torch.device) -> None:
    args = (torch.randn(300, 65, device=device), *parameters(65, device))
    with mmfast.backend(backend):
        first, second = (outputs_and_gradients(ops.layer_norm, args, {}) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_differentiable_twice(backend: str, device: torch.device) -> None:
    """A gradient penalty: backward of a backward made with create_graph=True."""
    inputs = [torch.randn(3, 6, device=device), *parameters(6, device)]
    for tensor in inputs:
        tensor.requires_grad_()

    def penalty(fn) -> tuple[torch.Tensor, ...]:  # type: ignore[no-untyped-def]
        grads = torch.autograd.grad(fn(*inputs).sin().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)

    with mmfast.backend(backend):
        found = penalty(ops.layer_norm)
    for got, want in zip(found, penalty(reference.layer_norm), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_formulas_in_float64() -> None:
    args = [t.double().requires_grad_() for t in (torch.randn(2, 3, 5), torch.randn(5), torch.randn(5))]
    assert torch.autograd.gradcheck(reference.layer_norm, args)
    assert torch.autograd.gradcheck(ops.layer_norm, args)
    assert torch.autograd.gradgradcheck(ops.layer_norm, args)
    # Below the public function, which sends float64 to PyTorch's op: the registered autograd formula.
    assert torch.autograd.gradcheck(lambda *a: torch.ops.mmfast.layer_norm(*a, 1e-5), args)


def test_lecture_formula() -> None:
    """(x - mu) / sqrt(sigma^2 + eps) * gamma + beta with the lecture's mu and sigma^2 = 1/d sum (x - mu)^2."""
    x, gamma, beta = torch.tensor([1.0, 2.0, 3.0, 6.0]), torch.full((4,), 2.0), torch.full((4,), 0.5)
    mu, variance = 3.0, (4 + 1 + 0 + 9) / 4
    wanted = (x - mu) / (variance + 1e-5) ** 0.5 * 2 + 0.5
    torch.testing.assert_close(ops.layer_norm(x, gamma, beta), wanted)
    torch.testing.assert_close(reference.layer_norm(x, gamma, beta), wanted)


def op_arguments(device: torch.device) -> list[tuple[str, tuple]]:
    x = torch.randn(2, 3, 8, device=device)
    weight, bias = parameters(8, device)
    mean, rstd = torch.randn(2, 3, device=device), torch.rand(2, 3, device=device)
    leaf = [t.clone().requires_grad_() for t in (x, weight, bias)]
    return [
        ("layer_norm", (*leaf, 1e-5)),
        ("layer_norm", (leaf[0], None, None, 1e-5)),
        ("layer_norm", (x[:, 1:], weight, None, 1e-5)),
        ("layer_norm_forward", (x, weight, bias, 1e-5)),
        ("layer_norm_forward", (x.transpose(0, 1), None, None, 1e-5)),
        ("layer_norm_backward", (torch.randn_like(x), x, weight, bias, mean, rstd, [True, True, True])),
        ("layer_norm_backward", (torch.randn_like(x), x, None, None, mean, rstd, [True, False, False])),
    ]


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("index", range(7))
def test_opcheck(index: int, backend: str, device: torch.device) -> None:
    name, args = op_arguments(device)[index]
    with mmfast.backend(backend):
        opcheck(getattr(torch.ops.mmfast, name).default, args)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])  # of the other ops `make test-all` runs inductor
def test_compiled_equals_eager(compiler: str, backend: str, device: torch.device) -> None:
    """Full graph, forward and backward, then another batch size under dynamic shapes."""

    def fn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return ops.layer_norm(x * 2, weight, bias, 1e-6)

    compiled = torch.compile(fn, fullgraph=True, backend=compiler, dynamic=True)
    with mmfast.backend(backend):
        for rows in (5, 9):
            args = (torch.randn(2, rows, 40, device=device), *parameters(40, device))
            eager = outputs_and_gradients(fn, args, {})
            for got, want in zip(outputs_and_gradients(compiled, args, {}), eager, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_export(backend: str, device: torch.device) -> None:
    module = mmfast.nn.LayerNorm(8).to(device)
    x = torch.randn(2, 3, 8, device=device)
    with mmfast.backend(backend):
        program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        named = [n.target.name() for n in program.graph.nodes if n.op == "call_function"]
        assert named == ["aten::layer_norm" if backend == "torch" else "mmfast::layer_norm"]
        other = torch.randn(5, 3, 8, device=device)
        torch.testing.assert_close(program.module()(other), module(other))


def test_registered_op_runs_without_a_kernel() -> None:
    """A program exported on a GPU holds `torch.ops.mmfast.layer_norm`; on a CPU, PyTorch's op serves it."""
    args = (torch.randn(4, 6, dtype=torch.bfloat16), *parameters(6, torch.device("cpu")))
    x, weight, bias = (t.clone().requires_grad_() for t in args)
    y = torch.ops.mmfast.layer_norm(x, weight, bias, 1e-5)
    found = torch.autograd.grad(y.float().square().sum(), (x, weight, bias))
    truth = outputs_and_gradients(reference.layer_norm, args, {}, torch.float64)
    assert y.dtype == found[0].dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), truth[0], rtol=1e-2, atol=1e-2)
    wanted = torch.autograd.grad(reference.layer_norm(x.double(), weight, bias).square().sum(), (x, weight, bias))
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_autocast_keeps_the_dtype(backend: str, device: torch.device) -> None:
    """PyTorch's own op promotes to float32 under autocast on a GPU; this one keeps the input's dtype."""
    half = torch.float16 if device.type == "cpu" else torch.bfloat16
    x = torch.randn(4, 16, device=device)
    weight, bias = parameters(16, device)
    with torch.autocast(device.type, dtype=half), mmfast.backend(backend):
        y16 = ops.layer_norm(x.to(half), weight, bias)
        y32 = ops.layer_norm(x, weight, bias)
        op16 = torch.ops.mmfast.layer_norm(x.to(half), weight, bias, 1e-5)
    assert (y16.dtype, op16.dtype, y32.dtype) == (half, half, torch.float32)
    wanted = F.layer_norm(x.to(half).float(), (16,), weight, bias)
    torch.testing.assert_close(y16.float(), wanted, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(y32, F.layer_norm(x, (16,), weight, bias))


def test_torch_func_transforms_take_pytorchs_op(device: torch.device) -> None:
    x = torch.randn(3, 4, 8, device=device)
    weight, bias = parameters(8, device)
    grad = torch.func.grad(lambda x: ops.layer_norm(x, weight, bias).square().sum())(x)
    per_sample = torch.func.vmap(torch.func.grad(lambda x: ops.layer_norm(x, weight, bias).square().sum()))(x)
    torch.testing.assert_close(per_sample, grad)
    _, tangent = torch.func.jvp(lambda x: ops.layer_norm(x, weight, bias), (x,), (x,))
    _, wanted = torch.func.jvp(lambda x: F.layer_norm(x, (8,), weight, bias), (x,), (x,))
    torch.testing.assert_close(tangent, wanted)


X = torch.zeros(2, 4)
BAD = {
    "x is a list": (([1.0],), TypeError, "x must be a tensor, got list"),
    "x is integer": ((torch.zeros(2, 4, dtype=torch.int64),), TypeError, "x must be floating point, got torch.int64"),
    "x is complex": ((torch.zeros(4, dtype=torch.cfloat),), TypeError, "x must be floating point"),
    "x is a scalar": ((torch.zeros(()),), ValueError, "x must have at least 1 dimension, got 0"),
    "weight's shape": ((X, torch.ones(3)), ValueError, "weight must have shape (4,), got (3,)"),
    "weight's rank": ((X, torch.ones(1, 4)), ValueError, "weight must have shape (4,), got (1, 4)"),
    "bias's shape": ((X, torch.ones(4), torch.ones(5)), ValueError, "bias must have shape (4,), got (5,)"),
    "weight's dtype": ((X, torch.ones(4).half()), TypeError, "weight must be torch.float32, got torch.float16"),
    "bias's dtype": (
        (X.half(), None, torch.ones(4).double()),
        TypeError,
        "bias must be torch.float16 or torch.float32, got torch.float64",
    ),
    "weight's device": (
        (X, torch.ones(4, device="meta")),
        ValueError,
        "weight must be on cpu like x, got meta",
    ),
    "eps is zero": ((X, None, None, 0.0), ValueError, "eps must be positive and finite, got 0.0"),
    "eps is NaN": ((X, None, None, float("nan")), ValueError, "eps must be positive and finite, got nan"),
    "eps is a string": ((X, None, None, "1e-5"), TypeError, "eps must be a number, got str"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what: str) -> None:
    args, kind, message = BAD[what]
    with pytest.raises(kind, match=re.escape(f"layer_norm: {message}")):
        ops.layer_norm(*args)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", KERNELS)
def test_offsets_beyond_31_bits(backend: str, device: torch.device) -> None:
    """2^31 elements and more: the last rows are right, forward and backward."""
    width = 1024
    x = torch.randn(4, width, device=device, dtype=torch.bfloat16).repeat(2**21 // 4 + 8, 1).requires_grad_()
    weight, bias = (p.requires_grad_() for p in parameters(width, device))
    with mmfast.backend(backend):
        y = ops.layer_norm(x, weight, bias)
        (dx,) = torch.autograd.grad(y, x, x.detach())
    small = x.detach()[:4].clone().requires_grad_()
    wanted = reference.layer_norm(small.double(), weight.double(), bias.double())
    (dwanted,) = torch.autograd.grad(wanted, small, small.detach().double())
    for start in (0, 2**21 - 4, len(x) - 4):
        torch.testing.assert_close(y[start : start + 4].double(), wanted, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(dx[start : start + 4], dwanted, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", KERNELS)
def test_strides_beyond_31_bits(backend: str, device: torch.device) -> None:
    base = torch.empty(3, 2**30 + 16, device=device, dtype=torch.float16)
    x = base[:, :512].normal_()
    with mmfast.backend(backend):
        y = ops.layer_norm(x)
    torch.testing.assert_close(y, F.layer_norm(x, (512,)), rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", KERNELS)
def test_cuda_graph_and_side_stream(backend: str, device: torch.device) -> None:
    """Captured in a graph and replayed on new data; launched on the current stream, whichever it is."""
    x = torch.randn(64, 768, device=device)
    weight, bias = parameters(768, device)
    stream = torch.cuda.Stream()
    with mmfast.backend(backend):
        with torch.cuda.stream(stream):
            side = ops.layer_norm(x, weight, bias)
        stream.synchronize()
        torch.testing.assert_close(side, F.layer_norm(x, (768,), weight, bias))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = ops.layer_norm(x, weight, bias)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(y, F.layer_norm(x, (768,), weight, bias))


def test_tolerances_are_below_one_rounding_step() -> None:
    """The absolute part of the rule must stay far below what a wrong kernel would show."""
    assert all(value <= torch.finfo(dtype).eps * 10 for dtype, value in ATOL.items() if dtype != torch.float64)
