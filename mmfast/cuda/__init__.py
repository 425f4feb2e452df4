"""Launchers of the CUDA C++ kernels, one file an op: those of `mmfast.kernels` by name, arguments and results.

The kernels are in csrc/ and compiled into the extension `mmfast._cuda`, which knows no torch: a launcher makes the
tensors and hands over pointers, sizes and the current stream. MMFAST_EXTENSION=FILE loads another build of it, such as
one that runs the kernels on a CPU. Nothing here is imported before the first call that may need it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from types import ModuleType
from typing import Any

_NAME = "mmfast._cuda"
_found: ModuleType | None = None
_missing: str | None = None


def extension() -> Any:
    """The extension. Raises ImportError where there is none; `missing` asks without raising."""
    why_not = missing()
    if why_not is not None:
        raise ImportError(f"mmfast: {why_not}")
    return _found


def missing() -> str | None:
    """Why there is no extension, or None where there is one."""
    global _found, _missing
    if _found is None and _missing is None:
        try:
            _found = _load()
        except ImportError as failed:
            _missing = str(failed)
    return _missing


def architectures() -> tuple[str, ...]:
    """What the extension was compiled for, as nvcc is told: ("80", "90"); empty if it is emulated or missing."""
    return () if missing() else tuple(part for part in extension().architectures.split(";") if part)


def emulated() -> bool:
    """Whether the extension runs its kernels on a CPU."""
    return missing() is None and extension().emulated


def runs_on(capability: tuple[int, int]) -> bool:
    """Whether the extension holds code for a GPU of this compute capability."""
    major, minor = capability
    for arch in architectures():
        number = int(arch.rstrip("af"))
        # Code for 9.0a runs on 9.0 alone, for 10.0f on all of 10, for 8.0 on 8.0 and what came later in its family.
        if number == 10 * major + minor or (not arch.endswith("a") and number // 10 == major and number % 10 <= minor):
            return True
    return False


def _load() -> ModuleType:
    path = os.environ.get("MMFAST_EXTENSION")
    if not path:
        try:
            return importlib.import_module(_NAME)
        except ModuleNotFoundError:
            raise ImportError("this install has no CUDA C++ kernels (built without nvcc)") from None
        except ImportError as failed:
            raise ImportError(f"the CUDA C++ kernels cannot be loaded: {failed}") from failed
    spec = importlib.util.spec_from_file_location(_NAME, path)
    if spec is None or spec.loader is None or not os.path.exists(path):
        raise ImportError(f"MMFAST_EXTENSION={path} is not an extension module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[_NAME] = module
    return module
