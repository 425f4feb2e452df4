"""Configurations of CLIP and SigLIP: open_clip's fields, and its architectures by their names."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..nn.patch_embed import pair_of_sizes

Size = int | tuple[int, int]

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)

VISION_POOLS = ("tok", "avg")
TEXT_POOLS = ("argmax", "eos", "first", "last", "avg")
TRUNK_PROJECTIONS = ("none", "", "linear")


@dataclass
class VisionConfig:
    """The image tower: a ViT, a ModifiedResNet where `layers` are four numbers, or a ViT with timm's names.

    Fields, defaults and meanings are open_clip's `CLIPVisionCfg`'s. `trunk` is mmfast's own: arguments of
    `mmfast.models.ViT`, for an image tower with timm's names that `timm_model_name` does not know.
    """

    layers: int | Sequence[int] = 12
    width: int = 768
    head_width: int = 64
    mlp_ratio: float = 4.0
    patch_size: Size | None = 16
    image_size: Size = 224
    ls_init_value: float | None = None
    patch_dropout: float = 0.0
    no_ln_pre: bool = False
    final_ln_after_pool: bool = False
    pool_type: str = "tok"
    act_kwargs: dict[str, Any] | None = None
    norm_kwargs: dict[str, Any] | None = None
    timm_model_name: str | None = None
    timm_model_pretrained: bool = False
    timm_pool: str = "avg"
    timm_proj: str = "linear"
    timm_proj_bias: bool = False
    timm_drop: float = 0.0
    timm_drop_path: float | None = None
    trunk: dict[str, Any] | None = None


@dataclass
class TextConfig:
    """The text transformer. Fields, defaults and meanings are open_clip's `CLIPTextCfg`'s, and mmfast's own:

    - `pool_type="avg"`: the mean over a text's tokens, all but the `pad_id`s at its end.
    - `use_pad_mask`: without a causal mask, no token attends to `pad_id`.
    """

    context_length: int = 77
    vocab_size: int = 49408
    hf_tokenizer_name: str | None = None
    tokenizer_mode: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None
    width: int = 512
    heads: int = 8
    layers: int = 12
    mlp_ratio: float = 4.0
    ls_init_value: float | None = None
    pad_id: int = 0
    eos_id: int = 2
    no_causal_mask: bool = False
    use_pad_mask: bool = False
    final_ln_after_pool: bool = False
    pool_type: str = "argmax"
    proj_bias: bool = False
    proj_type: str = "linear"
    act_kwargs: dict[str, Any] | None = None
    norm_kwargs: dict[str, Any] | None = None


# Fields of open_clip's that ask for parts of other models. Their neutral values are accepted.
REFUSED: dict[str, tuple[Any, ...]] = {
    "attentional_pool": (False,),
    "attn_pooler_queries": (256,),
    "attn_pooler_heads": (8,),
    "pos_embed_type": ("learnable",),
    "output_tokens": (False,),
    "block_type": (None, "default"),
    "qk_norm": (False,),
    "scaled_cosine_attn": (False,),
    "scale_heads": (False,),
    "scale_attn_inner": (False,),
    "scale_attn": (False,),
    "scale_fc": (False,),
    "embed_cls": (False,),
    "hf_model_name": (None,),
    "hf_model_pretrained": (True, False),
    "hf_proj_type": ("mlp",),
    "hf_pooler_type": ("mean_pooler",),
}


def vision_config(given: Mapping[str, Any] | VisionConfig) -> VisionConfig:
    """Return a checked configuration of the image tower.

    Raises:
        TypeError: not a mapping.
        ValueError: a field is unknown, asks for a part that is not served, or is out of its range.
    """
    config: VisionConfig = _config("vision_cfg", VisionConfig, given)
    if config.trunk is not None or config.timm_model_name is not None:
        _choice("vision_cfg", "timm_proj", config.timm_proj, TRUNK_PROJECTIONS)
        if config.timm_model_pretrained:
            raise ValueError("CLIP: vision_cfg timm_model_pretrained must be False: nothing is downloaded, got True")
        return config
    pair_of_sizes("CLIP", "vision_cfg image_size", _size(config.image_size))
    if isinstance(config.layers, int):
        if config.patch_size is None:
            raise ValueError("CLIP: vision_cfg patch_size must be given for a ViT, got None")
        pair_of_sizes("CLIP", "vision_cfg patch_size", _size(config.patch_size))
        _choice("vision_cfg", "pool_type", config.pool_type, VISION_POOLS)
        _multiple("vision_cfg", "width", config.width, "head_width", config.head_width)
        if config.layers < 1:
            raise ValueError(f"CLIP: vision_cfg layers must be positive, got {config.layers}")
    elif len(config.layers) != 4 or min(config.layers) < 1:
        raise ValueError(f"CLIP: vision_cfg layers must be one number or four positive ones, got {config.layers!r}")
    return config


def text_config(given: Mapping[str, Any] | TextConfig) -> TextConfig:
    """Return a checked configuration of the text transformer.

    Raises:
        TypeError: not a mapping.
        ValueError: a field is unknown, asks for a part that is not served, or is out of its range.
    """
    config: TextConfig = _config("text_cfg", TextConfig, given)
    _choice("text_cfg", "pool_type", config.pool_type, TEXT_POOLS)
    _choice("text_cfg", "proj_type", config.proj_type, ("linear", "none"))
    _multiple("text_cfg", "width", config.width, "heads", config.heads)
    for name in ("context_length", "vocab_size", "layers"):
        if getattr(config, name) < 1:
            raise ValueError(f"CLIP: text_cfg {name} must be positive, got {getattr(config, name)}")
    return config


def _config(owner: str, kind: Any, given: Any) -> Any:
    if isinstance(given, kind):
        return copy.deepcopy(given)
    if not isinstance(given, Mapping):
        raise TypeError(f"CLIP: {owner} must be a mapping of open_clip's fields, got {type(given).__name__}")
    known = {field.name for field in fields(kind)}
    for name, value in given.items():
        if name in known:
            continue
        if name not in REFUSED:
            raise ValueError(f"CLIP: {owner} has no field {name!r}; it has {', '.join(sorted(known))}")
        if value not in REFUSED[name]:
            raise ValueError(
                f"CLIP: {owner} {name} must be {REFUSED[name][0]!r}, which is what it serves; got {value!r}"
            )
    return kind(**{name: copy.deepcopy(value) for name, value in given.items() if name in known})


def _choice(owner: str, name: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        raise ValueError(f"CLIP: {owner} {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _multiple(owner: str, name: str, value: int, other: str, divisor: int) -> None:
    if value < 1 or divisor < 1 or value % divisor:
        raise ValueError(f"CLIP: {owner} {name} must be a multiple of {other}, got {name}={value}, {other}={divisor}")


def _size(size: Any) -> Size:
    """A size out of JSON, where a pair is a list."""
    return tuple(size) if isinstance(size, list) else size


# name of a tower: width, depth, heads, hidden width of the MLP in widths
TRUNKS: dict[str, tuple[int, int, int, float]] = {
    "base": (768, 12, 12, 4.0),
    "large": (1024, 24, 16, 4.0),
    "so400m": (1152, 27, 16, 3.7362),
    "giantopt": (1536, 40, 16, 4.0),
}
# SigLIP 2 uses tanh GELU; timm keeps exact GELU for the shapes that SigLIP had before.
TANH_TRUNKS = {("base", 32, 256), ("large", 16, 512), *(("so400m", 16, size) for size in (256, 384, 512))}
TRUNK_NAME = re.compile(r"vit_(base|large|so400m|giantopt)_patch(\d+)_siglip_(\d+)")


def trunk_arguments(name: str) -> dict[str, Any]:
    """Arguments of `ViT` for a SigLIP image tower by timm's name, e.g. "vit_base_patch16_siglip_224".

    Raises:
        ValueError: no such name.
    """
    found = TRUNK_NAME.fullmatch(name)
    if found is None:
        expected = "vit_{base,large,so400m,giantopt}_patch{P}_siglip_{size}"
        raise ValueError(
            f"CLIP: vision_cfg timm_model_name must be {expected}, got {name!r}; "
            "mmfast.accelerate serves open_clip's model with any timm tower"
        )
    kind, patch, size = found[1], int(found[2]), int(found[3])
    width, depth, heads, mlp_ratio = TRUNKS[kind]
    tanh = kind == "giantopt" or (kind, patch, size) in TANH_TRUNKS
    return {
        "img_size": size,
        "patch_size": patch,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": mlp_ratio,
        "class_token": False,
        "global_pool": "map",
        "act_layer": "gelu_tanh" if tanh else "gelu",
    }


# The text transformers: width, heads, layers.
_TEXT = {
    256: (256, 4, 10),
    384: (384, 6, 12),
    512: (512, 8, 12),
    640: (640, 10, 12),
    768: (768, 12, 12),
    1024: (1024, 16, 24),
    1280: (1280, 20, 32),
}

# Architectures of ResNets: embed_dim, layers, width, image size, (width, heads, layers) of the text transformer.
_RESNETS: dict[str, tuple[int, list[int], int, int, tuple[int, int, int]]] = {
    "RN50": (1024, [3, 4, 6, 3], 64, 224, _TEXT[512]),
    "RN101": (512, [3, 4, 23, 3], 64, 224, _TEXT[512]),
    "RN50x4": (640, [4, 6, 10, 6], 80, 288, _TEXT[640]),
    "RN50x16": (768, [6, 8, 18, 8], 96, 384, _TEXT[768]),
    "RN50x64": (1024, [3, 15, 36, 10], 128, 448, (1024, 16, 12)),
}

_H, _G = {"head_width": 80}, {"head_width": 104, "mlp_ratio": 4.9231}

# Architectures of ViTs: embed_dim, layers, width, patch, image size, more vision fields, the text transformer.
_VITS: dict[str, tuple[int, int, int, int, int, dict[str, Any], tuple[int, int, int]]] = {
    "ViT-S-32": (384, 12, 384, 32, 224, {}, _TEXT[384]),
    "ViT-S-16": (384, 12, 384, 16, 224, {}, _TEXT[384]),
    "ViT-S-32-alt": (256, 12, 384, 32, 224, {}, _TEXT[256]),
    "ViT-S-16-alt": (256, 12, 384, 16, 224, {}, _TEXT[256]),
    "ViT-M-32": (512, 12, 512, 32, 224, {}, _TEXT[512]),
    "ViT-M-16": (512, 12, 512, 16, 224, {}, _TEXT[512]),
    "ViT-M-32-alt": (384, 12, 512, 32, 224, {}, _TEXT[384]),
    "ViT-M-16-alt": (384, 12, 512, 16, 224, {"ls_init_value": 1e-4}, _TEXT[384]),
    "ViT-B-32": (512, 12, 768, 32, 224, {}, _TEXT[512]),
    "ViT-B-32-256": (512, 12, 768, 32, 256, {}, _TEXT[512]),
    "ViT-B-32-plus-256": (640, 12, 896, 32, 256, {}, _TEXT[640]),
    "ViT-B-16": (512, 12, 768, 16, 224, {}, _TEXT[512]),
    "ViT-B-16-plus": (640, 12, 896, 16, 224, {}, _TEXT[640]),
    "ViT-B-16-plus-240": (640, 12, 896, 16, 240, {}, _TEXT[640]),
    "ViT-L-16": (768, 24, 1024, 16, 224, {}, _TEXT[768]),
    "ViT-L-16-320": (768, 24, 1024, 16, 320, {}, _TEXT[768]),
    "ViT-L-14": (768, 24, 1024, 14, 224, {}, _TEXT[768]),
    "ViT-L-14-280": (768, 24, 1024, 14, 280, {}, _TEXT[768]),
    "ViT-L-14-336": (768, 24, 1024, 14, 336, {}, _TEXT[768]),
    "ViT-H-16": (1024, 32, 1280, 16, 224, _H, _TEXT[1024]),
    "ViT-H-14": (1024, 32, 1280, 14, 224, _H, _TEXT[1024]),
    "ViT-H-14-378": (1024, 32, 1280, 14, 378, _H, _TEXT[1024]),
    "ViT-g-14": (1024, 40, 1408, 14, 224, {"head_width": 88, "mlp_ratio": 4.3637}, _TEXT[1024]),
    "ViT-bigG-14": (1280, 48, 1664, 14, 224, _G, _TEXT[1280]),
    "ViT-e-14": (1280, 56, 1792, 14, 224, {"head_width": 112, "mlp_ratio": 8.5715}, (1280, 20, 36)),
}

# These exist with QuickGELU too, as NAME-quickgelu.
_QUICK = (
    *_RESNETS,
    *("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14", "ViT-H-14-378", "ViT-bigG-14"),
    *("ViT-L-14-worldwide", "ViT-H-14-worldwide"),
)

# CLIPA: mean of patches, BERT's tokenizer, text without a causal mask, 32 tokens.
_CLIPA = ("ViT-L-14", "ViT-L-14-336", "ViT-H-14", "ViT-H-14-336", "ViT-bigG-14", "ViT-bigG-14-336")
_CLIPA_VISION = {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}
_CLIPA_TEXT = {
    "context_length": 32,
    "vocab_size": 32000,
    "hf_tokenizer_name": "bert-base-uncased",
    "tokenizer_kwargs": {"strip_sep_token": True},
    "pool_type": "last",
    "no_causal_mask": True,
}

# MetaCLIP 2: a tokenizer of all languages, whose end of text is not the largest id.
_XLM = {"hf_tokenizer_name": "facebook/xlm-v-base", "pool_type": "eos", "eos_id": 2, "vocab_size": 901629}
_MT5 = {
    "hf_tokenizer_name": "google/mt5-base",
    "pool_type": "eos",
    "eos_id": 1,
    "tokenizer_kwargs": {"clean": "canonicalize"},
    "vocab_size": 250100,
}
_WORLDWIDE = {
    "ViT-L-14-worldwide": ("ViT-L-14", _MT5),
    "ViT-H-14-worldwide": ("ViT-H-14", _XLM),
    "ViT-H-14-worldwide-378": ("ViT-H-14-378", _XLM),
    "ViT-bigG-14-worldwide": ("ViT-bigG-14", _XLM),
    "ViT-bigG-14-worldwide-378": ("ViT-bigG-14", _XLM),
}

# SigLIP: name -> timm's kind, patch, image size. The text transformer has the trunk's shape (gopt: so400m's).
_SIGLIPS: dict[str, tuple[str, int, int]] = {
    "ViT-B-16-SigLIP": ("base", 16, 224),
    "ViT-B-16-SigLIP-256": ("base", 16, 256),
    "ViT-B-16-SigLIP-384": ("base", 16, 384),
    "ViT-B-16-SigLIP-512": ("base", 16, 512),
    "ViT-B-16-SigLIP-i18n-256": ("base", 16, 256),
    "ViT-L-16-SigLIP-256": ("large", 16, 256),
    "ViT-L-16-SigLIP-384": ("large", 16, 384),
    "ViT-SO400M-14-SigLIP": ("so400m", 14, 224),
    "ViT-SO400M-14-SigLIP-378": ("so400m", 14, 378),
    "ViT-SO400M-14-SigLIP-384": ("so400m", 14, 384),
    "ViT-SO400M-16-SigLIP-i18n-256": ("so400m", 16, 256),
    "ViT-B-32-SigLIP2-256": ("base", 32, 256),
    "ViT-B-16-SigLIP2": ("base", 16, 224),
    "ViT-B-16-SigLIP2-256": ("base", 16, 256),
    "ViT-B-16-SigLIP2-384": ("base", 16, 384),
    "ViT-B-16-SigLIP2-512": ("base", 16, 512),
    "ViT-L-16-SigLIP2-256": ("large", 16, 256),
    "ViT-L-16-SigLIP2-384": ("large", 16, 384),
    "ViT-L-16-SigLIP2-512": ("large", 16, 512),
    "ViT-SO400M-14-SigLIP2": ("so400m", 14, 224),
    "ViT-SO400M-14-SigLIP2-378": ("so400m", 14, 378),
    "ViT-SO400M-16-SigLIP2-256": ("so400m", 16, 256),
    "ViT-SO400M-16-SigLIP2-384": ("so400m", 16, 384),
    "ViT-SO400M-16-SigLIP2-512": ("so400m", 16, 512),
    "ViT-gopt-16-SigLIP2-256": ("giantopt", 16, 256),
    "ViT-gopt-16-SigLIP2-384": ("giantopt", 16, 384),
}


def clip_names() -> tuple[str, ...]:
    """The architectures of `CLIP.from_config`, by open_clip's names."""
    quick = (f"{name}-quickgelu" for name in _QUICK)
    return (*_RESNETS, *_VITS, *quick, *map(_clipa_name, _CLIPA), *_WORLDWIDE, *_SIGLIPS)


