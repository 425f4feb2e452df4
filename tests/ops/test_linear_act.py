from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mmfast
from mmfast import ops, reference
from mmfast.reference.linear_act import ACTIVATIONS, cases
from tests.grading import BACKENDS, DTYPES, check_against_reference, outputs_and_gradients

op = importlib.import_module("mmfast.ops.linear_act")  # the name is also the function's

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # the interpreter's exp

LABELS = [case.label for case in cases(torch.float32, torch.device("cpu"), large=False)]
GPU_LABELS = [case.label for case in cases(torch.float32, torch.device("meta"), large=True)][len(LABELS) :]
GATED = ("geglu", "swiglu")
SOME = ("gelu", "swiglu")


def parameters(depth: int, width: int, device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [(torch.randn(width, depth) * depth**-0.5).to(device, dtype), torch.randn(width).to(device, dtype)]


@pytest.fixture
def cublas_and_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other plan of the triton backend: a product by PyTorch, then the kernel of the activation alone."""
    monkeypatch.setattr(op, "_plan", lambda *args: ("pass", "asked for"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("label", [*LABELS, *(pytest.param(x, marks=pytest.mark.gpu) for x in GPU_LABELS)])
@pytest.mark.usefixtures("poisoned")
def test_matches_the_reference(label: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    case = next(c for c in cases(dtype, device, large=label in GPU_LABELS) if c.label == label)
    check_against_reference(ops.linear_act, reference.linear_act, case.args, case.kwargs, backend, dtype)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.usefixtures("poisoned", "cublas_and_pass")
def test_a_product_by_cublas_and_a_pass(activation: str, dtype: torch.dtype, device: torch.device) -> None:
    args = (torch.randn(2, 3, 40, device=device).to(dtype), *parameters(40, 24, device, dtype))
    kwargs = {"activation": activation}
    check_against_reference(ops.linear_act, reference.linear_act, args, kwargs, "triton", dtype)


@pytest.mark.triton
@pytest.mark.parametrize("activation", SOME)
@pytest.mark.usefixtures("poisoned")
def test_large_tiles(activation: str, device: torch.device) -> None:
    """128 x 128: more row blocks than a group has, the epilogue in parts, ends within a tile, K in several steps."""
    from mmfast.kernels.linear_act import GROUP, TileConfig, linear_act_forward

    config = TileConfig(16, 128, 32, 8, 3)
    for rows, depth, width in ((16 * (GROUP + 1) + 3, 40, 150), (5, 64, 256)):
        x, (weight, bias) = torch.randn(rows, depth, device=device), parameters(depth, width, device)
        assert config.parts(x.dtype) == 4
        y, pre = linear_act_forward(x, weight, bias, activation, save_pre=True, config=config)
        torch.testing.assert_close(pre, F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(y, op.linear_act_torch(x, weight, bias, activation), rtol=1e-5, atol=1e-5)


LAYOUTS = {
    "without class token": lambda x: x[:, 1:],
    "class token": lambda x: x[:, 0],
    "transposed tokens": lambda x: x.transpose(0, 1),
    "channels first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "slice of channels": lambda x: x[..., 4:20],
    "expanded": lambda x: x[:1].expand(3, -1, -1),
    "one row": lambda x: x[0, 0],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("poisoned")
def test_any_strides(layout: str, backend: str, device: torch.device) -> None:
    base = torch.randn(4, 7, 24, device=device, requires_grad=True)
    weight, bias = parameters(LAYOUTS[layout](base).shape[-1], 10, device)
    with mmfast.backend(backend):
        y = ops.linear_act(LAYOUTS[layout](base), weight, bias, activation="silu")
        (found,) = torch.autograd.grad(y.square().sum(), base)
    assert y.is_contiguous()
    wanted = F.silu(F.linear(LAYOUTS[layout](base), weight, bias))
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, torch.autograd.grad(wanted.square().sum(), base)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.triton
@pytest.mark.parametrize("activation", ["none", "gelu", "relu", "geglu"])
@pytest.mark.usefixtures("poisoned")
def test_gradient_of_stride_zero_and_strided_parameters(activation: str, device: torch.device) -> None:
    """`.sum().backward()` passes an expanded gradient; weights may be a part of a larger tensor, or transposed."""
    x = torch.randn(6, 24, device=device, requires_grad=True)
    packed = torch.randn(24, 30, device=device)
    bias = torch.randn(32, device=device)[::2].requires_grad_()
    for weight in (packed[4:20, 3:27], torch.randn(24, 16, device=device).t()):
        inputs = (x, weight.detach().requires_grad_(), bias)
        with mmfast.backend("triton"):
            found = torch.autograd.grad(ops.linear_act(*inputs, activation=activation).sum(), inputs)
        wanted = torch.autograd.grad(op.linear_act_torch(*inputs, activation).sum(), inputs)
        for got, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_only_the_gradients_asked_for(wanted: tuple[int, ...], backend: str, device: torch.device) -> None:
    inputs = [torch.randn(5, 12, device=device), *parameters(12, 8, device)]
    for tensor, want in zip(inputs, wanted, strict=True):
        tensor.requires_grad_(bool(want))
    found = []
    for name in (backend, "torch"):
        with mmfast.backend(name):
            y = ops.linear_act(*inputs, activation="gelu")
            found.append(torch.autograd.grad(y.square().sum(), [t for t in inputs if t.requires_grad]))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0)], ids=str)
@pytest.mark.parametrize("activation", ["none", "gelu", "relu", "geglu"])
def test_empty(shape: tuple[int, ...], activation: str, backend: str, device: torch.device) -> None:
    """No rows; and no columns of x, where the result is the activation of the bias."""
    x = torch.empty(shape, device=device, requires_grad=True)
    weight, bias = (
        p.requires_grad_() for p in (torch.randn(6, shape[-1], device=device), torch.randn(6, device=device))
    )
    with mmfast.backend(backend):
        y = ops.linear_act(x, weight, bias, activation=activation)
        found = torch.autograd.grad(y.sum(), (x, weight, bias))
    wanted = op.linear_act_torch(x, weight, bias, activation)
    torch.testing.assert_close(y, wanted)
    for got, want in zip(found, torch.autograd.grad(wanted.sum(), (x, weight, bias)), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.usefixtures("poisoned")
def test_nan_inf_and_huge_inputs(activation: str, backend: str, device: torch.device) -> None:
    """NaN stays in its row, infinities give what PyTorch's activations give, and huge values their limits."""
    big = torch.finfo(torch.float32).max / 4
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), big, -big, 1e20, -1e20, 90.0, -90.0, 0.5])
    x = values[:, None].to(device).requires_grad_()
    weight = torch.tensor([[1.0], [1.0]], device=device)
    with mmfast.backend(backend):
        y = ops.linear_act(x, weight, activation=activation)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    wanted = op.activate_torch(x.detach().expand(-1, 2), activation)
    torch.testing.assert_close(y, wanted, equal_nan=True)
    assert y[0].isnan().all()
    if activation not in GATED:  # a product of two huge values is infinite
        assert y[3:].isfinite().all()
        left, right = (0.0, 2.0) if activation != "none" else (2.0, 2.0)
        if activation != "gelu_tanh" or backend == "triton":  # PyTorch's is NaN: its cube overflows
            torch.testing.assert_close(dx[3:9, 0].cpu(), torch.tensor([right, left] * 3))


