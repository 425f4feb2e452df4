"""Names of whole CLIP and SigLIP models: open_clip's, which are canonical, and those of transformers.

The text tower has a table of its own here. The image tower takes the way that the ViT converters already know, over
timm's names: `transformers_clip` and `open_clip` for CLIP, `transformers_clip` and `timm` for SigLIP.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor

from . import open_clip, timm, transformers_clip
from ._names import ConvertedState, Reasons, Rule, read, restore_aside, shorten, write

TRUNK = "visual.trunk."
VISUAL = "visual."
IMAGE_KEYS = ("vision_model.", "visual_projection.")  # transformers' image tower
CUSTOM = "text."  # what open_clip's CustomTextCLIP puts before the names of its text tower

_LAYER = "encoder.layers.{i}"
_BLOCK = "transformer.resblocks.{i}"

# transformers' text tower behind `text_model.` or nothing; canonical names without `text.`.
TEXT_RULES: tuple[Rule, ...] = (
    Rule("token_embedding.weight", "embeddings.token_embedding.weight"),
    Rule("positional_embedding", "embeddings.position_embedding.weight"),
    Rule(f"{_BLOCK}.ln_1.{{p}}", f"{_LAYER}.layer_norm1.{{p}}"),
    Rule(f"{_BLOCK}.attn.in_proj_{{p}}", tuple(f"{_LAYER}.self_attn.{name}_proj.{{p}}" for name in "qkv")),
    Rule(f"{_BLOCK}.attn.out_proj.{{p}}", f"{_LAYER}.self_attn.out_proj.{{p}}"),
    Rule(f"{_BLOCK}.ln_2.{{p}}", f"{_LAYER}.layer_norm2.{{p}}"),
    Rule(f"{_BLOCK}.mlp.c_fc.{{p}}", f"{_LAYER}.mlp.fc1.{{p}}"),
    Rule(f"{_BLOCK}.mlp.c_proj.{{p}}", f"{_LAYER}.mlp.fc2.{{p}}"),
    Rule("ln_final.{p}", "final_layer_norm.{p}"),
    Rule("text_projection.{p}", "head.{p}"),  # SigLIP: a linear layer with a bias
    Rule("text_projection", "text_projection.weight", bare=True, to=lambda t: t.t(), back=lambda t: t.t()),
    Rule("logit_scale", "logit_scale", bare=True),
    Rule("logit_bias", "logit_bias", bare=True),
)

TEXT_REASONS = Reasons(
    aside={r"embeddings\.position_ids": "a buffer that counts the positions"},
    refused={r"classifier\..*": "a classifier over the mean of the patches, not a text tower"},
)

_SCALARS = ("logit_scale", "logit_bias")


class Family(NamedTuple):
    """What tells CLIP's models in transformers from SigLIP's."""

    name: str  # how its classes' names begin
    text_prefix: str  # how open_clip's text tower of it is prefixed
    scalar: tuple[int, ...]  # shape of logit_scale and logit_bias in transformers
    needs: tuple[str, ...]  # canonical names of a whole model that its class in transformers always has
    trunk: tuple[str, ...]  # the same of its image tower, in timm's names
    lacks: tuple[str, ...]  # names in timm's layout that its image tower never has


CLIP = Family("CLIP", "", (), ("text_projection",), ("cls_token", "norm_pre.weight", "norm.weight"), ("attn_pool.",))
SIGLIP = Family(
    "Siglip",
    CUSTOM,
    (1,),
    ("text_projection.weight", "text_projection.bias", "logit_bias"),
    ("patch_embed.proj.bias", "norm.weight"),
    ("cls_token", "norm_pre.", "head."),
)


@contextmanager
def speaking(who: str) -> Iterator[None]:
    """Let errors of the tables, which serve the ViT converters, name the CLIP converter instead."""
    try:
        yield
    except ValueError as wrong:
        text = str(wrong)
        for name in ("to_timm", "from_timm"):
            text = who + text[len(name) :] if text.startswith(f"{name}(") else text
        for ours, theirs in (("in the ViT layout", "in the CLIP layout"), ("(transformers_clip)", "(transformers)")):
            text = text.replace(ours, theirs)
        raise ValueError(text) from None


def tower_of(state: Mapping[str, Tensor]) -> str | None:
    """Return "text" or "vision" if these are the flat names of one of transformers' towers, else None."""
    towers = {"embeddings.token_embedding.weight": "text", "embeddings.patch_embedding.weight": "vision"}
    return next((tower for key, tower in towers.items() if key in state), None)


def is_transformers(state: Mapping[str, Tensor]) -> bool:
    """Whether the keys are those of CLIP or SigLIP in transformers, of the whole model or of one tower."""
    return tower_of(state) is not None or any(key.startswith(("text_model.", "vision_model.")) for key in state)


