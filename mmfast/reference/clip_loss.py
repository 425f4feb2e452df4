"""Reference of `clip_loss`, and the inputs it is verified on."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._case import Case, Inputs, normal


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    logit_bias: Tensor | float | None = None,
    normalize: bool = False,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    label_smoothing: float = 0.0,
    teacher: tuple[Tensor, Tensor, Tensor | float] | None = None,
    teacher_weight: float = 1.0,
    reduction: str = "mean",
) -> Any:
    """Cross entropy of the rows and of the columns of `logit_scale * image text^T`, with the matrix in memory."""
    logits = similarity(image_features, text_features, logit_scale, normalize=normalize)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # as autocast does for a cross entropy
    if logit_bias is not None:
        logits = logits + logit_bias
    same = _positives(logits, image_ids, text_ids)
    soft = None if teacher is None else similarity(*teacher, normalize=normalize).to(logits.dtype)
    sides = []
    for side, positive, other in (
        (logits, same, soft),
        (logits.T, same.T, None if soft is None else soft.T),
    ):
        count = positive.sum(1)
        target = positive.to(side.dtype) / count.clamp_min(1)[:, None]
        target = (1 - label_smoothing) * target + label_smoothing / side.shape[1]
        if other is not None:
            target = (1 - teacher_weight) * target + teacher_weight * other.softmax(1)
        loss = -(target * side.log_softmax(1)).sum(1)
        # A row without a positive has no target, unless the teacher gives it one.
        counted = count > 0 if other is None or teacher_weight < 1 else torch.ones_like(count, dtype=torch.bool)
        sides.append((torch.where(counted, loss, 0.0), counted.sum()))
    (rows, n_rows), (columns, n_columns) = sides
    if reduction == "none":
        return rows, columns
    if reduction == "sum":
        return (rows.sum() + columns.sum()) / 2
    return (rows.sum() / n_rows + columns.sum() / n_columns) / 2


def similarity(image: Tensor, text: Tensor, scale: Tensor | float, *, normalize: bool) -> Tensor:
    """`scale * image text^T` (M, N), of unit rows if `normalize`."""
    if normalize:
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    return scale * (image @ text.T)


def _positives(logits: Tensor, image_ids: Tensor | None, text_ids: Tensor | None) -> Tensor:
    """Which pairs belong together, (M, N): those with equal ids, or the diagonal."""
    if image_ids is not None and text_ids is not None:
        return image_ids[:, None] == text_ids[None, :]
    return torch.eye(*logits.shape, dtype=torch.bool, device=logits.device)


SHAPES = ((1, 1, 16), (3, 3, 16), (9, 9, 13), (63, 63, 40), (65, 65, 72))
"""(M, N, D). Small shapes, for the interpreter."""

SHAPES_GPU = (
    *((b, b, 512) for b in (1, 63, 64, 65, 1000)),
    *((1000, 1000, d) for d in (16, 256, 384, 640, 768, 1024)),
    (4096, 4096, 512),
    (1000, 3001, 512),
)


def cases(dtype: torch.dtype, device: torch.device, *, large: bool) -> list[Case]:
    """Inputs for `verify`: each shape at CLIP's first and last scale, and each option once."""
    shapes = SHAPES + (SHAPES_GPU if large else ())
    found: list[tuple[Any, ...]] = [
        (f"{m}x{n}x{d} scale {scale}", m, n, d, scale, {"ids": m != n})
        for m, n, d in shapes
        for scale in ((14.3, 100.0) if m > 1 else (14.3,))
    ]
    small = (37, 37, 24, 14.3)
    found += [
        ("37x37x24 normalize", *small, {"normalize": True}),
        ("37x37x24 ids", *small, {"ids": True}),
        ("21x37x24 ids, smoothing 0.1, normalize", 21, *small[1:], {"ids": True, "smoothing": 0.1, "normalize": True}),
        ("37x37x24 smoothing 0.1", *small, {"smoothing": 0.1}),
        ("37x37x24 per pair", *small, {"reduction": "none"}),
        ("37x37x24 teacher", *small, {"teacher": 1.0}),
        ("37x37x24 teacher 0.5", *small, {"teacher": 0.5}),
    ]
    constants = ("image_ids", "text_ids", "teacher")
    return [
        Case(label, partial(_draw, m, n, d, scale, options, dtype, device), constants)
        for label, m, n, d, scale, options in found
    ]


def _draw(
    m: int, n: int, width: int, scale: float, options: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> Inputs:
    """Pairs that resemble each other, of about unit length unless they are to be normalised.

    At a large scale they do less: else there is no loss left, and what one computes of it is rounding.
    """
    kwargs: dict[str, Any] = {}
    shared = normal((max(m, n), width), torch.float32, device) * (1.0 if scale < 50 else 0.4)

    def features(count: int) -> Tensor:
        x = shared[:count] + normal((count, width), torch.float32, device)
        return (x * 3 if options.get("normalize") else F.normalize(x, dim=-1)).to(dtype)

    if options.get("ids"):
        kwargs["image_ids"] = torch.randint(max(1, n // 2), (m,), device=device)
        kwargs["text_ids"] = torch.randint(max(1, n // 2), (n,), device=device)
    if "smoothing" in options:
        kwargs["label_smoothing"] = options["smoothing"]
    if "teacher" in options:
        kwargs["teacher"] = (features(m), features(n), 20.0)
        kwargs["teacher_weight"] = options["teacher"]
    kwargs |= {name: options[name] for name in ("normalize", "reduction") if name in options}
    return (features(m), features(n), torch.tensor(scale, device=device)), kwargs
