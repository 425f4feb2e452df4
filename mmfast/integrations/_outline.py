"""What a forward does, as text, so that only a forward that mmfast knows is ever replaced.

Foreign modules change between releases while their names stay. `outline` runs the class's own forward once on symbols
and records each step: a call of a submodule, a method of a tensor, a torch function, a sum or a product. Names of local
variables, annotations and the order of the operands of a sum leave no trace; another call or another argument does.
What the forward may ask of a value, its shape apart, is an error, and a forward that fails is not known.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

TOKENS = (2, 5, 7)
IMAGES = (2, 3, 32, 32)
HEADS = (2, 5, 3, 7)


class Symbol:
    """A value of the forward that is being outlined. What it cannot do ends the outline."""

    def __init__(self, steps: list[str], text: str, shape: tuple[int, ...] = TOKENS, parts: int = 2) -> None:
        self._steps, self._text, self._parts = steps, text, parts
        self.shape = shape

    def __repr__(self) -> str:
        return self._text

    def record(self, step: str, parts: int = 2, shape: tuple[int, ...] = TOKENS) -> Symbol:
        """Add a step, and return its result."""
        self._steps.append(step)
        return Symbol(self._steps, f"${len(self._steps)}", shape, parts)

    def __bool__(self) -> bool:
        raise TypeError(f"the forward depends on {self._text}")

    def __add__(self, other: object) -> Symbol:
        if not isinstance(other, Symbol):
            return NotImplemented
        return self.record("+".join(sorted((self._text, other._text))))

    def __radd__(self, other: object) -> Symbol:  # (output,) + the rest of a tuple
        if not isinstance(other, tuple):
            return NotImplemented
        return self.record(f"{','.join(map(repr, other))},*{self._text}")

    def __mul__(self, other: object) -> Symbol:
        if not isinstance(other, Symbol):
            return NotImplemented
        return self.record("*".join(sorted((self._text, other._text))))

    def __getitem__(self, index: object) -> Symbol:
        return Symbol(self._steps, f"{self._text}[{_index(index)}]", self.shape)

    def __iter__(self) -> Iterator[Symbol]:  # a, b = symbol
        return iter([self[i] for i in range(self._parts)])

    def __getattr__(self, name: str) -> Symbol:  # a submodule's parameter, a tensor's method or dtype
        if name.startswith("__"):
            raise AttributeError(name)
        return Symbol(self._steps, f"{self._text}.{name}")

    def __call__(self, *args: object, **kwargs: object) -> Symbol:
        method = self._text.rpartition(".")[2]
        parts = 3 if method == "unbind" else args[0] if method == "chunk" and isinstance(args[0], int) else 2
        return self.record(f"{self._text}({arguments(args, kwargs)})", parts)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Symbol:
        found = next(symbol for symbol in _flat(args) if isinstance(symbol, Symbol))
        return found.record(f"{function.__name__}({arguments(args, kwargs or {})})")

    def dim(self) -> int:
        """Of tensors, as `shape`."""
        return len(self.shape)

    @property
    def ndim(self) -> int:
        """As `dim()`."""
        return len(self.shape)

    def size(self) -> tuple[int, ...]:
        """As `shape`."""
        return self.shape


class _Self:
    """Stands in for the module."""

    forward = None  # transformers' wrapper of forward compares this with itself
    gradient_checkpointing = False

    def __init__(
        self, cls: type, steps: list[str], training: bool, members: Mapping[str, object], missing: tuple[str, ...]
    ) -> None:
        self._cls, self._steps, self._missing, self.training = cls, steps, missing, training
        self.__dict__.update(members)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in self._missing:
            raise AttributeError(name)
        if name in _INLINED:
            return partial(getattr(self._cls, name), self)
        return Symbol(self._steps, name)


_INLINED = ("transpose_for_scores", "_process_input")
"""Methods that an outline looks into."""


def outline(
    cls: type[torch.nn.Module],
    method: str = "forward",
    *,
    shape: tuple[int, ...] = TOKENS,
    inputs: Mapping[str, object] | None = None,
    members: Mapping[str, object] | None = None,
    missing: tuple[str, ...] = (),
    training: bool | None = None,
) -> str:
    """The steps of `cls.forward`, one a call, sum or product; `$3` is the result of the third step.

    Returns the reason in place of the steps, starting with "?", for a forward that cannot be outlined.

    Args:
        cls: a module class.
        method: to outline in place of the forward.
        shape: of the inputs.
        inputs: values of inputs on which the forward depends, by name.
        members: values of members on which it depends.
        missing: members that the module does not have.
        training: the mode, or None for both, which must have the same steps then.
    """
    try:
        found = [
            _steps(cls, method, shape, inputs or {}, members or {}, missing, mode)
            for mode in ((True, False) if training is None else (training,))
        ]
    except Exception as error:  # any code may run here; what fails is simply not known
        return f"? {type(error).__name__}: {error}"
    return found[0] if len(set(found)) == 1 else "? the forward depends on the training mode"


def _steps(
    cls: type[torch.nn.Module],
    method: str,
    shape: tuple[int, ...],
    given: Mapping[str, object],
    members: Mapping[str, object],
    missing: tuple[str, ...],
    training: bool,
) -> str:
    steps: list[str] = []
    inputs: list[object] = []
    extra: dict[str, Any] = {}
    forward = getattr(cls, method)
    for name, parameter in list(inspect.signature(forward).parameters.items())[1:]:
        if parameter.kind == parameter.POSITIONAL_OR_KEYWORD:
            inputs.append(given.get(name, Symbol(steps, name, shape)))
        elif parameter.kind == parameter.VAR_KEYWORD:
            extra["others"] = Symbol(steps, f"**{name}")
        else:
            return f"? the forward has a parameter of kind {parameter.kind.description}"
    stub: Any = _Self(cls, steps, training, members, missing)
    result = forward(stub, *inputs, **extra)
    return " ".join([*steps, f"-> {result!r}"])


def arguments(args: tuple[object, ...], kwargs: Mapping[str, object]) -> str:
    """The arguments of a call, as they stand in a step."""
    return ",".join([*map(_text, args), *(f"{key}={_text(value)}" for key, value in kwargs.items())])


def _text(value: object) -> str:
    return repr(value).replace(" ", "")


def _index(index: object) -> str:
    if isinstance(index, tuple):
        return ",".join(map(_index, index))
    return f"{index.start or ''}:{index.stop or ''}" if isinstance(index, slice) else repr(index)


def _flat(values: Any) -> Iterator[object]:
    for value in values:
        yield from _flat(value) if isinstance(value, (tuple, list)) else (value,)
