"""Reference of `siglip_loss`, and the inputs it is verified on."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._case import Case, Inputs, normal


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None,
    *,
    normalize: bool = False,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`-sum logsigmoid(y (logit_scale * image text^T + logit_bias))` over images, with the matrix in memory."""
    image, text = image_features, text_features
    if normalize:
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    logits = logit_scale * (image @ text.T)
    if logit_bias is not None:
        logits = logits + logit_bias
    if image_ids is not None and text_ids is not None:
        positive = image_ids[:, None] == text_ids[None, :]
    else:
        positive = torch.eye(*logits.shape, dtype=torch.bool, device=logits.device)
    labels = 2 * positive.to(logits.dtype) - 1
    loss = -F.logsigmoid(labels * logits).sum()
    return loss / len(image) if reduction == "mean" else loss


SHAPES = ((1, 1, 16), (3, 3, 16), (63, 63, 40), (65, 65, 72))
"""(M, N, D). Small shapes, for the interpreter."""

SHAPES_GPU = (
    *((b, b, 512) for b in (1, 63, 64, 65, 1000)),
    *((1000, 1000, d) for d in (16, 384, 640, 768, 1024, 1152)),
    (4096, 4096, 512),
    (1000, 3001, 512),
)


def cases(dtype: torch.dtype, device: torch.device, *, large: bool) -> list[Case]:
    """Inputs for `verify`: each shape at SigLIP's first and last scale, and each option once."""
    shapes = SHAPES + (SHAPES_GPU if large else ())
    found: list[tuple[Any, ...]] = [
        (f"{m}x{n}x{d} scale {scale}", m, n, d, scale, {"ids": m != n})
        for m, n, d in shapes
        for scale in ((10.0, 112.0) if m > 1 else (10.0,))
    ]
    small = (37, 37, 24, 10.0)
    found += [
        ("37x37x24 normalize", *small, {"normalize": True}),
        ("37x37x24 ids", *small, {"ids": True}),
        ("21x37x24 ids, normalize", 21, *small[1:], {"ids": True, "normalize": True}),
        ("37x37x24 scale 1, no bias", *small[:3], 1.0, {"bias": None}),
        ("37x37x24 sum", *small, {"reduction": "sum"}),
    ]
    return [
        Case(label, partial(_draw, m, n, d, scale, options, dtype, device), ("image_ids", "text_ids"))
        for label, m, n, d, scale, options in found
    ]


def _draw(
    m: int, n: int, width: int, scale: float, options: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> Inputs:
    """Pairs that resemble each other, of about unit length unless they are to be normalised."""
    shared = normal((max(m, n), width), torch.float32, device)
    places = [torch.arange(count, device=device) for count in (m, n)]
    kwargs: dict[str, Any] = {}
    if options.get("ids"):
        places = [torch.randint(max(1, n // 2), (count,), device=device) for count in (m, n)]
        kwargs["image_ids"], kwargs["text_ids"] = places

    def features(places: Tensor) -> Tensor:
        x = shared[places] + normal((len(places), width), torch.float32, device)
        return (x * 3 if options.get("normalize") else F.normalize(x, dim=-1)).to(dtype)

    kwargs |= {name: options[name] for name in ("normalize", "reduction") if name in options}
    bias = None if options.get("bias", 0) is None else torch.tensor(-10.0, device=device)
    return (*map(features, places), torch.tensor(scale, device=device), bias), kwargs
