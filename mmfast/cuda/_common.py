"""What the launchers of the CUDA C++ kernels share: the extension, and tensors as the numbers it takes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import extension

__all__ = ["DTYPES", "Rows", "as_rows", "as_vector", "current", "dtype_code", "extension", "pointer", "programs"]

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""The codes of csrc/host.h."""

_processors: dict[int, int] = {}


def dtype_code(x: Tensor) -> int:
    """The code of x's dtype."""
    return DTYPES[x.dtype]


def pointer(x: Tensor | None) -> int:
    """Where x begins, 0 for None."""
    return 0 if x is None else x.data_ptr()


def current(x: Tensor) -> tuple[int, int]:
    """The device that a kernel on x runs on and its current stream; (-1, 0) in the emulation."""
    if not x.is_cuda:
        return -1, 0
    index = x.get_device()
    return index, torch._C._cuda_getCurrentRawStream(index)


def programs(x: Tensor, each: int = 2) -> int:
    """Blocks of a persistent grid: `each` a multiprocessor; a few in the emulation."""
    if not x.is_cuda:
        return 3
    index = x.get_device()
    if index not in _processors:
        _processors[index] = torch.cuda.get_device_properties(index).multi_processor_count
    return each * _processors[index]


class Rows(NamedTuple):
    """A tensor seen as rows of its last dimension: row r starts at `r // inner * outer + r % inner * stride`."""

    tensor: Tensor
    n_rows: int
    inner: int  # at least 1
    outer: int
    stride: int


def as_rows(x: Tensor) -> Rows:
    """View x (..., C) as rows, without a copy wherever two strides can describe where the rows start."""
    width = x.shape[-1]
    count = x.numel() // width if width else 0
    if x.is_contiguous():
        return Rows(x, count, max(1, count), 0, width)
    if x.stride(-1) != 1 and width != 1:
        return Rows(x.contiguous(), count, max(1, count), 0, width)
    merged: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):  # merge with the one before where one run
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if len(merged) <= 1:
        return Rows(x, count, max(1, count), 0, merged[0][1] if merged else width)
    if len(merged) == 2:
        (_, outer), (inner, stride) = merged
        return Rows(x, count, inner, outer, stride)
    return Rows(x.contiguous(), count, max(1, count), 0, width)


def as_vector(v: Tensor | None) -> Tensor | None:
    """A (C,) parameter with elements one apart."""
    return v if v is None or v.is_contiguous() else v.contiguous()
