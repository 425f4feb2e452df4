"""Numbers of the emulation: conversions are PyTorch's, fragments of the tensor cores those of the PTX ISA."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.emulation.compile import CSRC, HERE, build, load, nvcc

DTYPES = {"half": torch.float16, "bf16": torch.bfloat16}
TYPES = pytest.mark.parametrize("name", DTYPES)


@pytest.fixture(scope="module")
def functions() -> ctypes.CDLL:
    return load("numerics.cu")


def call(function: Any, *args: Tensor | int) -> None:
    function(*[ctypes.c_void_p(arg.data_ptr()) if isinstance(arg, Tensor) else ctypes.c_int64(arg) for arg in args])


def convert(functions: ctypes.CDLL, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as dtype, by vectors and by single elements, which must agree."""
    y, z = torch.empty(x.shape, dtype=dtype), torch.empty(x.shape, dtype=dtype)
    call(getattr(functions, name), x, y, x.numel())
    call(getattr(functions, f"{name}_single"), x, z, x.numel())
    whole = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(y.view(whole), z.view(whole))
    return y


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Equal bits, but that any NaN is as good as another."""
    whole = torch.int32 if found.dtype == torch.float32 else torch.int16
    assert torch.equal(found.isnan(), expected.isnan())
    same = (found.view(whole) == expected.view(whole)) | found.isnan()
    assert same.all(), f"{int((~same).sum())} of {found.numel()} differ"


# ---------------------------------------------------------------- conversions
@TYPES
def test_every_16_bit_value_widens_as_in_torch(functions: ctypes.CDLL, name: str) -> None:
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(DTYPES[name])
    assert_same(convert(functions, f"{name}_to_float", every, torch.float32), every.float())


@TYPES
def test_floats_narrow_as_in_torch(functions: ctypes.CDLL, name: str) -> None:
    """Two million bit patterns; and about every 16-bit value its ties, with neighbours on both sides."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(-(2**31), 2**31, (2**21,), generator=generator).to(torch.int32).view(torch.float32)
    exact = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(DTYPES[name]).float()
    following = torch.roll(exact, -1)
    ties = ((exact.double() + following.double()) / 2).float()  # a float32 has the bits for it
    around = [(t.view(torch.int32) + step).view(torch.float32) for t in (exact, ties) for step in (-1, 0, 1)]
    edges = [0.0, -0.0, 65504.0, 65519.996, 65520.0, 65536.0, 3.38953e38, 3.4e38, 2**-24, 2**-25, 2**-26, 6.1e-5, 1e-45]
    x = torch.cat([drawn, *around, torch.tensor([*edges, float("inf"), float("-inf"), float("nan")])])
    x = torch.cat([x, x.new_zeros(-x.numel() % 8)])
    assert_same(convert(functions, f"float_to_{name}", x, DTYPES[name]), x.to(DTYPES[name]))


@TYPES
def test_a_pair_has_its_first_element_in_the_low_half(functions: ctypes.CDLL, name: str) -> None:
    pairs = torch.randn(32, 2).to(DTYPES[name])
    swapped = torch.empty_like(pairs)
    call(getattr(functions, f"swap_{name}"), pairs, swapped)
    assert torch.equal(swapped, pairs.flip(1))


# ---------------------------------------------------------------- reductions
def test_sums_and_maxima(functions: ctypes.CDLL) -> None:
    x = torch.randn(128)
    out, pairs = torch.empty(4, 128), torch.empty(128, 2)
    call(functions.reduce, x, out, pairs)
    warps, quads = x.double().view(4, 32), x.double().view(32, 4)
    torch.testing.assert_close(out[0].double(), warps.sum(1).repeat_interleave(32), rtol=0, atol=2e-6)
    assert torch.equal(out[1], x.view(4, 32).amax(1).repeat_interleave(32))
    torch.testing.assert_close(out[2].double(), (quads.sum(1) - quads.amax(1)).repeat_interleave(4), rtol=0, atol=2e-6)
    torch.testing.assert_close(out[3].double(), x.double().sum().expand(128), rtol=0, atol=1e-5)
    assert (out[3] == out[3, 0]).all()
    assert torch.equal(pairs[:, 0], out[3])  # two sums at once are the two sums
    torch.testing.assert_close(pairs[:, 1].double(), x.double().square().sum().expand(128), rtol=0, atol=1e-4)


