"""`mmfast.models.ViT` beside timm's with the same weights: images a second, inference and training steps.

Launch gaps are part of these times, as a user has them: at batch 1 they are most of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.benchmarks import _harness
from mmfast.benchmarks._harness import DTYPES, Options, Shapes, Spec, Unavailable
from mmfast.models import ViT

# (batch, image size) of ViT-B/16 on a GPU; of a small one on a CPU.
GPU_SHAPES: Shapes = (((1, 224), "bf16"), ((32, 224), "bf16"), ((256, 224), "bf16"))
CPU_SHAPES: Shapes = (((4, 64), "fp32"),)
GPU_MODEL: dict[str, Any] = {"img_size": 224, "embed_dim": 768, "depth": 12, "num_heads": 12, "num_classes": 1000}
CPU_MODEL: dict[str, Any] = {"img_size": 64, "embed_dim": 192, "depth": 4, "num_heads": 3, "num_classes": 10}

PROVIDERS = ("eager", "compile", "mmfast", "mmfast+compile")  # eager and compile are timm's model
MODES = ("inference", "training")


def measurements(options: Options) -> Iterator[tuple[Spec, int]]:
    shapes = GPU_SHAPES if options.device == "cuda" else CPU_SHAPES
    if options.quick:
        shapes = shapes[:1]
    yield from _harness.specs("vit", options, shapes, MODES, PROVIDERS)


@cache
def models(device: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """timm's model and mmfast's, with the same weights."""
    try:
        from timm.models.vision_transformer import VisionTransformer
    except ImportError as missing:
        raise Unavailable(f"timm: {missing}") from missing
    torch.manual_seed(0)
    arguments = GPU_MODEL if device == "cuda" else CPU_MODEL
    theirs, ours = VisionTransformer(patch_size=16, **arguments), ViT(patch_size=16, **arguments)
    ours.load_state_dict(theirs.state_dict())
    return theirs.to(device, dtype), ours.to(device, dtype)


def step(model: nn.Module, run: Callable[..., Tensor], images: Tensor, labels: Tensor) -> Tensor:
    """Loss and gradients of one training step, without the optimizer."""
    for parameter in model.parameters():
        parameter.grad = None
    loss = nn.functional.cross_entropy(run(images).float(), labels)
    loss.backward()
    return loss


def test_vit(spec: Spec, pass_number: int, options: Options, measure: Callable[..., None]) -> None:
    dtype = DTYPES[spec.dtype]
    theirs, ours = models(options.device, dtype)
    chosen = ours if spec.provider.startswith("mmfast") else theirs
    batch, size = spec.shape
    images = torch.randn(batch, 3, size, size, device=options.device, dtype=dtype)
    labels = torch.arange(batch, device=options.device) % 10
    training = spec.mode == "training"
    chosen.train(training)
    theirs.train(training)
    run = _harness.compiled(chosen) if spec.provider.endswith("compile") else chosen
    if training:

        def call() -> Any:
            return step(chosen, run, images, labels)
    else:

        def call() -> Any:
            with torch.inference_mode():
                return run(images)

    if pass_number == 0:
        with torch.no_grad():
            truth = theirs(images)
            truth = nn.functional.cross_entropy(truth.float(), labels) if training else truth
        _harness.check_same(call(), truth, dtype, spec.provider)
    measure(call, images=batch, gaps=True)
    for parameter in chosen.parameters():
        parameter.grad = None
