"""Position embeddings and patch kernels of another geometry: the peers' own functions, and whole checkpoints."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast.models import ViT, resample_pos_embed, resize_checkpoint
from mmfast.nn import resample_patch_embed

BASE: dict[str, Any] = {"img_size": 24, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
SIZES = [(5, 5), (2, 2), (4, 7), (3, 3), (9, 1)]


def name(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


@pytest.mark.parametrize("antialias", [None, True, False])
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("size", SIZES, ids=name)
def test_rule_timm(size: tuple[int, int], prefix: int, antialias: bool | None) -> None:
    pytest.importorskip("timm")
    from timm.layers import resample_abs_pos_embed

    pos_embed = torch.randn(1, prefix + 12, 8)
    theirs = resample_abs_pos_embed(pos_embed, size, (3, 4), prefix, antialias=antialias is not False)
    ours = resample_pos_embed(pos_embed, size, (3, 4), prefix, "timm", antialias=antialias)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_rule_timm_computes_bfloat16_in_float32() -> None:
    pos_embed = torch.randn(1, 10, 8).bfloat16()
    found = resample_pos_embed(pos_embed, (5, 4), (3, 3))
    exact = resample_pos_embed(pos_embed.float(), (5, 4), (3, 3))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.bfloat16())


def transformers_pos_embed(kind: str, pos_embed: Tensor, size: tuple[int, int]) -> Tensor:
    """transformers' own function, for patches of 8."""
    pytest.importorskip("transformers")
    if kind == "vit":
        from transformers import ViTConfig
        from transformers.models.vit.modeling_vit import ViTEmbeddings as Embeddings

        config: Any = ViTConfig(hidden_size=8, image_size=24, patch_size=8)
    elif kind == "dinov2":
        from transformers import Dinov2Config
        from transformers.models.dinov2.modeling_dinov2 import Dinov2Embeddings as Embeddings

        config = Dinov2Config(hidden_size=8, image_size=24, patch_size=8)
    else:
        from transformers import Dinov2WithRegistersConfig
        from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import (
            Dinov2WithRegistersEmbeddings as Embeddings,
        )

        config = Dinov2WithRegistersConfig(hidden_size=8, image_size=24, patch_size=8)
    embeddings = Embeddings(config)
    embeddings.position_embeddings.data = pos_embed
    embeddings.patch_size = getattr(embeddings, "patch_size", 8)
    if not isinstance(embeddings.patch_size, int):
        embeddings.patch_size = 8
    tokens = torch.empty(1, 1 + size[0] * size[1], 8)
    return embeddings.interpolate_pos_encoding(tokens, size[0] * 8, size[1] * 8).detach()


@pytest.mark.parametrize("size", SIZES, ids=name)
@pytest.mark.parametrize(
    ("kind", "rule"), [("vit", "transformers"), ("dinov2", "transformers"), ("dinov2_with_registers", "timm")]
)
def test_rule_transformers(kind: str, rule: str, size: tuple[int, int]) -> None:
    pos_embed = torch.randn(1, 10, 8)
    theirs = transformers_pos_embed(kind, pos_embed, size)
    ours = resample_pos_embed(pos_embed, size, (3, 3), 1, rule)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_rule_transformers_keeps_the_dtype_of_the_computation() -> None:
    pos_embed = torch.randn(1, 10, 8, dtype=torch.float64)
    theirs = transformers_pos_embed("vit", pos_embed, (5, 4))
    assert theirs.dtype == torch.float64
    torch.testing.assert_close(resample_pos_embed(pos_embed, (5, 4), (3, 3), 1, "transformers"), theirs)


