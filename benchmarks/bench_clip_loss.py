"""`clip_loss` beside open_clip's eager loss, the same compiled, and the kernels of other libraries.

A shape is (pairs, width). Features are bfloat16 of length 1, the scale is 100 (a float for the peers whose temperature
has no gradient). "mmfast" is what users get, and the row names what served; "mmfast owned rows", "mmfast blocks" and
"mmfast chunks" are the two ways of the kernels' backward and the torch backend, from which the rules in
kernels/clip_loss.py (`OWNED_WIDTH`) and mmfast/ops/clip_loss.py (`SMALL`) should follow. Peak memory is that beside the
features. Cut Cross Entropy is called for either direction, with its filter of small gradients off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast import backend, explain, ops
from mmfast.benchmarks import _harness
from mmfast.benchmarks._harness import DTYPES, Options, Shapes, Spec, Unavailable
from mmfast.ops.clip_loss import cost

MODES = ("forward", "forward+backward")
GPU_SHAPES: Shapes = (
    ((32768, 512), "bf16"),
    ((32768, 768), "bf16"),
    ((32768, 1024), "bf16"),
    ((32768, 256), "bf16"),
    ((8192, 512), "bf16"),
    ((4096, 512), "bf16"),
    ((1024, 512), "bf16"),
)
FULL_SHAPES: Shapes = (((65536, 512), "bf16"), ((262144, 512), "bf16"))
"""What takes minutes."""
CPU_SHAPES: Shapes = (((2048, 64), "fp32"), ((512, 64), "fp32"))
SCALE = 100.0
LARGEST_MATRIX = 65536
"""Pairs up to which what stores the matrix is run: 17 GB at 32768, 69 GB at 65536."""

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """open_clip's ClipLoss on one process, which computes the matrix for either direction, under autocast."""
    places = torch.arange(len(image), device=image.device)
    images, texts = scale.to(image.dtype) * image @ text.T, scale.to(image.dtype) * text @ image.T
    return (F.cross_entropy(images.float(), places) + F.cross_entropy(texts.float(), places)) / 2


