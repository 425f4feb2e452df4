"""Rows for each kind of kernel: `mmfast` is what the rule chooses, `mmfast triton` and `mmfast cuda` are forced.

They have rows where they can run, on a GPU; the CUDA C++ kernels where the extension was built with nvcc.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from mmfast import backends, cuda
from mmfast.benchmarks._harness import Options, Unavailable

KINDS = ("triton", "cuda")


def rows(fn: Callable[..., Any]) -> dict[str, Callable[[], Callable[..., Any]]]:
    """Providers of `fn` by each kind of kernel; a test that is `forced` makes the choice."""
    return {f"mmfast {kind}": lambda: fn for kind in KINDS}


def names(providers: Iterable[str], options: Options) -> list[str]:
    """The providers that can run: without the rows of kernels that this machine has no use for."""
    can = {f"mmfast {kind}": options.device == "cuda" for kind in KINDS}
    can["mmfast cuda"] = can["mmfast cuda"] and bool(cuda.architectures())
    return [name for name in providers if can.get(name, True)]


def forced(test: Callable[..., None]) -> Callable[..., None]:
    """A benchmark under the backend that its provider names, the backward pass too."""

    @functools.wraps(test)
    def run(**given: Any) -> None:
        kind = given["spec"].provider.removeprefix("mmfast ")
        try:
            with backends.backend(kind if kind in KINDS else backends.forced()):
                test(**given)
        except backends.BackendError as refused:
            if kind not in KINDS:
                raise
            raise Unavailable(str(refused)) from refused

    return run
