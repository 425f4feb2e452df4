"""Constructor arguments of `mmfast.models.CLIP`, open_clip's fields, from a canonical state dict and a peer's model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from . import open_clip, transformers
from ._clip_names import CUSTOM, TRUNK, image_to_timm, split_text
from ._clip_open import check
from ._config import _ratio, infer
from ._names import ConvertedState
from .timm import check as check_image

Facts = dict[str, Any]

_PARTS = ("vision", "text")
_WORDS = 49408  # of CLIP's own vocabulary, in which the end of text is the largest id
_ACTS = {"gelu": None, "gelu_tanh": {"approximate": "tanh"}, "quick_gelu": None}


def infer_clip(state: Mapping[str, Tensor], facts: Mapping[str, Any], who: str = "clip_config") -> dict[str, Any]:
    """Return the arguments for which a CLIP has exactly the parameters in `state`.

    Read off the shapes and keys: embed_dim, both towers' width, depth, MLP width, LayerScale and projection, patch and
    image size, context length, vocabulary. From `facts`, per tower "vision" and "text": num_heads, eps, act_layer and
    what only a model's class knows (pooling, mask).

    Raises ValueError for what is missing or contradicts the shapes.
    """
    sizes = check(state, who)
    text, image = split_text(state)
    for name in ("token_embedding.weight", "positional_embedding", "logit_scale"):
        if name not in text:
            raise ValueError(f"{who}: {name} is missing, so this is not a whole CLIP")
    if not image or not sizes["layers"]:
        missing = "transformer.resblocks" if image else "visual"
        raise ValueError(f"{who}: {missing}.* is missing, so this is not a whole CLIP")
    seen, said = (dict(facts.get(part) or {}) for part in _PARTS)
    config: dict[str, Any] = {"embed_dim": sizes.get("E", sizes["W"])}
    if any(key.startswith(TRUNK) for key in image):
        seen["act_layer"], config["vision_cfg"] = None, _trunk(image, seen, who)
    elif "visual.layer1.0.conv1.weight" in image:
        seen["act_layer"], config["vision_cfg"] = None, _resnet(image, seen, who)
    else:
        config["vision_cfg"] = _vit(image, seen, config["embed_dim"], who)
    config["text_cfg"] = _text(text, sizes, said, who)
    quick = _activation(config, seen, said, who)
    if quick:
        config["quick_gelu"] = True
    return config | shape_of_scalars(state)


def shape_of_scalars(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the arguments that say whether there is a logit bias, both scalars' shape, and the text tower's prefix."""
    found: dict[str, Any] = {}
    if "logit_bias" in state:
        found["init_logit_bias"] = -10.0
    scale = state.get("logit_scale")
    if scale is not None and scale.dim():
        found["nonscalar_logit_scale"] = True
    if any(key.startswith(CUSTOM) for key in state):
        found["custom_text"] = True
    return found


def _activation(config: dict[str, Any], seen: Facts, said: Facts, who: str) -> bool:
    """Write act_kwargs of each tower; return whether the towers use QuickGELU."""
    acts = {part: facts.get("act_layer") for part, facts in zip(_PARTS, (seen, said), strict=True)}
    known = {part: act for part, act in acts.items() if act is not None}
    if "text" not in known:
        raise ValueError(
            f"{who}: the activation is not in this state dict: pass quick_gelu=True (OpenAI's weights and models "
            "called quickgelu) or quick_gelu=False, config= or the model itself"
        )
    for part, act in known.items():
        if act not in _ACTS:
            raise ValueError(f"{who}: activation of the {part} tower must be one of {', '.join(_ACTS)}, got {act!r}")
        if _ACTS[act]:
            config[f"{part}_cfg"]["act_kwargs"] = dict(_ACTS[act])  # type: ignore[arg-type]
    quick = {part: act == "quick_gelu" for part, act in known.items()}
    if len(set(quick.values())) > 1:
        raise ValueError(f"{who}: quick_gelu is one field for both towers, got {known}")
    return quick["text"]


