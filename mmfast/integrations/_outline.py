"""What a block's forward does, as text, so that only a forward that mmfast knows is ever replaced.

Foreign blocks change between releases while their names stay. `outline` runs the class's own forward once on symbols
and records the calls of its submodules and the additions between them. Names of local variables, annotations and the
order of the operands of a sum leave no trace; another call, another argument or another sum does.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch


class _Symbol:
    """A value of the forward that is being outlined. What it cannot do ends the outline."""

    def __init__(self, steps: list[str], text: str) -> None:
        self.steps, self.text = steps, text

    def __repr__(self) -> str:
        return self.text

    def record(self, step: str) -> _Symbol:
        self.steps.append(step)
        return _Symbol(self.steps, f"${len(self.steps)}")

    def __add__(self, other: object) -> _Symbol:
        if not isinstance(other, _Symbol):
            return NotImplemented
        return self.record("+".join(sorted((self.text, other.text))))

    def __radd__(self, other: object) -> _Symbol:  # (output,) + the rest of a tuple
        if not isinstance(other, tuple):
            return NotImplemented
        return self.record(f"{','.join(map(repr, other))},*{self.text}")

    def __getitem__(self, index: object) -> _Symbol:
        text = f"{index.start or ''}:{index.stop or ''}" if isinstance(index, slice) else repr(index)
        return _Symbol(self.steps, f"{self.text}[{text}]")

    def __iter__(self) -> Iterator[_Symbol]:  # a, b = symbol
        return iter((self[0], self[1]))

    def dim(self) -> int:
        return 3

    shape = torch.Size((2, 3, 4))


class _Submodule:
    """Stands in for one submodule: a call of it is a step."""

    def __init__(self, steps: list[str], name: str) -> None:
        self.steps, self.name = steps, name

    def __call__(self, *args: object, **kwargs: object) -> _Symbol:
        inputs = [*map(repr, args), *(f"{key}={value!r}" for key, value in kwargs.items())]
        return _Symbol(self.steps, "").record(f"{self.name}({','.join(inputs)})")

    def __bool__(self) -> bool:
        raise TypeError("a forward that depends on its submodules has no outline")


class _Self:
    """Stands in for the block."""

    forward = None  # transformers' wrapper of forward compares this with itself
    gradient_checkpointing = False

    def __init__(self, steps: list[str], training: bool) -> None:
        self.steps, self.training = steps, training

    def __getattr__(self, name: str) -> _Submodule:
        return _Submodule(self.steps, name)


def outline(cls: type[torch.nn.Module]) -> str:
    """The steps of `cls.forward`, one a submodule call or sum; `$3` is the result of the third step.

    Returns the reason in place of the steps, starting with "?", for a forward that cannot be outlined.
    """
    try:
        training, evaluation = (_steps(cls, training) for training in (True, False))
    except Exception as error:  # any code may run here; what fails is simply not known
        return f"? {type(error).__name__}: {error}"
    return training if training == evaluation else "? the forward depends on the training mode"


def _steps(cls: type[torch.nn.Module], training: bool) -> str:
    steps: list[str] = []
    inputs: list[_Symbol] = []
    extra: dict[str, Any] = {}
    for name, parameter in list(inspect.signature(cls.forward).parameters.items())[1:]:
        if parameter.kind == parameter.POSITIONAL_OR_KEYWORD:
            inputs.append(_Symbol(steps, name))
        elif parameter.kind == parameter.VAR_KEYWORD:
            extra["others"] = _Symbol(steps, f"**{name}")
        else:
            return f"? the forward has a parameter of kind {parameter.kind.description}"
    stub: Any = _Self(steps, training)
    result = cls.forward(stub, *inputs, **extra)
    return " ".join([*steps, f"-> {result!r}"])
