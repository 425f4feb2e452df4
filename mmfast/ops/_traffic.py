"""Bytes that a step of `clip_loss` over a process group moves."""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import _exchange
from ._contrastive import statistics_dtype


class Traffic(NamedTuple):
    """Bytes that one rank sends in a step, forward and backward; it receives as many.

    Collectives are counted as their ring algorithms move them: (W - 1) / W of what all ranks hold for an all_gather or
    a reduce_scatter, twice that for an all_reduce.
    """

    features: int  # texts' rows, to where the images are
    gradient: int  # of those rows, back
    statistics: int  # a few numbers a column
    ring: bool  # columns went round the ranks, rather than being gathered

    @property
    def total(self) -> int:
        """All of them."""
        return self.features + self.gradient + self.statistics


def clip_loss_traffic(
    images: int,
    texts: int,
    width: int,
    dtype: torch.dtype,
    ranks: int,
    *,
    ids: bool = False,
    label_smoothing: bool = False,
    teacher_width: int = 0,
    metrics: bool = False,
) -> Traffic:
    """Count a step of `ranks` ranks, each with `images` and `texts` rows of that width and dtype of the products."""
    if ranks == 1:
        return Traffic(0, 0, 0, False)
    ring = texts * width * ranks > _exchange.GATHERED
    exact = statistics_dtype(dtype).itemsize
    rows = texts * (width + teacher_width) * dtype.itemsize
    # A ring passes the rows again for each pass over them: the logits, the teacher's twice, the gradients.
    passes = (4 if teacher_width else 2) if ring else 1
    columns = texts * ranks
    reduced = 2 * columns * exact  # maximum and sum of exp of each column
    gathered = texts * exact + 128  # weights of the own columns, in the backward pass, and the comparison of ranks
    if ids:
        reduced += 2 * columns * exact
        gathered += 2 * texts * 8
    if metrics:
        reduced += columns * 8
        gathered += images * 8 if ids else 0
    if teacher_width:
        reduced += 3 * columns * exact
    if label_smoothing:
        reduced += 4 * width * exact
    reduced += 7 * exact  # the totals, and the largest weight
    return Traffic(
        features=(ranks - 1) * rows * passes,
        gradient=(ranks - 1) * texts * width * exact,
        statistics=(ranks - 1) * gathered + 2 * (ranks - 1) * reduced // ranks,
        ring=ring,
    )
