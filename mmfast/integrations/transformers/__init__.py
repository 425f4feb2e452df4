"""Accelerated classes of Hugging Face transformers, one file a model, and its registry of attention functions.

The layer norms are torch.nn's.
"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Register attention of the name "mmfast" with transformers, for every model that reads its attention from there.

    Then `from_pretrained(..., attn_implementation="mmfast")` and `model.set_attn_implementation("mmfast")` have
    `mmfast.ops.attention` in the model, with the masks that "sdpa" gets. `mmfast.accelerate` needs no registration: it
    swaps the attention of the models it knows. A second call changes nothing.

    Raises ImportError if transformers is not installed, or is older than its registries of attention and masks (4.53).
    """
    from . import _register

    _register.register()
