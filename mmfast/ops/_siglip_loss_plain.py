"""`siglip_loss` by PyTorch's own differentiable ops on the whole matrix: few logits, transforms, second derivatives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._contrastive import lowered, statistics_dtype


def siglip_loss_plain(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    normalize: bool,
    *,
    metrics: bool = False,
) -> tuple[Tensor, Tensor]:
    """The sum of the losses, and what the registered op returns beside it with `metrics`, else anything."""
    dtype = statistics_dtype(image.dtype)
    image, text = image.to(dtype), text.to(dtype)
    if normalize:
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    if lowered(image):
        with torch.autocast(image.device.type, enabled=False):
            logits = torch.addmm(bias, scale * image, text.T)
    else:
        logits = torch.addmm(bias, scale * image, text.T)
    if image_ids is not None and text_ids is not None:
        signs = torch.where(image_ids[:, None] == text_ids, 1.0, -1.0).to(dtype)
    else:
        signs = torch.full(logits.shape, -1.0, dtype=dtype, device=logits.device).fill_diagonal_(1.0)
    terms = F.logsigmoid(signs * logits)
    loss = -terms.sum()
    if not metrics:
        return loss, loss
    same, logits = signs > 0, logits.detach()
    counts = same, (logits > 0) & same, (logits >= 0) & ~same
    positive_loss = -torch.where(same, terms.detach(), 0.0).sum()
    return loss, torch.stack([positive_loss, *(x.sum(dtype=dtype) for x in counts)])
