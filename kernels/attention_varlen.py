"""Attention of ragged batches: sequences of different lengths, packed one after another without padding.

    q [total_q, H, d], k and v [total_k, H / group, d];  sequence b has rows cu_seqlens[b] .. cu_seqlens[b + 1]

The kernels are those of `attention`, started for the longest sequence: a program has one tile of one head of one
sequence, reads from cu_seqlens where it lies, and returns at once where its sequence is shorter. So the lengths never
leave the device, and there is no host synchronisation. A last kernel fills the rows that belong to no sequence.

Lengths are not known when a kernel is compiled, so all tiles are of one size, and the last of a sequence is half empty
on average: small ones where the mean length, total / B, is small. Of lengths spread evenly from 64 to 256, tiles of 64
by 64 issue 1.36 times the products that count; padding all to 256 issues 2.28 times.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_backward import key_gradient_kernel, query_gradient_kernel
from ._attention_forward import forward_kernel
from ._attention_tiles import TILE, Form, head_pieces
from ._common import AUDIT_DTYPES, Compilation, on_device, resident_programs, triton_type
from .attention import LOG2E, _precision, _strides, _unit_columns, padded_width

LONG = 384
"""Mean length from which tiles have 128 rows, which read each key half as often, instead of 64, which waste less."""
ARCHES, WIDE_ARCHES = (90, 100), (90,)
"""What the backend's rule serves: nothing before sm_90, and heads wider than 192 columns on sm_90 alone."""


@dataclass(frozen=True)
class RaggedPlan:
    """Tiles of `block` rows that walk in steps of `step`: as large as registers allow without a spill."""

    block: int
    step: int
    num_warps: int
    stages: int
    apart: bool = False  # dk and dv by two launches

    @classmethod
    def of(cls, part: str, mean: int, form: Form, dtype: torch.dtype) -> RaggedPlan:
        """The rule for `part`, "forward", "dq" or "dkv", whose rows number `mean` a sequence on average."""
        width = padded_width(form.head_dim)
        if dtype.itemsize == 4:
            return cls._float32(part, width, form.precision)
        tall = mean >= LONG or width > {"forward": 256, "dq": 192, "dkv": 96}[part]
        block, num_warps = (128, 8) if tall else (64, 4)
        if part == "forward":
            return cls(block, 128 if tall and width <= TILE else 64 if width <= 128 else 32, num_warps, 2)
        if part == "dq":
            return cls(block, 64, num_warps, 2) if width <= 128 else cls(block, 32, num_warps, 1)
        if width <= 96:
            return cls(block, 64 if width <= 80 or tall else 32, num_warps, 1)
        if width <= 128:
            return cls(block, 32, num_warps, 1)
        return cls(block, 32 if width <= 192 else 16, num_warps, 1, apart=True)

    @classmethod
    def _float32(cls, part: str, width: int, precision: str) -> RaggedPlan:
        apart = part == "dkv" and width > TILE
        if precision == "ieee":  # on ordinary cores, whose operands take registers
            return cls(32, 16, 4, 1, apart)
        if width > 192:
            return cls(64, 16, 8, 1) if part == "forward" else cls(32, 32, 8, 1, apart)
        return cls(64, 16 if apart and width <= 128 else 32, 8, 1, apart)

    def launch(self, form: Form) -> dict[str, Any]:
        """Arguments of the kernels of the backward."""
        rest: dict[str, Any] = {"REST_ROWS": (), "REST": ()}
        return {"BLOCK": self.block, "STEP": self.step, **rest, "FORM": self.form(form), "num_warps": self.num_warps}

    def form(self, form: Form) -> Form:
        """`form` with this plan's pipeline."""
        return form._replace(stages=self.stages)


