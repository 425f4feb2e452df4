"""How an op is graded: against its float64 reference, beside PyTorch's own op in the same dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import mmfast

# Below these, errors are rounding of a single value, where a ratio means nothing.
ATOL = {torch.float32: 1e-6, torch.float16: 2e-4, torch.bfloat16: 2e-3, torch.float64: 1e-12}

BACKENDS = ("torch", pytest.param("triton", marks=pytest.mark.triton))
DTYPES = (
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.float16, id="fp16"),
    # Triton's interpreter computes bfloat16 wrongly: bfloat16 kernels run on a GPU only.
    pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.gpu),
)


def outputs_and_gradients(
    fn: Callable[..., Any], args: Any, kwargs: Any, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """All outputs of `fn` and the gradients of each floating tensor argument, for fixed random output gradients."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    copies = [_leaf(leaf, dtype) for leaf in leaves]
    args, kwargs = pytree.tree_unflatten(copies, spec)
    outputs = fn(*args, **kwargs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(y.shape, generator=generator).to(torch.float16).to(y) for y in outputs]
    inputs = [leaf for leaf in copies if isinstance(leaf, Tensor)]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, inputs, grads)]


def _leaf(value: Any, dtype: torch.dtype | None) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone(memory_format=torch.preserve_format).to(dtype or value.dtype).requires_grad_()


def error(value: Tensor, truth: Tensor) -> float:
    """Relative error in the 2-norm; NaN where exactly one side has NaN."""
    return float((value.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30))


def check_against_reference(
    op: Callable[..., Any], reference: Callable[..., Any], args: Any, kwargs: Any, backend: str, dtype: torch.dtype
) -> None:
    """Assert the project's rule: error at most twice PyTorch's own in the same dtype, for outputs and gradients."""
    truth = outputs_and_gradients(reference, args, kwargs, torch.float64)
    with mmfast.backend("torch"):
        peer = outputs_and_gradients(op, args, kwargs)
    with mmfast.backend(backend):
        found = outputs_and_gradients(op, args, kwargs)
    for index, (value, other, true) in enumerate(zip(found, peer, truth, strict=True)):
        assert value.shape == true.shape
        assert value.dtype == other.dtype
        ours, theirs = error(value, true), error(other, true)
        assert ours <= 2 * theirs + ATOL[dtype], f"result {index}: error {ours:.3g}, PyTorch's {theirs:.3g}"
