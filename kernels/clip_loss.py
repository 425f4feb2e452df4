"""Contrastive loss of CLIP without its matrix: statistics of the logits, and gradients of the features.

    S_ij = scale <image_i, text_j>     lse_i = log sum_j exp S_ij, and over i for columns

Forward (`_clip_loss_statistics`): one pass over tiles of S gives, for rows and columns, maximum and sum of
exponentials, the positives' logits and the first largest: 2 M N D FLOPs, and M N / 8 bytes for the columns' buffers.
Backward (`_clip_loss_gradients`): S again, and a product for either side. Memory is linear in M + N, but for a block of
the logits' gradient of at most 8192 x 8192 in 16 bits (128 MB).

Shape of a program, forward and where the backward makes a block: 128 x 128 logits in steps of 128 bytes of the width,
two programs to a multiprocessor of sm_90 (128 registers a thread in 8 warps, 255 in 4), so that the exponentials of one
run beside the products of the other. At a width of 512 the tensor cores take 4100 cycles for a tile's products at their
peak; the forward issues 3800 instructions a tile and scheduler in 4 warps, and would 5000 in 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ._clip_loss_gradients import feature_gradient_kernel, logit_gradient_kernel
from ._clip_loss_statistics import clip_loss_combine_kernel, clip_loss_statistics_kernel
from ._common import device_major, on_device, resident_programs

BLOCK_SIDE = 8192
"""Largest side of a block of the logits' gradient: its products with the features fill a GPU without splitting them."""
OWNED_WIDTH = 256
"""Widest features whose gradient is summed in registers; above, 64 rows a program would wait for L2. See `owns`."""

