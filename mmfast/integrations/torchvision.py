"""Accelerated classes of torchvision. Its layer norms and attention are torch.nn's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.models import vision_transformer
from torchvision.ops import misc

from .. import backends
from ..nn.activation import any_global_hook
from ._mlp import FusedSequential
from ._norm import FusedBlock, add_norm
from ._outline import IMAGES
from ._patch import embed, refuses_conv
from ._swap import Accelerated, called, known, plain_tensor, steps


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
        if backends.torch_serves(input):
            return super().forward(input)
        torch._assert(input.dim() == 3, f"Expected (batch_size, seq_length, hidden_dim) got {input.shape}")
        x = self.ln_1(input)
        x, _ = self.self_attention(x, x, x, need_weights=False)
        y, x = add_norm(self.dropout(x), input, self.ln_2)
        return x + self.mlp(y)


_SIZES = {"image_size": 32, "patch_size": 16}


class _VisionTransformer(Accelerated):
    """Writes the class token and adds the position embedding where the patches are embedded."""

    mmfast_op = "patch_embed"
    variants = (
        {"shape": IMAGES, "members": _SIZES},
        {"method": "_process_input", "shape": IMAGES, "members": _SIZES},
    )
    outlines = frozenset(
        {
            "conv_proj(x) $1.reshape(2,hidden_dim,4) $2.permute(0,2,1) class_token.expand(2,-1,-1) cat([$4,$3],dim=1) "
            "encoder($5) heads($6[:,0]) -> $7 | "
            "conv_proj(x) $1.reshape(2,hidden_dim,4) $2.permute(0,2,1) -> $3"
        }
    )
    bypassed = ("conv_proj",)
    conv_proj: Any
    class_token: Any
    encoder: Any
    heads: Any
    image_size: int
    patch_size: int

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        """Why this model embeds its patches by itself, or None."""
        reason = refuses_conv(module.conv_proj)
        if reason is not None:
            return f"conv_proj {reason}"
        if module.conv_proj.kernel_size != (module.patch_size, module.patch_size):
            return f"conv_proj has patches of {module.conv_proj.kernel_size}"
        return None

    def _process_input(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, D)."""
        y = None if backends.torch_serves(x) or not self._takes(x) else embed(x, self.conv_proj)
        return super()._process_input(x) if y is None else y  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, classes)."""
        encoder, y = self.encoder, None
        if not backends.torch_serves(x) and self._takes(x) and _encoder_bypassed(encoder):
            y = embed(x, self.conv_proj, pos_embed=encoder.pos_embedding[0], prefix_tokens=self.class_token[0])
        if y is None:
            return super().forward(x)
        y = encoder.ln(encoder.layers(encoder.dropout(y)))
        return self.heads(y[:, 0])

    def _takes(self, x: Tensor) -> bool:
        if not plain_tensor(x) or x.dim() != 4 or _VisionTransformer.refuses(self) is not None:
            return False
        return x.shape[2] == x.shape[3] == self.image_size


_ENCODER_IS_KNOWN = (
    steps(vision_transformer.Encoder, ({},)) == "input+pos_embedding dropout($1) layers($2) ln($3) -> $4"
)


def _encoder_bypassed(encoder: Any) -> bool:
    """Whether the encoder need not be called itself, only its submodules."""
    return _ENCODER_IS_KNOWN and called(encoder, vision_transformer.Encoder) is None and not any_global_hook()


_BlockForm: Any = known(vision_transformer.EncoderBlock, _EncoderBlock)
_ViTForm: Any = known(vision_transformer.VisionTransformer, _VisionTransformer)


class EncoderBlock(_BlockForm, vision_transformer.EncoderBlock):
    """In place of `torchvision.models.vision_transformer.EncoderBlock`."""

    mmfast_original = vision_transformer.EncoderBlock


class MLPBlock(FusedSequential, vision_transformer.MLPBlock):
    """In place of `torchvision.models.vision_transformer.MLPBlock`, a sequence of linear layers and activations."""

    mmfast_original = vision_transformer.MLPBlock


class MLP(FusedSequential, misc.MLP):
    """In place of `torchvision.ops.MLP`, a sequence of linear layers and activations."""

    mmfast_original = misc.MLP


class VisionTransformer(_ViTForm, vision_transformer.VisionTransformer):
    """In place of `torchvision.models.vision_transformer.VisionTransformer`."""

    mmfast_original = vision_transformer.VisionTransformer


CLASSES = (EncoderBlock, MLPBlock, MLP, VisionTransformer)
