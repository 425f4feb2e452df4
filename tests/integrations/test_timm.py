"""timm: the options of its modules, its switches, its feature extractors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
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


def test_timm_block_passes_the_attention_arguments() -> None:
    model, original = (build("timm-layerscale-droppath").blocks[0] for _ in range(2))
    mmfast.accelerate(model)
    x, mask = torch.randn(2, 6, 16), torch.zeros(6, 6).masked_fill(torch.eye(6).bool().roll(1, 0), float("-inf"))
    assert torch.equal(model(x, mask), original(x, mask))
    assert torch.equal(model(x, attn_mask=mask), original(x, mask))
    assert torch.equal(model(x, None, True), original(x, is_causal=True))
    assert not torch.equal(model(x, mask), model(x))
    with pytest.raises(TypeError, match="nonsense"):
        model(x, nonsense=1)


def test_timm_fast_norm_is_left_to_timm() -> None:
    import timm.layers

    slow = timm.layers.LayerNorm(8)
    fast = timm.layers.LayerNorm(8)
    fast._fast_norm = True
    model = mmfast.accelerate(nn.Sequential(slow, fast))
    assert [row.reason for row in mmfast.report(model) if row.status == "skipped"] == ["has _fast_norm set"]
    assert isinstance(slow, timm.layers.LayerNorm)
    slow._fast_norm = True  # switched on after
    with torch.autocast("cpu", torch.bfloat16):
        assert slow(torch.randn(2, 8)).dtype == torch.bfloat16
    assert not mmfast.explain(model, torch.randn(2, 8))


def test_timm_block_with_another_norm_is_skipped() -> None:
    from timm.layers import RmsNorm
    from timm.models.vision_transformer import Block

    block = Block(16, 2, norm_layer=RmsNorm)
    (row,) = (row for row in mmfast.report(mmfast.accelerate(nn.Sequential(block))) if row.name == "0")
    assert (row.status, row.op, row.reason) == ("skipped", "add_layer_norm", "norm2 is a RmsNorm")


@pytest.mark.parametrize("scale_by_keep", [True, False])
def test_timm_drop_path_options(scale_by_keep: bool) -> None:
    original = build("timm-layerscale-droppath").blocks[-1].train()
    original.drop_path1.scale_by_keep = scale_by_keep
    model = mmfast.accelerate(copy.deepcopy(original))
    x = torch.randn(16, 5, 16)
    found = []
    for block in (model, original):
        torch.manual_seed(5)
        found.append(block(x))
    assert torch.equal(*found)
    model.drop_path1.eval()  # its own mode counts, not the block's
    original.drop_path1.eval()
    for block in (model, original):
        torch.manual_seed(5)
        found.append(block(x))
    assert torch.equal(*found[2:])


@pytest.mark.parametrize("name", ["torchvision", "timm"])
def test_feature_extractors_keep_their_nodes(name: str) -> None:
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    original, model = build(name), mmfast.accelerate(build(name))
    _, nodes = get_graph_node_names(original)
    assert get_graph_node_names(model)[1] == nodes
    wanted = [node for node in nodes if ".ln" in node or "norm" in node or node.endswith("add")]
    x = images()
    extractor = create_feature_extractor(model, wanted)
    found, expected = extractor(x), create_feature_extractor(original, wanted)(x)
    assert len(wanted) > 6
    assert all(torch.equal(found[node], expected[node]) for node in wanted)
    assert "layer_norm" in {choice.op for choice in mmfast.explain(extractor, x)}


def test_timm_features() -> None:
    x = images()
    original, model = build("timm"), mmfast.accelerate(build("timm"))
    expected = original.forward_intermediates(x, indices=2, norm=True)
    found = model.forward_intermediates(x, indices=2, norm=True)
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))
    traced = torch.fx.symbolic_trace(model.blocks[0], {"attn_mask": None, "is_causal": False})
    tokens = torch.randn(2, 5, 16)
    assert torch.equal(traced(tokens, None, False), original.blocks[0](tokens))


def attention(**options: Any) -> nn.Module:
    from timm.models.vision_transformer import Attention

    torch.manual_seed(1)
    norm = {"norm_layer": nn.LayerNorm} if {"qk_norm", "scale_norm"} & options.keys() else {}
    return Attention(16, 2, **options, **norm)


@pytest.mark.parametrize(
    ("options", "op"),
    [
        ({}, "attention_qkv"),
        ({"qkv_bias": True, "proj_bias": False}, "attention_qkv"),
        ({"attn_head_dim": 12, "dim_out": 8}, "attention_qkv"),
        ({"scale_norm": True}, "attention_qkv"),
        ({"gated": True, "scale_norm": True}, "attention_qkv"),
        ({"qk_norm": True}, "attention"),
        ({"qk_norm": True, "scale_norm": True, "gated": True}, "attention"),
    ],
    ids=["plain", "bias", "widths", "scale norm", "gated", "qk norm", "everything"],
)
@pytest.mark.parametrize("mask", ["none", "bool", "float", "per batch", "causal"])
def test_attention_options(options: dict[str, Any], op: str, mask: str) -> None:
    original = attention(**options)
    model = mmfast.accelerate(copy.deepcopy(original))
    given: dict[str, Any] = {
        "none": {},
        "bool": {"attn_mask": torch.rand(5, 5) < 0.7},
        "float": {"attn_mask": torch.randn(5, 5)},
        "per batch": {"attn_mask": torch.tensor([4, 5]).reshape(2, 1, 1, 1) > torch.arange(5)},
        "causal": {"is_causal": True},
    }[mask]
    ran = compare(model, original, lambda m: m(TOKENS, **given))
    assert [name for name in ran if name.startswith("attention")] == [op]


TOKENS = torch.linspace(-2, 2, 2 * 5 * 16).reshape(2, 5, 16).sin()


def test_attention_that_is_timms_own() -> None:
    original = attention(attn_drop=0.5)
    model = mmfast.accelerate(copy.deepcopy(original))
    found = []
    for m in (model, original):
        torch.manual_seed(3)
        found.append(m(TOKENS))
    assert torch.equal(*found)
    assert not mmfast.explain(model, TOKENS)
    assert [c.op for c in mmfast.explain(model.eval(), TOKENS)] == ["attention_qkv"]
    for m in (original, model):
        with pytest.raises((RuntimeError, ValueError)):
            m(TOKENS, attn_mask=torch.zeros(4, 5))


def test_attention_maps_of_the_unfused_path() -> None:
    """Hooks on attn_drop expect probabilities: with fused_attn off timm's own steps run."""
    seen: list[Tensor] = []
    models = [mmfast.accelerate(attention().eval()), attention().eval()]
    for model in models:
        model.fused_attn = False
        model.attn_drop.register_forward_hook(lambda _m, _a, y: seen.append(y))
        model(TOKENS)
    assert len(seen) == 2
    assert torch.equal(*seen)
    torch.testing.assert_close(seen[0].sum(-1), torch.ones(2, 2, 5))
    reason = "has fused_attn off: its probabilities are wanted"
    assert mmfast.report(models[0])[0].reason.endswith(f"fuses nothing now: {reason}")
    row = mmfast.report(mmfast.accelerate(models[1]))[0]
    assert (row.status, row.reason) == ("skipped", reason)
    models[0].fused_attn = True
    assert [c.op for c in mmfast.explain(models[0], TOKENS)] == ["attention_qkv"]