def read_transformers(state: Mapping[str, Tensor], *, strict: bool) -> ConvertedState:
    """Return a CLIP or SigLIP of transformers, whole or one tower of it, in open_clip's names."""
    flat = tower_of(state)
    seen = {key: t for key, t in state.items() if flat == "vision" or key.startswith(IMAGE_KEYS)}
    said = {key: t for key, t in state.items() if key not in seen}
    out = ConvertedState(source="transformers")
    out.dialect = "prefixed" if flat is None else "flat"
    parts: list[ConvertedState] = []
    with speaking("to_open_clip"):
        text = read(
            "transformers",
            TEXT_RULES,
            said,
            prefix="" if flat == "text" else "text_model.",
            reasons=TEXT_REASONS,
            strict=strict,
        )
        parts.append(text)
        image = transformers_clip.to_timm(seen, strict=strict) if seen else ConvertedState()
        parts.append(image)
        siglip = _is_siglip(text, image)
        if seen and siglip:
            timm.check(image, "to_open_clip(transformers)")
            images = {TRUNK + key: t for key, t in image.items()}
        elif seen:
            timm.check(image, "to_open_clip(transformers)")
            images = open_clip.from_timm(image, prefix=VISUAL)
    family = SIGLIP if siglip else CLIP
    for name, tensor in text.items():
        scalar = name in _SCALARS
        out[name if scalar else family.text_prefix + name] = tensor.reshape(()) if scalar else tensor
    out.update(images if seen else {})
    for part in parts:
        out.added += [name for name in part.added if name not in ("head.bias", "patch_embed.proj.bias")]
        out.aside |= part.aside
        out.reasons |= part.reasons
    out.facts["family"] = family.name
    return out


def _is_siglip(text: Mapping[str, Tensor], image: Mapping[str, Tensor]) -> bool:
    """Tell the family from the canonical names of the text tower or, without one, from timm's of the image tower."""
    if "token_embedding.weight" in text:
        return "text_projection.weight" in text
    return bool(image) and "norm_pre.weight" not in image


