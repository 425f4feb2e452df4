"""Convert whole CLIP and SigLIP models: names, configs, models.

    state = mmfast.convert.to_open_clip(checkpoint)               # of transformers or of open_clip and OpenAI
    back = mmfast.convert.from_open_clip(state, "transformers")   # the way back, bit by bit
    model = mmfast.convert.clip_from(transformers_model)          # a mmfast.models.CLIP that computes the same

The canonical names are open_clip's, which are OpenAI's; those of SigLIP too (`text.` before the text tower's and
timm's ViT under `visual.trunk.`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ._clip_config import facts_of_model, facts_of_state, facts_of_transformers, infer_clip, shape_of_scalars
from ._clip_names import is_transformers, read_transformers, write_open_clip, write_transformers
from ._clip_open import check, is_open_clip, read_open_clip
from ._names import ConvertedState, checked, shorten

if TYPE_CHECKING:
    from ..models import CLIP

LAYOUTS = ("open_clip", "transformers")
ALIASES = {
    "mmfast": "open_clip",
    "openai": "open_clip",
    "huggingface": "transformers",
    "hf": "transformers",
    "transformers_clip": "transformers",
}


def _layout(name: str, who: str) -> str:
    name = ALIASES.get(name, name)
    if name not in LAYOUTS:
        raise ValueError(f"{who}: layout must be one of {', '.join(LAYOUTS)}, got {name!r}")
    return name


def to_open_clip(state_dict: Mapping[str, Tensor], src: str = "auto", *, strict: bool = True) -> ConvertedState:
    """Return the state dict of a CLIP or SigLIP with open_clip's names, which are those of `mmfast.models.CLIP`.

    | read | as |
    |---|---|
    | transformers CLIPModel | open_clip's CLIP: `visual.*`, and the text tower's names without a prefix |
    | transformers SiglipModel | open_clip's CustomTextCLIP: `visual.trunk.*`, `text.*` |
    | transformers CLIPTextModel, CLIPVisionModel (WithProjection or not), SiglipTextModel, SiglipVisionModel | that part |
    | open_clip's CLIP, CustomTextCLIP, TextTransformer; OpenAI's files | itself |

    Args:
        state_dict: of any dtype and on any device, meta included. Not changed. Names of transformers' towers with or
            without `text_model.` and `vision_model.` (version 5.6 left it out in memory).
        src: "open_clip", "transformers" or "auto".
        strict: raise for a key that has no place; otherwise keep it aside.

    Returns:
        A dict whose tensors are the given ones or views of them; only merged ones (q, k and v) are new. `logit_scale`
        and `logit_bias` of transformers have the shape []. Its `aside` holds the keys that the model does not need, with
        `reasons`: position_ids, the causal mask, OpenAI's sizes. `from_open_clip` needs it for the way back.

    Raises:
        TypeError: not a mapping of names to tensors.
        ValueError: a key is unknown or stands for something that a CLIP cannot compute, a part is missing, or shapes
            contradict each other.
    """  # noqa: E501  a table's row is a line
    state = checked(state_dict, "to_open_clip")
    src = _detect(state) if src == "auto" else _layout(src, "to_open_clip")
    if src == "open_clip" and isinstance(state_dict, ConvertedState) and state_dict.source in LAYOUTS:
        return ConvertedState.like(state_dict, state)  # already canonical: keeps what it remembers
    reader = read_transformers if src == "transformers" else read_open_clip
    out = reader(state, strict=strict)
    check(out, f"to_open_clip({src})")
    return out


def _detect(state: Mapping[str, Tensor]) -> str:
    if is_transformers(state):
        return "transformers"
    if is_open_clip(state):
        return "open_clip"
    hint = "; an image tower alone is for to_timm" if "class_embedding" in state else ""
    raise ValueError(f"to_open_clip: no CLIP layout ({', '.join(LAYOUTS)}) has these keys: {shorten(state, 5)}{hint}")


def from_open_clip(
    state_dict: Mapping[str, Tensor],
    dst: str,
    *,
    model: str | None = None,
    flat: bool | None = None,
    text_prefix: str | None = None,
) -> dict[str, Tensor]:
    """Return a state dict with open_clip's names in the layout `dst`: the inverse of `to_open_clip`.

    Args:
        state_dict: what `to_open_clip(x)` returned gives x back, bit by bit, with the keys that were kept aside.
        dst: "transformers" or "open_clip".
        model: the class in transformers whose names are wanted, by default the one that has all of the weights:
            "CLIPModel", "CLIPTextModel", "CLIPTextModelWithProjection", "CLIPVisionModel",
            "CLIPVisionModelWithProjection", "SiglipModel", "SiglipTextModel", "SiglipVisionModel".
        flat: write a tower alone without `text_model.` or `vision_model.`, as `state_dict()` has it since transformers
            5.6. `from_pretrained` of every version reads the other names, the default unless flat ones were read.
        text_prefix: open_clip's text tower with "text." (CustomTextCLIP) or "" (CLIP) before its names; by default as
            they are.

    Returns:
        A dict of the same tensors or of views of them. Parts of one tensor share memory: clone them to save with
        safetensors.

    Raises:
        TypeError: not a mapping of names to tensors, or an option that the layout has not.
        ValueError: a key has no name in `dst`, the class needs one that is missing, or computes something else.
    """
    checked_state = checked(state_dict, "from_open_clip")
    dst = _layout(dst, "from_open_clip")
    state = ConvertedState.like(state_dict, checked_state)
    check(state, f"from_open_clip({dst})")
    if dst == "open_clip":
        if model is not None or flat is not None:
            raise TypeError("from_open_clip: open_clip has no option model or flat")
        return write_open_clip(state, text_prefix=text_prefix)
    if text_prefix is not None:
        raise TypeError("from_open_clip: transformers has no option text_prefix")
    return write_transformers(state, model=model, flat=flat)


def clip_config(
    model_or_state_dict: nn.Module | Mapping[str, Tensor],
    src: str = "auto",
    *,
    config: Any = None,
    quick_gelu: bool | None = None,
    vision_cfg: Mapping[str, Any] | None = None,
    text_cfg: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the arguments with which `mmfast.models.CLIP` has this model's parameters and computes what it computes.

    They are the fields of open_clip's configuration files, so open_clip's own CLIP takes them too (but for the field
    `trunk` of SigLIP's image tower, the arguments of `mmfast.models.ViT`).

    Shapes and keys give most. What a state dict does not tell comes from the model, from `config` or from an argument:
    the activation (QuickGELU in OpenAI's weights), the number of heads, the norms' eps, how the text is pooled.
    transformers pools at the first token with `eos_token_id`, or, where a config still says 2, at the largest id:
    `pool_type` "eos" or "argmax".

    Args:
        model_or_state_dict: a CLIPModel or SiglipModel of transformers, a CLIP or CustomTextCLIP of open_clip, or a
            state dict of one.
        src: layout of the state dict, or "auto".
        config: for a state dict: a CLIPConfig or SiglipConfig, one of open_clip's names ("ViT-B-32"), or a
            configuration in its fields.
        quick_gelu: whether the towers use QuickGELU.
        vision_cfg, text_cfg: fields that replace what was found or that it cannot find, e.g. {"head_width": 64} and
            {"heads": 8}.

    Raises:
        TypeError: neither a known model nor a state dict.
        ValueError: something is missing and no argument gives it, or contradicts the shapes, or the model computes
            what a CLIP cannot.
    """
    return _resolve(model_or_state_dict, src, config, quick_gelu, vision_cfg, text_cfg)[1]