_Side = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class TileConfig:
    """Shape of a program: `block_m` by `block_n` logits, in steps of `block_k` of the width."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    @classmethod
    def logits(cls, rows: int, columns: int, dtype: torch.dtype, major: int, *, num_warps: int = 8) -> TileConfig:
        """128 x 128; small tiles for few rows or columns, and for float32, which is not meant to be fast here."""
        line = 128 // dtype.itemsize
        if dtype == torch.float32 or min(rows, columns) <= 512:
            return cls(64, 64, line, 4, 3)
        if major in (9, 10):
            return cls(128, 128, line, num_warps, 3)
        return cls(128, 128, line // 2, 8, 4)

    @classmethod
    def statistics(
        cls, rows: int, columns: int, dtype: torch.dtype, major: int, *, ids: bool, best: bool
    ) -> TileConfig:
        """As `logits`, in 4 warps: each has 32 rows and so half the shuffles a column; 8, or small tiles, where
        that would spill."""
        more = ids or best
        config = cls.logits(rows, columns, dtype, major, num_warps=8 if more or major != 9 else 4)
        spills = (ids and best and major != 9) or (more and major not in (9, 10))
        return cls(64, 64, 128 // dtype.itemsize, 4, 3) if spills else config

    def parts(self) -> int:
        """Pieces of a tile, of 32 columns."""
        return self.block_n // 32

    @classmethod
    def features(cls, width: int, dtype: torch.dtype, major: int) -> TileConfig:
        """All of the width in a step. 128 rows up to a width of 256, 64 above."""
        padded = max(16, triton.next_power_of_2(width))
        if dtype == torch.float32:
            return cls(32, 32, padded, 4, 1)
        return cls(128 if padded <= 256 else 64, 64, padded, 8, 2 if major >= 9 else 1)


def owns(width: int, dtype: torch.dtype, major: int) -> bool:
    """Whether the sums of a program's rows fit in registers beside a tile of logits.

    Never in float32: that way adds a logit's products in another order than the statistics do, which at a scale of 100
    costs two digits of a probability. 16-bit probabilities do not have them.
    """
    return dtype != torch.float32 and width <= {8: 128, 9: OWNED_WIDTH}.get(major, 0)


def clip_loss_statistics(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    first: int,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    *,
    best: bool,
    precision: str = "ieee",
) -> tuple[_Side, _Side]:
    """(max, sum, positive, count, best) of rows (M,) and of columns (N,): see `Side` of the torch backend."""
    image, text = _padded(image), _padded(text)
    (m, width), n = image.shape, text.shape[0]
    image_ids, text_ids = small_ids(image_ids, text_ids)
    config = TileConfig.statistics(m, n, image.dtype, device_major(image.device), ids=image_ids is not None, best=best)
    programs, splits = split_columns(
        triton.cdiv(m, config.block_m), triton.cdiv(n, config.block_n), resident_programs(image.device)
    )
    has_ids = image_ids is not None
    rows = _buffers(image, splits, m, True, has_ids, best)
    columns = _buffers(image, programs, n, has_ids, has_ids, best)
    with on_device(image):
        clip_loss_statistics_kernel[(programs, splits)](
            image,
            text,
            scale,
            image_ids,
            text_ids,
            *rows,
            *columns,
            m,
            n,
            first,
            triton.cdiv(triton.cdiv(n, config.block_n), splits),
            triton.cdiv(width, config.block_k),
            D=width,
            EVEN=m % config.block_m == 0 and n % config.block_n == 0,
            PRECISION=precision,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            PARTS=config.parts(),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        return _combined(rows), _combined(columns)


def split_columns(row_blocks: int, column_blocks: int, programs: int) -> tuple[int, int]:
    """Programs over the rows, and splits of the columns, that give the busiest program the fewest tiles."""
    best = (row_blocks * column_blocks, 1, 1)
    for splits in range(1, min(column_blocks, programs, 16) + 1):
        over = min(row_blocks, programs // splits)
        tiles = triton.cdiv(row_blocks, over) * triton.cdiv(column_blocks, splits)
        best = min(best, (tiles, splits, over))
    return best[2], best[1]


def clip_loss_gradients(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    first: int,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    row_max: Tensor,
    column_max: Tensor,
    row: Tensor,
    column: Tensor,
    row_target: Tensor | None,
    column_target: Tensor | None,
    *,
    values: tuple[Tensor, Tensor] | None,
    needs: tuple[bool, bool],
    precision: str = "ieee",
    own: bool | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """g text (M, D) and g^T image (N, D), float32, of `values` in place of image and text if given.

    `own` chooses between the two ways; by default `owns` does.
    """
    image_ids, text_ids = small_ids(image_ids, text_ids)
    weights = (row_max, column_max, row, column, row_target, column_target, image_ids, text_ids)
    given = image, text
    image, text = _padded(image), _padded(text)
    if own is None:
        own = owns(image.shape[1], image.dtype, device_major(image.device))
    if own and values is None and image is given[0]:
        swapped = (column_max, row_max, column, row, column_target, row_target, text_ids, image_ids)
        return (
            _owned(image, text, scale, weights, first, precision) if needs[0] else None,
            _owned(text, image, scale, swapped, -first, precision) if needs[1] else None,
        )
    return _in_blocks(image, text, scale, weights, first, values or given, needs, precision)


def _owned(
    own: Tensor, other: Tensor, scale: Tensor, weights: tuple[Tensor | None, ...], first: int, precision: str
) -> Tensor:
    (m, width), n = own.shape, other.shape[0]
    config = TileConfig.features(width, own.dtype, device_major(own.device))
    gradient = torch.empty((m, width), dtype=torch.float32, device=own.device)
    with on_device(own):
        feature_gradient_kernel[(triton.cdiv(m, config.block_m),)](
            own,
            other,
            scale,
            *weights,
            gradient,
            m,
            n,
            first,
            triton.cdiv(n, config.block_n),
            D=width,
            PRECISION=precision,
            RAISE=raising(own.dtype),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_D=config.block_k,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return gradient


def _in_blocks(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    weights: tuple[Tensor | None, ...],
    first: int,
    values: tuple[Tensor, Tensor],
    needs: tuple[bool, bool],
    precision: str,
) -> tuple[Tensor | None, Tensor | None]:
    m, n = image.shape[0], text.shape[0]
    for_image, for_text = (
        torch.zeros((size, value.shape[1]), dtype=torch.float32, device=image.device) if need else None
        for size, value, need in ((m, values[1], needs[0]), (n, values[0], needs[1]))
    )
    side = min(BLOCK_SIDE, m), min(BLOCK_SIDE, n)
    buffer = torch.empty(side[0] * side[1], dtype=image.dtype, device=image.device)
    raised = 1 / raising(image.dtype)
    with on_device(image):
        for top in range(0, m, side[0]):
            rows = slice(top, min(top + side[0], m))
            for left in range(0, n, side[1]):
                columns = slice(left, min(left + side[1], n))
                g = buffer[: (rows.stop - top) * (columns.stop - left)].view(rows.stop - top, columns.stop - left)
                parts = [w if w is None else w[columns if index % 2 else rows] for index, w in enumerate(weights)]
                _logit_gradient(image[rows], text[columns], scale, parts, first + top - left, g, precision)
                if for_image is not None:
                    accumulate(for_image[rows], g, values[1][columns], raised)
                if for_text is not None:
                    accumulate(for_text[columns], g.T, values[0][rows], raised)
    return for_image, for_text


def _logit_gradient(
    image: Tensor, text: Tensor, scale: Tensor, weights: list[Tensor | None], first: int, out: Tensor, precision: str
) -> None:
    (m, width), n = image.shape, text.shape[0]
    config = TileConfig.logits(m, n, image.dtype, device_major(image.device))
    logit_gradient_kernel[(triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),)](
        image,
        text,
        scale,
        *weights,
        out,
        m,
        n,
        first,
        triton.cdiv(width, config.block_k),
        D=width,
        PRECISION=precision,
        RAISE=raising(image.dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=8,
        PARTS=config.parts(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def accumulate(sums: Tensor, a: Tensor, b: Tensor, factor: float) -> None:
    """Add `factor * a b` to float32 sums, in float32 where this PyTorch's product can give it."""
    if a.dtype == torch.float32:
        sums.addmm_(a, b, alpha=factor)
    elif a.is_cuda and "dtype" in torch.ops.aten.mm.overloads():
        sums.add_(torch.mm(a, b, out_dtype=torch.float32), alpha=factor)
    elif a.is_cuda:
        sums.add_(torch.mm(a, b), alpha=factor)
    else:
        sums.addmm_(a.float(), b.float(), alpha=factor)