def split_text(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return (text tower and logit scalars without `text.`, image tower) of a state in open_clip's names."""
    image = {key: t for key, t in state.items() if key.startswith(VISUAL)}
    text = {key.removeprefix(CUSTOM): t for key, t in state.items() if key not in image}
    return text, image


def image_to_timm(image: Mapping[str, Tensor], who: str) -> ConvertedState:
    """Return open_clip's image tower `visual.*`, its own ViT or a timm one, in timm's names."""
    if any(key.startswith("visual.layer1.") for key in image):
        raise ValueError(f"{who}: visual.layer1.* is a ResNet, and only a ViT has these names elsewhere")
    module: Any = timm if any(key.startswith(TRUNK) for key in image) else open_clip
    with speaking(who):
        out: ConvertedState = module.to_timm(image)
        timm.check(out, who)
    if "norm_pre.weight" not in out and module is open_clip:
        # A zero bias was added for a ViT without ln_pre: not a name of this tower.
        out.added.append("patch_embed.proj.bias")
    return out


# Class in transformers -> its towers. Those with a projection have no flat names.
CLASSES: dict[str, tuple[str, ...]] = {
    "CLIPModel": ("text", "vision"),
    "CLIPTextModel": ("text",),
    "CLIPTextModelWithProjection": ("text",),
    "CLIPVisionModel": ("vision",),
    "CLIPVisionModelWithProjection": ("vision",),
    "SiglipModel": ("text", "vision"),
    "SiglipTextModel": ("text",),
    "SiglipVisionModel": ("vision",),
}


def write_transformers(
    state: Mapping[str, Tensor], *, model: str | None = None, flat: bool | None = None
) -> dict[str, Tensor]:
    """Return a state in open_clip's names as the state dict of `model`, a class of transformers."""
    who = "from_open_clip(transformers)"
    text, image = split_text(state)
    wants_image = image and "vision" in CLASSES.get(model or "", ("vision",))
    seen = image_to_timm(image, who) if wants_image else ConvertedState()
    towers = (("text",) if "token_embedding.weight" in text else ()) + (("vision",) if image else ())
    if not towers:
        raise ValueError(f"{who}: no token_embedding.weight and no visual.* among {shorten(state, 4)}")
    family = SIGLIP if _is_siglip(text, seen) else CLIP
    model = model or _class(family, towers, text, seen)
    if model not in CLASSES or not model.startswith(family.name):
        fits = [name for name in CLASSES if name.startswith(family.name)]
        raise ValueError(f"{who}: model must be one of {', '.join(fits)} for these weights, got {model!r}")
    missing = [tower for tower in CLASSES[model] if tower not in towers]
    if missing:
        raise ValueError(f"{who}: {model} has a {missing[0]} tower, and the state dict has none")
    flat = _flat(state, model, flat, who)
    _check(family, model, text, seen, who)
    out: dict[str, Tensor] = {}
    added = list(getattr(state, "added", ()))  # biases that are not there in the layout that was read
    with speaking("from_open_clip"):
        if "text" in CLASSES[model]:
            kept = {k: t.reshape(family.scalar) if k in _SCALARS else t for k, t in text.items() if _has(model, k)}
            said = ConvertedState(kept)
            said.added = added
            out |= write("transformers", TEXT_RULES, said, prefix="" if flat else "text_model.")
        if "vision" in CLASSES[model]:
            wanted = {k: t for k, t in seen.items() if not k.startswith("head.") or _has(model, k)}
            origin = ConvertedState(wanted)
            origin.added = seen.added + added
            out |= transformers_clip.from_timm(origin, prefix="" if flat else "vision_model.")
    return restore_aside(out, state, "transformers") if _same(state, towers, model, flat) else out


def _class(family: Family, towers: tuple[str, ...], text: Mapping[str, Tensor], seen: Mapping[str, Tensor]) -> str:
    """The class with everything that the weights have."""
    if len(towers) == 2:
        return f"{family.name}Model"
    projected = "text_projection" in text if towers == ("text",) else "head.weight" in seen
    return f"{family.name}{towers[0].title()}Model{'WithProjection' if projected else ''}"


def _flat(state: Mapping[str, Tensor], model: str, flat: bool | None, who: str) -> bool:
    possible = len(CLASSES[model]) == 1 and not model.endswith("Projection")
    if flat and not possible:
        raise ValueError(f"{who}: flat must be False for {model}, whose names have a prefix in every version, got True")
    if flat is None:
        flat = isinstance(state, ConvertedState) and state.dialect == "flat" and state.source == "transformers"
    return flat and possible


def _has(model: str, name: str) -> bool:
    """Whether a class has the parameter: towers alone have no logit scalars, and some no projection."""
    if name in _SCALARS:
        return len(CLASSES[model]) == 2
    if name == "text_projection" or name.startswith("head."):
        return len(CLASSES[model]) == 2 or model.endswith("WithProjection")
    return True


def _check(family: Family, model: str, text: Mapping[str, Tensor], seen: ConvertedState, who: str) -> None:
    """Raise ValueError for what the class in transformers always has and for what it cannot compute."""
    whole = len(CLASSES[model]) == 2
    needs: list[str] = []
    if "text" in CLASSES[model]:
        needs += [name for name in family.needs if _has(model, name) and name not in text]
    if "vision" in CLASSES[model]:
        added = set(seen.added)
        needs += [f"{name} (image tower)" for name in family.trunk if name not in seen or name in added]
        if family is CLIP and _has(model, "head.weight") and "head.weight" not in seen:
            needs.append("visual.proj")
        if family is SIGLIP and whole and "attn_pool.latent" not in seen:
            needs.append("attn_pool.latent (image tower)")
        odd = [name for name in seen if name.startswith(family.lacks) and name not in added]
        if odd:
            raise ValueError(f"{who}: {model} cannot have {shorten(odd)} in its image tower")
    if needs:
        raise ValueError(f"{who}: {model} needs {shorten(needs)}, which the state dict has not")
    if family is CLIP and whole and "logit_bias" in text:
        raise ValueError(f"{who}: CLIPModel has no logit_bias, and the state dict has one")


def _same(state: Mapping[str, Tensor], towers: tuple[str, ...], model: str, flat: bool) -> bool:
    """Whether all that was read is written, under the names that were read."""
    origin = state.dialect if isinstance(state, ConvertedState) else None
    return towers == CLASSES[model] and origin == ("flat" if flat else "prefixed")


def write_open_clip(state: Mapping[str, Tensor], *, text_prefix: str | None = None) -> dict[str, Tensor]:
    """Return the state with `text.` before the names of the text tower (CustomTextCLIP), or without it (CLIP)."""
    if text_prefix is None:
        return restore_aside(dict(state), state, "open_clip")
    if text_prefix not in ("", CUSTOM):
        raise ValueError(f"from_open_clip(open_clip): text_prefix must be '' or 'text.', got {text_prefix!r}")
    out: dict[str, Tensor] = {}
    for key, tensor in state.items():
        text = not key.startswith(VISUAL) and key not in _SCALARS
        out[text_prefix + key.removeprefix(CUSTOM) if text else key] = tensor
    return restore_aside(out, state, "open_clip")
