"""How a test grades an op: as `mmfast verify` does, against the float64 reference and beside PyTorch's own op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mmfast
from mmfast.commands import _grading
from mmfast.reference._case import Case

ATOL = _grading.ATOL
BACKENDS = ("torch", pytest.param("triton", marks=pytest.mark.triton))
CUDA = pytest.param("cuda", marks=pytest.mark.cuda)
ALL_BACKENDS = (*BACKENDS, CUDA)
DTYPES = (
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.float16, id="fp16"),
    # Triton's interpreter computes bfloat16 wrongly: its kernels run on a GPU only, the emulated ones anywhere.
    pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.bf16),
)


def outputs_and_gradients(
    fn: Callable[..., Any], args: Any, kwargs: Any, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """All outputs of `fn` and the gradient of each tensor argument, for fixed random output gradients."""
    return list(_grading.outputs_and_gradients(fn, Case("", lambda: (args, kwargs)), dtype).values())


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
        ours, theirs = _grading.error(value, true), _grading.error(other, true)
        assert ours <= 2 * theirs + ATOL[dtype], f"result {index}: error {ours:.3g}, PyTorch's {theirs:.3g}"
