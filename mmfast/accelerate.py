"""`accelerate`, `report`, `restore`, `accelerated`: mmfast's ops inside a model that exists already.

A module is swapped by changing its class to a subclass of it, under the same name (`mmfast.integrations`). Its weights,
state_dict keys, hooks and repr stay; so do isinstance, deepcopy, pickling, torch.save and torch.compile. Nothing is
written on the module, so that `restore` has nothing to clean up, and works on a copy or on a model loaded from a file.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from types import ModuleType
from typing import Any, Literal, NamedTuple, TypeVar, get_args

from torch import jit, nn

from .integrations import Accelerated, swaps

__all__ = ["Report", "Row", "accelerate", "accelerated", "report", "restore"]

OPS = ("layer_norm", "add_layer_norm", "attention", "patch_embed", "linear_act")
"""Ops that `accelerate` can put into a model."""

Model = TypeVar("Model", bound=nn.Module)
Status = Literal["accelerated", "fused", "available", "skipped", "native", "unknown"]


class Row(NamedTuple):
    """What `report` says of one module."""

    name: str
    """As in `model.named_modules()`; "" is the model itself. A module in two places is listed under the first."""
    type: str
    """Full name of the module's own class: of the original one, if it is accelerated."""
    status: Status
    """"accelerated"; "fused": its work is done by the op of an accelerated module it is in; "available": `accelerate`
    would swap it; "skipped": of a type that mmfast knows, left alone for a reason; "native": mmfast's own module;
    "unknown": of a type that mmfast has nothing for."""
    op: str
    """The mmfast op that runs, or would run, in place of the module's own code, or ""."""
    reason: str
    """Why the module is not accelerated, or the class it was swapped to, or the block it is part of."""


class Report(tuple[Row, ...]):
    """One `Row` a module, in the order of `model.named_modules()`. Prints as a table, equal blocks in one line."""

    __slots__ = ()

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows as a plain tuple."""
        return tuple(self)

    @property
    def counts(self) -> dict[str, int]:
        """Number of modules of each status that occurs."""
        found = Counter(row.status for row in self)
        return {status: found[status] for status in get_args(Status) if status in found}

    def lines(self) -> list[tuple[str, str, str, str, str, str]]:
        """The table's lines: modules, count, type, status, op, reason.

        Names that differ by an index are one line, and so are, at the end, all modules of a type that mmfast has no
        op for.
        """
        keyed: dict[tuple[str, ...], list[str]] = {}
        others: Counter[str] = Counter()
        for row in self:
            if row.reason == _NO_OP:
                others[row.type] += 1
                continue
            pattern = re.sub(_INDEX, "*", row.name)
            keyed.setdefault((pattern, row.type, row.status, row.op, row.reason), []).append(row.name)
        return [
            *(
                (_span(pattern, names) or "(model)", str(len(names)), kind.rpartition(".")[2], status, op, reason)
                for (pattern, kind, status, op, reason), names in keyed.items()
            ),
            *(("(others)", str(n), kind.rpartition(".")[2], "unknown", "", _NO_OP) for kind, n in others.items()),
        ]

    def summary(self) -> str:
        """One line: how many modules have which status, and which ops run."""
        ops = Counter(row.op for row in self if row.status == "accelerated")
        counts = ", ".join(f"{number} {status}" for status, number in self.counts.items())
        return f"{len(self)} modules: {counts}" + (
            f" ({', '.join(f'{n} {op}' for op, n in ops.items())})" if ops else ""
        )

    def __str__(self) -> str:
        table = [_HEADER, *self.lines()]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table
        ]
        return "\n".join([*text, "", self.summary()])

    __repr__ = __str__

    def __rich__(self) -> Any:
        """The same table for rich's console."""
        from rich.table import Table

        table = Table(*_HEADER, caption=self.summary())
        for line in self.lines():
            table.add_row(*line, style="green" if line[3] == "accelerated" else None)
        return table


_INDEX = r"(?<![^.])\d+(?![^.])|(?<=_)\d+(?=\.)"  # blocks.0.norm1, encoder_layer_0.ln_1
_NO_OP = "mmfast has no op for this type"
_HEADER = ("modules", "count", "type", "status", "op", "reason")


