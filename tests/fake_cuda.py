"""CUDA graphs, streams and events of CPU tensors, for tests of what `mmfast.cuda_graph` makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import mmfast.cuda_graph as module


class FakeGraph(TorchDispatchMode):
    """A CUDA graph of CPU tensors: records every operation with its tensors, and replays them into the same memory."""

    made: ClassVar[list[FakeGraph]] = []

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0
        FakeGraph.made.append(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self.log.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        self.replays += 1
        with torch._C._AutoDispatchBelowAutograd():  # where it was recorded
            for func, args, kwargs, out in self.log:
                again = func(*args, **kwargs)
                for old, new in zip(pytree.tree_leaves(out), pytree.tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class FakeStream:
    def __init__(self, *_: Any) -> None:
        self.waited: list[Any] = []

    def wait_stream(self, other: Any) -> None:
        self.waited.append(other)

    def wait_event(self, event: Any) -> None:
        self.waited.append(event)


class FakeEvent:
    def record(self, stream: Any) -> None:
        self.stream = stream

    def synchronize(self) -> None:
        pass


class FakeCuda:
    """The parts of torch.cuda that cuda_graph uses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream = FakeStream()
        self.pools: list[Any] = []
        monkeypatch.setattr(module, "DEVICE", "cpu")
        for name, value in {
            "CUDAGraph": FakeGraph,
            "Stream": FakeStream,
            "Event": FakeEvent,
            "current_stream": lambda device=None: self.stream,
            "stream": lambda stream: _nothing(),
            "device": lambda device: _nothing(),
            "graph_pool_handle": object,
            "graph": self._graph,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        FakeGraph.made.clear()

    @contextmanager
    def _graph(self, graph: FakeGraph, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        self.pools.append(pool)
        with graph:
            yield


@contextmanager
def _nothing() -> Iterator[None]:
    yield
