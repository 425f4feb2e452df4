"""Complete models with canonical parameter names."""

from ._pos_embed import resample_pos_embed, resize_checkpoint
from .vit import ViT

__all__ = ["ViT", "resample_pos_embed", "resize_checkpoint"]
