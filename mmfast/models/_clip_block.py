"""The transformer of CLIP's towers, with open_clip's parameter names, on the residual stream of `ViT`.

Every residual add and the LayerNorm after it are one `mmfast.ops.add_layer_norm`, across blocks and with the norm that
ends the tower. Where a tower reads one token only (the class token, the end of the text), the last block computes keys
and values of all tokens and everything else of that token: nothing reads the others, so output and gradients are those
of the whole block. Modules that carry hooks or are replaced are called as they are, on all tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import backends
from ..nn import LayerNorm, LayerScale
from ..nn.activation import QuickGELU, linear_then, plain_linear
from ..ops import attention, attention_qkv
from ..ops._attention import attention_torch
from ..ops.attention_qkv import attention_qkv_torch
from ._vit_block import Scale, add, add_norm, has_global_hooks, is_plain, is_plain_norm, run_fused

Layer = Callable[..., nn.Module]


class Attention(nn.Module):
    """Multi-head self-attention with the parameters of `torch.nn.MultiheadAttention`, batch first, without dropout.

    Args:
        width: width D of the tokens.
        heads: number of heads.
        device: of the parameters.
        dtype: of the parameters.

    Source: open_clip's `ResidualAttentionBlock.attn`: parameters `in_proj_weight` (rows q; k; v), `in_proj_bias`,
    `out_proj`; torch.nn's initialisation.
    """

    def __init__(
        self, width: int, heads: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.num_heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width, device=device, dtype=dtype))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width, device=device, dtype=dtype))
        self.out_proj = nn.Linear(width, width, device=device, dtype=dtype)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend among the tokens of x (B, N, D).

        attn_mask: broadcastable to (B, H, N, N); boolean (True attends) or added to the scores.
        """
        packed = attention_qkv_torch if backends.torch_serves(x) else attention_qkv
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        return self.out_proj(packed(qkv, self.num_heads, attn_mask, 0.0, is_causal))

    def attend_from(self, token: Tensor, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Attend from one token (B, D) of each sample to x (B, N, D); attn_mask as (B, 1, 1, N). Returns (B, D)."""
        batch, length, width = x.shape
        weight_q, weight_kv = self.in_proj_weight.split((width, 2 * width))
        bias_q, bias_kv = self.in_proj_bias.split((width, 2 * width))
        head_dim = width // self.num_heads
        q = F.linear(token, weight_q, bias_q).view(batch, self.num_heads, 1, head_dim)
        kv = F.linear(x, weight_kv, bias_kv).view(batch, length, 2, self.num_heads, head_dim)
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        attend = attention_torch if backends.torch_serves(x) else attention
        return self.out_proj(attend(q, k, v, attn_mask, 0.0, False, None, False).reshape(batch, width))

    def extra_repr(self) -> str:
        """Show the width and the heads."""
        return f"{self.in_proj_weight.shape[1]}, num_heads={self.num_heads}"


class Mlp(nn.Sequential):
    """`c_fc`, `gelu`, `c_proj`: the first two are one `mmfast.ops.linear_act` where they may."""

    c_fc: nn.Linear
    gelu: nn.Module
    c_proj: nn.Linear

    def __init__(self, width: int, hidden: int, act_layer: Layer, **factory: Any) -> None:
        super().__init__(
            OrderedDict(
                c_fc=nn.Linear(width, hidden, **factory), gelu=act_layer(), c_proj=nn.Linear(hidden, width, **factory)
            )
        )

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        hidden = linear_then(self.c_fc, self.gelu, input)
        return self.c_proj(self.gelu(self.c_fc(input)) if hidden is None else hidden)


class ResidualAttentionBlock(nn.Module):
    """A pre-norm block: attention and MLP, each in a residual branch.

    Args:
        width: width D.
        heads: heads of the attention.
        mlp_ratio: hidden width of the MLP, in D.
        ls_init_value: start value of LayerScale; None for none.
        act_layer: constructor of the activation.
        norm_layer: constructor of the norms.
        factory: device and dtype of the parameters.

    Source: open_clip's `ResidualAttentionBlock`: parameters `ln_1`, `attn`, `ls_1`, `ln_2`, `mlp`, `ls_2`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        ls_init_value: float | None,
        act_layer: Layer,
        norm_layer: Layer,
        factory: dict[str, Any],
    ) -> None:
        super().__init__()
        scaled = ls_init_value is not None
        self.ln_1 = norm_layer(width, **factory)
        self.attn = Attention(width, heads, **factory)
        self.ls_1 = LayerScale(width, ls_init_value or 0.0, **factory) if scaled else nn.Identity()
        self.ln_2 = norm_layer(width, **factory)
        self.mlp = Mlp(width, int(width * mlp_ratio), act_layer, **factory)
        self.ls_2 = LayerScale(width, ls_init_value or 0.0, **factory) if scaled else nn.Identity()

    @property
    def norm1(self) -> nn.Module:
        """`ln_1`, as the residual stream of `ViT` calls it."""
        return self.ln_1

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Map x (B, N, D) to (B, N, D). attn_mask, is_causal: as in `Attention`."""
        if self.fusable():
            return add(*self.stream(self.ln_1(x), x, attn_mask, is_causal, backends.torch_serves(x)))
        x = x + self.ls_1(self.attn(self.ln_1(x), attn_mask=attn_mask, is_causal=is_causal))
        return x + self.ls_2(self.mlp(self.ln_2(x)))

    def fusable(self) -> bool:
        """Whether ln_2 and LayerScale may be computed without calling the modules."""
        return (
            is_plain_norm(self.ln_2)
            and is_plain(self.ls_1, LayerScale, nn.Identity)
            and is_plain(self.ls_2, LayerScale, nn.Identity)
            and not has_global_hooks()
        )

    def prunable(self) -> bool:
        """Whether the block may compute one token only: nothing in it looks at what passes through."""
        mlp = self.mlp
        return (
            self.fusable()
            and is_plain(self, ResidualAttentionBlock)
            and is_plain(self.attn, Attention)
            and plain_linear(self.attn.out_proj)
            and is_plain(mlp, Mlp)
            and plain_linear(mlp.c_fc)
            and plain_linear(mlp.c_proj)
            and is_plain(mlp.gelu, nn.GELU, QuickGELU)
        )

    def stream(
        self, y: Tensor, s: Tensor, attn_mask: Tensor | None, is_causal: bool, direct: bool
    ) -> tuple[Tensor, Tensor, Scale]:
        """Run both branches from y = ln_1(s); return the second's output, the sum before it and its scale."""
        y = self.attn(y, attn_mask=attn_mask, is_causal=is_causal)
        y, s = add_norm(y, s, _scale(self.ls_1), self.ln_2, direct)
        return self.mlp(y), s, _scale(self.ls_2)

    def stream_one(
        self, y: Tensor, s: Tensor, index: int | Tensor, norm: nn.Module | None, attn_mask: Tensor | None
    ) -> Tensor:
        """From y = ln_1(s), (B, N, D), compute norm of the block's output at token `index` of each sample, (B, D)."""
        direct = backends.torch_serves(y)
        branch, s = self.attn.attend_from(take_token(y, index), y, attn_mask), take_token(s, index)
        branch, s = add_norm(branch, s, _scale(self.ls_1), self.ln_2, direct)
        branch = self.mlp(branch)
        if is_plain_norm(norm):
            return add_norm(branch, s, _scale(self.ls_2), norm, direct)[0]
        s = add(branch, s, _scale(self.ls_2))
        return s if norm is None else norm(s)


