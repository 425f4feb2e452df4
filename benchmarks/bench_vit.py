"""`mmfast.models.ViT` beside timm's with the same weights: images a second, inference and training steps.

Launch gaps are part of these times, as a user has them: at batch 1 they are most of the time. `eager`, `compile` and
`max-autotune` are timm's model, `accelerate` is it after `mmfast.accelerate`. A row's FLOPs are the model's, without
those that an implementation adds; its bytes are the weights, once, and their gradients in training.

Compiling takes most of the time of a run: L/14 and L/16 are compiled only with `--full`, and `max-autotune` is made
otherwise for inference at batch 256 alone. `--full --only "vit_l14 inference"` measures a part.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mmfast
from mmfast.benchmarks import _harness
from mmfast.benchmarks._harness import DTYPES, Options, Spec, Unavailable
from mmfast.models import ViT

MODELS: dict[str, dict[str, Any]] = {
    "vit_b16": {"img_size": 224, "patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12},
    "vit_l14": {"img_size": 224, "patch_size": 14, "embed_dim": 1024, "depth": 24, "num_heads": 16},
    "vit_l16": {"img_size": 224, "patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16},
    "vit_small_on_cpu": {"img_size": 64, "patch_size": 16, "embed_dim": 192, "depth": 4, "num_heads": 3},
}
# (model, mode, batch), the most important first: a run with a budget leaves out the last.
GPU_GROUPS = (
    ("vit_b16", "inference", 256),
    ("vit_b16", "inference", 1),
    ("vit_b16", "training", 256),
    ("vit_b16", "inference", 32),
    *((name, mode, 256) for mode in ("inference", "training") for name in ("vit_l14", "vit_l16")),
    *((name, "inference", batch) for batch in (1, 32) for name in ("vit_l14", "vit_l16")),
)
CPU_GROUPS = (("vit_small_on_cpu", "inference", 4), ("vit_small_on_cpu", "training", 4))
AUTOTUNED = ("vit_b16", "inference", 256)


def measurements(options: Options) -> Iterator[tuple[Spec, int]]:
    on_gpu = options.device == "cuda"
    for name, mode, batch in GPU_GROUPS if on_gpu else CPU_GROUPS:
        shape = ((batch, MODELS[name]["img_size"]), "bf16" if on_gpu else "fp32")
        yield from _harness.specs(name, options, (shape,), (mode,), providers(name, mode, batch, options))


def providers(name: str, mode: str, batch: int, options: Options) -> list[str]:
    """Those of a group; what takes minutes to compile only where it is asked for."""
    slow = options.full or name in ("vit_b16", "vit_small_on_cpu")
    autotuned = options.device == "cuda" and (options.full or (name, mode, batch) == AUTOTUNED)
    graphs = options.device == "cuda" and mode == "inference" and batch <= 32
    return [
        "eager",
        *(["compile"] if slow or "compile" in options.peers else []),
        *(["max-autotune"] if autotuned or "max-autotune" in options.peers else []),
        "accelerate",
        "mmfast",
        *(["mmfast+cuda_graph"] if graphs else []),
        *(["mmfast+compile"] if slow or "mmfast+compile" in options.peers else []),
    ]


@cache
def timm_model(name: str, device: str) -> nn.Module:
    try:
        from timm.models.vision_transformer import VisionTransformer
    except ImportError as missing:
        raise Unavailable(f"timm: {missing}") from missing
    torch.manual_seed(0)
    with torch.device(device):
        return VisionTransformer(num_classes=1000, **MODELS[name])


@cache
def model(name: str, kind: str, device: str, dtype: torch.dtype) -> nn.Module:
    """timm's model, the same accelerated, or mmfast's, with the same weights."""
    theirs = timm_model(name, device)
    if kind == "mmfast":
        with torch.device(device):
            ours = ViT(num_classes=1000, **MODELS[name])
        ours.load_state_dict(theirs.state_dict())
        return ours.to(dtype)
    made = copy.deepcopy(theirs).to(dtype)
    return mmfast.accelerate(made) if kind == "accelerate" else made


@cache
def flops(name: str, mode: str) -> int:
    """Of one image: the products and convolutions of timm's model, counted without computing them."""
    size = MODELS[name]["img_size"]
    with FlopCounterMode(display=False) as counter:
        out = timm_model(name, "meta")(torch.empty(1, 3, size, size, device="meta"))
        if mode == "training":
            out.sum().backward()
    return counter.get_total_flops()


def step(model: nn.Module, run: Callable[..., Tensor], images: Tensor, labels: Tensor) -> Tensor:
    """Loss and gradients of one training step, without the optimizer."""
    for parameter in model.parameters():
        parameter.grad = None
    loss = nn.functional.cross_entropy(run(images).float(), labels)
    loss.backward()
    return loss


def runner(chosen: nn.Module, provider: str, images: Tensor) -> Callable[..., Tensor]:
    """How a provider runs its model."""
    if provider == "max-autotune":
        run = _harness.compiled(chosen, "max-autotune")

        def graphed(x: Tensor) -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()  # its outputs may be overwritten
            return run(x)

        return graphed
    if provider.endswith("compile"):
        return _harness.compiled(chosen)
    if provider.endswith("cuda_graph"):
        return _graphed(chosen, images)
    return chosen


_graphs: dict[tuple[nn.Module, torch.Size], Callable[..., Tensor]] = {}


def _graphed(chosen: nn.Module, images: Tensor) -> Callable[..., Tensor]:
    if not hasattr(mmfast, "cuda_graph"):
        raise Unavailable("mmfast+cuda_graph: not in this version")
    key = (chosen, images.shape)
    if key not in _graphs:
        _graphs[key] = mmfast.cuda_graph(chosen, images)
    return _graphs[key]


def test_vit(spec: Spec, pass_number: int, options: Options, measure: Callable[..., None]) -> None:
    dtype, training = DTYPES[spec.dtype], spec.mode == "training"
    kind = spec.provider.partition("+")[0]
    chosen = model(spec.op, kind if kind in ("mmfast", "accelerate") else "eager", options.device, dtype)
    chosen.train(training)
    batch, size = spec.shape
    images = torch.randn(batch, 3, size, size, device=options.device, dtype=dtype)
    labels = torch.arange(batch, device=options.device) % 10
    run = runner(chosen, spec.provider, images)
    if training:

        def call() -> Any:
            return step(chosen, run, images, labels)
    else:

        def call() -> Any:
            with torch.inference_mode():
                return run(images)

    if pass_number == 0:
        theirs = model(spec.op, "eager", options.device, dtype).train(training)
        with torch.no_grad():
            truth = theirs(images)
            truth = nn.functional.cross_entropy(truth.float(), labels) if training else truth
        _harness.check_same(call(), truth, dtype, spec.provider)
        del truth
    weights = sum(parameter.numel() * parameter.element_size() for parameter in chosen.parameters())
    measure(
        call,
        moved=weights * (2 if training else 1) + images.numel() * images.element_size(),
        flops=batch * flops(spec.op, spec.mode),
        images=batch,
        gaps=True,
    )
    for parameter in chosen.parameters():
        parameter.grad = None
