"""Classification of images by the names of classes, without training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._clip_tokenizer import Tokenizer, clip_tokenizer

Template = str | Callable[[str], str]
SIMPLE_TEMPLATES: tuple[str, ...] = ("a photo of a {}.",)


@torch.no_grad()
def zero_shot_classifier(
    model: Any,
    classnames: Sequence[str],
    templates: Sequence[Template] = SIMPLE_TEMPLATES,
    tokenizer: Tokenizer | None = None,
    *,
    batch_size: int = 256,
) -> Tensor:
    """Return a linear classifier made of texts: for each class the mean of its prompts' features.

    The prompts' features are of length 1, and so is their mean. Prompts of all classes are encoded together,
    `batch_size` at a time, each batch only as long as its longest prompt.

    Args:
        model: a `CLIP`, or anything with open_clip's `encode_text(ids, normalize=True)`.
        classnames: of the classes.
        templates: prompts with a place for the name, "a photo of a {}.", or functions of the name.
        tokenizer: maps a list of texts to ids (B, L); by default `clip_tokenizer(model)`.
        batch_size: prompts that are encoded at once.

    Returns:
        (D, number of classes), on the model's device: `features @ classifier` are cosines.

    Raises:
        ValueError: no classes, no templates, or batch_size is not positive.
        TypeError: classnames or templates is one string.
        ImportError: no tokenizer is given, and none is installed.

    Source: open_clip `build_zero_shot_classifier`.
    """
    for name, values in (("classnames", classnames), ("templates", templates)):
        if isinstance(values, str):
            raise TypeError(f"zero_shot_classifier: {name} must be a sequence of strings, got one string")
        if not len(values):
            raise ValueError(f"zero_shot_classifier: {name} must not be empty")
    if batch_size < 1:
        raise ValueError(f"zero_shot_classifier: batch_size must be positive, got {batch_size}")
    tokenizer = clip_tokenizer(model) if tokenizer is None else tokenizer
    device = next(model.parameters()).device
    prompts = [_fill(template, name) for name in classnames for template in templates]
    trim = getattr(model, "trim_text", None)
    was_training = model.training
    model.eval()
    try:
        found = []
        for start in range(0, len(prompts), batch_size):
            ids = tokenizer(prompts[start : start + batch_size])
            ids = trim(ids) if trim is not None else ids
            found.append(model.encode_text(ids.to(device), normalize=True))
    finally:
        model.train(was_training)
    features = torch.cat(found).unflatten(0, (len(classnames), len(templates)))
    return F.normalize(features.mean(dim=1), dim=-1).T


@torch.no_grad()
def zero_shot_predict(model: Any, images: Tensor, classifier: Tensor, top_k: int = 1) -> tuple[Tensor, Tensor]:
    """Classify images by a classifier of `zero_shot_classifier`.

    Args:
        model: a `CLIP` in evaluation mode, or anything with open_clip's `encode_image`, `logit_scale`, `logit_bias`.
        images: (B, 3, H, W), as the model takes them.
        classifier: (D, number of classes).
        top_k: classes wanted for each image.

    Returns:
        Probabilities (B, top_k), the largest first, and classes (B, top_k). Softmax over the classes for CLIP; for a
        model with a bias (SigLIP) the sigmoid of each, which need not sum to 1.

    Raises:
        ValueError: top_k is not between 1 and the number of classes.
    """
    if not 1 <= top_k <= classifier.shape[1]:
        raise ValueError(f"zero_shot_predict: top_k must be in 1..{classifier.shape[1]}, got {top_k}")
    features = model.encode_image(images, normalize=True)
    logits = model.logit_scale.exp() * (features @ classifier.to(features.dtype))
    bias = getattr(model, "logit_bias", None)
    logits = logits.float() if logits.dtype != torch.float64 else logits
    probabilities = logits.softmax(dim=-1) if bias is None else (logits + bias).sigmoid()
    found = probabilities.topk(top_k, dim=-1)
    return found.values, found.indices


def _fill(template: Template, name: str) -> str:
    return template.format(name) if isinstance(template, str) else template(name)
