"""Accelerated classes of open_clip, from release 2.30 to 3.3. Its attention and MLPs are mostly torch.nn's.

Blocks of a text tower attend without its mask where that is known to be causal (`_causal`); with it everywhere else.
"""

from __future__ import annotations

from typing import Any

import torch
from open_clip import model, modified_resnet, transformer
from torch import Tensor, nn

from .. import backends
from ..nn.activation import KNOWN_ACTIVATIONS
from ..ops import layer_norm
from ._attention import FusedAttention, attend, attend_packed, split_heads, takes_mask
from ._causal import MaskOwner, known_causal
from ._norm import FLOAT32_NORMS, NORMS, SCALES, FusedBlock, add_norm, refuses_norm
from ._open_clip_pool import AttentionalPooler as _AttentionalPooler
from ._open_clip_pool import AttentionPool2d as _AttentionPool2d
from ._outline import IMAGES, outline
from ._patch import embed, refuses_conv
from ._swap import Accelerated, called, fits, known, multiplies, plain_tensor, skipped_identity
from .torch_nn import MultiheadAttention


class _LayerNorm(Accelerated):
    """The output has the dtype of the input, whatever autocast says."""

    mmfast_op = "layer_norm"
    outlines = frozenset({"layer_norm(x,normalized_shape,weight=weight,bias=bias,eps=eps) $1.to(x.dtype) -> $2"})
    weight: Any
    bias: Any
    eps: Any

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        """Why this layer norm is left alone, or None."""
        return refuses_norm(module)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., C): `mmfast.ops.layer_norm`, or open_clip's where the op does not take the tensors."""
        if not backends.torch_serves(x) and plain_tensor(x) and fits(self.weight, x.dtype) and fits(self.bias, x.dtype):
            return layer_norm(x, self.weight, self.bias, self.eps)
        return super().forward(x)


class _LayerNormFp32(_LayerNorm):
    outlines = frozenset(
        {"x.to(torch.float32) layer_norm($1,normalized_shape,weight=weight,bias=bias,eps=eps) $2.to(x.dtype) -> $3"}
    )

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., C) in float32: float64 is open_clip's."""
        return super(_LayerNorm, self).forward(x) if x.dtype == torch.float64 else super().forward(x)


