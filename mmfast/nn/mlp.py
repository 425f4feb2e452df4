"""Feed-forward networks of a transformer block: `Mlp`, `GluMlp` (SwiGLU packed), `SwiGLU` and `GEGLU`.

Where it may, the first linear layer and its activation are one `mmfast.ops.linear_act`: not on a CPU, not with an
activation that the op lacks, and not where a hook, a wrapper or a parametrization makes a module more than it was.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .activation import linear_then

T = TypeVar("T")
Layer = Callable[..., nn.Module]


def _pair(value: T | tuple[T, T]) -> tuple[T, T]:
    return value if isinstance(value, tuple) else (value, value)


class Mlp(nn.Module):
    """Two linear layers with an activation between: `act(x W1 + b1) W2 + b2`.

    Args:
        in_features: width D of the input.
        hidden_features: width of the hidden layer, by default D.
        out_features: width of the output, by default D.
        act_layer: constructor of the activation.
        norm_layer: constructor of a norm before fc2, or None.
        bias: of both linear layers, or a pair.
        drop: dropout rate after the activation and after fc2, or a pair.
        device: of the parameters.
        dtype: of the parameters.

    Source: timm's `Mlp`: parameters `fc1`, `norm`, `fc2`.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Layer = nn.GELU,
        norm_layer: Layer | None = None,
        bias: bool | tuple[bool, bool] = True,
        drop: float | tuple[float, float] = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        out_features = out_features or in_features
        hidden_features = hidden_features or in_features
        bias1, bias2 = _pair(bias)
        drop1, drop2 = _pair(drop)
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias1, device=device, dtype=dtype)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop1)
        self.norm = norm_layer(hidden_features, device=device, dtype=dtype) if norm_layer else nn.Identity()
        self.fc2 = nn.Linear(hidden_features, out_features, bias=bias2, device=device, dtype=dtype)
        self.drop2 = nn.Dropout(drop2)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in_features) to (..., out_features)."""
        hidden = linear_then(self.fc1, self.act, x)
        if hidden is None:
            hidden = self.act(self.fc1(x))
        return self.drop2(self.fc2(self.norm(self.drop1(hidden))))


class GluMlp(nn.Module):
    """A gated feed-forward network with value and gate packed in one linear layer.

    The halves (a, b) of `fc1(x)` give `a * act(b)` with `gate_last`, else `act(a) * b`; then `fc2`.

    Args:
        in_features: width D of the input.
        hidden_features: width of fc1's output, both halves together; even; by default D.
        out_features: width of the output, by default D.
        act_layer: constructor of the gate's activation.
        norm_layer: constructor of a norm before fc2, or None.
        bias: of both linear layers, or a pair.
        drop: dropout rate after the gate and after fc2, or a pair.
        gate_last: whether the gate is the second half.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: hidden_features is odd.

    Source: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202; timm's `GluMlp`.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Layer = nn.Sigmoid,
        norm_layer: Layer | None = None,
        bias: bool | tuple[bool, bool] = True,
        drop: float | tuple[float, float] = 0.0,
        gate_last: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        out_features = out_features or in_features
        hidden_features = hidden_features or in_features
        if hidden_features % 2:
            raise ValueError(f"GluMlp: hidden_features must be even, got {hidden_features}")
        bias1, bias2 = _pair(bias)
        drop1, drop2 = _pair(drop)
        half = hidden_features // 2
        self.gate_last = gate_last
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias1, device=device, dtype=dtype)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop1)
        self.norm = norm_layer(half, device=device, dtype=dtype) if norm_layer else nn.Identity()
        self.fc2 = nn.Linear(half, out_features, bias=bias2, device=device, dtype=dtype)
        self.drop2 = nn.Dropout(drop2)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Start the second half of fc1 near zero, with bias 1."""
        half = self.fc1.out_features // 2
        if self.fc1.bias is not None:
            self.fc1.bias[half:].fill_(1.0)
        self.fc1.weight[half:].normal_(std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in_features) to (..., out_features)."""
        hidden = linear_then(self.fc1, self.act, x, gate_last=self.gate_last)
        if hidden is None:
            first, second = self.fc1(x).chunk(2, dim=-1)
            hidden = first * self.act(second) if self.gate_last else self.act(first) * second
        return self.drop2(self.fc2(self.norm(self.drop1(hidden))))


