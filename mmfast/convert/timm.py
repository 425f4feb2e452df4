"""timm's VisionTransformer: the canonical layout.

What else is read under this name, beside the wrappers `module.` and `_orig_mod.`:
- `visual.trunk.*` with `visual.head.proj.weight`: the timm tower of an open_clip model (SigLIP, EVA), and `trunk.*`;
- `blocks.i.gamma_1`, `gamma_2`: LayerScale of the DeiT-III and CaiT releases -> `ls1.gamma`, `ls2.gamma`;
- `blocks.i.attn.q_bias`, `v_bias`: EVA and LAVIS -> `attn.qkv.bias` with a zero k bias;
- `dist_token`: DeiT's distillation token is a register that has a position of its own;
- a patch projection saved as a linear layer (D, C*P*P).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._names import ConvertedState, Reasons, Rule, read, restore_aside, shorten, write, zero_bias

NAME = "timm"
FACTS: dict[str, Any] = {}

# Canonical name -> its shape. A letter is a size that is the same wherever it occurs in one state dict, a digit
# before it multiplies it. D width, C channels, P x Q patch, L positions, R registers, A heads * head width, d head
# width, F hidden width of the MLP as fc1 has it and H as fc2 has it (F = 2 H where a gate is packed), K classes.
SHAPES: dict[str, tuple[int | str, ...]] = {
    "cls_token": (1, 1, "D"),
    "reg_token": (1, "R", "D"),
    "pos_embed": (1, "L", "D"),
    "patch_embed.proj.weight": ("D", "C", "P", "Q"),
    "patch_embed.proj.bias": ("D",),
    "patch_embed.norm_in.{p}": ("CPQ",),
    "patch_embed.norm.{p}": ("D",),
    "norm_pre.{p}": ("D",),
    "blocks.{i}.norm1.{p}": ("D",),
    "blocks.{i}.norm2.{p}": ("D",),
    "blocks.{i}.attn.qkv.weight": ("3A", "D"),
    "blocks.{i}.attn.qkv.bias": ("3A",),
    "blocks.{i}.attn.q_norm.{p}": ("d",),
    "blocks.{i}.attn.k_norm.{p}": ("d",),
    "blocks.{i}.attn.norm.{p}": ("A",),
    "blocks.{i}.attn.gate.weight": ("A", "D"),
    "blocks.{i}.attn.gate.bias": ("A",),
    "blocks.{i}.attn.proj.weight": ("D", "A"),
    "blocks.{i}.attn.proj.bias": ("D",),
    "blocks.{i}.ls1.gamma": ("D",),
    "blocks.{i}.ls2.gamma": ("D",),
    "blocks.{i}.mlp.fc1.weight": ("F", "D"),
    "blocks.{i}.mlp.fc1.bias": ("F",),
    "blocks.{i}.mlp.fc1_g.weight": ("H", "D"),
    "blocks.{i}.mlp.fc1_g.bias": ("H",),
    "blocks.{i}.mlp.fc1_x.weight": ("H", "D"),
    "blocks.{i}.mlp.fc1_x.bias": ("H",),
    "blocks.{i}.mlp.norm.{p}": ("H",),
    "blocks.{i}.mlp.fc2.weight": ("D", "H"),
    "blocks.{i}.mlp.fc2.bias": ("D",),
    "norm.{p}": ("D",),
    "fc_norm.{p}": ("D",),
    "attn_pool.latent": (1, 1, "D"),
    "attn_pool.q.weight": ("D", "D"),
    "attn_pool.q.bias": ("D",),
    "attn_pool.kv.weight": ("2D", "D"),
    "attn_pool.kv.bias": ("2D",),
    "attn_pool.proj.weight": ("D", "D"),
    "attn_pool.proj.bias": ("D",),
    "attn_pool.norm.{p}": ("D",),
    "attn_pool.mlp.fc1.weight": ("M", "D"),
    "attn_pool.mlp.fc1.bias": ("M",),
    "attn_pool.mlp.fc2.weight": ("D", "M"),
    "attn_pool.mlp.fc2.bias": ("D",),
    "head.weight": ("K", "D"),
    "head.bias": ("K",),
}

RULES: tuple[Rule, ...] = (
    *(Rule(name, name) for name in SHAPES),
    Rule("blocks.{i}.ls1.gamma", "blocks.{i}.gamma_1", "gamma"),
    Rule("blocks.{i}.ls2.gamma", "blocks.{i}.gamma_2", "gamma"),
    Rule(
        "blocks.{i}.attn.qkv.bias",
        ("blocks.{i}.attn.q_bias", "blocks.{i}.attn.k_bias", "blocks.{i}.attn.v_bias"),
        "q_bias",
    ),
    Rule("reg_token", "dist_token", "distilled"),
    Rule("head.weight", "visual.head.proj.weight", "open_clip", bare=True),
    Rule("head.bias", "visual.head.proj.bias", "open_clip", bare=True),
)

REASONS = Reasons(
    aside={
        r"pre_logits\.fc\.(weight|bias)": "the representation layer of old ViT releases, which timm no longer has",
    },
    refused={
        r"head_dist\.(weight|bias)": "the logits are the mean of two heads",
        r"visual\.head\..*": "a head after a timm tower that is not one linear layer",
        r"attn_pool\..*": "this attention pool is not timm's AttentionPoolLatent with a query projection",
    },
)

_PREFIXES = ("visual.trunk.", "trunk.", "")


def detect(keys: Sequence[str]) -> bool:
    """Whether the keys are of this layout; the others, which share names with it, are asked first."""
    return any(re.search(r"(^|\.)(patch_embed\.proj\.weight|blocks\.\d+\.attn\.(qkv|proj)\.weight)$", k) for k in keys)


def to_timm(state: Mapping[str, Tensor], *, strict: bool = True) -> ConvertedState:
    """Read timm's own names and the older ones listed above."""
    prefix = next(p for p in _PREFIXES if any(k.startswith(f"{p}patch_embed.") for k in state) or p == "")
    outside = "not the image tower" if prefix.startswith("visual.") else None
    out = read(NAME, RULES, state, prefix=prefix, outside=outside, reasons=REASONS, strict=strict)
    weight = out.get("patch_embed.proj.weight")
    if weight is not None and weight.dim() == 2:
        out["patch_embed.proj.weight"] = _conv_weight(weight)
    if out.dialect == "distilled":
        out.facts["no_embed_class"] = False
    if prefix and "head.weight" in out and "head.bias" not in out:
        out["head.bias"] = zeros(out["head.weight"].shape[0], out["head.weight"])
        out.added.append("head.bias")
    return out


