"""What `siglip_loss` runs: one pass over the blocks of logits that this process computes, gradients included.

With z_ij = scale <image_i, text_j> + bias, and y_ij = 1 for positives and -1 for others,

    loss = sum_ij softplus(-y_ij z_ij)          d loss / d z_ij = -y_ij sigmoid(-y_ij z_ij)

Neither needs another logit, so the features' gradients are made where a logit is at hand, three products in all, and
are kept in float32 for the backward pass, which multiplies them by the loss's own. Where tiles of gradients are rounded
to 16 bits, a diagonal's positives are left out of them: their terms, the large ones, are added in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from . import _siglip_loss_torch as chunked
from ._clip_loss_torch import NOWHERE
from ._contrastive import Extra, finish_rows, unit_rows
from ._exchange import Exchange, Shard, exchange
from ._siglip_loss_torch import Block, Needs, Pass, Sums


class Inputs(NamedTuple):
    """A call's tensors on this process."""

    image: Tensor  # (M, D)
    text: Tensor  # (n, D)
    scale: Tensor  # ()
    bias: Tensor  # ()
    image_ids: Tensor | None  # (M,)
    text_ids: Tensor | None  # (n,)


class Options(NamedTuple):
    """Everything about a call that is not a tensor."""

    normalize: bool
    metrics: bool
    dtype: torch.dtype  # of the products
    group: str  # name of a process group, or ""
    backend: str


class Gradients(NamedTuple):
    """Of the sum of losses, in float32 (float64 for float64); None where not wanted."""

    image: Tensor | None  # over `scale`
    text: Tensor | None  # likewise
    scale: Tensor | None
    bias: Tensor | None


class Result(NamedTuple):
    """Sums over the whole batch, and this process's gradients."""

    loss: Tensor  # ()
    counts: Tensor  # (4,) positives' loss, their number, those with a logit above 0, other logits that are not below 0
    gradients: Gradients


def forward(inputs: Inputs, options: Options, needs: Needs) -> Result:
    """The sum of the losses and its gradients."""
    ex = exchange(options.group)
    m = len(inputs.image)
    _check_ranks(ex, inputs, options)
    image, image_rnorm = unit_rows(inputs.image, options.dtype, options.normalize, options.backend)
    text, text_rnorm = unit_rows(inputs.text, options.dtype, options.normalize, options.backend)
    scale, bias = inputs.scale, inputs.bias
    all_ids = None if inputs.text_ids is None else ex.gather(inputs.text_ids)
    left_out = all_ids is None and (options.backend != "torch" or chunked.rounds(image))
    positive = scale.new_zeros(m) if left_out else None
    sums: list[Tensor] = []
    for_image: Tensor | None = None

    def shard(start: int, columns: Shard) -> Tensor | None:
        nonlocal for_image
        texts = columns[0]
        if texts is None:
            return None
        ids = None if all_ids is None else all_ids[start : start + len(texts)]
        first = ex.rank * m - start if ids is None else NOWHERE
        block = Block(image, texts, scale, bias, first, inputs.image_ids, ids)
        found, part, for_texts = _pass(block, positive, needs, options)
        sums.append(found)
        for_image = part if for_image is None or part is None else for_image.add_(part)
        return for_texts

    for_text: Tensor | None = None
    if needs[1]:
        for_text = ex.gradients((text,), ex.keep((text,)), shard)
    else:
        for start, columns in ex.shards((text,)):
            shard(start, columns)
    pair: Tensor | None = None
    total = Sums(*torch.stack(sums).sum(0).unbind())
    if positive is not None:
        logits = scale * positive + bias
        loss = F.logsigmoid(logits).sum().neg_()
        pair = torch.sigmoid(-logits).neg_()
        total = total._replace(
            loss=total.loss + loss,
            for_bias=total.for_bias + pair.sum(),
            for_scale=total.for_scale + (pair * positive).sum(),
            positive_loss=loss,
            positives=loss.new_full((), m),
            right=(logits > 0).sum(dtype=loss.dtype),
        )
    totals = ex.add(torch.stack([total.loss, total.positive_loss, total.positives, total.right, total.wrong]))
    gradients = Gradients(
        _finished(inputs.image, image_rnorm, for_image, Extra(pair, text), options),
        _finished(inputs.text, text_rnorm, for_text, Extra(pair, image), options),
        total.for_scale.clone() if needs[2] else None,
        total.for_bias.clone() if needs[3] else None,
    )
    return Result(totals[0].clone(), totals[1:].clone(), gradients)


def _finished(x: Tensor, rnorm: Tensor, gradient: Tensor | None, extra: Extra, options: Options) -> Tensor | None:
    """The gradient of features from that of their unit rows, kept in float32."""
    if gradient is None or (extra.pair is None and not options.normalize):
        return gradient
    return finish_rows(x, rnorm, gradient, gradient.new_ones(()), extra, options.backend, gradient.dtype)[0]


def _check_ranks(ex: Exchange, inputs: Inputs, options: Options) -> None:
    """Every process must hold as many rows, of the same width, and ask for the same."""
    ex.check(
        *inputs.image.shape,
        len(inputs.text),
        op="siglip_loss",
        device=inputs.image.device,
        ids=float(inputs.image_ids is not None),
        normalize=float(options.normalize),
        metrics=float(options.metrics),
        float_bits=torch.finfo(options.dtype).bits,
    )


def _pass(block: Block, positive: Tensor | None, needs: Needs, options: Options) -> Pass:
    if options.backend == "torch":
        return chunked.one_pass(block, positive, needs=needs, metrics=options.metrics)
    from ..kernels.siglip_loss import siglip_loss_forward

    precision = backends.product_precision()
    return Pass(*siglip_loss_forward(*block, positive, needs=needs, metrics=options.metrics, precision=precision))
