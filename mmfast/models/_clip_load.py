"""Checkpoints of CLIP: where they are, what they hold, which architecture they are of, and how they fit a model."""

from __future__ import annotations

import json
import math
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._clip_config import TRUNKS, clip_config, clip_names, text_config, trunk_arguments, vision_config
from ._pos_embed import resample_pos_embed, resize_checkpoint

if TYPE_CHECKING:
    from .clip import CLIP

OPENAI_KEYS = ("input_resolution", "context_length", "vocab_size")
WRAPPERS = ("module.", "_orig_mod.")
TEXT_PARTS = ("positional_embedding", "text_projection", "token_embedding.", "transformer.", "ln_final.")
CONFIG_FILE = "open_clip_config.json"
WEIGHT_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
)

# Weights of open_clip's that were trained with QuickGELU: tag -> the architectures, all for None.
QUICK_GELU_TAGS: dict[str, tuple[str, ...] | None] = {
    "openai": None,
    "yfcc15m": None,
    "cc12m": None,
    "laion400m_e31": ("ViT-B-32",),
    "laion400m_e32": ("ViT-B-32",),
    "metaclip_400m": None,
    "metaclip_fullcc": None,
    "metaclip2_worldwide": ("ViT-H-14-worldwide",),
    "dfn2b": None,
    "dfn5b": None,
}


def full_config(config: Any, image_size: Any = None, context_length: int | None = None) -> dict[str, Any]:
    """Arguments of `CLIP` of a name or a dictionary, with another image size or context length where given.

    A dictionary may be the content of `open_clip_config.json`.
    """
    if isinstance(config, str):
        found = clip_config(config)
    elif isinstance(config, Mapping):
        found = dict(config.get("model_cfg", config))
        for name in ("embed_dim", "vision_cfg", "text_cfg"):
            if name not in found:
                raise ValueError(f"CLIP: a configuration needs embed_dim, vision_cfg and text_cfg, got no {name}")
        found["vision_cfg"], found["text_cfg"] = dict(found["vision_cfg"]), dict(found["text_cfg"])
    else:
        raise TypeError(f"CLIP: a configuration must be a name or a mapping, got {type(config).__name__}")
    if image_size is not None:
        found["vision_cfg"]["image_size"] = image_size
    if context_length is not None:
        found["text_cfg"]["context_length"] = context_length
    return found


def locate(source: Path) -> tuple[Path, Any]:
    """The file of a source, and the configuration beside it, or None."""
    if source.is_file():
        return source, None
    if not source.is_dir():
        raise FileNotFoundError(f"CLIP: no file or folder {source}")
    config_file = source / CONFIG_FILE
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else None
    found = [source / name for name in WEIGHT_FILES if (source / name).is_file()]
    found = found or sorted(path for path in source.iterdir() if path.suffix in (".safetensors", ".bin", ".pt", ".pth"))
    if not found:
        raise FileNotFoundError(f"CLIP: no weights in {source}")
    return found[0], config


def read(path: Path) -> Mapping[str, Any]:
    """The tensors of a file, on the CPU."""
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as missing:
            raise ImportError(f"CLIP: {path} needs safetensors: pip install safetensors") from missing
        return load_file(str(path))
    if _is_script(path):
        return torch.jit.load(str(path), map_location="cpu").state_dict()
    return torch.load(path, map_location="cpu", weights_only=True)


def _is_script(path: Path) -> bool:
    """Whether a file is a TorchScript archive, as OpenAI's are."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def clean(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
    """The tensors of a checkpoint with open_clip's names, and its layout: "open_clip", "openai" or "transformers".

    Raises:
        TypeError: not a mapping.
        ValueError: these are not a CLIP's names.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"CLIP: a checkpoint must be a mapping of names to tensors, got {type(state_dict).__name__}")
    for outer in ("state_dict", "model_state_dict"):
        if isinstance(state_dict.get(outer), Mapping):
            state_dict = state_dict[outer]
    state = dict(state_dict)
    for prefix in WRAPPERS:  # of DistributedDataParallel, of torch.compile
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    layout = "openai" if any(name in state for name in OPENAI_KEYS) else "open_clip"
    if "vision_model.embeddings.patch_embedding.weight" in state:
        from ..convert.clip import to_open_clip

        state, layout = dict(to_open_clip(state, "transformers")), "transformers"
    for name in (*OPENAI_KEYS, "attn_mask", "text.attn_mask"):
        state.pop(name, None)
    if not any(name.startswith("visual.") for name in state):
        raise ValueError(f"CLIP: a checkpoint must have tensors 'visual.*', got {sorted(state)[:5]}")
    return state, layout


