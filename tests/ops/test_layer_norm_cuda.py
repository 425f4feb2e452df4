"""What the CUDA C++ kernels of layer_norm and add_layer_norm have of their own: shapes of blocks, alignment, orders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mmfast
from mmfast import cuda, ops, reference
from mmfast.ops._launchers import launchers
from tests.grading import DTYPES, check_against_reference, outputs_and_gradients

pytestmark = pytest.mark.cuda

# One of each shape of block: lanes a row, pieces a thread, warps a row, single elements; 16-bit and float32.
SHAPES = (
    (7, 8),
    (70, 24),
    (9, 72),
    (11, 128),
    (5, 200),
    (3, 384),
    (8, 512),
    (15, 768),
    (4, 1024),
    (3, 1408),
    (2, 2056),
    (2, 4096),
    (2, 8192),
    (9, 7),
    (4, 65),
    (2, 1001),
    (2, 8191),
)


def normal(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return (torch.randn(shape) * 2 + 0.5).to(device, dtype)


def norm_arguments(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(normal(*size, dtype=dtype, device=device) for size in (shape, shape[1:], shape[1:]))


def add_arguments(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device, stream: torch.dtype | None = None
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """x, residual, weight, bias and both scales; the residual in `stream`."""
    x, residual = (normal(*shape, dtype=kind, device=device) for kind in (dtype, stream or dtype))
    weight, bias = (normal(shape[1], dtype=stream or dtype, device=device) for _ in range(2))
    scale = (normal(shape[1], dtype=dtype, device=device), normal(shape[0], 1, dtype=dtype, device=device))
    return (x, residual, weight, bias), {"scale": scale}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned", "wide_sums")
def test_layer_norm_of_every_shape_of_block(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    args = norm_arguments(shape, dtype, device)
    check_against_reference(ops.layer_norm, reference.layer_norm, args, {}, "cuda", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned", "wide_sums")
def test_add_layer_norm_of_every_shape_of_block(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    args, kwargs = add_arguments(shape, dtype, device)
    check_against_reference(ops.add_layer_norm, reference.add_layer_norm, args, kwargs, "cuda", dtype)


@pytest.mark.sanitized
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("shape", [(13, 24), (3, 520), (5, 33)], ids=str)
@pytest.mark.usefixtures("poisoned", "wide_sums")
def test_16_bit_branch_onto_a_float32_stream(shape: tuple[int, int], half: torch.dtype, device: torch.device) -> None:
    """And the other way round: x or the residual moves 8 bytes where s moves 16."""
    args, kwargs = add_arguments(shape, half, device, torch.float32)
    check_against_reference(ops.add_layer_norm, reference.add_layer_norm, args, kwargs, "cuda", half)
    args, kwargs = add_arguments(shape, torch.float32, device, half)
    weight, bias = (p.float() for p in args[2:])
    check_against_reference(
        ops.add_layer_norm, reference.add_layer_norm, (*args[:2], weight, bias), kwargs, "cuda", half
    )


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("width", [72, 69])
@pytest.mark.usefixtures("poisoned")
def test_float32_parameters_of_16_bit_rows(width: int, half: torch.dtype, device: torch.device) -> None:
    args = (normal(6, width, dtype=half, device=device), *norm_arguments((1, width), torch.float32, device)[1:])
    check_against_reference(ops.layer_norm, reference.layer_norm, args, {}, "cuda", half)
    (x, residual, _, _), _ = add_arguments((6, width), half, device)
    (_, _, weight, bias), kwargs = add_arguments((6, width), torch.float32, device)
    args = (x, residual, weight, bias)
    check_against_reference(ops.add_layer_norm, reference.add_layer_norm, args, kwargs, "cuda", half)


@pytest.mark.parametrize("kibibytes", [99, 154])
def test_less_shared_memory(kibibytes: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a block may have less of it, fewer rows or fewer tensors of one are copied ahead; the bits are the same."""
    args = norm_arguments((4, 8192), torch.float32, device)
    more, kwargs = add_arguments((4, 8192), torch.float32, device)
    with mmfast.backend("cuda"):
        found = []
        for limit in (None, kibibytes << 10):
            if limit is not None:
                monkeypatch.setenv("MMFAST_EMULATED_SHARED", str(limit))
            norms = outputs_and_gradients(ops.layer_norm, args, {})
            found.append([*norms, *outputs_and_gradients(ops.add_layer_norm, more, kwargs)])
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)


