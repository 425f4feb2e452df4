"""The torch backend of `clip_loss`: the matrix of logits in chunks of rows, and never more of it than one chunk.

A block is the logits `scale * image text^T` of some rows by some columns: all of them, or on several processes one
process's rows by the columns that it holds at the time. They are base-2 logits, `S log2(e)`, as the kernels have them,
so that either backend may serve the backward pass. Forward: one product a chunk; backward: that product again, and two
with the gradient of the logits. Both write into the same few buffers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._contrastive import product, statistics_dtype

CHUNK = {"cpu": 1 << 21, "cuda": 1 << 25}
"""Logits in a chunk: 8 MB of float32 stay in a CPU's cache, 128 MB keep a GPU busy."""
LEAST_ROWS = 32
LOG2E = 1 / math.log(2)
NOWHERE = -(1 << 30)
"""`Block.first` of a block that has no positives by place."""


class Block(NamedTuple):
    """Features of a block and what tells its positives."""

    image: Tensor  # (M, D)
    text: Tensor  # (N, D)
    scale: Tensor  # ()
    first: int = 0  # without ids: row i's positive is column first + i, if the block has that column
    image_ids: Tensor | None = None  # (M,) int64
    text_ids: Tensor | None = None  # (N,) int64


class Side(NamedTuple):
    """What one pass finds out about each row of a block, or about each column, of base-2 logits."""

    max: Tensor  # largest logit
    sum: Tensor  # of exp2(logit - max)
    positive: Any  # sum of the positives' logits; None for the columns of a block without ids
    number: Any  # of positives; None without ids
    best: Any  # index of the largest logit, the first of equals; None unless asked for


class Weights(NamedTuple):
    """What the gradient of a block's logits is made of: row[i] P_ij + column[j] Q_ij - targets.

    P and Q are exp2(logit - max) of the row and of the column: the softmax but for the sums, over which row and column
    are divided. Without ids the positives' entries are left out (0), for the
    caller to add in full precision.
    """

    row_max: Tensor  # (M,)
    column_max: Tensor  # (N,)
    row: Tensor  # (M,)
    column: Tensor  # (N,)
    row_target: Tensor | None = None  # with ids: taken from each positive of the row, (M,)
    column_target: Tensor | None = None

    def columns(self, part: slice) -> Weights:
        """The weights of some of the columns."""
        target = self.column_target
        return self._replace(
            column_max=self.column_max[part],
            column=self.column[part],
            column_target=None if target is None else target[part],
        )


def statistics(block: Block, *, best: bool = False) -> tuple[Side, Side]:
    """Rows' and columns' side of a block."""
    image, text, _, first, image_ids, text_ids = block
    dtype = statistics_dtype(image.dtype)
    m, n = image.shape[0], text.shape[0]
    positive = _new(image, m, dtype).zero_()
    rows = Side(_new(image, m, dtype), _new(image, m, dtype), positive, None, None)
    columns = Side(_new(image, n, dtype).fill_(float("-inf")), _new(image, n, dtype).zero_(), None, None, None)
    if image_ids is not None:
        zeros = [torch.zeros(count, dtype=dtype, device=image.device) for count in (m, n, n)]
        rows = rows._replace(number=zeros[0])
        columns = columns._replace(positive=zeros[1], number=zeros[2])
    if best:
        rows, columns = (
            side._replace(best=torch.zeros(count, dtype=torch.int64, device=image.device))
            for side, count in ((rows, m), (columns, n))
        )
    for part, logits, spare in _chunks(block):
        top = logits.amax(1)
        rows.max[part] = top
        rows.sum[part] = torch.sub(logits, top[:, None], out=spare).exp2_().sum(1)
        top = logits.amax(0)
        if best:
            rows.best[part] = logits.argmax(1)
            found = logits.argmax(0) + part.start
            columns.best.copy_(torch.where(top > columns.max, found, columns.best))
        top = torch.maximum(columns.max, top)
        columns.sum.mul_((columns.max - top).exp2_()).add_(torch.sub(logits, top, out=spare).exp2_().sum(0))
        columns.max.copy_(top)
        if image_ids is not None and text_ids is not None:
            same = image_ids[part, None] == text_ids
            rows.number[part] = same.sum(1).to(dtype)
            columns.number.add_(same.sum(0))
            logits.masked_fill_(~same, 0.0)
            positive[part] = logits.sum(1)
            columns.positive.add_(logits.sum(0))
        else:
            diagonal, covered = diagonal_of(logits, part, first)
            positive[covered] = diagonal
    return rows, columns


