"""A torchvision wheel built for CUDA beside a CPU build of torch."""

from __future__ import annotations

import torch

_library: torch.library.Library | None = None


def declare_torchvision_ops() -> None:
    """Make torchvision, and the peers that import it, importable where its own ops cannot load.

    torchvision's wheel holds ops built for one build of torch. Beside a CPU build they do not load, and importing it
    fails at the first op it wants to describe. None of the models here calls one, so declaring them is enough.
    """
    global _library
    if torch.version.cuda is None and _library is None and not hasattr(torch.ops.torchvision, "nms"):
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
