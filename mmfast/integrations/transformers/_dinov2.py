"""The layer of DINOv2 with and without registers, from transformers 4.50 to 5.23: it has had three forms since."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ... import backends
from .._norm import FusedBlock, add_norm

_REST = "layer_scale1({}) drop_path($3) $4+hidden_states norm2($5) mlp($6) layer_scale2($7) drop_path($8) $5+$9"


class Layer(FusedBlock):
    """After 5.17: attention takes a mask and returns its output and weights."""

    outlines = frozenset(
        {
            "norm1(hidden_states) attention($1,attention_mask=attention_mask,others=**kwargs)"
            f" {_REST.format('$2[0]')} -> $10"
        }
    )
    bypassed = ("norm2", "layer_scale1", "drop_path")
    norm1: Any
    attention: Any

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        if backends.torch_serves(hidden_states):
            return super().forward(hidden_states, attention_mask, **kwargs)
        x, _ = self.attention(self.norm1(hidden_states), attention_mask=attention_mask, **kwargs)
        return _finish(self, x, hidden_states)


class Layer4(FusedBlock):
    """From 4.56: attention returns its output."""

    outlines = frozenset(
        f"norm1(hidden_states) attention({inputs}) {_REST.format('$2')} -> $10"
        for inputs in ("$1", "$1,head_mask", "$1,others=**kwargs")
    )
    bypassed = ("norm2", "layer_scale1", "drop_path")
    norm1: Any
    attention: Any

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, N, C) -> (B, N, C); the other arguments are attention's."""
        if backends.torch_serves(hidden_states):
            return super().forward(hidden_states, *args, **kwargs)
        return _finish(self, self.attention(self.norm1(hidden_states), *args, **kwargs), hidden_states)


class Layer4Tuple(FusedBlock):
    """To 4.55: a tuple of the output and, if asked for, the attention weights."""

    outlines = frozenset(
        {
            "norm1(hidden_states) attention($1,head_mask,output_attentions=output_attentions)"
            f" {_REST.format('$2[0]')} $10,*$2[1:] -> $11"
        }
    )
    bypassed = ("norm2", "layer_scale1", "drop_path")
    norm1: Any
    attention: Any

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """(B, N, C) -> ((B, N, C), attention weights, if asked for); the other arguments are attention's."""
        if backends.torch_serves(hidden_states):
            return super().forward(hidden_states, *args, **kwargs)
        x, *weights = self.attention(self.norm1(hidden_states), *args, **kwargs)
        return (_finish(self, x, hidden_states), *weights)


def _finish(layer: Any, branch: Tensor, residual: Tensor) -> Tensor:
    """All that follows attention. One drop path serves both branches, and draws for the first one first."""
    y, x = add_norm(branch, residual, layer.norm2, layer.layer_scale1, layer.drop_path)
    return layer.drop_path(layer.layer_scale2(layer.mlp(y))) + x


FORMS = (Layer, Layer4, Layer4Tuple)
