"""Kernels that write what `kernels/_philox.py` makes, for the tests of its integers and its normals."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels._philox import normals4, philox
from mmfast.kernels._samples import seed_words


@triton.jit
def _write_kernel(out_ptr, arguments_ptr, first, n, NORMALS: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low = tl.load(arguments_ptr).to(tl.uint32)
    high = tl.load(arguments_ptr + 1).to(tl.uint32)
    sample = tl.load(arguments_ptr + 2).to(tl.uint32)
    stream = tl.load(arguments_ptr + 3).to(tl.uint32)
    chunk = first.to(tl.int64) + index
    if NORMALS:
        a, b, c, d = normals4(low, high, chunk, sample, stream)
    else:
        a, b, c, d = philox(low, high, chunk, sample, stream)
    out = out_ptr + index * 4
    tl.store(out, a.to(out_ptr.dtype.element_ty), mask=index < n)
    tl.store(out + 1, b.to(out_ptr.dtype.element_ty), mask=index < n)
    tl.store(out + 2, c.to(out_ptr.dtype.element_ty), mask=index < n)
    tl.store(out + 3, d.to(out_ptr.dtype.element_ty), mask=index < n)


def write(seed: int, sample: int, stream: int, chunks: range, device: torch.device, *, normals: bool) -> Tensor:
    """Words as int64, or normals as float32, (len(chunks), 4)."""
    out = torch.empty(len(chunks), 4, dtype=torch.float32 if normals else torch.int64, device=device)
    arguments = torch.tensor([*seed_words(seed), sample, stream], device=device)
    grid = (triton.cdiv(len(chunks), 1024),)
    _write_kernel[grid](out, arguments, chunks.start, len(chunks), NORMALS=normals, BLOCK=1024)
    return out
