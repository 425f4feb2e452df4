"""open_clip's own names of whole CLIP models: what is known, what is kept aside, and whose shapes must agree."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from ._clip_names import CUSTOM, VISUAL, image_to_timm, speaking, split_text
from ._names import ConvertedState, Reasons, Rule, read, shorten
from .timm import _unify as unify

_BLOCK = "transformer.resblocks.{i}"

# Canonical name of the text tower, without `text.` -> its shape, as in timm.SHAPES. V vocabulary, N positions, W width,
# H hidden width of the MLP, E width of the embedding that images and texts share.
TEXT_SHAPES: dict[str, tuple[int | str, ...]] = {
    "token_embedding.weight": ("V", "W"),
    "positional_embedding": ("N", "W"),
    f"{_BLOCK}.ln_1.{{p}}": ("W",),
    f"{_BLOCK}.attn.in_proj_weight": ("3W", "W"),
    f"{_BLOCK}.attn.in_proj_bias": ("3W",),
    f"{_BLOCK}.attn.out_proj.weight": ("W", "W"),
    f"{_BLOCK}.attn.out_proj.bias": ("W",),
    f"{_BLOCK}.ls_1.gamma": ("W",),
    f"{_BLOCK}.ln_2.{{p}}": ("W",),
    f"{_BLOCK}.mlp.c_fc.weight": ("H", "W"),
    f"{_BLOCK}.mlp.c_fc.bias": ("H",),
    f"{_BLOCK}.mlp.c_proj.weight": ("W", "H"),
    f"{_BLOCK}.mlp.c_proj.bias": ("W",),
    f"{_BLOCK}.ls_2.gamma": ("W",),
    "ln_final.{p}": ("W",),
    "text_projection": ("W", "E"),
    "text_projection.weight": ("E", "W"),
    "text_projection.bias": ("E",),
}

_STATISTICS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_RESNET = (
    *(f"visual.conv{n}.weight" for n in (1, 2, 3)),
    *(f"visual.bn{n}.{kind}" for n in (1, 2, 3) for kind in _STATISTICS),
    *(f"visual.layer{s}.{{i}}.conv{n}.weight" for s in (1, 2, 3, 4) for n in (1, 2, 3)),
    *(f"visual.layer{s}.{{i}}.bn{n}.{kind}" for s in (1, 2, 3, 4) for n in (1, 2, 3) for kind in _STATISTICS),
    *(f"visual.layer{s}.{{i}}.downsample.0.weight" for s in (1, 2, 3, 4)),
    *(f"visual.layer{s}.{{i}}.downsample.1.{kind}" for s in (1, 2, 3, 4) for kind in _STATISTICS),
    "visual.attnpool.positional_embedding",
    *(f"visual.attnpool.{name}_proj.{{p}}" for name in "qkvc"),
)
_SCALARS = ("logit_scale", "logit_bias")

# For `read`: a name that is canonical stays as it is.
_KNOWN = tuple(
    Rule(name, name) for name in (*TEXT_SHAPES, *(CUSTOM + name for name in TEXT_SHAPES), *_RESNET, *_SCALARS)
)

_SIZES = "a size that OpenAI's files carry, which the shapes tell too"
REASONS = Reasons(
    aside={
        "input_resolution": _SIZES,
        "context_length": _SIZES,
        "vocab_size": _SIZES,
        r"(text\.)?attn_mask": "the causal mask, which the model makes",
    },
    refused={
        r"(text\.)?cls_emb|text_decoder\..*": "CoCa's text decoder and class token",
        r"text\.transformer\.(embeddings|encoder|layer)\..*|text\.(pooler|proj)\..*": "a Hugging Face text encoder",
        r"(text\.)?transformer\.resblocks\.\d+\.(ln_attn|attn\.ln|attn\.(q|k)_norm|mlp\.ln)\..*": "a custom text block",
        r"(text\.)?transformer\.resblocks\.\d+\.attn\.(logit_scale|head_scale)": "scaled attention of a custom block",
    },
)


def is_open_clip(state: Mapping[str, Tensor]) -> bool:
    """Whether the keys are of open_clip's or OpenAI's CLIP, or of its text tower."""
    return any(key.removeprefix(CUSTOM) == "token_embedding.weight" or key.startswith(VISUAL) for key in state)


def read_open_clip(state: Mapping[str, Tensor], *, strict: bool) -> ConvertedState:
    """Return the state without what is kept aside; every name is known, or an error says which is not."""
    resnet = "visual.layer1.0.conv1.weight" in state
    # A ViT's names are known to the ViT converters, which refuse what they do not know.
    ready = {} if resnet else {key: t for key, t in state.items() if key.startswith(VISUAL)}
    with speaking("to_open_clip"):
        out = read(
            "open_clip",
            _KNOWN,
            {key: t for key, t in state.items() if key not in ready},
            reasons=REASONS,
            strict=strict,
        )
    if ready and strict:
        image_to_timm(ready, "to_open_clip(open_clip)")
    out.update(ready)
    out.facts["openai"] = all(name in out.aside for name in ("input_resolution", "context_length", "vocab_size"))
    return out


def check(state: Mapping[str, Tensor], who: str) -> dict[str, int]:
    """Check the shapes of the text tower against each other.

    Returns the size of each letter of `TEXT_SHAPES`, and `layers`.
    Raises ValueError naming the tensor, the expected and the given shape, or the layers that are missing.
    """
    text, _ = split_text(state)
    sizes: dict[str, int] = {}
    layers: dict[int, set[str]] = {}
    for name, tensor in text.items():
        if name in _SCALARS:
            if tensor.numel() != 1:
                raise ValueError(f"{who}: {name} must have one element, got shape {tuple(tensor.shape)}")
            continue
        template = re.sub(r"(?<=^transformer\.resblocks\.)\d+", "{i}", name)
        if template != name:
            number, rest = name.split(".", 3)[2:]
            layers.setdefault(int(number), set()).add(rest)
        shape = TEXT_SHAPES.get(template) or TEXT_SHAPES.get(re.sub(r"(weight|bias)$", "{p}", template))
        if shape is not None:
            unify(who, name, shape, tuple(tensor.shape), sizes)
    if layers and sorted(layers) != list(range(len(layers))):
        raise ValueError(f"{who}: transformer.resblocks must be numbered from 0 without a gap, got {sorted(layers)}")
    for index, names in layers.items():
        odd = names ^ layers[0]
        if odd:
            raise ValueError(f"{who}: transformer.resblocks 0 and {index} differ in {shorten(sorted(odd))}")
    sizes["layers"] = len(layers)
    return sizes
