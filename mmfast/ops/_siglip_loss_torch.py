"""The torch backend of `siglip_loss`: the matrix of logits in chunks of rows, each used up before the next.

One product gives a chunk's logits; one exponential each gives the losses and their gradient; two more products take
that gradient to the features. Everything is written into the same few buffers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._clip_loss_torch import diagonal_of
from ._contrastive import product, statistics_dtype

CHUNK = {"cpu": 1 << 20, "cuda": 1 << 25}
"""Logits in a chunk: 4 MB of float32 stay in a CPU's cache, 128 MB keep a GPU busy."""
LEAST_ROWS = 64
RAISE = {torch.float16: 2.0**15}
"""What gradients of logits are multiplied by before rounding: those of negatives are e^-10 at first, and fall."""


Needs = tuple[bool, bool, bool, bool]
"""Which gradients are wanted: of image, text, scale and bias."""


class Block(NamedTuple):
    """Features of some rows by some columns, and what tells their positives."""

    image: Tensor  # (M, D)
    text: Tensor  # (N, D)
    scale: Tensor  # ()
    bias: Tensor  # ()
    first: int  # without ids: row i's positive is column first + i, if the block has that column
    image_ids: Tensor | None  # (M,) int64
    text_ids: Tensor | None  # (N,) int64


class Pass(NamedTuple):
    """What one pass over a block gives."""

    sums: Tensor  # (7,) see `Sums`
    for_image: Tensor | None  # gradient of the losses by the logits, times text: (M, D)
    for_text: Tensor | None  # its transpose, times image: (N, D)


class Sums(NamedTuple):
    """Over the entries of a block; what nobody asked for is 0."""

    loss: Tensor
    for_bias: Tensor  # gradients of the losses by the logits
    for_scale: Tensor  # the same times <image, text>
    wrong: Tensor  # metrics: negatives with a logit of 0 or more
    positive_loss: Tensor  # metrics, unless positives are left out
    positives: Tensor  # likewise: their number
    right: Tensor  # likewise: those with a logit above 0


def rounds(image: Tensor) -> bool:
    """Whether the gradients of logits are rounded to 16 bits: not on a CPU, whose products of them would be rounded."""
    return not image.is_cpu and image.dtype != statistics_dtype(image.dtype)


def one_pass(block: Block, positive: Tensor | None, *, needs: Needs, metrics: bool) -> Pass:
    """The losses of a block, and what the gradients that `needs` says take of it.

    With `positive` (M,) the positives of a diagonal are left out, and their products <image, text> written there, of
    those that the block has: for the caller to add them in full precision.
    """
    image, text, scale, bias = block[:4]
    dtype = statistics_dtype(image.dtype)
    exact = not rounds(image)
    if exact:
        image, text = image.to(dtype), text.to(dtype)
    (m, width), n = image.shape, text.shape[0]
    for_image = torch.empty((m, width), dtype=dtype, device=image.device) if needs[0] else None
    for_text = torch.zeros((n, width), dtype=dtype, device=image.device) if needs[1] else None
    # The scale's gradient is that of a side times the side, where g is not rounded for it.
    from_matrix = needs[2] and not (exact and (needs[0] or needs[1]))
    step = min(max(1, m), max(LEAST_ROWS, CHUNK.get(image.device.type, 1 << 23) // max(1, n)))
    buffers = torch.empty((4 if from_matrix else 3, step, n), dtype=dtype, device=image.device)
    raised = 1.0 if exact else RAISE.get(image.dtype, 1.0)
    one, zero = bias.new_ones(()), bias.new_zeros(())
    chunks = [Sums(*(zero,) * 7)]
    for start in range(0, m, step):
        part = slice(start, min(start + step, m))
        signed, terms, spare, *more = buffers[:, : part.stop - start]
        dots = product(image[part], text, dtype, out=more[0] if from_matrix else signed)
        if positive is not None:
            diagonal, covered = diagonal_of(dots, part, block.first)
            positive[covered] = diagonal
        torch.addcmul(-bias, dots, -scale, out=signed)
        own = diagonal_of(signed, part, block.first)[0]  # empty with ids
        same: Tensor | None = None
        if block.image_ids is not None and block.text_ids is not None:
            same = block.image_ids[part, None] == block.text_ids
            torch.where(same, -signed, signed, out=signed)
        elif positive is not None:
            own.fill_(float("inf"))  # neither loss nor gradient
        else:
            own.neg_()
        torch.ops.aten.log_sigmoid_forward.output(signed, output=terms, buffer=spare)
        sums = chunks[0]._replace(loss=terms.sum().neg_())
        if metrics:
            sums = _counted(sums, signed, terms, same)
            if same is None and positive is None:
                sums = _counted_diagonal(sums, own, diagonal_of(terms, part, block.first)[0])
        if any(needs):
            g = torch.ops.aten.log_sigmoid_backward.grad_input(one, signed, spare, grad_input=terms)
            if same is not None:
                torch.where(same, -g, g, out=g)
            elif positive is None:
                diagonal_of(g, part, block.first)[0].neg_()
            sums = sums._replace(for_bias=g.sum())
            if from_matrix:
                sums = sums._replace(for_scale=dots.mul_(g).sum())
            g = g if exact else g.mul_(raised).to(image.dtype)
            if for_image is not None:
                if exact:
                    torch.mm(g, text, out=for_image[part])
                else:
                    for_image[part] = product(g, text.T, dtype)
            if for_text is not None:
                if exact:
                    for_text.addmm_(g.T, image[part])
                else:
                    for_text.add_(product(g.T, image[part].T, dtype))
        chunks.append(sums)
    totals = Sums(*(torch.stack(column).sum() for column in zip(*chunks, strict=True)))
    for found in (for_image, for_text):
        if found is not None and raised != 1:
            found.mul_(1 / raised)
    if needs[2] and not from_matrix:
        side, found = (image, for_image) if for_image is not None else (text, for_text)
        totals = totals._replace(for_scale=torch.linalg.vecdot(side, found).sum())
    return Pass(torch.stack(totals), for_image, for_text)


def _counted(sums: Sums, signed: Tensor, terms: Tensor, same: Tensor | None) -> Sums:
    """`sums` with the metrics."""
    wrong = signed <= 0
    if same is None:
        return sums._replace(wrong=wrong.sum(dtype=terms.dtype))
    return sums._replace(
        wrong=(wrong & ~same).sum(dtype=terms.dtype),
        positive_loss=torch.where(same, terms, 0.0).sum().neg_(),
        positives=same.sum(dtype=terms.dtype),
        right=((signed > 0) & same).sum(dtype=terms.dtype),
    )


def _counted_diagonal(sums: Sums, signed: Tensor, terms: Tensor) -> Sums:
    """`sums`, whose `wrong` is of all entries, with the metrics of the positives on a diagonal."""
    return sums._replace(
        wrong=sums.wrong - (signed <= 0).sum(),
        positive_loss=terms.sum().neg_(),
        positives=terms.new_full((), len(terms)),
        right=(signed > 0).sum(dtype=terms.dtype),
    )
