"""Models of timm, torchvision and transformers beside themselves after `mmfast.accelerate`.

A row is a batch of images through the model; the shape is (batch, channels, height, width). The original and the
accelerated model are two copies with the same weights. On a CPU the accelerated one must not be slower. `--full` adds
the originals compiled, which takes minutes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmfast
from mmfast.benchmarks import _harness
from mmfast.benchmarks._harness import DTYPES, Options, Spec, Unavailable

MODES = ("forward", "forward+backward")


def timm(small: bool) -> nn.Module:
    from timm import create_model

    options = {"img_size": 64, "depth": 4} if small else {}
    name = "vit_tiny_patch16_224" if small else "vit_base_patch16_224"
    return create_model(name, init_values=1e-5, drop_path_rate=0.1, num_classes=10, **options)


def torchvision(small: bool) -> nn.Module:
    from torchvision.models import VisionTransformer

    if small:
        return VisionTransformer(64, 16, 4, 3, 192, 768, num_classes=10)
    return VisionTransformer(224, 16, 12, 12, 768, 3072, num_classes=10)


def transformers(small: bool) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"image_size": 64, "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3}
    return ViTForImageClassification(ViTConfig(**(sizes | {"intermediate_size": 768} if small else {}), num_labels=10))


def dinov2(small: bool) -> nn.Module:
    from transformers import Dinov2Config, Dinov2ForImageClassification

    sizes = {"image_size": 64, "patch_size": 16, "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3}
    return Dinov2ForImageClassification(Dinov2Config(**(sizes if small else {}), num_labels=10))


MODELS: dict[str, Callable[[bool], nn.Module]] = {
    "timm": timm,
    "torchvision": torchvision,
    "transformers": transformers,
    "dinov2": dinov2,
}


@cache
def pair(
    name: str, *, small: bool, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, nn.Module]:
    """The original and an accelerated copy, in evaluation mode."""
    try:
        original = MODELS[name](small).eval()
    except ImportError as missing:
        raise Unavailable(f"{name}: {missing}") from missing
    original = original.to(device, dtype)
    return original, mmfast.accelerate(copy.deepcopy(original), strict=True)


def logits(model: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    out = model(x)
    return out if isinstance(out, Tensor) else out.logits


def call_of(model: Callable[[Tensor], Any], x: Tensor, mode: str) -> Callable[[], Any]:
    """A forward pass without gradients, or one step of training without its optimiser."""
    if mode == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return logits(model, x)

        return forward

    def step() -> None:
        logits(model, x).float().square().mean().backward()

    return step


def measurements(options: Options) -> Iterator[tuple[Spec, int]]:
    """Each model, original and accelerated, and with `--full` on a GPU the original compiled."""
    on_gpu = options.device == "cuda"
    slow = on_gpu and (options.full or any(peer.endswith("compile") for peer in options.peers))
    providers = [f"{name} {kind}" for name in MODELS for kind in ("eager", "mmfast", *("compile",) * slow)]
    if options.peers:
        providers = [p for p in providers if p in options.peers or p.endswith("mmfast")]
    batch = ((64 if options.quick else 256), 3, 224, 224) if on_gpu else (4, 3, 64, 64)
    for mode in MODES:
        for number in range(options.passes):
            for provider in providers:
                yield Spec("accelerate", provider, mode, batch, "bf16" if on_gpu else "fp32"), number


def test_model(spec: Spec, pass_number: int, measure: Callable[..., None], options: Options) -> None:
    name, kind = spec.provider.split()
    dtype, on_gpu = DTYPES[spec.dtype], options.device == "cuda"
    models = pair(name, small=not on_gpu, device=options.device, dtype=dtype)
    x = torch.randn(spec.shape, device=options.device).to(dtype)
    if pass_number == 0:
        with torch.no_grad():
            _harness.check_same(logits(models[1], x), logits(models[0], x), dtype, spec.provider)
    model: Any = models[1] if kind == "mmfast" else models[0]
    if kind == "compile":
        model = _compiled(model)
    measure(call_of(model, x, spec.mode), images=spec.shape[0], gaps=True)


@cache
def _compiled(model: nn.Module) -> Callable[[Tensor], Any]:
    return torch.compile(model, dynamic=False)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_never_slower_on_cpu(name: str, mode: str, options: Options) -> None:
    """On a CPU an accelerated model takes at most 3 % longer than the original, measured in turn."""
    if options.device != "cpu":
        pytest.skip("a CPU's bound")
    original, accelerated = pair(name, small=True)
    x = torch.randn(2, 3, 64, 64)
    with _harness.one_thread():
        ratio = _harness.interleaved_ratio(*(call_of(model, x, mode) for model in (original, accelerated)))
    assert ratio >= 0.97, f"{name} {mode}: {ratio:.3f} of the original's speed"
