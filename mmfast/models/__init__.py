"""Complete models with canonical parameter names."""

from ._clip_config import clip_names
from ._clip_retrieval import retrieval_recall, top_k_matches
from ._clip_tokenizer import clip_tokenizer
from ._clip_zero_shot import zero_shot_classifier, zero_shot_predict
from ._pos_embed import resample_pos_embed, resize_checkpoint
from .clip import CLIP
from .diffusion import GaussianDiffusion
from .vit import ViT

__all__ = [
    "CLIP",
    "GaussianDiffusion",
    "ViT",
    "clip_names",
    "clip_tokenizer",
    "resample_pos_embed",
    "resize_checkpoint",
    "retrieval_recall",
    "top_k_matches",
    "zero_shot_classifier",
    "zero_shot_predict",
]
