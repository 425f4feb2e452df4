"""`ViT`: the Vision Transformer, with timm's arguments and parameter names, on mmfast's ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..nn import AttentionPoolLatent, AttentionPoolPrr, PatchDropout, PatchEmbed, get_act_layer
from ..nn.drop import check_rate
from ..nn.mlp import get_mlp_layer
from . import _vit_args as args
from ._from_timm import timm_arguments, timm_normalisation
from ._pos_embed import check_rule, resample_pos_embed
from ._vit_block import Block, run_fused, stream_fusable
from ._vit_embed import embed_in_one
from ._vit_features import ViTFeatures
from ._vit_init import MODES, init_vit

Layer = Callable[..., nn.Module]
Size = int | tuple[int, int]


class ViT(ViTFeatures):
    """Vision Transformer. Arguments, defaults, parameter names and initialisation are timm's `VisionTransformer`'s.

    Patches, class and register tokens and positions are one `mmfast.ops.patch_embed`; every residual add, LayerScale,
    drop path and the LayerNorm after it, across blocks and with the final norm, is one `mmfast.ops.add_layer_norm`.
    Modules that carry hooks or are replaced are called as they are.

    Args:
        img_size: (height, width) of the images, or one number for both.
        patch_size: (height, width) of a patch, or one number for both.
        in_chans: channels of the images.
        num_classes: outputs of the head; 0 for none.
        global_pool: "token" (class token), "avg", "max", "avgmax", "map" (attention pool), "prr" or "" (no pooling).
        embed_dim: width D.
        depth: number of blocks.
        num_heads: heads of the attention.
        mlp_ratio: hidden width of the MLP, in D.
        qkv_bias: bias of the q, k, v projection.
        qk_norm: normalise q and k of each head.
        scale_attn_norm: norm before the attention's output projection.
        scale_mlp_norm: norm before the MLP's second linear layer.
        proj_bias: bias of the attention's output projection and of the MLP.
        init_values: start value of LayerScale; None for none.
        class_token: put a learned token first.
        pos_embed: "learn", or "none" or "" for none.
        no_embed_class: no position for class and register tokens.
        reg_tokens: number of register tokens, after the class token.
        pre_norm: norm before the blocks, and no bias in the patch embedding (CLIP).
        final_norm: norm after the blocks, or after pooling.
        fc_norm: put the final norm after pooling; by default for "avg", "max" and "avgmax".
        pool_include_prefix: pool over class and register tokens too.
        dynamic_img_size: accept any image size, with resampled positions.
        dynamic_img_pad: pad images to a multiple of patch_size.
        drop_rate: dropout rate before the head.
        pos_drop_rate: dropout rate after the position embedding.
        patch_drop_rate: part of the patches dropped in training.
        proj_drop_rate: dropout rate of attention and MLP.
        attn_drop_rate: dropout rate of the attention probabilities.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.
        weight_init: "", "jax", "jax_nlhb", "moco", "reset" or "skip".
        fix_init: scale each block's output layers by its depth (BEiT).
        embed_layer: constructor of the patch embedding.
        embed_norm_layer: norm of the patch embeddings: a name or constructor.
        norm_layer: "layernorm", "rmsnorm" or a constructor; by default LayerNorm with eps 1e-6.
        act_layer: name or constructor of the activation; by default GELU. "relu" gives ReLU(x W1 + b1) W2 + b2.
        block_fn: constructor of a block; blocks other than `Block` are called one by one.
        mlp_layer: "mlp", "swiglu", "swiglu_packed" or a constructor. The activation is act_layer for all of them.
        attn_layer: "attn" or a constructor with `mmfast.nn.Attention`'s arguments.
        device: of the parameters.
        dtype: of the parameters.
        head_act: "softmax" for class probabilities instead of logits.
        pos_embed_resample: how positions are resampled to another grid: "timm", "transformers" or "dinov2".
        pos_embed_antialias: overrides the rule's own.
        mean: in_chans numbers; with std, uint8 images are accepted and become `(images / 255 - mean) / std`. Floating
            images are taken as they are. Passed on to embed_layer where given.
        std: likewise.

    Raises:
        ValueError: an argument is out of its range, or two contradict each other; in forward, the image does not fit.
        TypeError: a constructor is not one; in forward, the image is neither floating point nor, with mean and std,
            uint8.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv:2010.11929; timm 1.0.31.
    """

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: Size = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        scale_attn_norm: bool = False,
        scale_mlp_norm: bool = False,
        proj_bias: bool = True,
        init_values: float | None = None,
        class_token: bool = True,
        pos_embed: str = "learn",
        no_embed_class: bool = False,
        reg_tokens: int = 0,
        pre_norm: bool = False,
        final_norm: bool = True,
        fc_norm: bool | None = None,
        pool_include_prefix: bool = False,
        dynamic_img_size: bool = False,
        dynamic_img_pad: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        patch_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_init: str = "",
        fix_init: bool = False,
        embed_layer: Layer = PatchEmbed,
        embed_norm_layer: str | Layer | None = None,
        norm_layer: str | Layer | None = None,
        act_layer: str | Layer | None = None,
        block_fn: Layer = Block,
        mlp_layer: str | Layer | None = None,
        attn_layer: str | Layer | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        head_act: str | None = None,
        pos_embed_resample: str = "timm",
        pos_embed_antialias: bool | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        args.check_pool(global_pool, class_token)
        args.check_choice("pos_embed", pos_embed, args.POS_EMBEDS)
        args.check_choice("weight_init", weight_init, MODES)
        args.check_choice("head_act", head_act, args.HEAD_ACTS)
        args.check_heads(embed_dim, num_heads, depth, attn_layer)
        check_rate("ViT", "drop_path_rate", drop_path_rate)
        check_rule("ViT", pos_embed_resample)
        norm_layer = args.get_norm_layer(norm_layer) or args.NORMS["layernorm"]
        embed_norm_layer = args.get_norm_layer(embed_norm_layer)
        act_layer = get_act_layer(act_layer)
        mlp_layer = get_mlp_layer(mlp_layer)
        attn_layer = args.get_attn_layer(attn_layer)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_reg_tokens = reg_tokens
        self.num_prefix_tokens = int(class_token) + reg_tokens
        self.has_class_token = class_token
        self.no_embed_class = no_embed_class
        self.pool_include_prefix = pool_include_prefix or global_pool == "prr"
        self.dynamic_img_size = dynamic_img_size
        self.pos_embed_resample = pos_embed_resample
        self.pos_embed_antialias = pos_embed_antialias
        self.grad_checkpointing = False
        self.weight_init_mode = "reset" if weight_init == "skip" else weight_init
        self.fix_init = fix_init

        embed_args: dict[str, Any] = {}
        if dynamic_img_size:  # the grid's shape is needed to resample the positions
            embed_args.update(strict_img_size=False, output_fmt="NHWC")
        if embed_norm_layer is not None:
            embed_args["norm_layer"] = embed_norm_layer
        if mean is not None or std is not None:
            embed_args.update(mean=mean, std=std)
        self.patch_embed: Any = embed_layer(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            bias=not pre_norm,
            dynamic_img_pad=dynamic_img_pad,
            **embed_args,
            **factory,
        )
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **factory)) if class_token else None
        self.reg_token = nn.Parameter(torch.empty(1, reg_tokens, embed_dim, **factory)) if reg_tokens else None
        self.pos_embed: nn.Parameter | None = None
        if pos_embed == "learn":
            positions = args.count_patches(self.patch_embed) + (0 if no_embed_class else self.num_prefix_tokens)
            self.pos_embed = nn.Parameter(torch.empty(1, positions, embed_dim, **factory))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.patch_drop = (
            PatchDropout(patch_drop_rate, num_prefix_tokens=self.num_prefix_tokens)
            if patch_drop_rate > 0.0
            else nn.Identity()
        )
        self.norm_pre = norm_layer(embed_dim, **factory) if pre_norm else nn.Identity()
        self.blocks: Any = nn.Sequential(
            *(
                block_fn(
                    dim=embed_dim,
                    num_heads=num_heads,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    qk_norm=qk_norm,
                    scale_attn_norm=scale_attn_norm,
                    scale_mlp_norm=scale_mlp_norm,
                    proj_bias=proj_bias,
                    proj_drop=proj_drop_rate,
                    attn_drop=attn_drop_rate,
                    init_values=init_values,
                    drop_path=rate,
                    act_layer=act_layer,
                    norm_layer=norm_layer,
                    mlp_layer=mlp_layer,
                    attn_layer=attn_layer,
                    depth=index,
                    **factory,
                )
                for index, rate in enumerate(torch.linspace(0, drop_path_rate, depth, device="cpu").tolist())
            )
        )
        feat_ratio = getattr(self.patch_embed, "feat_ratio", None)
        reduction = feat_ratio() if feat_ratio else patch_size
        self.feature_info = [
            {"module": f"blocks.{index}", "num_chs": embed_dim, "reduction": reduction} for index in range(depth)
        ]
        after_pool = global_pool in ("avg", "avgmax", "max") if fc_norm is None else fc_norm
        self.norm = norm_layer(embed_dim, **factory) if final_norm and not after_pool else nn.Identity()
        self.attn_pool: nn.Module | None = None
        if global_pool == "map":
            self.attn_pool = AttentionPoolLatent(embed_dim, num_heads, mlp_ratio, norm_layer, act_layer, **factory)
        elif global_pool == "prr":
            self.attn_pool = AttentionPoolPrr(embed_dim, num_heads, "token" if class_token else "avg")
        self.fc_norm = norm_layer(embed_dim, **factory) if final_norm and after_pool else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **factory) if num_classes > 0 else nn.Identity()
        self.head_act = nn.Softmax(dim=-1) if head_act == "softmax" else nn.Identity()
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Initialise all weights again; `mode` as `weight_init`, by default the constructor's."""
        args.check_choice("weight_init", mode, MODES)
        init_vit(self, "reset" if mode == "skip" else mode or self.weight_init_mode, needs_reset=needs_reset)

    @classmethod
    def from_timm(cls, model: nn.Module, *, uint8: bool = False, **overrides: Any) -> ViT:
        """Build a ViT with the configuration and the weights of a timm `VisionTransformer`.

        Args:
            model: the timm model.
            uint8: accept uint8 images too, normalised by the mean and std of the model's `pretrained_cfg`.
            **overrides: constructor arguments that replace the model's, e.g. `pos_embed_resample`.

        Raises:
            TypeError: the model is not a `VisionTransformer`, or has a part that ViT does not.
            ValueError: uint8 is asked for, and the model has no mean and std.
        """
        if uint8:
            overrides = {**timm_normalisation(model), **overrides}
        first = next(model.parameters())
        config = {"device": first.device, "dtype": first.dtype, **timm_arguments(model), "weight_init": "skip"}
        vit = cls(**{**config, **overrides})
        vit.load_state_dict(model.state_dict())
        return vit.train(model.training)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should leave alone."""
        return {"pos_embed", "cls_token", "reg_token", "dist_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group parameters by depth, for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|reg_token|pos_embed|patch_embed|norm_pre",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable
        if hasattr(self.patch_embed, "set_grad_checkpointing"):
            self.patch_embed.set_grad_checkpointing(enable)

    def get_classifier(self) -> nn.Module:
        """Return the head's linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a fresh one for `num_classes` (0 for none), and the pooling where given.

        Raises:
            ValueError: the pooling is unknown, needs a class token that is not there, or is an attention pool that
                the model was not built with.
        """
        if global_pool is not None:
            args.check_pool(global_pool, self.has_class_token)
            if global_pool in ("map", "prr") and (self.attn_pool is None or self.global_pool != global_pool):
                raise ValueError(
                    f"ViT: reset_classifier cannot add an attention pool, got global_pool={global_pool!r} "
                    f"for a model built with {self.global_pool!r}"
                )
            if global_pool not in ("map", "prr"):
                self.attn_pool = None
            self.global_pool = global_pool
        self.num_classes = num_classes
        first = next(self.parameters())
        self.head = (
            nn.Linear(self.embed_dim, num_classes, device=first.device, dtype=first.dtype)
            if num_classes > 0
            else nn.Identity()
        ).train(self.training)

    def set_input_size(self, img_size: Size | None = None, patch_size: Size | None = None) -> None:
        """Change the image size, the patch size or both; positions and patch kernel are resampled in place."""
        old = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size=img_size, patch_size=patch_size)
        if self.pos_embed is not None and self.patch_embed.grid_size != old:
            with torch.no_grad():
                resampled = self._resampled_pos_embed(self.pos_embed, self.patch_embed.grid_size, old)
            self.pos_embed = nn.Parameter(resampled, requires_grad=self.pos_embed.requires_grad)

    def _resampled_pos_embed(self, pos_embed: Tensor, new: tuple[int, int], old: tuple[int, int]) -> Tensor:
        prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        return resample_pos_embed(
            pos_embed, new, old, prefix, self.pos_embed_resample, antialias=self.pos_embed_antialias
        )

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Add positions to patch embeddings (B, N, D) or (B, H, W, D), and put the prefix tokens first."""
        pos_embed: Tensor | None = self.pos_embed
        if x.dim() == 4:
            if pos_embed is not None and self.dynamic_img_size:
                pos_embed = self._resampled_pos_embed(pos_embed, (x.shape[1], x.shape[2]), self.patch_embed.grid_size)
            x = x.flatten(1, 2)
        tokens = [t.expand(x.shape[0], -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        if pos_embed is not None and self.no_embed_class:
            x = x + pos_embed
        if tokens:
            x = torch.cat([*tokens, x], dim=1)
        if pos_embed is None:
            return x
        return self.pos_drop(x if self.no_embed_class else x + pos_embed)

    def _embed(self, x: Tensor) -> Tensor:
        own = type(self)._pos_embed is not ViT._pos_embed or "_pos_embed" in self.__dict__
        tokens = None if own else embed_in_one(self, x)
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x)) if tokens is None else tokens))

    def _run_blocks(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        norm: nn.Module | None = None,
        count: int | None = None,
        states: list[Tensor] | None = None,
    ) -> Tensor:
        """Run the first `count` blocks and `norm`; append the output of each block to `states`."""
        blocks = list(self.blocks)[:count]
        saving = self.grad_checkpointing and torch.is_grad_enabled()
        if blocks and not saving and stream_fusable(self.blocks):
            return run_fused(blocks, x, norm, attn_mask, is_causal, states)
        masks: dict[str, Any] = (
            {} if attn_mask is None and not is_causal else {"attn_mask": attn_mask, "is_causal": is_causal}
        )
        if count is None and states is None and not saving and not masks:
            x = self.blocks(x)  # as one module, for a hook on it
        else:
            for block in blocks:
                x = checkpoint(block, x, use_reentrant=False, **masks) if saving else block(x, **masks)
                if states is not None:
                    states.append(x)
        return x if norm is None else norm(x)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Map images (B, C, H, W) to normalised tokens (B, P + N, D). attn_mask, is_causal: as in `Attention`."""
        return self._run_blocks(self._embed(x), attn_mask, is_causal, norm=self.norm)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Pool tokens (B, P + N, D) to (B, D); `pool_type` overrides `global_pool`. "" returns the tokens."""
        pool_type = self.global_pool if pool_type is None else pool_type
        if self.attn_pool is None and pool_type == "":
            return x
        if self.attn_pool is None and pool_type == "token":
            return x[:, 0]
        patches = x if self.pool_include_prefix else x[:, self.num_prefix_tokens :]
        if self.attn_pool is not None:
            return self.attn_pool(patches)
        if pool_type == "avg":
            return patches.mean(dim=1)
        if pool_type == "max":
            return patches.amax(dim=1)
        if pool_type == "avgmax":
            return 0.5 * (patches.amax(dim=1) + patches.mean(dim=1))
        raise ValueError(f"ViT: pool_type must be '', 'token', 'avg', 'max' or 'avgmax', got {pool_type!r}")

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map tokens (B, P + N, D) to (B, num_classes), or to the head's input (B, D) with `pre_logits`."""
        x = self.head_drop(self.fc_norm(self.pool(x)))
        return x if pre_logits else self.head_act(self.head(x))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Map images (B, C, H, W) to logits (B, num_classes), or probabilities with head_act="softmax"."""
        return self.forward_head(self.forward_features(x, attn_mask=attn_mask, is_causal=is_causal))
