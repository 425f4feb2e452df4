"""Accelerated classes of timm, from release 1.0.3 to 1.0.31."""

from __future__ import annotations

from typing import Any

import timm.layers
import torch
import torch.nn.functional as F
from timm.models import vision_transformer
from torch import Tensor, nn

from .. import backends
from ..nn.activation import GATES
from ..ops import layer_norm
from ._attention import FusedAttention, attend, attend_packed, split_heads, takes_mask
from ._mlp import FusedMlp, activated, activation_name, fused_linear
from ._norm import DROP_PATHS, NORMS, SCALES, FusedBlock, add_norm, refuses_norm
from ._swap import Accelerated, Unknown, fits, known, plain_tensor, skipped_identity
from ._timm_embed import PatchEmbedForm, VisionTransformerForm

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
        if backends.torch_serves(x):
            return super().forward(x, attn_mask, is_causal)
        return self._finish(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal), x)


class _MaskedBlock(_Block):
    outlines = _outlines("$1,attn_mask=attn_mask")

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """(B, N, C) -> (B, N, C), as of timm 1.0.19."""
        if backends.torch_serves(x):
            return super().forward(x, attn_mask)
        return self._finish(self.attn(self.norm1(x), attn_mask=attn_mask), x)


class _PlainBlock(_Block):
    outlines = _outlines("$1")

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C), as of timm 1.0.3."""
        if backends.torch_serves(x):
            return super().forward(x)
        return self._finish(self.attn(self.norm1(x)), x)


BLOCKS = (_CausalBlock, _MaskedBlock, _PlainBlock)


class _Attention(FusedAttention):
    """Of any release: they differ in what they take, and in what follows attention."""

    variants = tuple(
        {"members": {"fused_attn": True, **gate}, "training": training}
        for gate in ({"gate": None}, {})
        for training in (True, False)
    )
    fused_attn: bool
    attn_drop: nn.Dropout
    num_heads: int
    qkv: Any
    q_norm: Any
    k_norm: Any
    proj: Any
    proj_drop: Any

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        """Why this attention is left alone, or None."""
        return super().refuses(module) if module.fused_attn else "has fused_attn off: its probabilities are wanted"

    def _attend(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor | None:
        """All of the forward, or None where timm's has to run."""
        dropout = self.training and self.attn_drop.p > 0.0
        if backends.torch_serves(x) or not self.fused_attn or dropout or not plain_tensor(x) or x.dim() != 3:
            return None
        if not takes_mask(attn_mask, x.dtype) or (is_causal and attn_mask is not None):
            return None
        gate = getattr(self, "gate", None)
        factor = None if gate is None else gate(x).sigmoid()
        qkv = self.qkv(x)
        if skipped_identity(self.q_norm) and skipped_identity(self.k_norm):
            y = attend_packed(qkv, self.num_heads, attn_mask, is_causal=is_causal)
        else:
            q, k, v = (split_heads(part, self.num_heads) for part in qkv.chunk(3, dim=-1))
            y = attend(self.q_norm(q), self.k_norm(k), v, attn_mask, is_causal=is_causal)
        norm = getattr(self, "norm", None)
        if norm is not None:
            y = norm(y)
        if factor is not None:
            y = y * factor
        return self.proj_drop(self.proj(y))


def _attention_outlines(arguments: str, after: str = "norm", gated: bool = False) -> frozenset[str]:
    """Without and with a gate, each in training and evaluation."""

    def steps(gate: bool, rate: str) -> str:
        texts = ["gate(x)", "$1.sigmoid()"] if gate else []
        n = len(texts)
        texts += [
            "qkv(x)",
            f"${n + 1}.reshape(2,5,3,num_heads,head_dim)",
            f"${n + 2}.permute(2,0,3,1,4)",
            f"${n + 3}.unbind(0)",
            f"q_norm(${n + 4}[0])",
            f"k_norm(${n + 4}[1])",
            f"scaled_dot_product_attention(${n + 5},${n + 6},${n + 4}[2],{arguments.format(rate)})",
            f"${n + 7}.transpose(1,2)",
            f"${n + 8}.reshape(2,5,{'attn_dim' if gated else '7'})",
        ]
        if after:
            texts.append(f"norm(${len(texts)})")
        if gate:
            texts.append(f"${len(texts)}*$2")
        texts += [f"proj(${len(texts)})", f"proj_drop(${len(texts) + 1})"]
        return " ".join([*texts, f"-> ${len(texts)}"])

    rates = ("attn_drop.p", "0.0")
    return frozenset({" | ".join(steps(gate, rate) for gate in (False, gated) for rate in rates)})


