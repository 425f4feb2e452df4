"""`contrastive_step`: forward and backward of a contrastive loss over more pairs than the towers' activations fit.

A contrastive loss does not fall apart into micro-batches: every pair is a negative of all others. But it needs the
features alone, which are small. So the towers run over the micro-batches without keeping anything, the loss and the
gradients of the features are computed once, on the whole batch, and the towers run again, one micro-batch at a time,
each with its rows of those gradients. The towers' forward pass is paid twice, the loss once.

This is neither a module (it calls backward) nor an op: it sits beside `accelerate` and `cuda_graph`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Step", "contrastive_step"]

NAME = "contrastive_step"


class Step(NamedTuple):
    """What `contrastive_step` returns, all of it detached."""

    loss: Any  # what the loss returned
    outputs: Any  # what the model returned, a dict or a tuple, with the features of all micro-batches


def contrastive_step(
    model: Callable[..., Any],
    micro_batches: Iterable[Any],
    loss: Callable[..., Any],
    *,
    modules: Sequence[nn.Module] | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    scaler: Any = None,
) -> Step:
    """Add the gradients of `loss` over all micro-batches to the parameters' `.grad`, as one large batch would.

    `model` returns a dict (open_clip's models with `output_dict=True`) or a tuple. Of its tensors, those with two or
    more dimensions are features, one row a sample, and are concatenated; the others, `logit_scale` and `logit_bias`,
    are the same for every micro-batch and enter the loss once. `loss` is called once, with the dict as keyword
    arguments or the tuple as positional ones, and returns a scalar or a dict of scalars, which are added up.

    Gradients equal those of a step that keeps every micro-batch's activations: random numbers (dropout) are replayed,
    buffers (BatchNorm's running statistics) are updated once, and BatchNorm sees one micro-batch at a time. With
    DistributedDataParallel gradients are reduced once, after the last micro-batch; all ranks must have as many.

    In open_clip's training loop it takes the place of the branch `args.accum_freq > 1`, which computes the whole loss
    once for each micro-batch, and so adds up `accum_freq` times the gradient of logit_scale:

        batches.append((images, texts))
        if len(batches) < args.accum_freq:
            continue
        optimizer.zero_grad()
        losses, outputs = mmfast.contrastive_step(
            model, batches, partial(loss, output_dict=True), autocast=autocast, scaler=scaler
        )
        batches = []

    Args:
        model: the towers, a module or a function.
        micro_batches: what `model` is called with, one after the other: a tuple of arguments, a dict of keyword
            arguments, or a single argument. They may differ in size.
        loss: `mmfast.nn.ClipLoss(...)` or any function.
        modules: the modules in `model`, where it is a function: their buffers and DistributedDataParallel's `no_sync`
            are seen to. By default `model` itself, if it is a module.
        autocast: returns the context in which model and loss run, such as
            `partial(torch.autocast, "cuda", torch.bfloat16)`. The backward passes run outside of it.
        scaler: a `torch.amp.GradScaler`; `step` and `update` remain the caller's.

    Returns:
        A `Step`.

    Raises:
        ValueError: no micro-batches, or a model without features.
        TypeError: model or loss return something else.

    Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", arXiv:2101.06983.
    """
    batches = list(micro_batches)
    if not batches:
        raise ValueError(f"{NAME}: micro_batches must have at least one entry, got none")
    if modules is None:
        modules = [model] if isinstance(model, nn.Module) else []
    random = _Random(batches, modules)
    states, found = [], []
    with torch.no_grad(), _buffers_kept(modules), autocast():
        for batch in batches:
            states.append(random.state())
            found.append(_outputs(_call(model, batch)))
    # Under an autocast of the caller's, older PyTorch would reuse the weights' casts, which have no way back to them.
    torch.clear_autocast_cache()
    rows = [_rows(outputs) for outputs in found]
    leaves = _joined(found)
    del found
    with torch.enable_grad():
        with autocast():
            result = loss(**leaves) if isinstance(leaves, dict) else loss(*leaves)
            total = _total(result)
        (total if scaler is None else scaler.scale(total)).backward()
    start = 0
    with random.forked():
        for i, (batch, state, count) in enumerate(zip(batches, states, rows, strict=True)):
            last = i == len(batches) - 1
            with torch.enable_grad(), ExitStack() as stack:
                for module in () if last else modules:
                    stack.enter_context(getattr(module, "no_sync", nullcontext)())
                random.restore(state)
                with autocast():
                    outputs = _outputs(_call(model, batch))
                _backward(outputs, leaves, slice(start, start + count), last)
            start += count
    return Step(_detached(result), _detached(leaves))


def _call(model: Callable[..., Any], batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _outputs(value: Any) -> dict[str, Any] | tuple[Any, ...]:
    """A model's outputs, checked."""
    if isinstance(value, Mapping):
        value = dict(value)
        entries = list(value.values())
    elif isinstance(value, (tuple, list)):
        value = entries = tuple(value)  # type: ignore[assignment]
    else:
        raise TypeError(f"{NAME}: the model must return a dict or a tuple of tensors, got {type(value).__name__}")
    for entry in entries:
        if entry is not None and not isinstance(entry, Tensor):
            raise TypeError(f"{NAME}: the model's outputs must be tensors or None, got {type(entry).__name__}")
    if not any(_is_features(entry) for entry in entries):
        raise ValueError(f"{NAME}: the model must return features of two or more dimensions, got none")
    return value


def _entries(outputs: dict[str, Any] | tuple[Any, ...]) -> list[Any]:
    return list(outputs.values() if isinstance(outputs, dict) else outputs)


def _is_features(entry: Any) -> bool:
    return isinstance(entry, Tensor) and entry.dim() > 1


def _rows(outputs: dict[str, Any] | tuple[Any, ...]) -> int:
    counts = {len(entry) for entry in _entries(outputs) if _is_features(entry)}
    if len(counts) > 1:
        raise ValueError(f"{NAME}: features of one micro-batch must have as many rows, got {sorted(counts)}")
    return counts.pop()


def _joined(found: list[Any]) -> Any:
    """The whole batch's outputs, leaves that take gradients."""

    def leaf(entries: tuple[Any, ...]) -> Any:
        first = entries[0]
        if not isinstance(first, Tensor):
            return first
        value = torch.cat(entries) if _is_features(first) else first.detach().clone()
        return value.requires_grad_(value.is_floating_point())

    columns = [leaf(entries) for entries in zip(*(_entries(outputs) for outputs in found), strict=True)]
    return dict(zip(found[0], columns, strict=True)) if isinstance(found[0], dict) else tuple(columns)


def _total(result: Any) -> Tensor:
    values = list(result.values()) if isinstance(result, Mapping) else [result]
    if not values or not all(isinstance(value, Tensor) and value.numel() == 1 for value in values):
        got = f"{type(result).__name__}" if not isinstance(result, Tensor) else f"shape {tuple(result.shape)}"
        raise TypeError(f"{NAME}: the loss must return a scalar or a dict of scalars, got {got}")
    return sum(values[1:], values[0])


def _backward(outputs: Any, leaves: Any, part: slice, last: bool) -> None:
    """Pass a micro-batch its rows of the features' gradients; the shared outputs' gradient goes with the last."""
    ends, grads = [], []
    for entry, leaf in zip(_entries(outputs), _entries(leaves), strict=True):
        if not isinstance(entry, Tensor) or not entry.requires_grad or leaf.grad is None:
            continue
        ends.append(entry)
        if _is_features(entry):
            grads.append(leaf.grad[part])
        else:  # a zero, so that every micro-batch reaches the same parameters
            grads.append(leaf.grad if last else torch.zeros_like(leaf.grad))
    if ends:
        torch.autograd.backward(ends, grads)


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        return {name: _detached(entry) for name, entry in value.items()}
    return tuple(_detached(entry) for entry in value) if isinstance(value, tuple) else value


@contextmanager
def _buffers_kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Give buffers back what they held when the modules' first forward pass began."""
    before: dict[Tensor, Tensor] = {}

    def remember(module: nn.Module, _: Any) -> None:
        for buffer in module.buffers():
            if buffer not in before:
                before[buffer] = buffer.clone()

    with ExitStack() as stack:
        for module in modules:
            # DistributedDataParallel's own forward may first take over another rank's buffers.
            wrapped = isinstance(module, nn.parallel.DistributedDataParallel)
            inner: Any = module.module if wrapped else module
            handle = inner.register_forward_pre_hook(remember)
            stack.callback(handle.remove)
        yield
    for buffer, value in before.items():
        buffer.copy_(value)


class _Random:
    """The random state of the CPU and of the GPUs that a step uses."""

    def __init__(self, batches: list[Any], modules: Sequence[nn.Module]) -> None:
        tensors: list[Tensor] = [parameter for module in modules for parameter in module.parameters()]
        for batch in batches:
            parts = batch.values() if isinstance(batch, Mapping) else batch
            parts = parts if isinstance(parts, Iterable) and not isinstance(parts, Tensor) else [parts]
            tensors += [part for part in parts if isinstance(part, Tensor)]
        self.devices = sorted({tensor.device.index for tensor in tensors if tensor.is_cuda})

    def state(self) -> list[Tensor]:
        """All states."""
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self.devices)]

    def restore(self, state: list[Tensor]) -> None:
        """Go back to what `state` returned."""
        torch.set_rng_state(state[0])
        for device, value in zip(self.devices, state[1:], strict=True):
            torch.cuda.set_rng_state(value, device)

    def forked(self) -> AbstractContextManager[Any]:
        """Leave the random states as they are, whatever is drawn inside."""
        return torch.random.fork_rng(self.devices)
