"""open_clip: both towers, the orders of its tensors, its norms, masks and custom blocks."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmfast

from .families import build, compare, images


@pytest.fixture(autouse=True, params=[None, "torch"], ids=["default", "op"])
def route(request: pytest.FixtureRequest) -> Iterator[None]:
    """By default a CPU tensor takes the original code; a forced backend, the path that a GPU takes."""
    with mmfast.backend(request.param):
        yield


def clip(vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, **options: Any) -> nn.Module:
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    torch.manual_seed(1)
    vision_cfg = CLIPVisionCfg(layers=2, width=16, head_width=8, patch_size=8, image_size=16, **(vision or {}))
    text_cfg = CLIPTextCfg(context_length=7, vocab_size=30, width=16, heads=2, layers=2, **(text or {}))
    model = CLIP(8, vision_cfg, text_cfg, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model


TEXT = torch.tensor([[1, 5, 7, 9, 29, 0, 0], [1, 3, 29, 0, 0, 0, 0], [1, 2, 4, 8, 16, 20, 29]])


def similarity(model: Any) -> Tensor:
    image, text, scale = model(IMAGES, TEXT)
    return scale * image @ text.T


IMAGES = torch.linspace(-1, 1, 3 * 3 * 16 * 16).reshape(3, 3, 16, 16).sin()


@pytest.mark.parametrize(
    ("vision", "options"),
    [
        ({}, {}),
        ({"ls_init_value": 0.5, "patch_dropout": 0.0, "pool_type": "avg", "final_ln_after_pool": True}, {}),
        ({"no_ln_pre": True}, {"quick_gelu": True}),
        ({"attentional_pool": True, "attn_pooler_heads": 2}, {}),
    ],
    ids=["plain", "layer scale", "quick gelu", "attentional pool"],
)
def test_both_towers(vision: dict[str, Any], options: dict[str, Any]) -> None:
    original = clip(vision, **options)
    model = mmfast.accelerate(copy.deepcopy(original))
    counts = Counter(compare(model, original, similarity))
    assert counts["add_layer_norm"] == counts["linear_act"] == counts["attention_qkv"] == 4
    assert counts["patch_embed"] == 1
    rows = {row.name: row for row in mmfast.report(model)}
    assert rows["visual"].op == "patch_embed"
    assert rows["transformer.resblocks.0.mlp"].status == "accelerated"
    assert rows["transformer.resblocks.0.mlp.gelu"].status == "fused"
    assert rows["ln_final"].type == "open_clip.transformer.LayerNorm"


def test_the_text_tower_is_causal() -> None:
    original = clip()
    model = mmfast.accelerate(copy.deepcopy(original))
    changed = TEXT.clone()
    changed[:, 5:] = 11  # after the end of text, which is the largest token

    def tokens(m: Any, text: Tensor) -> Tensor:
        return m.encode_text(text)

    compare(model, original, lambda m: tokens(m, TEXT))
    assert torch.equal(tokens(model, TEXT)[1], tokens(model, changed)[1])


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "sequence first"])
def test_both_orders(batch_first: bool) -> None:
    from open_clip.transformer import Transformer

    torch.manual_seed(0)
    original = Transformer(16, 2, 2, ls_init_value=0.5, batch_first=batch_first)
    model = mmfast.accelerate(copy.deepcopy(original), strict=True)
    x = torch.randn(2, 5, 16)
    mask = torch.full((5, 5), float("-inf")).triu(1)
    counts = Counter(compare(model, original, lambda m: m(x, attn_mask=mask)))
    assert counts["attention_qkv"] == counts["linear_act"] == counts["add_layer_norm"] == 2
    first = x.clone()
    first[:, 3:] = 0
    assert torch.equal(model(x, attn_mask=mask)[:, :3], model(first, attn_mask=mask)[:, :3])


def test_cross_attention_blocks() -> None:
    """As CoCa's decoder has them; a block without `ln_1_kv` attends to itself whatever it is given."""
    from open_clip.transformer import ResidualAttentionBlock

    torch.manual_seed(0)
    q, k, v = torch.randn(2, 5, 16), torch.randn(2, 7, 16), torch.randn(2, 7, 16)
    original = ResidualAttentionBlock(16, 2, is_cross_attention=True)
    model = mmfast.accelerate(copy.deepcopy(original), strict=True)
    assert "attention" in compare(model, original, lambda m: m(q, k_x=k, v_x=v))
    assert "attention_qkv" in compare(model, original, lambda m: m(q))
    original = ResidualAttentionBlock(16, 2)
    model = mmfast.accelerate(copy.deepcopy(original), strict=True)
    assert "attention_qkv" in compare(model, original, lambda m: m(q, k_x=k, v_x=v))