def _norm(eps: float | None) -> dict[str, Any]:
    return {} if eps in (None, 1e-5) else {"norm_kwargs": {"eps": eps}}


def _heads(facts: Facts, width: int, part: str, who: str) -> int:
    """The number of heads, from `num_heads` or `head_width`."""
    heads, head_width = facts.get("num_heads"), facts.get("head_width")
    if heads is None and head_width is None:
        field = "vision_cfg={'head_width': ...}" if part == "vision" else "text_cfg={'heads': ...}"
        raise ValueError(
            f"{who}: the heads of the {part} tower are not in a state dict: pass {field}, config= or the model"
        )
    name, size = ("heads", int(heads or 0)) if head_width is None else ("head_width", int(head_width))
    if size < 1 or width % size:
        raise ValueError(f"{who}: {name} of the {part} tower must divide its width {width}, got {size}")
    return size if head_width is None else width // size


def _text(text: Mapping[str, Tensor], sizes: Mapping[str, int], facts: Facts, who: str) -> dict[str, Any]:
    config: dict[str, Any] = {
        "context_length": sizes["N"],
        "vocab_size": sizes["V"],
        "width": sizes["W"],
        "heads": _heads(facts, sizes["W"], "text", who),
        "layers": sizes["layers"],
    }
    if sizes["H"] != 4 * sizes["W"]:
        config["mlp_ratio"] = _ratio(sizes["H"], sizes["W"])
    if "transformer.resblocks.0.ls_1.gamma" in text:
        config["ls_init_value"] = 1e-5  # the constructor's; the weights replace it
    if "text_projection.weight" in text:
        config["proj_bias"] = True
    elif "text_projection" not in text:
        config["proj_type"] = "none"
    return config | _norm(facts.get("eps")) | dict(facts.get("more") or {})


def _vit(image: Mapping[str, Tensor], facts: Facts, embed_dim: int, who: str) -> dict[str, Any]:
    state = image_to_timm(image, who)
    sizes = check_image(state, who)
    width, length = sizes["D"], sizes["L"]
    if sizes.get("K", width) != embed_dim:
        raise ValueError(f"{who}: visual.proj must have {embed_dim} columns as the text tower's, got {sizes.get('K')}")
    if sizes["P"] != sizes["Q"]:
        raise ValueError(f"{who}: patches must be square, got {sizes['P']}x{sizes['Q']}")
    size = facts.get("img_size")
    if size is None:
        side = math.isqrt(length - 1)
        if side * side != length - 1:
            raise ValueError(
                f"{who}: visual.positional_embedding has {length} positions, which is not a class token and a square "
                "grid: pass vision_cfg={'image_size': (height, width)}"
            )
        size = side * sizes["P"]
    config: dict[str, Any] = {
        "image_size": _square(size),
        "layers": 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        "width": width,
        "patch_size": sizes["P"],
    }
    head_width = width // _heads(facts, width, "vision", who)
    if head_width != 64:
        config["head_width"] = head_width
    if sizes["H"] != 4 * width:
        config["mlp_ratio"] = _ratio(sizes["H"], width)
    if "blocks.0.ls1.gamma" in state:
        config["ls_init_value"] = 1e-5
    if "norm_pre.weight" not in state:
        config["no_ln_pre"] = True
    return config | _norm(facts.get("eps")) | dict(facts.get("more") or {})


def _square(size: Any) -> Any:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    return pair[0] if pair[0] == pair[1] else pair


def _resnet(image: Mapping[str, Tensor], facts: Facts, who: str) -> dict[str, Any]:
    width = image["visual.layer1.0.conv1.weight"].shape[0]
    layers = [len({key.split(".")[2] for key in image if key.startswith(f"visual.layer{n}.")}) for n in (1, 2, 3, 4)]
    side = math.isqrt(image["visual.attnpool.positional_embedding"].shape[0] - 1)
    heads = _heads(facts, 32 * width, "vision", who)
    config = {"image_size": 32 * side, "layers": layers, "width": width, "patch_size": None}
    return config if heads == 32 * width // 64 else config | {"head_width": 32 * width // heads}


