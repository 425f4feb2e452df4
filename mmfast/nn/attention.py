"""Self-attention of a ViT block (`Attention`) and the attention pools of its head, with timm's parameter names."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._init import trunc_normal_
from .mlp import Mlp

Layer = Callable[..., nn.Module]


class Attention(nn.Module):
    """Multi-head self-attention with a packed q, k, v projection.

    Args:
        dim: width D of the input.
        num_heads: number of heads H.
        attn_head_dim: width of a head; by default D / H.
        dim_out: width of the output; by default D.
        qkv_bias: bias of the q, k, v projection.
        qk_norm: normalise q and k of each head.
        scale_norm: normalise the heads' output before the output projection.
        proj_bias: bias of the output projection.
        gated: multiply the heads' output by the sigmoid of a projection of the input.
        attn_drop: dropout rate of the attention probabilities.
        proj_drop: dropout rate of the output.
        norm_layer: constructor of the norms of qk_norm and scale_norm.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: dim is not a multiple of num_heads, or a norm is asked for without norm_layer.

    Source: timm's `Attention`: parameters `qkv` (rows q; k; v), `q_norm`, `k_norm`, `norm`, `gate`, `proj`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        attn_head_dim: int | None = None,
        dim_out: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        gated: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Layer | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or (attn_head_dim is None and dim % num_heads):
            raise ValueError(f"Attention: dim must be a multiple of num_heads, got dim={dim}, num_heads={num_heads}")
        if (qk_norm or scale_norm) and norm_layer is None:
            raise ValueError("Attention: qk_norm and scale_norm need norm_layer, got None")
        self.num_heads = num_heads
        self.head_dim = attn_head_dim or dim // num_heads
        self.attn_dim = self.num_heads * self.head_dim
        self.scale = self.head_dim**-0.5

        def norm(width: int, wanted: bool) -> nn.Module:
            return norm_layer(width, device=device, dtype=dtype) if wanted and norm_layer else nn.Identity()

        def linear(width_in: int, width_out: int, bias: bool) -> nn.Linear:
            return nn.Linear(width_in, width_out, bias=bias, device=device, dtype=dtype)

        self.qkv = linear(dim, 3 * self.attn_dim, qkv_bias)
        self.q_norm = norm(self.head_dim, qk_norm)
        self.k_norm = norm(self.head_dim, qk_norm)
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = norm(self.attn_dim, scale_norm)
        self.gate = linear(dim, self.attn_dim, qkv_bias) if gated else None
        self.proj = linear(self.attn_dim, dim_out or dim, proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k, v, each (B, H, N, d)."""
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        return self.q_norm(q), self.k_norm(k), v

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend among the tokens of x (B, N, D).

        Args:
            x: (B, N, D).
            attn_mask: broadcastable to (B, H, N, N); boolean (True attends) or added to the scores.
            is_causal: each token sees itself and those before it; not together with attn_mask.

        Returns:
            (B, N, dim_out).
        """
        q, k, v = self._heads(x)
        dropout = self.attn_drop.p if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal)
        out = self.norm(out.transpose(1, 2).reshape(x.shape[0], x.shape[1], self.attn_dim))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def probabilities(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return the attention probabilities (B, H, N, N) that `forward` applies, before dropout.

        A row whose keys are all masked is 0.
        """
        q, k, _ = self._heads(x)
        scores = (q * self.scale) @ k.transpose(-2, -1)
        if is_causal:
            attn_mask = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is None:
            return scores.softmax(dim=-1)
        masks = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, float("-inf")) if masks else scores + attn_mask
        empty = scores.amax(dim=-1, keepdim=True) == float("-inf")
        return scores.softmax(dim=-1).masked_fill(empty, 0.0)


class AttentionPoolLatent(nn.Module):
    """Pool tokens by attention from one learned query, then an MLP with a residual (SigLIP's `map` head).

    Args:
        in_features: width D of the tokens.
        num_heads: number of heads.
        mlp_ratio: hidden width of the MLP, in D.
        norm_layer: constructor of the norm before the MLP, or None.
        act_layer: constructor of the MLP's activation.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: in_features is not a multiple of num_heads.

    Source: Zhai et al., "Scaling Vision Transformers", arXiv:2106.04560; timm's `AttentionPoolLatent`: parameters
    `latent`, `q`, `kv`, `proj`, `norm`, `mlp`.
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        norm_layer: Layer | None = None,
        act_layer: Layer = nn.GELU,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or in_features % num_heads:
            raise ValueError(
                f"AttentionPoolLatent: in_features must be a multiple of num_heads, "
                f"got in_features={in_features}, num_heads={num_heads}"
            )
        self.num_heads = num_heads
        self.head_dim = in_features // num_heads
        self.out_features = in_features
        self.latent = nn.Parameter(torch.zeros(1, 1, in_features, device=device, dtype=dtype))
        self.q = nn.Linear(in_features, in_features, device=device, dtype=dtype)
        self.kv = nn.Linear(in_features, 2 * in_features, device=device, dtype=dtype)
        self.proj = nn.Linear(in_features, in_features, device=device, dtype=dtype)
        self.norm = norm_layer(in_features, device=device, dtype=dtype) if norm_layer else nn.Identity()
        self.mlp = Mlp(in_features, int(in_features * mlp_ratio), act_layer=act_layer, device=device, dtype=dtype)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw the query from a normal truncated at two standard deviations, of scale D^-0.5."""
        trunc_normal_(self.latent).mul_(self.latent.shape[-1] ** -0.5)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Pool x (B, N, D) to (B, D). attn_mask: broadcastable to (B, H, 1, N)."""
        batch, length, width = x.shape
        q = self.q(self.latent.expand(batch, -1, -1)).reshape(batch, 1, self.num_heads, self.head_dim).transpose(1, 2)
        kv = self.kv(x).reshape(batch, length, 2, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        k, v = kv.unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        out = self.proj(out.transpose(1, 2).reshape(batch, 1, width))
        return (out + self.mlp(self.norm(out)))[:, 0]


class AttentionPoolPrr(nn.Module):
    """Pool after one self-attention without parameters: the tokens are their own queries, keys and values.

    Args:
        dim: width D of the tokens.
        num_heads: number of heads.
        pool_type: "token" takes the first token, "avg" the mean.

    Raises:
        ValueError: dim is not a multiple of num_heads, or pool_type is unknown.

    Source: "Locality-Attending Vision Transformer"; timm's `AttentionPoolPrr`.
    """

    def __init__(self, dim: int, num_heads: int = 8, pool_type: str = "token") -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(
                f"AttentionPoolPrr: dim must be a multiple of num_heads, got dim={dim}, num_heads={num_heads}"
            )
        if pool_type not in ("token", "avg"):
            raise ValueError(f"AttentionPoolPrr: pool_type must be 'token' or 'avg', got {pool_type!r}")
        self.num_heads = num_heads
        self.pool = pool_type
        self.out_features = dim

    def forward(self, x: Tensor) -> Tensor:
        """Pool x (B, N, D) to (B, D)."""
        batch, length, width = x.shape
        heads = x.reshape(batch, length, self.num_heads, width // self.num_heads).transpose(1, 2)
        x = F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).reshape(batch, length, width)
        return x[:, 0] if self.pool == "token" else x.mean(dim=1)
