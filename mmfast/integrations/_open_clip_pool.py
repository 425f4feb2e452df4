"""The poolings of open_clip: of CoCa, by learned queries, and of ModifiedResNet, by the mean of the image."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ._attention import FusedAttention, attend, refuses_head_dim, split_heads
from ._outline import IMAGES
from ._probe import attend_from, refuses_probe
from ._swap import multiplies, plain_tensor


class AttentionalPooler(FusedAttention):
    """Its queries are the same for each sample, and are projected once."""

    outlines = frozenset(
        {"ln_k(x) ln_q(query) $2.unsqueeze(0) $3.expand(2,-1,-1) attn($4,$1,$1,need_weights=False) -> $5[0]"}
    )
    bypassed = ("attn",)
    query: Any
    attn: Any
    ln_q: Any
    ln_k: Any

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        """Why this pooling is left alone, or None."""
        reason = refuses_probe(module._modules.get("attn"))
        return None if reason is None else f"attn {reason}"

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, queries, D)."""
        if backends.torch_serves(x) or not plain_tensor(x) or x.dim() != 3:
            return super().forward(x)
        x, q = self.ln_k(x), self.ln_q(self.query)
        y = attend_from(self.attn, q, x)
        if y is None:
            y = self.attn(q.unsqueeze(0).expand(x.shape[0], -1, -1), x, x, need_weights=False)[0]
        return y


class AttentionPool2d(FusedAttention):
    """One query attends in place of all of which one is kept: less to do on any device, so on a CPU too."""

    variants = tuple({"shape": IMAGES, "training": training} for training in (True, False))
    outlines = frozenset(
        {
            " | ".join(
                "x.reshape(2,3,1024) $1.permute(2,0,1) $2.mean(dim=0,keepdim=True) cat([$3,$2],dim=0) "
                "positional_embedding[:,None,:].to($4.dtype) $4+$5 cat([q_proj.bias,k_proj.bias,v_proj.bias]) "
                "multi_head_attention_forward($6,$6,$6,7,num_heads,None,$7,None,None,False,0.0,c_proj.weight,"
                f"c_proj.bias,training={training},key_padding_mask=None,need_weights=False,attn_mask=None,"
                "is_causal=False,use_separate_proj_weight=True,q_proj_weight=q_proj.weight,"
                "k_proj_weight=k_proj.weight,v_proj_weight=v_proj.weight,static_k=None,static_v=None,"
                "average_attn_weights=True) -> $8[0][0]"
                for training in (True, False)
            )
        }
    )
    positional_embedding: Any
    q_proj: Any
    k_proj: Any
    v_proj: Any
    c_proj: Any
    num_heads: int

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        """Why this pooling is left alone, or None."""
        return refuses_head_dim(module.positional_embedding.shape[-1] // module.num_heads)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D)."""
        y = self._pool(x)
        return super().forward(x) if y is None else y

    def _pool(self, x: Tensor) -> Tensor | None:
        if not plain_tensor(x) or x.dim() != 4 or not x.numel() or self.refuses(self) is not None:
            return None
        # The layers are not called, here as there: their weights and biases are used.
        pairs = [(layer.weight, layer.bias) for layer in (self.q_proj, self.k_proj, self.v_proj, self.c_proj)]
        if not all(multiplies(x, *pair) for pair in pairs):
            return None
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
        tokens = tokens + self.positional_embedding.to(tokens.dtype)
        inputs = (tokens[:, :1], tokens, tokens)
        q, k, v = (
            split_heads(F.linear(part, *pair), self.num_heads) for part, pair in zip(inputs, pairs[:3], strict=True)
        )
        return F.linear(attend(q, k, v)[:, 0], *pairs[3])