class _ResidualAttentionBlock(FusedBlock):
    """Of self and of cross attention: without `ln_1_kv` the other inputs are dropped."""

    variants = ({"missing": ("ln_1_kv",)}, {})
    outlines = frozenset(
        {
            "ln_1(q_x) attention(q_x=$1,k_x=None,v_x=None,attn_mask=attn_mask) ls_1($2) $3+q_x ln_2($4) mlp($5) "
            "ls_2($6) $4+$7 -> $8 | "
            "ln_1_kv(k_x) ln_1_kv(v_x) ln_1(q_x) attention(q_x=$3,k_x=$1,v_x=$2,attn_mask=attn_mask) ls_1($4) "
            "$5+q_x ln_2($6) mlp($7) ls_2($8) $6+$9 -> $10"
        }
    )
    bypassed = ("ln_2", "ls_1")
    ln_1: Any
    ln_1_kv: Any
    attn: Any
    attention: Any
    ls_1: Any
    ln_2: Any
    mlp: Any
    ls_2: Any

    def forward(
        self,
        q_x: Tensor,
        k_x: Tensor | None = None,
        v_x: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """(B, N, C) or (N, B, C), as attention is batch first or not, to the same."""
        if backends.torch_serves(q_x):
            return super().forward(q_x, k_x, v_x, attn_mask)
        cross = hasattr(self, "ln_1_kv")
        k_x = self.ln_1_kv(k_x) if cross and k_x is not None else None
        v_x = self.ln_1_kv(v_x) if cross and v_x is not None else None
        y = self.ln_1(q_x)
        if k_x is None and v_x is None and self._is_causal(y, attn_mask):
            branch = self.attn(y, y, y, need_weights=False, attn_mask=attn_mask, is_causal=True)[0]
        else:
            branch = self.attention(q_x=y, k_x=k_x, v_x=v_x, attn_mask=attn_mask)
        y, x = add_norm(branch, q_x, self.ln_2, self.ls_1)
        return x + self.ls_2(self.mlp(y))

    def _is_causal(self, x: Tensor, attn_mask: Tensor | None) -> bool:
        """Whether `attention` is one that sees the tokens before: then the mask is not read, nor converted."""
        if attn_mask is None or not _PLAIN or not plain_tensor(x) or x.dim() != 3:
            return False
        if "attention" in self.__dict__ or called(self.attn, MultiheadAttention):
            return False
        return known_causal(attn_mask, x.shape[1 if self.attn.batch_first else 0])


class _CustomBlock(FusedBlock):
    outlines = frozenset(
        {
            "ln_1(x) attn($1,attn_mask=attn_mask) ln_attn($2) ls_1($3) $4+x ln_2($5) mlp($6) ls_2($7) $5+$8 -> $9",
        }
    )
    bypassed = ("ln_2", "ls_1")
    ln_1: Any
    attn: Any
    ln_attn: Any
    ls_1: Any
    ln_2: Any
    mlp: Any
    ls_2: Any

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        if backends.torch_serves(x):
            return super().forward(x, attn_mask)
        branch = self.ln_attn(self.attn(self.ln_1(x), attn_mask=attn_mask))
        y, x = add_norm(branch, x, self.ln_2, self.ls_1)
        return x + self.ls_2(self.mlp(y))


class _Attention(FusedAttention):
    """Of the custom blocks, from 2.33: batch first, with norms of queries, keys and output where they are asked for."""

    variants = tuple(
        {
            "inputs": {"attn_mask": None},
            "members": {"logit_scale": None, "use_fsdpa": True, **head_scale},
            "training": training,
        }
        for head_scale in ({"head_scale": None}, {})
        for training in (True, False)
    )
    _steps = (
        "linear(x,in_proj_weight,in_proj_bias) $1.chunk(3,dim=-1) $2[0].reshape(2,5,num_heads,-1) $3.transpose(1,2) "
        "$2[1].reshape(2,5,num_heads,-1) $5.transpose(1,2) $2[2].reshape(2,5,num_heads,-1) $7.transpose(1,2) "
        "ln_q($4) ln_k($6) scaled_dot_product_attention($9,$10,$8,attn_mask=None,dropout_p={}) "
    )
    _ends = (
        "$11.transpose(1,2) $12.reshape(2,5,7) ln_inner($13) out_proj($14) out_drop($15) -> $16",
        "$11*head_scale $12.transpose(1,2) $13.reshape(2,5,7) ln_inner($14) out_proj($15) out_drop($16) -> $17",
    )
    _texts = (
        _steps.format("attn_drop.p") + _ends[0],
        _steps.format("0.0") + _ends[0],
        _steps.format("attn_drop.p") + _ends[1],
        _steps.format("0.0") + _ends[1],
    )
    outlines = frozenset({" | ".join(_texts)})
    in_proj_weight: Any
    in_proj_bias: Any
    head_scale: Any
    logit_scale: Any
    attn_drop: nn.Dropout
    num_heads: int
    use_fsdpa: bool
    ln_q: Any
    ln_k: Any
    ln_inner: Any
    out_proj: Any
    out_drop: Any

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        """Why this attention is left alone, or None."""
        if module.logit_scale is not None:
            return "has scaled cosine attention"
        return super().refuses(module) if module.use_fsdpa else "does not use scaled_dot_product_attention"

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """(B, N, C) -> (B, N, C). A boolean mask goes to open_clip, where True is masked out."""
        if not self._takes(x, attn_mask):
            return super().forward(x, attn_mask)
        causal = known_causal(attn_mask, x.shape[1])
        if causal:
            attn_mask = None
        elif attn_mask is not None:
            if attn_mask.dim() == 3:
                attn_mask = attn_mask.unflatten(0, (x.shape[0], self.num_heads))
            attn_mask = attn_mask.to(x.dtype)
        qkv = torch.nn.functional.linear(x, self.in_proj_weight, self.in_proj_bias)
        if skipped_identity(self.ln_q) and skipped_identity(self.ln_k) and self.head_scale is None:
            y = attend_packed(qkv, self.num_heads, attn_mask, is_causal=causal)
        else:
            q, k, v = (split_heads(part, self.num_heads) for part in qkv.chunk(3, dim=-1))
            y = attend(self.ln_q(q), self.ln_k(k), v, attn_mask, is_causal=causal)
            if self.head_scale is not None:
                y = (split_heads(y, self.num_heads) * self.head_scale).transpose(1, 2).flatten(2)
        return self.out_drop(self.out_proj(self.ln_inner(y)))

    def _takes(self, x: Tensor, attn_mask: Tensor | None) -> bool:
        if backends.torch_serves(x) or self.refuses(self) is not None or (self.training and self.attn_drop.p > 0.0):
            return False
        if not plain_tensor(x) or x.dim() != 3 or not multiplies(x, self.in_proj_weight, self.in_proj_bias):
            return False
        return takes_mask(attn_mask, x.dtype) and (attn_mask is None or attn_mask.is_floating_point())


class _VisionTransformer(Accelerated):
    """Writes the class embedding and adds the positional one where the patches are embedded. From 2.32."""

    mmfast_op = "patch_embed"
    variants = ({"method": "_embeds", "shape": IMAGES},)
    outlines = frozenset(
        {
            "conv1(x) $1.reshape(2,5,-1) $2.permute(0,2,1) class_embedding.view(1,1,-1) $4.expand(2,-1,-1) "
            "$5.to($3.dtype) cat([$6,$3],dim=1) positional_embedding.to($7.dtype) $7+$8 patch_dropout($9) "
            "ln_pre($10) -> $11"
        }
    )
    bypassed = ("conv1",)
    conv1: Any
    class_embedding: Any
    positional_embedding: Any
    patch_dropout: Any
    ln_pre: Any

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        """Why this tower embeds its patches by itself, or None."""
        reason = refuses_conv(module.conv1)
        return None if reason is None else f"conv1 {reason}"

    def _embeds(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 1 + N, D), normalised."""
        if backends.torch_serves(x) or not plain_tensor(x):
            return super()._embeds(x)  # type: ignore[misc]
        device = x.device.type
        casts = torch.is_autocast_enabled(device) and x.dtype != torch.float64
        dtype = torch.get_autocast_dtype(device) if casts else x.dtype  # the convolution's
        y = embed(
            x,
            self.conv1,
            pos_embed=self.positional_embedding.to(dtype),
            prefix_tokens=self.class_embedding[None].to(dtype),
        )
        return super()._embeds(x) if y is None else self.ln_pre(self.patch_dropout(y))  # type: ignore[misc]


class _MaskOwner(MaskOwner):
    """A text tower. One that adds a mask of padding hands its blocks another mask each time."""

    @classmethod
    def matches(cls, module: Any) -> bool:
        """Whether its blocks get the mask that it has."""
        padded = getattr(module, "use_pad_mask", False) or getattr(module, "cls_emb", None) is not None
        return super().matches(module) and not padded


_PLAIN = outline(transformer.ResidualAttentionBlock, "attention", inputs={"k_x": None, "v_x": None}) == (
    "attn_mask.to(q_x.dtype) attn(q_x,q_x,q_x,need_weights=False,attn_mask=$1) -> $2[0]"
)
_NormForm: Any = known(transformer.LayerNorm, _LayerNorm)
_NormFp32Form: Any = known(transformer.LayerNormFp32, _LayerNormFp32)
_BlockForm: Any = known(transformer.ResidualAttentionBlock, _ResidualAttentionBlock)
_CustomForm: Any = known(transformer.CustomResidualAttentionBlock, _CustomBlock)
_AttentionForm: Any = known(transformer.Attention, _Attention)
_ViTForm: Any = known(transformer.VisionTransformer, _VisionTransformer)
_PoolerForm: Any = known(transformer.AttentionalPooler, _AttentionalPooler)
_Pool2dForm: Any = known(modified_resnet.AttentionPool2d, _AttentionPool2d)


class LayerNorm(_NormForm, transformer.LayerNorm):
    """In place of `open_clip.transformer.LayerNorm`."""

    mmfast_original = transformer.LayerNorm


class LayerNormFp32(_NormFp32Form, transformer.LayerNormFp32):
    """In place of `open_clip.transformer.LayerNormFp32`."""

    mmfast_original = transformer.LayerNormFp32


class ResidualAttentionBlock(_BlockForm, transformer.ResidualAttentionBlock):
    """In place of `open_clip.transformer.ResidualAttentionBlock`."""

    mmfast_original = transformer.ResidualAttentionBlock


class CustomResidualAttentionBlock(_CustomForm, transformer.CustomResidualAttentionBlock):
    """In place of `open_clip.transformer.CustomResidualAttentionBlock`."""

    mmfast_original = transformer.CustomResidualAttentionBlock


class Attention(_AttentionForm, transformer.Attention):
    """In place of `open_clip.transformer.Attention`."""

    mmfast_original = transformer.Attention


class VisionTransformer(_ViTForm, transformer.VisionTransformer):
    """In place of `open_clip.transformer.VisionTransformer`."""

    mmfast_original = transformer.VisionTransformer


class AttentionalPooler(_PoolerForm, transformer.AttentionalPooler):
    """In place of `open_clip.transformer.AttentionalPooler`."""

    mmfast_original = transformer.AttentionalPooler


class AttentionPool2d(_Pool2dForm, modified_resnet.AttentionPool2d):
    """In place of `open_clip.modified_resnet.AttentionPool2d`."""

    mmfast_original = modified_resnet.AttentionPool2d


class CLIP(_MaskOwner, model.CLIP):
    """In place of `open_clip.model.CLIP`, for its text tower."""

    mmfast_original = model.CLIP


class TextTransformer(_MaskOwner, transformer.TextTransformer):
    """In place of `open_clip.transformer.TextTransformer`."""

    mmfast_original = transformer.TextTransformer


class MultimodalTransformer(_MaskOwner, transformer.MultimodalTransformer):
    """In place of `open_clip.transformer.MultimodalTransformer`."""

    mmfast_original = transformer.MultimodalTransformer


NORMS.update(dict.fromkeys((transformer.LayerNorm, transformer.LayerNormFp32, LayerNorm, LayerNormFp32), ""))
FLOAT32_NORMS.update((transformer.LayerNormFp32, LayerNormFp32))
SCALES[transformer.LayerScale] = "gamma"
KNOWN_ACTIVATIONS[transformer.QuickGELU] = "quick_gelu"
CLASSES = (
    LayerNorm,
    LayerNormFp32,
    ResidualAttentionBlock,
    CustomResidualAttentionBlock,
    Attention,
    VisionTransformer,
    AttentionalPooler,
    AttentionPool2d,
    CLIP,
    TextTransformer,
    MultimodalTransformer,
)
