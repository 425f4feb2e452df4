from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

import mmfast
from mmfast import ops, reference
from mmfast.ops.patch_embed import cost
from mmfast.reference.patch_embed import cases
from tests.grading import BACKENDS, DTYPES, check_against_reference, outputs_and_gradients

LABELS = [case.label for case in cases(torch.float32, torch.device("cpu"), large=False)]
GPU_LABELS = [case.label for case in cases(torch.float32, torch.device("meta"), large=True)][len(LABELS) :]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def conv(images: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What the op replaces, without tokens and positions."""
    return F.conv2d(images, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)


def parameters(dim: int, device: torch.device, patch: int = 4, channels: int = 3) -> list[Tensor]:
    weight = torch.randn(dim, channels, patch, patch) * (channels * patch * patch) ** -0.5
    return [weight.to(device), torch.randn(dim).to(device)]


def check(args: tuple[Any, ...], kwargs: dict[str, Any], backend: str, dtype: torch.dtype = torch.float32) -> None:
    check_against_reference(ops.patch_embed, reference.patch_embed, args, kwargs, backend, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("label", [*LABELS, *(pytest.param(x, marks=pytest.mark.gpu) for x in GPU_LABELS)])
@pytest.mark.usefixtures("poisoned")
def test_matches_the_reference(label: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    case = next(c for c in cases(dtype, device, large=label in GPU_LABELS) if c.label == label)
    check(case.args, case.kwargs, backend, dtype)


@pytest.mark.triton
@pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
@pytest.mark.parametrize("programs", [3, 264], ids=["large tiles", "small tiles"])
@pytest.mark.usefixtures("poisoned")
def test_several_tiles(programs: int, uint8: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows, columns and pixels than a tile has, of both tiles that a GPU would take."""
    from mmfast.kernels import patch_embed as forward

    monkeypatch.setattr(forward, "resident_programs", lambda device: programs)
    images = torch.randn(2, 3, 24, 45, device=device)
    weight, bias = parameters(140, device, patch=4)
    named = {"pos_embed": torch.randn(68, 140, device=device), "prefix_tokens": torch.randn(2, 140, device=device)}
    if uint8:
        images = (images * 60 + 128).clamp(0, 255).to(torch.uint8)
        named |= {"mean": MEAN, "std": STD}
    check((images, weight, bias), named, "triton")


@pytest.mark.triton
@pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
@pytest.mark.usefixtures("poisoned")
def test_patches_in_several_splits(uint8: bool, device: torch.device) -> None:
    """The weight's gradient of 576 patches is summed in two parts, the second one shorter; the same bits twice."""
    images = torch.rand(4, 1, 24, 24, device=device)
    images = (images * 255).to(torch.uint8) if uint8 else images
    args, named = (images, *parameters(8, device, patch=2, channels=1)), {"mean": [0.4], "std": [0.2]}
    check(args, named, "triton")
    with mmfast.backend("triton"):
        first, second = (outputs_and_gradients(ops.patch_embed, args, named) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.triton
def test_tiles_follow_the_shape() -> None:
    """The rule: 588 pixels in steps of 32, narrow tiles of float32 tokens, and wgmma's 64 rows in small grids."""
    from mmfast.kernels.patch_embed import TileConfig

    half, full, byte = torch.bfloat16, torch.float32, torch.uint8
    assert TileConfig.forward(50176, 768, 768, half, half, half, "tf32", 264) == TileConfig(128, 128, 64, 8, 3)
    assert TileConfig.forward(65536, 1024, 588, half, half, half, "tf32", 264) == TileConfig(128, 128, 32, 8, 4)
    assert TileConfig.forward(50176, 768, 768, full, half, full, "tf32", 264) == TileConfig(128, 64, 32, 8, 4)
    assert TileConfig.forward(196, 768, 768, half, half, half, "tf32", 264) == TileConfig(64, 32, 64, 4, 4)
    assert TileConfig.forward(196, 768, 768, byte, half, half, "tf32", 264) == TileConfig(32, 64, 64, 4, 4)
    assert TileConfig.forward(196, 768, 768, full, full, full, "ieee", 264).block_k == 16


@pytest.mark.triton
def test_division_by_multiplication_is_exact() -> None:
    from mmfast.kernels._patch_embed_pixels import Divisor

    edges = [0, 1, 2, 2**31 - 1, 2**31 - 2, 2**30, 12345678]
    for divisor in (1, 2, 3, 7, 14, 16, 37, 196, 256, 1369, 2**20 - 1, 2**30 + 1, 2**31 - 1):
        _, multiplier, shift = Divisor.of(divisor)
        for x in [*edges, *(k * divisor + d for k in (1, 5, 1000) for d in (-1, 0, 1))]:
            if 0 <= x < 2**31:
                assert x * multiplier < 2**63
                assert x * multiplier >> shift == x // divisor


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "crop": lambda x: x[:, :3, 1:10, 2:11],
    "crop of channels_last": lambda x: x[:, :3].contiguous(memory_format=torch.channels_last)[..., 1:11, 3:],
    "three of four channels": lambda x: x[:, 1:],
    "three of four channels_last": lambda x: x.contiguous(memory_format=torch.channels_last)[:, :3],
    "every second image": lambda x: x[::2, :3],
    "every second pixel": lambda x: x[:, :3, :, ::2],
    "transposed": lambda x: x[:, :3].transpose(2, 3),
    "grey as colours": lambda x: x[:, :1].expand(-1, 3, -1, -1),
    "one image many times": lambda x: x[:1, :3].expand(3, -1, -1, -1),
    "batch innermost": lambda x: x[:, :3].permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "one row of patches": lambda x: x[:1, :3, :4],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("poisoned")
def test_any_strides(layout: str, backend: str, device: torch.device) -> None:
    base = torch.randn(3, 4, 12, 13, device=device, requires_grad=True)
    images = LAYOUTS[layout](base)
    weight, bias = (p.requires_grad_() for p in parameters(20, device, channels=images.shape[1]))
    leaves = (base, weight, bias)
    with mmfast.backend(backend):
        y = ops.patch_embed(images, weight, bias)
        found = torch.autograd.grad(y.square().sum(), leaves)
    wanted = conv(LAYOUTS[layout](base), weight, bias)
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)
    for got, want in zip(found, torch.autograd.grad(wanted.square().sum(), leaves), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-4)


@pytest.mark.triton
@pytest.mark.usefixtures("poisoned")
def test_strided_parameters_and_gradient(device: torch.device) -> None:
    """A weight in channels_last, sliced and transposed parameters, and the expanded gradient of `.sum()`."""
    images = torch.randn(2, 3, 8, 9, device=device)
    weight = parameters(24, device)[0].contiguous(memory_format=torch.channels_last)
    bias, rest = torch.randn(48, device=device)[::2], torch.randn(24, 8, device=device)
    inputs = [t.requires_grad_() for t in (weight, bias, rest[:, :5].t(), rest[:, 5:6].t().unsqueeze(0))]

    def call(fn: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        y = fn(images, inputs[0], inputs[1], pos_embed=inputs[2], prefix_tokens=inputs[3])
        return (y, *torch.autograd.grad(y.sum(), inputs))

    with mmfast.backend("triton"):
        found = call(ops.patch_embed)
    for got, want in zip(found, call(reference.patch_embed), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert found[1].stride() == weight.stride()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "wanted", [(1, 0, 0, 0, 0), (0, 1, 0, 0, 0), (0, 0, 1, 0, 0), (0, 0, 0, 1, 0), (0, 1, 0, 0, 1)], ids=str
)
@pytest.mark.usefixtures("poisoned")
def test_only_the_gradients_asked_for(wanted: tuple[int, ...], backend: str, device: torch.device) -> None:
    inputs = [torch.randn(2, 3, 8, 8, device=device), *parameters(12, device)]
    inputs += [torch.randn(5, 12, device=device), torch.randn(1, 12, device=device)]
    for tensor, want in zip(inputs, wanted, strict=True):
        tensor.requires_grad_(bool(want))
    asked = [t for t in inputs if t.requires_grad]
    results = []
    for fn in (ops.patch_embed, reference.patch_embed):
        with mmfast.backend(backend):
            y = fn(*inputs[:3], pos_embed=inputs[3], prefix_tokens=inputs[4])
            results.append(torch.autograd.grad(y.square().sum(), asked))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
def test_empty_batch(uint8: bool, backend: str, device: torch.device) -> None:
    images = torch.empty(0, 3, 8, 8, device=device)
    images = images.to(torch.uint8) if uint8 else images.requires_grad_()
    named = {"pos_embed": torch.randn(5, 12, device=device), "prefix_tokens": torch.randn(1, 12, device=device)}
    leaves = [t.requires_grad_() for t in (*parameters(12, device), *named.values())]
    with mmfast.backend(backend):
        y = ops.patch_embed(images, *leaves[:2], **named)
        found = torch.autograd.grad(y.sum(), leaves)
    assert y.shape == (0, 5, 12)
    assert not any(bool(g.any()) for g in found)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("poisoned")
def test_nan_stays_in_its_patch(backend: str, device: torch.device) -> None:
    """A pixel makes its token NaN and no other; one beyond the last whole patch makes none. So in the gradients."""
    images = torch.randn(2, 3, 9, 15, device=device)
    weight, bias = (p.requires_grad_() for p in parameters(12, device, patch=5))
    images[1, 2, 4, 14] = float("nan")  # of the last patch, its last row and column
    images[0, :, 5:] = float("nan")
    with mmfast.backend(backend):
        y = ops.patch_embed(images, weight, bias)
        y.nan_to_num(0.0).square().sum().backward()
    assert y.shape == (2, 3, 12)
    assert y[1, 2].isnan().all()
    assert y.isnan().sum() == 12
    poisoned = weight.grad.isnan()
    assert poisoned[:, 2, 4, 4].all()
    assert poisoned.sum() == 12
    assert bias.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_parameters_of_16_bit_images(backend: str, device: torch.device) -> None:
    """The products are 16-bit, and so are the tokens without positions; float32 positions make float32 tokens."""
    images = torch.randn(2, 3, 8, 8, device=device).half()
    weight, bias = parameters(24, device)
    pos_embed = torch.randn(4, 24, device=device)
    check((images, weight, bias), {}, backend, torch.float16)
    check((images, weight, bias), {"pos_embed": pos_embed}, backend, torch.float16)
    with mmfast.backend(backend):
        y, dimages, dweight, dbias = outputs_and_gradients(ops.patch_embed, (images, weight, bias), {})
        wide = ops.patch_embed(images, weight, bias, pos_embed=pos_embed)
    assert (y.dtype, dimages.dtype) == (torch.float16, torch.float16)
    assert (dweight.dtype, dbias.dtype, wide.dtype) == (torch.float32,) * 3


def photograph(device: torch.device) -> tuple[Tensor, Tensor]:
    """A real picture as uint8, and as timm's evaluation transform (resize, crop, ToTensor, Normalize) makes it."""
    datasets, timm_data = pytest.importorskip("sklearn.datasets"), pytest.importorskip("timm.data")
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    picture = Image.fromarray(np.asarray(datasets.load_sample_image("china.jpg")))
    transform = timm_data.create_transform(input_size=(3, 32, 32), is_training=False, mean=MEAN, std=STD, crop_pct=0.9)
    for step in transform.transforms:
        if type(step).__name__ in ("ToTensor", "MaybeToTensor"):
            pixels = pil_to_tensor(picture)
        picture = step(picture)
    return pixels.unsqueeze(0).to(device), picture.unsqueeze(0).to(device)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.usefixtures("poisoned")
def test_uint8_is_timms_own_preprocessing(channels_last: bool, backend: str, device: torch.device) -> None:
    """A photograph through timm's transform and a convolution, and its pixels through the op: outputs and gradients."""
    pixels, normalised = photograph(device)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == normalised.shape == (1, 3, 32, 32)
    if channels_last:
        pixels, normalised = (t.contiguous(memory_format=torch.channels_last) for t in (pixels, normalised))
    leaves = [p.requires_grad_() for p in parameters(32, device, patch=16)]
    dy = torch.randn(1, 4, 32, device=device)
    wanted = conv(normalised, *leaves)
    with mmfast.backend(backend):
        y = ops.patch_embed(pixels, *leaves, mean=MEAN, std=STD)
        found = torch.autograd.grad(y, leaves, dy)
    if backend == "torch" and device.type == "cpu" and not channels_last:
        assert torch.equal(y, wanted)
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=2e-5)
    for got, want in zip(found, torch.autograd.grad(wanted, leaves, dy), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("given", ["sequences", "tensors", "tensor and sequence", "mean", "std", "neither"])
@pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
@pytest.mark.parametrize("channels", [3, 6])
@pytest.mark.usefixtures("poisoned")
def test_normalisation(channels: int, uint8: bool, given: str, backend: str, device: torch.device) -> None:
    """Numbers or tensors, one or both; of tensors the gradient too; of more channels than a launch has numbers for."""
    mean, std = [0.485, 0.456, 0.406, 0.2, 0.5, 0.3][:channels], [0.229, 0.224, 0.225, 0.3, 0.25, 0.4][:channels]
    named: dict[str, Any] = {} if given == "neither" else {"mean": mean, "std": std}
    if given in ("mean", "std"):
        named = {given: named[given]}
    if given in ("tensors", "tensor and sequence"):
        named["mean"] = torch.tensor(mean, device=device).view(1, channels, 1, 1)
    if given == "tensors":
        named["std"] = torch.tensor(std, device=device)
    images = torch.rand(2, channels, 8, 8, device=device)
    images = (images * 255).to(torch.uint8) if uint8 else images
    check((images, *parameters(12, device, channels=channels)), named, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("named", [{"mean": (0.8,) * 3, "std": (0.05,) * 3}, {"mean": torch.full((3,), 0.8)}], ids=str)
def test_rounding_is_not_amplified(named: dict[str, Any], backend: str, device: torch.device) -> None:
    """Nearly grey pixels far from zero: the bias must be that of the rounded weight. Small weights: not subnormal."""
    named = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in named.items()}
    images = torch.randint(196, 212, (4, 3, 16, 16), device=device).to(torch.uint8)
    weight, bias = parameters(24, device, patch=8)
    check((images, (weight * 0.01).half(), (bias * 1e-3).half()), named, backend, torch.float16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_picture_as_bytes_and_as_floats(backend: str, device: torch.device) -> None:
    images = torch.randint(0, 256, (2, 3, 8, 8), device=device).to(torch.uint8)
    weight, bias = parameters(12, device)
    with mmfast.backend(backend):
        found = ops.patch_embed(images, weight, bias, mean=MEAN, std=STD)
        floats = ops.patch_embed(images / 255, weight, bias, mean=MEAN, std=STD)
    torch.testing.assert_close(found, floats, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_differentiable_twice(backend: str, device: torch.device) -> None:
    """A gradient penalty: backward of a backward made with create_graph=True."""
    inputs = [torch.randn(2, 3, 8, 8, device=device), *parameters(6, device)]
    inputs += [torch.randn(5, 6, device=device), torch.randn(1, 6, device=device)]
    for tensor in inputs:
        tensor.requires_grad_()

    def penalty(fn: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        y = fn(*inputs[:3], pos_embed=inputs[3], prefix_tokens=inputs[4], mean=MEAN, std=STD)
        grads = torch.autograd.grad(y.sin().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)

    with mmfast.backend(backend):
        found = penalty(ops.patch_embed)
    for got, want in zip(found, penalty(reference.patch_embed), strict=True):
        assert float((got - want).norm() / want.norm()) < 1e-4


def test_formulas_in_float64() -> None:
    images, weight = torch.randn(2, 2, 5, 4), torch.randn(3, 2, 2, 2)
    rest = (torch.randn(3), torch.randn(5, 3), torch.randn(1, 3), torch.rand(2), torch.rand(2) + 0.5)
    args = [t.double().requires_grad_() for t in (images, weight, *rest)]

    def call(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, w, b, pos, prefix, mean, std: fn(
            x, w, b, pos_embed=pos, prefix_tokens=prefix, mean=mean, std=std
        )

    assert torch.autograd.gradcheck(call(reference.patch_embed), args)
    assert torch.autograd.gradcheck(call(ops.patch_embed), args)
    assert torch.autograd.gradgradcheck(call(ops.patch_embed), args)

    # Below the public function, which sends float64 to PyTorch's ops: the registered autograd formula.
    def registered(*tensors: Tensor) -> Tensor:
        return torch.ops.mmfast.patch_embed(*tensors, [0.4, 0.5], [0.2, 0.3], 2.0, torch.float64)

    assert torch.autograd.gradcheck(registered, args[:5])
    pixels = torch.randint(0, 256, (2, 2, 5, 4), dtype=torch.uint8)
    assert torch.autograd.gradcheck(lambda *a: ops.patch_embed(pixels, *a, mean=[0.4, 0.5], std=[0.2, 0.3]), args[1:3])


def test_equation_of_the_paper() -> None:
    """z0 = [x_class; x_1 E; ...; x_N E] + E_pos (arXiv:2010.11929, equation 1), of an image that can be read."""
    image = torch.arange(16.0).view(1, 1, 4, 4)
    weight = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0]]).view(2, 1, 2, 2)  # first pixel; twice the last
    pos_embed = torch.arange(5.0).view(5, 1) * 100 + torch.zeros(5, 2)
    wanted = torch.tensor([[[7.0, 8.0], [100.0, 110.0], [202.0, 214.0], [308.0, 326.0], [410.0, 430.0]]])
    for fn in (ops.patch_embed, reference.patch_embed):
        found = fn(image, weight, pos_embed=pos_embed, prefix_tokens=torch.tensor([[7.0, 8.0]]))
        torch.testing.assert_close(found, wanted)


def op_arguments(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    images, pixels = torch.randn(2, 3, 8, 9, device=device), torch.randint(0, 256, (2, 3, 8, 9)).byte().to(device)
    weight, bias = parameters(8, device)
    pos, prefix, dy = (torch.randn(n, 8, device=device) for n in (5, 1, 5))
    leaf = [t.clone().requires_grad_() for t in (images, weight, bias, pos, prefix)]
    last = images.contiguous(memory_format=torch.channels_last)
    dy, end = dy.expand(2, -1, -1).contiguous(), (1.0, torch.float32)
    fold = (list(MEAN), list(STD), 255.0, torch.float32)
    return [
        ("patch_embed", (*leaf, None, None, *end)),
        ("patch_embed", (pixels, leaf[1], None, None, None, *fold)),
        ("patch_embed", (last, leaf[1].half(), leaf[2], leaf[3][1:], None, None, None, 1.0, torch.float16)),
        ("patch_embed_forward", (images[:, :, 1:], weight, None, None, prefix, None, None, *end)),
        ("patch_embed_backward", (dy, images, weight, None, None, *end, 1, [True, True, True])),
        ("patch_embed_backward", (dy, last, weight, list(MEAN), list(STD), *end, 1, [True, False, False])),
        ("patch_embed_backward", (dy, pixels, weight, *fold, 1, [False, True, False])),
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index", range(7))
def test_opcheck(index: int, backend: str, device: torch.device) -> None:
    name, args = op_arguments(device)[index]
    with mmfast.backend(backend):
        opcheck(getattr(torch.ops.mmfast, name).default, args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_equals_eager(compiler: str, backend: str, device: torch.device) -> None:
    """Full graph, forward and backward, then another batch size under dynamic shapes; floats and bytes."""

    def fn(images: Tensor, weight: Tensor, bias: Tensor, pos_embed: Tensor, prefix_tokens: Tensor) -> Tensor:
        named = {"pos_embed": pos_embed, "prefix_tokens": prefix_tokens, "mean": MEAN, "std": STD}
        return ops.patch_embed(images, weight, bias, **named) * 2

    compiled = torch.compile(fn, fullgraph=True, backend=compiler, dynamic=True)
    with mmfast.backend(backend):
        for batch, uint8 in ((2, False), (3, False), (3, True)):
            images = torch.rand(batch, 3, 8, 12, device=device)
            images = (images * 255).to(torch.uint8) if uint8 else images
            args = (images, *parameters(10, device), *(torch.randn(n, 10, device=device) for n in (7, 1)))
            eager = outputs_and_gradients(fn, args, {})
            for got, want in zip(outputs_and_gradients(compiled, args, {}), eager, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_export(backend: str, device: torch.device) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = (torch.nn.Parameter(p) for p in parameters(8, device))

        def forward(self, images: Tensor) -> Tensor:
            return ops.patch_embed(images, self.weight, self.bias)

    model, images = Model(), torch.randn(2, 3, 8, 8, device=device)
    with mmfast.backend(backend):
        program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        named = [n.target.name() for n in program.graph.nodes if n.op == "call_function"]
        assert ("mmfast::patch_embed" in named) == (backend == "triton")
        other = torch.randn(5, 3, 8, 8, device=device)
        torch.testing.assert_close(program.module()(other), model(other))


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
def test_registered_op_runs_without_a_kernel(channels_last: bool) -> None:
    """A program exported on a GPU holds `torch.ops.mmfast.patch_embed`; on a CPU, PyTorch's ops serve it."""
    images = torch.randn(2, 3, 9, 8)
    images = images.contiguous(memory_format=torch.channels_last) if channels_last else images
    args = [images, *parameters(8, torch.device("cpu")), torch.randn(5, 8), torch.randn(1, 8)]
    leaves = [t.to(torch.bfloat16, memory_format=torch.preserve_format).requires_grad_() for t in args]
    y = torch.ops.mmfast.patch_embed(*leaves, list(MEAN), list(STD), 1.0, torch.bfloat16)
    found = torch.autograd.grad(y.float().square().sum(), leaves)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    wanted = reference.patch_embed(*wide[:3], pos_embed=wide[3], prefix_tokens=wide[4], mean=MEAN, std=STD)
    truth = torch.autograd.grad(wanted.square().sum(), wide)
    assert y.dtype == torch.bfloat16
    for got, want in zip((y, *found), (wanted, *truth), strict=True):
        assert float(((got.double() - want).norm() / want.norm()).detach()) < 2e-2
    assert found[0].stride() == leaves[0].stride()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
def test_autocast_is_pytorchs(uint8: bool, backend: str, device: torch.device) -> None:
    """16-bit products; float32 positions and tokens promote the result, as the ops that are replaced do."""
    half = torch.float16 if device.type == "cpu" else torch.bfloat16
    images = torch.rand(2, 3, 8, 8, device=device)
    images = (images * 255).to(torch.uint8) if uint8 else images
    named = {"mean": MEAN, "std": STD}
    leaves = [*parameters(24, device), torch.randn(5, 24, device=device), torch.randn(1, 24, device=device)]
    leaves = [t.requires_grad_() for t in leaves]
    dy = torch.randn(2, 5, 24, device=device)

    def replaced(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = images.float() / 255 if uint8 else images
        return conv((x - x.new_tensor(MEAN).view(3, 1, 1)) / x.new_tensor(STD).view(3, 1, 1), weight, bias)

    with torch.autocast(device.type, dtype=half), mmfast.backend(backend):
        plain = ops.patch_embed(images, *leaves[:2], **named)
        y = ops.patch_embed(images, *leaves[:2], pos_embed=leaves[2], prefix_tokens=leaves[3], **named)
        peer = torch.cat([leaves[3].expand(2, 1, -1), replaced(images, *leaves[:2])], 1) + leaves[2]
    found, theirs = (torch.autograd.grad(out, leaves, dy) for out in (y, peer))
    assert (plain.dtype, y.dtype, peer.dtype) == (half, torch.float32, torch.float32)
    torch.testing.assert_close(y, peer, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(plain.float(), y[:, 1:] - leaves[2][1:], rtol=1e-2, atol=1e-2)
    for got, want in zip(found, theirs, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=1e-2, atol=3e-2)


def test_torch_func_transforms_take_pytorchs_op(device: torch.device) -> None:
    images = torch.randn(3, 3, 8, 8, device=device)
    weight, bias = parameters(8, device)
    grad = torch.func.grad(lambda x: ops.patch_embed(x, weight, bias).square().sum())(images)
    per_sample = torch.func.vmap(
        torch.func.grad(lambda x: ops.patch_embed(x.unsqueeze(0), weight, bias).square().sum())
    )(images)
    torch.testing.assert_close(per_sample, grad)
    _, tangent = torch.func.jvp(lambda x: ops.patch_embed(x, weight), (images,), (images,))
    torch.testing.assert_close(tangent, conv(images, weight))


def test_cost_counts_what_cannot_be_done_without() -> None:
    images, weight = torch.empty(2, 3, 32, 32, dtype=torch.uint8), torch.empty(8, 3, 16, 16, dtype=torch.float16)
    found = cost(images, weight, prefix=1)
    assert found["flops"] == 2 * (2 * 4) * 8 * 768
    assert found["bytes"] == images.numel() + 2 * weight.numel() + 2 * (2 * 5 * 8)


X, W = torch.zeros(2, 3, 8, 8), torch.zeros(4, 3, 4, 4)
BAD: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "images is a list": (([1.0], W), {}, TypeError, "images must be a tensor, got list"),
    "images is int64": ((X.long(), W), {}, TypeError, "images must be floating point or torch.uint8, got torch.int64"),
    "images' rank": ((X[0], W), {}, ValueError, "images must have shape (B, 3, H, W), got (3, 8, 8)"),
    "images' channels": ((X[:, :2], W), {}, ValueError, "images must have shape (B, 3, H, W), got (2, 2, 8, 8)"),
    "images too small": (
        (X[:, :, :3], W),
        {},
        ValueError,
        "images must be at least one patch (4, 4) large, got (3, 8)",
    ),
    "weight is bytes": ((X, W.byte()), {}, TypeError, "weight must be floating point, got torch.uint8"),
    "weight's rank": ((X, W.flatten(1)), {}, ValueError, "weight must have shape (D, C, ph, pw), got (4, 48)"),
    "weight's dtype": ((X, W.half()), {}, TypeError, "weight must be torch.float32, got torch.float16"),
    "weight of half": (
        (X.half(), W.double()),
        {},
        TypeError,
        "weight must be torch.float16 or torch.float32, got torch.float64",
    ),
    "weight's device": ((X, W.to("meta")), {}, ValueError, "weight must be on cpu like images, got meta"),
    "bias's shape": ((X, W, torch.zeros(5)), {}, ValueError, "bias must have shape (4,), got (5,)"),
    "bias's dtype": ((X, W, torch.zeros(4).half()), {}, TypeError, "bias must be torch.float32"),
    "pos_embed's rows": (
        (X, W),
        {"pos_embed": torch.zeros(6, 4), "prefix_tokens": torch.zeros(1, 4)},
        ValueError,
        "pos_embed must have shape (5, 4) or (4, 4), got (6, 4)",
    ),
    "pos_embed's width": ((X, W), {"pos_embed": torch.zeros(4, 5)}, ValueError, "pos_embed must have shape (4, 4)"),
    "prefix_tokens' rank": (
        (X, W),
        {"prefix_tokens": torch.zeros(4)},
        ValueError,
        "prefix_tokens must have shape (P, 4), got (4,)",
    ),
    "prefix_tokens of each image": (
        (X, W),
        {"prefix_tokens": torch.zeros(2, 1, 4)},
        ValueError,
        "prefix_tokens must have shape (P, 4), got (2, 1, 4)",
    ),
    "mean's length": ((X, W), {"mean": (0.5,)}, ValueError, "mean must have 3 elements, got 1"),
    "mean's elements": ((X, W), {"mean": torch.zeros(2)}, ValueError, "mean must have 3 elements, got shape (2,)"),
    "mean is a number": ((X, W), {"mean": 0.5}, TypeError, "mean must be a sequence of numbers or a tensor, got float"),
    "std is zero": ((X, W), {"std": (1.0, 0.0, 1.0)}, ValueError, "std must be finite and not zero, got"),
    "mean is NaN": ((X, W), {"mean": (1.0, float("nan"), 1.0)}, ValueError, "mean must be finite, got"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what: str) -> None:
    args, kwargs, kind, message = BAD[what]
    with pytest.raises(kind, match=re.escape(f"patch_embed: {message}")):
        ops.patch_embed(*args, **kwargs)


def test_full_precision_products_are_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, float32 goes to cuDNN unless tf32 is allowed."""
    monkeypatch.setattr(mmfast.backends, "TRITON_MISSING", None)
    monkeypatch.setattr(mmfast.backends, "_device_capability", lambda device: (9, 0))
    ((_, rule),) = mmfast.backends.TABLE["patch_embed"]
    facts = mmfast.backends.Facts(torch.device("cuda"), torch.float32, 768)
    monkeypatch.setattr(mmfast.backends, "ieee_products", lambda: True)
    assert rule(facts) == "float32 products at full precision"
    assert rule(facts._replace(dtype=torch.bfloat16)) is None
    monkeypatch.setattr(mmfast.backends, "ieee_products", lambda: False)
    assert rule(facts) is None


@pytest.mark.gpu
def test_offsets_beyond_31_bits(device: torch.device) -> None:
    """2^31 pixels and tokens' elements: the last image is right, forward and backward."""
    one = torch.randn(1, 3, 224, 224, device=device, dtype=torch.bfloat16)
    images = one.expand(14400, -1, -1, -1).contiguous().requires_grad_()
    weight, bias = (p.bfloat16() for p in parameters(768, device, patch=16))
    assert images.numel() > 2**31
    with mmfast.backend("triton"):
        y = ops.patch_embed(images, weight, bias)
        assert y.numel() > 2**31
        (dimages,) = torch.autograd.grad(y, images, y.detach())
    wanted = reference.patch_embed(one.double(), weight.double(), bias.double())
    torch.testing.assert_close(y[-1:].double(), wanted, rtol=2e-2, atol=2e-2)
    assert torch.equal(y[-1], y[0])
    assert torch.equal(dimages[-1], dimages[0])


@pytest.mark.gpu
@pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
def test_cuda_graph_and_side_stream(uint8: bool, device: torch.device) -> None:
    """Captured in a graph, mean and std included, and replayed on new pixels; launched on the current stream."""
    images = torch.rand(8, 3, 64, 64, device=device) * 255
    images = images.to(torch.uint8) if uint8 else images.half()
    weight, bias = (p.half() for p in parameters(128, device, patch=16))
    named = {"mean": MEAN, "std": STD} if uint8 else {}
    wanted = ops.patch_embed(images, weight, bias, **named)
    stream = torch.cuda.Stream()
    with mmfast.backend("triton"):
        with torch.cuda.stream(stream):
            side = ops.patch_embed(images, weight, bias, **named)
        stream.synchronize()
        assert torch.equal(side, wanted)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = ops.patch_embed(images, weight, bias, **named)
    images.copy_(images.flip(0))
    graph.replay()
    assert torch.equal(y, wanted.flip(0))
