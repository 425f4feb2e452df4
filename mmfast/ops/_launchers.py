"""Where the launchers of an op's kernels are."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

_PACKAGES = {"cuda": "mmfast.cuda", "triton": "mmfast.kernels"}


@cache
def launchers(backend: str, op: str) -> Any:
    """The module with the launchers of `op`: the CUDA C++ kernels' or the Triton kernels', of one contract."""
    return importlib.import_module(f"{_PACKAGES[backend]}.{op}")