@pytest.mark.parametrize("antialias", [None, False, True])
@pytest.mark.parametrize("size", [(5, 5), (2, 2), (4, 7), (9, 2)], ids=name)
def test_rule_dinov2_is_its_formula(size: tuple[int, int], antialias: bool | None) -> None:
    """DINOv2's own lines, with interpolate_offset 0.1: the scale factor is (new + 0.1) / old."""
    pos_embed = torch.randn(1, 10, 8)
    grid = pos_embed[:, 1:].reshape(1, 3, 3, 8).permute(0, 3, 1, 2)
    factor = (float(size[0] + 0.1) / 3, float(size[1] + 0.1) / 3)
    grid = F.interpolate(grid, mode="bicubic", antialias=bool(antialias), scale_factor=factor)
    assert grid.shape[-2:] == size
    expected = torch.cat((pos_embed[:, :1], grid.permute(0, 2, 3, 1).reshape(1, -1, 8)), dim=1)
    ours = resample_pos_embed(pos_embed, size, (3, 3), 1, "dinov2", antialias=antialias)
    assert torch.equal(ours, expected)


def test_the_three_rules_differ() -> None:
    pos_embed = torch.randn(1, 10, 8)
    found = [resample_pos_embed(pos_embed, (2, 2), (3, 3), 1, rule) for rule in ("timm", "transformers", "dinov2")]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert (found[first] - found[second]).abs().max() > 1e-3


@pytest.mark.parametrize("rule", ["timm", "transformers", "dinov2"])
def test_the_same_grid_is_left_alone(rule: str) -> None:
    pos_embed = torch.randn(1, 10, 8)
    assert resample_pos_embed(pos_embed, (3, 3), (3, 3), 1, rule) is pos_embed


@pytest.mark.parametrize("rule", ["timm", "transformers", "dinov2"])
def test_the_model_resamples_by_its_rule(rule: str) -> None:
    model = ViT(**BASE, dynamic_img_size=True, pos_embed_resample=rule).eval()
    x = torch.randn(2, 3, 40, 16)
    assert model.pos_embed is not None
    expected = model.patch_embed(x).flatten(1, 2)
    expected = torch.cat((model.cls_token.expand(2, -1, -1), expected), dim=1)  # type: ignore[union-attr]
    expected = expected + resample_pos_embed(model.pos_embed, (5, 2), (3, 3), 1, rule)
    assert torch.equal(model._pos_embed(model.patch_embed(x)), expected)
    other = ViT(**BASE, pos_embed_resample=rule)
    other.load_state_dict(model.state_dict())
    other.set_input_size((40, 16))
    torch.testing.assert_close(other.eval()(x), model(x), rtol=1e-5, atol=1e-5)


def test_the_model_passes_antialias_on() -> None:
    model = ViT(**BASE, pos_embed_antialias=False)
    other = ViT(**BASE, pos_embed_resample="transformers")
    other.load_state_dict(model.state_dict())
    model.set_input_size(16)
    other.set_input_size(16)
    assert model.pos_embed is not None
    torch.testing.assert_close(model.pos_embed, other.pos_embed, rtol=0, atol=0)


def test_gradients_reach_resampled_positions() -> None:
    model = ViT(**BASE, dynamic_img_size=True)
    model(torch.randn(1, 3, 32, 16)).sum().backward()
    assert model.pos_embed is not None
    assert model.pos_embed.grad is not None
    assert model.pos_embed.grad.abs().min() > 0


@pytest.mark.parametrize("size", [(16, 16), (5, 9), (4, 4), (8, 8)], ids=name)
def test_patch_kernel_is_timms(size: tuple[int, int]) -> None:
    pytest.importorskip("timm")
    from timm.layers import resample_patch_embed as theirs

    weight = torch.randn(6, 3, 8, 8)
    torch.testing.assert_close(resample_patch_embed(weight, size), theirs(weight, size), rtol=0, atol=0)


def test_patch_kernel_keeps_embeddings_of_enlarged_patches() -> None:
    """FlexiViT's property: the embedding of a patch enlarged by the same resize is unchanged."""
    weight, patch = torch.randn(6, 3, 8, 8), torch.randn(1, 3, 8, 8)
    larger = F.interpolate(patch, size=(12, 12), mode="bicubic", antialias=True)
    before = F.conv2d(patch, weight).flatten()
    after = F.conv2d(larger, resample_patch_embed(weight, (12, 12))).flatten()
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)


def test_patch_kernel_refuses_another_rank() -> None:
    with pytest.raises(ValueError, match=re.escape("weight must be (D, C, P, P), got (6, 192)")):
        resample_patch_embed(torch.randn(6, 192), (4, 4))


