"""Read and write a foreign layout by a table of names.

A `Rule` pairs one canonical name with the foreign name, or names, that it comes from. In both, `{i}` stands for
the block's number and `{p}` for `weight` or `bias`. Several foreign names are parts that are stacked along the
first dimension in the order given (q, k, v). The same table serves both directions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["ConvertedState", "Rule", "read", "write"]

Reshape = Callable[[Tensor], Tensor]

# What wraps every key of a state dict taken from DistributedDataParallel or torch.compile.
WRAPPERS = ("module.", "_orig_mod.")


class ConvertedState(dict[str, Tensor]):
    """A state dict in the canonical layout that remembers where it came from.

    It is a plain dict of tensors to `load_state_dict`; save `dict(state)`, which needs no mmfast to load. Beside them:
    `source`: the layout that was read.
    `aside`: foreign keys (by their full foreign name) that the canonical model has no place for, with `reasons`.
    `added`: canonical or foreign names filled with zeros because the source had none there (a bias).
    `facts`: constructor arguments of the model that the layout implies and shapes cannot tell.
    `prefix`, `dialect`: the variant of the names that was read, which `from_timm` writes back.
    """

    def __init__(self, tensors: Mapping[str, Tensor] | None = None, source: str = "timm") -> None:
        super().__init__(tensors or {})
        self.source = source
        self.aside: dict[str, Tensor] = {}
        self.reasons: dict[str, str] = {}
        self.added: list[str] = []
        self.facts: dict[str, Any] = {}
        self.prefix = ""
        self.dialect: str | None = None

    @classmethod
    def like(cls, origin: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> ConvertedState:
        """Return `tensors` with what `origin` remembers, if it is one of these."""
        new = cls(tensors)
        if isinstance(origin, ConvertedState):
            new.__dict__.update(origin.__dict__)
        return new


class Rule(NamedTuple):
    """One canonical name and the foreign name or names it is made of."""

    timm: str
    foreign: str | tuple[str, ...]
    dialect: str | None = None  # None: all variants of the layout have this name
    to: Reshape | None = None  # foreign tensor -> canonical tensor; a view, so that nothing is copied
    back: Reshape | None = None  # its inverse
    bare: bool = False  # stands outside the prefix of the backbone: a head

    @property
    def parts(self) -> tuple[str, ...]:
        """The foreign names, also when there is but one."""
        return (self.foreign,) if isinstance(self.foreign, str) else self.foreign


class Reasons(NamedTuple):
    """Foreign names without a canonical one: pattern of the whole key -> why."""

    aside: Mapping[str, str] = {}  # the forward of the canonical model does not need them
    refused: Mapping[str, str] = {}  # the model computes something that the canonical one cannot


@cache
def _pattern(template: str) -> re.Pattern[str]:
    text = re.escape(template).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{p\}", r"(?P<p>weight|bias)")
    return re.compile(text)


def _fill(template: str, groups: Mapping[str, str]) -> str:
    for name, value in groups.items():
        template = template.replace(f"{{{name}}}", value)
    return template


def _match(template: str, key: str) -> dict[str, str] | None:
    if "{" not in template:
        return {} if template == key else None
    found = _pattern(template).fullmatch(key)
    return found.groupdict() if found else None


def _reason(patterns: Mapping[str, str], key: str) -> str | None:
    return next((why for pattern, why in patterns.items() if re.fullmatch(pattern, key)), None)


def checked(state: Mapping[str, Any], who: str) -> dict[str, Tensor]:
    """Return the state as a dict of tensors with the wrappers of DDP and torch.compile taken off its keys."""
    if not isinstance(state, Mapping):
        raise TypeError(f"{who}: state_dict must be a mapping of names to tensors, got {type(state).__name__}")
    if not state:
        raise ValueError(f"{who}: state_dict is empty")
    for key, value in state.items():
        if not isinstance(value, Tensor):
            hint = f"; pass state_dict[{key!r}]" if isinstance(value, Mapping) else ""
            raise TypeError(f"{who}: state_dict[{key!r}] must be a tensor, got {type(value).__name__}{hint}")
    out = dict(state)
    while wrapper := next((w for w in WRAPPERS if all(key.startswith(w) for key in out)), None):
        out = {key[len(wrapper) :]: value for key, value in out.items()}
    return out


def shorten(names: Iterable[str], most: int = 8) -> str:
    """Join names for a message; past `most` only their number."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def read(
    source: str,
    rules: Sequence[Rule],
    state: Mapping[str, Tensor],
    *,
    prefix: str = "",
    outside: str | None = None,
    reasons: Reasons = Reasons(),  # noqa: B008  an immutable tuple
    strict: bool = True,
) -> ConvertedState:
    """Rename `state` by `rules`; see `ConvertedState` for what happens to the rest.

    prefix: what the keys of this model begin with. Keys without it belong to another part of a larger model: they
    are kept aside for the reason `outside`, or are unknown if that is None.
    Raises ValueError for a key that is refused or unknown (with strict=False it is kept aside instead), for parts
    that are missing, and for two keys with the same canonical name.
    """
    who = f"to_timm({source})"
    out = ConvertedState(source=source)
    out.prefix = prefix
    slots: dict[str, _Slot] = {}
    unknown: list[str] = []
    refused: list[str] = []
    for full, tensor in state.items():
        hit = _lookup(rules, full, prefix)
        if hit is not None:
            rule, index, groups = hit
            out.dialect = out.dialect or rule.dialect
            name = _fill(rule.timm, groups)
            slot = slots.setdefault(name, _Slot(rule, groups, {}))
            if slot.rule is not rule or index in slot.found:
                raise ValueError(f"{who}: {full} and {next(iter(slot.found.values()))[0]} are both {name}")
            slot.found[index] = (full, tensor)
            continue
        inside = full.startswith(prefix)
        key = full[len(prefix) :] if inside else full
        no = _reason(reasons.refused, key)
        why = None if no else _reason(reasons.aside, key) or (None if inside else outside)
        if no:
            refused.append(f"{full} ({no})")
        elif not why:
            unknown.append(full)
        out.aside[full] = tensor
        out.reasons[full] = why or no or "unknown name"
    if strict and refused:
        raise ValueError(f"{who}: not representable in the ViT layout: {shorten(refused)}")
    if strict and unknown:
        raise ValueError(
            f"{who}: {len(unknown)} unknown key(s): {shorten(sorted(unknown))}. strict=False keeps them aside"
        )
    for name, slot in slots.items():
        if len(slot.rule.parts) == 1:
            tensor = slot.found[0][1]
            out[name] = slot.rule.to(tensor) if slot.rule.to else tensor
        else:
            out[name] = _stack(who, name, slot, prefix, out.added)
    return out