def test_a_hook_on_the_queries_sees_the_heads() -> None:
    seen: list[Tensor] = []
    models = [mmfast.accelerate(attention()), attention()]
    for model in models:
        model.q_norm.register_forward_hook(lambda _m, a, y: seen.append(y) or y * 2)
    torch.testing.assert_close(models[0](TOKENS), models[1](TOKENS))
    assert torch.equal(*seen)
    assert seen[0].shape == (2, 2, 5, 8)


def _mlps() -> dict[str, tuple[Callable[[], nn.Module], str | None]]:
    from timm.layers import GluMlp, Mlp, SwiGLU, SwiGLUPacked

    return {
        "gelu": (lambda: Mlp(16, 32), "act"),
        "tanh gelu": (lambda: Mlp(16, 32, act_layer=lambda: nn.GELU("tanh"), norm_layer=nn.LayerNorm), "act"),
        "relu": (lambda: Mlp(16, 32, 8, act_layer=nn.ReLU, bias=(False, True)), "act"),
        "elu": (lambda: Mlp(16, 32, act_layer=nn.ELU), None),
        "convolution": (lambda: Mlp(16, 32, use_conv=True), None),
        "swiglu packed": (lambda: SwiGLUPacked(16, 32, norm_layer=nn.LayerNorm), "act"),
        "geglu": (lambda: GluMlp(16, 32, act_layer=nn.GELU), "act"),
        "silu gate last": (lambda: GluMlp(16, 32, act_layer=nn.SiLU), None),
        "glu": (lambda: GluMlp(16, 32), None),
        "swiglu": (lambda: SwiGLU(16, 32, norm_layer=nn.LayerNorm), "act"),
    }


MLPS = ("gelu", "tanh gelu", "relu", "elu", "convolution", "swiglu packed", "geglu", "silu gate last", "glu", "swiglu")


@pytest.mark.parametrize("name", MLPS)
def test_mlps(name: str) -> None:
    make, fused = _mlps()[name]
    torch.manual_seed(0)
    original = make()
    model = mmfast.accelerate(copy.deepcopy(original))
    row = mmfast.report(model)[0]
    x = TOKENS.reshape(2, 16, 5, 1) if name == "convolution" else TOKENS
    ran = compare(model, original, lambda m: m(x))
    if fused is None:
        assert (row.status, row.op) == ("skipped", "linear_act")
        assert "linear_act" not in ran
    else:
        assert ran.count("linear_act") == 1
        assert {row.name for row in mmfast.report(model) if row.op == "linear_act"} >= {"", fused}


