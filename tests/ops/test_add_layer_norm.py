from __future__ import annotations

import re

import pytest
import torch
from torch.library import opcheck

import mmfast
from mmfast import ops, reference
from mmfast.reference.add_layer_norm import cases
from tests.grading import ALL_BACKENDS, CUDA, DTYPES, check_against_reference, outputs_and_gradients

LABELS = [case.label for case in cases(torch.float32, torch.device("cpu"), large=False)]
GPU_LABELS = [case.label for case in cases(torch.float32, torch.device("meta"), large=True)][len(LABELS) :]
SCALES = ("none", "gamma", "sample", "both")
KERNELS = (pytest.param("triton", marks=pytest.mark.triton), CUDA)


def arguments(
    shape: tuple[int, ...], scaled: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[tuple, dict]:
    x, residual = (torch.randn(shape).to(device, dtype) for _ in range(2))
    weight, bias, gamma = (torch.randn(shape[-1]).to(device, dtype) for _ in range(3))
    sample = torch.randn(shape[0]).to(device, dtype)
    scale = {"none": None, "gamma": gamma, "sample": sample, "both": (gamma, sample)}[scaled]
    return (x, residual, weight, bias), {"scale": scale}


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("label", [*LABELS, *(pytest.param(x, marks=pytest.mark.gpu) for x in GPU_LABELS)])
@pytest.mark.usefixtures("poisoned")
def test_matches_the_reference(label: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    case = next(c for c in cases(dtype, device, large=label in GPU_LABELS) if c.label == label)
    if backend != "torch" and case.args[0].shape[-1] > 8192:
        with mmfast.backend(backend), pytest.raises(mmfast.BackendError, match="above 8192"):
            ops.add_layer_norm(*case.args, **case.kwargs)
        return
    check_against_reference(ops.add_layer_norm, reference.add_layer_norm, case.args, case.kwargs, backend, dtype)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("scaled", SCALES)
@pytest.mark.usefixtures("poisoned", "wide_sums")
def test_more_blocks_than_programs(scaled: str, backend: str, device: torch.device) -> None:
    """Every program of the persistent grid takes several blocks of rows, and blocks straddle samples."""
    args, kwargs = arguments((7, 5, 900), scaled, device)
    check_against_reference(ops.add_layer_norm, reference.add_layer_norm, args, kwargs, backend, torch.float32)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("scaled", SCALES)
@pytest.mark.parametrize("width", [4100, 8192])
@pytest.mark.usefixtures("poisoned", "wide_sums")
def test_widest_rows(width: int, scaled: str, backend: str, device: torch.device) -> None:
    """Above 4096 columns Triton's backward of a scale is a step of its own."""
    args, kwargs = arguments((2, 2, width), scaled, device)
    check_against_reference(ops.add_layer_norm, reference.add_layer_norm, args, kwargs, backend, torch.float32)


def test_above_the_widest_row_the_norm_is_still_fused() -> None:
    args, kwargs = arguments((1, 2, 8200), "gamma", torch.device("cpu"))
    why = mmfast.explain(ops.add_layer_norm, *args, **kwargs)
    assert [choice.op for choice in why] == ["add_layer_norm", "layer_norm"]
    assert "above 8192" in why[0].reason


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("layout", ["without class token", "class token", "transposed", "every second"])
@pytest.mark.usefixtures("poisoned")
def test_any_strides(layout: str, backend: str, device: torch.device) -> None:
    view = {
        "without class token": lambda t: t[:, 1:],
        "class token": lambda t: t[:, 0],
        "transposed": lambda t: t.transpose(0, 1),
        "every second": lambda t: t[::2, ..., ::2],
    }[layout]
    x, residual = (view(torch.randn(4, 6, 12, device=device)) for _ in range(2))
    (_, _, weight, bias), kwargs = arguments(tuple(x.shape), "both", device)
    args = (x, residual.clone(), weight, bias)
    check_against_reference(ops.add_layer_norm, reference.add_layer_norm, args, kwargs, backend, torch.float32)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("used", ["y", "s"])
@pytest.mark.parametrize("scaled", SCALES)
@pytest.mark.usefixtures("poisoned")
def test_one_output_used(used: str, scaled: str, backend: str, device: torch.device) -> None:
    """After the last block s is dropped, and with a hook on the norm y may be: the other's gradient is absent."""
    args, kwargs = arguments((3, 2, 10), scaled, device)
    index = "ys".index(used)

    def one(fn):  # type: ignore[no-untyped-def]
        return lambda *args, **kwargs: fn(*args, **kwargs)[index]

    tensors = [*args[:2]] if used == "s" else [*args]
    for tensor in tensors:
        tensor.requires_grad_()
    found = []
    for fn, name in ((ops.add_layer_norm, backend), (reference.add_layer_norm, "torch")):
        with mmfast.backend(name):
            found.append(torch.autograd.grad(one(fn)(*args, **kwargs).sin().sum(), tensors))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("scaled", SCALES)
@pytest.mark.parametrize("asked", range(6))
@pytest.mark.usefixtures("poisoned")
def test_only_the_gradient_asked_for(asked: int, scaled: str, backend: str, device: torch.device) -> None:
    """One input at a time: x, residual, weight, bias, gamma, per-sample factors."""
    args, kwargs = arguments((3, 2, 10), scaled, device)
    factors = {"none": (None, None), "both": kwargs["scale"]}.get(scaled, (kwargs["scale"],) * 2)
    gamma, sample = (factors[0] if scaled != "sample" else None), (factors[1] if scaled != "gamma" else None)
    tensor = (*args, gamma, sample)[asked]
    if tensor is None:
        pytest.skip("this scale has no such factor")
    tensor.requires_grad_()
    found = []
    for fn, name in ((ops.add_layer_norm, backend), (reference.add_layer_norm, "torch")):
        with mmfast.backend(name):
            y, s = fn(*args, **kwargs)
            loss = y.sin().sum() + (s.cos().sum() if s.requires_grad else 0)
            found.append(torch.autograd.grad(loss, tensor)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.usefixtures("poisoned")
def test_wider_residual_stream(backend: str, device: torch.device) -> None:
    """A 16-bit branch onto a float32 stream, as under autocast: y and s are float32, each gradient its input's."""
    args, _ = arguments((3, 4, 20), "none", device)
    gamma = torch.randn(20, device=device)
    args = (args[0].half(), *args[1:])
    kwargs = {"scale": gamma}
    check_against_reference(ops.add_layer_norm, reference.add_layer_norm, args, kwargs, backend, torch.float16)
    with mmfast.backend(backend):
        y, s, dx, dresidual, *_ = outputs_and_gradients(ops.add_layer_norm, args, kwargs)
        plain = outputs_and_gradients(ops.add_layer_norm, args, {})
    assert (y.dtype, s.dtype, dx.dtype, dresidual.dtype) == (torch.float32,) * 2 + (torch.float16, torch.float32)
    torch.testing.assert_close(plain[2].float(), plain[3], rtol=1e-3, atol=1e-3)  # no scale: the same gradient


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 1, 1)], ids=str)
def test_shapes_of_a_per_sample_scale(shape: tuple[int, ...], backend: str, device: torch.device) -> None:
    x, residual = torch.randn(2, 3, 2, 5, device=device)
    factor = torch.tensor([0.0, 2.0, -1.0], device=device)
    with mmfast.backend(backend):
        _, s = ops.add_layer_norm(x, residual, scale=factor.view(shape))
        _, both = ops.add_layer_norm(x, residual, scale=(None, factor.view(shape)))
    torch.testing.assert_close(s, residual + x * factor.view(3, 1, 1))
    torch.testing.assert_close(both, s)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_square_batch_takes_a_vector_for_channels(backend: str, device: torch.device) -> None:
    x, residual = torch.randn(2, 4, 4, device=device)
    factor = torch.randn(4, device=device)
    with mmfast.backend(backend):
        torch.testing.assert_close(ops.add_layer_norm(x, residual, scale=factor)[1], residual + x * factor)
        by_row = ops.add_layer_norm(x, residual, scale=factor[:, None])[1]
    torch.testing.assert_close(by_row, residual + x * factor[:, None])


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("scaled", SCALES)
def test_differentiable_twice(scaled: str, backend: str, device: torch.device) -> None:
    args, kwargs = arguments((3, 2, 6), scaled, device)
    scale = kwargs["scale"] if isinstance(kwargs["scale"], tuple) else (kwargs["scale"],)
    inputs = [t.requires_grad_() for t in (*args, *scale) if t is not None]

    def penalty(fn) -> tuple[torch.Tensor, ...]:  # type: ignore[no-untyped-def]
        y, s = fn(*args, **kwargs)
        grads = torch.autograd.grad(y.sin().sum() + s.cos().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)

    with mmfast.backend(backend):
        found = penalty(ops.add_layer_norm)
    for got, want in zip(found, penalty(reference.add_layer_norm), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_formulas_in_float64() -> None:
    args, kwargs = arguments((2, 3, 5), "both", torch.device("cpu"), torch.float64)
    inputs = [t.requires_grad_() for t in (*args, *kwargs["scale"])]
    for fn in (ops.add_layer_norm, reference.add_layer_norm):
        assert torch.autograd.gradcheck(lambda *t, fn=fn: fn(*t[:4], scale=t[4:]), inputs)
    # Below the public function, which sends float64 to PyTorch's ops: the registered autograd formula.
    assert torch.autograd.gradcheck(lambda *t: torch.ops.mmfast.add_layer_norm(*t[:4], 1e-5, *t[4:]), inputs)
    plain = inputs[:4]
    assert torch.autograd.gradcheck(lambda *t: torch.ops.mmfast.add_layer_norm(*t, 1e-5, None, None), plain)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_equals_the_block_it_replaces(backend: str, device: torch.device) -> None:
    """timm's `x + drop_path(ls(branch))` and `norm`, step by step."""
    args, kwargs = arguments((4, 3, 16), "both", device)
    x, residual, weight, bias = args
    gamma, sample = kwargs["scale"]
    s = residual + (x * gamma) * sample.view(-1, 1, 1)
    with mmfast.backend(backend):
        found = ops.add_layer_norm(*args, **kwargs)
    torch.testing.assert_close(found, (torch.nn.functional.layer_norm(s, (16,), weight, bias), s))


@pytest.mark.parametrize("backend", KERNELS)
def test_same_bits_twice(backend: str, device: torch.device) -> None:
    args, kwargs = arguments((9, 5, 33), "both", device)
    with mmfast.backend(backend):
        first, second = (outputs_and_gradients(ops.add_layer_norm, args, kwargs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_empty(backend: str, device: torch.device) -> None:
    x = torch.empty(0, 3, 8, device=device, requires_grad=True)
    weight = torch.ones(8, device=device, requires_grad=True)
    with mmfast.backend(backend):
        y, s = ops.add_layer_norm(x, x, weight, scale=torch.ones(8, device=device))
        (dweight,) = torch.autograd.grad(y.sum() + s.sum(), weight)
    assert y.shape == s.shape == (0, 3, 8)
    assert not dweight.any()


def op_arguments(device: torch.device) -> list[tuple[str, tuple]]:
    (x, residual, weight, bias), kwargs = arguments((2, 3, 8), "both", device)
    gamma, sample = kwargs["scale"]
    mean, rstd = torch.randn(2, 3, device=device), torch.rand(2, 3, device=device)
    leaf = [t.clone().requires_grad_() for t in (x, residual, weight, bias, gamma, sample)]
    fp32 = torch.float32
    return [
        ("add_layer_norm", (*leaf[:4], 1e-5, *leaf[4:])),
        ("add_layer_norm", (*leaf[:2], None, None, 1e-5, None, None)),
        ("add_layer_norm_forward", (x, residual, weight, bias, 1e-5, gamma, sample)),
        (
            "add_layer_norm_backward",
            (x, residual, x, x, weight, bias, gamma, sample, mean, rstd, fp32, fp32, [True] * 6),
        ),
        (
            "add_layer_norm_backward",
            (x, None, x, None, None, None, None, None, mean, rstd, fp32, fp32, [True, True, *[False] * 4]),
        ),
    ]


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("index", range(5))
def test_opcheck(index: int, backend: str, device: torch.device) -> None:
    name, args = op_arguments(device)[index]
    with mmfast.backend(backend):
        opcheck(getattr(torch.ops.mmfast, name).default, args)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_equals_eager(compiler: str, backend: str, device: torch.device) -> None:
    compiled = torch.compile(ops.add_layer_norm, fullgraph=True, backend=compiler)
    with mmfast.backend(backend):
        for scaled in ("none", "both"):
            args, kwargs = arguments((3, 2, 24), scaled, device)
            eager = outputs_and_gradients(ops.add_layer_norm, args, kwargs)
            for got, want in zip(outputs_and_gradients(compiled, args, kwargs), eager, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)


X = torch.zeros(2, 3, 4)
BAD = {
    "residual is None": ((X, None), {}, TypeError, "residual must be a tensor, got NoneType"),
    "residual's shape": ((X, X[:1]), {}, ValueError, "residual must have x's shape (2, 3, 4), got (1, 3, 4)"),
    "residual's device": ((X, X.to("meta")), {}, ValueError, "residual must be on cpu like x, got meta"),
    "weight's shape": ((X, X, torch.ones(3)), {}, ValueError, "weight must have shape (4,), got (3,)"),
    "scale's type": ((X, X), {"scale": 0.5}, TypeError, "scale must be a tensor, got float"),
    "scale's shape": ((X, X), {"scale": torch.ones(3)}, ValueError, "scale must have shape (4,) or (2, 1, ...), got"),
    "scale a token": ((X, X), {"scale": torch.ones(2, 3, 1)}, ValueError, "scale must have shape (4,) or (2, 1, ...)"),
    "scale's length": ((X, X), {"scale": (None,)}, ValueError, "scale must be a tensor or a pair, got 1 elements"),
    "gamma's shape": ((X, X), {"scale": (torch.ones(2), None)}, ValueError, "scale (gamma) must have shape (4,)"),
    "factor's dtype": (
        (X, X),
        {"scale": (None, torch.ones(2).double())},
        TypeError,
        "scale (per sample) must be torch.float32, got torch.float64",
    ),
    "scale is integer": ((X, X), {"scale": torch.ones(4).int()}, TypeError, "scale must be floating point"),
    "eps is negative": ((X, X, None, None, -1.0), {}, ValueError, "eps must be positive and finite, got -1.0"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what: str) -> None:
    args, kwargs, kind, message = BAD[what]
    with pytest.raises(kind, match=re.escape(f"add_layer_norm: {message}")):
        ops.add_layer_norm(*args, **kwargs)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", KERNELS)
def test_offsets_beyond_31_bits(backend: str, device: torch.device) -> None:
    x = torch.randn(8, 1, 1024, device=device, dtype=torch.bfloat16).repeat(2**18 + 1, 1, 1)
    gamma = torch.randn(1024, device=device, dtype=torch.bfloat16)
    with mmfast.backend(backend):
        y, s = ops.add_layer_norm(x, x, scale=gamma)
    for start in (0, 2**21, len(x) - 8):
        wanted = reference.add_layer_norm(x[:8].double(), x[:8].double(), scale=gamma.double())
        for got, want in zip((y, s), wanted, strict=True):
            torch.testing.assert_close(got[start : start + 8].double(), want, rtol=2e-2, atol=2e-2)
