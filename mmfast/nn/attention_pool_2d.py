"""`AttentionPool2d`: the attention pooling of CLIP's ResNets, from one query."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import backends
from ..ops import attention
from ..ops._attention import attention_torch
from .activation import any_global_hook, plain_linear


class AttentionPool2d(nn.Module):
    """Pool a feature map to a vector: the mean of the map attends to itself and all positions.

    With C channels, N = H * W + 1 tokens and a projected query q', a head's score of token x is `<q', Wk x + bk>`, that
    is `<Wk^T q', x> + <q', bk>`: one product for the query instead of one for each token. In the same way `Wv` is
    applied once, to the weighted sum of the tokens. So the projections of keys and values cost 2 C^2 multiplications
    an image instead of 2 N C^2. Where q_proj, k_proj or v_proj are more than linear layers (hooks, wrappers), they are
    called on the tokens, and `mmfast.ops.attention` joins them.

    Args:
        spacial_dim: height and width of the map, or a pair.
        embed_dim: channels C of the map.
        num_heads: number of heads.
        output_dim: width of the output; by default C.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: embed_dim is not a multiple of num_heads; in forward, the map does not fit.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", arXiv:2103.00020;
    open_clip's `AttentionPool2d`, which computes all N queries and keeps one: parameters `positional_embedding`,
    `k_proj`, `q_proj`, `v_proj`, `c_proj`.
    """

    def __init__(
        self,
        spacial_dim: int | tuple[int, int],
        embed_dim: int,
        num_heads: int,
        output_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(
                "AttentionPool2d: embed_dim must be a multiple of num_heads, "
                f"got embed_dim={embed_dim}, num_heads={num_heads}"
            )
        rows, columns = (spacial_dim, spacial_dim) if isinstance(spacial_dim, int) else spacial_dim
        self.num_heads = num_heads
        self.positional_embedding = nn.Parameter(
            torch.randn(rows * columns + 1, embed_dim, device=device, dtype=dtype) / embed_dim**0.5
        )
        self.k_proj = nn.Linear(embed_dim, embed_dim, device=device, dtype=dtype)
        self.q_proj = nn.Linear(embed_dim, embed_dim, device=device, dtype=dtype)
        self.v_proj = nn.Linear(embed_dim, embed_dim, device=device, dtype=dtype)
        self.c_proj = nn.Linear(embed_dim, output_dim or embed_dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Pool x (B, C, H, W) to (B, output_dim)."""
        positions, channels = self.positional_embedding.shape
        if x.dim() != 4 or x.shape[1] != channels or x.shape[2] * x.shape[3] != positions - 1:
            expected = f"(B, {channels}, H, W) with H * W = {positions - 1}"
            raise ValueError(f"AttentionPool2d: x must have shape {expected}, got {tuple(x.shape)}")
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding.to(x.dtype)
        linear = plain_linear(self.q_proj) and plain_linear(self.k_proj) and plain_linear(self.v_proj)
        return self.c_proj(self._absorbed(x) if linear and not any_global_hook() else self._projected(x))

    def _absorbed(self, x: Tensor) -> Tensor:
        """Heads side by side (B, C), with the projections of keys and values applied to one vector a head."""
        batch, _, channels = x.shape
        head_dim = channels // self.num_heads
        q = self.q_proj(x[:, 0]) * head_dim**-0.5
        q = q.view(batch, self.num_heads, head_dim).transpose(0, 1)  # [H, B, d]
        weight_k = self.k_proj.weight.view(self.num_heads, head_dim, channels)
        weight_v = self.v_proj.weight.view(self.num_heads, head_dim, channels)
        asked = torch.bmm(q, weight_k).transpose(0, 1)  # [B, H, C]
        # The same for all tokens, which softmax does not see; but without it the bias has no gradient, and DDP fails.
        constant = torch.bmm(q, self.k_proj.bias.view(self.num_heads, head_dim, 1)).transpose(0, 1)  # [B, H, 1]
        p = (torch.bmm(asked, x.transpose(1, 2)) + constant).softmax(dim=-1)  # [B, H, N]
        found = torch.bmm(p.to(x.dtype), x).transpose(0, 1)  # [H, B, C]
        out = torch.bmm(found, weight_v.transpose(1, 2)).transpose(0, 1).reshape(batch, channels)
        return out + self.v_proj.bias

    def _projected(self, x: Tensor) -> Tensor:
        """Heads side by side (B, C), module by module."""
        batch, _, channels = x.shape
        q, k, v = (
            y.unflatten(-1, (self.num_heads, channels // self.num_heads)).transpose(1, 2)
            for y in (self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x))
        )
        attend = attention_torch if backends.torch_serves(x) else attention
        return attend(q, k, v, None, 0.0, False, None, False).reshape(batch, channels)

    def extra_repr(self) -> str:
        """Show the number of tokens and of heads."""
        return f"tokens={self.positional_embedding.shape[0]}, num_heads={self.num_heads}"
