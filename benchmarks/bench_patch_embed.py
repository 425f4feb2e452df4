"""`patch_embed` beside what it replaces: conv2d, flatten, transpose, cat and add; compiled; and unfold with a linear.

A shape is (batch, image size, patch size, D), with a class token and positions. The op's name says how the pixels lie:
nchw or channels_last, in the dtype of the weight or as uint8, which the peers normalise first. Backward is of the
weight, the bias, the positions and the class token, as in training. A row's limit is its FLOPs at the rate of a large
product, or its bytes at that of a copy, whichever takes longer.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast import explain, nn, ops
from mmfast.benchmarks import _harness
from mmfast.benchmarks._harness import DTYPES, MODES, Options, Shapes, Spec

op = importlib.import_module("mmfast.ops.patch_embed")  # the name is also the function's

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

# ViT-B/16 and L/14; L/14 of DINOv2's size of image, whose rows are not whole 16-byte pieces.
LARGE: Shapes = (
    ((256, 224, 16, 768), "bf16"),
    ((256, 224, 14, 1024), "bf16"),
    ((32, 224, 16, 768), "bf16"),
    ((32, 224, 14, 1024), "bf16"),
    ((1, 224, 16, 768), "bf16"),
    ((1, 224, 14, 1024), "bf16"),
)
GPU_SHAPES: dict[str, Shapes] = {
    "nchw": (*LARGE, ((16, 518, 14, 1024), "bf16"), ((256, 224, 16, 768), "fp32")),
    "uint8": LARGE,
    "channels_last": (LARGE[0], LARGE[1], LARGE[4]),
    "uint8 channels_last": (LARGE[0], LARGE[1], LARGE[4]),
}
CPU_SHAPES: dict[str, Shapes] = {"nchw": (((2, 224, 16, 192), "fp32"),), "uint8": (((2, 224, 16, 192), "fp32"),)}


def normalised(images: Tensor, weight: Tensor) -> Tensor:
    """Floating images as they are, bytes as torchvision's transforms leave them."""
    if images.is_floating_point():
        return images
    mean, std = (images.new_tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (MEAN, STD))
    return ((images.float() / 255 - mean) / std).to(weight.dtype)


def with_tokens(y: Tensor, pos_embed: Tensor, prefix_tokens: Tensor) -> Tensor:
    return torch.cat([prefix_tokens.expand(y.shape[0], -1, -1), y], dim=1) + pos_embed


def eager(images: Tensor, weight: Tensor, bias: Tensor, pos_embed: Tensor, prefix_tokens: Tensor) -> Tensor:
    y = F.conv2d(normalised(images, weight), weight, bias, stride=weight.shape[2:])
    return with_tokens(y.flatten(2).transpose(1, 2), pos_embed, prefix_tokens)


def unfolded(images: Tensor, weight: Tensor, bias: Tensor, pos_embed: Tensor, prefix_tokens: Tensor) -> Tensor:
    size = weight.shape[2]
    x = normalised(images, weight)
    x = x.unflatten(3, (-1, size)).unflatten(2, (-1, size)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return with_tokens(F.linear(x, weight.flatten(1), bias), pos_embed, prefix_tokens)


def mmfast(images: Tensor, weight: Tensor, bias: Tensor, pos_embed: Tensor, prefix_tokens: Tensor) -> Tensor:
    mean, std = (None, None) if images.is_floating_point() else (MEAN, STD)
    return ops.patch_embed(images, weight, bias, pos_embed=pos_embed, prefix_tokens=prefix_tokens, mean=mean, std=std)


PROVIDERS: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "eager": lambda: eager,
    "compile": lambda: _harness.compiled(eager),
    "unfold+linear": lambda: unfolded,
    "unfold+linear, compile": lambda: _harness.compiled(unfolded),
    "mmfast": lambda: mmfast,
    "mmfast+compile": lambda: _harness.compiled(mmfast),
}


def measurements(options: Options) -> Iterator[tuple[Spec, int]]:
    for layout, shapes in (GPU_SHAPES if options.device == "cuda" else CPU_SHAPES).items():
        chosen = shapes[: 1 if options.quick else None]
        yield from _harness.specs(f"patch_embed {layout}", options, chosen, MODES, list(PROVIDERS))
    yield from _harness.specs("patch_embed nchw", options, (((1, 8, 4, 16), "fp32"),), ("host",), list(PROVIDERS))


def test_patch_embed(spec: Spec, pass_number: int, options: Options, measure: Callable[..., None]) -> None:
    batch, size, patch, dim = spec.shape
    dtype, layout = DTYPES[spec.dtype], spec.op.split()[1:]
    images = torch.rand(batch, 3, size, size, device=options.device)
    images = (images * 255).to(torch.uint8) if "uint8" in layout else images.to(dtype)
    if "channels_last" in layout:
        images = images.contiguous(memory_format=torch.channels_last)
    rows = (size // patch) ** 2 + 1
    parts = (
        _harness.randn(shape, spec, options.device) for shape in ((dim, 3, patch, patch), (dim,), (rows, dim), (1, dim))
    )
    args = (images, *parts)
    with torch.no_grad():
        args[1].mul_((3 * patch * patch) ** -0.5)
    call = _harness.call_of(spec.mode, PROVIDERS[spec.provider](), args)
    if pass_number == 0:
        _harness.check_same(call(), _harness.call_of(spec.mode, eager, args)(), dtype, spec.provider)
    passes = {"forward": 1, "backward": 1, "forward+backward": 2}.get(spec.mode, 0)
    needs = op.cost(images, args[1], prefix=1)
    measure(call, moved=passes * needs["bytes"], flops=passes * needs["flops"], backend=_backend(spec, args))


def _backend(spec: Spec, args: tuple[Any, ...]) -> str:
    """What serves mmfast's own rows."""
    return explain(mmfast, *args)[0].backend if spec.provider == "mmfast" else ""


@pytest.mark.parametrize("what", ["op", "module"])
@pytest.mark.parametrize("mode", ["forward", "training"])
def test_never_slower_than_torch_on_a_cpu(what: str, mode: str) -> None:
    """The torch backend in one interleaved benchmark with what it replaces: a ratio of at least 0.97."""
    embed = nn.PatchEmbed(img_size=224, patch_size=16, embed_dim=192)
    x, tokens, positions = torch.randn(2, 3, 224, 224), torch.randn(1, 192), torch.randn(197, 192)
    weight, bias = embed.proj.weight, embed.proj.bias
    assert bias is not None
    grad = torch.randn(2, 197, 192) if what == "op" else torch.randn(2, 196, 192)

    def theirs() -> Tensor:
        if what == "op":
            return eager(x, weight, bias, positions, tokens)
        return embed.proj(x).flatten(2).transpose(1, 2)

    def ours() -> Tensor:
        return mmfast(x, weight, bias, positions, tokens) if what == "op" else embed(x)

    def run(fn: Callable[[], Tensor]) -> None:
        y = fn()
        if mode == "training":
            y.backward(grad)

    with _harness.one_thread():
        ratio = _harness.interleaved_ratio(lambda: run(theirs), lambda: run(ours))
    assert ratio >= 0.97, f"PyTorch's own ops take {ratio:.3f} of the time of the {what}"