def accelerate(model: Model, ops: str | Iterable[str] = "auto", strict: bool = False) -> Model:
    """Let `model` run mmfast's ops where it has modules that they can replace. In place; returns `model`.

    Swapped are, by op:

    - "layer_norm": the layer norms of torch.nn, timm and open_clip;
    - "add_layer_norm": the blocks of timm's, torchvision's, transformers' and open_clip's ViT and of DINOv2 with and
      without registers, and of both towers of open_clip's and transformers' CLIP and SigLIP: the first residual sum,
      LayerScale, drop path and second norm become one op;
    - "attention": `torch.nn.MultiheadAttention` (calls with need_weights=False), the same libraries' attention, that of
      a text tower without its mask where that is known to be causal, and open_clip's attention poolings, of which
      AttentionPool2d computes the one query that it returns, also on a CPU;
    - "patch_embed": their patch embeddings, with class and register tokens and the position embedding where these are
      added as they are;
    - "linear_act": the first linear layer of their MLPs with its activation, and any torch.nn.Sequential in which a
      linear layer is followed by an activation that the op has.

    Only exact types are swapped, of releases whose code mmfast knows. Weights, state_dict, hooks, mode and devices are
    left as they are. A second call changes nothing. TorchScript cannot compile a swapped module: `restore` first.

    Hooks on a submodule always fire: where an op would stand in for a submodule with a hook, that submodule is called.
    Swapped modules run the original code for calls that the op does not take (attention with dropout or with weights to
    return, another attention implementation than transformers' "sdpa", timm's with fused_attn off), and for CPU
    tensors, where PyTorch's own op is what would run, unless a backend is forced.

    Args:
        model: any module, also inside DataParallel, DistributedDataParallel or torch.compile's wrapper.
        ops: "auto" for all, or the names of those wanted, as above.
        strict: raise rather than leave the model, or one of its modules of a known type, as it was.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
        ValueError: an op of that name does not exist; or, if strict, no module is accelerated, or a module of a type
            that mmfast knows had to be skipped. The model is unchanged then.
    """
    _swap("accelerate", model, ops, strict)
    return model


def report(model: nn.Module) -> Report:
    """Return what `accelerate` did to each module of `model`, or would do, or why it would not.

    Raises TypeError if `model` is not a torch.nn.Module.
    """
    _check_model("report", model)
    known, failed = swaps()
    modules = dict(model.named_modules())
    rows = {name: _row(name, module, known, failed) for name, module in modules.items()}
    names = {module: name for name, module in modules.items()}
    for name, module in modules.items():
        if not isinstance(module, Accelerated):
            continue
        reason = module.refuses(module)
        if reason:
            rows[name] = rows[name]._replace(reason=f"{rows[name].reason}, which fuses nothing now: {reason}")
            continue
        for path in module.parts(module):
            part = _part(module, path)
            if part is not None and not isinstance(part, nn.Identity):
                row = rows[names[part]]
                rows[row.name] = row._replace(status="fused", op=module.mmfast_op, reason="part of the module it is in")
    return Report(rows.values())


def restore(model: Model) -> Model:
    """Undo `accelerate`: give each module of `model` its original class again. In place; returns `model`.

    Works on copies and on models loaded from a file too. Raises TypeError if `model` is not a torch.nn.Module.
    """
    _check_model("restore", model)
    for module in list(model.modules()):
        _restore(module)
    return model


@contextmanager
def accelerated(model: Model, ops: str | Iterable[str] = "auto", strict: bool = False) -> Iterator[Model]:
    """`accelerate` within a `with` block. What was accelerated before stays so after it.

    Arguments and errors are those of `accelerate`.
    """
    swapped = _swap("accelerated", model, ops, strict)
    try:
        yield model
    finally:
        for module in swapped:
            _restore(module)