def _padded(x: Tensor) -> Tensor:
    """16-bit rows that are whole 16-byte pieces: columns of zeros change no product, and others load slowly."""
    beyond = -x.shape[1] % 8 if x.dtype != torch.float32 else 0
    return torch.nn.functional.pad(x, (0, beyond)) if beyond else x


def small_ids(image_ids: Tensor | None, text_ids: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The same equalities among int32, which take half the registers: each text's first place in order; -1: no text."""
    if image_ids is None or text_ids is None:
        return None, None
    order = text_ids.sort().values
    found = torch.searchsorted(order, image_ids).clamp_max(order.shape[0] - 1)
    places = torch.where(order[found] == image_ids, found, -1)
    return places.int(), torch.searchsorted(order, text_ids).int()


def raising(dtype: torch.dtype) -> float:
    """What probabilities are multiplied by before they are rounded: float16's smallest normal number is 6e-5."""
    return 4096.0 if dtype == torch.float16 else 1.0


def _buffers(like: Tensor, parts: int, size: int, positive: bool, count: bool, best: bool) -> tuple[Tensor | None, ...]:
    """max, sum, positive, count and best of each part, (parts, size)."""
    wanted = (True, True, positive, count, best)
    return tuple(
        torch.empty((parts, size), dtype=torch.int32 if index == 4 else torch.float32, device=like.device)
        if want
        else None
        for index, want in enumerate(wanted)
    )


def _combined(buffers: tuple[Tensor | None, ...]) -> Any:
    """The same of all parts together, (size,)."""
    parts, size = buffers[0].shape  # type: ignore[union-attr]
    out = tuple(
        None
        if buffer is None
        else torch.empty(size, dtype=torch.int64 if index == 4 else torch.float32, device=buffer.device)
        for index, buffer in enumerate(buffers)
    )
    clip_loss_combine_kernel[(triton.cdiv(size, COMBINE),)](*buffers, *out, parts, size, BLOCK=COMBINE, num_warps=4)
    return out


COMBINE = 128
