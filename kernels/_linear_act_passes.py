"""The two elementwise passes of `linear_act`: the activation of a product made elsewhere, and the backward pass.

    forward    y = act(pre)              reads pre, writes y
    backward   dpre = dy * act'(pre)     reads dy and pre, writes dpre; and sums dpre over rows: the bias gradient
    gated      value and gate are the halves of pre's columns, and dpre has both

Both are bound by memory bandwidth: 4 and 6 B an element in bf16 (plain), 6 and 10 B an output (gated). A program of the
backward keeps one block of columns and walks over rows, so it holds its partial sums of the bias gradient in registers
and writes them once; `column_sums` adds them up in a fixed order. The products that follow, dx = dpre W and
dW = dpre^T x, are cuBLAS's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    AUDIT_DTYPES,
    Compilation,
    as_rows,
    column_sums,
    on_device,
    resident_programs,
    row_arguments,
    row_offsets,
    triton_type,
    whole_vectors,
)
from ._linear_act_math import GATED, activate, derivative


@dataclass(frozen=True)
class PassConfig:
    """Shape of a tile: `block_rows` rows of `block_c` columns over `num_warps` warps."""

    block_rows: int
    block_c: int
    num_warps: int

    @classmethod
    def forward(cls, width: int) -> PassConfig:
        """16 elements a thread. 256 columns: 512 bytes in bf16, and models' widths are multiples of it."""
        block_c = min(256, triton.next_power_of_2(width))
        return cls(2048 // block_c, block_c, 4)

    @classmethod
    def backward(cls, width: int, dtype: torch.dtype, *, gated: bool) -> PassConfig:
        """16 elements a thread, or 8 pairs of value and gate; 4 where each element has a mask of its own."""
        block_c = min(256, triton.next_power_of_2(width))
        elements = (2048 if gated else 4096) if whole_vectors(width, dtype) else 1024
        return cls(elements // block_c, block_c, 8)


@triton.jit
def activation_forward_kernel(
    pre_ptr,  # [rows, WIDTH] contiguous
    y_ptr,  # [rows, OUT] contiguous; OUT is WIDTH, or half of it if gated
    n_rows,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    OUT: tl.constexpr = WIDTH // 2 if GATE else WIDTH
    blocks: tl.constexpr = (OUT + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    rows = (program // blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = (program % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (rows < n_rows)[:, None] & (cols < OUT)[None, :]
    offsets = rows[:, None] * WIDTH + cols[None, :]
    left = tl.load(pre_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_ROWS, BLOCK_C]
    if GATE:
        right = tl.load(pre_ptr + OUT + offsets, mask=mask, other=0.0).to(tl.float32)
        if ACTIVATION == "geglu":
            y = left * activate(right, ACTIVATION)
        else:
            y = activate(left, ACTIVATION) * right
    else:
        y = activate(left, ACTIVATION)
    tl.store(y_ptr + rows[:, None] * OUT + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def linear_act_backward_kernel(
    dy_ptr,  # [rows, OUT], strides as in Rows
    pre_ptr,  # [rows, WIDTH] contiguous (y for ReLU), or None: no activation
    dpre_ptr,  # [rows, WIDTH] contiguous
    dbias_ptr,  # [programs, WIDTH] float32, or None: not wanted
    n_rows,
    inner,
    stride_outer,
    stride_inner,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    OUT: tl.constexpr = WIDTH // 2 if GATE else WIDTH
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cols < OUT
    sum_left = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    sum_right = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    for block in range(tl.program_id(1), tl.cdiv(n_rows, BLOCK_ROWS), tl.num_programs(1)):
        rows = block * tl.full((), BLOCK_ROWS, tl.int64) + tl.arange(0, BLOCK_ROWS)
        mask = (rows < n_rows)[:, None] & inside[None, :]
        starts = row_offsets(rows, inner, stride_outer, stride_inner, OUT)
        dy = tl.load(dy_ptr + starts[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        offsets = rows[:, None] * WIDTH + cols[None, :]
        dleft = dy  # [BLOCK_ROWS, BLOCK_C]
        if GATE:
            left = tl.load(pre_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            right = tl.load(pre_ptr + OUT + offsets, mask=mask, other=0.0).to(tl.float32)
            if ACTIVATION == "geglu":
                dleft = dy * activate(right, ACTIVATION)
                dright = dy * left * derivative(right, ACTIVATION)
            else:
                dleft = dy * right * derivative(left, ACTIVATION)
                dright = dy * activate(left, ACTIVATION)
            tl.store(dpre_ptr + OUT + offsets, dright.to(dpre_ptr.dtype.element_ty), mask=mask)
            sum_right += tl.where(mask, dright, 0.0)
        elif pre_ptr is not None:
            pre = tl.load(pre_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            dleft = dy * derivative(pre, ACTIVATION)
        tl.store(dpre_ptr + offsets, dleft.to(dpre_ptr.dtype.element_ty), mask=mask)
        sum_left += tl.where(mask, dleft, 0.0)
    if dbias_ptr is not None:
        partial = dbias_ptr + tl.program_id(1).to(tl.int64) * WIDTH + cols
        tl.store(partial, tl.sum(sum_left, axis=0), mask=inside)
        if GATE:
            tl.store(partial + OUT, tl.sum(sum_right, axis=0), mask=inside)


def activation_forward(pre: Tensor, activation: str) -> Tensor:
    """Return the activation of pre (..., WIDTH), contiguous: (..., WIDTH), or half of it if gated."""
    gated = activation in GATED
    width = pre.shape[-1]
    out = width // 2 if gated else width
    y = torch.empty((*pre.shape[:-1], out), dtype=pre.dtype, device=pre.device)
    if y.numel() == 0:
        return y
    n_rows = y.numel() // out
    config = PassConfig.forward(out)
    with on_device(pre):
        activation_forward_kernel[(triton.cdiv(n_rows, config.block_rows) * triton.cdiv(out, config.block_c),)](
            pre.contiguous(),
            y,
            n_rows,
            WIDTH=width,
            ACTIVATION=activation,
            GATE=gated,
            BLOCK_ROWS=config.block_rows,
            BLOCK_C=config.block_c,
            num_warps=config.num_warps,
        )
    return y


def linear_act_backward(
    dy: Tensor, pre: Tensor | None, activation: str, *, need_dbias: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the gradient of the pre-activation, (..., WIDTH) in dy's dtype, and its sum over rows, (WIDTH,).

    `pre` is what the forward pass kept: the pre-activation, y for "relu", None for "none".
    """
    gated = activation in GATED
    out = dy.shape[-1]
    width = 2 * out if gated else out
    dpre = torch.empty((*dy.shape[:-1], width), dtype=dy.dtype, device=dy.device)
    if dpre.numel() == 0:
        return dpre, torch.zeros(width, dtype=dy.dtype, device=dy.device) if need_dbias else None
    dbias = torch.empty(width, dtype=dy.dtype, device=dy.device) if need_dbias else None
    rows = as_rows(dy)
    config = PassConfig.backward(out, dy.dtype, gated=gated)
    blocks = triton.cdiv(out, config.block_c)
    # Eight programs a multiprocessor, of which three or four are resident: the last ones even out what the rows leave.
    walkers = max(1, min(triton.cdiv(rows.n_rows, config.block_rows), 4 * resident_programs(dy.device) // blocks))
    partial = torch.empty((walkers, width), dtype=torch.float32, device=dy.device) if need_dbias else None
    with on_device(dy):
        linear_act_backward_kernel[(blocks, walkers)](
            rows.tensor,
            pre if pre is None else pre.contiguous(),
            dpre,
            partial,
            rows.n_rows,
            *rows[2:],
            WIDTH=width,
            ACTIVATION=activation,
            GATE=gated,
            BLOCK_ROWS=config.block_rows,
            BLOCK_C=config.block_c,
            num_warps=config.num_warps,
        )
        column_sums([(partial, dbias)])
    return dpre, dbias


def audit_configurations() -> Iterator[Compilation]:
    """Both passes over the pre-activation of ViT-B, in each dtype; every activation; odd widths; no bias gradient."""
    for dtype in AUDIT_DTYPES:
        for activation, width in (("gelu", 3072), ("geglu", 2560), ("gelu", 197), ("geglu", 394)):
            yield _audit_forward(activation, width, dtype)
            yield _audit_backward(activation, width, dtype)
    for activation in ("gelu_tanh", "quick_gelu", "relu", "silu", "swiglu"):
        yield _audit_forward(activation, 3072, torch.bfloat16)
        yield _audit_backward(activation, 3072, torch.bfloat16)
    yield _audit_backward("none", 3072, torch.bfloat16)
    yield _audit_backward("gelu", 3072, torch.bfloat16, need_dbias=False)
    yield _audit_backward("gelu", 3072, torch.bfloat16, strided=True)


def _constants(activation: str, width: int, config: PassConfig) -> dict[str, object]:
    return {
        **{"WIDTH": width, "ACTIVATION": activation, "GATE": activation in GATED},
        **{"BLOCK_ROWS": config.block_rows, "BLOCK_C": config.block_c},
    }


def _audit_forward(activation: str, width: int, dtype: torch.dtype) -> Compilation:
    kind = triton_type(dtype)
    out = width // 2 if activation in GATED else width
    config = PassConfig.forward(out)
    return Compilation(
        label=f"forward pass {activation}[{kind[1:]}-{width}]",
        kernel=activation_forward_kernel,
        arguments={"pre_ptr": kind, "y_ptr": kind, "n_rows": "i32"},
        constants=_constants(activation, width, config),
        num_warps=config.num_warps,
        vector_loads=whole_vectors(out, dtype),
        vector_stores=whole_vectors(out, dtype),
    )


def _audit_backward(
    activation: str, width: int, dtype: torch.dtype, *, need_dbias: bool = True, strided: bool = False
) -> Compilation:
    kind = triton_type(dtype)
    gated = activation in GATED
    out = width // 2 if gated else width
    config = PassConfig.backward(out, dtype, gated=gated)
    what = ", ".join([activation, *([] if need_dbias else ["no bias"]), *(["strided"] if strided else [])])
    return Compilation(
        label=f"backward {what}[{kind[1:]}-{width}]",
        kernel=linear_act_backward_kernel,
        arguments={
            **{"dy_ptr": kind, "pre_ptr": None if activation == "none" else kind, "dpre_ptr": kind},
            **{"dbias_ptr": "*fp32" if need_dbias else None, "n_rows": "i32", **row_arguments(strided=strided)},
        },
        constants=_constants(activation, width, config),
        num_warps=config.num_warps,
        divisible=("stride_outer", "stride_inner"),
        vector_loads=whole_vectors(out, dtype),
        vector_stores=whole_vectors(out, dtype),
    )