class _Slot(NamedTuple):
    """What was found for one canonical name."""

    rule: Rule
    groups: dict[str, str]
    found: dict[int, tuple[str, Tensor]]  # part -> its foreign name and tensor


def _lookup(rules: Sequence[Rule], full: str, prefix: str) -> tuple[Rule, int, dict[str, str]] | None:
    inside = full.startswith(prefix)
    for rule in rules:
        if not (rule.bare or inside):
            continue
        key = full if rule.bare else full[len(prefix) :]
        for index, template in enumerate(rule.parts):
            groups = _match(template, key)
            if groups is not None:
                return rule, index, groups
    return None


def _stack(who: str, name: str, slot: _Slot, prefix: str, added: list[str]) -> Tensor:
    """Stack the parts along the first dimension; a bias that is not there is zero."""
    some = next(iter(slot.found.values()))[1]
    tensors = []
    for index, template in enumerate(slot.rule.parts):
        full = prefix + _fill(template, slot.groups)
        if index in slot.found:
            tensor = slot.found[index][1]
            if (tensor.dtype, tensor.device) != (some.dtype, some.device):
                raise ValueError(
                    f"{who}: the parts of {name} must have one dtype and device, "
                    f"got {some.dtype} on {some.device} and {tensor.dtype} on {tensor.device}"
                )
            if tensor.shape != some.shape:
                raise ValueError(
                    f"{who}: {full} must have the shape of the other parts of {name}, "
                    f"{tuple(some.shape)}, got {tuple(tensor.shape)}"
                )
        elif name.endswith("bias"):
            tensor = torch.zeros_like(some)
            added.append(full)
        else:
            raise ValueError(f"{who}: {full} is missing, which is a part of {name}")
        tensors.append(tensor.detach())
    return torch.cat(tensors)


def write(
    target: str,
    rules: Sequence[Rule],
    state: Mapping[str, Tensor],
    *,
    dialect: str | None = None,
    prefix: str = "",
) -> dict[str, Tensor]:
    """Rename canonical `state` into the layout `target`: views of the same tensors, nothing is copied.

    dialect: which variant of the names to write.
    Raises ValueError naming the keys that the target has no name for.
    """
    who = f"from_timm({target})"
    added = set(getattr(state, "added", ()))
    out: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, tensor in state.items():
        rule, groups = _reverse(rules, name, dialect)
        if rule is None:
            unknown.append(name)
            continue
        front = "" if rule.bare else prefix
        if len(rule.parts) == 1:
            out[front + _fill(rule.parts[0], groups)] = rule.back(tensor) if rule.back else tensor
            continue
        if tensor.shape[0] % len(rule.parts):
            raise ValueError(
                f"{who}: {name} must have {len(rule.parts)} equal parts in its first dimension, "
                f"got shape {tuple(tensor.shape)}"
            )
        for template, part in zip(rule.parts, tensor.chunk(len(rule.parts)), strict=True):
            full = front + _fill(template, groups)
            if full not in added:
                out[full] = part
    if unknown:
        raise ValueError(f"{who}: {target} has no name for {len(unknown)} key(s): {shorten(sorted(unknown))}")
    return out


def _reverse(rules: Sequence[Rule], name: str, dialect: str | None) -> tuple[Rule | None, dict[str, str]]:
    for wanted in (dialect, None):  # a dialect's own name goes before the common one
        for rule in rules:
            groups = _match(rule.timm, name) if rule.dialect == wanted else None
            if groups is not None:
                return rule, groups
    return None, {}


def restore_aside(out: dict[str, Tensor], state: Mapping[str, Tensor], target: str) -> dict[str, Tensor]:
    """Put back what `read` kept aside, if the target is the layout that was read."""
    if isinstance(state, ConvertedState) and state.source == target:
        for key, tensor in state.aside.items():
            out.setdefault(key, tensor)
    return out


def zero_bias(state: Mapping[str, Tensor], name: str, who: str) -> None:
    """Raise unless the bias is known to be zero, since the target has no place for one."""
    tensor = state[name]
    if name in getattr(state, "added", ()):
        return
    if tensor.is_meta or bool(tensor.any()):
        raise ValueError(f"{who}: {name} must be zero: the target has no such bias")
