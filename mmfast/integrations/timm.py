"""Accelerated classes of timm."""

from __future__ import annotations

from typing import Any

import timm.layers
import torch
import torch.nn.functional as F
from timm.models import vision_transformer
from torch import Tensor

from .. import backends
from ..ops import layer_norm
from ._swap import (
    DROP_PATHS,
    NORMS,
    SCALES,
    Accelerated,
    FusedBlock,
    add_norm,
    fits,
    fused,
    plain_tensor,
    refuses_norm,
)

torch.fx.wrap("layer_norm")  # torch.fx records the op as one node


class LayerNorm(Accelerated, timm.layers.LayerNorm):
    """In place of `timm.layers.LayerNorm`."""

    mmfast_original = timm.layers.LayerNorm
    mmfast_op = "layer_norm"
    weight: Any
    bias: Any
    eps: Any
    normalized_shape: Any
    _fast_norm: Any

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        """Why this layer norm is left alone, or None."""
        return refuses_norm(module)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., C): `mmfast.ops.layer_norm`, or timm's where the op does not take the tensors."""
        if self._fast_norm:
            return super().forward(x)
        weight, bias = self.weight, self.bias
        if backends.torch_serves(x):
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
        if isinstance(x, torch.fx.Proxy) or (plain_tensor(x) and fits(weight, x.dtype) and fits(bias, x.dtype)):
            return layer_norm(x, weight, bias, self.eps)
        return super().forward(x)


class _Block(FusedBlock):
    """Of any release: they differ in what attention takes."""

    bypassed = ("norm2", "ls1", "drop_path1")
    norm1: Any
    attn: Any
    norm2: Any
    ls1: Any
    drop_path1: Any
    mlp: Any
    ls2: Any
    drop_path2: Any

    def _finish(self, branch: Tensor, x: Tensor) -> Tensor:
        """All that follows attention."""
        y, x = add_norm(branch, x, self.norm2, self.ls1, self.drop_path1)
        return x + self.drop_path2(self.ls2(self.mlp(y)))


def _outlines(inputs: str) -> frozenset[str]:
    steps = "norm1(x) attn({}) ls1($2) drop_path1($3) $4+x norm2($5) mlp($6) ls2($7) drop_path2($8) $5+$9 -> $10"
    return frozenset({steps.format(inputs)})


class _CausalBlock(_Block):
    outlines = _outlines("$1,attn_mask=attn_mask,is_causal=is_causal")

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, C) -> (B, N, C), as of timm 1.0.31."""
        return self._finish(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal), x)


class _MaskedBlock(_Block):
    outlines = _outlines("$1,attn_mask=attn_mask")

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """(B, N, C) -> (B, N, C), as of timm 1.0.19."""
        return self._finish(self.attn(self.norm1(x), attn_mask=attn_mask), x)


class _PlainBlock(_Block):
    outlines = _outlines("$1")

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C), as of timm 1.0.3."""
        return self._finish(self.attn(self.norm1(x)), x)


FORMS = (_CausalBlock, _MaskedBlock, _PlainBlock)

_Form: Any = fused(vision_transformer.Block, *FORMS)


class Block(_Form, vision_transformer.Block):
    """In place of `timm.models.vision_transformer.Block`."""

    mmfast_original = vision_transformer.Block


NORMS.update({timm.layers.LayerNorm: "_fast_norm", LayerNorm: "_fast_norm"})
SCALES[timm.layers.LayerScale] = "gamma"
DROP_PATHS.add(timm.layers.DropPath)
CLASSES = (LayerNorm, Block)
