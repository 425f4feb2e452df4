"""mmfast: fused kernels for vision-language and diffusion models in PyTorch.

`import mmfast` is light: submodules load on first use, and nothing here touches a GPU driver, a
compiler or Triton.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import convert, models, nn, ops, reference
    from .accelerate import Report, accelerate, accelerated, report, restore
    from .backends import BackendError, Choice, Explanation, backend, explain
    from .contrastive import contrastive_step
    from .cuda_graph import CudaGraph, cuda_graph
    from .noise_schedule import NoiseSchedule
    from .ops._noise import sample_seeds
    from .schedulers import DDIMScheduler, DDPMScheduler

# Public name -> the module that holds it.
_LAZY = {
    "BackendError": "backends",
    "Choice": "backends",
    "Explanation": "backends",
    "backend": "backends",
    "explain": "backends",
    "Report": "accelerate",
    "accelerate": "accelerate",
    "accelerated": "accelerate",
    "report": "accelerate",
    "restore": "accelerate",
    "contrastive_step": "contrastive",
    "CudaGraph": "cuda_graph",
    "cuda_graph": "cuda_graph",
    "DDIMScheduler": "schedulers",
    "DDPMScheduler": "schedulers",
    "NoiseSchedule": "noise_schedule",
    "sample_seeds": "ops._noise",
}
_SUBMODULES = ("convert", "models", "nn", "ops", "reference")

__all__ = [
    "BackendError",
    "Choice",
    "CudaGraph",
    "DDIMScheduler",
    "DDPMScheduler",
    "Explanation",
    "NoiseSchedule",
    "Report",
    "__version__",
    "accelerate",
    "accelerated",
    "backend",
    "contrastive_step",
    "convert",
    "cuda_graph",
    "explain",
    "models",
    "nn",
    "ops",
    "reference",
    "report",
    "restore",
    "sample_seeds",
]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in _LAZY:
        value: Any = importlib.import_module(f".{_LAZY[name]}", __name__)
        # `accelerate` and `cuda_graph` are functions and modules of that name, which can be called like the functions.
        if name not in ("accelerate", "cuda_graph"):
            value = getattr(value, name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
