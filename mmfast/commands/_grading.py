"""How `verify` grades one call of an op: against its float64 reference, beside PyTorch's own in the same dtype."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import backends, ops, reference

# Below these, errors are rounding of a single value, where a ratio means nothing.
ATOL = {torch.float32: 1e-6, torch.float16: 2e-4, torch.bfloat16: 2e-3}

WITHOUT_PEER = ("clip_loss", "siglip_loss")
"""Ops that PyTorch users write out themselves: PyTorch's own is the formula in the case's dtype, as under autocast."""


class Grade(NamedTuple):
    """The worst tensor among the outputs and gradients of one call."""

    op: str
    dtype: str
    case: str
    backend: str
    tensor: str
    error: float
    torch_error: float
    ratio: float
    passed: bool
    note: str  # why it failed, or why another backend served


def grade(op: str, case: Any, dtype: torch.dtype, backend: str) -> Grade:
    """Run one case through the op twice, through PyTorch's own op, and through the reference in float64.

    `backend` is forced; where it cannot serve the case, the backend that users get is graded and the note says so.
    For `backend="torch"` the other side is the reference formula in the case's own dtype.
    """
    function, formula = getattr(ops, op), getattr(reference, op)
    note = ""
    try:
        with backends.backend(backend), poisoned():
            found = outputs_and_gradients(function, case)
            again = outputs_and_gradients(function, case)
    except backends.BackendError as refused:
        note, backend = str(refused).partition("cannot serve: ")[2], "torch"
        with backends.backend(None), poisoned():
            found = outputs_and_gradients(function, case)
            again = outputs_and_gradients(function, case)
    truth = outputs_and_gradients(formula, case, torch.float64)
    if backend == "torch" or op in WITHOUT_PEER:
        peer = outputs_and_gradients(formula, case)
    else:
        with backends.backend("torch"):
            peer = outputs_and_gradients(function, case)
    worst = max(
        (_tensor_grade(name, found[name], peer[name], true, ATOL[dtype]) for name, true in truth.items()),
        key=lambda entry: (not entry[3], entry[1] / (2 * entry[2] + ATOL[dtype])),
    )
    name, ours, theirs, passed = worst
    problems = [] if passed else ["error above 2x PyTorch's + atol"]
    problems += [f"{name} differs between two runs" for name in found if not _same_bits(found[name], again[name])]
    problems += [f"{name} has another shape" for name, true in truth.items() if found[name].shape != true.shape]
    return Grade(
        op=op,
        dtype=str(dtype).removeprefix("torch."),
        case=case.label,
        backend=backend,
        tensor=name,
        error=ours,
        torch_error=theirs,
        ratio=ours / theirs if theirs else float(ours > 0),
        passed=not problems,
        note="; ".join(problems) or note,
    )


def outputs_and_gradients(fn: Callable[..., Any], case: Any, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Every output of `fn` and the gradient of each floating argument, by name, for fixed random output gradients."""
    bound = inspect.signature(fn).bind(*case.args, **case.kwargs)
    found = pytree.tree_flatten_with_path(dict(bound.arguments))
    leaves = [_leaf(leaf, dtype, _argument(path) not in case.constants) for path, leaf in found[0]]
    arguments = pytree.tree_unflatten(leaves, found[1])
    outputs = fn(**arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    device = outputs[0].device
    generator = torch.Generator(device).manual_seed(1)
    # Values that float16 and bfloat16 represent, so that every dtype is given the same gradient.
    upstream = [torch.randn(y.shape, generator=generator, device=device).bfloat16().half().to(y.dtype) for y in outputs]
    inputs = {
        f"d {_name(path)}": leaf
        for (path, _), leaf in zip(found[0], leaves, strict=True)
        if isinstance(leaf, Tensor) and leaf.requires_grad
    }
    pairs = [(y, g) for y, g in zip(outputs, upstream, strict=True) if y.requires_grad]  # noise has no gradient
    ys, upstream = [y for y, _ in pairs], [g for _, g in pairs]
    inputs = inputs if pairs else {}
    gradients = torch.autograd.grad(ys, list(inputs.values()), upstream) if pairs else ()
    names = ["output"] if len(outputs) == 1 else [f"output {i}" for i in range(len(outputs))]
    return {
        **{name: y.detach() for name, y in zip(names, outputs, strict=True)},
        **dict(zip(inputs, gradients, strict=True)),
    }


def _argument(path: Any) -> str:
    return str(path[0].key)


def _name(path: Any) -> str:
    """An argument's name, with its place in a pair: `scale[1]`."""
    return f"{_argument(path)}{pytree.keystr(path[1:])}"


def _leaf(value: Any, dtype: torch.dtype | None, gradient: bool) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():  # uint8 images, masks: as they are
        return value
    leaf = value.detach().clone(memory_format=torch.preserve_format).to(dtype or value.dtype)
    return leaf.requires_grad_(gradient)


def _tensor_grade(name: str, found: Tensor, peer: Tensor, truth: Tensor, atol: float) -> tuple[str, float, float, bool]:
    if found.shape != truth.shape:
        return name, float("inf"), 0.0, False
    ours, theirs = error(found, truth), error(peer, truth)
    return name, ours if ours == ours else float("inf"), theirs, ours <= 2 * theirs + atol


def error(value: Tensor, truth: Tensor) -> float:
    """Relative error in the 2-norm; absolute where the truth is zero but for rounding, as over a width of 1."""
    size = float(truth.norm())
    return float((value.double() - truth).norm()) / (size if size > 1e-12 else 1.0)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(words), b.contiguous().view(words))


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill what `torch.empty` and `torch.empty_like` return with NaN, so that an element left unwritten shows."""
    before = {name: getattr(torch, name) for name in ("empty", "empty_like")}

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def filled(*args: Any, **kwargs: Any) -> Tensor:
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return filled

    try:
        for name, make in before.items():
            setattr(torch, name, poison(make))
        yield
    finally:
        for name, make in before.items():
            setattr(torch, name, make)