def test_two_16_bit_dtypes(device: torch.device) -> None:
    """float16 onto bfloat16 is float32, and each gradient of its input's dtype."""
    x, residual = torch.randn(2, 6, 40, device=device)
    args = (x.half(), residual.bfloat16(), torch.randn(40, device=device), torch.randn(40, device=device))
    check_against_reference(ops.add_layer_norm, reference.add_layer_norm, args, {}, "cuda", torch.bfloat16)
    with mmfast.backend("cuda"):
        y, s, dx, dresidual, *_ = outputs_and_gradients(ops.add_layer_norm, args, {})
    assert [t.dtype for t in (y, s, dx, dresidual)] == [torch.float32] * 2 + [torch.float16, torch.bfloat16]


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shift", [0, 1, 2, 3])
@pytest.mark.usefixtures("poisoned")
def test_any_alignment(shift: int, dtype: torch.dtype, device: torch.device) -> None:
    """Rows of a wider tensor from column `shift` on: pointers, and strides, that are no multiple of 16 bytes."""
    base = normal(4, 64 + 4 * (shift > 1), dtype=dtype, device=device)
    x = base[:, shift : shift + 48]
    weight = normal(60, dtype=dtype, device=device)[shift : shift + 48]
    args = (x, weight, weight)
    check_against_reference(ops.layer_norm, reference.layer_norm, args, {}, "cuda", dtype)
    kwargs = {"scale": weight}
    args = (x, x.flip(0), weight, weight)
    check_against_reference(ops.add_layer_norm, reference.add_layer_norm, args, kwargs, "cuda", dtype)


def norm_calls(device: torch.device) -> dict[str, Callable[[], list[Tensor]]]:
    calls: dict[str, Callable[[], list[Tensor]]] = {}
    shapes = (((21, 40), torch.bfloat16), ((2, 1408), torch.bfloat16), ((2, 300), torch.float16))
    for shape, dtype in (*shapes, ((3, 1040), torch.float32), ((3, 129), torch.float32)):
        args = norm_arguments(shape, dtype, device)
        calls[f"norm {shape}"] = lambda args=args: outputs_and_gradients(ops.layer_norm, args, {})  # type: ignore[misc]
        more, kwargs = add_arguments(shape, dtype, device)
        calls[f"add {shape}"] = lambda args=more, kwargs=kwargs: outputs_and_gradients(  # type: ignore[misc]
            ops.add_layer_norm, args, kwargs
        )
    return calls


@pytest.mark.sanitized
def test_same_bits_in_any_order_of_threads(device: torch.device) -> None:
    """On a GPU: the same bits twice."""
    calls = norm_calls(device)
    with mmfast.backend("cuda"):
        wanted = {name: call() for name, call in calls.items()}
        for order in (0, 1, 3):
            if cuda.emulated():
                cuda.extension().set_thread_order(order)
            try:
                found = {name: call() for name, call in calls.items()}
            finally:
                if cuda.emulated():
                    cuda.extension().set_thread_order(0)
            for name, tensors in found.items():
                for index, (got, want) in enumerate(zip(tensors, wanted[name], strict=True)):
                    assert torch.equal(got, want), f"{name}: result {index} in order {order}"