def test_reasons_of_mlps() -> None:
    reasons = {
        "elu": "act is a ELU, which linear_act does not have",
        "convolution": "fc1 is a Conv2d",
        "silu gate last": "has a SiLU gate in the last half",
        "glu": "act is a Sigmoid, which linear_act does not have",
    }
    for name, reason in reasons.items():
        assert mmfast.report(_mlps()[name][0]())[0].reason == reason


@pytest.mark.parametrize(
    ("options", "size", "fused"),
    [
        ({}, (16, 16), True),
        ({"bias": False, "norm_layer": nn.LayerNorm}, (16, 16), True),
        ({"img_size": None, "patch_size": (4, 8)}, (12, 24), True),
        ({"strict_img_size": False}, (24, 8), True),
        ({"flatten": False, "output_fmt": "NHWC"}, (16, 16), True),
        ({"dynamic_img_pad": True, "strict_img_size": False}, (16, 24), True),
        ({"dynamic_img_pad": True, "strict_img_size": False}, (13, 17), False),
        ({"img_size": None}, (17, 23), False),
    ],
    ids=["plain", "norm", "oblong patches", "other size", "NHWC", "whole patches", "padded", "cropped"],
)
def test_patch_embeddings(options: dict[str, Any], size: tuple[int, int], fused: bool) -> None:
    from timm.layers import PatchEmbed

    torch.manual_seed(0)
    original = PatchEmbed(**{"img_size": 16, "patch_size": 8, "embed_dim": 16, **options})
    model = mmfast.accelerate(copy.deepcopy(original), ops="patch_embed")
    x = torch.randn(2, 3, *size).to(memory_format=torch.channels_last)
    assert compare(model, original, lambda m: m(x)) == (["patch_embed"] if fused else [])
    assert model(x).shape == original(x).shape


def test_patch_embeddings_that_are_timms_own() -> None:
    from timm.layers import PatchEmbed

    assert mmfast.report(PatchEmbed(16, 8, embed_dim=8, flatten=False))[0].reason == "returns NCHW"
    model = mmfast.accelerate(PatchEmbed(16, 8, embed_dim=8))
    with pytest.raises(AssertionError, match=r"Input height \(24\) doesn't match model"):
        model(torch.randn(1, 3, 24, 16))
    with pytest.raises(RuntimeError):  # a convolution of float weights takes no bytes
        model(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    model.proj.stride = (4, 4)
    assert mmfast.report(model)[0].reason.endswith("proj has stride (4, 4), and kernel size (8, 8)")
    assert model(torch.randn(1, 3, 16, 16)).shape == (1, 9, 8)


@pytest.mark.parametrize(
    ("options", "fused"),
    [
        ({}, True),
        ({"class_token": False, "global_pool": "avg"}, True),
        ({"reg_tokens": 3, "no_embed_class": True}, True),
        ({"class_token": False, "reg_tokens": 2, "global_pool": "avg"}, True),
        ({"pre_norm": True, "patch_drop_rate": 0.5, "pos_drop_rate": 0.3}, True),
        ({"pos_embed": "none"}, False),
        ({"dynamic_img_size": True}, False),
    ],
    ids=["plain", "no class token", "registers", "registers alone", "dropouts", "no positions", "any size"],
)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_vision_transformers(options: dict[str, Any], fused: bool, training: bool) -> None:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    options = {"depth": 1, "num_classes": 5, **options}
    original = VisionTransformer(16, 8, embed_dim=16, num_heads=2, **options).train(training)
    model = mmfast.accelerate(copy.deepcopy(original))
    (row,) = (row for row in mmfast.report(model) if row.name == "")
    assert row.status == ("accelerated" if fused else "skipped")
    x = images()
    assert compare(model, original, lambda m: m(x)).count("patch_embed") == 1
    if "dynamic_img_size" in options:
        x = torch.randn(2, 3, 24, 16)
        assert compare(model, original, lambda m: m(x)).count("patch_embed") == 1
    if training:
        model.set_grad_checkpointing()
        compare(model, original, lambda m: m(x))


def test_a_masked_vision_transformer() -> None:
    model, original = mmfast.accelerate(build("timm")), build("timm")
    x, mask = images(), torch.rand(5, 5) < 0.7
    ran = compare(model, original, lambda m: m.forward_features(x, attn_mask=mask))
    assert {"patch_embed", "attention_qkv"} <= set(ran)


def test_models_of_other_classes() -> None:
    """Their parts are swapped; what is not known stays."""
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.mlp_mixer import MlpMixer

    torch.manual_seed(0)
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "num_classes": 5}
    for original, op in (
        (VisionTransformerDistilled(depth=1, num_heads=2, **options), "attention_qkv"),
        (MlpMixer(num_blocks=1, **options), "linear_act"),
    ):
        model = mmfast.accelerate(copy.deepcopy(original.eval()))
        ran = compare(model, original, lambda m: m(X))
        assert {op, "patch_embed", "layer_norm"} <= set(ran)
        assert mmfast.report(model)[0].status == "unknown"


X = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
