"""The transformer block of `ViT`, and the residual stream that runs its adds and norms as one op.

A pre-norm block is `x += branch1(norm1(x)); x += branch2(norm2(x))`. The stream carries (y, s): s is the sum so far
and y its normalisation. The output of a branch, its LayerScale and drop-path factors, the residual add and the
norm that comes next, also when that is the next block's, are one `mmfast.ops.add_layer_norm`.

Fused or not, the numbers are the same. What is not called in the fused stream (a block itself, its norms, LayerScale
and DropPath) must do nothing but its own forward; a hook, a subclass, a parametrization or a compiled module there
makes the model call its blocks one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.modules.module as torch_module
from torch import Tensor, nn

from .. import backends
from ..nn import Attention, DropPath, LayerNorm, LayerScale, Mlp
from ..ops import add_layer_norm
from ..ops.layer_norm import layer_norm_torch

Layer = Callable[..., nn.Module]
Scale = tuple[Tensor | None, Tensor | None] | None


class Block(nn.Module):
    """A pre-norm transformer block: attention and MLP, each in a residual branch.

    Args:
        dim: width D.
        num_heads: heads of the attention.
        mlp_ratio: hidden width of the MLP, in D.
        qkv_bias: bias of the q, k, v projection.
        qk_norm: normalise q and k.
        scale_attn_norm: norm before the attention's output projection.
        scale_mlp_norm: norm before the MLP's second linear layer.
        proj_bias: bias of the attention's output projection and of the MLP.
        proj_drop: dropout rate of both outputs and of the MLP's hidden layer.
        attn_drop: dropout rate of the attention probabilities.
        init_values: start value of LayerScale; None or 0 for none.
        drop_path: rate of stochastic depth.
        act_layer: constructor of the activation.
        norm_layer: constructor of the norms.
        mlp_layer: constructor of the MLP.
        attn_layer: constructor of the attention.
        depth: index of the block, passed on to an attn_layer that takes it.
        device: of the parameters.
        dtype: of the parameters.

    Source: timm's `Block`: parameters `norm1`, `attn`, `ls1`, `norm2`, `mlp`, `ls2`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_attn_norm: bool = False,
        scale_mlp_norm: bool = False,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        act_layer: Layer = nn.GELU,
        norm_layer: Layer = LayerNorm,
        mlp_layer: Layer = Mlp,
        attn_layer: Layer = Attention,
        depth: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        extra = {"depth": depth} if takes_argument(attn_layer, "depth") else {}
        self.norm1 = norm_layer(dim, device=device, dtype=dtype)
        self.attn = attn_layer(
            dim,
            num_heads=num_heads,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            scale_norm=scale_attn_norm,
            proj_bias=proj_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            norm_layer=norm_layer,
            device=device,
            dtype=dtype,
            **extra,
        )
        self.ls1 = LayerScale(dim, init_values, device=device, dtype=dtype) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim, device=device, dtype=dtype)
        self.mlp = mlp_layer(
            in_features=dim,
            hidden_features=int(dim * mlp_ratio),
            act_layer=act_layer,
            norm_layer=norm_layer if scale_mlp_norm else None,
            bias=proj_bias,
            drop=proj_drop,
            device=device,
            dtype=dtype,
        )
        self.ls2 = LayerScale(dim, init_values, device=device, dtype=dtype) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Map x (B, N, D) to (B, N, D). attn_mask, is_causal: as in `Attention`."""
        if self.fusable():
            return add(*self.stream(self.norm1(x), x, attn_mask, is_causal, backends.torch_serves(x)))
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def fusable(self) -> bool:
        """Whether norm2, LayerScale and DropPath may be computed without calling the modules."""
        m = self._modules
        return (
            is_plain_norm(m["norm2"])
            and is_plain(m["ls1"], LayerScale, nn.Identity)
            and is_plain(m["drop_path1"], DropPath, nn.Identity)
            and is_plain(m["ls2"], LayerScale, nn.Identity)
            and is_plain(m["drop_path2"], DropPath, nn.Identity)
            and not has_global_hooks()
        )

    def stream(
        self, y: Tensor, s: Tensor, attn_mask: Tensor | None, is_causal: bool, direct: bool
    ) -> tuple[Tensor, Tensor, Scale]:
        """Run both branches from y = norm1(s); return the second's output, the sum before it and its scale."""
        y = self.attn(y, attn_mask=attn_mask, is_causal=is_causal)
        y, s = add_norm(y, s, scale_of(self.ls1, self.drop_path1, y), self.norm2, direct)
        y = self.mlp(y)
        return y, s, scale_of(self.ls2, self.drop_path2, y)