@pytest.mark.parametrize("width", [40, 768, 129])
def test_a_row_gives_the_same_bits_in_any_batch(width: int, device: torch.device) -> None:
    x, residual, dy = (normal(50, width, dtype=torch.bfloat16, device=device) for _ in range(3))
    weight, bias = (normal(width, dtype=torch.bfloat16, device=device) for _ in range(2))
    norm, add = launchers("cuda", "layer_norm"), launchers("cuda", "add_layer_norm")
    nothing = dict.fromkeys(("dx", "dweight", "dbias", "dgamma", "dsample"))
    none = {f"{name}_dtype": None for name in nothing}

    def rows(count: int) -> list[Tensor]:
        part, stream, grad = (t[:count].contiguous() for t in (x, residual, dy))
        y, mean, rstd = norm.layer_norm_forward(part, weight, bias, 1e-5)
        dx, _, _ = norm.layer_norm_backward(
            grad, part, weight, mean, rstd, need_dx=True, dweight_dtype=None, dbias_dtype=None
        )
        both, s, mean, rstd = add.add_layer_norm_forward(part, stream, weight, bias, 1e-5, weight, None)
        found = add.add_layer_norm_backward(
            grad, grad, s, None, weight, None, None, mean, rstd, dresidual_dtype=torch.bfloat16, **none
        )
        return [y, dx, both, s, found[1]]

    for few, many in zip(rows(3), rows(50), strict=True):
        assert torch.equal(few, many[:3])


def test_statistics_serve_the_other_backend(device: torch.device) -> None:
    """mean and rstd mean the same to PyTorch's own backward, so a forward here and a backward there agree."""
    x, weight, bias = norm_arguments((6, 56), torch.float32, device)
    with mmfast.backend("cuda"):
        _, mean, rstd = torch.ops.mmfast.layer_norm_forward(x, weight, bias, 1e-5)
    dy = torch.randn_like(x)
    found = []
    for backend in ("cuda", "torch"):
        with mmfast.backend(backend):
            found.append(torch.ops.mmfast.layer_norm_backward(dy, x, weight, bias, mean, rstd, [True] * 3))
    torch.testing.assert_close(mean, x.mean(-1))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [64, 63])
def test_strided_gradients(width: int, device: torch.device) -> None:
    """Gradients of y and s that are expanded, or rows of a wider tensor, are read where they are."""
    (x, residual, weight, bias), _ = add_arguments((6, width), torch.float32, device)
    add = launchers("cuda", "add_layer_norm")
    _, s, mean, rstd = add.add_layer_norm_forward(x, residual, weight, bias, 1e-5, None, None)
    wanted = dict.fromkeys(("dresidual_dtype", "dweight_dtype", "dbias_dtype"), torch.float32)
    none = dict.fromkeys(("dx_dtype", "dgamma_dtype", "dsample_dtype"))
    row = torch.randn(1, width, device=device).expand(6, width)
    wide = torch.randn(3, 3, 2 * width, device=device)[:, 1:, :width]
    for dy, ds in ((row, wide), (wide, row)):
        found = add.add_layer_norm_backward(
            dy.reshape(6, width) if dy is row else dy, ds, s, None, weight, None, None, mean, rstd, **wanted, **none
        )
        copies = (dy.reshape(6, width).contiguous(), ds.reshape(6, width).contiguous())
        plain = add.add_layer_norm_backward(*copies, s, None, weight, None, None, mean, rstd, **wanted, **none)
        for got, want in zip(found, plain, strict=True):
            if want is not None:
                torch.testing.assert_close(got, want)


def test_wider_rows_go_to_triton_or_pytorch(device: torch.device) -> None:
    why = mmfast.explain(ops.layer_norm, torch.randn(2, 8200, device=device))
    assert why[0].backend != "cuda"
    assert "above 8192" in str(why[0]) or why[0].backend == "triton"


def test_bad_arguments_of_the_extension(device: torch.device) -> None:
    """What the launchers promise is checked again where the pointers are used."""
    call = cuda.extension().layer_norm_forward
    x = torch.randn(2, 8)
    plain = (x.data_ptr(), 2, 0, 8, 0, 0, 0, 0, x.data_ptr(), 0, 0)
    for rows, width, dtype, message in (
        (0, 8, 0, "rows must be positive, got 0"),
        (2, 8193, 0, "width must be 1 to 8192, got 8193"),
        (2, 8, 3, r"dtype must be 0 \(float32\), 1 \(float16\) or 2 \(bfloat16\), got 3"),
    ):
        with pytest.raises(ValueError, match=f"layer_norm_forward: {message}"):
            call(*plain, rows, width, 1e-5, dtype, -1, 0)