def clip_config(name: str) -> dict[str, Any]:
    """The configuration of an architecture, as `CLIP` takes it; open_clip's, with a fresh dictionary at each call.

    Raises:
        ValueError: no such name.
    """
    wanted = name.replace("/", "-")  # OpenAI writes ViT-B/32
    if wanted not in clip_names():
        family = wanted.partition("-")[0]
        close = [known for known in clip_names() if known.startswith(family)]
        raise ValueError(f"CLIP: unknown architecture {name!r}; known are {', '.join(close or clip_names())}")
    if wanted in _SIGLIPS:
        return _siglip(wanted)
    base = wanted.removesuffix("-quickgelu")
    config = _plain(base)
    return config if base == wanted else {**config, "quick_gelu": True}


def _plain(name: str) -> dict[str, Any]:
    if name in _RESNETS:
        embed_dim, layers, width, image_size, text = _RESNETS[name]
        vision = {"image_size": image_size, "layers": list(layers), "width": width, "patch_size": None}
        return {"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": _text(text)}
    if name in _VITS:
        embed_dim, depth, width, patch, image_size, more, text = _VITS[name]
        vision = {"image_size": image_size, "layers": depth, "width": width, "patch_size": patch, **more}
        return {"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": _text(text)}
    if name in _WORLDWIDE:
        base, more = _WORLDWIDE[name]
        config = _plain(base)
        config["text_cfg"].update(copy.deepcopy(more))
    else:
        base = name.replace("-CLIPA", "")
        config = _plain(base.removesuffix("-336"))
        config["vision_cfg"].update(_CLIPA_VISION)
        config["text_cfg"].update(copy.deepcopy(_CLIPA_TEXT))
    size = re.search(r"-(336|378)$", name)
    if size:
        config["vision_cfg"]["image_size"] = int(size[1])
    return config


