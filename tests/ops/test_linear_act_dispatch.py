"""`linear_act` among PyTorch's machinery: which way it computes, registration, compilation, autocast, errors."""

from __future__ import annotations

import importlib
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

import mmfast
from mmfast import ops, reference
from mmfast.reference.linear_act import ACTIVATIONS
from tests.grading import BACKENDS, check_against_reference, outputs_and_gradients

op = importlib.import_module("mmfast.ops.linear_act")  # the name is also the function's

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # the interpreter's exp

SOME = ("gelu", "swiglu")


def parameters(depth: int, width: int, device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [(torch.randn(width, depth) * depth**-0.5).to(device, dtype), torch.randn(width).to(device, dtype)]


@pytest.mark.triton
def test_tiles_follow_the_shape_and_the_device() -> None:
    from mmfast.kernels.linear_act import TileConfig

    def tile(rows: int, depth: int, dtype: torch.dtype, precision: str, major: int) -> tuple[int, int, int]:
        config = TileConfig.choose(rows, depth, 3072, dtype, precision, major, 132)
        return config.block_m, config.block_n, config.block_k

    assert tile(50432, 768, torch.bfloat16, "tf32", 9) == (128, 128, 64)
    assert tile(50432, 768, torch.float32, "tf32", 9) == (128, 128, 32)
    assert tile(50432, 768, torch.bfloat16, "tf32", 8) == (128, 128, 32)
    assert tile(50432, 767, torch.bfloat16, "tf32", 9) == (64, 64, 64)
    assert tile(197, 768, torch.bfloat16, "tf32", 9) == (64, 64, 64)
    assert tile(50432, 768, torch.float32, "ieee", 9) == (64, 64, 32)


@pytest.mark.triton
def test_saves_what_the_gradients_need(device: torch.device) -> None:
    """ReLU keeps its output and no pre-activation; x is kept for the weight's gradient alone; none for inference."""
    x, (weight, bias) = torch.randn(5, 12, device=device), parameters(12, 8, device)

    def saved(activation: str, x: Tensor, weight: Tensor) -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = []
        with (
            mmfast.backend("triton"),
            torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t),
        ):
            ops.linear_act(x, weight, bias, activation=activation)
        return sorted(shapes)

    leaf_x, leaf_weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    assert saved("gelu", leaf_x, weight) == [(5, 8), (8, 12)]
    assert saved("gelu", x, leaf_weight) == [(5, 8), (5, 12)]
    assert saved("relu", leaf_x, weight) == [(5, 8), (8, 12)]
    assert saved("geglu", leaf_x, leaf_weight) == [(5, 8), (5, 12), (8, 12)]
    with torch.no_grad():
        assert saved("gelu", leaf_x, leaf_weight) == []