def gradients(
    block: Block, weights: Weights, *, values: tuple[Tensor, Tensor] | None = None, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """`g text` (M, D) and `g^T image` (N, D) for the gradient g of the logits, see `Weights`, where `needs` says so.

    `values` are multiplied in place of the block's own image and text.
    """
    image, text = values or (block.image, block.text)
    dtype = statistics_dtype(image.dtype)
    for_image = (
        torch.empty((block.image.shape[0], text.shape[1]), dtype=dtype, device=image.device) if needs[0] else None
    )
    for_text = (
        torch.zeros((block.text.shape[0], image.shape[1]), dtype=dtype, device=image.device) if needs[1] else None
    )
    exact = image.is_cpu or image.dtype == dtype
    raised = 4096.0 if image.dtype == torch.float16 and not exact else 1.0  # its smallest normal number is 6e-5
    right = text.to(dtype) if exact else text
    for part, logits, spare in _chunks(block):
        torch.sub(logits, weights.row_max[part, None], out=spare).exp2_().mul_(weights.row[part, None])
        logits.sub_(weights.column_max).exp2_().mul_(weights.column).add_(spare)
        if block.image_ids is not None and block.text_ids is not None:
            if weights.row_target is not None and weights.column_target is not None:
                same = block.image_ids[part, None] == block.text_ids
                torch.add(weights.row_target[part, None], weights.column_target, out=spare)
                logits.sub_(spare.masked_fill_(~same, 0.0))
        else:
            diagonal_of(logits, part, block.first)[0].zero_()
        g = logits if exact else logits.mul_(raised).to(image.dtype)
        if for_image is not None:
            for_image[part] = product(g, right.T, dtype) / raised
        if for_text is not None:
            left = image[part].to(g.dtype)
            if g.dtype == dtype:
                for_text.addmm_(g.T, left)
            else:
                for_text.add_(product(g.T, left.T, dtype), alpha=1 / raised)
    return for_image, for_text


def soft_logits(block: Block, teacher: Block, row_lse: Tensor, column_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Mean logit (natural) of each row (M,) and of each column (N,), under the softmax of the teacher's logits.

    `row_lse` (M,) and `column_lse` (N,) are the base-2 logarithms of the sums of the teacher's rows and columns.
    """
    rows = torch.empty_like(row_lse)
    columns = torch.zeros_like(column_lse)
    for (part, logits, _), (_, guide, spare) in zip(_chunks(block), _chunks(teacher), strict=True):
        rows[part] = torch.sub(guide, row_lse[part, None], out=spare).exp2_().mul_(logits).sum(1)
        columns += guide.sub_(column_lse).exp2_().mul_(logits).sum(0)
    return rows / LOG2E, columns / LOG2E


def _chunks(block: Block) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows, their logits, and a buffer of the same shape; both may be overwritten, and are with the next chunk."""
    image, text, scale = block.image, block.text, block.scale * LOG2E
    dtype = statistics_dtype(image.dtype)
    m, n = image.shape[0], text.shape[0]
    step = max(LEAST_ROWS, CHUNK.get(image.device.type, 1 << 24) // max(1, n))
    if image.is_cpu:  # bfloat16 sums of products are rounded to bfloat16 there
        image, text = image.to(dtype), text.to(dtype)
    buffers = torch.empty((2, min(step, m), n), dtype=dtype, device=image.device)
    for start in range(0, m, step):
        part = slice(start, min(start + step, m))
        out, spare = buffers[:, : part.stop - start]
        logits = product(image[part], text, dtype, out=out)
        yield part, logits.mul_(scale), spare


def diagonal_of(logits: Tensor, part: slice, first: int) -> tuple[Tensor, slice]:
    """The positives among a chunk's logits, as a view, and the rows that have them."""
    start, n = part.start, logits.shape[1]
    low, high = max(start, -first), min(part.stop, n - first)
    high = max(low, high)
    if low == high:
        return logits[:0, 0], slice(start, start)
    return logits[low - start : high - start, low + first : high + first].diagonal(), slice(low, high)


def _new(like: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype, device=like.device)
