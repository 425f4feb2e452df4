"""Convert Vision Transformers: names, constructor arguments, whole models."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..nn.layer_norm import LayerNorm
from . import dinov2, open_clip, timm, torchvision, transformers, transformers_clip, vit_pytorch
from ._config import dtype_and_device, infer
from ._names import ConvertedState, checked, shorten

if TYPE_CHECKING:
    from ..models import ViT

# In the order in which `detect` asks; DINOv2's own names include timm's, so timm is last.
LAYOUTS: dict[str, ModuleType] = {
    module.NAME: module
    for module in (torchvision, open_clip, transformers, transformers_clip, vit_pytorch, dinov2, timm)
}
ALIASES = {"mmfast": "timm", "openai": "open_clip", "huggingface": "transformers", "hf": "transformers"}


def _layout(name: str, who: str) -> ModuleType:
    name = ALIASES.get(name, name)
    if name not in LAYOUTS:
        raise ValueError(f"{who}: layout must be one of {', '.join(LAYOUTS)}, got {name!r}")
    return LAYOUTS[name]


def detect(state_dict: Mapping[str, Tensor]) -> str:
    """Return the name of the layout of a ViT's state dict, from its keys.

    Raises:
        TypeError: not a mapping of names to tensors.
        ValueError: no layout has such keys.
    """
    keys = list(checked(state_dict, "detect"))
    for name, module in LAYOUTS.items():
        if module.detect(keys):
            return name
    raise ValueError(
        f"detect: no ViT layout ({', '.join(LAYOUTS)}) has these keys: {shorten(keys, 5)}; pass src= if you know it"
    )


def to_timm(
    state_dict: Mapping[str, Tensor], src: str = "auto", *, strict: bool = True, **options: Any
) -> ConvertedState:
    """Return the state dict with the canonical names, timm's, which are those of `mmfast.models.ViT`.

    Args:
        state_dict: of any dtype and on any device, meta included. Not changed.
        src: its layout: "timm", "torchvision", "transformers", "transformers_clip", "open_clip", "dinov2",
            "vit_pytorch" or "auto".
        strict: raise for a key that has no place; otherwise keep it aside.
        **options: of the layout: `fc_norm` (open_clip), `pool` and `patch_size` (vit_pytorch).

    Returns:
        A dict whose tensors are the given ones or views of them; only merged ones (split q, k, v) are new. Its `aside`
        holds the keys that the model has no place for and does not need (`reasons` says why), `added` names the zero
        biases that were filled in. `from_timm` needs them for the way back.

    Raises:
        TypeError: not a mapping of names to tensors, or an option that the layout has not.
        ValueError: a key is unknown or stands for something that a ViT cannot compute, a part is missing, or shapes
            contradict each other.
    """
    state = checked(state_dict, "to_timm")
    module = _layout(detect(state) if src == "auto" else src, "to_timm")
    if module is timm and isinstance(state_dict, ConvertedState):
        return ConvertedState.like(state_dict, state)  # already canonical: keeps what it remembers
    out: ConvertedState = _call("to_timm", module.to_timm, module, state, strict=strict, **options)
    timm.check(out, f"to_timm({module.NAME})")
    return out


def from_timm(state_dict: Mapping[str, Tensor], dst: str, **options: Any) -> dict[str, Tensor]:
    """Return a state dict with canonical names in the layout `dst`: the inverse of `to_timm`.

    Args:
        state_dict: with timm's names. What `to_timm(x)` returned gives x back, bit by bit, with the keys that were kept
            aside (but DINOv2's class position, where it was folded into the token).
        dst: as `src` of `to_timm`.
        **options: `prefix` of the backbone's keys ("vit.", "visual.") and `dialect` of the names, where the layout has
            more than one (torchvision: "new", "old"; transformers: "vit/disk", "vit/memory", "deit/...", "dinov2/...").

    Returns:
        A dict of the same tensors or of views of them. Parts of one tensor share memory: clone them to save with
        safetensors.

    Raises:
        TypeError: not a mapping of names to tensors, or an option that the layout has not.
        ValueError: a key has no name in `dst`, or a bias that `dst` lacks is not zero.
    """
    state = checked(state_dict, "from_timm")
    module = _layout(dst, "from_timm")
    timm.check(state, f"from_timm({module.NAME})")
    return _call("from_timm", module.from_timm, module, ConvertedState.like(state_dict, state), **options)


def _call(who: str, function: Any, module: ModuleType, *args: Any, **options: Any) -> Any:
    unknown = set(options) - set(function.__kwdefaults__ or {})
    if unknown:
        raise TypeError(f"{who}: {module.NAME} has no option {', '.join(sorted(unknown))}")
    return function(*args, **options)


def convert(
    state_dict: Mapping[str, Tensor], src: str = "auto", dst: str = "timm", *, strict: bool = True
) -> dict[str, Tensor]:
    """Return the state dict in another layout: `from_timm(to_timm(state_dict, src), dst)`.

    Raises:
        TypeError, ValueError: as `to_timm` and `from_timm`.
    """
    _layout(dst, "convert")
    state = to_timm(state_dict, src, strict=strict)
    return state if ALIASES.get(dst, dst) == "timm" else from_timm(state, dst)


def vit_config(
    model_or_state_dict: nn.Module | Mapping[str, Tensor],
    src: str = "auto",
    *,
    num_heads: int | None = None,
    config: Any = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Return the arguments with which `mmfast.models.ViT` has this model's parameters and computes what it computes.

    Shapes and keys give most. What a state dict does not tell comes from the model, from `config` (a transformers
    config), from an argument or from the layout: its LayerNorm eps (transformers ViT 1e-12, torchvision and DINOv2
    1e-6, CLIP 1e-5) and activation.

    Args:
        model_or_state_dict: a model of timm, torchvision, transformers, open_clip or vit-pytorch, or a state dict, also
            one that `to_timm` returned (with options of its own).
        src: layout of the state dict, or "auto".
        num_heads: heads of the attention, which no state dict tells.
        config: a transformers config of the model.
        **overrides: arguments of ViT that replace what was found, and those it cannot find: `act_layer` (of CLIP),
            `img_size` (not square), `no_embed_class`, `global_pool`; `eps` stands for norm_layer.

    Returns:
        Keyword arguments, valid for `mmfast.models.ViT`; timm's VisionTransformer takes the same but for `mlp_layer`,
        `attn_layer` and `embed_layer`, which it wants as classes of its own.

    Raises:
        TypeError: neither a known model nor a state dict.
        ValueError: something is missing and no argument gives it, or contradicts the shapes.
    """
    return _resolve(model_or_state_dict, src, num_heads, config, overrides)[1]


def _resolve(
    source: nn.Module | Mapping[str, Tensor], src: str, num_heads: int | None, config: Any, overrides: dict[str, Any]
) -> tuple[ConvertedState, dict[str, Any]]:
    """Return the canonical state dict and the arguments of its model."""
    if isinstance(source, nn.Module):
        state, facts = _read_model(source, src)
    else:
        state = to_timm(source, src)
        facts = dict(state.facts)
    if config is not None:
        facts |= transformers.facts_of_config(getattr(config, "vision_config", config))
    facts |= {key: value for key, value in overrides.items() if value is not None}
    if num_heads is not None:
        facts["num_heads"] = num_heads
    arguments: dict[str, Any] = facts.get("arguments") or infer(state, facts)
    if "eps" in overrides and "norm_layer" not in overrides:
        overrides = overrides | {"norm_layer": partial(LayerNorm, eps=overrides["eps"])}
    return state, arguments | {key: value for key, value in overrides.items() if key != "eps"}


def _read_model(model: nn.Module, src: str) -> tuple[ConvertedState, dict[str, Any]]:
    """Return a peer model's canonical state dict and what is known of it beside that."""
    model = open_clip.tower(model)
    if type(model).__name__ == "TimmModel" and isinstance(model.trunk, nn.Module):
        if list(model.head.parameters()):  # type: ignore[union-attr]
            raise ValueError(
                "vit_from: an open_clip TimmModel must have no head of its own; pass its trunk, or to_timm"
            )
        model = model.trunk
    if type(model).__module__.startswith("timm."):
        from ..models._from_timm import timm_arguments

        arguments = timm_arguments(model)
        return to_timm(model.state_dict(), "timm"), {"arguments": arguments}
    for module in (torchvision, transformers, transformers_clip, open_clip, vit_pytorch):
        found = module.describe(model)
        if found is None:
            continue
        options = vit_pytorch.read_options(model) if module is vit_pytorch else {}
        if module is open_clip:
            options["fc_norm"] = found.get("fc_norm", False)
        state: ConvertedState = module.to_timm(checked(model.state_dict(), "vit_config"), **options)
        timm.check(state, f"to_timm({module.NAME})")
        return state, state.facts | found
    raise TypeError(
        f"vit_config: {type(model).__module__}.{type(model).__name__} is not a ViT of timm, torchvision, transformers, "
        "open_clip or vit-pytorch that mmfast knows; pass its state dict with num_heads="
    )


def vit_from(
    model: nn.Module | Mapping[str, Tensor],
    src: str = "auto",
    *,
    num_heads: int | None = None,
    config: Any = None,
    **overrides: Any,
) -> ViT:
    """Build a `mmfast.models.ViT` that computes what a peer's model computes, with a copy of its weights.

    | peer | `vit(x)` is its |
    |---|---|
    | timm VisionTransformer | output |
    | torchvision VisionTransformer | output |
    | transformers ViTForImageClassification, DeiTForImageClassification | logits |
    | transformers ViTModel, DeiTModel, Dinov2Model, Dinov2WithRegistersModel | last_hidden_state[:, 0] |
    | transformers CLIPVisionModel, SiglipVisionModel | pooler_output |
    | transformers CLIPVisionModelWithProjection | image_embeds |
    | open_clip VisionTransformer, or the `visual` of a CLIP | output |
    | vit_pytorch ViT | output |

    `forward_features(x)` is all of last_hidden_state.
    The new model is on the peer's device, in its dtype and mode (train or eval). Dropout rates are carried over where
    the peer has its dropout in the same places (timm, torchvision, vit-pytorch), otherwise they are 0.

    Args:
        model: the peer's model, or a state dict with `num_heads`.
        src, num_heads, config, **overrides: as in `vit_config`.

    Raises:
        TypeError: the model's class is not known.
        ValueError: the model computes something that a ViT cannot; see `to_timm` and `vit_config`.
    """
    from ..models import ViT

    state, arguments = _resolve(model, src, num_heads, config, overrides)
    dtype, device = dtype_and_device(state)
    kwargs: dict[str, Any] = {"device": device, "dtype": dtype, **arguments, "weight_init": "skip"}
    vit = ViT(**kwargs)
    vit.load_state_dict(state, strict=True)
    pooler = sorted(key for key in state.aside if "pooler." in key)
    if pooler:
        warnings.warn(f"vit_from: a ViT has no pooler: {shorten(pooler)} left out", stacklevel=2)
    return vit.train(model.training) if isinstance(model, nn.Module) else vit.eval()
