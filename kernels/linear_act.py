"""Linear layer with its activation in the epilogue: y = act(x W^T + b), and the pre-activation beside it for training.

    pre = x W^T + b          x (rows, K), W (WIDTH, K), both with K contiguous
    y   = act(pre)           gated: value * act(gate), value and gate the halves of pre's WIDTH columns

One pass: 2 rows WIDTH K FLOPs; reads x and W, writes y and, for training, pre. The activation is taken of the float32
accumulator, so y is rounded once; pre is stored for the backward pass (`_linear_act_passes`), but not for ReLU, whose
gradient y tells. A separate pass would read pre and write y once more: 39 % on top of the product at ViT-B's fc1.

Shape of a program: 128 x 128 outputs over 8 warps, in groups of 8 row blocks so that W stays in L2. Two programs fit a
multiprocessor of sm_90 (at most 128 registers a thread, 3 stages of 32 KB), so the epilogue of one runs beside the
products of the other; there is no need for a persistent grid. The epilogue takes the accumulator in parts of 128 bytes
a row, which keeps registers few. Few rows take 64 x 64 tiles, to reach all multiprocessors.

A gated activation needs a value and its gate in one thread: W's rows are read in the order value 0, gate 0, value 1,
gate 1, ..., which costs nothing since each row is K contiguous elements, and puts the two in neighbouring columns.

Loads are by pointer: the same kernel serves sm_80 to sm_100 and the interpreter. Rows, columns and K may have any size;
rows of x and W that are whole 16-byte pieces are what makes it fast.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    Compilation,
    as_rows,
    as_vector,
    column_pieces,
    device_major,
    on_device,
    resident_programs,
    row_offsets,
    triton_type,
)
from ._linear_act_math import GATED, activate
from ._linear_act_passes import activation_forward, linear_act_backward

__all__ = ["TileConfig", "activation_forward", "linear_act_backward", "linear_act_forward"]

GROUP = 8


@dataclass(frozen=True)
class TileConfig:
    """Shape of a program: `block_m` rows by `block_n` rows of W, in steps of `block_k`."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    @classmethod
    def choose(
        cls, rows: int, depth: int, width: int, dtype: torch.dtype, precision: str, major: int, processors: int
    ) -> TileConfig:
        """Large tiles where there is one for every multiprocessor; steps of 128 bytes of K.

        Before Hopper (and on sm_120) steps of 64 bytes and more stages, in the 99 KB that all of them have. Small tiles
        for float32 without tf32, which has no tensor cores, and for rows that start anywhere, which pass through
        registers.
        """
        line = 128 // dtype.itemsize
        if dtype == torch.float32 and precision == "ieee":
            return cls(64, 64, line, 8, 3)
        large = triton.cdiv(rows, 128) * triton.cdiv(width, 128) >= processors
        if not large or depth * dtype.itemsize % 16:
            return cls(64, 64, line, 4, 4)
        return cls(128, 128, line, 8, 3) if major in (9, 10) else cls(128, 128, line // 2, 8, 4)

    def parts(self, dtype: torch.dtype) -> int:
        """Pieces of the epilogue: each has 128 bytes of a row of the accumulator, in the dtype that is stored."""
        return self.block_n * dtype.itemsize // 128


@triton.jit
def linear_act_forward_kernel(
    x_ptr,  # [rows, K], strides as in Rows
    weight_ptr,  # [WIDTH, K]
    bias_ptr,  # [WIDTH] or None
    y_ptr,  # [rows, OUT] contiguous; OUT is WIDTH, or half of it if gated
    pre_ptr,  # [rows, WIDTH] contiguous, or None: not saved
    n_rows,
    inner,
    stride_outer,
    stride_inner,
    stride_weight,  # None: contiguous
    steps,  # ceil(K / BLOCK_K), not a constant: the compiler would unroll the loop
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
):
    OUT: tl.constexpr = WIDTH // 2 if GATE else WIDTH
    BLOCK_OUT: tl.constexpr = BLOCK_N // 2 if GATE else BLOCK_N
    blocks_out: tl.constexpr = (OUT + BLOCK_OUT - 1) // BLOCK_OUT
    program = tl.program_id(0)
    group = program // (GROUP_M * blocks_out)
    group_size = tl.minimum(tl.cdiv(n_rows, BLOCK_M) - group * GROUP_M, GROUP_M)
    place = program % (GROUP_M * blocks_out)
    rows = (group * GROUP_M + place % group_size) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = (place // group_size) * BLOCK_OUT
    columns = tl.arange(0, BLOCK_N)
    # Rows and columns beyond the end read the last one again, and are not stored.
    if GATE:
        features = tl.minimum(first + columns // 2, OUT - 1) + (columns % 2) * OUT
    else:
        features = tl.minimum(first + columns, OUT - 1)
    depth = tl.arange(0, BLOCK_K)
    x_starts = row_offsets(tl.minimum(rows, n_rows - 1).to(tl.int64), inner, stride_outer, stride_inner, K)
    weight_starts = row_offsets(features.to(tl.int64), None, 0, stride_weight, K)
    x_ptrs = x_ptr + x_starts[:, None] + depth[None, :]
    weight_ptrs = weight_ptr + weight_starts[None, :] + depth[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(steps):
        if K % BLOCK_K == 0:
            x = tl.load(x_ptrs)  # [BLOCK_M, BLOCK_K]
            weight = tl.load(weight_ptrs)  # [BLOCK_K, BLOCK_N]
        else:
            inside = depth < K - step * BLOCK_K
            x = tl.load(x_ptrs, mask=inside[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=inside[:, None], other=0.0)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    _finish(acc, bias_ptr, y_ptr, pre_ptr, rows, n_rows, first, WIDTH, ACTIVATION, GATE, BLOCK_OUT, PARTS)


@triton.jit
def _finish(
    acc,  # [rows, columns]: PARTS pieces, one after the other
    bias_ptr,
    y_ptr,
    pre_ptr,
    rows,
    n_rows,
    first,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    PARTS: tl.constexpr,
):
    PIECE: tl.constexpr = BLOCK_OUT // PARTS
    pieces = column_pieces(acc, PARTS)
    for i in tl.static_range(PARTS):
        _store(pieces[i], bias_ptr, y_ptr, pre_ptr, rows, n_rows, first + i * PIECE, WIDTH, ACTIVATION, GATE, PIECE)


@triton.jit
def _store(
    acc,
    bias_ptr,
    y_ptr,
    pre_ptr,
    rows,
    n_rows,
    first,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    OUT: tl.constexpr = WIDTH // 2 if GATE else WIDTH
    columns = first + tl.arange(0, BLOCK_OUT)
    inside = columns < OUT
    mask = (rows < n_rows)[:, None] & inside[None, :]
    rows = rows.to(tl.int64)[:, None]
    pre_offsets = rows * WIDTH + columns[None, :]
    if GATE:
        left, right = tl.split(tl.reshape(acc, [acc.shape[0], BLOCK_OUT, 2]))  # [BLOCK_M, BLOCK_OUT] each
        if bias_ptr is not None:
            left += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
            right += tl.load(bias_ptr + OUT + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        if pre_ptr is not None:
            tl.store(pre_ptr + pre_offsets, left.to(pre_ptr.dtype.element_ty), mask=mask)
            tl.store(pre_ptr + OUT + pre_offsets, right.to(pre_ptr.dtype.element_ty), mask=mask)
        if ACTIVATION == "geglu":
            y = left * activate(right, ACTIVATION)
        else:
            y = activate(left, ACTIVATION) * right
    else:
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        if pre_ptr is not None:
            tl.store(pre_ptr + pre_offsets, acc.to(pre_ptr.dtype.element_ty), mask=mask)
        y = activate(acc, ACTIVATION)
    tl.store(y_ptr + rows * OUT + columns[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


def linear_act_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    *,
    save_pre: bool,
    precision: str = "ieee",
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return y (..., WIDTH or half of it) and, with `save_pre`, the pre-activation (..., WIDTH), in x's dtype.

    x (..., K), weight (WIDTH, K) and bias (WIDTH,) are of one dtype. `precision` ("ieee" or "tf32") is that of float32
    products.
    """
    width, depth = weight.shape
    gated = activation in GATED
    y = torch.empty((*x.shape[:-1], width // 2 if gated else width), dtype=x.dtype, device=x.device)
    pre = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device) if save_pre else None
    if y.numel() == 0:
        return y, pre
    rows = as_rows(x)
    n_rows = y.numel() // y.shape[-1]
    weight_rows = as_rows(weight)
    config = config or TileConfig.choose(n_rows, depth, width, x.dtype, precision, *_device(x.device))
    blocks = triton.cdiv(n_rows, config.block_m) * triton.cdiv(y.shape[-1], config.block_n // (2 if gated else 1))
    with on_device(x):
        linear_act_forward_kernel[(blocks,)](
            rows.tensor,
            weight_rows.tensor,
            as_vector(bias),
            y,
            pre,
            n_rows,
            *rows[2:],
            weight_rows.stride_inner,
            triton.cdiv(depth, config.block_k),
            K=depth,
            WIDTH=width,
            ACTIVATION=activation,
            GATE=gated,
            PRECISION=precision,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=GROUP,
            PARTS=config.parts(x.dtype),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return y, pre


def _device(device: torch.device) -> tuple[int, int]:
    """The device's major architecture and its multiprocessors."""
    programs = resident_programs(device)
    return device_major(device), programs // 2 if device.type == "cuda" else programs


VIT_FC1 = ((384, 1536), (768, 3072), (1024, 4096), (1280, 5120))
"""K and WIDTH of fc1 in ViT-S, B, L and H."""
UNET_GEGLU = (320, 2560)
"""The same of the feed-forward at the widest resolution of Stable Diffusion's U-Net."""


def audit_configurations() -> Iterator[Compilation]:
    """What `mmfast audit` compiles: fc1 of four ViTs in each dtype, every activation, small tiles, odd shapes."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for depth, width in VIT_FC1:
        for dtype in (bf16, fp16, fp32) if depth == 768 else (bf16,):
            yield from _audit("gelu", depth, width, dtype)
    for dtype in (bf16, fp16, fp32):
        yield from _audit("geglu", *UNET_GEGLU, dtype)
    for activation in ("none", "gelu_tanh", "quick_gelu", "relu", "silu"):
        yield from _audit(activation, 768, 3072, bf16, save_pre=activation not in ("none", "relu"))
    yield from _audit("swiglu", 1536, 8192, bf16)
    yield from _audit("gelu", 768, 3072, bf16, save_pre=False)
    yield from _audit("geglu", *UNET_GEGLU, bf16, save_pre=False)
    for dtype in (bf16, fp32):
        yield from _audit("gelu", 768, 3072, dtype, rows=197)
        yield from _audit("gelu", 72, 200, dtype)
        yield from _audit("gelu", 67, 197, dtype)
        yield from _audit("gelu", 768, 3072, dtype, strided=True)
    yield from _audit("geglu", *UNET_GEGLU, bf16, rows=256)
    yield from _audit("gelu", 768, 3072, fp32, precision="ieee")
    yield from _audit("geglu", *UNET_GEGLU, fp32, precision="ieee")


def _audit(
    activation: str,
    depth: int,
    width: int,
    dtype: torch.dtype,
    *,
    rows: int = 65536,
    save_pre: bool = True,
    strided: bool = False,
    precision: str = "tf32",
) -> Iterator[Compilation]:
    x = triton_type(dtype)
    kind = "i32" if strided else None
    what = [activation, "" if save_pre else "no pre", "strided" if strided else "", "few rows" if rows < 1024 else ""]
    what += ["ieee" if precision == "ieee" else ""]
    # The H200's multiprocessors and the A100's; sm_100 takes what sm_90 does.
    configs = {arches: TileConfig.choose(rows, depth, width, dtype, precision, *of) for arches, of in _AUDITED.items()}
    shared = len(set(configs.values())) == 1
    for arches, config in configs.items():
        if shared and arches == (80,):
            continue
        where = "" if shared or 90 in arches else "sm_80"
        gated = activation in GATED
        whole = depth * dtype.itemsize % 16 == 0
        yield Compilation(
            label=f"forward {', '.join(filter(None, [*what, where]))}[{x[1:]}-{depth}x{width}]",
            kernel=linear_act_forward_kernel,
            arguments={
                **{"x_ptr": x, "weight_ptr": x, "bias_ptr": x, "y_ptr": x, "pre_ptr": x if save_pre else None},
                **{"n_rows": "i32", "inner": kind, "stride_outer": "i32", "stride_inner": kind},
                **{"stride_weight": kind, "steps": "i32"},
            },
            constants={
                **{"K": depth, "WIDTH": width, "ACTIVATION": activation, "GATE": gated, "PRECISION": precision},
                **{"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k},
                **{"GROUP_M": GROUP, "PARTS": config.parts(dtype)},
            },
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            arches=None if shared else arches,
            divisible=("stride_outer", "stride_inner", "stride_weight"),
            vector_loads=whole and precision == "tf32",
            vector_stores=width // (2 if gated else 1) * dtype.itemsize % 16 == 0,
            tensor_cores=precision == "tf32" and whole,
        )


_AUDITED = {(90, 100): (9, 132), (80,): (8, 108)}
