"""`mmfast.cuda_graph`: capture a model's inference once, and replay all its kernels with one launch.

A ViT-B/16 launches more than a hundred kernels, and at batch 1 the host may take longer to launch them than the GPU to
run them. A CUDA graph keeps the launches, and with them every address: so inputs are copied to fixed tensors, weights
stay where they are, and what the host decided (shapes, branches, numbers, the backend of an op, autocast) is decided
for good.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["CudaGraph", "cuda_graph"]

CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


def cuda_graph(
    model: Callable[..., Any],
    *example_inputs: Any,
    clone_outputs: bool = True,
    max_graphs: int = 1,
    warmup: int = 3,
    **example_kwargs: Any,
) -> CudaGraph:
    """Capture the inference of `model` for inputs like the examples; call the result as the model.

    It runs without gradients. Weights stay live: a change in place (an optimizer's step, `load_state_dict`) is seen
    by the next call; a weight put in the place of another (`model.half()`, `assign=True`) is an error until `reset()`.
    Random numbers are new in every call, from PyTorch's default CUDA generator. Calls from several streams and threads
    wait for each other. What the model changes in its inputs stays inside, and its Python code, hooks included, runs
    only while it is captured.

    Args:
        model: an `nn.Module` in eval mode, a method of one, or any callable. It must not move data to the host
            (`.item()`, `.cpu()`, a mask whose size depends on values).
        *example_inputs: its arguments: CUDA tensors, constants, and lists, tuples, dicts and registered dataclasses
            of them. A tensor that is given twice stays one tensor.
        clone_outputs: return fresh tensors. Without, the outputs are the graph's own, valid until the next call: one
            copy less, for results that are used at once.
        max_graphs: for how many kinds of inputs (shapes, dtypes, constants, the autocast state) to keep a graph. The
            examples are the first; others are captured when they first come, and share its memory.
        warmup: runs before the capture, in which kernels are compiled and libraries make their workspaces.
        **example_kwargs: its keyword arguments.

    Returns:
        A callable with the model's signature, and `reset()`, which gives the graphs' memory back.

    Raises:
        ValueError: the examples hold no tensor, or one that is not on the GPU; the model is in training mode, or its
            weights are elsewhere; an output requires a gradient. In a call: inputs of which there is no graph and for
            which `max_graphs` leaves none; inputs that require gradients while gradients are enabled; a weight was
            replaced.
        TypeError: an input or output is neither tensor nor constant, or an option is of the wrong type.
        RuntimeError: the model did what a capture does not allow.
    """
    for name, value, least in (("max_graphs", max_graphs, 1), ("warmup", warmup, 1)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"cuda_graph: {name} must be an integer, got {type(value).__name__}")
        if value < least:
            raise ValueError(f"cuda_graph: {name} must be at least {least}, got {value}")
    if not callable(model):
        raise TypeError(f"cuda_graph: model must be callable, got {type(model).__name__}")
    graph = CudaGraph(model, clone_outputs, max_graphs, warmup)
    graph._prepare(example_inputs, example_kwargs)
    return graph


class _Signature(NamedTuple):
    """What decides which graph serves a call."""

    structure: Any  # how the leaves make up the arguments
    leaves: tuple[Any, ...]  # of a tensor its shape and so on, of a constant itself and its type
    autocast: torch.dtype | None

    def describe(self) -> str:
        """The tensors, one after another."""
        parts = [f"{_name(leaf[1])}{list(leaf[0])}" for leaf in self.leaves if isinstance(leaf[0], torch.Size)]
        return ", ".join(parts) + (f" under autocast to {_name(self.autocast)}" if self.autocast else "")


@dataclass
class _Captured:
    """One graph, and the tensors at its addresses."""

    signature: _Signature
    graph: Any
    inputs: list[Any]  # tensors, and constants
    outputs: list[Any]
    structure: Any  # of the outputs
    weights: list[tuple[str, dict[str, Any], str, Tensor, int]]


class CudaGraph:
    """A model whose inference is replayed from CUDA graphs: what `cuda_graph` returns."""

    def __init__(self, model: Callable[..., Any], clone_outputs: bool, max_graphs: int, warmup: int) -> None:
        self.model = model
        self.clone_outputs = clone_outputs
        self.max_graphs = max_graphs
        self.warmup = warmup
        self._graphs: list[_Captured] = []
        self._lock = threading.Lock()
        self._stream: Any = None  # where graphs are captured
        self._pool: Any = None  # the memory that they share
        self._last_stream: Any = None  # of the last call, and where it ended
        self._done: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return `model(*args, **kwargs)`."""
        leaves, structure = _flatten(args, kwargs)
        signature = _signature(leaves, structure)
        if torch.is_grad_enabled() and any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
            raise ValueError("cuda_graph: inputs must not require gradients, got one that does: use torch.no_grad()")
        with self._lock:
            captured = self._find(leaves, structure, signature)
            device = next(leaf.device for leaf in leaves if isinstance(leaf, Tensor))
            stream = torch.cuda.current_stream(device)
            if self._last_stream is not None and self._last_stream != stream:
                stream.wait_event(self._done)
            for static, leaf in zip(captured.inputs, leaves, strict=True):
                if isinstance(leaf, Tensor) and static is not leaf:
                    static.copy_(leaf.detach())
            captured.graph.replay()
            outputs = captured.outputs
            if self.clone_outputs:
                outputs = [x.clone() if isinstance(x, Tensor) else x for x in outputs]
            self._done.record(stream)
            self._last_stream = stream
        self._check_unchanged(captured)  # while the GPU is at work
        return pytree.tree_unflatten(outputs, captured.structure)

    def reset(self) -> None:
        """Drop the graphs and their memory, once their work is done; the next call captures again."""
        with self._lock:
            if self._done is not None:
                self._done.synchronize()
            self._graphs.clear()
            self._stream = self._pool = self._last_stream = self._done = None

    def __repr__(self) -> str:
        kinds = "; ".join(captured.signature.describe() for captured in self._graphs) or "no graph"
        return f"CudaGraph({type(self.model).__name__}: {kinds})"

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves, structure = _flatten(args, kwargs)
        with self._lock:
            self._find(leaves, structure, _signature(leaves, structure))

    def _find(self, leaves: list[Any], structure: Any, signature: _Signature) -> _Captured:
        """Return the graph of such inputs, captured now if there is none."""
        for captured in self._graphs:
            if captured.signature == signature:
                return captured
        if len(self._graphs) >= self.max_graphs:
            known = [captured.signature for captured in self._graphs]
            raise ValueError(f"cuda_graph: {_difference(signature, known, self.max_graphs)}")
        device = next(leaf.device for leaf in leaves if isinstance(leaf, Tensor))
        _check_model(_owner(self.model), device)
        self._graphs.append(self._capture(leaves, structure, signature, device))
        return self._graphs[-1]

    def _capture(self, leaves: list[Any], structure: Any, signature: _Signature, device: torch.device) -> _Captured:
        # Not in inference mode, outside of which its tensors could not be written to.
        with torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
            copies = {id(leaf): leaf.detach().clone() for leaf in leaves if isinstance(leaf, Tensor)}
            inputs = [copies.get(id(leaf), leaf) for leaf in leaves]
            args, kwargs = _unflatten(inputs, structure)
            if self._stream is None:
                self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
                self._done = torch.cuda.Event()
            self._stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(self._stream):
                for _ in range(self.warmup):
                    outputs, made = pytree.tree_flatten(self.model(*args, **kwargs))
            _check_outputs(outputs)
            del outputs
            torch.cuda.current_stream(device).wait_stream(self._stream)
            # Copies of weights that autocast keeps would be read at their addresses for ever, though no weight's.
            torch.clear_autocast_cache()
            graph = torch.cuda.CUDAGraph()
            capture = torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local")
            try:
                with torch.cuda.stream(self._stream), capture:  # a capture that fails leaves its stream current
                    outputs, made = pytree.tree_flatten(self.model(*args, **kwargs))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                first = error.__context__ if isinstance(error.__context__, RuntimeError) else error
                reason = "the model cannot be captured: it reads results on the host, or allocates outside of PyTorch"
                raise RuntimeError(f"cuda_graph: {reason} ({str(first).splitlines()[0]})") from error
            finally:
                torch.clear_autocast_cache()
        return _Captured(signature, graph, inputs, outputs, made, list(_weights(_owner(self.model))))

    def _check_unchanged(self, captured: _Captured) -> None:
        """Raise ValueError if a weight is no longer where the graph reads it."""
        for name, holder, key, weight, address in captured.weights:
            if holder.get(key) is not weight or weight.data_ptr() != address:
                raise ValueError(f"cuda_graph: {name} was replaced after the capture: call reset() to capture again")
        owner = _owner(self.model)
        if owner is not None and owner.training:
            raise ValueError("cuda_graph: model must be in eval mode, got training mode: call model.eval()")


DEVICE = "cuda"


def _flatten(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    if not kwargs and all(type(arg) is Tensor for arg in args):  # a tenth of the time of what follows
        return list(args), len(args)
    return pytree.tree_flatten((args, kwargs))


def _unflatten(leaves: list[Any], structure: Any) -> tuple[Any, Any]:
    return (leaves, {}) if isinstance(structure, int) else pytree.tree_unflatten(leaves, structure)


def _signature(leaves: list[Any], structure: Any) -> _Signature:
    """Describe the inputs, or raise for those that no graph can take."""
    found: list[Any] = []
    first: dict[int, int] = {}
    device = None
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            if leaf.device.type != DEVICE:
                raise ValueError(f"cuda_graph: needs CUDA tensors, got an input on {leaf.device}")
            device = device or leaf.device
            if leaf.device != device:
                raise ValueError(f"cuda_graph: inputs must be on one device, got {device} and {leaf.device}")
            found.append((leaf.shape, leaf.dtype, leaf.device.index, first.setdefault(id(leaf), index)))
        elif isinstance(leaf, CONSTANTS):
            found.append((type(leaf), leaf))
        else:
            raise TypeError(f"cuda_graph: inputs must be tensors or constants, got {type(leaf).__name__}")
    if device is None:
        raise ValueError("cuda_graph: needs CUDA tensors as inputs, got none")
    autocast = torch.get_autocast_dtype(DEVICE) if torch.is_autocast_enabled(DEVICE) else None
    return _Signature(structure, tuple(found), autocast)


def _difference(found: _Signature, known: list[_Signature], max_graphs: int) -> str:
    """Say what of a call is not as it was captured."""
    hint = "; max_graphs allows more than one kind"
    if len(known) > 1:
        kinds = "; ".join(signature.describe() for signature in known)
        return f"inputs must be of one of the {max_graphs} kinds captured ({kinds}), got {found.describe()}"
    (captured,) = known
    if captured.structure != found.structure or len(captured.leaves) != len(found.leaves):
        return f"inputs must be structured as the captured ones ({captured.describe()}), got {found.describe()}{hint}"
    for index, (want, got) in enumerate(zip(captured.leaves, found.leaves, strict=True)):
        if want == got:
            continue
        tensors = isinstance(want[0], torch.Size) and isinstance(got[0], torch.Size)
        if tensors and want[:3] == got[:3]:
            return f"input {index} must be the same tensor as another input exactly where it was when captured{hint}"
        expected, came = (
            f"{_name(leaf[1])}{list(leaf[0])} on {DEVICE}:{leaf[2]}"
            if isinstance(leaf[0], torch.Size)
            else repr(leaf[1])
            for leaf in (want, got)
        )
        return f"input {index} must be {expected} as captured, got {came}{hint}"
    states = [_name(signature.autocast) if signature.autocast else "none" for signature in (captured, found)]
    return f"autocast must be {states[0]} as captured, got {states[1]}{hint}"


def _owner(model: Any) -> nn.Module | None:
    """The module whose weights a callable uses, if it says so: itself, or the one that it is a method of."""
    owner = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


def _check_model(owner: nn.Module | None, device: torch.device) -> None:
    if owner is None:
        return
    for name, module in owner.named_modules():
        if module.training:
            where = f"training mode of {name or type(module).__name__}"
            raise ValueError(f"cuda_graph: model must be in eval mode, got {where}: call model.eval()")
    for name, _, _, weight, _ in _weights(owner):
        if weight.device != device:
            raise ValueError(f"cuda_graph: {name} must be on {device} like the inputs, got {weight.device}")


def _weights(owner: nn.Module | None) -> Iterator[tuple[str, dict[str, Any], str, Tensor, int]]:
    """Each parameter and buffer: name, the dict that holds it and its key there, itself, and its address."""
    if owner is None:
        return
    for prefix, module in owner.named_modules():
        for holder in (module._parameters, module._buffers):
            for key, weight in holder.items():
                if weight is not None:
                    yield f"{prefix}.{key}" if prefix else key, holder, key, weight, weight.data_ptr()


def _check_outputs(outputs: list[Any]) -> None:
    for leaf in outputs:
        if isinstance(leaf, Tensor):
            if leaf.requires_grad:
                raise ValueError("cuda_graph: outputs must not require gradients, got one that does")
        elif not isinstance(leaf, CONSTANTS):
            kinds = "tensors, constants, lists, tuples, dicts or registered dataclasses"
            raise TypeError(f"cuda_graph: outputs must be {kinds} of them, got {type(leaf).__name__}")


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


class _Callable(ModuleType):
    """This module, whose name is that of its main function: `mmfast.cuda_graph(model, x)` works on both."""

    def __call__(self, model: Callable[..., Any], *example_inputs: Any, **options: Any) -> CudaGraph:
        return cuda_graph(model, *example_inputs, **options)


sys.modules[__name__].__class__ = _Callable
