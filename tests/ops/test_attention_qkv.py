"""`attention_qkv` against `attention` of its three views and the float64 reference."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import mmfast
from mmfast import ops, reference
from tests.grading import DTYPES, check_against_reference


def check(qkv: Tensor, heads: int, dtype: torch.dtype, **options: Any) -> None:
    check_against_reference(
        partial(ops.attention_qkv, num_heads=heads, **options),
        partial(reference.attention_qkv, num_heads=heads, **options),
        (qkv,),
        {},
        "triton",
        dtype,
    )


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "length", "heads", "width"), [(2, 17, 3, 16), (1, 65, 2, 64), (1, 81, 1, 40)])
def test_against_reference(
    device: torch.device, dtype: torch.dtype, batch: int, length: int, heads: int, width: int
) -> None:
    check(torch.randn(batch, length, 3 * heads * width, device=device).to(dtype), heads, dtype)


@pytest.mark.triton
def test_masks_scale_and_strides(device: torch.device) -> None:
    qkv = torch.randn(2, 21, 3 * 2 * 16, device=device)
    padding = torch.rand(2, 1, 1, 21, device=device) > 0.3
    check(qkv, 2, torch.float32, attn_mask=padding, scale=0.4)
    check(qkv, 2, torch.float32, attn_mask=torch.randn(21, 21, device=device))
    check(qkv, 2, torch.float32, is_causal=True)
    check(torch.randn(21, 2, 96, device=device).transpose(0, 1), 2, torch.float32)  # (N, B, 3 H d) in memory
    check(torch.randn(2, 22, 96, device=device)[:, 1:], 2, torch.float32)


@pytest.mark.triton
@pytest.mark.usefixtures("poisoned")
def test_output_and_gradient_are_packed(device: torch.device) -> None:
    """Contiguous output and gradient, every element written, and no copy of a view on the way."""
    from mmfast.kernels import attention as kernels

    qkv = torch.randn(2, 21, 3 * 2 * 24, device=device, dtype=torch.float16, requires_grad=True)
    seen = []
    unit_columns = kernels._unit_columns
    kernels._unit_columns = lambda x: (seen.append((x, y := unit_columns(x))), y)[1]
    try:
        with mmfast.backend("triton"):
            out = ops.attention_qkv(qkv, 2)
            grad = torch.autograd.grad(out, qkv, torch.ones_like(out))[0]
    finally:
        kernels._unit_columns = unit_columns
    assert len(seen) == 8
    assert all(x is y for x, y in seen)
    for x, shape in ((out, (2, 21, 48)), (grad, (2, 21, 144))):
        assert x.shape == shape
        assert x.is_contiguous()
        assert x.isfinite().all()


@pytest.mark.triton
def test_compiled_equals_eager(device: torch.device) -> None:
    qkv = torch.randn(1, 21, 96, device=device, requires_grad=True)

    def run(qkv: Tensor) -> Tensor:
        return ops.attention_qkv(qkv * 1.5, 2)

    with mmfast.backend("triton"):
        expected = run(qkv)
        truth = torch.autograd.grad(expected.sum(), qkv)[0]
        found = torch.compile(run, fullgraph=True, backend="aot_eager")(qkv)
        assert torch.equal(found, expected)
        assert torch.equal(torch.autograd.grad(found.sum(), qkv)[0], truth)


def test_torch_path() -> None:
    """On a CPU: what timm's attention computes, bit for bit; any option of PyTorch's op."""
    qkv = torch.randn(2, 9, 96, requires_grad=True)
    q, k, v = qkv.reshape(2, 9, 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0)
    truth = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 9, 32)
    assert torch.equal(ops.attention_qkv(qkv, 2), truth)
    torch.manual_seed(1)
    dropped = ops.attention_qkv(qkv, 2, dropout_p=0.5)
    torch.manual_seed(1)
    truth = torch.nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=0.5).transpose(1, 2).reshape(2, 9, 32)
    assert torch.equal(dropped, truth)
    assert ops.attention_qkv(qkv[:, :0], 2).shape == (2, 0, 32)


@pytest.mark.parametrize("mask", ["none", "bool", "added"])
def test_gradients_of_the_registered_op(mask: str) -> None:
    qkv = torch.randn(1, 5, 18, dtype=torch.float64, requires_grad=True)
    hidden = {"none": None, "bool": torch.rand(1, 1, 5, 5) > 0.3, "added": torch.randn(1, 1, 5, 5)}[mask]

    def run(qkv: Tensor) -> Tensor:
        return torch.ops.mmfast.attention_qkv.default(qkv, 2, hidden, True, 0.4)[0]

    assert torch.autograd.gradcheck(run, (qkv,))
    assert torch.autograd.gradgradcheck(run, (qkv,))


def test_opcheck() -> None:
    qkv = torch.randn(2, 5, 48, requires_grad=True)
    torch.library.opcheck(torch.ops.mmfast.attention_qkv.default, (qkv, 2, None, False, 0.4))
    with torch.no_grad():
        out, lse = torch.ops.mmfast.attention_qkv_forward.default(qkv, 2, None, False, 0.4)
        args = (torch.randn_like(out), qkv, 2, out, lse, None, False, 0.4)
        torch.library.opcheck(torch.ops.mmfast.attention_qkv_backward.default, args)


@pytest.mark.parametrize(
    ("qkv", "heads", "options", "error", "message"),
    [
        ([1.0], 2, {}, TypeError, "qkv must be a tensor, got list"),
        (torch.zeros(2, 5, 96, dtype=torch.int64), 2, {}, TypeError, "qkv must be floating point"),
        (torch.randn(5, 96), 2, {}, ValueError, r"qkv must have shape \(B, N, 3 \* 2 \* d\), got \(5, 96\)"),
        (torch.randn(2, 5, 97), 2, {}, ValueError, "qkv must have shape"),
        (torch.randn(2, 5, 96), 0, {}, ValueError, "num_heads must be a positive integer, got 0"),
        (torch.randn(2, 5, 96), 2, {"dropout_p": -1}, ValueError, "dropout_p"),
        (torch.randn(2, 5, 96), 2, {"attn_mask": torch.ones(4, 5)}, ValueError, "attn_mask must broadcast"),
    ],
)
def test_errors(qkv: Any, heads: int, options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        ops.attention_qkv(qkv, heads, **options)