def _clipa_name(base: str) -> str:
    return base.replace("-336", "-CLIPA-336") if base.endswith("-336") else f"{base}-CLIPA"


def _text(shape: tuple[int, int, int]) -> dict[str, Any]:
    width, heads, layers = shape
    return {"context_length": 77, "vocab_size": 49408, "width": width, "heads": heads, "layers": layers}


def _siglip(name: str) -> dict[str, Any]:
    kind, patch, size = _SIGLIPS[name]
    second, multilingual = "SigLIP2" in name, "i18n" in name
    tokenizer = name if second else "ViT-B-16-SigLIP-i18n-256" if multilingual else "ViT-B-16-SigLIP"
    width, layers, heads, mlp_ratio = TRUNKS["so400m" if kind == "giantopt" else kind]
    text: dict[str, Any] = {
        "context_length": 16 if name == "ViT-SO400M-14-SigLIP" else 64,
        "vocab_size": 256000 if second else 250000 if multilingual else 32000,
        "hf_tokenizer_name": f"timm/{tokenizer}",
        "tokenizer_kwargs": {"clean": "canonicalize"},
        "width": width,
        "heads": heads,
        "layers": layers,
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
    }
    if mlp_ratio != 4.0:
        text["mlp_ratio"] = mlp_ratio
    if second:
        text["act_kwargs"] = {"approximate": "tanh"}
    if name == "ViT-SO400M-16-SigLIP-i18n-256":  # its text features are not projected
        del text["proj_bias"]
        text["proj_type"] = "none"
    return {
        "embed_dim": TRUNKS[kind][0],
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": size,
            "timm_model_name": f"vit_{kind}_patch{patch}_siglip_{size}",
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": text,
    }
