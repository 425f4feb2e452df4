"""Self-attention of a ViT block (`Attention`) and the attention pools of its head, with timm's parameter names."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .. import backends
from ..ops import attention, attention_maps, attention_qkv
from ..ops._attention import attention_torch
from ..ops.attention_qkv import attention_qkv_torch
from ._init import trunc_normal_
from .activation import any_global_hook, hooked
from .mlp import Mlp

Layer = Callable[..., nn.Module]


class Attention(nn.Module):
    """Multi-head self-attention with a packed q, k, v projection.

    The projection goes into `mmfast.ops.attention_qkv` as it is; with qk_norm, its heads into `mmfast.ops.attention`.
    Where `attn_drop` carries a hook or is another module, it is called on the probabilities, as in unfused attention:
    a hook on it is how tools record attention maps.

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
            is_causal: each token sees itself and those before it; together with attn_mask, both hold.

        Returns:
            (B, N, dim_out).
        """
        out = self.norm(self._attend(x, attn_mask, is_causal))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def _attend(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        """Return the heads' output (B, N, H * d)."""
        drop = self.attn_drop
        if not is_plain(drop, nn.Dropout, nn.Identity):
            q, k, v = self._heads(x)
            p = attention_maps(q, k, attn_mask=attn_mask, is_causal=is_causal, scale=self.scale)
            return self._join(drop(p) @ v)
        dropout = drop.p if self.training and isinstance(drop, nn.Dropout) else 0.0
        direct = backends.torch_serves(x)  # the ops' checks cost a tiny model on a CPU a tenth of its time
        plain = is_plain(self.q_norm, nn.Identity) and is_plain(self.k_norm, nn.Identity)
        if plain and not any_global_hook():
            packed = attention_qkv_torch if direct else attention_qkv
            return packed(self.qkv(x), self.num_heads, attn_mask, dropout, is_causal)
        q, k, v = self._heads(x)
        if direct:
            return self._join(attention_torch(q, k, v, attn_mask, dropout, is_causal, None, False))
        return self._join(attention(q, k, v, attn_mask, dropout, is_causal))

    def _join(self, out: Tensor) -> Tensor:
        """Lay heads (B, H, N, d) side by side, (B, N, H * d)."""
        return out.transpose(1, 2).reshape(out.shape[0], out.shape[2], self.attn_dim)

    def probabilities(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        heads: int | Sequence[int] | None = None,
    ) -> Tensor:
        """Return the attention probabilities (B, H, N, N) that `forward` applies, before dropout.

        `heads` chooses heads, as in `mmfast.ops.attention_maps`. A row whose keys are all masked is 0.
        """
        q, k, _ = self._heads(x)
        return attention_maps(q, k, attn_mask=attn_mask, is_causal=is_causal, scale=self.scale, heads=heads)


def is_plain(module: nn.Module, *kinds: type) -> bool:
    """Whether `module` is exactly one of `kinds` and calling it does no more than its class's forward."""
    return type(module) in kinds and not hooked(module)


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
        attend = attention_torch if backends.torch_serves(x) else attention
        out = attend(q, k, v, attn_mask, 0.0, False, None, False)
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
        attend = attention_torch if backends.torch_serves(x) else attention
        x = attend(heads, heads, heads, None, 0.0, False, None, False).transpose(1, 2).reshape(batch, length, width)
        return x[:, 0] if self.pool == "token" else x.mean(dim=1)
