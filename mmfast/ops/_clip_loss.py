"""What `clip_loss` runs: forward and backward over the blocks of logits that this process computes.

With lse_i the log-sum-exp of row i and y_ij its targets, which add up to 1,

    loss_i = lse_i - sum_j y_ij S_ij          S_ij = scale <image_i, text_j>

and the same for columns. Only the lse need the matrix: the positives' logits come from the same pass, and the mean
logit that label smoothing takes is a product with the mean of the other side. Kept for the backward pass are a few
numbers a row; the positive's part of the gradient, p - 1, is computed from `lse - S` as it was found before rounding to
16 bits, and added to the sums in float32.
"""

from __future__ import annotations

import math
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from . import _clip_loss_torch as chunked
from ._clip_loss_torch import NOWHERE, Block, Side, Weights
from ._contrastive import Extra, finish_rows, unit_rows
from ._exchange import Exchange, Shard, exchange

LN2 = math.log(2)


class Inputs(NamedTuple):
    """A call's tensors on this process."""

    image: Tensor  # (M, D)
    text: Tensor  # (n, D)
    scale: Tensor  # ()
    image_ids: Tensor | None  # (M,)
    text_ids: Tensor | None  # (n,)
    teacher: (
        tuple[Tensor, Tensor, Tensor] | None
    )  # features (M, E) and (n, E) and scale, whose similarities are targets


class Options(NamedTuple):
    """Everything about a call that is not a tensor."""

    normalize: bool
    label_smoothing: float
    teacher_weight: float
    best: bool  # top-1 is wanted
    dtype: torch.dtype  # of the products
    group: str  # name of a process group, or ""
    backend: str


class Saved(NamedTuple):
    """What the backward pass needs beside the inputs, with N columns in all. Empty where a call does without."""

    image_rnorm: Tensor  # (M,) if normalize
    text_rnorm: Tensor  # (n,)
    row_max: Tensor  # (M,) base-2 logits
    column_max: Tensor  # (N,)
    row_sum: Tensor  # (M,)
    column_sum: Tensor  # (N,)
    row_side: Tensor  # (M,) lse - positive's logit; with ids 1 / number of positives, or 0
    column_side: Tensor  # (n,); with ids (N,)
    means: Tensor  # (2, D) mean image and mean text, for label smoothing
    teacher_row_max: Tensor  # (M,)
    teacher_column_max: Tensor  # (N,)
    teacher_row_sum: Tensor  # (M,)
    teacher_column_sum: Tensor  # (N,)
    teacher_row_side: Tensor  # (M,) without ids
    teacher_column_side: Tensor  # (n,)
    kept: Tensor  # (N, D) text of all processes, if gathered
    teacher_kept: Tensor  # (N, E)


class Result(NamedTuple):
    """Losses of this process's images and texts; of the whole batch sums, counts, and right first guesses."""

    image_losses: Tensor  # (M,)
    text_losses: Tensor  # (n,)
    totals: Tensor  # (6,) image and text each
    saved: Saved


class _Mine(NamedTuple):
    """This process's rows, and the columns that it gives to the others."""

    ex: Exchange
    image: Tensor
    scale: Tensor
    image_ids: Any  # Tensor or None
    all_ids: Any
    guide_image: Tensor | None
    guide_scale: Tensor | None
    shard: Shard  # text, and the teacher's

    @property
    def own(self) -> slice:
        """Where this process's columns are among all."""
        n = len(self.shard[0])
        return slice(self.ex.rank * n, (self.ex.rank + 1) * n)

    def block(self, start: int, text: Tensor) -> Block:
        """Logits of the own rows by the columns that start at `start`."""
        if self.image_ids is None or self.all_ids is None:
            return Block(self.image, text, self.scale, self.ex.rank * len(self.image) - start)
        ids = self.all_ids[start : start + len(text)]
        return Block(self.image, text, self.scale, NOWHERE, self.image_ids, ids)

    def guide(self, start: int, text: Tensor) -> Block:
        """The teacher's logits of the same rows and columns."""
        first = self.ex.rank * len(self.image) - start if self.image_ids is None else NOWHERE
        return Block(self.guide_image, text, self.guide_scale, first)  # type: ignore[arg-type]


