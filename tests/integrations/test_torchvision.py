"""torchvision: its embedding, its blocks' dropout, its other models."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import mmfast

from .families import build, compare, images


@pytest.fixture(autouse=True, params=[None, "torch"], ids=["default", "op"])
def route(request: pytest.FixtureRequest) -> Iterator[None]:
    """By default a CPU tensor takes the original code; a forced backend, the path that a GPU takes."""
    with mmfast.backend(request.param):
        yield


def test_the_block_draws_the_same_dropout() -> None:
    """Where torch.nn's attention runs; another memory format after attention gives another mask."""
    original = build("torchvision").train()
    for block in original.encoder.layers:
        block.dropout.p = 0.4
    model = mmfast.accelerate(copy.deepcopy(original), ops=("layer_norm", "add_layer_norm", "linear_act"))
    x = images()
    ran = compare(model, original, lambda m: m(x))
    assert {"add_layer_norm", "linear_act"} <= set(ran)


def test_patches_alone() -> None:
    model, original = mmfast.accelerate(build("torchvision")), build("torchvision")
    x = images()
    assert compare(model, original, lambda m: m._process_input(x)) == ["patch_embed"]
    for m in (model, original):
        with pytest.raises(AssertionError, match="Wrong image height! Expected 16 but got 24!"):
            m(torch.randn(1, 3, 24, 16))


def test_an_encoder_with_a_hook_is_called() -> None:
    seen: list[torch.Tensor] = []
    models = [mmfast.accelerate(build("torchvision")), build("torchvision")]
    for model in models:
        model.encoder.register_forward_pre_hook(lambda _m, a: seen.append(a[0]))
    x = images()
    compare(*models, lambda m: m(x))
    torch.testing.assert_close(seen[0], seen[-1], rtol=1e-4, atol=1e-5)
    assert seen[0].shape == (3, 5, 16)


def test_a_convolutional_stem_is_skipped() -> None:
    from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer

    torch.manual_seed(0)
    stem = [ConvStemConfig(8, 3, 2), ConvStemConfig(8, 3, 2), ConvStemConfig(8, 3, 2)]
    original = VisionTransformer(16, 8, 1, 2, 16, 32, conv_stem_configs=stem).eval()
    nn.init.normal_(original.heads.head.weight)
    model = mmfast.accelerate(copy.deepcopy(original))
    x = images()
    assert "patch_embed" not in compare(model, original, lambda m: m(x))
    row = mmfast.report(model)[0]
    assert (row.status, row.op, row.reason) == ("skipped", "patch_embed", "conv_proj is a Sequential")


def test_mlps_of_other_models() -> None:
    from torchvision.ops import MLP

    torch.manual_seed(0)
    original = MLP(16, [32, 32, 8], activation_layer=nn.SiLU, dropout=0.3)
    model = mmfast.accelerate(copy.deepcopy(original), strict=True)
    x = torch.randn(2, 5, 16)
    assert compare(model, original, lambda m: m(x)) == ["linear_act"] * 2
    with_norm = MLP(16, [32, 8], norm_layer=nn.LayerNorm)
    assert mmfast.report(mmfast.accelerate(with_norm))[0].status == "unknown"
    swin = nn.Sequential(MLP(16, [32, 16], activation_layer=nn.GELU, inplace=None), nn.LayerNorm(16))
    assert mmfast.report(mmfast.accelerate(swin)).counts["accelerated"] == 2
