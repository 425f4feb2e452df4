"""`siglip_loss` beside open_clip's SigLipLoss, eager and compiled, and beside `siglip-kernel`, the fused peer.

A shape is (pairs, width). "forward" is without gradients, as in validation; "forward+backward" is a training step of
the loss, with gradients of both features, scale and bias; its peak memory is what a batch costs beyond the features.
All get the same features, of unit length; open_clip's logits are in their dtype, 16 bits, the others' in float32. A
row's limit is its FLOPs at the rate of a large product: three products, as open_clip's loss takes them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast import explain, ops, reference
from mmfast.benchmarks import _harness
from mmfast.benchmarks._harness import DTYPES, Options, Shapes, Spec, Unavailable

op: Any = sys.modules["mmfast.ops.siglip_loss"]  # `mmfast.ops.siglip_loss` is the function
Step = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

MODES = ("forward+backward", "forward")
# B/16, L/16 and So400m have a width of 768, 1024 and 1152; 512 is CLIP's.
GPU_SHAPES: Shapes = (
    ((32768, 768), "bf16"),
    ((4096, 768), "bf16"),
    ((65536, 768), "bf16"),
    ((32768, 512), "bf16"),
    ((32768, 1152), "bf16"),
    ((8192, 768), "bf16"),
    ((32768, 768), "fp16"),
    ((16384, 512), "fp32"),
)
CPU_SHAPES: Shapes = (((2048, 512), "fp32"), ((256, 512), "fp32"))
CHECKED = 8192
"""Pairs up to which results are compared with the reference's in float32, whose matrices have to fit."""


def open_clip_loss() -> Step:
    try:
        module = importlib.import_module("open_clip.loss")
    except ImportError as missing:
        raise Unavailable(f"open_clip: {missing}") from missing
    loss: Step = module.SigLipLoss()
    return loss


def siglip_kernel() -> Step:
    try:
        fused = importlib.import_module("siglip_kernel").fused_siglip_loss
    except ImportError as missing:
        raise Unavailable(f"siglip-kernel: {missing}") from missing
    return lambda image, text, scale, bias: fused(image, text, scale.log(), bias)


def mmfast(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return ops.siglip_loss(image, text, scale, bias)


PROVIDERS: dict[str, Callable[[], Step]] = {
    "eager": open_clip_loss,
    "compile": lambda: _harness.compiled(open_clip_loss()),
    "siglip-kernel": siglip_kernel,
    "mmfast": lambda: mmfast,
    "mmfast+compile": lambda: _harness.compiled(mmfast),
}


def measurements(options: Options) -> Iterator[tuple[Spec, int]]:
    on_gpu = options.device == "cuda"
    names = [name for name in PROVIDERS if on_gpu or name != "siglip-kernel"]
    shapes = GPU_SHAPES if on_gpu else CPU_SHAPES
    yield from _harness.specs("siglip_loss", options, shapes[: 2 if options.quick else None], MODES, names)
    host = [name for name in names if name not in ("compile", "mmfast+compile")]
    yield from _harness.specs("siglip_loss", options, (((8, 16), "fp32"),), ("host",), host)


def test_siglip_loss(spec: Spec, pass_number: int, options: Options, measure: Callable[..., None]) -> None:
    fn = PROVIDERS[spec.provider]()
    args = inputs(spec, options.device)
    try:
        call = _harness.call_of(spec.mode, fn, args)
        if pass_number == 0 and spec.shape[0] <= CHECKED:
            check(call(), spec, args)
    except torch.cuda.OutOfMemoryError as full:
        raise Unavailable(f"{spec.title}: out of memory") from full
    passes = {"forward": (False,), "forward+backward": (False, True)}.get(spec.mode, ())
    needs = [op.cost(*args[:2], backward=backward) for backward in passes]
    moved, flops = (sum(need[name] for need in needs) for name in ("bytes", "flops"))
    backend = explain(mmfast, *args)[0].backend if spec.provider == "mmfast" else ""
    measure(call, moved=moved, flops=flops, backend=backend)


def inputs(spec: Spec, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features of unit length, pairs of which resemble each other, and SigLIP's first scale and bias."""
    shared = torch.randn(spec.shape, device=device)
    gradient = spec.mode != "forward"
    image, text = (F.normalize(shared + torch.randn_like(shared), dim=-1).to(DTYPES[spec.dtype]) for _ in range(2))
    scale, bias = (torch.tensor(value, device=device) for value in (10.0, -10.0))
    return tuple(x.requires_grad_(gradient) for x in (image, text, scale, bias))  # type: ignore[return-value]


def check(found: Any, spec: Spec, args: tuple[Tensor, ...]) -> None:
    """The loss, or the features' gradients, within rounding of the reference's in float32."""
    exact = tuple(x.detach().float().requires_grad_(x.requires_grad) for x in args)
    expected = _harness.call_of(spec.mode, reference.siglip_loss, exact)()
    if isinstance(found, Tensor):
        found, expected = (found,), (expected,)
    _harness.check_same(found[:2], expected[:2], DTYPES[spec.dtype], spec.provider)


@pytest.mark.parametrize("pairs", [1100, 256])
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
def test_is_never_slower_than_open_clip_on_a_cpu(mode: str, pairs: int) -> None:
    """Chunks, and the ops on the whole matrix that serve few logits: a ratio of at least 0.97."""
    spec = Spec("siglip_loss", "", mode, (pairs, 256), "fp32")
    with _harness.one_thread():
        args = inputs(spec, "cpu")
        ours, theirs = (_harness.call_of(mode, fn, args) for fn in (mmfast, open_clip_loss()))
        ratio = _harness.interleaved_ratio(theirs, ours)
    assert ratio >= 0.97, f"open_clip's loss takes {ratio:.3f} of the time of mmfast's"