def mmfast(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    return ops.clip_loss(image, text, scale)


WAYS = {"mmfast owned rows": ("triton", True), "mmfast blocks": ("triton", False), "mmfast chunks": ("torch", None)}


@contextmanager
def way(provider: str) -> Iterator[None]:
    """One backend, and one way of its backward, whatever the rules say."""
    name, own = WAYS.get(provider, (None, None))
    with ExitStack() as stack:
        if name:
            stack.enter_context(backend(name))
        if own is not None:
            stack.enter_context(mock.patch("mmfast.kernels.clip_loss.owns", return_value=own))
        yield


def memeff(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    return _memeff()(image, text)


@cache
def _memeff() -> Any:
    from memeff.clip_loss import MemoryEfficientCLIPLoss

    return MemoryEfficientCLIPLoss(temperature=1 / SCALE, normalized_inputs=True, stable=False)


def inf_cl(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    from inf_cl import cal_flash_loss

    return (cal_flash_loss(image, text, scale=scale).mean() + cal_flash_loss(text, image, scale=scale).mean()) / 2


def cut(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    places, scaled = torch.arange(len(image), device=image.device), scale.to(image.dtype)
    one = linear_cross_entropy(scaled * image, text, places, filter_eps=None)
    return (one + linear_cross_entropy(scaled * text, image, places, filter_eps=None)) / 2


PROVIDERS: dict[str, Callable[[], Loss]] = {
    "eager": lambda: eager,
    "compile": lambda: _harness.compiled(eager),
    "memeff": lambda: memeff,
    "inf-cl": lambda: inf_cl,
    "cut-cross-entropy": lambda: cut,
    "mmfast": lambda: mmfast,
    "mmfast+compile": lambda: _harness.compiled(mmfast),
    **dict.fromkeys(WAYS, lambda: mmfast),
}
MODULES = {"memeff": "memeff", "inf-cl": "inf_cl", "cut-cross-entropy": "cut_cross_entropy"}
OWN = ("mmfast", *WAYS)


def measurements(options: Options) -> Iterator[tuple[Spec, int]]:
    on_gpu = options.device == "cuda"
    names = list(PROVIDERS) if on_gpu else ["eager", "compile", "mmfast", "mmfast chunks"]
    chosen = options.providers(names, OWN)
    shapes = GPU_SHAPES + (FULL_SHAPES if options.full else ()) if on_gpu else CPU_SHAPES
    for spec, number in _harness.specs("clip_loss", options, shapes[: 2 if options.quick else None], MODES, names):
        too_large = spec.shape[0] > LARGEST_MATRIX and not spec.provider.startswith("mmfast")
        owned = spec.provider == "mmfast owned rows" and (spec.shape[1] > 512 or spec.mode == "forward")
        if spec.provider in chosen and not too_large and not owned:
            yield spec, number


def test_clip_loss(spec: Spec, pass_number: int, options: Options, measure: Callable[..., None]) -> None:
    batch, width = spec.shape
    image, text, scale = _inputs(batch, width, spec, options.device)
    if spec.provider in MODULES:
        _require(spec.provider)
    loss = PROVIDERS[spec.provider]()
    learns = spec.provider != "memeff"
    inputs = (image, text, scale) if learns else (image, text)

    def call() -> Any:
        with way(spec.provider):
            if spec.mode == "forward":
                with torch.no_grad():
                    return loss(image, text, scale)
            found = loss(image, text, scale)
            return (found.detach(), *torch.autograd.grad(found, inputs))

    if pass_number == 0 and batch <= LARGEST_MATRIX:
        with torch.no_grad() if spec.mode == "forward" else torch.enable_grad(), backend("torch"):
            truth = ops.clip_loss(image, text, scale)  # in float32
            expected = truth if spec.mode == "forward" else (truth.detach(), *torch.autograd.grad(truth, inputs))
        _harness.check_same(call(), expected, DTYPES[spec.dtype], spec.provider)
        del truth, expected
    needs = [cost(image, text), *([cost(image, text, backward=True)] if spec.mode != "forward" else [])]
    moved, flops = (sum(need[name] for need in needs) for name in ("bytes", "flops"))
    served = ""
    if spec.provider == "mmfast":
        served = "; ".join(f"{choice.backend} ({choice.reason})" for choice in explain(mmfast, image, text, scale))
    measure(call, moved=moved, flops=flops, backend=served)


def _inputs(batch: int, width: int, spec: Spec, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs as alike as those of a model that is being trained: a loss of about 1 at a scale of 100."""
    generator = torch.Generator(device).manual_seed(0)
    shared = 0.5 * torch.randn(batch, width, generator=generator, device=device)
    image, text = (
        F.normalize(shared + torch.randn(batch, width, generator=generator, device=device), dim=1)
        .to(DTYPES[spec.dtype])
        .requires_grad_()
        for _ in range(2)
    )
    return image, text, torch.tensor(SCALE, device=device, requires_grad=True)


def _require(provider: str) -> None:
    try:
        __import__(MODULES[provider])
    except ImportError as missing:
        raise Unavailable(f"{provider}: {missing}") from missing


def test_chunks_are_not_slower_than_the_matrix() -> None:
    """2048 pairs on one thread: four products in chunks, two of them again, against six. Bound: 1.1 times eager's."""
    spec = Spec("clip_loss", "mmfast", "forward+backward", (2048, 512), "fp32")
    image, text, scale = _inputs(2048, 512, spec, "cpu")

    def run(loss: Loss) -> Any:
        return torch.autograd.grad(loss(image, text, scale), (image, text, scale))

    with _harness.one_thread():
        ratio = _harness.interleaved_ratio(lambda: run(eager), lambda: run(mmfast), seconds=6.0)
    assert ratio >= 1 / 1.1, f"eager takes {ratio:.2f} of mmfast's time"