def _trunk(image: Mapping[str, Tensor], facts: Facts, who: str) -> dict[str, Any]:
    """A ViT with timm's names: its arguments, and the linear layer after it."""
    state = image_to_timm(image, who)
    trunk = facts.get("arguments")
    if trunk is None:
        facts["num_heads"] = _heads(facts, check_image(state, who)["D"], "vision", who)
        trunk = infer({key: t for key, t in state.items() if not key.startswith("head.")}, facts, who)
    trunk = {key: value for key, value in trunk.items() if key != "num_classes"}
    projection = "linear" if "visual.head.proj.weight" in image else "" if "head.weight" in state else "none"
    config: dict[str, Any] = {
        "image_size": _square(trunk["img_size"]),
        "timm_pool": trunk["global_pool"],
        "timm_proj": projection,
        "trunk": trunk,
    }
    if "visual.head.proj.bias" in image:
        config["timm_proj_bias"] = True
    return config


def facts_of_transformers(config: Any, who: str = "clip_config") -> Facts:
    """Return what a transformers config of CLIP or SigLIP tells beside the shapes.

    Raises ValueError for a config of something else, or an activation that mmfast has no name for.
    """
    text, vision = getattr(config, "text_config", None), getattr(config, "vision_config", None)
    if text is None or vision is None:
        raise ValueError(f"{who}: config must be a CLIPConfig or SiglipConfig, got {type(config).__name__}")
    siglip = str(getattr(config, "model_type", "")).startswith("siglip")
    more: dict[str, Any] = {"pool_type": "last", "no_causal_mask": True} if siglip else _end_of_text(text, who)
    found = {"vision": transformers.facts_of_config(vision), "text": _facts_of_text(text)}
    found["text"]["more"] = more
    if siglip:
        found["vision"]["global_pool"] = "map"  # without its head (vision_use_head=False) there are no image features
    return found


def _facts_of_text(config: Any) -> Facts:
    act = config.hidden_act
    return {
        "num_heads": config.num_attention_heads,
        "eps": config.layer_norm_eps,
        "act_layer": transformers.ACTIVATIONS.get(act, act),
    }


def _end_of_text(config: Any, who: str) -> dict[str, Any]:
    """Which token's features are the text's: transformers takes the first that has the id eos_token_id.

    Configs before its release 4.31 say 2, which was wrong and means the largest id; that is open_clip's rule.
    """
    eos = config.eos_token_id
    if eos == 2:
        return {"pool_type": "argmax"}
    if not isinstance(eos, int):
        raise ValueError(f"{who}: eos_token_id must be an integer, got {eos!r}")
    return {"pool_type": "eos", "eos_id": eos}


def facts_of_state(state: ConvertedState, given: Mapping[str, Mapping[str, Any]], who: str = "clip_config") -> Facts:
    """Return what is known of a state dict by its layout alone; `given` are the fields that the caller passed.

    Raises ValueError where neither the layout nor the caller says how the text or the image is pooled.
    """
    text, image = split_text(state)
    facts: Facts = {"vision": {}, "text": {}}
    if state.source == "transformers" and state.facts.get("family") == "Siglip":
        facts = {part: {"eps": 1e-6, "act_layer": "gelu_tanh"} for part in _PARTS}
        facts["vision"]["global_pool"] = "map"
        facts["text"]["more"] = {"pool_type": "last", "no_causal_mask": True}
        return facts
    if state.facts.get("openai"):
        facts = {part: {"head_width": 64, "act_layer": "quick_gelu"} for part in _PARTS}
    plain = any(key in image for key in ("visual.ln_pre.weight", "visual.layer1.0.conv1.weight"))
    if not plain and image and "pool_type" not in given["vision"]:
        raise ValueError(
            f"{who}: without visual.ln_pre these names do not tell how the image tower pools: pass config= (one of "
            "open_clip's names or its fields) or the model"
        )
    words = text.get("token_embedding.weight")
    if words is not None and words.shape[0] != _WORDS and "pool_type" not in given["text"]:
        raise ValueError(
            f"{who}: which token holds a text's features is known for CLIP's own {_WORDS} tokens, and these are "
            f"{words.shape[0]}: pass text_cfg={{'pool_type': ...}}, config= or the model"
        )
    return facts


