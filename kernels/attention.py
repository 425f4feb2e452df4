"""Attention, forward and backward: o = softmax(scale * q k^T + mask) v.

Forward reads q, k, v and writes o: 8 bytes an element of a head in 16 bits, 4 * n_q * n_k * d FLOPs, n_q * n_k
exponentials. Up to about 260 keys of 64 columns it is bound by memory, where libraries, tuned for thousands of keys,
pad 257 to 384. Backward computes the scores again and needs five such products; it reads q, k, v, o, do, writes three.

Which kernel runs is a rule (`forward_plan`, `backward_plan`) on lengths, head_dim, dtype and architecture:

- up to 272 keys of a head in 16 bits: `_attention_forward.short_forward_kernel`, keys and values resident, one pass;
- up to 32 queries on many keys: `_attention_decode`, the keys split over programs;
- otherwise `_attention_forward.forward_kernel`, the online softmax;
- backward: one program a head (`short_backward_kernel`) while there are heads enough to fill the machine, else one a
  tile (`query_gradient_kernel`, `key_gradient_kernel`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._attention_backward import key_gradient_kernel, query_gradient_kernel, short_backward_kernel
from ._attention_decode import MAX_ROWS, combine_kernel, split_forward_kernel
from ._attention_forward import forward_kernel, short_forward_kernel
from ._attention_tiles import TILE, Form, head_pieces, padded, row_tiles
from ._common import on_device, resident_programs

LOG2E = math.log2(math.e)
ONE_PASS_KEYS = 272
"""Keys whose scores one program holds for 64 queries, and rows of a head that has its backward to one program."""
SPLIT_KEYS = 256
"""Keys of a split at least."""
MAX_SPLITS = 64


@dataclass(frozen=True)
class ForwardPlan:
    """How the forward runs: all keys in one pass, or `block_m` queries against `block_n` keys at a time."""

    one_pass: bool
    block_m: int
    block_n: int
    num_warps: int
    stages: int

    def constants(self, n_q: int, n_k: int) -> dict[str, Any]:
        """What the kernel is compiled for, for these lengths."""
        rest_m = row_tiles(n_q % self.block_m, self.block_m)
        block_m = self.block_m if n_q >= self.block_m else 0
        if self.one_pass:
            tiles = row_tiles(n_k)
            ragged = sum(size for _, size in tiles) != n_k
            tail = sum(size for _, size in rest_m)
            return {"TILES": tiles, "RAGGED": ragged, "BLOCK_M": block_m, "TAIL_M": tail}
        return {
            "BLOCK_M": block_m,
            "BLOCK_N": self.block_n if n_k >= self.block_n else 0,
            "REST_M": rest_m,
            "REST_N": row_tiles(n_k % self.block_n, self.block_n),
        }

    def tiles(self, n_q: int) -> int:
        """Tiles of the queries of a head."""
        return n_q // self.block_m + len(row_tiles(n_q % self.block_m, self.block_m))


@dataclass(frozen=True)
class BackwardPlan:
    """How the backward runs: one program a head, or one a tile of `block` rows, against `step` rows at a time."""

    per_head: bool
    block: int
    step: int
    num_warps: int
    stages: int
    ragged: bool = False  # see `Form`
    apart: bool = False  # dk and dv by two launches

    def constants(self, rows: int, others: int) -> dict[str, Any]:
        """Sizes that the kernel of `rows` rows, which walks over the `others`, is compiled for."""
        if self.ragged:
            return {"BLOCK": self.block, "REST_ROWS": (), "STEP": self.step, "REST": ()}
        return {
            "BLOCK": self.block if rows >= self.block else 0,
            "REST_ROWS": row_tiles(rows % self.block, self.block),
            "STEP": self.step if others >= self.step else 0,
            "REST": row_tiles(others % self.step, self.step),
        }

    def head_constants(self, n_q: int, n_k: int) -> dict[str, Any]:
        """The same for the kernel of a whole head."""
        longest = max(n_q, n_k)
        return {
            "BLOCK": self.block if longest >= self.block else 0,
            "REST_M": row_tiles(n_q % self.block, self.block),
            "REST_N": row_tiles(n_k % self.block, self.block),
            "STEP": self.step if longest >= self.step else 0,
            "REST_STEP_M": row_tiles(n_q % self.step, self.step),
            "REST_STEP_N": row_tiles(n_k % self.step, self.step),
        }

    def tiles(self, rows: int) -> int:
        """Programs a head."""
        if self.ragged:
            return _ceil(rows, self.block) // self.block
        return rows // self.block + len(row_tiles(rows % self.block, self.block))

    def covered(self, rows: int, block: int) -> int:
        """Rows that tiles of `block` or less cover."""
        return _ceil(rows, block) if self.ragged else padded(rows, block)


class Shape(NamedTuple):
    """What the rules look at."""

    n_q: int
    n_k: int
    head_dim: int
    dtype: torch.dtype
    masked: bool = False
    causal: bool = False


def forward_plan(shape: Shape) -> ForwardPlan:
    """The rule for the forward: tiles as large as registers allow without a spill (`mmfast audit attention`)."""
    pieces = len(head_pieces(shape.head_dim))
    width = padded_width(shape.head_dim)
    if shape.dtype.itemsize == 4:
        return ForwardPlan(False, 64, 32, 4, 1)
    most = 0 if shape.masked else 208 if shape.causal else ONE_PASS_KEYS
    if pieces == 1 and width <= TILE and padded(shape.n_k, 1 << 30) <= most:
        return ForwardPlan(True, TILE, 0, 4, 2)
    if width <= 64:
        return (
            ForwardPlan(False, 128, 64 if pieces == 1 else 32, 8, 1)
            if shape.masked
            else ForwardPlan(False, 128, 128, 8, 2)
        )
    return ForwardPlan(False, 128, 64 if width <= (96 if shape.masked else 128) else 32, 8, 2)


def backward_plan(shape: Shape, heads: int, programs: int) -> tuple[BackwardPlan, BackwardPlan]:
    """The rule for the backward: plans of dq, and of dk and dv; the same one for both if `per_head`."""
    width = padded_width(shape.head_dim)
    busy = shape.masked or shape.causal
    if shape.dtype.itemsize == 4:
        plan = BackwardPlan(False, 64, 32, 4, 1, ragged=True)
        return plan, plan
    if len(head_pieces(shape.head_dim)) == 1 and width <= TILE and not busy:
        if shape.n_q == shape.n_k <= ONE_PASS_KEYS and heads >= programs // 2:
            plan = BackwardPlan(True, TILE, TILE, 4, 1)
            return plan, plan
        return BackwardPlan(False, 128, TILE, 8, 2), BackwardPlan(False, 128, TILE, 8, 1)
    if width > 128:
        narrow = 32 if width <= 192 else 16
        dq, dkv = BackwardPlan(False, 128, 32, 8, 1, ragged=True), BackwardPlan(False, 128, narrow, 8, 1, True, True)
        return dq, dkv
    dq = BackwardPlan(False, 128, 64, 8, 2 if not busy else 1, ragged=True)
    if width <= 64:
        return dq, BackwardPlan(False, 64, 32 if shape.masked else 64, 4, 1, ragged=True)
    if busy:
        return dq, BackwardPlan(False, 128, 32, 8, 1, ragged=True, apart=width > 96)
    dkv = BackwardPlan(False, 128, 64 if width <= 96 else 32, 8, 1, ragged=True)
    # Smaller tiles where 128 rows would pad much: 257 = 320 - 63 = 384 - 127.
    if _ceil(shape.n_q, 64) < _ceil(shape.n_q, 128):
        dq = BackwardPlan(False, 64, 64, 4, 1, ragged=True)
    if _ceil(shape.n_k, 64) < _ceil(shape.n_k, 128):
        dkv = BackwardPlan(False, 64, 32, 4, 1, ragged=True)
    return dq, dkv


def _ceil(rows: int, block: int) -> int:
    return -(-rows // block) * block


def decode_block(dtype: torch.dtype) -> int:
    """Keys of a step where the keys of a head are split."""
    return 32 if dtype.itemsize == 4 else 64


def padded_width(head_dim: int) -> int:
    """Columns that the pieces of a head cover."""
    return sum(size for _, size in head_pieces(head_dim))


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    *,
    is_causal: bool,
    scale: float,
    precision: str = "ieee",
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (B, H, n_q, d) and lse, for q (B, H, n_q, d), k and v (B, H / group, n_k, d) of any strides.

    lse is the base-2 logarithm of each row's sum of exponentials, (B, H, n_q) float32, +inf for a row without keys;
    with an additive mask the row's maximum and the logarithm of the rest, (2, B, H, n_q). `precision` is that of
    float32 products, "ieee" or "tf32"; `out` is where to write.
    """
    batch, heads, n_q, head_dim = q.shape
    n_k = k.shape[2]
    q, k, v = (_unit_columns(x) for x in (q, k, v))
    if out is None:
        out = _new_heads(q)
    added = attn_mask is not None and attn_mask.dtype != torch.bool
    lse = torch.empty((2, *q.shape[:3]) if added else q.shape[:3], dtype=torch.float32, device=q.device)
    mask, mask_strides = _mask(attn_mask, (batch, heads, n_q, n_k))
    strides, unit = _strides(q, k, v, out)
    plan = forward_plan(Shape(n_q, n_k, head_dim, q.dtype, attn_mask is not None, is_causal))
    form = Form(head_dim, head_pieces(head_dim), is_causal, added, _precision(q, precision), plan.stages, unit=unit)
    common = {
        "stride_q": strides[0],
        "stride_k": strides[1],
        "stride_v": strides[2],
        "stride_o": strides[3],
        "stride_mask": mask_strides,
        "stride_lse": batch * heads * n_q,
        "heads": heads,
        "group": heads // k.shape[1],
        "n_q": n_q,
        "n_k": n_k,
        "scale": scale * LOG2E,
        "FORM": form,
        "num_warps": plan.num_warps,
    }
    splits = _splits(n_q, n_k, heads // k.shape[1], batch * k.shape[1], resident_programs(q.device))
    constants = plan.constants(n_q, n_k)
    tensors = (q, k, v, mask, out, lse)
    with on_device(q):
        if splits > 1 and not plan.one_pass and not is_causal:
            _split_forward(q, k, v, mask, out, lse, splits, common)
        elif plan.one_pass:
            wanted = -(-2 * resident_programs(q.device) // (batch * heads))
            count = min(-(-n_q // plan.block_m), max(1, wanted))  # programs that share a head
            short_forward_kernel[(batch * heads * count,)](*tensors, tiles=count, **constants, **common)
        else:
            count = plan.tiles(n_q)
            forward_kernel[(batch * heads * count,)](*tensors, None, None, tiles=count, **constants, **common)
    return out, lse


def _splits(n_q: int, n_k: int, group: int, heads: int, programs: int) -> int:
    """Programs that share the keys of a head: several for few queries of few heads, at least 256 keys each."""
    if n_q > 32 or n_q * group > MAX_ROWS:
        return 1
    return min(programs // heads, n_k // SPLIT_KEYS, MAX_SPLITS)


def _split_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    splits: int,
    common: dict[str, Any],
) -> None:
    """Launch the two kernels of `_attention_decode`."""
    form, n_q, n_k = common["FORM"]._replace(stages=2), common["n_q"], common["n_k"]
    block = decode_block(q.dtype)
    keys_a_split = -(-n_k // (splits * block)) * block
    splits = -(-n_k // keys_a_split)
    rows = common["group"] * n_q
    slots = q.shape[0] * k.shape[1]
    rows_covered = padded(rows, MAX_ROWS)
    part = torch.empty((slots, splits, rows, form.head_dim), dtype=torch.float32, device=q.device)
    stats = torch.empty((slots, splits, 2, rows), dtype=torch.float32, device=q.device)
    sizes = {name: common[name] for name in ("heads", "group", "n_q")}
    split_forward_kernel[(slots * splits,)](
        q,
        k,
        v,
        mask,
        part,
        stats,
        tiles=splits,
        keys_a_split=keys_a_split,
        ROWS=rows_covered,
        BLOCK_N=block,
        FORM=form,
        n_k=n_k,
        num_warps=4,
        **{name: common[name] for name in ("stride_q", "stride_k", "stride_v", "stride_mask", "scale")},
        **sizes,
    )
    combine_kernel[(slots,)](
        part,
        stats,
        out,
        lse,
        stride_o=common["stride_o"],
        stride_lse=common["stride_lse"],
        tiles=splits,
        ROWS=rows_covered,
        FORM=form,
        num_warps=8,
        **sizes,
    )


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    *,
    is_causal: bool,
    scale: float,
    precision: str = "ieee",
    need_dkv: bool = True,
    grads: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dq, dk and dv, the last two None where not wanted; `grads` is where to write them."""
    batch, heads, n_q, head_dim = q.shape
    kv_heads, n_k = k.shape[1], k.shape[2]
    q, k, v, out, dout = (_unit_columns(x) for x in (q, k, v, out, dout))
    if grads is None:
        dq, dk, dv = (_new_heads(x) for x in (q, k, v))
    else:
        dq, dk, dv = grads
    delta = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    mask, mask_strides = _mask(attn_mask, (batch, heads, n_q, n_k))
    (stride_q, stride_k, stride_v, stride_o, stride_do, stride_dq, stride_dk, stride_dv), unit = _strides(
        q, k, v, out, dout, dq, dk, dv
    )
    heads_kv = batch * kv_heads
    added = attn_mask is not None and attn_mask.dtype != torch.bool
    shape = Shape(n_q, n_k, head_dim, q.dtype, attn_mask is not None, is_causal)
    plan_q, plan_k = backward_plan(shape, heads_kv, resident_programs(q.device))
    form = Form(head_dim, head_pieces(head_dim), is_causal, added, _precision(q, precision), unit=unit)
    common: dict[str, Any] = {
        "stride_q": stride_q,
        "stride_k": stride_k,
        "stride_v": stride_v,
        "stride_do": stride_do,
        "stride_mask": mask_strides,
        "stride_lse": batch * heads * n_q,
        "heads": heads,
        "group": heads // kv_heads,
        "n_q": n_q,
        "n_k": n_k,
        "scale": scale * LOG2E,
        "grad_scale": scale,
    }
    with on_device(q):
        if plan_q.per_head and need_dkv:
            short_backward_kernel[(heads_kv,)](
                *(q, k, v, mask, out, dout, lse, delta, dq, dk, dv),
                stride_o=stride_o,
                stride_dq=stride_dq,
                stride_dk=stride_dk,
                stride_dv=stride_dv,
                FORM=form._replace(stages=plan_q.stages),
                num_warps=plan_q.num_warps,
                **plan_q.head_constants(n_q, n_k),
                **common,
            )
            return dq, dk, dv
        count = plan_q.tiles(n_q)
        query_gradient_kernel[(batch * heads * count,)](
            *(q, k, v, mask, out, dout, lse, delta, dq, None, None),
            stride_o=stride_o,
            stride_dq=stride_dq,
            tiles=count,
            FORM=form._replace(stages=plan_q.stages, ragged=plan_q.ragged),
            num_warps=plan_q.num_warps,
            **plan_q.constants(n_q, n_k),
            **common,
        )
        count = plan_k.tiles(n_k)
        for wanted in () if not need_dkv else ("dk", "dv") if plan_k.apart else ("both",):
            key_gradient_kernel[(heads_kv * count,)](
                *(q, k, v, mask, dout, lse, delta, dk, dv, None, None),
                stride_dk=stride_dk,
                stride_dv=stride_dv,
                tiles=count,
                FORM=form._replace(stages=plan_k.stages, ragged=plan_k.ragged),
                WANTED=wanted,
                num_warps=plan_k.num_warps,
                **plan_k.constants(n_k, n_q),
                **common,
            )
    return dq, (dk if need_dkv else None), (dv if need_dkv else None)


def _unit_columns(x: Tensor) -> Tensor:
    """x with columns one apart."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _new_heads(like: Tensor) -> Tensor:
    """An empty tensor of `like`'s shape (B, H, N, d) whose memory has the heads after the rows."""
    batch, heads, rows, width = like.shape
    return torch.empty((batch, rows, heads, width), dtype=like.dtype, device=like.device).transpose(1, 2)


def _strides(*tensors: Tensor) -> tuple[list[tuple[int, ...]], int]:
    """(batch, head, row) strides of each in units, and the unit: 8 elements where all are multiples of it."""
    found = [x.stride()[:3] for x in tensors]
    unit = 8 if all(stride % 8 == 0 for strides in found for stride in strides) else 1
    return [tuple(stride // unit for stride in strides) for strides in found], unit


def _mask(attn_mask: Tensor | None, shape: tuple[int, ...]) -> tuple[Tensor | None, tuple[int, ...]]:
    """The mask as a kernel reads it, bytes or numbers, and its strides broadcast to (B, H, n_q, n_k)."""
    if attn_mask is None:
        return None, (0, 0, 0, 0)
    strides = attn_mask.expand(shape).stride()
    return attn_mask.view(torch.uint8) if attn_mask.dtype == torch.bool else attn_mask, strides


def _precision(x: Tensor, wanted: str) -> str:
    """How products are computed: `wanted`, "ieee" or "tf32", says it for float32 alone."""
    return wanted if x.dtype == torch.float32 else "ieee"