@pytest.mark.parametrize(
    ("options", "op"),
    [
        ({}, "attention_qkv"),
        ({"qkv_bias": False}, "attention_qkv"),
        ({"qk_norm": True}, "attention"),
        ({"scale_heads": True, "inner_norm": True}, "attention"),
        ({"scaled_cosine": True}, None),
    ],
    ids=["plain", "no bias", "qk norm", "scaled heads", "scaled cosine"],
)
@pytest.mark.parametrize("mask", ["none", "float", "per head", "bool"])
def test_custom_attention(options: dict[str, Any], op: str | None, mask: str) -> None:
    from open_clip.transformer import Attention

    torch.manual_seed(0)
    original = Attention(16, 2, **options)
    with torch.no_grad():
        for parameter in original.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    model = mmfast.accelerate(copy.deepcopy(original))
    x = torch.randn(2, 5, 16)
    masks = {"none": None, "float": torch.randn(5, 5), "per head": torch.randn(4, 5, 5)}
    attn_mask = masks.get(mask, torch.eye(5).roll(1, 0) > 0)
    if op is None:
        row = mmfast.report(model)[0]
        assert (row.status, row.reason) == ("skipped", "has scaled cosine attention")
        for m in (model, original):  # open_clip's own fails: it asks torch.bmm for four dimensions
            with pytest.raises(RuntimeError, match="batch1 must be a 3D tensor"):
                m(x)
        return
    ran = compare(model, original, lambda m: m(x, attn_mask=attn_mask))
    # A boolean mask is open_clip's: True is masked out there.
    assert [name for name in ran if "attention" in name] == ([] if mask == "bool" else [op])


def test_custom_attention_with_dropout() -> None:
    from open_clip.transformer import Attention

    torch.manual_seed(0)
    original = Attention(16, 2, attn_drop=0.5)
    model = mmfast.accelerate(copy.deepcopy(original))
    x = torch.randn(2, 5, 16)
    assert compare(model, original, lambda m: m(x)) == []
    assert compare(model.eval(), original.eval(), lambda m: m(x)) == ["attention_qkv"]


@pytest.mark.parametrize("fp32", [False, True], ids=["LayerNorm", "LayerNormFp32"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
def test_norms_keep_the_dtype(fp32: bool, dtype: torch.dtype) -> None:
    from open_clip.transformer import LayerNorm, LayerNormFp32

    original = (LayerNormFp32 if fp32 else LayerNorm)(16)
    nn.init.normal_(original.weight)
    original = original if fp32 else original.to(dtype)
    model = mmfast.accelerate(copy.deepcopy(original), strict=True)
    x = torch.randn(4, 16).to(dtype)
    found, expected = model(x), original(x)
    assert found.dtype == expected.dtype == dtype
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=2 * step, atol=2 * step)
    assert [c.op for c in mmfast.explain(model, x)] == ["layer_norm"]
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == original(x).dtype == dtype
    assert repr(model) == repr(original)


def test_a_float32_norm_of_float64_is_open_clips() -> None:
    from open_clip.transformer import LayerNormFp32

    original = LayerNormFp32(16)
    model = mmfast.accelerate(copy.deepcopy(original))
    x = torch.randn(4, 16, dtype=torch.float64)
    assert torch.equal(model(x), original(x))
    assert not mmfast.explain(model, x)


def test_intermediate_features_and_tokens() -> None:
    model, original = mmfast.accelerate(build("open_clip")), build("open_clip")
    x = images()
    found, expected = (m.forward_intermediates(x, output_extra_tokens=True) for m in (model, original))
    for key in ("image_intermediates", "image_intermediates_prefix"):
        for a, b in zip(found[key], expected[key], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(found["image_features"], expected["image_features"], rtol=1e-4, atol=2e-5)
    for m in (model, original):
        m.output_tokens = True
    compare(model, original, lambda m: m(x)[1])


def test_patch_dropout_draws_the_same() -> None:
    original = clip({"patch_dropout": 0.5}).visual.train()
    model = mmfast.accelerate(copy.deepcopy(original))
    assert compare(model, original, lambda m: m(IMAGES)).count("patch_embed") == 1


def test_autocast_of_the_embedding() -> None:
    """open_clip casts its positions to what the convolution returned."""
    model, original = mmfast.accelerate(build("open_clip")), build("open_clip")
    x = images()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (m._embeds(x) for m in (model, original))
        assert "patch_embed" in [c.op for c in mmfast.explain(model._embeds, x)]
    assert found.dtype == expected.dtype == torch.bfloat16
    exact = original._embeds(x)
    assert (found - exact).abs().max() <= 2 * (expected - exact).abs().max() + 1e-2


def test_a_tower_of_timm() -> None:
    """It is timm's model, and its parts are."""
    from open_clip.timm_model import TimmModel

    torch.manual_seed(0)
    original = TimmModel("vit_tiny_patch16_224", 8, pretrained=False).eval()
    original.trunk.set_input_size((32, 32))
    model = mmfast.accelerate(copy.deepcopy(original))
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x), original(x), rtol=1e-4, atol=1e-4)
    rows = {row.name: row for row in mmfast.report(model)}
    assert rows["trunk"].reason == "mmfast.integrations.timm.VisionTransformer"
    assert rows["trunk.blocks.0.attn"].op == "attention"
