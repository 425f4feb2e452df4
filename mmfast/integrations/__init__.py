"""Classes that stand in for those of other libraries, one file a library. Each imports its library."""

from __future__ import annotations

import importlib
import sys

from ._swap import Accelerated

__all__ = ["Accelerated", "swaps"]

# Module that must have been imported already -> integration that knows its classes.
_INTEGRATIONS = {
    "torch.nn": "torch_nn",
    "timm.models.vision_transformer": "timm",
    "torchvision.models.vision_transformer": "torchvision",
    "open_clip.transformer": "open_clip",
    "transformers.models.vit.modeling_vit": "transformers.vit",
    "transformers.models.dinov2.modeling_dinov2": "transformers.dinov2",
    "transformers.models.clip.modeling_clip": "transformers.clip",
    "transformers.models.siglip.modeling_siglip": "transformers.siglip",
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers": "transformers.dinov2_with_registers",
}


def swaps() -> tuple[dict[type, type[Accelerated]], dict[str, str]]:
    """Return the accelerated class of each class known, and why an integration could not be imported, by library.

    No library is imported that is not loaded: a model of it cannot exist before.
    """
    found: dict[type, type[Accelerated]] = {}
    failed: dict[str, str] = {}
    for loaded, name in _INTEGRATIONS.items():
        if loaded in sys.modules:
            try:
                integration = importlib.import_module(f".{name}", __name__)
            except (ImportError, AttributeError) as error:  # a release without what the integration builds on
                failed[loaded] = f"mmfast does not fit this version: {error}"
            else:
                found.update((cls.mmfast_original, cls) for cls in integration.CLASSES)
    return found, failed
