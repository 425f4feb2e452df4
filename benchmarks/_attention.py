"""What the attention benchmarks share: PyTorch's back ends of attention as peers, and which one served a call.

`eager` is `F.scaled_dot_product_attention` as it chooses by itself; `flash` (FlashAttention 2), `cudnn` and `efficient`
force one of its back ends; `fa3` and `fa4` put an installed FlashAttention 3 or 4 in the place of 2. `mmfast` is the
Triton kernel and `mmfast cuda` the CUDA C++ kernel even where mmfast would hand the call to the other or to PyTorch:
the row says what the rule says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from mmfast import backends, cuda
from mmfast.benchmarks import _harness
from mmfast.benchmarks._harness import DTYPES, Options, Spec, Unavailable
from mmfast.benchmarks._limits import exponential_seconds

FORCED = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "fa3": SDPBackend.FLASH_ATTENTION,
    "fa4": SDPBackend.FLASH_ATTENTION,
}
COMPILED = ("compile", "mmfast+compile")
CUDA = "mmfast cuda"

VIT = ((256, 12, 197, 64), (256, 16, 257, 64), (64, 16, 577, 64), (1024, 12, 50, 64))
"""(B, H, N, d) of ViT-B/16 and L/14 at batch 256, L/14 at 336 pixels, and B/32: where the figures to reach lie."""


@contextmanager
def chosen(spec: Spec, options: Options) -> Iterator[None]:
    """Let calls inside run the provider's implementation; Unavailable where a peer is missing, fails or is wrong."""
    own = spec.provider == "eager" or spec.provider.startswith("mmfast")
    with ExitStack() as stack:
        if spec.provider in ("fa3", "fa4"):
            stack.enter_context(_flash_version(spec.provider.upper()))
        if spec.provider in FORCED:
            stack.enter_context(sdpa_kernel(FORCED[spec.provider]))
        if spec.provider.startswith("mmfast") and _kernels_run(options):
            stack.enter_context(backends.backend(_kernel(spec)))
        try:
            yield
        except backends.BackendError as refused:
            if spec.provider != CUDA:
                raise
            raise Unavailable(str(refused)) from refused
        except Exception as failed:
            if own or isinstance(failed, Unavailable):
                raise
            reason = f"{type(failed).__name__}: {str(failed).partition(chr(10))[0][:120]}"
            raise Unavailable(f"{spec.op} {spec.mode} {spec.size} {spec.provider}: {reason}") from failed


@contextmanager
def _flash_version(name: str) -> Iterator[None]:
    switch = getattr(nn.attention, "activate_flash_attention_impl", None)
    if switch is None:
        raise Unavailable(f"{name}: torch {torch.__version__} cannot switch its FlashAttention")
    try:
        switch(name)
    except Exception as missing:  # what is raised depends on the package that is missing
        raise Unavailable(f"{name}: {type(missing).__name__}: {str(missing)[:120]}") from missing
    try:
        yield
    finally:
        nn.attention.restore_flash_attention_impl()


def _kernel(spec: Spec) -> str:
    """The backend that an mmfast provider is a row of."""
    return "cuda" if spec.provider == CUDA else "triton"


def _kernels_run(options: Options) -> bool:
    return options.device == "cuda" or backends.interpreting()


def served_by(spec: Spec, run: Callable[[], Any], options: Options, otherwise: str) -> str:
    """Name what runs in `run()`, a forward pass, under `chosen`; `otherwise` where no back end of SDPA does."""
    if spec.provider.startswith("mmfast") and _kernels_run(options):
        kernel = _kernel(spec)
        with backends.backend(None):
            rule = {choice.backend for choice in backends.explain(run)} - {kernel}
        return f"{kernel}; the rule: {', '.join(sorted(rule))}" if rule else kernel
    with _Names() as names:
        run()
    if options.device == "cuda" and "flash" in names.found:
        version = getattr(nn.attention, "current_flash_attention_impl", lambda: None)()
        names.found = [f"flash {version or 'FA2'}" if name == "flash" else name for name in names.found]
    return ", ".join(dict.fromkeys(names.found)) or otherwise


class _Names(TorchDispatchMode):
    """Records which of SDPA's back ends is called: each is an op of its own below autograd; math is plain products."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        if name.startswith("_scaled_dot_product_") and "backward" not in name:
            self.found.append(name.removeprefix("_scaled_dot_product_").replace("_attention", ""))
        return func(*args, **(kwargs or {}))


def run(
    spec: Spec,
    pass_number: int,
    options: Options,
    measure: Callable[..., None],
    *,
    eager: Callable[..., Any],
    ours: Callable[..., Any],
    args: tuple[Any, ...],
    cost: dict[str, int],
    others: dict[str, Callable[[], Callable[..., Any]]] | None = None,
    named: bool = True,
) -> None:
    """Check a provider's result in the first pass, name what serves it, and time it.

    `eager` is the peer in plain torch, run with each of SDPA's back ends and compiled; `others` are more peers.
    `named=False`: eager is not SDPA, so there is no back end to name.
    """
    others = others or {}
    truth = _harness.call_of(spec.mode, eager, args)() if pass_number == 0 else None
    with chosen(spec, options):
        plain = ours if spec.provider.startswith("mmfast") else others.get(spec.provider, lambda: eager)()
        timed = _harness.compiled(plain) if spec.provider in COMPILED else plain
        call, backend = _harness.call_of(spec.mode, timed, args), ""
        if pass_number == 0:
            _harness.check_same(call(), truth, DTYPES[spec.dtype], spec.provider)
            if spec.provider in others:
                backend = spec.provider
            elif named or spec.provider.startswith("mmfast"):
                backend = served_by(spec, lambda: plain(*args), options, "math" if named else "torch")
        del truth
        measure(
            call,
            moved=cost["bytes"],
            flops=cost.get("flops", 0),
            limit=exponential_seconds(cost.get("exponentials", 0), options),
            backend=backend,
        )


def names(options: Options, *, compiled: bool, others: tuple[str, ...] = (), forced: bool = True) -> list[str]:
    """Providers of a group of rows: SDPA's back ends and our CUDA C++ kernel where they can run, compiled if asked."""
    found = ["eager", *(FORCED if forced and options.device == "cuda" else ()), *others]
    found += ["compile"] if compiled else []
    cuda_runs = forced and options.device == "cuda" and bool(cuda.architectures())
    return [*found, "mmfast", *([CUDA] if cuda_runs else []), *(["mmfast+compile"] if compiled else [])]
