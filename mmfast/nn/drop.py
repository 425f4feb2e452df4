"""Stochastic regularisers of a transformer: `DropPath` (whole branches) and `PatchDropout` (tokens)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """Drop a residual branch for a random part of the samples (stochastic depth).

    In training each sample's branch is multiplied by 0 with probability `drop_prob` and by
    `1 / (1 - drop_prob)` otherwise (by 1 with `scale_by_keep=False`). In evaluation it does nothing.

    Args:
        drop_prob: probability in [0, 1].
        scale_by_keep: keep the expectation by scaling the samples that stay.

    Raises:
        ValueError: drop_prob is outside [0, 1].

    Source: Huang et al., "Deep Networks with Stochastic Depth", arXiv:1603.09382; timm's `DropPath`, which draws the
    same mask from the same generator state.
    """

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
        super().__init__()
        check_rate("DropPath", "drop_prob", drop_prob)
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    def factors(self, x: Tensor) -> Tensor | None:
        """Draw the factor of each sample, (B, 1, ..., 1) in x's dtype, or return None where nothing is dropped."""
        if self.drop_prob == 0.0 or not self.training:
            return None
        keep = 1.0 - self.drop_prob
        factors = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        if keep > 0.0 and self.scale_by_keep:
            factors.div_(keep)
        return factors

    def forward(self, x: Tensor) -> Tensor:
        """Scale x (B, ...) sample by sample."""
        factors = self.factors(x)
        return x if factors is None else x * factors

    def extra_repr(self) -> str:
        """Show the rate."""
        return f"drop_prob={self.drop_prob:0.3f}"


class PatchDropout(nn.Module):
    """In training, keep a random `1 - prob` of the patch tokens of each sample and all prefix tokens.

    Args:
        prob: part of the patches to drop, in [0, 1). At least one patch stays.
        num_prefix_tokens: tokens at the front that are never dropped (class and register tokens).
        ordered: keep the patches in their order; by default they come out shuffled, which attention does not see.

    Raises:
        ValueError: prob is outside [0, 1).

    Source: Liu et al., "PatchDropout", arXiv:2208.07220; timm's `PatchDropout`, same draws from the same state.
    """

    def __init__(self, prob: float = 0.5, num_prefix_tokens: int = 1, ordered: bool = False) -> None:
        super().__init__()
        if not 0.0 <= prob < 1.0:
            raise ValueError(f"PatchDropout: prob must be in [0, 1), got {prob}")
        self.prob = prob
        self.num_prefix_tokens = num_prefix_tokens
        self.ordered = ordered

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, P + N, D) to (B, P + max(1, int(N * (1 - prob))), D)."""
        if not self.training or self.prob == 0.0:
            return x
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        batch, length = patches.shape[:2]
        kept = max(1, int(length * (1.0 - self.prob)))
        indices = torch.randn(batch, length, device=x.device).argsort(dim=-1)[:, :kept]
        if self.ordered:
            indices = indices.sort(dim=-1)[0]
        patches = patches.gather(1, indices.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
        return torch.cat((prefix, patches), dim=1) if self.num_prefix_tokens else patches

    def extra_repr(self) -> str:
        """Show the rate."""
        return f"prob={self.prob}, num_prefix_tokens={self.num_prefix_tokens}"


def check_rate(owner: str, name: str, rate: float) -> None:
    """Raise ValueError unless `rate` is a probability."""
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"{owner}: {name} must be in [0, 1], got {rate}")