def from_timm(
    state: Mapping[str, Tensor], *, prefix: str | None = None, dialect: str | None = None
) -> dict[str, Tensor]:
    """Write timm's names: those the state was read from, or plain ones."""
    if isinstance(state, ConvertedState) and state.source == NAME:
        prefix = state.prefix if prefix is None else prefix
        dialect = dialect or state.dialect
        kept = {key: value for key, value in state.items() if key not in state.added}
        state = ConvertedState.like(state, kept)
    out = write(NAME, RULES, state, dialect=dialect, prefix=prefix or "")
    return restore_aside(out, state, NAME)


def zeros(size: int, like: Tensor) -> Tensor:
    """Zeros of `size` elements with the dtype and device of `like`."""
    return torch.zeros(size, dtype=like.dtype, device=like.device)


def add_bias(state: ConvertedState, name: str) -> None:
    """Add a zero bias that the canonical model has and the source has not, beside the weight of the same layer."""
    weight = state.get(name.replace("bias", "weight"))
    if weight is not None and name not in state:
        state[name] = zeros(weight.shape[0], weight)
        state.added.append(name)


def drop_bias(state: dict[str, Tensor], source: Mapping[str, Tensor], name: str, who: str) -> None:
    """Take out a zero bias that the target has no place for; raise ValueError if it is not zero."""
    if name in state:
        zero_bias(source, name, who)
        del state[name]


def _conv_weight(weight: Tensor) -> Tensor:
    side = math.isqrt(weight.shape[1] // 3)
    if 3 * side * side != weight.shape[1]:
        raise ValueError(
            f"to_timm(timm): patch_embed.proj.weight of a linear layer must be (D, 3*P*P), got {tuple(weight.shape)}"
        )
    return weight.reshape(weight.shape[0], 3, side, side)


def check(state: Mapping[str, Tensor], who: str) -> dict[str, int]:
    """Check the shapes of a canonical state dict against each other and return the size of each letter.

    Raises ValueError naming the tensor, its expected shape and the one it has, a gap in the numbers of the blocks,
    or a block that lacks a tensor that block 0 has. Names that are not canonical are left alone.
    """
    sizes: dict[str, int] = {}
    blocks: dict[int, set[str]] = {}
    for name, tensor in state.items():
        template = re.sub(r"(?<=^blocks\.)\d+", "{i}", name)
        if template != name:
            number, rest = re.fullmatch(r"blocks\.(\d+)\.(.*)", name).groups()  # type: ignore[union-attr]
            blocks.setdefault(int(number), set()).add(rest)
        shape = SHAPES.get(template) or SHAPES.get(re.sub(r"(weight|bias)$", "{p}", template))
        if shape is not None:
            _unify(who, name, shape, tuple(tensor.shape), sizes)
    if sizes.get("F", sizes.get("H")) not in (sizes.get("H"), 2 * sizes.get("H", 0)):
        raise ValueError(
            f"{who}: blocks.*.mlp.fc1.weight must have as many rows as fc2.weight has columns ({sizes['H']}), "
            f"or twice as many (a packed gate), got {sizes['F']}"
        )
    if blocks and sorted(blocks) != list(range(len(blocks))):
        raise ValueError(f"{who}: blocks must be numbered from 0 without a gap, got {sorted(blocks)}")
    for number, names in blocks.items():
        odd = names ^ blocks[0]
        if odd:
            raise ValueError(f"{who}: blocks 0 and {number} differ in {shorten(sorted(odd))}")
    return sizes


def _unify(who: str, name: str, shape: tuple[int | str, ...], got: tuple[int, ...], sizes: dict[str, int]) -> None:
    """Bind the letters of `shape` to the sizes in `got`, or raise where one has another size already."""
    expected: list[int | str] = []
    fits = len(shape) == len(got)
    for want, have in zip(shape, got, strict=False):
        if isinstance(want, int):
            expected.append(want)
            fits &= want == have
            continue
        if want == "CPQ":
            known = math.prod(sizes[c] for c in want) if all(c in sizes for c in want) else have
            expected.append(known)
            fits &= known == have
            continue
        factor, letter = (int(want[0]), want[1:]) if want[0].isdigit() else (1, want)
        size = sizes.setdefault(letter, have // factor) if fits else sizes.get(letter)
        expected.append(want if size is None else factor * size)
        fits &= size is not None and factor * size == have
    if not fits:
        expected += shape[len(expected) :]
        text = ", ".join(map(str, expected))
        raise ValueError(f"{who}: {name} must have shape ({text}), got {got}")