def _resolve(
    source: nn.Module | Mapping[str, Tensor],
    src: str,
    config: Any,
    quick_gelu: bool | None,
    vision_cfg: Mapping[str, Any] | None,
    text_cfg: Mapping[str, Any] | None,
) -> tuple[ConvertedState, dict[str, Any]]:
    """Return the canonical state dict and the arguments of its model."""
    given = {"vision": dict(vision_cfg or {}), "text": dict(text_cfg or {})}
    if isinstance(source, nn.Module):
        facts = facts_of_model(source)
        if facts is None:
            raise TypeError(
                f"clip_config: {type(source).__module__}.{type(source).__name__} is not a CLIP of transformers or "
                "open_clip that mmfast knows; pass its state dict with config="
            )
        state = to_open_clip(source.state_dict(), src)
    else:
        state = to_open_clip(source, src)
        facts = facts_of_transformers(config) if hasattr(config, "text_config") else None
    if facts is None and config is not None:
        found = _named(config, state)
    else:
        facts = facts_of_state(state, given) if facts is None else facts
        if "head_width" in given["vision"]:
            facts["vision"]["head_width"] = given["vision"]["head_width"]
        if "heads" in given["text"]:
            facts["text"] = {**facts["text"], "head_width": None, "num_heads": given["text"]["heads"]}
        if "image_size" in given["vision"]:
            facts["vision"]["img_size"] = given["vision"]["image_size"]
        if quick_gelu is not None:
            for part in ("vision", "text"):
                known = facts[part].get("act_layer")
                plain = known if known == "gelu_tanh" else "gelu"
                facts[part]["act_layer"] = "quick_gelu" if quick_gelu else plain
        found = infer_clip(state, facts)
    for part, fields in given.items():
        found[f"{part}_cfg"] = {**found[f"{part}_cfg"], **fields}
    if quick_gelu is not None and (quick_gelu or "quick_gelu" in found):
        found["quick_gelu"] = quick_gelu
    return state, found


