"""State-dict name maps between foreign layouts and mmfast's own, one file a layout.

    state = mmfast.convert.to_timm(checkpoint)              # names of mmfast.models.ViT and of timm
    model = mmfast.convert.vit_from(torchvision_model)      # a ViT that computes the same, with a copy of the weights
    model = mmfast.convert.vit_from(checkpoint, num_heads=12)
    back = mmfast.convert.from_timm(state, "torchvision")   # the way back, bit by bit
    clip = mmfast.convert.clip_from(transformers_clip)      # both towers of a CLIP or SigLIP

What loads into `mmfast.models.ViT` with strict=True and gives equal outputs (tested on random weights in float64):

| layout | what is read | also written | num_heads, eps and activation of a state dict |
|---|---|---|---|
| `timm` | VisionTransformer: class token, registers, CLIP's pre_norm, LayerScale, SwiGLU, qk_norm, map pool; DeiT-III's and EVA's older names; the timm tower of an open_clip model | yes | asked, 1e-6 (pre_norm 1e-5), GELU (SwiGLU: SiLU) |
| `torchvision` | vit_b_16 and its like, MLP names of 0.12 too | yes, new or old names | asked, 1e-6, GELU |
| `transformers` | ViT, DeiT, DINOv2, DINOv2 with registers; with or without head and prefix; names of files (version 4) and of version 5 in memory | yes, either names | asked or `config=`, 1e-12 (DINOv2 1e-6), GELU |
| `transformers_clip` | image tower of CLIP and SigLIP, alone or in the whole model | yes | asked or `config=`, 1e-5 (SigLIP 1e-6), asked (SigLIP tanh GELU) |
| `open_clip` | OpenAI's and open_clip's image tower, alone or in the whole CLIP | yes | asked, 1e-5, asked (QuickGELU in OpenAI's files) |
| `dinov2` | Meta's releases: chunked or not, with registers, SwiGLU; the backbone of a training checkpoint | yes, unchunked | asked, 1e-6, GELU |
| `vit_pytorch` | vit_pytorch.ViT, pool "cls" and "mean", head widths other than D / H; names of older releases | yes | asked, 1e-5, GELU |

What loads into `mmfast.models.CLIP`, both towers, with `to_open_clip`, `from_open_clip` and `clip_from`:

| layout | what is read | also written | heads, eps, activation and pooling of a state dict |
|---|---|---|---|
| `open_clip` | CLIP and CustomTextCLIP with a ViT, a ModifiedResNet or a timm ViT (SigLIP); OpenAI's files | yes, either prefix | a name of open_clip or fields as `config=`; OpenAI's are known |
| `transformers` | CLIPModel, SiglipModel; each tower alone, with or without projection and prefix | yes, any of these | a transformers `config=` |

Every key is mapped, or kept in the result's `aside` with a reason (poolers, mask tokens, the text tower), or refused
with a ValueError that names it. Refused is what the model cannot compute: DINOv2's classifier over two kinds of tokens,
distilled DeiT's second head, CoCa's pool, torchvision's representation layer.
"""  # noqa: E501  a table's row is a line

from __future__ import annotations

from ._names import ConvertedState
from .clip import clip_config, clip_from, from_open_clip, to_open_clip
from .vit import convert, detect, from_timm, to_timm, vit_config, vit_from

__all__ = [
    "ConvertedState",
    "clip_config",
    "clip_from",
    "convert",
    "detect",
    "from_open_clip",
    "from_timm",
    "to_open_clip",
    "to_timm",
    "vit_config",
    "vit_from",
]
