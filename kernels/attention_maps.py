"""Attention probabilities, for people to look at.

    p = exp2(s - lse2)          s = log2(e) * (scale * q k^T + mask),  lse2 = log2(sum over the keys of exp2(s))

Each row of p is written once; the scores are never stored. The result is the traffic: B * H * Nq * Nk elements, at 197
tokens of head_dim 64 three times q and k, and 2 d FLOPs for each. So the scores are computed again rather than kept:
with lse given, one pass over the keys; without, a first pass for the maximum and the sum of each row and a second for
p. A program has a block of rows of one head and walks along the keys, of which L2 holds all.

Rows of p start wherever the number of keys puts them: at 197 they cannot be written 16 bytes at a time, at 256 they
are. An element stored alone needs an address of its own in registers, so a thread has 16 of them and no more, and they
are 32-bit offsets from the block's first element.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import Compilation, on_device, triton_type

LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class MapsConfig:
    """Shape of a program: `block_m` rows by `block_n` keys at a time, over `num_warps` warps."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, width: int, dtype: torch.dtype, *, exact: bool) -> MapsConfig:
        """64 rows for wgmma. `exact` float32 products run on the ordinary cores, whose operands take registers."""
        if exact:
            return cls(32, 32, 4, 1)
        if width * dtype.itemsize > 512:  # a stage of keys is large
            return cls(64, 32, 8, 2)
        return cls(64, 64, 8, 3)


