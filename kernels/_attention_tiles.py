"""Tiles that all attention kernels are made of: rows of heads in pieces, scores with masks, and their sizes.

A head of 72 is not padded to 128 columns but held as 64 + 16, a sequence of 257 not padded to 320 or 384 but tiled as
256 + 16 (197 = 192 + 16, 577 = 576 + 16). Both are tuples of tiles whose sizes are powers of two, known when a kernel
is compiled: `Form.pieces`, pairs (first column, columns) of a head, and pairs (first row, rows) of a sequence.

In the functions below a head is a tuple of its pieces, each [rows, columns]. `view` is (pointer, row stride), `mask`
(pointer or None, stride of queries, stride of keys), `size` (queries, keys, offset): key j is visible to query i of a
causal attention where j <= i + offset.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

TILE = 64
"""Rows of a full tile: what one warp group's tensor core instruction takes."""
TAIL = 16
"""Rows of the smallest tile: what one warp's tensor core instruction takes."""

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.0e38)


UNSPECIALIZED = (
    *(f"stride_{name}" for name in ("q", "k", "v", "o", "do", "dq", "dk", "dv", "mask", "lse")),
    *("tiles", "heads", "group", "n_q", "n_k", "keys_a_split"),
)
"""Arguments whose values change no kernel: another length or stride alone compiles nothing again."""


class Form(NamedTuple):
    """What a kernel of attention is compiled for, beside the sizes of its tiles."""

    head_dim: int
    pieces: tuple[tuple[int, int], ...]
    causal: bool = False
    split_lse: bool = False  # two planes of lse: the mask is added
    precision: str = "ieee"  # of float32 products
    stages: int = 1  # of the software pipeline
    ragged: bool = False  # full tiles alone, with bounds checks: less code where registers are short
    unit: int = 8  # strides of heads count units of this many elements, so that the compiler knows how they align


def head_pieces(head_dim: int) -> tuple[tuple[int, int], ...]:
    """Split the columns of a head into at most three powers of two: 72 = 64 + 8 of 16, 88 = 64 + 24 of 32."""
    sizes = _powers(triton.cdiv(head_dim, TAIL) * TAIL)
    if len(sizes) > 3:
        sizes = [triton.next_power_of_2(head_dim)]
    return tuple((sum(sizes[:i]), size) for i, size in enumerate(sizes))


def _powers(total: int) -> list[int]:
    """The powers of two that add up to `total`, largest first."""
    return [1 << bit for bit in reversed(range(total.bit_length())) if total >> bit & 1]


def row_tiles(rows: int, block: int | None = None) -> tuple[tuple[int, int], ...]:
    """Tiles of `rows`: powers of two from 64 and 16, 32 or 64 for the rest; one block where that is no larger."""
    left = rows % TILE
    tail = 0 if left == 0 else TAIL if left <= TAIL else 2 * TAIL if left <= 2 * TAIL else TILE
    sizes = [*_powers(rows - left), *([tail] if tail else [])]
    if block is not None and sum(sizes) >= block:
        sizes = [block]
    return tuple((sum(sizes[:i]), size) for i, size in enumerate(sizes))


def padded(rows: int, block: int) -> int:
    """Rows that the tiles of `rows` cover, with full tiles of `block`."""
    return rows // block * block + sum(size for _, size in row_tiles(rows % block, block))


@triton.jit
def head_view(ptr, strides, batch, head, first, FORM: tl.constexpr):
    """View of a head from row `first`; strides of (batch, head, row) in units of FORM.unit elements."""
    start = (batch * strides[0] + head * strides[1] + first * strides[2]) * FORM.unit
    return (ptr + start, strides[2] * FORM.unit)


@triton.jit
def _load_piece(view, rows, n_rows, FORM: tl.constexpr, J: tl.constexpr, BOUND: tl.constexpr):
    FIRST: tl.constexpr = FORM.pieces[J][0]
    SIZE: tl.constexpr = FORM.pieces[J][1]
    cols = FIRST + tl.arange(0, SIZE)
    ptrs = view[0] + rows[:, None] * view[1] + cols[None, :]
    if BOUND:
        inside = (rows < n_rows)[:, None]
        if FORM.head_dim < FIRST + SIZE:
            inside = inside & (cols < FORM.head_dim)[None, :]
        x = tl.load(ptrs, mask=inside, other=0.0)
    elif FORM.head_dim < FIRST + SIZE:
        x = tl.load(ptrs, mask=(cols < FORM.head_dim)[None, :], other=0.0)
    else:
        x = tl.load(ptrs)
    return x


@triton.jit
def load_head(view, rows, n_rows, FORM: tl.constexpr, BOUND: tl.constexpr):
    """Rows of a head, 0 outside of it. `BOUND` says whether rows may be beyond n_rows."""
    x = ()
    for i in tl.static_range(len(FORM.pieces)):
        x = x + (_load_piece(view, rows, n_rows, FORM, i, BOUND),)
    return x


@triton.jit
def _zero_piece(ROWS: tl.constexpr, FORM: tl.constexpr, J: tl.constexpr):
    SIZE: tl.constexpr = FORM.pieces[J][1]
    return tl.zeros([ROWS, SIZE], tl.float32)


@triton.jit
def zero_head(ROWS: tl.constexpr, FORM: tl.constexpr):
    """A float32 accumulator for rows of a head."""
    x = ()
    for i in tl.static_range(len(FORM.pieces)):
        x = x + (_zero_piece(ROWS, FORM, i),)
    return x


