"""Accelerated classes of torch.nn."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends
from .. import nn as mmfast_nn
from ..ops import layer_norm
from ._swap import NORMS, Accelerated, fits, plain_tensor, refuses_norm


class LayerNorm(Accelerated, mmfast_nn.LayerNorm):
    """In place of `torch.nn.LayerNorm`."""

    mmfast_original = nn.LayerNorm
    mmfast_op = "layer_norm"

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        """Why this layer norm is left alone, or None."""
        return refuses_norm(module)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise input (..., C): `mmfast.ops.layer_norm`, or torch's where the op does not take the tensors."""
        if backends.torch_serves(input):
            return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
        if plain_tensor(input):
            weight, bias = self.weight, self.bias
            if fits(weight, input.dtype) and fits(bias, input.dtype):
                return layer_norm(input, weight, bias, self.eps)
        elif isinstance(input, torch.fx.Proxy):
            return _leaf(self, input)
        return nn.LayerNorm.forward(self, input)


def _leaf(module: nn.LayerNorm, x: torch.fx.Proxy) -> torch.fx.Proxy:
    """Record a call of the module, as torch.fx does for modules of torch.nn: graphs keep the names of their nodes."""
    tracer = x.tracer
    if not isinstance(tracer, torch.fx.Tracer) or tracer.root is module:
        return nn.LayerNorm.forward(module, x)  # type: ignore[arg-type,return-value]
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (x,), {})


NORMS[LayerNorm] = ""
CLASSES = (LayerNorm,)