def _named(config: Any, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """A configuration in open_clip's fields, or the one that has this name, with the scalars and names of `state`."""
    if isinstance(config, str):
        from ..models._clip_config import clip_config as named

        config = named(config)
    if not isinstance(config, Mapping) or not {"embed_dim", "vision_cfg", "text_cfg"} <= set(config):
        raise ValueError(
            "clip_config: config must be a CLIPConfig or SiglipConfig, a name of open_clip, or a mapping with "
            f"embed_dim, vision_cfg and text_cfg, got {type(config).__name__}"
        )
    own = ("init_logit_bias", "nonscalar_logit_scale", "custom_text")
    return {key: value for key, value in config.items() if key not in own} | shape_of_scalars(state)


def clip_from(
    model: nn.Module | Mapping[str, Tensor],
    src: str = "auto",
    *,
    config: Any = None,
    quick_gelu: bool | None = None,
    vision_cfg: Mapping[str, Any] | None = None,
    text_cfg: Mapping[str, Any] | None = None,
) -> CLIP:
    """Build a `mmfast.models.CLIP` that computes what a peer's model computes, with a copy of its weights.

    | peer | equals |
    |---|---|
    | transformers CLIPModel, SiglipModel | `encode_image` is its pooled and projected image features, `encode_text` the text's |
    | open_clip CLIP, CustomTextCLIP | `encode_image`, `encode_text`, `forward` |

    The new model is on the peer's device, in its dtype and mode (train or eval). transformers' attention dropout, 0 in
    every published config, is left out.

    Args:
        model: the peer's model, or a state dict with what `clip_config` asks for.
        src, config, quick_gelu, vision_cfg, text_cfg: as in `clip_config`.

    Raises:
        TypeError: the model's class is not known.
        ValueError: the model computes something that a CLIP cannot; see `to_open_clip` and `clip_config`.
    """  # noqa: E501  a table's row is a line
    from ..models import CLIP

    state, arguments = _resolve(model, src, config, quick_gelu, vision_cfg, text_cfg)
    weight = state[next(key for key in state if key.endswith("token_embedding.weight"))]
    clip = CLIP(**arguments, device=weight.device, dtype=weight.dtype)
    clip.load_state_dict(state, strict=True)
    return clip.train(model.training) if isinstance(model, nn.Module) else clip.eval()