@pytest.mark.triton
def test_accuracy_of_the_activations(device: torch.device) -> None:
    """In float32 at every size of input: the kernels' polynomial for Phi, and their forms of tanh and sigmoid."""
    from mmfast.kernels.linear_act import activation_forward, linear_act_backward

    pre = torch.cat([torch.linspace(-15, 15, 3001), torch.logspace(-8, 8, 101), -torch.logspace(-8, 8, 101)])[None]
    exact = pre.double().requires_grad_()
    for activation in ("gelu", "gelu_tanh", "quick_gelu", "silu"):
        wanted = op.activate_torch(exact, activation)
        (derivative,) = torch.autograd.grad(wanted.sum(), exact)
        y = activation_forward(pre.to(device), activation).cpu().double()
        assert float((y - wanted.detach()).abs().div(2 + pre.abs()).max()) < 1e-7
        dpre, _ = linear_act_backward(torch.ones_like(pre, device=device), pre.to(device), activation, need_dbias=False)
        assert float((dpre.cpu().double() - derivative).abs().max()) < 1e-6


@pytest.mark.triton
@pytest.mark.usefixtures("poisoned")
def test_rows_do_not_mix(device: torch.device) -> None:
    """A NaN row of x, or of weight, spoils its own row or column alone, also where tiles read past the end."""
    x, (weight, bias) = torch.randn(70, 20, device=device), parameters(20, 70, device)
    x[69, 3], weight[69, 2] = float("nan"), float("inf")
    for activation in ("gelu", "geglu"):
        with mmfast.backend("triton"):
            y = ops.linear_act(x, weight, bias, activation=activation)
        assert y[69].isnan().all()
        assert y[:69, : y.shape[1] - 1].isfinite().all()
        assert not y[:69, -1].isfinite().any()


