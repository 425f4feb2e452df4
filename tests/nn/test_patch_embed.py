"""`mmfast.nn.PatchEmbed` on the op: when it serves, what hooks see, and uint8 images."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmfast
from mmfast.nn import LayerNorm, NormedPatchEmbed, PatchEmbed
from tests.grading import BACKENDS

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
CONFIG: dict[str, Any] = {"img_size": (8, 12), "patch_size": 4, "embed_dim": 24}


def module(device: torch.device, **options: Any) -> PatchEmbed:
    torch.manual_seed(1)
    return PatchEmbed(**{**CONFIG, **options}, device=device)


def pixels(device: torch.device, size: tuple[int, int] = (8, 12)) -> Tensor:
    return torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8).to(device)


def as_floats(images: Tensor) -> Tensor:
    mean, std = (images.new_tensor(v, dtype=torch.float32).view(3, 1, 1) for v in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def chosen(embed: nn.Module, x: Tensor) -> list[str]:
    return [choice.op for choice in mmfast.explain(embed, x)]


def results(embed: nn.Module, x: Tensor) -> list[Tensor]:
    y = embed(x)
    return [y, *torch.autograd.grad(y.square().sum(), list(embed.parameters()))]


FORMATS: dict[str, dict[str, Any]] = {
    "tokens": {},
    "NLC": {"output_fmt": "NLC"},
    "NHWC": {"output_fmt": "NHWC"},
    "normed": {"norm_layer": LayerNorm},
    "no bias": {"bias": False},
    "padded": {"img_size": None, "dynamic_img_pad": True},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMATS)
def test_op_gives_what_the_convolution_gives(form: str, backend: str, device: torch.device) -> None:
    embed = module(device, **FORMATS[form])
    x = torch.randn(2, 3, *((7, 10) if form == "padded" else (8, 12)), device=device)
    plain = copy.deepcopy(embed)
    plain.proj.register_forward_hook(lambda *args: None)  # keeps the op away
    with mmfast.backend(backend):
        found = results(embed, x)
        assert chosen(embed, x)[0] == "patch_embed"
        assert "patch_embed" not in chosen(plain, x)
    for got, want in zip(found, results(plain, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("output_fmt", ["NCHW", "NCL"])
def test_images_are_left_to_the_convolution(output_fmt: str, device: torch.device) -> None:
    embed = module(device, output_fmt=output_fmt, flatten=False)
    assert chosen(embed, torch.randn(2, 3, 8, 12, device=device)) == []


def parametrized(embed: PatchEmbed) -> None:
    nn.utils.parametrizations.weight_norm(embed.proj)


def subclassed(embed: PatchEmbed) -> None:
    embed.proj.__class__ = type("Other", (nn.Conv2d,), {})


def padded(embed: PatchEmbed) -> None:
    embed.proj.padding = (1, 1)


def dilated(embed: PatchEmbed) -> None:
    embed.proj.stride = (2, 2)


@pytest.mark.parametrize("change", [parametrized, subclassed, padded, dilated], ids=lambda f: f.__name__)
def test_another_projection_is_called_as_it_is(change: Any, device: torch.device) -> None:
    embed, x = module(device), torch.randn(2, 3, 8, 12, device=device)
    change(embed)
    assert chosen(embed, x) == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["proj", "norm"])
@pytest.mark.parametrize("kind", ["forward", "pre", "backward", "global"])
def test_hooks_fire_once(kind: str, where: str, backend: str, device: torch.device) -> None:
    embed = module(device, norm_layer=LayerNorm)
    target, calls = getattr(embed, where), []

    def hook(owner: nn.Module, *args: Any) -> None:
        calls.extend([owner] if owner is target else [])

    register = {
        "forward": target.register_forward_hook,
        "pre": target.register_forward_pre_hook,
        "backward": target.register_full_backward_hook,
        "global": nn.modules.module.register_module_forward_hook,
    }[kind]
    handle = register(hook)
    try:
        with mmfast.backend(backend):
            embed(torch.randn(2, 3, 8, 12, device=device)).sum().backward()
    finally:
        handle.remove()
    assert calls == [target]


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("form", [*FORMATS, "NCHW", "hooked"])
def test_uint8_images(form: str, backend: str | None, device: torch.device) -> None:
    """Of every format, with the op and without: what normalised floats give; and those are left alone."""
    options = FORMATS.get(form, {"output_fmt": "NCHW"} if form == "NCHW" else {})
    embed, plain = module(device, mean=MEAN, std=STD, **options), module(device, **options)
    if form == "hooked":
        embed.proj.register_forward_hook(lambda *args: None)
    x = pixels(device, (7, 10) if form == "padded" else (8, 12))
    wanted = results(plain, as_floats(x))
    with mmfast.backend(backend):
        found, floats = results(embed, x), results(embed, as_floats(x))
    for got, same, want in zip(found, floats, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-4)
        torch.testing.assert_close(same, want, rtol=1e-4, atol=1e-4)


def test_on_a_cpu_it_is_the_convolution_bit_by_bit() -> None:
    embed, x = module(torch.device("cpu")), torch.randn(2, 3, 8, 12)
    assert torch.equal(embed(x), embed.proj(x).flatten(2).transpose(1, 2))
    bytes_ = PatchEmbed(**CONFIG, mean=MEAN, std=STD)
    bytes_.load_state_dict(embed.state_dict())
    x = pixels(torch.device("cpu"))
    assert torch.equal(bytes_(x), embed(as_floats(x)))


def test_mean_and_std_are_plain_attributes(device: torch.device) -> None:
    embed = module(device, mean=list(MEAN), std=list(STD))
    assert (embed.mean, embed.std) == (MEAN, STD)
    assert list(embed.state_dict()) == list(module(device).state_dict()) == ["proj.weight", "proj.bias"]
    assert not list(embed.buffers())
    assert (copy.deepcopy(embed).mean, module(device).mean) == (MEAN, None)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_normed_patch_embed_takes_uint8(backend: str | None, device: torch.device) -> None:
    torch.manual_seed(1)
    embed = NormedPatchEmbed(**CONFIG, mean=MEAN, std=STD, device=device)
    x = pixels(device)
    wanted = embed(as_floats(x))
    with mmfast.backend(backend):
        torch.testing.assert_close(embed(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
def test_autocast_and_16_bit_weights(uint8: bool, backend: str, device: torch.device) -> None:
    half = torch.float16 if device.type == "cpu" else torch.bfloat16
    embed = module(device, mean=MEAN, std=STD)
    x = pixels(device)
    wanted = embed(as_floats(x))
    x = x if uint8 else as_floats(x)
    with mmfast.backend(backend):
        with torch.autocast(device.type, dtype=half):
            cast = embed(x)
        small = copy.deepcopy(embed).to(half)(x if uint8 else x.to(half))
    assert (cast.dtype, small.dtype) == (half, half)
    torch.testing.assert_close(cast.float(), wanted, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(small.float(), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_in_one_graph(backend: str, device: torch.device) -> None:
    embed = module(device, mean=MEAN, std=STD)
    compiled = torch.compile(embed, fullgraph=True, backend="aot_eager")
    with mmfast.backend(backend):
        for x in (torch.randn(2, 3, 8, 12, device=device), pixels(device)):
            torch.testing.assert_close(compiled(x), embed(x), rtol=1e-5, atol=1e-5)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no std": ({"mean": MEAN}, "mean and std must be given together, got no std"),
    "no mean": ({"std": STD}, "mean and std must be given together, got no mean"),
    "length": ({"mean": (0.5,), "std": STD}, "mean must have in_chans=3 numbers, got 1"),
    "zero": ({"mean": MEAN, "std": (1.0, 0.0, 1.0)}, "std must be positive and finite, got (1.0, 0.0, 1.0)"),
    "nan": ({"mean": (0.5, float("nan"), 0.5), "std": STD}, "mean must be finite, got (0.5, nan, 0.5)"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_normalisation(what: str) -> None:
    options, message = BAD[what]
    with pytest.raises(ValueError, match=re.escape(f"PatchEmbed: {message}")):
        PatchEmbed(**CONFIG, **options)


def test_bytes_without_mean_and_std_are_refused() -> None:
    with pytest.raises(TypeError, match=r"PatchEmbed: images must be floating point \(normalise them first, or give"):
        module(torch.device("cpu"))(pixels(torch.device("cpu")))
    with pytest.raises(TypeError, match=r"floating point \(normalise them first\), got torch.int64"):
        module(torch.device("cpu"), mean=MEAN, std=STD)(pixels(torch.device("cpu")).long())
