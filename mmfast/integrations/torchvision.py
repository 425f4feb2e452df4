"""Accelerated classes of torchvision. Its layer norms are torch.nn's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.models import vision_transformer

from ._swap import FusedBlock, add_norm, fused


class _EncoderBlock(FusedBlock):
    outlines = frozenset(
        {"ln_1(input) self_attention($1,$1,$1,need_weights=False) dropout($2[0]) $3+input ln_2($4) mlp($5) $4+$6 -> $7"}
    )
    bypassed = ("ln_2",)
    ln_1: Any
    self_attention: Any
    dropout: Any
    mlp: Any

    def forward(self, input: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        torch._assert(input.dim() == 3, f"Expected (batch_size, seq_length, hidden_dim) got {input.shape}")
        x = self.ln_1(input)
        x, _ = self.self_attention(x, x, x, need_weights=False)
        y, x = add_norm(self.dropout(x), input, self.ln_2)
        return x + self.mlp(y)


_Form: Any = fused(vision_transformer.EncoderBlock, _EncoderBlock)


class EncoderBlock(_Form, vision_transformer.EncoderBlock):
    """In place of `torchvision.models.vision_transformer.EncoderBlock`."""

    mmfast_original = vision_transformer.EncoderBlock


CLASSES = (EncoderBlock,)
