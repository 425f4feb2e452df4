"""Accelerated classes of transformers' DINOv2."""

from __future__ import annotations

from typing import Any

from transformers.models.dinov2 import modeling_dinov2

from .._swap import DROP_PATHS, SCALES, fused
from ._dinov2 import FORMS

_Form: Any = fused(modeling_dinov2.Dinov2Layer, *FORMS)


class Dinov2Layer(_Form, modeling_dinov2.Dinov2Layer):
    """In place of `Dinov2Layer`."""

    mmfast_original = modeling_dinov2.Dinov2Layer


SCALES[modeling_dinov2.Dinov2LayerScale] = "lambda1"
DROP_PATHS.add(modeling_dinov2.Dinov2DropPath)
CLASSES = (Dinov2Layer,)
