"""What several launchers share: row layouts, grid sizes, the device guard and the audit's record."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_programs: dict[torch.device, int] = {}
_majors: dict[torch.device, int] = {}


class Rows(NamedTuple):
    """A tensor seen as rows of its last dimension: row r starts at `(r // inner, r % inner)` times the strides.

    `inner` is None where one stride serves all rows, which spares the kernel a division; so is `stride_inner` where
    rows follow one another, since the kernel knows their width when it is compiled, and that it is a multiple of 8,
    which lets it load 16 bytes at once. (Triton learns of a stride at run time only whether it is a multiple of 16.)
    """

    tensor: Tensor
    n_rows: int
    inner: int | None
    stride_outer: int
    stride_inner: int | None


def as_rows(x: Tensor) -> Rows:
    """View x (..., C) as rows without a copy wherever two strides can describe where the rows start."""
    width = x.shape[-1]
    count = x.numel() // width if width else 0
    if x.is_contiguous():
        return Rows(x, count, None, 0, None)
    if x.stride(-1) != 1 and width != 1:
        return Rows(x.contiguous(), count, None, 0, None)
    dims = [(n, s) for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n != 1]
    merged: list[tuple[int, int]] = []
    for size, stride in dims:  # outermost first: merge a dimension with the one before where they are one run
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if len(merged) <= 1:
        return Rows(x, count, None, 0, merged[0][1] if merged else None)
    if len(merged) == 2:
        (_, outer), (inner, stride) = merged
        return Rows(x, count, inner, outer, stride)
    return Rows(x.contiguous(), count, None, 0, None)


def as_vector(v: Tensor | None) -> Tensor | None:
    """A (C,) parameter with elements one apart."""
    return v if v is None or v.is_contiguous() else v.contiguous()


@triton.jit
def row_offsets(rows, inner, stride_outer, stride_inner, C: tl.constexpr):
    """Element offsets of the starts of int64 rows, see `Rows`."""
    if stride_inner is None:
        offsets = rows * C
    elif inner is None:
        offsets = rows * stride_inner
    else:
        offsets = (rows // inner) * stride_outer + (rows % inner) * stride_inner
    return offsets


@triton.jit
def column_pieces(x, PARTS: tl.constexpr):
    """A tile's columns in 1, 2, 4 or 8 pieces, one after the other, so that an epilogue takes few registers at a time.

    Not by recursion: Triton 3.4 never finishes with a function that calls itself.
    """
    if PARTS == 1:
        pieces = (x,)
    elif PARTS == 2:
        left, right = _column_halves(x)
        pieces = (left, right)  # type: ignore[assignment]
    else:
        tl.static_assert(PARTS == 4 or PARTS == 8)
        left, right = _column_halves(x)
        a, b = _column_halves(left)
        c, d = _column_halves(right)
        if PARTS == 4:
            pieces = (a, b, c, d)  # type: ignore[assignment]
        else:
            a1, a2 = _column_halves(a)
            b1, b2 = _column_halves(b)
            c1, c2 = _column_halves(c)
            d1, d2 = _column_halves(d)
            pieces = (a1, a2, b1, b2, c1, c2, d1, d2)  # type: ignore[assignment]
    return pieces


@triton.jit
def _column_halves(x):
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1)))


def resident_programs(device: torch.device) -> int:
    """Programs of a persistent grid: two a multiprocessor; a few in the interpreter."""
    if device.type != "cuda":
        return 3
    if device not in _programs:
        _programs[device] = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    return _programs[device]


def device_major(device: torch.device) -> int:
    """Major compute capability; Hopper's in the interpreter."""
    if device.type != "cuda":
        return 9
    if device not in _majors:
        _majors[device] = torch.cuda.get_device_properties(device).major
    return _majors[device]


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Context in which Triton launches on x's device (and on that device's current stream)."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


@dataclass(frozen=True)
class Compilation:
    """One configuration of a kernel as it ships, for `mmfast audit` to compile without a GPU.

    `arguments` gives every runtime argument its Triton type (`"*bf16"`, `"i32"`, `"fp32"`, a tuple of them, or None
    for a None that the kernel tests); pointers, and integers listed in `divisible`, are multiples of 16.

    On sm_90 the audit fails any 16-bit or tf32 dot of 64 rows or more that was not made into wgmma, declared or not;
    `tensor_cores` says that there is one, so that a kernel whose dots vanished fails as well.
    """

    label: str
    kernel: Any
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    divisible: tuple[str, ...] = ()
    vector_loads: bool = False  # rows are whole 16-byte pieces, so they must be read 16 bytes at a time
    vector_stores: bool = False  # likewise, where the kernel writes rows
    num_stages: int | None = None  # None: Triton's default
    arches: tuple[int, ...] | None = None  # the architectures (80, 90, 100) it ships for; None: all
    tensor_cores: bool = False  # has a dot of 64 rows or more, 16-bit or tf32: HGMMA on sm_90, HMMA on sm_80
    waste: float | None = None  # FLOPs issued per useful FLOP at the shape in the label; below 1 where work is skipped
    waste_limit: float | None = None  # what `waste` must not exceed
    normals: float | None = None  # normals a thread makes, four with one Philox, which must not be computed for each