class Transformer(nn.Module):
    """A stack of blocks, `resblocks`, run as one residual stream.

    Args:
        width: width D.
        layers: number of blocks.
        heads: heads of the attention.
        mlp_ratio: hidden width of the MLP, in D.
        ls_init_value: start value of LayerScale; None for none.
        act_layer: constructor of the activation.
        norm_layer: constructor of the norms.
        factory: device and dtype of the parameters.

    Source: open_clip's `Transformer`.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        mlp_ratio: float = 4.0,
        ls_init_value: float | None = None,
        act_layer: Layer = nn.GELU,
        norm_layer: Layer = LayerNorm,
        factory: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.width = width
        self.layers = layers
        self.grad_checkpointing = False
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(width, heads, mlp_ratio, ls_init_value, act_layer, norm_layer, factory or {})
            for _ in range(layers)
        )

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        norm: nn.Module | None = None,
        count: int | None = None,
        states: list[Tensor] | None = None,
    ) -> Tensor:
        """Run the first `count` blocks and `norm` on x (B, N, D); append the output of each block to `states`."""
        blocks: list[Any] = list(self.resblocks)[:count]
        saving = self.grad_checkpointing and torch.is_grad_enabled()
        if blocks and not saving and self._fusable(blocks):
            return run_fused(blocks, x, norm, attn_mask, is_causal, states)
        for block in blocks:
            x = (
                checkpoint(block, x, attn_mask, is_causal, use_reentrant=False)
                if saving
                else block(x, attn_mask=attn_mask, is_causal=is_causal)
            )
            if states is not None:
                states.append(x)
        return x if norm is None else norm(x)

    def one_token(
        self,
        x: Tensor,
        index: int | Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        norm: nn.Module | None = None,
    ) -> Tensor:
        """Run the blocks and `norm` on x (B, N, D) and return the token `index` of each sample, (B, D).

        Args:
            x: (B, N, D).
            index: the token, or one of each sample, (B,).
            attn_mask: as in `Attention`, but one row for all queries: (B, 1, 1, N).
            is_causal: as in `Attention`.
            norm: applied to each token.
        """
        blocks: list[Any] = list(self.resblocks)
        # Asked of the type first: a wrapper (of checkpointing, of FSDP) passes the names of its block on.
        if not blocks or type(blocks[-1]) is not ResidualAttentionBlock or not blocks[-1].prunable():
            return take_token(self(x, attn_mask, is_causal, norm=norm), index)
        if not _called_alone(norm):
            return take_token(self(x, attn_mask, is_causal, norm=norm), index)
        last, blocks = blocks[-1], blocks[:-1]
        seen = keys_before(x, index, attn_mask) if is_causal else attn_mask
        if self.grad_checkpointing and torch.is_grad_enabled():
            for block in blocks:
                x = checkpoint(block, x, attn_mask, is_causal, use_reentrant=False)

            def finish(x: Tensor) -> Tensor:
                return last.stream_one(last.ln_1(x), x, index, norm, seen)

            return checkpoint(finish, x, use_reentrant=False)
        direct = backends.torch_serves(x)
        if not blocks or not self._fusable([*blocks, last]):
            for block in blocks:
                x = block(x, attn_mask=attn_mask, is_causal=is_causal)
            return last.stream_one(last.ln_1(x), x, index, norm, seen)
        y, s = blocks[0].ln_1(x), x
        for block, after in zip(blocks, [*blocks[1:], last], strict=True):
            y, s, scale = block.stream(y, s, attn_mask, is_causal, direct)
            y, s = add_norm(y, s, scale, after.ln_1, direct)
        return last.stream_one(y, s, index, norm, seen)

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of the matrices, which may be lower than that of norms and embeddings."""
        block: Any = self.resblocks[0]
        return block.mlp.c_fc.weight.dtype

    def _fusable(self, blocks: list[Any]) -> bool:
        return all(is_plain(block, ResidualAttentionBlock) and block.fusable() for block in blocks) and all(
            is_plain_norm(block.ln_1) for block in blocks[1:]
        )