def forward(inputs: Inputs, options: Options) -> Result:
    """The losses and what `backward` needs."""
    ex = exchange(options.group)
    _check_ranks(ex, inputs, options)
    image, image_rnorm = unit_rows(inputs.image, options.dtype, options.normalize, options.backend)
    text, text_rnorm = unit_rows(inputs.text, options.dtype, options.normalize, options.backend)
    mine = _mine(ex, image, text, inputs, options)
    own, scale, dtype = mine.own, inputs.scale, inputs.scale.dtype
    kept = ex.keep(mine.shard)
    rows, columns = _sides(mine, kept, options)
    row_log, column_log = rows.sum.log(), columns.sum.log()
    row_lse, column_lse = rows.max * LN2 + row_log, columns.max * LN2 + column_log
    # lse - S in the order that keeps digits where the positive is the maximum and its probability nearly 1.
    valid: tuple[Tensor, Tensor] | None = None
    if inputs.image_ids is None:
        row_side = losses = (rows.max - rows.positive) * LN2 + row_log
        column_side = text_losses = (columns.max[own] - rows.positive) * LN2 + column_log[own]
    else:
        row_side, column_side = _share(rows), _share(columns)
        losses = (rows.max - rows.positive * row_side) * LN2 + row_log
        text_losses = ((columns.max - columns.positive * column_side) * LN2 + column_log)[own]
        valid = row_side > 0, column_side[own] > 0
    blank = [row_lse.new_empty(0) for _ in range(7)] + [text.new_empty(0) for _ in range(2)]
    sides = row_side.clone(), column_side.clone()  # no result of the op is another's memory
    saved = Saved(image_rnorm, text_rnorm, rows.max, columns.max, rows.sum, columns.sum, *sides, *blank)
    if options.label_smoothing:
        means = ex.add(torch.stack([image.sum(0, dtype=dtype), text.sum(0, dtype=dtype)]))
        means[0] /= len(image) * ex.size
        means[1] /= len(column_lse)
        losses = losses.lerp(row_lse - scale * (image.to(dtype) @ means[1]), options.label_smoothing)
        flat = column_lse[own] - scale * (text.to(dtype) @ means[0])
        text_losses = text_losses.lerp(flat, options.label_smoothing)
        saved = saved._replace(means=means)
    if inputs.teacher is not None:
        guides, soft = _soft(mine, kept, options)
        losses = losses.lerp(row_lse - soft[0], options.teacher_weight)
        text_losses = text_losses.lerp(column_lse[own] - soft[1][own], options.teacher_weight)
        valid = None if options.teacher_weight == 1 else valid  # else a row without a positive has no target
        saved = saved._replace(**guides)
    counts = losses.new_full((), len(losses)), losses.new_full((), len(text_losses))
    if valid is not None:
        losses, text_losses = torch.where(valid[0], losses, 0.0), torch.where(valid[1], text_losses, 0.0)
        counts = valid[0].sum(dtype=dtype), valid[1].sum(dtype=dtype)
    hits = _hits(mine, rows, columns) if options.best else (losses.new_zeros(()),) * 2
    totals = ex.add(torch.stack([losses.sum(), text_losses.sum(), *counts, *hits]))
    if kept:
        saved = saved._replace(kept=kept[0], teacher_kept=blank[-1] if kept[1] is None else kept[1])
    return Result(losses, text_losses, totals, saved)


