"""What the audit sees of dots: tensor-core instructions, a dot left without wgmma, wgmma in turn, wasted FLOPs."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("triton")

import triton
import triton.language as tl

from mmfast import cli
from mmfast.commands import _sass, audit
from mmfast.kernels._common import Compilation

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") == "1", reason="interpreted kernels cannot be compiled"
)


@triton.jit
def product_kernel(a_ptr, b_ptr, c_ptr, count, M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):
    """Sum over `count` of a (M, 32) times b (32, N)."""
    rows, cols, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, 32)
    total = tl.zeros([M, N], tl.float32)
    for step in range(0, count):
        a = tl.load(a_ptr + step * M * 32 + rows[:, None] * 32 + inner[None, :])
        b = tl.load(b_ptr + step * N * 32 + inner[:, None] * N + cols[None, :])
        total = tl.dot(a, b, total, input_precision=PRECISION)
    tl.store(c_ptr + rows[:, None] * N + cols[None, :], total)


@triton.jit
def two_products_kernel(a_ptr, b_ptr, c_ptr, count, M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):
    """As `product_kernel`, with a second product whose accumulator is added afterwards."""
    rows, cols, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, 32)
    total = tl.zeros([M, N], tl.float32)
    for step in range(0, count):
        a = tl.load(a_ptr + step * M * 32 + rows[:, None] * 32 + inner[None, :])
        b = tl.load(b_ptr + step * N * 32 + inner[:, None] * N + cols[None, :])
        total = tl.dot(a, b, total, input_precision=PRECISION)
        total += tl.dot(a * 2, b, input_precision=PRECISION)
    tl.store(c_ptr + rows[:, None] * N + cols[None, :], total)


def configuration(dtype: str = "*bf16", rows: int = 64, precision: str = "tf32", **changed: Any) -> Compilation:
    arguments: dict[str, str | None] = {"a_ptr": dtype, "b_ptr": dtype, "c_ptr": "*fp32", "count": "i32"}
    constants = {"M": rows, "N": 64, "PRECISION": precision}
    made = Compilation("product", product_kernel, arguments, constants, num_warps=4, tensor_cores=True)
    return dataclasses.replace(made, **changed)


@contextmanager
def shipped(compilation: Compilation) -> Iterator[None]:
    """Let the audit find this configuration as one of an op `dots`."""
    audit.configurations()["dots", compilation.label] = compilation
    try:
        yield
    finally:
        del audit.configurations()["dots", compilation.label]


def audited(compilation: Compilation, arch: int) -> audit.Result:
    with shipped(compilation):
        return audit.compile_one(audit.Task("dots", compilation.label, arch))


@pytest.mark.parametrize("dtype", ["*bf16", "*fp16", "*fp32"])
@pytest.mark.parametrize(("arch", "name"), [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")])
def test_tensor_cores_are_counted(dtype: str, arch: int, name: str) -> None:
    result = audited(configuration(dtype), arch)
    assert result.problems == ()
    assert set(result.tensor) == {name}
    assert result.tensor[name] > 0


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernel_without_its_tensor_cores_fails(arch: int) -> None:
    """A float32 dot without tf32 is made of multiply-adds."""
    (problem,) = audited(configuration("*fp32", precision="ieee"), arch).problems
    assert problem == {80: "no HMMA", 90: "no HGMMA", 100: "no UTCHMMA or HMMA"}[arch]
    assert audited(configuration("*fp32", precision="ieee", tensor_cores=False), arch).problems == ()


@pytest.mark.parametrize("dtype", ["*bf16", "*fp32"])
def test_dot_left_without_wgmma_fails(dtype: str) -> None:
    """wgmma takes four warps: with two, Triton leaves 64 rows to mma.sync, declared or not."""
    narrow = configuration(dtype, num_warps=2, tensor_cores=False)
    assert audited(narrow, 90).problems == ("a 64x64 dot without wgmma",)
    assert audited(narrow, 80).problems == ()
    assert audited(narrow, 100).tensor["HMMA"] > 0


def test_dot_of_few_rows_needs_no_wgmma() -> None:
    result = audited(configuration(rows=16, tensor_cores=False), 90)
    assert result.problems == ()
    assert set(result.tensor) == {"HMMA"}


def test_wgmma_in_turn_is_noted_and_fails_nothing() -> None:
    turns = audited(configuration(kernel=two_products_kernel), 90)
    assert turns.problems == ()
    assert len(turns.notes) == 1
    assert turns.notes[0].startswith("wgmma in turn: ")
    assert audited(configuration(), 90).notes == ()


def test_stages_reach_the_compiler() -> None:
    """Each stage of a pipelined loop has its own tiles in shared memory."""
    shared = [audited(configuration(num_stages=stages), 90).shared for stages in (2, 4)]
    tiles = 2 * (64 * 32 + 32 * 64)
    assert shared[1] - shared[0] >= 2 * tiles


def test_configuration_is_compiled_for_its_architectures_alone() -> None:
    with shipped(configuration(arches=(90, 100))):
        assert [task.arch for task in audit.all_tasks(("dots",)) if task.op == "dots"] == [90, 100]
        assert [task for task in audit.all_tasks(("dots",), (80,)) if task.op == "dots"] == []


@pytest.mark.parametrize(
    ("waste", "limit", "problems"),
    [
        (1.15, 1.15, ()),
        (1.56, None, ()),
        (1.56, 1.15, ("1.560 FLOPs issued per useful one > 1.15",)),
        (None, 1.15, ("has a waste_limit and no waste",)),
    ],
)
def test_waste_above_its_limit_fails(waste: float | None, limit: float | None, problems: tuple[str, ...]) -> None:
    assert audited(configuration(waste=waste, waste_limit=limit), 90).problems == problems


def test_command_prints_waste_and_tensor_cores(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wasteful, same, thrifty = (
        configuration(label=label, waste=waste, waste_limit=1.15)
        for label, waste in (("wasteful", 1.56), ("same", 1.56), ("thrifty", 1.1))
    )
    with shipped(wasteful), shipped(same), shipped(thrifty):
        tasks = [audit.Task("dots", label, 90) for label in ("wasteful", "same", "thrifty")]
        monkeypatch.setattr(audit, "all_tasks", lambda ops, arches: iter(tasks))
        assert cli.main(["audit", "dots", "--arch", "90"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "FLOPs issued per useful FLOP" in out
    assert "wasteful and 1 more │ 1.560 │ 1.15" in out
    assert "thrifty │ 1.100 │ 1.15" in out
    assert "3 configurations, 2 with a problem" in out
    assert "xHGMMA" in out


def test_dots_are_read_from_the_intermediate_code() -> None:
    code = """
    %1 = tt.dot %a, %b, %c : tensor<64x16xf16, #x<{opIdx = 0}>> * tensor<16x32xf16, #y> -> tensor<64x32xf32, #mma>
    %2 = tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<64x8xf32, #x> * tensor<8x32xf32, #y> -> tensor<64x32xf32, #m>
    %3 = tt.dot %a, %b, %c : tensor<128x8xf32, #x> * tensor<8x32xf32, #y> -> tensor<128x32xf32, #m>
    %4 = tt.dot %a, %b, %c : tensor<32x16xbf16, #x> * tensor<16x512xbf16, #y> -> tensor<32x512xf32, #m>
    %5 = tt.dot %a, %b, %c : tensor<2x64x16xbf16, #x> * tensor<2x16x16xbf16, #y> -> tensor<2x64x16xf32, #m>
    %6 = ttng.warp_group_dot %a, %b, %c : tensor<64x16xbf16, #x> * !ttg.memdesc<16x64xbf16> -> tensor<64x64xf32, #m>
    """
    assert _sass.slow_dots(code) == ["64x32", "64x32", "2x64x16"]


def test_instructions_are_counted_by_name() -> None:
    code = "HGMMA.64x64x16.F32.BF16 R24 ; @P0 HMMA.16816.F32 R4 ; UTCHMMA gdesc ; UTCHMMA.2CTA ; FFMA R1 ; QGMMA R2"
    assert _sass.tensor_instructions(code) == Counter(HGMMA=1, HMMA=1, UTCHMMA=2)
    assert _sass.loads("UTMALDG.2D [UR8] ; LDG.E.128 R4 ; LDG.E R1") == Counter({128: 2, 32: 1})