AUDIT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
AUDIT_ROWS = (
    *((width, torch.float32) for width in (64, 72, 197, 384, 768, 1024, 1280, 1408, 4096, 8192)),
    *((width, torch.bfloat16) for width in (64, 72, 197, 384, 768, 1024, 1280, 1408, 4096, 8192)),
    *((width, torch.float16) for width in (72, 197, 768, 8192)),  # bfloat16's code but for the conversions
)
AUDIT_MIXED_WIDTHS = (197, 768, 1024, 8192)  # a 16-bit x beside float32 weights or a float32 residual


def whole_vectors(width: int, dtype: torch.dtype) -> bool:
    """Whether a row of `width` elements is a number of 16-byte pieces."""
    return width * dtype.itemsize % 16 == 0


def row_arguments(suffix: str = "", *, strided: bool = False) -> dict[str, str | None]:
    """Types of the arguments that describe `Rows`: of contiguous rows, or of a slice such as `x[:, 1:]`."""
    kind = "i32" if strided else None
    return {f"inner{suffix}": kind, f"stride_outer{suffix}": "i32", f"stride_inner{suffix}": kind}


@triton.jit
def column_sums_kernel(
    first_ptr,  # [P, C] float32
    second_ptr,  # [P, C] float32 or None
    third_ptr,  # [P, C] float32 or None
    first_out_ptr,  # [C]
    second_out_ptr,  # [C]
    third_out_ptr,  # [C]
    count,  # P
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum up to three tables of partial sums over their rows, always in the same order."""
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    if first_ptr is not None:
        _column_sum(first_ptr, first_out_ptr, count, cols, C, BLOCK_P, BLOCK_C)
    if second_ptr is not None:
        _column_sum(second_ptr, second_out_ptr, count, cols, C, BLOCK_P, BLOCK_C)
    if third_ptr is not None:
        _column_sum(third_ptr, third_out_ptr, count, cols, C, BLOCK_P, BLOCK_C)


@triton.jit
def _column_sum(in_ptr, out_ptr, count, cols, C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, count, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)
        mask = (rows < count)[:, None] & (cols < C)[None, :]
        offsets = rows[:, None].to(tl.int64) * C + cols[None, :]
        total += tl.load(in_ptr + offsets, mask=mask, other=0.0)  # [BLOCK_P, BLOCK_C]
    value = tl.sum(total, axis=0)
    tl.store(out_ptr + cols, value.to(out_ptr.dtype.element_ty), mask=cols < C)


COLUMN_SUMS = {"BLOCK_P": 32, "BLOCK_C": 32}


def column_sums(pairs: list[tuple[Tensor | None, Tensor | None]]) -> None:
    """Sum each given (P, C) float32 table over P into its (C,) output; at most three pairs."""
    given = [(table, out) for table, out in pairs if table is not None]
    if not given:
        return
    tables = [table for table, _ in given] + [None] * (3 - len(given))
    outs = [out for _, out in given] + [None] * (3 - len(given))
    first = given[0][0]
    count, width = first.shape
    grid = (triton.cdiv(width, COLUMN_SUMS["BLOCK_C"]),)
    column_sums_kernel[grid](*tables, *outs, count, C=width, **COLUMN_SUMS, num_warps=4)


def triton_type(dtype: torch.dtype) -> str:
    """The Triton name of a pointer to `dtype`, for `Compilation`."""
    return {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}[dtype]


def audit_configurations() -> Iterator[Compilation]:
    """The second reduction, of the tables that the ops give it."""
    for tables, width, dtype in (
        *((2, width, torch.float32) for width in (72, 197, 8192)),
        *((3, width, torch.float32) for width in (72, 197, 8192)),
        *((3, 768, dtype) for dtype in AUDIT_DTYPES),
    ):
        out = triton_type(dtype)
        arguments: dict[str, str | None] = {"count": "i32"}
        for index, name in enumerate(("first", "second", "third")):
            arguments[f"{name}_ptr"] = "*fp32" if index < tables else None
            arguments[f"{name}_out_ptr"] = out if index < tables else None
        yield Compilation(
            label=f"column_sums[{out[1:]}-{tables}x{width}]",
            kernel=column_sums_kernel,
            arguments=arguments,
            constants={"C": width, **COLUMN_SUMS},
            num_warps=4,
            vector_loads=whole_vectors(width, torch.float32),
        )