class _CausalAttention(_Attention):
    outlines = _attention_outlines("attn_mask=attn_mask,dropout_p={},is_causal=is_causal", gated=True)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, C) -> (B, N, C), as of timm 1.0.31."""
        y = self._attend(x, attn_mask, is_causal)
        return super().forward(x, attn_mask, is_causal) if y is None else y


class _MaskedAttention(_Attention):
    outlines = _attention_outlines("attn_mask=attn_mask,dropout_p={}")

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """(B, N, C) -> (B, N, C), as of timm 1.0.19."""
        y = self._attend(x, attn_mask)
        return super().forward(x, attn_mask) if y is None else y


class _PlainAttention(_Attention):
    outlines = _attention_outlines("dropout_p={}", after="")

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C), as of timm 1.0.3."""
        y = self._attend(x)
        return super().forward(x) if y is None else y


ATTENTIONS = (_CausalAttention, _MaskedAttention, _PlainAttention)


class _Mlp(FusedMlp):
    outlines = frozenset({"fc1(x) act($1) drop1($2) norm($3) fc2($4) drop2($5) -> $6"})
    bypassed = ("fc1", "act")
    fc1: Any
    act: Any
    drop1: Any
    norm: Any
    fc2: Any
    drop2: Any

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        if backends.torch_serves(x):
            return super().forward(x)
        return self._finish(activated(self.fc1, self.act, x))

    def _finish(self, x: Any) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(x))))


class _GluMlp(_Mlp):
    """Where the halves are those of the op: SwiGLUPacked, and GELU with the gate last."""

    variants = tuple({"members": {"gate_last": last}} for last in (True, False))
    outlines = frozenset(
        {
            "fc1(x) $1.chunk(2,dim=chunk_dim) act($2[1]) $2[0]*$3 drop1($4) norm($5) fc2($6) drop2($7) -> $8 | "
            "fc1(x) $1.chunk(2,dim=chunk_dim) act($2[0]) $2[1]*$3 drop1($4) norm($5) fc2($6) drop2($7) -> $8"
        }
    )
    gate_last: bool

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        """Why this MLP cannot be fused, or None."""
        reason = super().refuses(module)
        if reason is None and (activation_name(module.act), module.gate_last) not in GATES:
            half = "last" if module.gate_last else "first"
            reason = f"has a {type(module.act).__name__} gate in the {half} half"
        return reason

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        y = fused_linear(self.fc1, self.act, x, gate_last=self.gate_last)
        return super(_Mlp, self).forward(x) if y is None else self._finish(y)


class _SwiGLU(_Mlp):
    """The gate alone is fused: the two linear layers have weights of their own."""

    outlines = frozenset({"fc1_g(x) fc1_x(x) act($1) $2*$3 drop1($4) norm($5) fc2($6) drop2($7) -> $8"})
    bypassed = ("fc1_g", "act")
    fc1_g: Any
    fc1_x: Any

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        if backends.torch_serves(x):
            return super(_Mlp, self).forward(x)
        return self._finish(activated(self.fc1_g, self.act, x) * self.fc1_x(x))


_BlockForm: Any = known(vision_transformer.Block, *BLOCKS)
_AttentionForm: Any = known(vision_transformer.Attention, *ATTENTIONS)
_MlpForm: Any = known(timm.layers.Mlp, _Mlp)
_GluForm: Any = known(timm.layers.GluMlp, _GluMlp)
_SwiGLUForm: Any = known(timm.layers.SwiGLU, _SwiGLU)
_PatchForm: Any = known(timm.layers.PatchEmbed, PatchEmbedForm)
_ViTForm: Any = known(vision_transformer.VisionTransformer, VisionTransformerForm)


class Block(_BlockForm, vision_transformer.Block):
    """In place of `timm.models.vision_transformer.Block`."""

    mmfast_original = vision_transformer.Block


class Attention(_AttentionForm, vision_transformer.Attention):
    """In place of `timm.layers.Attention`."""

    mmfast_original = vision_transformer.Attention


class Mlp(_MlpForm, timm.layers.Mlp):
    """In place of `timm.layers.Mlp`."""

    mmfast_original = timm.layers.Mlp


class GluMlp(_GluForm, timm.layers.GluMlp):
    """In place of `timm.layers.GluMlp`."""

    mmfast_original = timm.layers.GluMlp


class SwiGLU(_SwiGLUForm, timm.layers.SwiGLU):
    """In place of `timm.layers.SwiGLU`."""

    mmfast_original = timm.layers.SwiGLU


class PatchEmbed(_PatchForm, timm.layers.PatchEmbed):
    """In place of `timm.layers.PatchEmbed`."""

    mmfast_original = timm.layers.PatchEmbed


class VisionTransformer(_ViTForm, vision_transformer.VisionTransformer):
    """In place of `timm.models.vision_transformer.VisionTransformer`."""

    mmfast_original = vision_transformer.VisionTransformer
    patches = () if issubclass(_PatchForm, Unknown) else (timm.layers.PatchEmbed, PatchEmbed)


NORMS.update({timm.layers.LayerNorm: "_fast_norm", LayerNorm: "_fast_norm"})
SCALES[timm.layers.LayerScale] = "gamma"
DROP_PATHS.add(timm.layers.DropPath)
CLASSES = (LayerNorm, Block, Attention, Mlp, GluMlp, SwiGLU, PatchEmbed, VisionTransformer)