def _swap(caller: str, model: nn.Module, ops: str | Iterable[str], strict: bool) -> list[nn.Module]:
    """Swap what can be swapped, and return those modules."""
    _check_model(caller, model)
    wanted = _check_ops(caller, ops)
    known, failed = swaps()
    modules = dict(model.named_modules())
    rows = [row for row in (_row(name, module, known, failed) for name, module in modules.items()) if row.op in wanted]
    if strict:
        skipped = [f"{row.name or '(model)'}: {row.reason}" for row in rows if row.status == "skipped"]
        if skipped:
            raise ValueError(f"{caller}: strict=True, but {len(skipped)} modules are skipped: {'; '.join(skipped)}")
        if not rows:
            raise ValueError(
                f"{caller}: strict=True, but {type(model).__name__} has nothing to run any of {', '.join(wanted)} in"
            )
    swapped = [modules[row.name] for row in rows if row.status == "available"]
    for module in swapped:
        module.__class__ = known[type(module)]
    return swapped


def _row(name: str, module: nn.Module, known: dict[type, type[Accelerated]], failed: dict[str, str]) -> Row:
    cls = type(module)
    full_name = f"{cls.__module__}.{cls.__qualname__}"
    if isinstance(module, Accelerated):
        original = module.mmfast_original
        return Row(name, f"{original.__module__}.{original.__qualname__}", "accelerated", module.mmfast_op, full_name)
    if cls.__module__.partition(".")[0] == "mmfast":
        return Row(name, full_name, "native", "", "mmfast's own")
    if isinstance(module, jit.ScriptModule):
        return Row(name, full_name, "unknown", "", "TorchScript")
    swap = known.get(cls)
    if swap is not None and swap.matches(module):
        own = "its forward is replaced on the instance" if "forward" in module.__dict__ else None
        reason = own or swap.refuses(module)
        return Row(name, full_name, "skipped" if reason else "available", swap.mmfast_op, reason or "")
    base = next((base for base in cls.__mro__ if base in known), None)
    if base is not None and base is not cls and known[base].matches(module):
        return Row(name, full_name, "unknown", "", f"derives from {base.__name__}; only exact types are swapped")
    library = next((why for loaded, why in failed.items() if cls.__module__ == loaded), None)
    return Row(name, full_name, "unknown", "", library or _NO_OP)


def _part(module: nn.Module, path: str) -> nn.Module | None:
    """The submodule of this path, or None where it is missing."""
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _restore(module: nn.Module) -> None:
    if isinstance(module, Accelerated):
        module.__class__ = _original(type(module))


def _original(cls: type) -> type:
    """The class that an accelerated class stands in for, or `cls` itself, as it was before.

    A class that torch made for one module after it was accelerated (a parametrization, fully_shard) derives from the
    accelerated class; then its bases are replaced.
    """
    if not issubclass(cls, Accelerated):
        return cls
    if "mmfast_original" in cls.__dict__:
        return cls.mmfast_original
    members = {key: value for key, value in cls.__dict__.items() if key not in ("__dict__", "__weakref__")}
    return type(cls.__name__, tuple(_original(base) for base in cls.__bases__), members)


def _check_model(caller: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be a torch.nn.Module, got {type(model).__name__}")


def _check_ops(caller: str, ops: str | Iterable[str]) -> tuple[str, ...]:
    if isinstance(ops, str) and ops == "auto":
        return OPS
    names = (ops,) if isinstance(ops, str) else tuple(ops)
    unknown = [name for name in names if name not in OPS]
    if unknown or not names:
        wanted = f"'auto' or some of {', '.join(map(repr, OPS))}"
        raise ValueError(f"{caller}: ops must be {wanted}, got {', '.join(map(repr, unknown)) or 'none'}")
    return names


def _span(pattern: str, names: list[str]) -> str:
    """`pattern` with the range of its indices: blocks.0-11.norm1."""
    if len(names) == 1:
        return names[0]
    columns = zip(*(re.findall(_INDEX, name) for name in names), strict=True)
    for column in columns:
        found = sorted({int(index) for index in column})
        runs = [[i for _, i in run] for _, run in groupby(enumerate(found), lambda pair: pair[1] - pair[0])]
        text = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
        pattern = pattern.replace("*", text, 1)
    return pattern


class _Callable(ModuleType):
    """This module, whose name is that of its main function: `mmfast.accelerate(model)` works on both."""

    def __call__(self, model: Model, ops: str | Iterable[str] = "auto", strict: bool = False) -> Model:
        return accelerate(model, ops, strict)


sys.modules[__name__].__class__ = _Callable
