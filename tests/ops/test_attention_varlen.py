from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

import mmfast
from mmfast import ops, reference
from mmfast.reference.attention_varlen import cases
from tests.grading import BACKENDS, DTYPES, check_against_reference, outputs_and_gradients

LABELS = [case.label for case in cases(torch.float32, torch.device("cpu"), large=False)]
GPU_LABELS = [c.label for c in cases(torch.float32, torch.device("meta"), large=True) if c.label not in LABELS]


def cumulative(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


def draw(
    device: torch.device,
    lengths_q: tuple[int, ...] = (5, 1, 9),
    lengths_k: tuple[int, ...] | None = None,
    heads: tuple[int, int] = (2, 2),
    width: int = 16,
    padding: int = 0,
) -> tuple[Any, ...]:
    """The arguments of a call."""
    lengths_k = lengths_k or lengths_q
    q = torch.randn(sum(lengths_q) + padding, heads[0], width, device=device)
    k, v = torch.randn(2, sum(lengths_k) + padding, heads[1], width, device=device)
    cu_seqlens = (cumulative(lengths_q, device), cumulative(lengths_k, device))
    return (q, k, v, *cu_seqlens, max(lengths_q), max(lengths_k))


def loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int = 0,
    max_k: int = 0,
    *,
    is_causal: bool = False,
) -> Tensor:
    """PyTorch's attention of one sequence after the other, causal at the bottom right; 0 in rows without keys."""
    out = torch.zeros_like(q)
    q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for a, b, c, d in zip(q_ends, q_ends[1:], k_ends, k_ends[1:], strict=False):
        if is_causal:
            a = max(a, b - (d - c))  # the rows before see no key
        if a == b or c == d:
            continue
        heads = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
        mask = causal_lower_right(b - a, d - c) if is_causal else None
        found = F.scaled_dot_product_attention(*heads, mask, enable_gqa=k.shape[1] != q.shape[1])
        out = out.index_copy(0, torch.arange(a, b, device=q.device), found[0].transpose(0, 1))
    return out