def facts_of_model(model: nn.Module) -> Facts | None:
    """Return what a CLIP of transformers or open_clip knows beside its state dict, or None for another class."""
    cls = type(model)
    package = cls.__module__.split(".")[0]
    if package == "transformers" and cls.__name__ in ("CLIPModel", "SiglipModel"):
        return facts_of_transformers(model.config)
    if package in ("open_clip", "clip") and cls.__name__ in ("CLIP", "CustomTextCLIP"):
        return {"vision": _facts_of_image(model.visual), "text": _facts_of_open_clip_text(model)}
    return None


def _facts_of_image(visual: Any) -> Facts:
    name = type(visual).__name__
    if name == "TimmModel":
        from ..models._from_timm import timm_arguments

        head = [child for child in visual.head.children() if list(child.parameters())]
        if [type(layer).__name__ for layer in head] not in ([], ["Linear"]):
            raise ValueError("clip_config: the head of open_clip's TimmModel must be one linear layer or none")
        return {"arguments": timm_arguments(visual.trunk)}
    if name == "ModifiedResNet":
        return {"num_heads": visual.attnpool.num_heads}
    facts = open_clip.describe(visual)
    if facts is None or getattr(visual, "attn_pool", None) is not None:
        raise ValueError(f"clip_config: the image tower must be a ViT, a ModifiedResNet or a timm ViT, got {name}")
    more: dict[str, Any] = {}
    if facts["global_pool"] == "":
        raise ValueError("clip_config: the image tower must pool, got pool_type='none'")
    if facts["global_pool"] == "avg":
        more["pool_type"] = "avg"
    if getattr(visual, "final_ln_after_pool", False):
        more["final_ln_after_pool"] = True
    if "patch_drop_rate" in facts:
        more["patch_dropout"] = facts["patch_drop_rate"]
    return facts | {"more": more}


def _facts_of_open_clip_text(model: Any) -> Facts:
    tower = getattr(model, "text", model)  # CLIP holds the parts of its text tower itself
    if not hasattr(tower, "transformer") or not hasattr(tower.transformer, "resblocks"):
        raise ValueError(f"clip_config: the text tower must be open_clip's own, got {type(tower).__name__}")
    block = tower.transformer.resblocks[0]
    act = _act_name(block.mlp.gelu)
    pool = getattr(tower, "pool_type", getattr(tower, "text_pool_type", "argmax"))
    more: dict[str, Any] = {} if pool == "argmax" else {"pool_type": pool}
    if pool == "eos":
        more["eos_id"] = getattr(tower, "eos_id", getattr(tower, "text_eos_id", None))
    if tower.attn_mask is None:
        more["no_causal_mask"] = True
    if getattr(tower, "use_pad_mask", False):
        more |= {"use_pad_mask": True, "pad_id": tower.pad_id}
    return {"num_heads": block.attn.num_heads, "eps": block.ln_1.eps, "act_layer": act, "more": more}


def _act_name(module: nn.Module) -> str:
    name = type(module).__name__
    names = {"QuickGELU": "quick_gelu", "GELU": "gelu"}
    if getattr(module, "approximate", "none") == "tanh":
        return "gelu_tanh"
    return names.get(name, name)