def backward(
    grads: tuple[Tensor, Tensor, Tensor],
    inputs: Inputs,
    options: Options,
    saved: Saved,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of image, text and scale, from those of a result's losses and totals."""
    ex = exchange(options.group)
    image = unit_rows(inputs.image, options.dtype, options.normalize, options.backend)[0]
    text = unit_rows(inputs.text, options.dtype, options.normalize, options.backend)[0]
    mine = _mine(ex, image, text, inputs, options)
    own, has_ids = mine.own, inputs.image_ids is not None
    soft = options.teacher_weight if inputs.teacher is not None else 0.0
    row, own_column = grads[0] + grads[2][0], grads[1] + grads[2][1]
    if has_ids and soft != 1:
        row = torch.where(saved.row_side > 0, row, 0.0)
        own_column = torch.where(saved.column_side[own] > 0, own_column, 0.0)
    # Weights of at most 1, the same factor on every process: probabilities in 16 bits must not underflow.
    largest = torch.cat([row, own_column, row.new_zeros(1)]).abs().amax()
    factor = ex.greatest(torch.where(largest == 0, 1.0, largest))
    row, own_column = row / factor, own_column / factor
    column = ex.gather(own_column)
    weights = Weights(saved.row_max, saved.column_max, row / saved.row_sum, column / saved.column_sum)
    guide = weights
    if soft:
        guide = Weights(
            saved.teacher_row_max,
            saved.teacher_column_max,
            -soft * row / saved.teacher_row_sum,
            -soft * column / saved.teacher_column_sum,
        )
    hard = (1 - soft) * (1 - options.label_smoothing)
    if has_ids:
        weights = weights._replace(
            row_target=hard * row * saved.row_side, column_target=hard * column * saved.column_side
        )
    needs = (needs[0] or (needs[2] and not needs[1]), needs[1], needs[2])
    for_image: Tensor | None = None

    def shard(start: int, texts: Shard) -> Tensor | None:
        nonlocal for_image
        part = slice(start, start + len(texts[0]))
        results = [_gradients(mine.block(start, texts[0]), weights.columns(part), None, needs, options)]
        if soft:
            values = (image, texts[0])
            results.append(_gradients(mine.guide(start, texts[1]), guide.columns(part), values, needs, options))
        for found, _ in results:
            for_image = found if for_image is None or found is None else for_image.add_(found)
        return _total([found for _, found in results])

    for_text = ex.gradients(mine.shard, (saved.kept, saved.teacher_kept) if len(saved.kept) else (), shard)
    pair = None
    if not has_ids:  # p - y of the positives
        pair = row * (saved.row_side.neg().expm1() + (1 - hard)) + own_column * (
            saved.column_side.neg().expm1() + (1 - hard)
        )
        if soft:
            pair -= soft * (
                row * saved.teacher_row_side.neg().exp() + own_column * saved.teacher_column_side.neg().exp()
            )
    for_one, for_other = Extra(pair, text), Extra(pair, image)
    smooth = (1 - soft) * options.label_smoothing
    if smooth:
        offsets = ex.add(torch.stack([own_column @ text.to(row.dtype), row @ image.to(row.dtype)]))
        offsets[0] *= -smooth / (len(row) * ex.size)
        offsets[1] *= -smooth / len(column)
        for_one = for_one._replace(weight=-smooth * row, mean=saved.means[1], offset=offsets[0])
        for_other = for_other._replace(weight=-smooth * own_column, mean=saved.means[0], offset=offsets[1])
    factor_scale = inputs.scale * factor
    dimage = dtext = dscale = along = None
    if for_image is not None:
        dimage, along = finish_rows(inputs.image, saved.image_rnorm, for_image, factor_scale, for_one, options.backend)
    if for_text is not None:
        dtext, along_text = finish_rows(
            inputs.text, saved.text_rnorm, for_text, factor_scale, for_other, options.backend
        )
        along = along_text if along is None else along
    if needs[2] and along is not None:
        dscale = along.sum() * factor
    return dimage, dtext, dscale


def _check_ranks(ex: Exchange, inputs: Inputs, options: Options) -> None:
    """Every process must hold as many rows, of the same width, and ask for the same."""
    ex.check(
        *inputs.image.shape,
        len(inputs.text),
        op="clip_loss",
        device=inputs.image.device,
        ids=float(inputs.image_ids is not None),
        teacher_weight=options.teacher_weight if inputs.teacher is not None else -1.0,
        label_smoothing=options.label_smoothing,
        normalize=float(options.normalize),
        metrics=float(options.best),
        float_bits=torch.finfo(options.dtype).bits,
    )


def _mine(ex: Exchange, image: Tensor, text: Tensor, inputs: Inputs, options: Options) -> _Mine:
    guide_image = guide_text = guide_scale = None
    if inputs.teacher is not None:
        guide_image, guide_text, guide_scale = inputs.teacher
        guide_image, guide_text = (
            unit_rows(features, options.dtype, options.normalize, options.backend)[0]
            for features in (guide_image, guide_text)
        )
    all_ids = None if inputs.text_ids is None else ex.gather(inputs.text_ids)
    return _Mine(ex, image, inputs.scale, inputs.image_ids, all_ids, guide_image, guide_scale, (text, guide_text))


def _sides(mine: _Mine, kept: Shard, options: Options) -> tuple[Side, Side]:
    """Rows' and columns' side of the own rows by all columns, and the columns' of all rows."""
    parts = sorted(
        (
            (start, _statistics(mine.block(start, texts[0]), options.best, options))
            for start, texts in mine.ex.shards(mine.shard, kept)
        ),
        key=itemgetter(0),
    )
    rows = _merged_rows([(start, side) for start, (side, _) in parts])
    return rows, _all_columns(mine, [side for _, (_, side) in parts])


def _merged_rows(parts: list[tuple[int, Side]]) -> Side:
    """The rows' side over several shards of columns."""
    start, merged = parts[0]
    if merged.best is not None:
        merged = merged._replace(best=merged.best + start)
    for start, side in parts[1:]:
        top = torch.maximum(merged.max, side.max)
        best = merged.best
        if best is not None and side.best is not None:  # the first of equals, whatever the order of the shards
            found = side.best + start
            best = torch.where((side.max > merged.max) | ((side.max == merged.max) & (found < best)), found, best)
        merged = Side(
            top,
            merged.sum * (merged.max - top).exp2() + side.sum * (side.max - top).exp2(),
            merged.positive + side.positive,
            None if merged.number is None or side.number is None else merged.number + side.number,
            best,
        )
    return merged


def _all_columns(mine: _Mine, parts: list[Side]) -> Side:
    """The columns' side of every process's rows, from that of the own rows, shard by shard."""
    ex = mine.ex
    joined: list[Any] = [None if part[0] is None else torch.cat(part) for part in zip(*parts, strict=True)]
    columns = Side(*joined)
    if ex.size == 1:
        return columns
    top = ex.greatest(columns.max)
    sums = ex.add(columns.sum * (columns.max - top).exp2())
    best = columns.best
    if best is not None:  # the lowest index of those that have the maximum
        here = torch.where(columns.max == top, best + ex.rank * len(mine.image), 1 << 62)
        best = -ex.greatest(-here)
    positive, number = (None if x is None else ex.add(x) for x in (columns.positive, columns.number))
    return Side(top, sums, positive, number, best)


def _soft(mine: _Mine, kept: Shard, options: Options) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
    """What is saved of the teacher, and the mean logits of rows (M,) and of columns (N,) under its softmax."""
    parts = sorted(
        (
            (start, _statistics(mine.guide(start, texts[1]), False, options))
            for start, texts in mine.ex.shards(mine.shard, kept)
        ),
        key=itemgetter(0),
    )
    rows = _merged_rows([(start, side) for start, (side, _) in parts])
    columns = _all_columns(mine, [side for _, (_, side) in parts])
    guides = {
        "teacher_row_max": rows.max,
        "teacher_column_max": columns.max,
        "teacher_row_sum": rows.sum,
        "teacher_column_sum": columns.sum,
    }
    row_log, column_log = rows.sum.log(), columns.sum.log()
    row_lse, column_lse = rows.max + row_log / LN2, columns.max + column_log / LN2
    if mine.image_ids is None:
        guides["teacher_row_side"] = (rows.max - rows.positive) * LN2 + row_log
        guides["teacher_column_side"] = (columns.max[mine.own] - rows.positive) * LN2 + column_log[mine.own]
    soft_rows, soft_columns = torch.zeros_like(rows.max), []
    for start, texts in mine.ex.shards(mine.shard, kept):
        block, guide = mine.block(start, texts[0]), mine.guide(start, texts[1])
        found = chunked.soft_logits(block, guide, row_lse, column_lse[start : start + len(texts[0])])
        soft_rows += found[0]
        soft_columns.append((start, found[1]))
    return guides, (soft_rows, mine.ex.add(torch.cat([x for _, x in sorted(soft_columns, key=itemgetter(0))])))


def _share(side: Side) -> Tensor:
    """1 / number of positives, 0 where there is none."""
    return torch.where(side.number > 0, side.number.clamp_min(1).reciprocal(), 0.0)


def _hits(mine: _Mine, rows: Side, columns: Side) -> tuple[Tensor, Tensor]:
    """How many of the own rows and columns have a positive as their first maximum."""
    if mine.image_ids is None:
        m = len(mine.image)
        places = torch.arange(mine.ex.rank * m, (mine.ex.rank + 1) * m, device=mine.image.device)
        found = rows.best == places, columns.best[mine.own] == places
    else:
        all_rows = mine.ex.gather(mine.image_ids)
        found = (
            mine.all_ids[rows.best] == mine.image_ids,
            all_rows[columns.best[mine.own]] == mine.all_ids[mine.own],
        )
    return found[0].sum(dtype=rows.max.dtype), found[1].sum(dtype=rows.max.dtype)


def _total(found: list[Tensor | None]) -> Tensor | None:
    first = found[0]
    for other in found[1:]:
        first = first if first is None or other is None else first.add_(other)
    return first


def _statistics(block: Block, best: bool, options: Options) -> tuple[Side, Side]:
    if options.backend == "torch":
        return chunked.statistics(block, best=best)
    from ..kernels.clip_loss import clip_loss_statistics

    rows, columns = clip_loss_statistics(*block, best=best, precision=backends.product_precision())
    return Side(*rows), Side(*columns)


def _gradients(
    block: Block,
    weights: Weights,
    values: tuple[Tensor, Tensor] | None,
    needs: tuple[bool, bool, bool],
    options: Options,
) -> tuple[Tensor | None, Tensor | None]:
    if options.backend == "torch":
        return chunked.gradients(block, weights, values=values, needs=needs[:2])
    from ..kernels.clip_loss import clip_loss_gradients

    return clip_loss_gradients(*block, *weights, values=values, needs=needs[:2], precision=backends.product_precision())
