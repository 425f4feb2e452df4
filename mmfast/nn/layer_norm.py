"""`LayerNorm`: torch.nn's, on `mmfast.ops.layer_norm`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..ops import layer_norm

torch.fx.wrap("layer_norm")  # torch.fx records the op as one node


class LayerNorm(torch.nn.LayerNorm):
    """Drop-in for `torch.nn.LayerNorm`: same arguments, initialisation, state_dict and repr.

    A `normalized_shape` of one dimension runs `mmfast.ops.layer_norm`; of several, `F.layer_norm`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise input (..., *normalized_shape) over its last dimensions."""
        shape = self.normalized_shape
        # On a CPU the op would call PyTorch's too, after a few microseconds of checks.
        if len(shape) != 1 or (backends.torch_serves(input) and input.shape[-1] == shape[0]):
            return F.layer_norm(input, shape, self.weight, self.bias, self.eps)
        return layer_norm(input, self.weight, self.bias, self.eps)
