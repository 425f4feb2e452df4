"""`CrossAttention`: queries of one sequence, keys and values of another, with diffusers' parameter names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import backends
from ..ops import attention
from ..ops._attention import attention_torch

NAME = "CrossAttention"
KV = tuple[Tensor, Tensor]


class CrossAttention(nn.Module):
    """Multi-head attention from x to a context, or to x itself where none is given.

    Keys and values of a context that stays (the prompt over the steps of a diffusion, an image over the tokens of a
    caption) are computed once: `kv = layer.project_kv(context)`, then `layer(x, kv=kv)`.

    Args:
        query_dim: width D of x.
        context_dim: width of the context; by default D.
        num_heads: number of heads H.
        head_dim: width d of a head; by default D / H.
        qkv_bias: bias of the q, k and v projections.
        out_dim: width of the output; by default D.
        out_bias: bias of the output projection.
        attn_drop: dropout rate of the attention probabilities, in training.
        dropout: dropout rate of the output, in training.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: query_dim is not a multiple of num_heads and head_dim is not given; in forward, a shape does not
            fit, or both context and kv are given.

    Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv:2112.10752, and
    diffusers' `Attention`: parameters `to_q`, `to_k`, `to_v`, `to_out.0`.
    """

    def __init__(
        self,
        query_dim: int,
        context_dim: int | None = None,
        num_heads: int = 8,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        out_dim: int | None = None,
        out_bias: bool = True,
        attn_drop: float = 0.0,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or (head_dim is None and query_dim % num_heads):
            got = f"query_dim={query_dim}, num_heads={num_heads}"
            raise ValueError(
                f"{NAME}: query_dim must be a multiple of num_heads where head_dim is not given, got {got}"
            )
        self.query_dim = query_dim
        self.context_dim = query_dim if context_dim is None else context_dim
        self.num_heads = num_heads
        self.head_dim = head_dim or query_dim // num_heads
        self.attn_drop = attn_drop
        width = num_heads * self.head_dim

        def linear(width_in: int, width_out: int, bias: bool) -> nn.Linear:
            return nn.Linear(width_in, width_out, bias=bias, device=device, dtype=dtype)

        self.to_q = linear(query_dim, width, qkv_bias)
        self.to_k = linear(self.context_dim, width, qkv_bias)
        self.to_v = linear(self.context_dim, width, qkv_bias)
        self.to_out = nn.Sequential(linear(width, out_dim or query_dim, out_bias), nn.Dropout(dropout))

    def project_kv(self, context: Tensor) -> KV:
        """Return the keys and values of context (B, Nk, context_dim), each (B, H, Nk, d): `forward`'s kv."""
        self._check("context", context, self.context_dim)
        return self._heads(self.to_k(context)), self._heads(self.to_v(context))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        kv: KV | None = None,
    ) -> Tensor:
        """Attend from x to context, to kv, or to itself.

        Args:
            x: (B, Nq, D).
            context: (B', Nk, context_dim), or None. B is a multiple of B': each image of the context serves B / B'
                consecutive ones of x (the beams of a search, the samples of a prompt), and is read once.
            context_mask: (B', Nk), True where a key is real and False where it is padding.
            attn_mask: broadcastable to (B, H, Nq, Nk); boolean (True attends), or added to the scores.
            kv: what `project_kv` returned, instead of context.

        Returns:
            (B, Nq, out_dim). A row whose keys are all masked is to_out.0's bias.
        """
        self._check("x", x, self.query_dim)
        if kv is None:
            kv = self.project_kv(x if context is None else context)
        elif context is not None:
            raise ValueError(f"{NAME}: give context or kv, got both")
        k, v = kv
        batch, length = x.shape[:2]
        shared = self._shared(batch, k, v)
        mask = self._mask(context_mask, attn_mask, k, shared, (batch, length))
        # Rows of samples that share a context follow one another: they are one longer sequence, without a copy.
        q = self._heads(self.to_q(x).reshape(batch // shared, shared * length, -1))
        attend = attention_torch if backends.torch_serves(x) else attention
        out = attend(q, k, v, mask, self.attn_drop if self.training else 0.0, False, None, False)
        return self.to_out(out.transpose(1, 2).reshape(batch, length, self.num_heads * self.head_dim))

    def extra_repr(self) -> str:
        """What `repr` shows beside the linear layers."""
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, attn_drop={self.attn_drop}"

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _check(self, name: str, x: object, width: int) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{NAME}: {name} must be a tensor, got {type(x).__name__}")
        if x.dim() != 3 or x.shape[-1] != width:
            raise ValueError(f"{NAME}: {name} must have shape (B, N, {width}), got {tuple(x.shape)}")

    def _shared(self, batch: int, k: Tensor, v: Tensor) -> int:
        """How many consecutive samples of x each sample of the context serves."""
        for name, x in (("k", k), ("v", v)):
            shape = (k.shape[0], self.num_heads, k.shape[-2], self.head_dim)
            if x.dim() != 4 or x.shape != shape:
                expected = f"(B, {self.num_heads}, Nk, {self.head_dim})"
                raise ValueError(f"{NAME}: {name} of kv must have shape {expected}, got {tuple(x.shape)}")
        if k.shape[0] == batch:
            return 1
        if k.shape[0] == 0 or batch % k.shape[0]:
            raise ValueError(f"{NAME}: the batch of the context must divide x's {batch}, got {k.shape[0]}")
        return batch // k.shape[0]

    def _mask(
        self,
        context_mask: Tensor | None,
        attn_mask: Tensor | None,
        k: Tensor,
        shared: int,
        rows: tuple[int, int],
    ) -> Tensor | None:
        """One mask for (B', H, shared * Nq, Nk)."""
        keep = None
        if context_mask is not None:
            wanted = (k.shape[0], k.shape[-2])
            if context_mask.shape != wanted or context_mask.dtype != torch.bool:
                got = f"{context_mask.dtype} {tuple(context_mask.shape)}"
                raise ValueError(f"{NAME}: context_mask must be torch.bool of shape {wanted}, got {got}")
            keep = context_mask[:, None, None]
        if attn_mask is None:
            return keep
        full = (rows[0], self.num_heads, rows[1], k.shape[-2])
        fits = attn_mask.dim() <= 4 and all(
            n in (1, m) for n, m in zip(reversed(attn_mask.shape), reversed(full), strict=False)
        )
        if not fits:
            raise ValueError(f"{NAME}: attn_mask must broadcast to {full}, got {tuple(attn_mask.shape)}")
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
        if shared > 1 and (attn_mask.shape[0] > 1 or attn_mask.shape[2] > 1):
            spread = attn_mask.expand(rows[0], -1, rows[1], -1).unflatten(0, (-1, shared))
            attn_mask = spread.transpose(1, 2).flatten(2, 3)
        if keep is None:
            return attn_mask
        return attn_mask & keep if attn_mask.dtype == torch.bool else attn_mask.masked_fill(~keep, float("-inf"))
