"""`clip_loss` by differentiable PyTorch ops on the whole matrix: small batches, transforms, second derivatives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._contrastive import statistics_dtype


def clip_loss_plain(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    teacher: tuple[Tensor, ...] | None,
    label_smoothing: float,
    teacher_weight: float,
    normalize: bool,
    *,
    best: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of the images (M,) and of the texts (N,), and their totals (6,), as the registered op returns them."""
    logits = _logits(image, text, scale, normalize)
    soft = None if teacher is None else _logits(teacher[0], teacher[1], teacher[2], normalize)
    same = None
    if image_ids is not None and text_ids is not None:
        same = image_ids[:, None] == text_ids
    m = len(logits)
    places = torch.arange(m, device=logits.device)
    sums, counts, hits, losses = [], [], [], []
    for flip in (False, True):
        side = logits.T if flip else logits
        counted = None
        if same is None:
            if side.numel():
                loss = F.cross_entropy(side, places, reduction="none", label_smoothing=label_smoothing)
            else:
                loss = side.sum(1)
        else:
            positive = same.T if flip else same
            share = positive.sum(1)
            counted = share > 0
            target = positive / share.clamp_min(1)[:, None].to(side.dtype)
            # Of the logits, not of their logarithms' products with 0: those would be NaN at -inf.
            lse = side.logsumexp(1)
            loss = lse - torch.where(positive, side, 0.0).mul(target).sum(1)
            if label_smoothing:
                loss = loss.lerp(lse - side.mean(1), label_smoothing)
        if soft is not None:
            guide = soft.T if flip else soft
            loss = loss.lerp(-(guide.softmax(1) * side.log_softmax(1)).sum(1), teacher_weight)
            counted = None if teacher_weight == 1 else counted
        if counted is None:
            counts.append(loss.new_full((), len(loss)))
        else:
            loss = torch.where(counted, loss, 0.0)
            counts.append(counted.sum(dtype=loss.dtype))
        losses.append(loss)
        sums.append(loss.sum())
        hits.append(
            _hits(side.detach(), same if same is None or not flip else same.T, places) if best else sums[-1] * 0
        )
    return losses[0], losses[1], torch.stack([*sums, *counts, *hits])


def _logits(image: Tensor, text: Tensor, scale: Tensor, normalize: bool) -> Tensor:
    image, text = (x.to(statistics_dtype(x.dtype)) for x in (image, text))
    if normalize:
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    with torch.autocast(image.device.type, enabled=False):
        return (scale * image) @ text.T


def _hits(side: Tensor, same: Tensor | None, places: Tensor) -> Tensor:
    """Rows whose first maximum is a positive."""
    if not side.numel():
        return side.new_zeros(())
    found = side.argmax(1)
    right = found == places if same is None else same.gather(1, found[:, None])
    return right.sum(dtype=side.dtype)
