"""`LayerScale`: a learned gain for each channel of a residual branch."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LayerScale(nn.Module):
    """Multiply a residual branch by a learned vector, `x * gamma`.

    Args:
        dim: width D of the branch.
        init_values: start value of every element of gamma.
        inplace: overwrite the branch; not for branches that autograd still needs.
        device: of gamma.
        dtype: of gamma.

    Source: Touvron et al., "Going deeper with Image Transformers", arXiv:2103.17239; timm's `LayerScale`.
    """

    def __init__(
        self,
        dim: int,
        init_values: float = 1e-5,
        inplace: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.init_values = init_values
        self.inplace = inplace
        self.gamma = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set gamma to `init_values`."""
        nn.init.constant_(self.gamma, self.init_values)

    def forward(self, x: Tensor) -> Tensor:
        """Scale x (..., D)."""
        return x.mul_(self.gamma) if self.inplace else x * self.gamma

    def extra_repr(self) -> str:
        """Show the width and the start value."""
        return f"{self.gamma.shape[0]}, init_values={self.init_values}"