@pytest.mark.triton
def test_inference_writes_no_pre_activation(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    from mmfast.kernels import linear_act as kernel

    wanted: list[bool] = []
    launch = kernel.linear_act_forward

    def watch(*args: Any, **kwargs: Any) -> Any:
        wanted.append(kwargs["save_pre"])
        return launch(*args, **kwargs)

    monkeypatch.setattr(kernel, "linear_act_forward", watch)
    x, (weight, bias) = torch.randn(5, 12, device=device), parameters(12, 8, device)
    with mmfast.backend("triton"):
        ops.linear_act(x, weight, bias, activation="gelu")
        weight.requires_grad_()
        ops.linear_act(x, weight, bias, activation="gelu")
        ops.linear_act(x, weight, bias, activation="relu")
        with torch.no_grad():
            ops.linear_act(x, weight, bias, activation="gelu")
    assert wanted == [False, True, False, False]


def op_arguments(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    x, (weight, bias) = torch.randn(2, 3, 8, device=device), parameters(8, 6, device)
    leaf = [t.clone().requires_grad_() for t in (x, weight, bias)]
    dy, pre = torch.randn(2, 3, 6, device=device), torch.randn(2, 3, 12, device=device)
    return [
        ("linear_act", (*leaf, "gelu")),
        ("linear_act", (*leaf, "relu")),
        ("linear_act", (leaf[0], weight, None, "geglu")),
        ("linear_act", (x[:, 1:], weight, None, "none")),
        ("linear_act_forward", (x, weight, bias, "swiglu")),
        ("linear_act_forward", (x.transpose(0, 1), weight, None, "relu")),
        ("linear_act_backward", (dy, pre, "geglu", True)),
        ("linear_act_backward", (dy.transpose(0, 1), pre[..., :6].transpose(0, 1), "silu", False)),
        ("linear_act_backward", (dy, dy.new_empty(0), "none", True)),
        ("linear_act_backward", (dy[0, 0], pre[0, 0, :6], "gelu", True)),
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index", range(10))
def test_opcheck(index: int, backend: str, device: torch.device) -> None:
    name, args = op_arguments(device)[index]
    with mmfast.backend(backend):
        opcheck(getattr(torch.ops.mmfast, name).default, args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("compiler", "activation"),
    [("aot_eager", "gelu"), ("aot_eager", "swiglu"), pytest.param("inductor", "gelu", marks=pytest.mark.slow)],
)
def test_compiled_equals_eager(compiler: str, activation: str, backend: str, device: torch.device) -> None:
    """Full graph, forward and backward, then another batch size under dynamic shapes."""

    def fn(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.linear_act(x * 2, weight, bias, activation=activation)

    compiled = torch.compile(fn, fullgraph=True, backend=compiler, dynamic=True)
    with mmfast.backend(backend):
        for rows in (5, 9):
            args = (torch.randn(2, rows, 12, device=device), *parameters(12, 16, device))
            eager = outputs_and_gradients(fn, args, {})
            for got, want in zip(outputs_and_gradients(compiled, args, {}), eager, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            with torch.no_grad():
                torch.testing.assert_close(compiled(*args), eager[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_export(backend: str, device: torch.device) -> None:
    module = mmfast.nn.Mlp(8, 12).to(device)
    x = torch.randn(2, 3, 8, device=device)
    with mmfast.backend(backend):
        program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        named = [n.target.name() for n in program.graph.nodes if n.op == "call_function"]
        assert ("mmfast::linear_act" in named) == (backend == "triton")
        other = torch.randn(5, 3, 8, device=device)
        torch.testing.assert_close(program.module()(other), module(other))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_registered_op_runs_without_a_kernel(activation: str) -> None:
    """A program exported on a GPU holds `torch.ops.mmfast.linear_act`; on a CPU, PyTorch's ops serve it."""
    args = (torch.randn(4, 6), *parameters(6, 8, torch.device("cpu")))
    inputs = [t.clone().requires_grad_() for t in args]
    y = torch.ops.mmfast.linear_act(*inputs, activation)
    wanted = op.linear_act_torch(*inputs, activation)
    torch.testing.assert_close(y, wanted, rtol=0, atol=0)
    found = torch.autograd.grad(y.square().sum(), inputs)
    for got, want in zip(found, torch.autograd.grad(wanted.square().sum(), inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["none", "gelu", "swiglu"])
def test_autocast_lowers_the_precision(activation: str, backend: str, device: torch.device) -> None:
    """As F.linear: float32 inputs and parameters are cast; gradients come back in float32."""
    half = torch.float16 if device.type == "cpu" else torch.bfloat16
    inputs = [t.requires_grad_() for t in (torch.randn(4, 16, device=device), *parameters(16, 8, device))]
    with torch.autocast(device.type, dtype=half), mmfast.backend(backend):
        y = ops.linear_act(*inputs, activation=activation)
        mixed = ops.linear_act(inputs[0].to(half), *inputs[1:], activation=activation)
        wide = ops.linear_act(*(t.double() for t in inputs), activation=activation) if backend == "torch" else None
    assert y.dtype == mixed.dtype == half
    assert wide is None or wide.dtype == torch.float64
    wanted = op.linear_act_torch(*inputs, activation)
    torch.testing.assert_close(y.float(), wanted, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(mixed, y, rtol=0, atol=0)
    found = torch.autograd.grad(y.float().sum(), inputs)
    assert all(g.dtype == torch.float32 for g in found)
    for got, want in zip(found, torch.autograd.grad(wanted.sum(), inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_torch_func_transforms_take_pytorchs_op(device: torch.device) -> None:
    x, (weight, bias) = torch.randn(3, 4, 8, device=device), parameters(8, 6, device)

    def loss(x: Tensor) -> Tensor:
        return ops.linear_act(x, weight, bias, activation="gelu").square().sum()

    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x), torch.func.grad(loss)(x))
    found = torch.func.jvp(lambda x: ops.linear_act(x, weight, bias, activation="gelu"), (x,), (x,))
    wanted = torch.func.jvp(lambda x: F.gelu(F.linear(x, weight, bias)), (x,), (x,))
    torch.testing.assert_close(found, wanted)


def test_plans() -> None:
    """The Triton product where a separate pass would be much of the time; cuBLAS where K is long, rows few or odd."""

    def plan(rows: int, depth: int, activation: str = "gelu") -> str:
        return op._plan(rows, depth, 2, activation)[0]

    assert plan(50432, 768) == "epilogue"
    assert plan(65792, 1024) == "pass"
    assert (plan(65536, 320, "geglu"), plan(65536, 768, "geglu")) == ("epilogue", "pass")
    assert plan(32, 768) == "pass"
    assert plan(50432, 767) == "pass"
    with mmfast.backend("triton"):
        assert plan(3, 4097) == "epilogue"


def test_what_the_library_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    assert op._library_serves(torch.bfloat16, "gelu_tanh", 8) == op.LIBRARY
    assert op._library_serves(torch.float32, "relu", 8) == op.LIBRARY
    assert op._library_serves(torch.float32, "gelu_tanh", 8) is None  # off by 5e-6
    assert op._library_serves(torch.bfloat16, "gelu", 8) is None  # cuBLASLt has no erf
    assert op._library_serves(torch.bfloat16, "relu", 0) is None
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert op._library_serves(torch.bfloat16, "relu", 8) is None


def test_library_epilogue() -> None:
    x, (weight, bias) = torch.randn(2, 3, 8), parameters(8, 6, torch.device("cpu"))
    wanted = F.relu(F.linear(x, weight, bias))
    torch.testing.assert_close(op.library_epilogue(x, weight, bias, "relu"), wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = op.library_epilogue(x, weight, bias, "relu")
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["relu", "gelu_tanh"])
def test_library_epilogue_on_a_gpu(activation: str, device: torch.device) -> None:
    args = (torch.randn(4, 50, 64, device=device, dtype=torch.bfloat16), *parameters(64, 128, device, torch.bfloat16))
    with torch.no_grad():
        said = mmfast.explain(ops.linear_act, *args, activation=activation)
    check_against_reference(_inference, reference.linear_act, args, {"activation": activation}, "torch", torch.bfloat16)
    assert said[0].backend == "torch"
    assert op.LIBRARY in said[0].reason


def _inference(x: Tensor, weight: Tensor, bias: Tensor, *, activation: str) -> Tensor:
    """The library's result with PyTorch's gradient, for the grading."""
    y = op.linear_act_torch(x, weight, bias, activation)
    with torch.no_grad():
        return y + (op.library_epilogue(x, weight, bias, activation) - y) if y.requires_grad else y


def test_explain_tells_why() -> None:
    x, (weight, bias) = torch.randn(4, 8), parameters(8, 6, torch.device("cpu"))
    (choice,) = mmfast.explain(ops.linear_act, x, weight, bias, activation="none")
    assert str(choice) == f"linear_act: torch (triton: {op.PLAIN})"
    (choice,) = mmfast.explain(ops.linear_act, x, weight, bias, activation="gelu")
    assert choice.backend == "torch"
    assert "CPU tensor" in choice.reason


def test_rule_of_float32_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, full-precision products are cuBLAS's; with tf32 allowed, or forced, the kernel serves."""
    from mmfast import backends

    monkeypatch.setattr(backends, "_triton_floats", lambda facts: None)
    before = torch.get_float32_matmul_precision()

    def serves(dtype: torch.dtype) -> str:
        facts = backends.Facts(torch.device("cuda"), dtype, 768, detail="the plan")
        return str(backends._decide("linear_act", facts))

    try:
        torch.set_float32_matmul_precision("highest")
        assert serves(torch.float32) == "linear_act: torch (triton: float32 products at full precision)"
        assert serves(torch.bfloat16) == "linear_act: triton (the plan)"
        with mmfast.backend("triton"):
            assert serves(torch.float32) == "linear_act: triton (triton is forced)"
        torch.set_float32_matmul_precision("high")
        assert serves(torch.float32) == "linear_act: triton (the plan)"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="an older PyTorch")
def test_newer_setting_of_float32_products() -> None:
    from mmfast import backends

    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    compiled = torch.compile(lambda x: x + backends.ieee_products(), fullgraph=True, backend="eager")
    try:
        for precision, ieee in (("ieee", True), ("tf32", False)):
            matmul.fp32_precision = precision
            assert backends.ieee_products() is ieee
            assert float(compiled(torch.zeros(()))) == ieee
    finally:
        matmul.fp32_precision = before


def test_cost() -> None:
    x, weight = torch.empty(10, 4, dtype=torch.bfloat16), torch.empty(6, 4, dtype=torch.bfloat16)
    assert op.cost(x, weight, activation="gelu") == {"flops": 2 * 10 * 4 * 6, "bytes": 2 * (40 + 24 + 60)}
    assert op.cost(x, weight, activation="geglu") == {"flops": 2 * 10 * 4 * 6, "bytes": 2 * (40 + 24 + 30)}
    both = op.cost(x, weight, activation="gelu", backward=True)
    assert both == {"flops": 4 * 10 * 4 * 6, "bytes": 2 * (80 + 48 + 60 + 60)}


X, W = torch.zeros(2, 4), torch.zeros(6, 4)
BAD: dict[str, tuple[tuple[Any, ...], str, type[Exception], str]] = {
    "x is a list": (([1.0], W), "gelu", TypeError, "x must be a tensor, got list"),
    "x is integer": ((X.long(), W), "gelu", TypeError, "x must be floating point, got torch.int64"),
    "x is a scalar": ((torch.zeros(()), W), "gelu", ValueError, "x must have at least 1 dimension, got 0"),
    "weight is None": ((X, None), "gelu", TypeError, "weight must be a tensor, got NoneType"),
    "weight's shape": ((X, torch.zeros(6, 5)), "gelu", ValueError, "weight must have shape (M, 4), got (6, 5)"),
    "weight's rank": ((X, torch.zeros(4)), "gelu", ValueError, "weight must have shape (M, 4), got (4,)"),
    "weight is odd": (
        (X, torch.zeros(5, 4)),
        "swiglu",
        ValueError,
        "weight of swiglu must have an even number of rows, got 5",
    ),
    "bias's shape": ((X, W, torch.zeros(5)), "geglu", ValueError, "bias must have shape (6,), got (5,)"),
    "weight's dtype": ((X, W.half()), "gelu", TypeError, "weight must be torch.float32 like x, got torch.float16"),
    "bias's dtype": (
        (X, W, W[:, 0].double()),
        "gelu",
        TypeError,
        "bias must be torch.float32 like x, got torch.float64",
    ),
    "weight's device": ((X, W.to("meta")), "gelu", ValueError, "weight must be on cpu like x, got meta"),
    "activation": (
        (X, W),
        "tanh",
        ValueError,
        "activation must be one of none, gelu, gelu_tanh, quick_gelu, relu, silu, geglu, swiglu, got 'tanh'",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what: str) -> None:
    args, activation, kind, message = BAD[what]
    with pytest.raises(kind, match=re.escape(f"linear_act: {message}")):
        ops.linear_act(*args, activation=activation)