def known_quick_gelu(config: Any, tag: str | None, layout: str) -> bool | None:
    """Whether weights need QuickGELU, as far as the tag or OpenAI's layout says; else None."""
    if tag is not None:
        names = QUICK_GELU_TAGS.get(tag.lower().replace("-", "_"), ())
        name = config.replace("/", "-").removesuffix("-quickgelu") if isinstance(config, str) else None
        if names is None or name in names:
            return True
        return None if names else False
    return True if layout == "openai" else None


def told_quick_gelu(known: bool | None, layout: str, state: Mapping[str, Tensor]) -> bool:
    """Whether a model that is told from its weights alone computes QuickGELU.

    Raises:
        ValueError: nothing says so: transformers has OpenAI's weights and others under the same names.
    """
    if known is None and layout == "transformers" and "visual.conv1.weight" in state:
        raise ValueError(
            "CLIP: the names of transformers do not say whether the weights need QuickGELU (OpenAI's do); give "
            "quick_gelu, tag or config, or convert the model with mmfast.convert.clip_from"
        )
    return bool(known)


def warn_of_gelu(known: bool | None, quick_gelu: bool, tag: str | None) -> None:
    """Warn if a model computes another GELU than its weights were trained with."""
    if known is None or known == quick_gelu:
        return
    which = f"weights tagged {tag!r}" if tag else "OpenAI's weights"
    trained, computes = ("QuickGELU", "GELU") if known else ("GELU", "QuickGELU")
    warnings.warn(
        f"CLIP: {which} were trained with {trained}, but the model computes {computes}; pass quick_gelu={known}",
        UserWarning,
        stacklevel=3,
    )


def config_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of `CLIP` for a state dict with open_clip's names: those of the known architecture with its shapes.

    Raises:
        ValueError: the shapes leave open what must be known.
    """
    seen = _signature_of_state(state)
    matches = [config for config in map(clip_config, clip_names()) if _signature(config) == seen]
    sizes = _sizes(state, seen)
    if matches:
        # Of equal architectures the one trained at these sizes; QuickGELU is decided elsewhere.
        found = max(matches, key=lambda config: _likeness(config, sizes))
        found.pop("quick_gelu", None)
    else:
        found = _guessed(seen)
    if "timm_model_name" in found["vision_cfg"]:
        _resize_trunk(found["vision_cfg"], sizes["image_size"])
    found["vision_cfg"]["image_size"] = sizes["image_size"]
    found["text_cfg"].update(context_length=sizes["context_length"], vocab_size=sizes["vocab_size"])
    found["custom_text"] = "text.token_embedding.weight" in state
    if "logit_bias" in state:
        found.setdefault("init_logit_bias", 0.0)
    else:
        found.pop("init_logit_bias", None)
    found["nonscalar_logit_scale"] = state["logit_scale"].dim() == 1 if "logit_scale" in state else False
    return found


def _resize_trunk(vision: dict[str, Any], image_size: int) -> None:
    """Name the trunk by its arguments where timm has no name for its image size."""
    arguments = trunk_arguments(vision["timm_model_name"])
    if arguments["img_size"] // arguments["patch_size"] != image_size // arguments["patch_size"]:
        vision["timm_model_name"], vision["trunk"] = None, {**arguments, "img_size": image_size}


def _signature_of_state(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What tells architectures apart, read off shapes."""
    prefix = "text." if "text.token_embedding.weight" in state else ""
    try:
        text = _stack(state, f"{prefix}transformer.resblocks.")
        if "visual.layer1.0.conv1.weight" in state:
            layers = [_count(state, f"visual.layer{index}.") for index in (1, 2, 3, 4)]
            image: tuple[Any, ...] = ("resnet", layers, state["visual.layer1.0.conv1.weight"].shape[0])
        elif "visual.trunk.patch_embed.proj.weight" in state:
            kernel = state["visual.trunk.patch_embed.proj.weight"]
            hidden = state["visual.trunk.blocks.0.mlp.fc1.weight"].shape[0]
            depth = _count(state, "visual.trunk.blocks.")
            image = ("trunk", depth, kernel.shape[0], tuple(kernel.shape[-2:]), hidden)
        else:
            kernel = state["visual.conv1.weight"]
            image = (
                "vit",
                *_stack(state, "visual.transformer.resblocks."),
                tuple(kernel.shape[-2:]),
                "visual.ln_pre.weight" in state,
                "visual.transformer.resblocks.0.ls_1.gamma" in state,
            )
        return {"image": image, "text": text, "embed_dim": _embed_dim(state, prefix), "prefix": prefix}
    except KeyError as missing:
        raise ValueError(f"CLIP: the architecture cannot be told: the checkpoint has no {missing}") from missing


