"""The start of a ViT as one op: patches, class and register tokens and positions, written where blocks read them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..nn import PatchEmbed
from ..nn.activation import _plain_tensor
from ._vit_block import is_plain

if TYPE_CHECKING:
    from .vit import ViT


def embed_in_one(model: ViT, x: Tensor) -> Tensor | None:
    """Tokens (B, P + N, D) of images after `pos_drop`, by one `mmfast.ops.patch_embed`; None: call the modules.

    The op passes over `patch_embed`, its `proj` and its `norm`: a hook, a subclass or another module there is called
    as it is. On a CPU the modules are as good.
    """
    embed = model.patch_embed
    if not isinstance(x, Tensor) or x.dim() != 4 or not is_plain(embed, PatchEmbed) or not embed.op_serves(x):
        return None
    if not is_plain(embed.norm, nn.Identity) or not (embed.flatten or embed.output_fmt in ("NLC", "NHWC")):
        return None
    prefix: list[Tensor] = [token for token in (model.cls_token, model.reg_token) if token is not None]
    pos_embed: Tensor | None = model.pos_embed
    if not all(_plain_tensor(t) and t.device == x.device for t in (*prefix, pos_embed) if t is not None):
        return None
    x = embed.prepare(x, fold=True)
    if pos_embed is not None and model.dynamic_img_size:
        grid = (x.shape[2] // embed.patch_size[0], x.shape[3] // embed.patch_size[1])
        pos_embed = model._resampled_pos_embed(pos_embed, grid, embed.grid_size)
    tokens = torch.cat(prefix, dim=1) if len(prefix) > 1 else prefix[0] if prefix else None
    y = embed.tokens(x, pos_embed=pos_embed, prefix_tokens=tokens)
    return y if pos_embed is None else model.pos_drop(y)
