"""What a CLIP shows of its inside: the outputs of chosen blocks of both towers, with open_clip's signature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from ._clip_resnet import ModifiedResNet
from ._clip_text import pool_text, text_blocks
from ._clip_vision import TrunkTower, VisionTransformer
from ._vit_args import check_choice, take_indices

if TYPE_CHECKING:
    from .clip import CLIP

Indices = int | Sequence[int] | None


class CLIPFeatures(nn.Module):
    """The methods of `CLIP` that return more than its output."""

    def forward_intermediates(
        self: Any,
        image: Tensor | None = None,
        text: Tensor | None = None,
        image_indices: Indices = None,
        text_indices: Indices = None,
        stop_early: bool = False,
        normalize: bool = True,
        normalize_intermediates: bool = False,
        intermediates_only: bool = False,
        image_output_fmt: str = "NCHW",
        image_output_extra_tokens: bool = False,
        text_output_fmt: str = "NLC",
        text_output_extra_tokens: bool = False,
        output_logits: bool = False,
        output_logit_scale_bias: bool = False,
    ) -> dict[str, Any]:
        """Run the towers and return the outputs of chosen blocks, whole, and the features.

        Args:
            image: (B, 3, H, W), or None.
            text: token ids (B, L), or None.
            image_indices: the last n blocks, those of these indices, or None for all. Of a ResNet the stages: its
                stem and four layers.
            text_indices: likewise.
            stop_early: leave out the blocks after the last that is wanted, also for the features.
            normalize: features of length 1.
            normalize_intermediates: apply the tower's last norm to every intermediate; a ResNet has none.
            intermediates_only: leave out features and logits.
            image_output_fmt: "NCHW" for (B, D, rows, columns), "NLC" for (B, N, D), which a ResNet has not.
            image_output_extra_tokens: also return the class token of each block.
            text_output_fmt: "NLC".
            text_output_extra_tokens: a text has none; accepted as in open_clip.
            output_logits: also return the logits; needs both inputs.
            output_logit_scale_bias: also return the scale and the bias.

        Returns:
            A dict with `image_intermediates`, `image_intermediates_prefix`, `image_features`, `text_intermediates`,
            `text_features`, `image_logits`, `text_logits`, `logit_scale` and `logit_bias`, as asked for.

        Raises:
            ValueError: an index or a format is invalid, or logits are asked for without both inputs.

        Source: open_clip `CLIP.forward_intermediates`.
        """
        model = cast("CLIP", self)
        check_choice("text_output_fmt", text_output_fmt, ("NLC",))
        output_logits = output_logits and not intermediates_only
        if output_logits and (image is None or text is None):
            raise ValueError("CLIP: output_logits needs image and text, got only one of them")
        out: dict[str, Any] = {}
        if image is not None:
            fmt, extra = image_output_fmt, image_output_extra_tokens
            options = (image_indices, stop_early, normalize_intermediates, intermediates_only, fmt, extra)
            out.update(_image(model.visual, image, *options))
        if text is not None:
            out.update(_text(model, text, text_indices, stop_early, normalize_intermediates, intermediates_only))
        if normalize:
            for name in ("image_features", "text_features"):
                if name in out:
                    out[name] = F.normalize(out[name], dim=-1)
        if output_logits:
            logits = model.logit_scale.exp() * out["image_features"] @ out["text_features"].T
            logits = logits if model.logit_bias is None else logits + model.logit_bias
            out["image_logits"], out["text_logits"] = logits, logits.T
        if output_logit_scale_bias:
            out["logit_scale"] = model.logit_scale.exp()
            if model.logit_bias is not None:
                out["logit_bias"] = model.logit_bias
        return out


def _image(tower: Any, x: Tensor, indices: Indices, stop: bool, norm: bool, only: bool, fmt: str, extra: bool) -> Any:
    if isinstance(tower, TrunkTower):
        return _trunk(tower, x, indices, stop, norm, only, fmt, extra)
    if isinstance(tower, ModifiedResNet):
        check_choice("image_output_fmt of a ResNet", fmt, ("NCHW",))
        return _resnet(tower, x, indices, stop, only)
    check_choice("image_output_fmt", fmt, ("NCHW", "NLC"))
    return _vit(tower, x, indices, stop, norm, only, fmt, extra)


def _vit(
    tower: VisionTransformer, x: Tensor, indices: Indices, stop: bool, norm: bool, only: bool, fmt: str, extra: bool
) -> dict[str, Any]:
    taken = take_indices(len(tower.transformer.resblocks), indices)
    states: list[Tensor] = []
    count = max(taken) + 1 if stop else None
    last = tower.transformer(tower._embed(x), count=count, states=states)
    found = [tower.ln_post(states[i]) if norm else states[i] for i in sorted(set(taken))]
    out: dict[str, Any] = {"image_intermediates": [s[:, 1:] for s in found]}
    if fmt == "NCHW":
        out["image_intermediates"] = [_as_map(s, tower.grid_size) for s in out["image_intermediates"]]
    if extra:
        out["image_intermediates_prefix"] = [s[:, :1] for s in found]
    if not only:
        out["image_features"] = tower.pool(last) @ tower.proj
    return out


def _as_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Turn (B, N, D) into (B, D, rows, columns)."""
    if tokens.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"CLIP: image_output_fmt='NCHW' needs all {grid[0]} * {grid[1]} patches, got {tokens.shape[1]} "
            "(patch dropout is active; use 'NLC')"
        )
    return tokens.transpose(1, 2).unflatten(2, grid).contiguous()


def _trunk(
    tower: TrunkTower, x: Tensor, indices: Indices, stop: bool, norm: bool, only: bool, fmt: str, extra: bool
) -> dict[str, Any]:
    options: dict[str, Any] = {"norm": norm, "stop_early": stop, "output_fmt": fmt, "output_dict": True}
    found = tower.trunk.forward_intermediates(
        x, indices, return_prefix_tokens=extra, intermediates_only=only, **options
    )
    if not only:
        found["image_features"] = tower.head(tower.trunk.forward_head(found["image_features"]))
    return found


def _resnet(tower: ModifiedResNet, x: Tensor, indices: Indices, stop: bool, only: bool) -> dict[str, Any]:
    taken = take_indices(5, indices)
    wanted, found = set(taken), []
    x = tower.prepare(x)
    stages: tuple[Any, ...] = (tower.stem, tower.layer1, tower.layer2, tower.layer3, tower.layer4)
    for index, stage in enumerate(stages):
        if only and stop and index > max(taken):
            break
        x = stage(x)
        if index in wanted:
            found.append(x)
    out: dict[str, Any] = {"image_intermediates": found}
    if not only:  # of the whole network: the pool takes nothing else
        out["image_features"] = tower.attnpool(x)
    return out


def _text(model: CLIP, text: Tensor, indices: Indices, stop: bool, norm: bool, only: bool) -> dict[str, Any]:
    tower: Any = model.text if model.custom_text else model
    taken = take_indices(model.text_cfg.layers, indices)
    states: list[Tensor] = []
    last = text_blocks(tower, model.text_cfg, text, max(taken) + 1 if stop else None, states)
    found = [tower.ln_final(states[i]) if norm else states[i] for i in sorted(set(taken))]
    out: dict[str, Any] = {"text_intermediates": found}
    if not only:
        out["text_features"] = pool_text(tower, model.text_cfg, text, last)
    return out