CHECKPOINTS: dict[str, dict[str, Any]] = {
    "larger_image": {"img_size": 40},
    "smaller_rectangle": {"img_size": (16, 32)},
    "patch4": {"patch_size": 4},
    "patch12_image48": {"patch_size": 12, "img_size": 48},
    "same": {},
}


@pytest.mark.parametrize("common", [{}, {"no_embed_class": True, "reg_tokens": 2}, {"reg_tokens": 1}], ids=str)
@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoint_of_another_size_is_timms(case: str, common: dict[str, Any]) -> None:
    pytest.importorskip("timm")
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    source = ViT(**BASE, **common).state_dict()
    kept = copy.deepcopy(source)
    target = {**BASE, **common, **CHECKPOINTS[case]}
    model = ViT(**target)
    found = resize_checkpoint(source, model)
    theirs = checkpoint_filter_fn(dict(source), VisionTransformer(**target))
    assert list(found) == list(theirs)
    for key, value in found.items():
        torch.testing.assert_close(value, theirs[key], rtol=0, atol=0)
        assert torch.equal(source[key], kept[key]), "the input must not change"
    model.load_state_dict(found, strict=True)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_checkpoint_of_other_channels_is_timms(channels: int) -> None:
    pytest.importorskip("timm")
    from timm.models._manipulate import adapt_input_conv

    source = ViT(**BASE).state_dict()
    model = ViT(**BASE, in_chans=channels)
    found = resize_checkpoint(source, model)
    weight = source["patch_embed.proj.weight"]
    torch.testing.assert_close(found["patch_embed.proj.weight"], adapt_input_conv(channels, weight), rtol=0, atol=0)
    model.load_state_dict(found)


def test_gray_checkpoint_keeps_the_answer_on_gray_images() -> None:
    color = ViT(**BASE).eval()
    gray = ViT(**BASE, in_chans=1).eval()
    gray.load_state_dict(resize_checkpoint(color.state_dict(), gray))
    x = torch.randn(2, 1, 24, 24)
    torch.testing.assert_close(gray(x), color(x.expand(-1, 3, -1, -1)), rtol=1e-5, atol=1e-5)


def test_resized_checkpoint_is_set_input_size() -> None:
    small, large = ViT(**BASE).eval(), ViT(**{**BASE, "img_size": 40, "patch_size": 10}).eval()
    large.load_state_dict(resize_checkpoint(small.state_dict(), large))
    small.set_input_size(40, 10)
    x = torch.randn(2, 3, 40, 40)
    torch.testing.assert_close(large(x), small(x), rtol=1e-6, atol=1e-6)


def test_checkpoint_grid_must_be_known() -> None:
    source = ViT(**{**BASE, "img_size": (16, 24)}).state_dict()
    model = ViT(**{**BASE, "img_size": 40})
    with pytest.raises(ValueError, match="6 patch positions are not a square grid; give old_grid_size"):
        resize_checkpoint(source, model)
    found = resize_checkpoint(source, model, old_grid_size=(2, 3), rule="transformers")
    expected = resample_pos_embed(source["pos_embed"], (5, 5), (2, 3), 1, "transformers")
    assert torch.equal(found["pos_embed"], expected)
    with pytest.raises(ValueError, match=re.escape("pos_embed must have 1 + 2 * 2 positions, got 7")):
        resize_checkpoint(source, model, old_grid_size=(2, 2))


def test_checkpoint_without_positions_or_patches_passes_through() -> None:
    model = ViT(**BASE, pos_embed="none")
    rest = {"head.bias": torch.ones(3), "pos_embed": torch.ones(1, 5, 16)}
    assert resize_checkpoint(rest, model) == rest


def test_rule_must_be_known() -> None:
    with pytest.raises(ValueError, match="must be one of timm, transformers, dinov2, got 'nearest'"):
        resample_pos_embed(torch.randn(1, 10, 8), (2, 2), (3, 3), 1, "nearest")
    with pytest.raises(ValueError, match="ViT: pos_embed_resample must be one of"):
        ViT(**BASE, pos_embed_resample="bilinear")