@pytest.mark.triton
@pytest.mark.parametrize("activation", SOME)
def test_same_bits_twice(activation: str, device: torch.device) -> None:
    args = (torch.randn(150, 20, device=device), *parameters(20, 66, device))
    with mmfast.backend("triton"):
        first, second = (outputs_and_gradients(ops.linear_act, args, {"activation": activation}) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.triton
@pytest.mark.usefixtures("poisoned")
def test_bias_gradient_over_many_rows(device: torch.device) -> None:
    """More blocks of rows than programs walk, and a last block that is not full."""
    from mmfast.kernels.linear_act import linear_act_backward

    dy, pre = torch.randn(1001, 40, device=device), torch.randn(1001, 40, device=device)
    dpre, dbias = linear_act_backward(dy, pre, "gelu", need_dbias=True)
    wanted = op.activate_torch_backward(dy.double(), pre.double(), "gelu")
    torch.testing.assert_close(dpre.double(), wanted, rtol=1e-5, atol=1e-6)
    assert dbias is not None
    torch.testing.assert_close(dbias.double(), wanted.sum(0), rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("frozen", [False, True], ids=["all", "x alone"])
def test_differentiable_twice(frozen: bool, activation: str, backend: str, device: torch.device) -> None:
    """A gradient penalty: backward of a backward made with create_graph=True."""
    inputs = [torch.randn(3, 6, device=device), *parameters(6, 8, device)]
    for tensor in inputs[: 1 if frozen else 3]:
        tensor.requires_grad_()
    wanted = [t for t in inputs if t.requires_grad]

    def penalty(fn: Any) -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(fn(*inputs, activation=activation).sin().sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), wanted)

    with mmfast.backend(backend):
        found = penalty(ops.linear_act)
    for got, want in zip(found, penalty(reference.linear_act), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_formulas_in_float64(activation: str) -> None:
    args = [t.double().requires_grad_() for t in (torch.randn(2, 3, 5), torch.randn(4, 5), torch.randn(4))]
    for fn in (reference.linear_act, ops.linear_act):
        assert torch.autograd.gradcheck(lambda *a, fn=fn: fn(*a, activation=activation), args)
    # Below the public function, which sends float64 to PyTorch's op: the registered autograd formula.
    registered = lambda *a: torch.ops.mmfast.linear_act(*a, activation)  # noqa: E731
    assert torch.autograd.gradcheck(registered, args)
    assert torch.autograd.gradgradcheck(registered, args)


def test_order_of_the_halves() -> None:
    x = torch.tensor([[1.0]])
    weight = torch.tensor([[2.0], [3.0]])  # the halves of the output are 2 and 3
    gelu, silu = (float(f(torch.tensor(v))) for f, v in ((F.gelu, 3.0), (F.silu, 2.0)))
    for name, wanted in (("geglu", 2.0 * gelu), ("swiglu", silu * 3.0)):
        torch.testing.assert_close(float(ops.linear_act(x, weight, activation=name)), wanted)
        torch.testing.assert_close(float(reference.linear_act(x, weight, activation=name)), wanted)


@pytest.mark.gpu
def test_offsets_beyond_31_bits(device: torch.device) -> None:
    """The result has more than 2^31 elements: its last rows are right, forward and backward."""
    rows, depth, width = 2**19 + 200, 64, 4096
    x = torch.randn(4, depth, device=device, dtype=torch.bfloat16).repeat(rows // 4, 1).requires_grad_()
    weight, bias = parameters(depth, width, device, torch.bfloat16)
    with mmfast.backend("triton"):
        y = ops.linear_act(x, weight, bias, activation="gelu")
        (dx,) = torch.autograd.grad(y, x, y.detach())
    small = x.detach()[:4].clone().requires_grad_()
    wanted = reference.linear_act(small.double(), weight.double(), bias.double(), activation="gelu")
    (dwanted,) = torch.autograd.grad(wanted, small, wanted.detach())
    for start in (0, rows // 2 // 4 * 4, rows - 4):
        torch.testing.assert_close(y[start : start + 4].double(), wanted, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(dx[start : start + 4], dwanted, rtol=3e-2, atol=3e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_float32_precision(precision: str, device: torch.device) -> None:
    """Forced, the kernel honours the setting: exact products, or tf32's."""
    x, (weight, bias) = torch.randn(256, 512, device=device), parameters(512, 384, device)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        with mmfast.backend("triton"):
            y = ops.linear_act(x, weight, bias, activation="gelu")
    finally:
        torch.set_float32_matmul_precision(before)
    truth = reference.linear_act(x.double(), weight.double(), bias.double(), activation="gelu")
    error = float((y - truth).norm() / truth.norm())
    assert error < (2e-6 if precision == "highest" else 2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("plan", ["epilogue", "pass"])
def test_cuda_graph(plan: str, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Captured in a graph and replayed on new data."""
    monkeypatch.setattr(op, "_plan", lambda *args: (plan, ""))
    x, (weight, bias) = torch.randn(64, 256, device=device).half(), parameters(256, 512, device, torch.float16)
    ops.linear_act(x, weight, bias, activation="geglu")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.linear_act(x, weight, bias, activation="geglu")
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(y, op.linear_act_torch(x, weight, bias, "geglu"), rtol=1e-2, atol=1e-2)