def _signature(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same of a configuration."""
    vision, text = vision_config(config["vision_cfg"]), text_config(config["text_cfg"])
    image: tuple[Any, ...]
    if vision.timm_model_name is not None:
        trunk = trunk_arguments(vision.timm_model_name)
        width, patch = trunk["embed_dim"], trunk["patch_size"]
        image = ("trunk", trunk["depth"], width, (patch, patch), int(width * trunk["mlp_ratio"]))
    elif isinstance(vision.layers, int):
        hidden, patch = int(vision.width * vision.mlp_ratio), vision.patch_size
        scaled = vision.ls_init_value is not None
        image = ("vit", vision.layers, vision.width, hidden, (patch, patch), not vision.no_ln_pre, scaled)
    else:
        image = ("resnet", list(vision.layers), vision.width)
    return {
        "image": image,
        "text": (text.layers, text.width, int(text.width * text.mlp_ratio)),
        "embed_dim": config["embed_dim"],
        "prefix": "text." if config.get("custom_text") else "",
    }


def _stack(state: Mapping[str, Tensor], prefix: str) -> tuple[int, int, int]:
    """Number of blocks, width and hidden width of a transformer."""
    hidden, width = state[f"{prefix}0.mlp.c_fc.weight"].shape
    return _count(state, prefix), width, hidden


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({name[len(prefix) :].partition(".")[0] for name in state if name.startswith(prefix)})


def _embed_dim(state: Mapping[str, Tensor], prefix: str) -> int:
    if f"{prefix}text_projection" in state:
        return state[f"{prefix}text_projection"].shape[1]
    linear = state.get(f"{prefix}text_projection.weight")
    return state[f"{prefix}ln_final.weight"].shape[0] if linear is None else linear.shape[0]


def _sizes(state: Mapping[str, Tensor], seen: Mapping[str, Any]) -> dict[str, Any]:
    """What may differ within an architecture."""
    kind, prefix = seen["image"][0], seen["prefix"]
    if kind == "resnet":
        positions, patch = state["visual.attnpool.positional_embedding"].shape[0] - 1, 32
    elif kind == "trunk":
        trunk, patch = state["visual.trunk.pos_embed"], seen["image"][3][0]
        positions = trunk.shape[1] - ("visual.trunk.cls_token" in state)
    else:
        positions, patch = state["visual.positional_embedding"].shape[0] - 1, seen["image"][4][0]
    side = math.isqrt(positions)
    if side * side != positions:
        raise ValueError(f"CLIP: the checkpoint's {positions} image positions are not a square; give config")
    vocabulary = state[f"{prefix}token_embedding.weight"].shape[0]
    context = state[f"{prefix}positional_embedding"].shape[0]
    return {"image_size": side * patch, "patch": patch, "context_length": context, "vocab_size": vocabulary}


def _likeness(config: Mapping[str, Any], sizes: Mapping[str, Any]) -> tuple[bool, ...]:
    vision, text = config["vision_cfg"], config["text_cfg"]
    grid = vision["image_size"] // sizes["patch"] == sizes["image_size"] // sizes["patch"]
    return text["vocab_size"] == sizes["vocab_size"], grid, text["context_length"] == sizes["context_length"]


def _guessed(seen: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration by OpenAI's rules: heads of 64, CLIP's pooling."""
    kind, *image = seen["image"]
    if kind == "trunk":
        kinds = ", ".join(TRUNKS)
        raise ValueError(f"CLIP: the image tower is none of {kinds}, so its heads cannot be told; give config")
    text_layers, text_width, text_hidden = seen["text"]
    if text_width % 64 or (kind == "vit" and image[1] % 64):
        raise ValueError("CLIP: a width is no multiple of 64, so the heads cannot be told; give config")
    text = {
        "width": text_width,
        "heads": text_width // 64,
        "layers": text_layers,
        # Half a unit more, so that int(width * ratio) comes out exactly.
        "mlp_ratio": (text_hidden + 0.5) / text_width,
    }
    if kind == "resnet":
        vision: dict[str, Any] = {"layers": image[0], "width": image[1], "patch_size": None}
    else:
        layers, width, hidden, patch, norm, scaled = image
        vision = {
            "layers": layers,
            "width": width,
            "patch_size": patch,
            "mlp_ratio": (hidden + 0.5) / width,
            "no_ln_pre": not norm,
            "ls_init_value": 1e-5 if scaled else None,
        }
    return {"embed_dim": seen["embed_dim"], "vision_cfg": vision, "text_cfg": text}


@torch.no_grad()
def fitted(state_dict: Mapping[str, Tensor], model: CLIP) -> dict[str, Tensor]:
    """Fit a state dict with open_clip's names to `model`: its text prefix, its image size and its context length.

    Scale and bias get the model's shape; a bias that only the model has is 0.

    Source: open_clip `load_checkpoint`, `resize_pos_embed`, `resize_text_pos_embed`.
    """
    state = _with_layout(state_dict, model.custom_text)
    for name, parameter in (("logit_scale", model.logit_scale), ("logit_bias", model.logit_bias)):
        if parameter is not None and name in state and state[name].numel() == 1:
            state[name] = state[name].reshape(parameter.shape)
    if model.logit_bias is not None and "logit_bias" not in state and "logit_scale" in state:
        state["logit_bias"] = torch.zeros_like(model.logit_bias)
    visual = model.visual
    for name in ("visual.positional_embedding", "visual.attnpool.positional_embedding"):
        if name in state and name in model.state_dict(keep_vars=True):
            state[name] = _resized(state[name], visual.grid_size, name)
    trunk = {name: value for name, value in state.items() if name.startswith("visual.trunk.")}
    if trunk and hasattr(visual, "trunk"):
        prefix = "visual.trunk."
        inner = resize_checkpoint({name.removeprefix(prefix): value for name, value in trunk.items()}, visual.trunk)
        state.update({prefix + name: value for name, value in inner.items()})
    name = "text.positional_embedding" if model.custom_text else "positional_embedding"
    if name in state and state[name].shape[0] != model.context_length:
        positions = state[name]
        resized = F.interpolate(positions.float().T[None], size=model.context_length, mode="linear")
        state[name] = resized[0].T.to(positions.dtype)
    return state


def _with_layout(state: Mapping[str, Tensor], custom_text: bool) -> dict[str, Tensor]:
    """Put "text." before the names of the text tower, or take it away."""
    if custom_text and "text.token_embedding.weight" not in state:
        return {f"text.{name}" if name.startswith(TEXT_PARTS) else name: value for name, value in state.items()}
    if not custom_text and "token_embedding.weight" not in state:
        return {name.removeprefix("text."): value for name, value in state.items()}
    return dict(state)


def _resized(positions: Tensor, grid: tuple[int, int], name: str) -> Tensor:
    """Resample (1 + N, D) positions, a class token first, to another grid."""
    count = positions.shape[0] - 1
    if count == grid[0] * grid[1]:
        return positions
    side = math.isqrt(max(count, 0))
    if side * side != count or not side:
        raise ValueError(f"CLIP: {name} has {count} positions, which are no square grid, and the model {grid}")
    return resample_pos_embed(positions[None], grid, (side, side), 1)[0]
