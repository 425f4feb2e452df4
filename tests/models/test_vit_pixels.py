"""From pixels to the first block: patches, prefix tokens and positions of a ViT by one op, and uint8 images."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmfast
from mmfast.models import ViT
from tests.grading import BACKENDS

CONFIG: dict[str, Any] = {"img_size": 8, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 3}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def model(device: torch.device, **options: Any) -> ViT:
    torch.manual_seed(1)
    vit = ViT(**{**CONFIG, **options}).to(device)
    with torch.no_grad():  # tokens and positions of the size of the patches, so that a wrong row shows
        for parameter in (vit.cls_token, vit.reg_token, vit.pos_embed):
            if parameter is not None:
                parameter.normal_()
    return vit


def embedding(vit: ViT, x: Tensor) -> list[Tensor]:
    """The tokens before the first block, and the gradients of what made them."""
    y = vit._embed(x)
    stem = [
        p
        for n, p in vit.named_parameters()
        if n.split(".")[0] in ("patch_embed", "cls_token", "reg_token", "pos_embed")
    ]
    return [y, *torch.autograd.grad(y.square().sum(), stem)]


def ops_of(vit: ViT, x: Tensor) -> list[str]:
    return [choice.op for choice in mmfast.explain(vit._embed, x)]


def by_modules(vit: ViT) -> ViT:
    """A copy whose projection has a hook, so that every module is called."""
    vit = copy.deepcopy(vit)
    vit.patch_embed.proj.register_forward_hook(lambda *args: None)
    return vit


def pixels(device: torch.device, size: int = 8) -> Tensor:
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8).to(device)


def as_floats(images: Tensor) -> Tensor:
    mean, std = (images.new_tensor(v, dtype=torch.float32).view(3, 1, 1) for v in (MEAN, STD))
    return (images.float() / 255 - mean) / std


VARIANTS: dict[str, dict[str, Any]] = {
    "class token": {},
    "class and registers": {"reg_tokens": 2},
    "no_embed_class": {"reg_tokens": 2, "no_embed_class": True},
    "no prefix": {"class_token": False, "global_pool": "avg"},
    "no positions": {"pos_embed": "none", "reg_tokens": 1},
    "CLIP": {"pre_norm": True},
    "any size": {"dynamic_img_size": True},
    "any size, padded": {"dynamic_img_size": True, "dynamic_img_pad": True},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_op_writes_all_tokens(variant: str, backend: str, device: torch.device) -> None:
    vit = model(device, **VARIANTS[variant])
    size = {"any size": (12, 16), "any size, padded": (10, 13)}.get(variant, (8, 8))
    x = torch.randn(2, 3, *size, device=device)
    wanted = embedding(by_modules(vit), x)
    with mmfast.backend(backend):
        found = embedding(vit, x)
        assert ops_of(vit, x)[:1] == ["patch_embed"]
        assert ops_of(vit, x).count("patch_embed") == 1
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_on_a_cpu_the_modules_are_called(variant: str) -> None:
    """Nothing forced: the numbers are those of the modules bit by bit."""
    vit = model(torch.device("cpu"), **VARIANTS[variant])
    x = torch.randn(2, 3, 8, 8)
    for got, want in zip(embedding(vit, x), embedding(by_modules(vit), x), strict=True):
        assert torch.equal(got, want)


class OwnPositions(ViT):
    def _pos_embed(self, x: Tensor) -> Tensor:
        return super()._pos_embed(x) * 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["subclass", "instance"])
def test_own_pos_embed_is_called(how: str, backend: str, device: torch.device) -> None:
    vit = model(device)
    x = torch.randn(2, 3, 8, 8, device=device)
    wanted = vit._embed(x) * 2
    if how == "subclass":
        vit.__class__ = OwnPositions
    else:
        inherited = vit._pos_embed
        vit._pos_embed = lambda x: inherited(x) * 2  # type: ignore[method-assign]
    with mmfast.backend(backend):
        torch.testing.assert_close(vit._embed(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["patch_embed", "patch_embed.proj", "patch_embed.norm", "pos_drop", "norm_pre"])
def test_hooks_of_the_stem_fire_once(where: str, backend: str, device: torch.device) -> None:
    """A hook on what the op would pass over keeps the modules; one on what follows fires all the same."""
    vit = model(device)
    x, calls = torch.randn(2, 3, 8, 8, device=device), []
    wanted = vit(x)
    vit.get_submodule(where).register_forward_hook(lambda module, args, out: calls.append(out))
    with mmfast.backend(backend):
        torch.testing.assert_close(vit(x), wanted, rtol=1e-4, atol=1e-4)
    assert len(calls) == 1
    assert calls[0].shape[-1] == 24 or where == "patch_embed.proj"


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_of_positions_and_patches(backend: str, device: torch.device) -> None:
    """Both modules run after the op, on all tokens."""
    vit = model(device, pos_drop_rate=0.5, patch_drop_rate=0.5).train()
    x = torch.randn(2, 3, 8, 8, device=device)
    torch.manual_seed(3)
    wanted = by_modules(vit)._embed(x)
    torch.manual_seed(3)
    with mmfast.backend(backend):
        found = vit._embed(x)
    assert (found == 0).any()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("variant", VARIANTS)
def test_uint8_images(variant: str, backend: str | None, device: torch.device) -> None:
    """Bytes give what normalised floats give, which are left alone; a padded pixel is zero after the normalisation."""
    options = VARIANTS[variant]
    vit, plain = model(device, mean=MEAN, std=STD, **options), model(device, **options)
    x = pixels(device, 10 if variant == "any size, padded" else 8)
    wanted = embedding(plain, as_floats(x))
    with mmfast.backend(backend):
        found, floats = embedding(vit, x), vit._embed(as_floats(x))
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(floats, wanted[0], rtol=1e-4, atol=1e-4)


def test_state_dict_is_unchanged(device: torch.device) -> None:
    vit, plain = model(device, mean=MEAN, std=STD), model(device)
    assert list(vit.state_dict()) == list(plain.state_dict())
    vit.load_state_dict(plain.state_dict(), strict=True)
    assert (vit.patch_embed.mean, vit.patch_embed.std) == (MEAN, STD)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_from_timm_takes_its_mean_and_std_if_asked(backend: str | None, device: torch.device) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    kwargs = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 3}
    theirs = timm.create_model("vit_tiny_patch16_224", **kwargs).to(device).eval()
    mean, std = theirs.pretrained_cfg["mean"], theirs.pretrained_cfg["std"]
    x = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8).to(device)
    normalised = (x / 255 - x.new_tensor(mean, dtype=torch.float32).view(3, 1, 1)) / x.new_tensor(
        std, dtype=torch.float32
    ).view(3, 1, 1)
    vit = ViT.from_timm(theirs, uint8=True)
    assert (vit.patch_embed.mean, vit.patch_embed.std) == (tuple(mean), tuple(std))
    with mmfast.backend(backend):
        torch.testing.assert_close(vit(x), theirs(normalised), rtol=1e-4, atol=1e-4)
    assert ViT.from_timm(theirs).patch_embed.mean is None
    assert ViT.from_timm(theirs, uint8=True, mean=MEAN).patch_embed.mean == MEAN
    theirs.pretrained_cfg = theirs.default_cfg = {}
    with pytest.raises(ValueError, match=re.escape("ViT.from_timm: uint8=True needs a model with mean and std")):
        ViT.from_timm(theirs, uint8=True)


def test_bytes_without_mean_and_std_are_refused(device: torch.device) -> None:
    with pytest.raises(TypeError, match="images must be floating point"):
        model(device)(pixels(device))
    with pytest.raises(ValueError, match="mean and std must be given together, got no std"):
        model(device, mean=MEAN)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_keeps_the_dtype_of_the_stream(backend: str, device: torch.device) -> None:
    """Float32 positions and tokens make a float32 residual stream under autocast, as in timm."""
    half = torch.float16 if device.type == "cpu" else torch.bfloat16
    vit, x = model(device), torch.randn(2, 3, 8, 8, device=device)
    with torch.autocast(device.type, dtype=half):
        wanted = by_modules(vit)._embed(x)
        with mmfast.backend(backend):
            found = vit._embed(x)
    assert found.dtype == wanted.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_in_one_graph(backend: str, device: torch.device) -> None:
    vit = model(device, reg_tokens=1, mean=MEAN, std=STD)
    compiled = torch.compile(vit._embed, fullgraph=True, backend="aot_eager")
    with mmfast.backend(backend):
        for x in (torch.randn(2, 3, 8, 8, device=device), pixels(device)):
            torch.testing.assert_close(compiled(x), vit._embed(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_replaced_patch_embedding_is_called(backend: str, device: torch.device) -> None:
    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.inner(x)

    vit = model(device, pos_embed="none", class_token=False, global_pool="avg")
    x = torch.randn(2, 3, 8, 8, device=device)
    wanted = 2 * vit._embed(x)
    vit.patch_embed = Doubled(vit.patch_embed)
    with mmfast.backend(backend):
        torch.testing.assert_close(vit._embed(x), wanted, rtol=1e-4, atol=1e-4)