@triton.jit
def _scores(
    q,  # [BLOCK_M, D0]
    q_rest,  # [BLOCK_M, D1], or q again
    k_ptr,  # first key of the head
    mask_ptr,  # mask of the head at the block's first row, or None
    row,  # first row of the block
    start,  # first key
    stride_kn,
    stride_mm,
    stride_mn,
    n_rows,
    n_cols,
    scale,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    MASK_INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[BLOCK_M, BLOCK_N] scores times log2(e), -inf where masked."""
    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    inside = start + cols < n_cols
    k_rows = k_ptr + (start + cols[:, None]).to(tl.int64) * stride_kn
    dims = tl.arange(0, D0)[None, :]
    k = tl.load(k_rows + dims, mask=inside[:, None] & (dims < HEAD_DIM), other=0.0)  # [BLOCK_N, D0]
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if D1 > 0:
        dims = D0 + tl.arange(0, D1)[None, :]
        k_rest = tl.load(k_rows + dims, mask=inside[:, None] & (dims < HEAD_DIM), other=0.0)  # [BLOCK_N, D1]
        s = tl.dot(q_rest, tl.trans(k_rest), s, input_precision=PRECISION)
    s *= scale
    visible = inside[None, :]
    if IS_CAUSAL:
        visible &= start + cols[None, :] <= row + rows[:, None]
    if mask_ptr is not None:
        block = mask_ptr + tl.cast(start, tl.int64) * stride_mn
        offsets = rows[:, None].to(MASK_INDEX) * stride_mm + cols[None, :].to(MASK_INDEX) * stride_mn
        given = (row + rows < n_rows)[:, None] & inside[None, :]
        if mask_ptr.dtype.element_ty.is_floating():
            added = tl.load(block + offsets, mask=given, other=0.0).to(tl.float32)
            scaled = added * 1.4426950408889634  # finfo.min must not become -inf: a row of it alone is uniform
            s += tl.where((scaled == float("-inf")) & (added != scaled), -3.0e38, scaled)
        else:
            visible &= tl.load(block + offsets, mask=given, other=0) != 0
    return tl.where(visible, s, float("-inf"))


@triton.jit
def attention_maps_forward_kernel(
    q_ptr,  # [B, H, M, d], elements of a row one apart
    k_ptr,  # [B, H / GROUP, N, d]
    mask_ptr,  # [B, H, M, N] uint8 or floating, or None
    lse_ptr,  # [B, H, M] float32, natural logarithm, or None
    p_ptr,  # [B, H, M, N] contiguous
    stride_qb,  # strides of q and k in ALIGN elements
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_mb,
    stride_mh,
    stride_mm,
    stride_mn,
    heads,
    n_rows,
    n_cols,  # in KEY_ALIGN elements
    scale,  # times log2(e)
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    ALIGN: tl.constexpr,
    KEY_ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    MASK_INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n_cols *= KEY_ALIGN
    stride_kn *= ALIGN
    blocks = tl.cdiv(n_rows, BLOCK_M)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = head // heads, head % heads
    row = (tl.program_id(0) % blocks) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    valid = row + rows < n_rows
    k_ptr += b * (stride_kb * ALIGN) + (h // GROUP) * (stride_kh * ALIGN)
    q_rows = q_ptr + b * (stride_qb * ALIGN) + h * (stride_qh * ALIGN)
    q_rows += (row + rows[:, None]).to(tl.int64) * (stride_qm * ALIGN)
    p_ptr += (head * n_rows + row) * n_cols
    offsets = rows[:, None] * n_cols + cols[None, :]
    if mask_ptr is not None:
        mask_ptr += b * stride_mb + h * stride_mh + row.to(tl.int64) * stride_mm
    dims = tl.arange(0, D0)[None, :]
    q = tl.load(q_rows + dims, mask=valid[:, None] & (dims < HEAD_DIM), other=0.0)  # [BLOCK_M, D0]
    q_rest = q
    if D1 > 0:
        dims = D0 + tl.arange(0, D1)[None, :]
        q_rest = tl.load(q_rows + dims, mask=valid[:, None] & (dims < HEAD_DIM), other=0.0)  # [BLOCK_M, D1]
    end = n_cols
    if IS_CAUSAL:  # keys behind the last row of the block are 0 without looking
        end = tl.minimum(n_cols, row + BLOCK_M)
    if lse_ptr is not None:
        shift = tl.load(lse_ptr + head * n_rows + row + rows, mask=valid, other=0.0) * 1.4426950408889634
        factor = tl.full([BLOCK_M], 1.0, tl.float32)
    else:
        shift = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for start in range(0, end, BLOCK_N):
            s = _scores(
                q, q_rest, k_ptr, mask_ptr, row, start, stride_kn, stride_mm, stride_mn, n_rows, n_cols, scale,
                HEAD_DIM, D0, D1, BLOCK_M, BLOCK_N, IS_CAUSAL, MASK_INDEX, PRECISION,
            )  # fmt: skip
            highest = tl.maximum(shift, tl.max(s, axis=1))
            base = tl.where(highest == float("-inf"), 0.0, highest)
            total = total * tl.exp2(shift - base) + tl.sum(tl.exp2(s - base[:, None]), axis=1)
            shift = highest
        factor = 1.0 / tl.where(total == 0.0, 1.0, total)
    shift = tl.where(shift == float("-inf"), 0.0, shift)
    for start in range(0, end, BLOCK_N):
        s = _scores(
            q, q_rest, k_ptr, mask_ptr, row, start, stride_kn, stride_mm, stride_mn, n_rows, n_cols, scale,
            HEAD_DIM, D0, D1, BLOCK_M, BLOCK_N, IS_CAUSAL, MASK_INDEX, PRECISION,
        )  # fmt: skip
        p = tl.exp2(s - shift[:, None]) * factor[:, None]  # [BLOCK_M, BLOCK_N]
        given = valid[:, None] & (start + cols < n_cols)[None, :]
        tl.store(p_ptr + start + offsets, p.to(p_ptr.dtype.element_ty), mask=given)
    if IS_CAUSAL:
        zero = tl.zeros([BLOCK_M, BLOCK_N], p_ptr.dtype.element_ty)
        for start in range(tl.cdiv(end, BLOCK_N) * BLOCK_N, n_cols, BLOCK_N):
            tl.store(p_ptr + start + offsets, zero, mask=valid[:, None] & (start + cols < n_cols)[None, :])


def split_width(width: int) -> tuple[int, int]:
    """A head_dim as two tiles: 64 + 0, 64 + 16 for 72 and 80, 128 + 32 for 160; the second as small as it can be."""
    first = max(16, 1 << (width.bit_length() - 1))
    rest = max(0, width - first)
    return first, max(16, triton.next_power_of_2(rest)) if rest else 0


def attention_maps_forward(
    q: Tensor,
    k: Tensor,
    attn_mask: Tensor | None,
    lse: Tensor | None,
    *,
    is_causal: bool,
    scale: float,
    dtype: torch.dtype,
    precision: str = "ieee",
) -> Tensor:
    """Return the probabilities (B, H, Nq, Nk) in `dtype`, contiguous.

    q is (B, H, Nq, d), k (B, Hk, Nk, d), attn_mask broadcastable to (B, H, Nq, Nk), lse (B, H, Nq).
    """
    batch, heads, n_rows, width = q.shape
    n_cols = k.shape[2]
    p = torch.empty((batch, heads, n_rows, n_cols), dtype=dtype, device=q.device)
    if p.numel() == 0:
        return p
    q, k = (x if x.stride(-1) == 1 or width == 1 else x.contiguous() for x in (q, k))
    align = _alignment(q, k)
    strides_mask: tuple[int, ...] = (0, 0, 0, 0)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = attn_mask.view(torch.uint8)
        else:
            lse = None  # next to large added values lse has lost the digits of the sum
        attn_mask = attn_mask.expand(p.shape)
        strides_mask = attn_mask.stride()
    exact = q.dtype == torch.float32 and precision == "ieee"
    config = MapsConfig.of(width, q.dtype, exact=exact)
    wide = max(strides_mask[2:]) * max(config.block_m, config.block_n) >= 2**30
    first, rest = split_width(width)
    key_align = 8 if n_cols % 8 == 0 else 1
    with on_device(q):
        attention_maps_forward_kernel[(batch * heads * triton.cdiv(n_rows, config.block_m),)](
            q,
            k,
            attn_mask,
            lse if lse is None else lse.contiguous(),
            p,
            *(stride // align for stride in (*q.stride()[:3], *k.stride()[:3])),
            *strides_mask,
            heads,
            n_rows,
            n_cols // key_align,
            scale * LOG2E,
            GROUP=heads // k.shape[1],
            HEAD_DIM=width,
            D0=first,
            D1=rest,
            ALIGN=align,
            KEY_ALIGN=key_align,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            IS_CAUSAL=is_causal,
            MASK_INDEX=tl.int64 if wide else tl.int32,
            PRECISION="ieee" if exact else "tf32",
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return p


def _alignment(q: Tensor, k: Tensor) -> int:
    """8 where every row of q and k starts at a multiple of 8 elements, else 1.

    Triton learns at run time only whether a stride is a multiple of 16; told of 8, it loads rows of 72 or 88 elements
    16 bytes at a time.
    """
    strides = (*q.stride()[:3], *k.stride()[:3])
    return 8 if all(stride % 8 == 0 for stride in strides) else 1


def audit_configurations() -> Iterator[Compilation]:
    """What `mmfast audit` compiles: each head_dim, and lse, masks, causal and 16-byte rows at 64."""
    for width in (16, 40, 64, 72, 88, 128, 160, 256):
        yield _audit("probabilities", 197, width, torch.bfloat16)
    for dtype in (torch.float16, torch.float32):
        for width in (64, 256):
            yield _audit("probabilities", 197, width, dtype)
    for width in (64, 72, 256):
        yield _audit("probabilities, tf32", 197, width, torch.float32, tf32=True)
    for keys in (197, 256):
        yield _audit("probabilities, lse", keys, 64, torch.bfloat16, lse=True)
        yield _audit("probabilities, bool mask", keys, 64, torch.bfloat16, mask="*u8")
        yield _audit("probabilities, added mask", keys, 64, torch.bfloat16, mask="*bf16")
    yield _audit("probabilities, causal", 197, 64, torch.bfloat16, causal=True)
    yield _audit("probabilities, fp32 out", 197, 64, torch.bfloat16, out=torch.float32)
    yield _audit("probabilities", 256, 64, torch.bfloat16)


def _audit(
    label: str,
    keys: int,
    width: int,
    dtype: torch.dtype,
    *,
    lse: bool = False,
    mask: str | None = None,
    causal: bool = False,
    out: torch.dtype | None = None,
    tf32: bool = False,
) -> Compilation:
    exact = dtype == torch.float32 and not tf32
    config = MapsConfig.of(width, dtype, exact=exact)
    first, rest = split_width(width)
    x = triton_type(dtype)
    key_align = 8 if keys % 8 == 0 else 1
    arguments: dict[str, str | None] = {
        **{"q_ptr": x, "k_ptr": x, "mask_ptr": mask, "lse_ptr": "*fp32" if lse else None},
        "p_ptr": triton_type(out or dtype),
        **{f"stride_{name}": "i32" for name in ("qb", "qh", "qm", "kb", "kh", "kn", "mb", "mh", "mm", "mn")},
        **{"heads": "i32", "n_rows": "i32", "n_cols": "i32", "scale": "fp32"},
    }
    constants: dict[str, Any] = {
        **{"GROUP": 1, "HEAD_DIM": width, "D0": first, "D1": rest, "ALIGN": 8, "KEY_ALIGN": key_align},
        **{"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "IS_CAUSAL": causal},
        **{"MASK_INDEX": tl.int32, "PRECISION": "ieee" if exact else "tf32"},
    }
    return Compilation(
        label=f"{label}[{x[1:]}-{keys}x{width}]",
        kernel=attention_maps_forward_kernel,
        arguments=arguments,
        constants=constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        vector_loads=config.block_m * first * dtype.itemsize >= 16 * 32 * config.num_warps,  # a tile of 16 is too small
        vector_stores=key_align == 8,
        tensor_cores=not exact,
    )