# ---------------------------------------------------------------- tensor cores
def fragment_places(k: int) -> tuple[list[list[tuple[int, int]]], ...]:
    """(row, column) of each element of A, B and C in each lane: PTX ISA, fragments of mma.m16n8k8 and m16n8k16.

    Written from its formulas: groupID = lane >> 2, threadID = lane % 4.
    """
    a, b, c = [], [], []
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        in_a, in_b, in_c = [], [], []
        for i in range(k // 2):
            if k == 16:
                row = group if i in (0, 1, 4, 5) else group + 8
                column = thread * 2 + (i & 1) + (0 if i < 4 else 8)
            else:
                row = group if i < 2 else group + 8
                column = thread * 2 + (i & 1)
            in_a.append((row, column))
        for i in range(k // 4):
            in_b.append((thread * 2 + (i & 1) + (0 if i < 2 else 8), group))
        for i in range(4):
            in_c.append((group if i < 2 else group + 8, thread * 2 + (i & 1)))
        a.append(in_a)
        b.append(in_b)
        c.append(in_c)
    return a, b, c


def gathered(matrix: Tensor, places: list[list[tuple[int, int]]]) -> Tensor:
    return torch.stack([torch.stack([matrix[place] for place in lane]) for lane in places])


@pytest.mark.parametrize("k", [16, 8])
@TYPES
def test_mma_has_the_fragments_of_the_ptx_isa(functions: ctypes.CDLL, name: str, k: int) -> None:
    a, b, c = (torch.randn(shape).to(DTYPES[name]) for shape in ((16, k), (k, 8), (16, 8)))
    in_a, in_b, in_c = fragment_places(k)
    d = gathered(c.float(), in_c).contiguous()
    call(getattr(functions, f"mma_{name}_{k}"), gathered(a, in_a), gathered(b, in_b), d)
    expected = gathered(a.double() @ b.double() + c.double(), in_c)
    torch.testing.assert_close(d.double(), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("transpose", [False, True], ids=("rows", "columns"))
@pytest.mark.parametrize("count", [4, 2, 1])
def test_ldmatrix_hands_out_rows_or_columns(functions: ctypes.CDLL, count: int, transpose: bool) -> None:
    tiles = torch.arange(count * 64, dtype=torch.int16).view(count, 8, 8)
    r = torch.empty(32, count, 2, dtype=torch.int16)
    call(functions.ldmatrix, tiles, r, count, int(transpose))
    read = tiles.transpose(1, 2) if transpose else tiles
    # lane holds elements 2 (lane % 4) and the next of row lane / 4
    assert torch.equal(r, read.reshape(count, 32, 2).transpose(0, 1))


@pytest.mark.parametrize("k", [16, 8])
@TYPES
def test_ldmatrix_and_mma_multiply_matrices(functions: ctypes.CDLL, name: str, k: int) -> None:
    a, b = torch.randn(16, k).to(DTYPES[name]), torch.randn(k, 8).to(DTYPES[name])
    c, other = torch.empty(16, 8), torch.empty(16, 8)
    call(getattr(functions, f"product_{name}_{k}"), a, b, b.T.contiguous(), c, other)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=0, atol=5e-6)
    assert torch.equal(c, other)


# ---------------------------------------------------------------- device functions
def test_device_functions(functions: ctypes.CDLL) -> None:
    x = torch.cat([torch.rand(200) * 20 + 1e-3, torch.tensor([1e-30, 0.5, 1.0, 1.5, 2.0, 1e6, 127.0])])
    y = torch.empty(x.numel(), 8)
    call(functions.functions, x, y, x.numel())
    wide = x.double()
    turns = torch.remainder(wide, 2) * torch.pi
    exact = [wide.rsqrt(), turns.sin(), turns.cos(), wide.exp(), wide.log(), wide / 3, wide.clamp(0, 1), wide.exp2()]
    for index, value in enumerate(exact):
        torch.testing.assert_close(y[:, index], value.float(), rtol=3e-7, atol=1e-7)


def test_integer_functions(functions: ctypes.CDLL) -> None:
    x = torch.randint(-(2**63), 2**63 - 1, (32, 2))
    x[:3, 0] = torch.tensor([0, 0x00F0, -1])
    y = torch.empty(32, 5, dtype=torch.int64)
    call(functions.integers, x, y)
    for (a, b), row in zip(x.tolist(), y.tolist(), strict=True):
        a, b, low = a % 2**64, b % 2**64, a % 2**32
        first = (low & -low).bit_length()
        assert [v % 2**64 for v in row] == [
            a * b >> 64, low * (b % 2**32) >> 32, low.bit_count(), 32 - low.bit_length(), first
        ]  # fmt: skip


# ---------------------------------------------------------------- the same source for a GPU
@pytest.mark.slow
@pytest.mark.parametrize("source", ["numerics.cu", "planted.cu"])
def test_nvcc_compiles_it_too(source: str, tmp_path: Path) -> None:
    archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in build.architectures(nvcc())]
    command: list[str | Path] = [nvcc(), "-std=c++20", "-O3", *archs, "-Xptxas=-v", "-I", CSRC, "-c", HERE / source]
    done = subprocess.run([*command, "-o", tmp_path / "x.o"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    reports = [line for line in done.stderr.splitlines() if "spill stores" in line]
    assert reports
    for line in reports:
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in line