SwiGLUPacked = partial(GluMlp, act_layer=nn.SiLU, gate_last=False)
"""DINOv2's feed-forward network: `silu(first half) * second half`."""


class SwiGLU(nn.Module):
    """A gated feed-forward network with separate linear layers: `fc2(act(fc1_g(x)) * fc1_x(x))`.

    Args:
        in_features: width D of the input.
        hidden_features: width of each hidden layer, by default D.
        out_features: width of the output, by default D.
        act_layer: constructor of the gate's activation.
        norm_layer: constructor of a norm before fc2, or None.
        bias: of fc1_g and fc1_x, and of fc2, or a pair.
        drop: dropout rate after the gate and after fc2, or a pair.
        align_to: round hidden_features up to a multiple of this; 0 leaves it.
        device: of the parameters.
        dtype: of the parameters.

    Source: timm's `SwiGLU` (AIM).
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Layer = nn.SiLU,
        norm_layer: Layer | None = None,
        bias: bool | tuple[bool, bool] = True,
        drop: float | tuple[float, float] = 0.0,
        align_to: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        out_features = out_features or in_features
        hidden_features = hidden_features or in_features
        if align_to:
            hidden_features += -hidden_features % align_to
        bias1, bias2 = _pair(bias)
        drop1, drop2 = _pair(drop)
        self.fc1_g = nn.Linear(in_features, hidden_features, bias=bias1, device=device, dtype=dtype)
        self.fc1_x = nn.Linear(in_features, hidden_features, bias=bias1, device=device, dtype=dtype)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop1)
        self.norm = norm_layer(hidden_features, device=device, dtype=dtype) if norm_layer else nn.Identity()
        self.fc2 = nn.Linear(hidden_features, out_features, bias=bias2, device=device, dtype=dtype)
        self.drop2 = nn.Dropout(drop2)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Start the gate near zero, with bias 1."""
        if self.fc1_g.bias is not None:
            self.fc1_g.bias.fill_(1.0)
        self.fc1_g.weight.normal_(std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in_features) to (..., out_features)."""
        x = self.act(self.fc1_g(x)) * self.fc1_x(x)
        return self.drop2(self.fc2(self.norm(self.drop1(x))))


class GEGLU(nn.Module):
    """A linear layer gated by GELU: of the halves (a, b) of `proj(x)`, `a * gelu(b)`.

    Args:
        dim_in: width of the input.
        dim_out: width of the output; `proj` has twice as many.
        bias: of the linear layer.
        device: of the parameters.
        dtype: of the parameters.

    Source: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202; diffusers' `GEGLU`: parameter `proj`.
    """

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out * 2, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., dim_in) to (..., dim_out)."""
        fused = linear_then(self.proj, _GELU, x, gate_last=True)
        if fused is not None:
            return fused
        hidden, gate = self.proj(x).chunk(2, dim=-1)
        return hidden * F.gelu(gate)


_GELU = nn.GELU()

MLPS: dict[str, Layer] = {"mlp": Mlp, "swiglu": SwiGLU, "swiglu_packed": SwiGLUPacked}


def get_mlp_layer(mlp_layer: str | Layer | None) -> Layer:
    """Return the constructor of a feed-forward network: `mlp_layer` itself, or the one of that name; None is `Mlp`.

    Raises:
        ValueError: the name is unknown.
        TypeError: neither a name nor callable.
    """
    if mlp_layer is None:
        return Mlp
    if isinstance(mlp_layer, str):
        if mlp_layer.lower() not in MLPS:
            raise ValueError(f"mlp_layer: expected one of {', '.join(MLPS)} or a class, got {mlp_layer!r}")
        return MLPS[mlp_layer.lower()]
    if isinstance(mlp_layer, nn.Module) or not callable(mlp_layer):
        raise TypeError(f"mlp_layer: expected a name or a module class, got {mlp_layer!r}")
    return mlp_layer
