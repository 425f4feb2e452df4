"""Accelerated classes of transformers' DINOv2 with registers."""

from __future__ import annotations

from typing import Any

from transformers.models.dinov2_with_registers import modeling_dinov2_with_registers as modeling

from .._swap import DROP_PATHS, SCALES, fused
from ._dinov2 import FORMS

_Form: Any = fused(modeling.Dinov2WithRegistersLayer, *FORMS)


class Dinov2WithRegistersLayer(_Form, modeling.Dinov2WithRegistersLayer):
    """In place of `Dinov2WithRegistersLayer`."""

    mmfast_original = modeling.Dinov2WithRegistersLayer


SCALES[modeling.Dinov2WithRegistersLayerScale] = "lambda1"
DROP_PATHS.add(modeling.Dinov2WithRegistersDropPath)
CLASSES = (Dinov2WithRegistersLayer,)