def check(backend: str, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
    """Compare forward and gradients in float32."""
    check_against_reference(
        ops.attention_varlen, reference.attention_varlen, args, kwargs or {}, backend, torch.float32
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("label", [*LABELS, *(pytest.param(x, marks=pytest.mark.gpu) for x in GPU_LABELS)])
@pytest.mark.usefixtures("poisoned")
def test_matches_the_reference(label: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    case = next(c for c in cases(dtype, device, large=label in GPU_LABELS) if c.label == label)
    check_against_reference(ops.attention_varlen, reference.attention_varlen, case.args, case.kwargs, backend, dtype)


@pytest.mark.triton
@pytest.mark.parametrize("width", [17, 40, 72, 80, 88, 104, 160, 256])
@pytest.mark.usefixtures("poisoned")
def test_every_head_dim(width: int, device: torch.device) -> None:
    check("triton", draw(device, (3, 2), (4, 1), heads=(1, 1), width=width))


@pytest.mark.triton
@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize(
    "lengths",
    [((64, 65, 1), (128, 64, 63)), ((130,), (64,)), ((385,), (70,)), ((70,), (385,))],
    ids=["about a tile", "more queries", "long queries", "long keys"],
)
@pytest.mark.usefixtures("poisoned")
def test_tiles(lengths: tuple[tuple[int, ...], ...], is_causal: bool, device: torch.device) -> None:
    """Lengths of whole tiles, one more and one less; from a mean of 384 tiles have 128 rows."""
    args = draw(device, *lengths, heads=(1, 1))
    args = (*(x.half() for x in args[:3]), *args[3:])
    options = {"is_causal": is_causal}
    check_against_reference(ops.attention_varlen, reference.attention_varlen, args, options, "triton", torch.float16)


@pytest.mark.triton
@pytest.mark.parametrize("width", [16, 72, 104, 256])
@pytest.mark.usefixtures("poisoned")
def test_tf32(width: int, device: torch.device) -> None:
    """Where float32 products may be tf32, tiles are those of tensor cores; the interpreter multiplies in full."""
    args = draw(device, (3, 2), (70, 1), heads=(1, 1), width=width)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with mmfast.backend("triton"):
            found = outputs_and_gradients(ops.attention_varlen, args, {})
    finally:
        torch.set_float32_matmul_precision(before)
    truth = outputs_and_gradients(reference.attention_varlen, args, {}, torch.float64)
    tolerance = 1e-5 if device.type == "cpu" else 5e-3
    torch.testing.assert_close([x.double() for x in found], truth, rtol=tolerance, atol=tolerance)


LAYOUTS = {
    "packed qkv": lambda x: x.view(15, 3, 2, 16),
    "heads before rows": lambda x: x.view(3, 2, 15, 16).permute(2, 0, 1, 3),
    "channels first": lambda x: x.view(15, 3, 16, 2).transpose(2, 3),
    "every second row": lambda x: x.view(15, 3, 2, 16).repeat_interleave(2, 0)[::2],
    "unaligned": lambda x: F.pad(x.view(15, 3, 2, 16), (1, 2))[..., 1:17],
    "one head for all": lambda x: x.view(15, 3, 2, 16)[:, :, :1].expand(-1, -1, 2, -1),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("poisoned")
def test_any_strides(layout: str, backend: str, device: torch.device) -> None:
    base = torch.randn(15 * 3 * 2 * 16, device=device, requires_grad=True)
    args = draw(device, (6, 9))
    results = []
    for fn, name in ((ops.attention_varlen, backend), (loop, "torch")):
        with mmfast.backend(name):
            out = fn(*LAYOUTS[layout](base).unbind(1), *args[3:])
            results.append((out, *torch.autograd.grad(out.square().sum(), base)))
    assert results[0][0].is_contiguous()
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("poisoned")
def test_gradient_of_stride_zero_and_strided_cu_seqlens(backend: str, device: torch.device) -> None:
    """`.sum().backward()` passes an expanded gradient; cu_seqlens may be a column of a table."""
    q, k, v, cu_q, cu_k, *longest = draw(device)
    table = torch.stack((cu_q, cu_k), dim=1)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with mmfast.backend(backend):
        out = ops.attention_varlen(*leaves, table[:, 0], table[:, 1], *longest)
        found = torch.autograd.grad(out.sum(), leaves)
    wanted = torch.autograd.grad(loop(*leaves, cu_q, cu_k).sum(), leaves)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_only_the_gradients_asked_for(wanted: tuple[int, ...], backend: str, device: torch.device) -> None:
    args = draw(device, (3, 5))
    leaves = [x.requires_grad_(bool(want)) for x, want in zip(args[:3], wanted, strict=True)]
    asked = [x for x in leaves if x.requires_grad]
    with mmfast.backend(backend):
        found = torch.autograd.grad(ops.attention_varlen(*leaves, *args[3:]).square().sum(), asked)
    torch.testing.assert_close(
        found, torch.autograd.grad(loop(*leaves, *args[3:]).square().sum(), asked), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("poisoned")
def test_padding_is_neither_read_nor_left_unwritten(backend: str, device: torch.device) -> None:
    """NaN in the rows beyond the last sequence shows nowhere, and their gradient is 0."""
    args = draw(device, (5, 0, 3), (4, 6, 2), padding=70)
    plain = [*(x[:-70] for x in args[:3]), *args[3:]]
    padded = [x.clone() for x in args[:3]]
    for x in padded:
        x[-70:] = float("nan")
        x.requires_grad_()
    upstream = torch.randn_like(padded[0])
    with mmfast.backend(backend):
        out = ops.attention_varlen(*padded, *args[3:])
        grads = torch.autograd.grad(out, padded, upstream)
    leaves = [x.detach().requires_grad_() for x in plain[:3]]
    wanted = loop(*leaves, *args[3:])
    wanted_grads = torch.autograd.grad(wanted, leaves, upstream[:-70])
    for found, true in zip((out, *grads), (wanted, *wanted_grads), strict=True):
        assert (found[-70:] == 0).all()
        torch.testing.assert_close(found[:-70], true, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.usefixtures("poisoned")
def test_rows_without_keys_are_zero(is_causal: bool, backend: str, device: torch.device) -> None:
    args = draw(device, (4, 6, 0), (0, 2, 3))
    leaves = [x.requires_grad_() for x in args[:3]]
    with mmfast.backend(backend):
        out = ops.attention_varlen(*leaves, *args[3:], is_causal=is_causal)
        dq, dk, dv = torch.autograd.grad(out.square().sum(), leaves)
    none = 8 if is_causal else 4  # the sequence without keys, and with two keys the first four of six queries
    assert (out[:none] == 0).all()
    assert (dq[:none] == 0).all()
    assert (out[none:] != 0).all()
    assert (dk[2:] == 0).all()
    assert (dv[2:] == 0).all()
    assert (dv[:2] != 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "shape", [((), ()), ((0, 0), (0, 0)), ((0, 0), (2, 3)), ((2, 3), (0, 0))], ids=["B=0", "nothing", "no q", "no k"]
)
def test_empty(shape: tuple[tuple[int, ...], ...], backend: str, device: torch.device) -> None:
    if backend == "triton" and shape != ((), ()):
        pytest.skip("empty tensors are PyTorch's")
    lengths_q, lengths_k = shape
    total_q, total_k = (sum(lengths_q), sum(lengths_k)) if lengths_q else (3, 3)
    q = torch.randn(total_q, 2, 16, device=device, requires_grad=True)
    k, v = (torch.randn(total_k, 2, 16, device=device, requires_grad=True) for _ in range(2))
    with mmfast.backend(backend):
        out = ops.attention_varlen(q, k, v, cumulative(lengths_q, device), cumulative(lengths_k, device), 3, 3)
        grads = torch.autograd.grad(out.sum(), (q, k, v))
    for x, y in zip((q, q, k, v), (out, *grads), strict=True):
        assert x.shape == y.shape
        assert (y == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("poisoned")
def test_bounds_may_be_too_large(backend: str, device: torch.device) -> None:
    args = draw(device, (5, 70), (9, 3))
    with mmfast.backend(backend):
        exact = ops.attention_varlen(*args)
        loose = ops.attention_varlen(*args[:5], 200, 130)
    torch.testing.assert_close(loose, exact, rtol=0, atol=0)


@pytest.mark.triton
@pytest.mark.usefixtures("poisoned")
def test_bounds_too_small_give_zeros(device: torch.device) -> None:
    """Nobody checks them on a GPU: what lies beyond is 0 and not what the memory held."""
    from mmfast.kernels.attention_varlen import attention_varlen_backward, attention_varlen_forward

    q, k, v, cu_q, cu_k, _, _ = draw(device, (150, 3), (150, 3), heads=(1, 1))
    options = {"is_causal": False, "scale": 0.25}
    out, lse = attention_varlen_forward(q, k, v, cu_q, cu_k, 64, 64, **options)
    torch.testing.assert_close(out[:64], loop(q, k, v, cu_q, cu_k)[:64], rtol=1e-4, atol=1e-5)
    assert (out[64:150] == 0).all()
    assert (lse[:, 64:150] == float("inf")).all()
    torch.testing.assert_close(out[150:], loop(q, k, v, cu_q, cu_k)[150:], rtol=1e-4, atol=1e-5)
    dq, dk, dv = attention_varlen_backward(torch.ones_like(q), q, k, v, out, lse, cu_q, cu_k, 64, 64, **options)
    for gradient in (dq, dk, dv):
        assert gradient.isfinite().all()
        assert (gradient[64:150] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_nan_and_inf_stay_in_their_sequence(value: float, backend: str, device: torch.device) -> None:
    args = draw(device, (5, 4, 6))
    args[2][6, 0, 3] = value
    with mmfast.backend(backend):
        out = ops.attention_varlen(*args)
    assert not out[5:9, 0, 3].isfinite().any()
    out[5:9, 0, 3] = 0.0
    assert out.isfinite().all()


@pytest.mark.triton
def test_same_bits_twice(device: torch.device) -> None:
    args = draw(device, (9, 3), (5, 66), heads=(2, 1))
    with mmfast.backend("triton"):
        first, second = (outputs_and_gradients(ops.attention_varlen, args, {}) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("poisoned")
def test_equal_lengths_are_a_batch(backend: str, device: torch.device) -> None:
    """Three sequences of 7 are a batch of 3, and causal means what it means for `attention`."""
    q, k, v, *rest = draw(device, (7, 7, 7))
    batch = [x.unflatten(0, (3, 7)).transpose(1, 2) for x in (q, k, v)]
    for is_causal in (False, True):
        with mmfast.backend(backend):
            found = ops.attention_varlen(q, k, v, *rest, is_causal=is_causal)
        wanted = ops.attention(*batch, is_causal=is_causal)
        torch.testing.assert_close(found, wanted.transpose(1, 2).flatten(0, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_differentiable_twice(backend: str, device: torch.device) -> None:
    """On the torch backend with PyTorch's unfused attention, the one that it can differentiate twice."""
    args = draw(device, (3, 0, 2), (2, 3, 4), heads=(2, 1), padding=1)
    leaves = [x.requires_grad_() for x in args[:3]]

    def penalty(fn) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
        grads = torch.autograd.grad(fn(*leaves, *args[3:], is_causal=True).sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    with mmfast.backend(backend), sdpa_kernel(SDPBackend.MATH):
        found = penalty(ops.attention_varlen)
    torch.testing.assert_close(found, penalty(reference.attention_varlen), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
def test_formulas_in_float64(is_causal: bool) -> None:
    q, k, v, *rest = draw(torch.device("cpu"), (3, 0, 1), (2, 1, 2), heads=(2, 1), width=2, padding=1)
    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    for fn in (reference.attention_varlen, ops.attention_varlen):
        assert torch.autograd.gradcheck(lambda *qkv, fn=fn: fn(*qkv, *rest, is_causal=is_causal), inputs)

    # Below the public function, which sends float64 to PyTorch's op: the registered autograd formula.
    def registered(*qkv: Tensor) -> Tensor:
        return torch.ops.mmfast.attention_varlen(*qkv, *rest, is_causal, 0.6)[0]

    assert torch.autograd.gradcheck(registered, inputs)
    assert torch.autograd.gradgradcheck(registered, inputs, fast_mode=True)


def op_arguments(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    q, k, v, *rest = draw(device, (3, 2), (2, 4), heads=(1, 1), padding=1)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = torch.ops.mmfast.attention_varlen_forward(q, k, v, *rest, False, 0.3)
    saved = (torch.randn_like(q), q, k, v, out, lse, *rest)
    return [
        ("attention_varlen", (*leaves, *rest, False, 0.3)),
        ("attention_varlen", (*leaves, *rest, True, 0.3)),
        ("attention_varlen_forward", (q.half(), k.half(), v.half(), *rest, False, 0.3)),
        ("attention_varlen_backward", (*saved, False, 0.3, [True, False, True])),
        ("attention_varlen_backward", (*saved, False, 0.3, [True, False, False])),
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index", range(5))
def test_opcheck(index: int, backend: str, device: torch.device) -> None:
    name, args = op_arguments(device)[index]
    with mmfast.backend(backend):
        opcheck(getattr(torch.ops.mmfast, name).default, args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_equals_eager(compiler: str, backend: str, device: torch.device) -> None:
    """Full graph, forward and backward, then other lengths and totals under dynamic shapes."""

    def fn(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_q: int, max_k: int
    ) -> Tensor:
        return ops.attention_varlen(q * 2, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, is_causal=True)

    compiled = torch.compile(fn, fullgraph=True, backend=compiler, dynamic=True)
    with mmfast.backend(backend):
        for lengths in ((5, 3), (4, 2, 9)):
            args = draw(device, lengths, heads=(1, 1))
            eager = outputs_and_gradients(fn, args, {})
            torch.testing.assert_close(outputs_and_gradients(compiled, args, {}), eager, rtol=1e-5, atol=2e-6)


class Ragged(torch.nn.Module):
    def forward(self, q: Tensor, cu_seqlens: Tensor) -> Tensor:
        return ops.attention_varlen(q, q, q, cu_seqlens, cu_seqlens, 64, 64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_export(backend: str, device: torch.device) -> None:
    q, _, _, cu_seqlens, *_ = draw(device)
    sizes = {"q": {0: torch.export.Dim("tokens", min=2)}, "cu_seqlens": {0: torch.export.Dim("images", min=2)}}
    with mmfast.backend(backend):
        program = torch.export.export(Ragged(), (q, cu_seqlens), dynamic_shapes=sizes)
        assert "mmfast.attention_varlen" in str(program.graph)
        other = draw(device, (2, 4, 8, 1))
        torch.testing.assert_close(program.module()(other[0], other[3]), Ragged()(other[0], other[3]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend: str, device: torch.device) -> None:
    half = torch.float16 if device.type == "cpu" else torch.bfloat16
    args = draw(device)
    with torch.autocast(device.type, dtype=half), mmfast.backend(backend):
        out = ops.attention_varlen(args[0], args[1].to(half), *args[2:])
        registered = torch.ops.mmfast.attention_varlen(*args, False, 0.25)[0]
    assert (out.dtype, registered.dtype) == (half, half)
    wanted = loop(*(x.to(half).double() for x in args[:3]), *args[3:])
    torch.testing.assert_close(out.double(), wanted, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(registered.double(), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_cuda_graph_of_other_lengths(device: torch.device) -> None:
    """The lengths never visit the host, so a captured graph serves other lengths of the same totals."""
    args = draw(device, (100, 28), width=64)
    with mmfast.backend("triton"):
        ops.attention_varlen(*args[:5], 128, 128)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = ops.attention_varlen(*args[:5], 128, 128)
        for cu_seqlens in args[3:5]:
            cu_seqlens.copy_(cumulative((3, 125), device))
        graph.replay()
    torch.testing.assert_close(out, loop(*args), rtol=2e-3, atol=2e-3)


@pytest.mark.gpu
def test_offsets_beyond_31_bits(device: torch.device) -> None:
    """More than 2^31 elements: the last sequence is right."""
    lengths = (4096,) * 513
    q, k, v = (torch.randn(sum(lengths), 16, 64, device=device, dtype=torch.bfloat16) for _ in range(3))
    cu_seqlens = cumulative(lengths, device)
    with mmfast.backend("triton"):
        out = ops.attention_varlen(q, k, v, cu_seqlens, cu_seqlens, 4096, 4096)
    last = [x[-4096:].transpose(0, 1)[None] for x in (q, k, v)]
    wanted = F.scaled_dot_product_attention(*last)[0].transpose(0, 1)
    torch.testing.assert_close(out[-4096:], wanted, rtol=2e-2, atol=2e-2)