@triton.jit(do_not_specialize=("batch", "covered", "heads", "width", "total"))
def clear_kernel(
    first_ptr,  # [total, width] contiguous: rows that no tile covers become 0
    second_ptr,  # the same or None
    stat_ptr,  # [heads, total] float32 or None: they become STAT
    cu_ptr,  # [batch + 1] int32
    batch,
    covered,  # rows of a sequence that have tiles
    heads,
    width,  # in units of UNIT elements
    total,
    STAT: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A program for each sequence, which has nothing to do unless the caller's bound is too small, then for the padding.
    pid = tl.program_id(0)
    turn = tl.maximum(pid - batch, 0)
    turns = 1
    start = tl.load(cu_ptr + tl.minimum(pid, batch)).to(tl.int64)
    if pid < batch:
        start += covered
        end = tl.load(cu_ptr + pid + 1).to(tl.int64)
    else:
        turns = tl.num_programs(0) - batch
        end = start * 0 + total
    _fill(first_ptr, 0.0, start * width * UNIT, end * width * UNIT, turn, turns, BLOCK)
    if second_ptr is not None:
        _fill(second_ptr, 0.0, start * width * UNIT, end * width * UNIT, turn, turns, BLOCK)
    if stat_ptr is not None:
        for _ in range(0, heads):
            _fill(stat_ptr, STAT, start, end, turn, turns, BLOCK)
            stat_ptr += total


@triton.jit
def _fill(ptr, value: tl.constexpr, start, end, turn, turns, BLOCK: tl.constexpr):
    """Set elements start..end, in turns of BLOCK."""
    for first in range(start + turn * BLOCK, end, turns * BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        tl.store(ptr + offsets, tl.full([BLOCK], value, ptr.dtype.element_ty), mask=offsets < end)


CLEAR = {"BLOCK": 1024}


def attention_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    is_causal: bool,
    scale: float,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """Output (total_q, H, d) and lse (H, total_q), the base-2 logarithm of each row's sum, +inf without keys.

    max_q and max_k say how many programs start: rows of a sequence that is longer
    after all may be 0.
    """
    total, heads, head_dim = q.shape
    batch = cu_seqlens_q.numel() - 1
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, total), dtype=torch.float32, device=q.device)
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    q, k, v = (_unit_columns(x) for x in (q, k, v))
    (stride_q, stride_k, stride_v, stride_o), unit = _packed_strides(q, k, v, out)
    form = _form(head_dim, is_causal, _precision(q, precision), unit)
    plan = RaggedPlan.of("forward", _mean(q, batch), form, q.dtype)
    tiles = max(1, -(-max_q // plan.block))
    with on_device(q):
        _clear(out, None, lse, cu_seqlens_q, tiles * plan.block, value=math.inf)
        forward_kernel[(batch * heads * tiles,)](
            *(q, k, v, None, out, lse, cu_seqlens_q, cu_seqlens_k),
            stride_q=stride_q,
            stride_k=stride_k,
            stride_v=stride_v,
            stride_o=stride_o,
            stride_mask=(0, 0, 0, 0),
            stride_lse=total,
            tiles=tiles,
            heads=heads,
            group=heads // k.shape[1],
            n_q=max_q,
            n_k=max_k,
            scale=scale * LOG2E,
            FORM=plan.form(form),
            BLOCK_M=plan.block,
            BLOCK_N=plan.step,
            REST_M=(),
            REST_N=(),
            num_warps=plan.num_warps,
        )
    return out, lse


def attention_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    is_causal: bool,
    scale: float,
    precision: str = "ieee",
    need_dkv: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dq, dk and dv, the last two None where not wanted."""
    total, heads, head_dim = q.shape
    kv_heads, batch = k.shape[1], cu_seqlens_q.numel() - 1
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    q, k, v, out, dout = (_unit_columns(x) for x in (q, k, v, out, dout))
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
    (stride_q, stride_k, stride_v, stride_o, stride_do, stride_dq, stride_dk, stride_dv), unit = _packed_strides(
        q, k, v, out, dout, dq, dk, dv
    )
    form = _form(head_dim, is_causal, _precision(q, precision), unit)
    common: dict[str, Any] = {
        "stride_q": stride_q,
        "stride_k": stride_k,
        "stride_v": stride_v,
        "stride_do": stride_do,
        "stride_mask": (0, 0, 0, 0),
        "stride_lse": total,
        "heads": heads,
        "group": heads // kv_heads,
        "n_q": max_q,
        "n_k": max_k,
        "scale": scale * LOG2E,
        "grad_scale": scale,
    }
    with on_device(q):
        plan = RaggedPlan.of("dq", _mean(q, batch), form, q.dtype)
        tiles = max(1, -(-max_q // plan.block))
        _clear(dq, None, delta, cu_seqlens_q, tiles * plan.block)
        query_gradient_kernel[(batch * heads * tiles,)](
            *(q, k, v, None, out, dout, lse, delta, dq, cu_seqlens_q, cu_seqlens_k),
            stride_o=stride_o,
            stride_dq=stride_dq,
            tiles=tiles,
            **plan.launch(form),
            **common,
        )
        if not need_dkv:
            return dq, None, None
        plan = RaggedPlan.of("dkv", _mean(k, batch), form, q.dtype)
        tiles = max(1, -(-max_k // plan.block))
        _clear(dk, dv, None, cu_seqlens_k, tiles * plan.block)
        for wanted in ("dk", "dv") if plan.apart else ("both",):
            key_gradient_kernel[(batch * kv_heads * tiles,)](
                *(q, k, v, None, dout, lse, delta, dk, dv, cu_seqlens_q, cu_seqlens_k),
                stride_dk=stride_dk,
                stride_dv=stride_dv,
                tiles=tiles,
                WANTED=wanted,
                **plan.launch(form),
                **common,
            )
    return dq, dk, dv


def _packed_strides(*tensors: Tensor) -> tuple[list[tuple[int, ...]], int]:
    """Strides of tensors (total, H, d) as the kernels take them, (batch, head, row), and their unit."""
    return _strides(*(x.transpose(0, 1).unsqueeze(0) for x in tensors))


def _form(head_dim: int, is_causal: bool, precision: str, unit: int = 8) -> Form:
    return Form(head_dim, head_pieces(head_dim), is_causal, precision=precision, ragged=True, unit=unit)


def _mean(x: Tensor, batch: int) -> int:
    """Rows of a sequence on average, as far as the host knows: padding is counted."""
    return x.shape[0] // max(1, batch)


def _clear(
    first: Tensor, second: Tensor | None, stat: Tensor | None, cu_seqlens: Tensor, covered: int, value: float = 0.0
) -> None:
    """Fill the rows without a tile: of one or two tensors of one shape with 0, of `stat` with `value`."""
    total, heads, head_dim = first.shape
    batch = cu_seqlens.numel() - 1
    unit = 8 if heads * head_dim % 8 == 0 else 1
    clear_kernel[(batch + resident_programs(first.device),)](
        *(first, second, stat, cu_seqlens),
        batch=batch,
        covered=covered,
        heads=heads,
        width=heads * head_dim // unit,
        total=total,
        STAT=value,
        UNIT=unit,
        **CLEAR,
        num_warps=4,
    )


def audit_configurations() -> Iterator[Compilation]:
    """What `mmfast audit` compiles: each head_dim and dtype for short and long sequences, and causal."""
    for width in (16, 40, 64, 72, 88, 104, 128, 160, 256):
        yield from _audit("", 160, width, torch.bfloat16)
    for width in (64, 88, 128):
        yield from _audit("", 1024, width, torch.bfloat16)
    for mean, width in ((160, 64), (160, 128), (1024, 64), (1024, 128)):
        yield from _audit(", causal", mean, width, torch.bfloat16, causal=True)
    for width in (64, 72, 256):
        yield from _audit("", 160, width, torch.float16)
    for width in (64, 72, 128, 256):
        yield from _audit(", tf32", 160, width, torch.float32, tf32=True)
    yield from _audit("", 160, 64, torch.float32)
    for dtype in AUDIT_DTYPES:
        x = triton_type(dtype)
        for label, second, stat in (("forward", None, math.inf), ("backward", x, 0.0)):
            yield Compilation(
                label=f"{label}, padding[{x[1:]}-any]",
                kernel=clear_kernel,
                arguments={
                    **{"first_ptr": x, "second_ptr": second, "stat_ptr": "*fp32", "cu_ptr": "*i32"},
                    **dict.fromkeys(("batch", "covered", "heads", "width", "total"), "i32"),
                },
                constants={"STAT": stat, "UNIT": 8, **CLEAR},
                num_warps=4,
                arches=ARCHES,
                vector_stores=True,
            )


def _audit(
    label: str, mean: int, width: int, dtype: torch.dtype, *, causal: bool = False, tf32: bool = False
) -> Iterator[Compilation]:
    x = triton_type(dtype)
    types: dict[str, Any] = {
        **{f"{name}_ptr": x for name in ("q", "k", "v", "out", "do", "dq", "dk", "dv")},
        **{f"{name}_ptr": "*fp32" for name in ("lse", "delta")},
        **{f"cu_{name}_ptr": "*i32" for name in ("q", "k")},
        **{f"stride_{name}": ("i32",) * 3 for name in ("q", "k", "v", "o", "do", "dq", "dk", "dv")},
        **{"mask_ptr": None, "stride_mask": ("i32",) * 4, "scale": "fp32", "grad_scale": "fp32"},
        **dict.fromkeys(("stride_lse", "tiles", "heads", "group", "n_q", "n_k"), "i32"),
    }
    form = _form(width, causal, "tf32" if tf32 else "ieee")
    plan, plan_q, plan_k = (RaggedPlan.of(part, mean, form, dtype) for part in ("forward", "dq", "dkv"))
    tiles = {"FORM": plan.form(form), "BLOCK_M": plan.block, "BLOCK_N": plan.step, "REST_M": (), "REST_N": ()}
    kernels: list[tuple[str, Any, RaggedPlan, dict[str, Any]]] = [
        ("forward", forward_kernel, plan, tiles),
        ("backward, dq", query_gradient_kernel, plan_q, plan_q.launch(form)),
    ]
    for wanted in ("dk", "dv") if plan_k.apart else ("both",):
        name = "backward, dk and dv" if wanted == "both" else f"backward, {wanted}"
        kernels.append((name, key_gradient_kernel, plan_k, {"WANTED": wanted, **plan_k.launch(form)}))
    for name, kernel, chosen, constants in kernels:
        yield Compilation(
            label=f"{name}{label}[{x[1:]}-{mean}x{width}]",
            kernel=kernel,
            arguments={arg: types[arg] for arg in kernel.arg_names if arg not in constants},
            constants={arg: value for arg, value in constants.items() if arg != "num_warps"},
            num_warps=chosen.num_warps,
            arches=ARCHES if width <= 192 else WIDE_ARCHES,
            vector_loads=True,
            vector_stores=True,
            tensor_cores=chosen.block >= TILE and (tf32 or dtype != torch.float32),
            waste=None if causal else _waste(mean, chosen),
        )


def _waste(mean: int, plan: RaggedPlan) -> float:
    """Pairs that tiles cover for each pair that counts, of lengths evenly from 0.4 to 1.6 times the mean."""
    lengths = [round(mean * (0.4 + 1.2 * index / 63)) for index in range(64)]
    covered = ((-(-n // size) * size for size in (plan.block, plan.step)) for n in lengths)
    return sum(math.prod(sides) for sides in covered) / sum(n * n for n in lengths)