def take_token(x: Tensor, index: int | Tensor) -> Tensor:
    """The token `index`, or index[b], of each sample of x (B, N, D): (B, D)."""
    if isinstance(index, int):
        return x[:, index]
    return x[torch.arange(x.shape[0], device=x.device), index]


def keys_before(x: Tensor, index: int | Tensor, attn_mask: Tensor | None) -> Tensor | None:
    """What the token `index` of x (B, N, D) sees under a causal mask and `attn_mask`: (B or 1, 1, 1, N), or None."""
    length = x.shape[1]
    if isinstance(index, int) and index in (-1, length - 1):
        return attn_mask
    positions = torch.arange(length, device=x.device)
    if isinstance(index, int):
        before = (positions <= index % length).view(1, 1, 1, length)
    else:
        before = (positions <= index[:, None]).view(-1, 1, 1, length)
    if attn_mask is None:
        return before
    return before & attn_mask if attn_mask.dtype == torch.bool else attn_mask.masked_fill(~before, float("-inf"))


def _scale(layer_scale: nn.Module) -> Scale:
    return (layer_scale.gamma, None) if isinstance(layer_scale, LayerScale) else None


def _called_alone(norm: nn.Module | None) -> bool:
    """Whether a norm may see one token instead of all: no hook records what it gets."""
    return norm is None or is_plain_norm(norm) or is_plain(norm, nn.Identity)


def act_layer(quick_gelu: bool, act_kwargs: dict[str, Any] | None) -> Layer:
    """The constructor of a tower's activation.

    Raises:
        ValueError: QuickGELU has no options.
    """
    if quick_gelu:
        if act_kwargs:
            raise ValueError(f"CLIP: act_kwargs belong to GELU, which quick_gelu=True replaces; got {act_kwargs!r}")
        return QuickGELU
    return lambda: nn.GELU(**(act_kwargs or {}))


def norm_layer(norm_kwargs: dict[str, Any] | None) -> Layer:
    """The constructor of a tower's LayerNorm."""
    return lambda width, **factory: LayerNorm(width, **{**(norm_kwargs or {}), **factory})