def scale_of(layer_scale: nn.Module, drop_path: nn.Module, branch: Tensor) -> Scale:
    """Return what multiplies a branch, as `add_layer_norm` takes it: (gamma, factor of each sample), or None."""
    gamma = layer_scale.gamma if isinstance(layer_scale, LayerScale) else None
    factors = drop_path.factors(branch) if isinstance(drop_path, DropPath) else None
    return None if gamma is None and factors is None else (gamma, factors)


def add(branch: Tensor, residual: Tensor, scale: Scale) -> Tensor:
    """Return `residual + scale * branch`."""
    gamma, factors = scale or (None, None)
    if gamma is not None:
        branch = branch * gamma
    if factors is not None:
        branch = branch * factors
    return residual + branch


def add_norm(branch: Tensor, residual: Tensor, scale: Scale, norm: Any, direct: bool) -> tuple[Tensor, Tensor]:
    """Return (norm(s), s) of `s = residual + scale * branch`, as one op or, with `direct`, as torch's own.

    The op's checks cost a tiny model on a CPU a tenth of its time.
    """
    if direct:
        s = add(branch, residual, scale)
        return layer_norm_torch(s, norm.weight, norm.bias, norm.eps), s
    return add_layer_norm(branch, residual, norm.weight, norm.bias, norm.eps, scale=scale)


def run_fused(
    blocks: Sequence[Block],
    x: Tensor,
    norm: nn.Module | None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    states: list[Tensor] | None = None,
) -> Tensor:
    """Run `norm(blocks(x))` as one stream; append the output of each block to `states` where given."""
    direct = backends.torch_serves(x)
    y, s = blocks[0].norm1(x), x
    for index, block in enumerate(blocks):
        # One name for norms and branches: a tensor that has been used up is freed at once.
        y, s, scale = block.stream(y, s, attn_mask, is_causal, direct)
        after = blocks[index + 1].norm1 if index + 1 < len(blocks) else norm
        if is_plain_norm(after):
            y, s = add_norm(y, s, scale, after, direct)
        else:  # only the last norm may be another module, or none
            s = add(y, s, scale)
            y = s if after is None else after(s)
        if states is not None:
            states.append(s)
    return y


def stream_fusable(blocks: nn.Module) -> bool:
    """Whether `blocks` may run as one stream: see the head of this file."""
    if not is_plain(blocks, nn.Sequential) or not blocks._modules:
        return False
    members: list[Any] = list(blocks._modules.values())
    return all(is_plain(block, Block) and block.fusable() for block in members) and all(
        is_plain_norm(block._modules["norm1"]) for block in members[1:]
    )


def is_plain(module: Any, *kinds: type) -> bool:
    """Whether `module` is exactly one of `kinds` and calling it does no more than its class's forward."""
    return (
        type(module) in kinds
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and "forward" not in module.__dict__
        and module._compiled_call_impl is None
    )


def is_plain_norm(module: Any) -> bool:
    """Whether `module` is a LayerNorm over the last dimension whose call may be replaced by the op."""
    return is_plain(module, LayerNorm, nn.LayerNorm) and len(module.normalized_shape) == 1


def has_global_hooks() -> bool:
    """Whether a hook of every module is registered (`register_module_forward_hook`): profilers, counters."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def takes_argument(layer: Layer, name: str) -> bool:
    """Whether a constructor has a parameter of this name."""
    import inspect

    return name in inspect.signature(layer).parameters
