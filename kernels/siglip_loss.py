"""Sigmoid loss of SigLIP and all its gradients in one pass over the logits, without their matrix.

    z_ij = scale <image_i, text_j> + bias      loss = sum softplus(-y z)      g_ij = -y sigmoid(-y z)

with y_ij = 1 for positives, -1 for others. A block of at most 8192 x 8192 logits at a time: one GEMM with an epilogue
adds up the losses and g, and writes g in 16 bits (128 MB); cuBLAS multiplies it by both sides, dI = g T and dT = g^T I,
into float32 sums. 3 products of 2 M N D FLOPs, and 6 bytes a logit through memory; without gradients one product and
none. No atomics: a program writes its own sums, which are added up in a fixed order.

Shape of a program: 128 x 128 logits in steps of 128 bytes of the width, 8 warps, two programs to a multiprocessor of
sm_90, so that the epilogue of one runs beside the products of the other. The epilogue takes the logits in parts of a
few columns, one after the other, which keeps registers few. It needs one exponential e = exp(-|z|) a logit and one
reciprocal, and takes log1p(e) from a polynomial: log(1 + e) would lose e below 6e-8, which is where most negatives of a
trained model are.

On a diagonal the positives are left out (their products go to the caller, who adds their terms in float32), by the same
means as what lies beyond the last column: a logit of minus infinity has neither loss nor gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._clip_loss_tile import LOG2E, crosses, ids_of, logit_tile
from ._common import column_pieces, device_major, on_device
from .clip_loss import accumulate, small_ids

BLOCK_SIDE = 8192
"""Largest side of a block of g: its products with the features fill a GPU without splitting them."""
GROUP = 8
SUMS = 7


@dataclass(frozen=True)
class TileConfig:
    """Shape of a program: `block_m` by `block_n` logits in steps of `block_k` of the width, `parts` in the epilogue."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    parts: int

    @classmethod
    def choose(cls, rows: int, columns: int, width: int, dtype: torch.dtype, major: int, *, ids: bool) -> TileConfig:
        """128 x 128; small tiles for few rows or columns, for features that start anywhere, and for float32.

        Parts of 32 columns; with ids of 16, to stay within 128 registers a thread.
        """
        line = 128 // dtype.itemsize
        if dtype == torch.float32 or min(rows, columns) <= 512 or width * dtype.itemsize % 16:
            return cls(64, 64, line, 4, 3, 2)
        parts = 8 if ids else 4
        return cls(128, 128, line, 8, 3, parts) if major in (9, 10) else cls(128, 128, line // 2, 8, 4, parts)


@triton.jit
def siglip_loss_forward_kernel(
    image_ptr,  # [n_rows, D] contiguous
    text_ptr,  # [n_columns, D] contiguous
    scale_ptr,  # []
    bias_ptr,  # []
    image_ids_ptr,  # [n_rows] int32 or None
    text_ids_ptr,  # [n_columns] int32 or None
    positive_ptr,  # [n_rows] float32: products <image, text> of the diagonal, or None with ids
    gradient_ptr,  # [n_rows, n_columns], rows `stride` apart, or None
    sums_ptr,  # [3, 4 or 7, programs] float32
    n_rows,
    n_columns,
    first,  # row i's positive is column first + i
    stride,
    steps,  # ceil(D / BLOCK_K), not a constant: the compiler would unroll the loop
    D: tl.constexpr,
    GRADIENT: tl.constexpr,  # whether to add up g, stored or not
    METRICS: tl.constexpr,
    PRECISION: tl.constexpr,
    RAISE: tl.constexpr,  # float16 has few exponents: g is raised by this power of two
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
):
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    blocks = tl.cdiv(n_columns, BLOCK_N)
    group = program // (GROUP_M * blocks)
    group_size = tl.minimum(tl.cdiv(n_rows, BLOCK_M) - group * GROUP_M, GROUP_M)
    place = program % (GROUP_M * blocks)
    first_row = (group * GROUP_M + place % group_size) * BLOCK_M
    first_column = (place // group_size) * BLOCK_N
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = first_column + tl.arange(0, BLOCK_N)
    scale = tl.load(scale_ptr).to(tl.float32)
    bias = tl.load(bias_ptr).to(tl.float32)
    dots = logit_tile(
        image_ptr, text_ptr, rows, columns, n_rows, n_columns, 1.0, steps, D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
    )  # [BLOCK_M, BLOCK_N]
    row_ids = None
    if image_ids_ptr is not None:
        row_ids = ids_of(image_ids_ptr, rows, n_rows)
    loss, for_bias, for_scale, wrong, positive_loss, positives, right = _terms(
        dots,
        scale,
        bias,
        row_ids,
        text_ids_ptr,
        positive_ptr,
        gradient_ptr,
        first_row,
        first_column,
        n_rows,
        n_columns,
        first,
        stride,
        GRADIENT,
        METRICS,
        RAISE,
        BLOCK_M,
        BLOCK_N,
        PARTS,
    )
    keep = rows < n_rows
    out = sums_ptr + program
    tl.store(out, tl.sum(tl.where(keep, loss, 0.0)))
    tl.store(out + programs, tl.sum(tl.where(keep, for_bias, 0.0)))
    tl.store(out + 2 * programs, tl.sum(tl.where(keep, for_scale, 0.0)))
    if METRICS:
        tl.store(out + 3 * programs, tl.sum(tl.where(keep, wrong, 0.0)))
        if row_ids is not None:
            tl.store(out + 4 * programs, tl.sum(tl.where(keep, positive_loss, 0.0)))
            tl.store(out + 5 * programs, tl.sum(tl.where(keep, positives, 0.0)))
            tl.store(out + 6 * programs, tl.sum(tl.where(keep, right, 0.0)))


@triton.jit
def _terms(
    dots,  # [BLOCK_M, BLOCK_N]: PARTS pieces, one after the other
    scale,
    bias,
    row_ids,
    text_ids_ptr,
    positive_ptr,
    gradient_ptr,
    first_row,
    first_column,
    n_rows,
    n_columns,
    first,
    stride,
    GRADIENT: tl.constexpr,
    METRICS: tl.constexpr,
    RAISE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Seven sums over the columns, each [BLOCK_M]; what is not asked for is 0. Stores g."""
    PIECE: tl.constexpr = BLOCK_N // PARTS
    zero = tl.zeros([BLOCK_M], tl.float32)
    a, b, c, d, e, f, g = zero, zero, zero, zero, zero, zero, zero
    pieces = column_pieces(dots, PARTS)
    for i in tl.static_range(PARTS):
        a1, b1, c1, d1, e1, f1, g1 = _piece(
            pieces[i],
            scale,
            bias,
            row_ids,
            text_ids_ptr,
            positive_ptr,
            gradient_ptr,
            first_row,
            first_column + i * PIECE,
            n_rows,
            n_columns,
            first,
            stride,
            GRADIENT,
            METRICS,
            RAISE,
            BLOCK_M,
            PIECE,
        )
        a, b, c, d, e, f, g = a + a1, b + b1, c + c1, d + d1, e + e1, f + f1, g + g1
    return a, b, c, d, e, f, g


@triton.jit
def _piece(
    dots,  # [BLOCK_M, BLOCK_N]
    scale,
    bias,
    row_ids,
    text_ids_ptr,
    positive_ptr,
    gradient_ptr,
    first_row,
    first_column,
    n_rows,
    n_columns,
    first,
    stride,
    GRADIENT: tl.constexpr,
    METRICS: tl.constexpr,
    RAISE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = first_column + tl.arange(0, BLOCK_N)
    inside = columns < n_columns
    tl.debug_barrier()  # one piece after the other: else their loads and sums are all begun at once, and spill
    z = dots * scale + tl.where(inside, bias, float("-inf"))[None, :]
    none = tl.zeros([BLOCK_M], tl.float32)
    for_bias = none
    for_scale = none
    wrong = none
    positive_loss = none
    positives = none
    right = none
    if row_ids is not None:
        same = (row_ids[:, None] == ids_of(text_ids_ptr, columns, n_columns)[None, :]) & inside[None, :]
        sign = tl.where(same, -1.0, 1.0)
        w = z * sign
        if METRICS:
            positives = tl.sum(same.to(tl.float32), 1)
            wrong = tl.sum(tl.where(same, 0.0, tl.where(z >= 0.0, 1.0, 0.0)), 1)
            right = tl.sum(tl.where(same, tl.where(z > 0.0, 1.0, 0.0), 0.0), 1)
    else:
        w = z
        if crosses(first_row, first_column, first, BLOCK_M, BLOCK_N):
            partner = rows + first
            own = partner[:, None] == columns[None, :]
            here = (partner >= first_column) & (partner < tl.minimum(first_column + BLOCK_N, n_columns))
            tl.store(positive_ptr + rows, tl.sum(tl.where(own, dots, 0.0), 1), mask=here & (rows < n_rows))
            w = tl.where(own, float("-inf"), w)
    e = tl.exp2(tl.abs(w) * -LOG2E)
    terms = tl.maximum(w, 0.0) + _log1p(e)
    loss = tl.sum(terms, 1)
    if METRICS:
        if row_ids is not None:
            positive_loss = tl.sum(tl.where(same, terms, 0.0), 1)
        else:
            wrong = tl.sum(tl.where(w >= 0.0, 1.0, 0.0), 1)
    if GRADIENT:
        g = tl.where(w >= 0.0, 1.0, e) / (1.0 + e)
        if row_ids is not None:
            g = g * sign
        for_bias = tl.sum(g, 1)
        for_scale = tl.sum(g * dots, 1)
        if gradient_ptr is not None:
            out = gradient_ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :]
            keep = (rows < n_rows)[:, None] & (columns < stride)[None, :]  # 0 beyond the last column
            tl.store(out, (g * RAISE).to(gradient_ptr.dtype.element_ty), mask=keep)
    return loss, for_bias, for_scale, wrong, positive_loss, positives, right


@triton.jit
def _log1p(e):
    """log(1 + e) for e in [0, 1], to 2e-7 of itself: a minimax polynomial for log(1 + e) / e."""
    q = 0.005232694 * e - 0.029505238
    q = q * e + 0.07822595
    q = q * e - 0.13663246
    q = q * e + 0.19106007
    q = q * e - 0.24842982
    q = q * e + 0.33319098
    q = q * e - 0.49999493
    q = q * e + 0.99999994
    return q * e


def siglip_loss_forward(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    first: int,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    positive: Tensor | None,
    *,
    needs: tuple[bool, bool, bool, bool],
    metrics: bool,
    precision: str = "ieee",
    side: int = BLOCK_SIDE,
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Seven sums over the logits of image (M, D) by text (N, D), g text (M, D) and g^T image (N, D), all float32.

    The sums are of the losses; of g and of g <image, text>, if `needs` (image, text, scale, bias) has any gradient; and
    with `metrics` how many negatives have a logit of 0 or more and, with ids, of the positives' losses, their number,
    and how many have a logit above 0. Without ids the positives are left out, and their products <image, text> written
    to `positive` (M,) where the block has them.
    """
    (m, width), n = image.shape, text.shape[0]
    has_ids = image_ids is not None
    rows, columns = even_side(m, side), even_side(n, side)
    config = config or TileConfig.choose(rows, columns, width, image.dtype, device_major(image.device), ids=has_ids)
    image_ids, text_ids = small_ids(image_ids, text_ids)
    for_image, for_text = (
        torch.zeros((size, width), dtype=torch.float32, device=image.device) if need else None
        for size, need in ((m, needs[0]), (n, needs[1]))
    )
    stride = triton.cdiv(columns, 16) * 16  # rows of g are whole vectors
    buffer = torch.empty((rows, stride), dtype=image.dtype, device=image.device) if any(needs[:2]) else None
    kinds = (SUMS if has_ids else 4) if metrics else 3
    sums = [torch.zeros(kinds, dtype=torch.float32, device=image.device)]
    with on_device(image):
        for top in range(0, m, rows):
            part = slice(top, min(top + rows, m))
            for left in range(0, n, columns):
                across = slice(left, min(left + columns, n))
                size = part.stop - top, across.stop - left
                programs = triton.cdiv(size[0], config.block_m) * triton.cdiv(size[1], config.block_n)
                found = torch.empty((kinds, programs), dtype=torch.float32, device=image.device)
                siglip_loss_forward_kernel[(programs,)](
                    image[part],
                    text[across],
                    scale,
                    bias,
                    None if image_ids is None else image_ids[part],
                    None if text_ids is None else text_ids[across],
                    None if positive is None else positive[part],
                    buffer,
                    found,
                    *size,
                    first + top - left,
                    stride,
                    triton.cdiv(width, config.block_k),
                    D=width,
                    GRADIENT=any(needs),
                    METRICS=metrics,
                    PRECISION=precision,
                    RAISE=raising(image.dtype),
                    BLOCK_M=config.block_m,
                    BLOCK_N=config.block_n,
                    BLOCK_K=config.block_k,
                    GROUP_M=GROUP,
                    PARTS=config.parts,
                    num_warps=config.num_warps,
                    num_stages=config.num_stages,
                )
                sums.append(found.sum(1))
                if buffer is None:
                    continue
                g = buffer[: size[0], : size[1]]
                if for_image is not None:
                    accumulate(for_image[part], g, text[across], 1 / raising(image.dtype))
                if for_text is not None:
                    accumulate(for_text[across], g.T, image[part], 1 / raising(image.dtype))
    total = torch.stack(sums).sum(0)
    return torch.cat([total, total.new_zeros(SUMS - kinds)]), for_image, for_text


def even_side(size: int, most: int) -> int:
    """Side of blocks of about equal size, at most `most`: a last block of a few rows would cost as much as many."""
    return max(1, min(size, triton.cdiv(triton.cdiv(size, max(1, triton.cdiv(size, most))), 128) * 128))


def raising(dtype: torch.dtype) -> float:
    """What g is multiplied by before it is rounded: in float16 negatives' e^-10 is below the smallest normal number."""
    return 32768.0 if dtype == torch.float16 else 1.0
