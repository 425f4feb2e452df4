"""CUDA graphs of `GaussianDiffusion`'s sampling loop, one for each way that it is called."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..cuda_graph import CudaGraph, cuda_graph

DEVICE = "cuda"
MOST = 8  # graphs to keep; they share their memory


class LoopGraphs:
    """Runs a loop, or a CUDA graph of it. Unless asked, a loop is captured when it comes for the second time.

    Capturing takes as long as two runs, which a loop that runs once would not win back.
    """

    def __init__(self) -> None:
        self._graph: CudaGraph | None = None
        self._seen: set[Any] = set()  # has run without a graph
        self._captured: set[Any] = set()
        self._weights: Any = None  # where they were at the capture
        self._refused = False

    def __call__(self, owner: nn.Module, loop: Callable[..., Any], *args: Any, wanted: bool | None) -> Any:
        """Return `loop(*args)`, a method of `owner`; `wanted` asks for a graph or for none, None leaves it to the rule.

        Args are tensors and constants.
        """
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        if wanted and device.type != DEVICE:
            raise ValueError(f"GaussianDiffusion: cuda_graph=True needs the model on a GPU, it is on {device}")
        if not wanted and (wanted is False or device.type != DEVICE or self._refused or _under_way()):
            return loop(*args)
        key = _key(args)
        weights = tuple((t.data_ptr(), t.dtype) for part in (owner.parameters(), owner.buffers()) for t in part)
        if weights != self._weights:
            self.release()
            self._weights = weights
        if not wanted and key not in self._captured and key not in self._seen:
            self._seen.add(key)
            return loop(*args)
        if key not in self._captured and len(self._captured) >= MOST:
            self.release()
        try:
            if self._graph is None:
                self._graph = cuda_graph(loop, *args, max_graphs=MOST, warmup=1)
            found = self._graph(*args)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if wanted:
                raise
            self._refused = True
            self.release()
            warnings.warn(f"GaussianDiffusion: sampling without a CUDA graph: {error}", stacklevel=5)
            return loop(*args)
        self._captured.add(key)
        return found

    def release(self) -> None:
        """Give the graphs' memory back, and begin anew."""
        if self._graph is not None:
            self._graph.reset()
        self._graph = None
        self._captured.clear()
        self._seen.clear()


def _under_way() -> bool:
    """Whether a capture of the caller's is under way, or a compilation."""
    return torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def _key(args: tuple[Any, ...]) -> Any:
    """What decides which graph serves a call."""
    parts = [(arg.shape, arg.dtype, arg.device) if isinstance(arg, Tensor) else (type(arg), arg) for arg in args]
    autocast = torch.get_autocast_dtype(DEVICE) if torch.is_autocast_enabled(DEVICE) else None
    return (*parts, autocast)