@triton.jit
def _store_piece(view, x, rows, n_rows, FORM: tl.constexpr, J: tl.constexpr, BOUND: tl.constexpr):
    FIRST: tl.constexpr = FORM.pieces[J][0]
    SIZE: tl.constexpr = FORM.pieces[J][1]
    cols = FIRST + tl.arange(0, SIZE)
    ptrs = view[0] + rows[:, None] * view[1] + cols[None, :]
    x = x.to(view[0].dtype.element_ty)
    if BOUND:
        inside = (rows < n_rows)[:, None]
        if FORM.head_dim < FIRST + SIZE:
            inside = inside & (cols < FORM.head_dim)[None, :]
        tl.store(ptrs, x, mask=inside)
    elif FORM.head_dim < FIRST + SIZE:
        tl.store(ptrs, x, mask=(cols < FORM.head_dim)[None, :])
    else:
        tl.store(ptrs, x)


@triton.jit
def store_head(view, x, factor, rows, n_rows, FORM: tl.constexpr, BOUND: tl.constexpr):
    """Store x times factor, a number or one a row as [rows, 1]."""
    for i in tl.static_range(len(FORM.pieces)):
        _store_piece(view, x[i] * factor, rows, n_rows, FORM, i, BOUND)


@triton.jit
def product(a, b, FORM: tl.constexpr):
    """`a b^T`: [rows of a, rows of b]."""
    s = tl.dot(a[0], tl.trans(b[0]), input_precision=FORM.precision)
    for i in tl.static_range(1, len(FORM.pieces)):
        s = tl.dot(a[i], tl.trans(b[i]), s, input_precision=FORM.precision)
    return s


@triton.jit
def accumulate(acc, p, x, FORM: tl.constexpr):
    """`acc + p x`, with p [rows of acc, rows of x] in x's dtype."""
    out = ()
    for i in tl.static_range(len(FORM.pieces)):
        out = out + (tl.dot(p.to(x[i].dtype), x[i], acc[i], input_precision=FORM.precision),)
    return out


@triton.jit
def rescaled(acc, factor, FORM: tl.constexpr):
    """`acc` times one factor a row."""
    out = ()
    for i in tl.static_range(len(FORM.pieces)):
        out = out + (acc[i] * factor[:, None],)
    return out


@triton.jit
def row_dot(a, b, FORM: tl.constexpr):
    """Sum over the columns of a * b: [rows] float32."""
    total = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), axis=1)
    for i in tl.static_range(1, len(FORM.pieces)):
        total += tl.sum(a[i].to(tl.float32) * b[i].to(tl.float32), axis=1)
    return total


@triton.jit
def hide(s, scale, q_pos, k_pos, mask, size, FORM: tl.constexpr, BOUND: tl.constexpr):
    """Apply the masks to raw scores; q_pos and k_pos are index tensors that broadcast to s.

    Returns the scores, -inf where hidden, and what they are still to be multiplied by: scale, or 1 where an additive
    mask had to be added to the scaled ones. `BOUND` says whether keys may be beyond the last.
    """
    factor = scale
    if mask[0] is not None:
        inside = (q_pos < size[0]) & (k_pos < size[1])
        m = tl.load(mask[0] + q_pos * mask[1] + k_pos * mask[2], mask=inside, other=0)
        if FORM.split_lse:
            # Times log2(e) the most negative float32 would become -inf, and a row of them 0 instead of uniform.
            m = m.to(tl.float32)
            s = s * scale + tl.where(m == float("-inf"), m, tl.maximum(m * LOG2E, LOWEST))
            factor = 1.0
        else:
            s = tl.where(m != 0, s, float("-inf"))
    if BOUND:
        s = tl.where(k_pos < size[1], s, float("-inf"))
    if FORM.causal:
        s = tl.where(k_pos <= q_pos + size[2], s, float("-inf"))
    return s, factor


@triton.jit
def store_lse(lse, rows, n_q, shift, total, FORM: tl.constexpr):
    """Store shift + log2(total), or both in two planes; +inf for a row without keys. lse: (pointer, plane stride)."""
    inside = rows < n_q
    empty = total == 0.0
    log_sum = tl.log2(tl.where(empty, 1.0, total))
    if FORM.split_lse:
        tl.store(lse[0] + rows, tl.where(empty, float("inf"), shift), mask=inside)
        tl.store(lse[0] + lse[1] + rows, log_sum, mask=inside)
    else:
        tl.store(lse[0] + rows, tl.where(empty, float("inf"), shift + log_sum), mask=inside)


@triton.jit
def load_lse(lse, rows, n_q, FORM: tl.constexpr):
    """What `store_lse` stored: (shift, log_sum). A row beyond the last has probabilities exp2(s - inf) = 0."""
    inside = rows < n_q
    shift = tl.load(lse[0] + rows, mask=inside, other=float("inf"))
    log_sum = shift
    if FORM.split_lse:
        log_sum = tl.load(lse[0] + lse[1] + rows, mask=inside, other=0.0)
    return shift, log_sum


@triton.jit
def probabilities(s, factor, shift, log_sum, FORM: tl.constexpr):
    """exp2 of the scaled scores less the logarithm of their sum; shift and log_sum broadcast to s."""
    if FORM.split_lse:
        p = tl.exp2(s * factor - shift - log_sum)
    else:
        p = tl.exp2(s * factor - shift)
    return p
