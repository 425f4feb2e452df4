"""ViT against timm's VisionTransformer: the same weights, outputs, gradients, draws and methods, option by option."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmfast.models import ViT
from mmfast.nn import PatchEmbed, SwiGLU, SwiGLUPacked

timm = pytest.importorskip("timm")
from timm.layers import LayerNorm as TimmLayerNorm  # noqa: E402
from timm.layers import PatchEmbed as TimmPatchEmbed  # noqa: E402
from timm.layers import RmsNorm as TimmRmsNorm  # noqa: E402
from timm.layers import SwiGLU as TimmSwiGLU  # noqa: E402
from timm.layers import SwiGLUPacked as TimmSwiGLUPacked  # noqa: E402
from timm.models import vision_transformer as tvt  # noqa: E402

BASE: dict[str, Any] = {"img_size": 24, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 5}

# Option -> arguments of both models; a pair gives timm's value and mmfast's.
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "img_rectangle": {"img_size": (16, 40)},
    "img_not_divisible": {"img_size": 29},
    "patch_rectangle": {"img_size": (16, 24), "patch_size": (8, 4)},
    "patch14": {"img_size": 28, "patch_size": 14},
    "patch16": {"img_size": 32, "patch_size": 16},
    "patch32": {"img_size": 64, "patch_size": 32},
    "in_chans1": {"in_chans": 1},
    "in_chans5": {"in_chans": 5},
    "num_classes0": {"num_classes": 0},
    "pool_none": {"global_pool": ""},
    "pool_avg": {"global_pool": "avg"},
    "pool_max": {"global_pool": "max"},
    "pool_avgmax": {"global_pool": "avgmax"},
    "pool_map": {"global_pool": "map"},
    "pool_prr": {"global_pool": "prr"},
    "pool_prr_no_class_token": {"global_pool": "prr", "class_token": False},
    "pool_avg_with_prefix": {"global_pool": "avg", "pool_include_prefix": True, "reg_tokens": 1},
    "pool_map_with_prefix": {"global_pool": "map", "pool_include_prefix": True},
    "mlp_ratio": {"mlp_ratio": 2.5},
    "no_qkv_bias": {"qkv_bias": False},
    "qk_norm": {"qk_norm": True},
    "scale_norms": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "no_proj_bias": {"proj_bias": False},
    "layer_scale": {"init_values": 0.3},
    "no_class_token": {"class_token": False, "global_pool": "avg"},
    "pos_embed_none": {"pos_embed": "none"},
    "pos_embed_empty_no_class_token": {"pos_embed": "", "class_token": False, "global_pool": "avg"},
    "no_embed_class": {"no_embed_class": True},
    "reg_tokens": {"reg_tokens": 3},
    "reg_tokens_no_embed_class": {"reg_tokens": 2, "no_embed_class": True},
    "pre_norm": {"pre_norm": True},
    "no_final_norm": {"final_norm": False},
    "no_final_norm_avg": {"final_norm": False, "global_pool": "avg"},
    "fc_norm_token": {"fc_norm": True},
    "no_fc_norm_avg": {"fc_norm": False, "global_pool": "avg"},
    "dynamic_same_size": {"dynamic_img_size": True},
    "dynamic_pad": {"dynamic_img_size": True, "dynamic_img_pad": True},
    "fix_init": {"fix_init": True},
    "init_jax": {"weight_init": "jax"},
    "init_jax_nlhb": {"weight_init": "jax_nlhb"},
    "init_moco": {"weight_init": "moco"},
    "init_reset": {"weight_init": "reset"},
    "norm_eps": {"norm_layer": partial(nn.LayerNorm, eps=1e-2)},
    "norm_timm_class": {"norm_layer": TimmLayerNorm},
    "norm_torch_class": {"norm_layer": nn.LayerNorm},
    "norm_name": {"norm_layer": "layernorm"},
    "norm_rms_name": {"norm_layer": "rmsnorm", "qk_norm": True},
    "norm_rms_class": {"norm_layer": (TimmRmsNorm, partial(nn.RMSNorm, eps=1e-6))},
    "norm_no_affine": {"norm_layer": partial(nn.LayerNorm, elementwise_affine=False)},
    "embed_norm": {"embed_norm_layer": "layernorm"},
    "embed_layer": {"embed_layer": (partial(TimmPatchEmbed, bias=True), partial(PatchEmbed)), "pre_norm": False},
    "act_relu": {"act_layer": "relu"},
    "act_gelu_tanh": {"act_layer": "gelu_tanh"},
    "act_quick_gelu": {"act_layer": "quick_gelu"},
    "act_silu": {"act_layer": "silu"},
    "act_class": {"act_layer": nn.Mish},
    "mlp_swiglu": {"mlp_layer": (TimmSwiGLU, SwiGLU), "act_layer": nn.SiLU},
    "mlp_swiglu_name": {"mlp_layer": (TimmSwiGLU, "swiglu"), "act_layer": nn.SiLU, "scale_mlp_norm": True},
    "mlp_swiglu_packed": {"mlp_layer": (TimmSwiGLUPacked, SwiGLUPacked), "act_layer": "silu", "scale_mlp_norm": True},
    "mlp_swiglu_packed_default_act": {"mlp_layer": (TimmSwiGLUPacked, "swiglu_packed")},
    "attn_name": {"attn_layer": "attn"},
    "attn_diff_class": {"attn_layer": ("diff", tvt.DiffAttention), "qk_norm": True},
    "block_res_post": {"block_fn": tvt.ResPostBlock, "init_values": 0.1, "class_token": False, "global_pool": "avg"},
    "block_parallel": {"block_fn": tvt.ParallelThingsBlock, "init_values": 0.1},
    "block_parallel_scaling": {"block_fn": tvt.ParallelScalingBlock, "qk_norm": True},
    "depth1": {"depth": 1},
}


def split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return timm's arguments and mmfast's."""
    pairs = ("norm_layer", "mlp_layer", "attn_layer", "embed_layer")
    theirs, ours = dict(BASE), dict(BASE)
    for name, value in options.items():
        is_pair = name in pairs and isinstance(value, tuple)
        theirs[name], ours[name] = value if is_pair else (value, value)
    return theirs, ours


def build(options: dict[str, Any], dtype: torch.dtype = torch.float64) -> tuple[Any, ViT]:
    """Return both models with the same random weights, all of them away from 0 and 1."""
    theirs, ours = split(options)
    peer, model = tvt.VisionTransformer(**theirs).to(dtype), ViT(**ours).to(dtype)
    randomize(peer)
    model.load_state_dict(peer.state_dict(), strict=True)
    return peer.eval(), model.eval()


def randomize(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter) * 0.3
            parameter.copy_(noise + 1.0 if "norm" in name and name.endswith("weight") else noise)


def images(options: dict[str, Any], batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    size = options.get("img_size", BASE["img_size"])
    height, width = size if isinstance(size, tuple) else (size, size)
    return torch.randn(batch, options.get("in_chans", 3), height, width, dtype=dtype)


def assert_same(ours: Any, theirs: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def assert_same_gradients(model: nn.Module, peer: nn.Module, tolerance: float = 1e-10) -> None:
    theirs = dict(peer.named_parameters())
    for name, parameter in model.named_parameters():
        assert_same(parameter.grad, theirs[name].grad, tolerance)


@pytest.mark.parametrize("option", OPTIONS)
def test_outputs_and_gradients(option: str) -> None:
    peer, model = build(OPTIONS[option])
    x = images(OPTIONS[option])
    ours, theirs = model(x), peer(x)
    assert_same(ours, theirs)
    seed = torch.randn_like(theirs)
    ours.backward(seed)
    theirs.backward(seed)
    assert_same_gradients(model, peer)


@pytest.mark.parametrize("option", OPTIONS)
def test_initialisation_draws_timms_numbers(option: str) -> None:
    theirs, ours = split(OPTIONS[option])
    torch.manual_seed(3)
    peer = tvt.VisionTransformer(**theirs).state_dict()
    torch.manual_seed(3)
    model = ViT(**ours).state_dict()
    assert list(model) == list(peer)
    for name, value in peer.items():
        assert torch.equal(model[name], value), name


def test_skip_leaves_tokens_to_a_later_init() -> None:
    torch.manual_seed(3)
    peer = tvt.VisionTransformer(**BASE, weight_init="skip")
    peer.init_weights()
    torch.manual_seed(3)
    model = ViT(**BASE, weight_init="skip")
    model.init_weights()
    for name, value in peer.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_every_argument_of_timm_has_its_name_order_and_default() -> None:
    theirs = inspect.signature(tvt.VisionTransformer.__init__).parameters
    ours = inspect.signature(ViT.__init__).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    own_classes = {"embed_layer", "block_fn", "mlp_layer", "attn_layer"}
    for name, parameter in theirs.items():
        if name not in own_classes:
            assert ours[name].default == parameter.default, name


def test_public_methods_of_timm_are_there_with_their_arguments() -> None:
    # load_pretrained reads JAX checkpoints: conversion of foreign files is not the model's task.
    for name, method in inspect.getmembers(tvt.VisionTransformer, inspect.isfunction):
        if name in vars(tvt.VisionTransformer) and not name.startswith("_") and name != "load_pretrained":
            if name == "fix_init_weight":
                continue
            theirs = list(inspect.signature(method).parameters)
            assert list(inspect.signature(getattr(ViT, name)).parameters) == theirs, name


RATES: dict[str, dict[str, Any]] = {
    "drop_path": {"drop_path_rate": 0.6},
    "drop_path_layer_scale": {"drop_path_rate": 0.6, "init_values": 0.5},
    "patch_drop": {"patch_drop_rate": 0.5, "reg_tokens": 1},
    "patch_drop_no_prefix": {"patch_drop_rate": 0.4, "class_token": False, "global_pool": "avg"},
    "dropouts": {"drop_rate": 0.3, "pos_drop_rate": 0.2, "proj_drop_rate": 0.2},
    "attn_drop": {"attn_drop_rate": 0.3},
    "all": {
        "drop_rate": 0.1,
        "pos_drop_rate": 0.1,
        "proj_drop_rate": 0.1,
        "drop_path_rate": 0.4,
        "patch_drop_rate": 0.3,
    },
}


@pytest.mark.parametrize("rates", RATES)
def test_training_draws_timms_masks(rates: str) -> None:
    peer, model = build(RATES[rates])
    peer.train()
    model.train()
    x = images({}, batch=6)
    torch.manual_seed(5)
    theirs = peer(x)
    torch.manual_seed(5)
    ours = model(x)
    assert_same(ours, theirs)
    assert not torch.allclose(ours, model.eval()(x))
    seed = torch.randn_like(theirs)
    ours.backward(seed)
    theirs.backward(seed)
    assert_same_gradients(model, peer)


@pytest.mark.parametrize("option", ["default", "layer_scale", "norm_rms_name", "block_res_post"])
@pytest.mark.parametrize("mask", ["bool", "float", "causal"])
def test_masks(option: str, mask: str) -> None:
    peer, model = build(OPTIONS[option])
    x = images({})
    tokens = 9 if option == "block_res_post" else 10
    allowed = torch.rand(tokens, tokens) > 0.4
    allowed.fill_diagonal_(True)
    masks: dict[str, Any] = {
        "bool": {"attn_mask": allowed},
        "float": {"attn_mask": torch.randn(tokens, tokens, dtype=torch.float64)},
        "causal": {"is_causal": True},
    }[mask]
    assert_same(model(x, **masks), peer(x, **masks))
    assert not torch.allclose(model(x, **masks), model(x))
    for a, b in zip(
        model.forward_intermediates(x, intermediates_only=True, **masks),
        peer.forward_intermediates(x, intermediates_only=True, **masks),
        strict=True,
    ):
        assert_same(a, b)


REAL: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": 32},
    "deit3_small_patch16_224": {"img_size": 32},
    "vit_medium_patch16_reg4_gap_256": {"img_size": 32},
    "vit_base_patch16_siglip_224": {"img_size": 32, "embed_dim": 96, "num_heads": 12},
    "vit_base_patch16_clip_224.openai": {"img_size": 32, "embed_dim": 96},
    "vit_base_patch16_clip_quickgelu_224": {"img_size": 32, "embed_dim": 96},
    "vit_giant_patch14_dinov2": {"img_size": 28, "embed_dim": 96},
    "vit_giant_patch14_reg4_dinov2": {"img_size": 28, "embed_dim": 96},
    "vit_so400m_patch14_siglip_224": {"img_size": 28, "embed_dim": 144, "num_heads": 2},
    "aimv2_large_patch14_224": {"img_size": 28, "embed_dim": 96, "num_heads": 4},
    "vit_small_patch8_224": {"img_size": 16},
    "vit_small_patch32_224": {"img_size": 64},
    "vit_base_patch16_rpn_224": {"img_size": 32, "embed_dim": 96},
    "vit_base_patch16_gap_224": {"img_size": 32, "embed_dim": 96},
}


def timm_model(name: str, **kwargs: Any) -> Any:
    return timm.create_model(name, pretrained=False, depth=2, num_classes=5, **kwargs)


@pytest.mark.parametrize("name", REAL)
def test_from_timm_named_models(name: str) -> None:
    peer = timm_model(name, **REAL[name]).double()
    if type(peer.blocks[0]).__name__ != "Block":
        with pytest.raises(TypeError, match="blocks must be a Block, got ResPostBlock"):
            ViT.from_timm(peer)
        return
    randomize(peer)
    peer.eval()
    model = ViT.from_timm(peer)
    assert not model.training
    assert list(model.state_dict()) == list(peer.state_dict())
    x = images({"img_size": REAL[name]["img_size"]})
    assert_same(model(x), peer(x))


def test_from_timm_reads_every_option() -> None:
    """The arguments read off a model rebuild it, rates included."""
    options: dict[str, Any] = {
        "drop_rate": 0.1,
        "pos_drop_rate": 0.2,
        "patch_drop_rate": 0.3,
        "proj_drop_rate": 0.25,
        "attn_drop_rate": 0.15,
        "drop_path_rate": 0.35,
        "init_values": 0.2,
        "reg_tokens": 2,
        "no_embed_class": True,
        "qk_norm": True,
        "mlp_ratio": 2.3125,
        "dynamic_img_size": True,
        "dynamic_img_pad": True,
        "scale_attn_norm": True,
        "scale_mlp_norm": True,
        "embed_norm_layer": "layernorm",
        "norm_layer": partial(TimmLayerNorm, eps=1e-3),
        "mlp_layer": TimmSwiGLUPacked,
        "act_layer": nn.SiLU,
    }
    peer = tvt.VisionTransformer(**BASE, **options).train()
    model = ViT.from_timm(peer, pos_embed_resample="dinov2")
    assert model.pos_embed_resample == "dinov2"
    assert model.training
    x = torch.randn(3, 3, 24, 24)
    torch.manual_seed(1)
    theirs = peer(x)
    torch.manual_seed(1)
    assert_same(model(x), theirs, 1e-5)
    assert model.blocks[-1].drop_path2.drop_prob == pytest.approx(0.35)


def test_from_timm_refuses_other_models() -> None:
    with pytest.raises(TypeError, match="model must be a VisionTransformer, got Linear"):
        ViT.from_timm(nn.Linear(2, 2))


@pytest.mark.parametrize("option", ["default", "reg_tokens", "reg_tokens_no_embed_class", "no_class_token"])
@pytest.mark.parametrize("size", [(16, 16), (32, 40), (24, 24), (48, 8)], ids=lambda s: "x".join(map(str, s)))
def test_dynamic_image_size(option: str, size: tuple[int, int]) -> None:
    peer, model = build({**OPTIONS[option], "dynamic_img_size": True}, torch.float32)
    x = torch.randn(2, 3, *size)
    assert_same(model(x), peer(x), 1e-5)


def test_dynamic_image_padding() -> None:
    peer, model = build({"dynamic_img_size": True, "dynamic_img_pad": True}, torch.float32)
    x = torch.randn(2, 3, 19, 33)
    assert_same(model(x), peer(x), 1e-5)
    assert_same(model.forward_intermediates(x)[1][0], peer.forward_intermediates(x)[1][0], 1e-5)


@pytest.mark.parametrize(
    "sizes",
    [{"img_size": 40}, {"img_size": (16, 48)}, {"patch_size": 4}, {"img_size": 32, "patch_size": (4, 16)}],
    ids=str,
)
@pytest.mark.parametrize("option", ["default", "reg_tokens_no_embed_class", "pos_embed_none"])
def test_set_input_size(option: str, sizes: dict[str, Any]) -> None:
    peer, model = build(OPTIONS[option], torch.float32)
    peer.pos_embed is None or peer.pos_embed.requires_grad_(False)
    model.pos_embed is None or model.pos_embed.requires_grad_(False)
    peer.set_input_size(**sizes)
    model.set_input_size(**sizes)
    theirs = peer.state_dict()
    for name, value in model.state_dict().items():
        assert_same(value, theirs[name], 1e-5)
    if model.pos_embed is not None:
        assert not model.pos_embed.requires_grad
    assert model.patch_embed.proj.weight.requires_grad
    x = torch.randn(2, 3, *peer.patch_embed.img_size)
    assert_same(model(x), peer(x), 1e-4)


INTERMEDIATES: dict[str, dict[str, Any]] = {
    "all": {},
    "last2": {"indices": 2},
    "list": {"indices": [0, -1]},
    "unordered": {"indices": [2, 0]},
    "prefix": {"indices": [1], "return_prefix_tokens": True},
    "norm": {"norm": True},
    "stop_early": {"indices": [0, 1], "stop_early": True},
    "nlc": {"output_fmt": "NLC"},
    "only": {"intermediates_only": True, "return_prefix_tokens": True, "output_fmt": "NLC", "norm": True},
    "dict": {"output_dict": True, "return_prefix_tokens": True},
    "dict_only": {"output_dict": True, "intermediates_only": True, "indices": 1},
}


@pytest.mark.parametrize("option", ["reg_tokens", "no_class_token", "norm_rms_name"])
@pytest.mark.parametrize("case", INTERMEDIATES)
def test_forward_intermediates(option: str, case: str) -> None:
    peer, model = build(OPTIONS[option])
    x = images({})
    ours = model.forward_intermediates(x, **INTERMEDIATES[case])
    theirs = peer.forward_intermediates(x, **INTERMEDIATES[case])
    assert type(ours) is type(theirs)
    assert_same(ours, theirs)


@pytest.mark.parametrize("reshape", [False, True])
def test_get_intermediate_layers(reshape: bool) -> None:
    peer, model = build(OPTIONS["reg_tokens"])
    x = images({})
    arguments: dict[str, Any] = {"n": [0, 2], "reshape": reshape, "return_prefix_tokens": True, "norm": True}
    assert_same(model.get_intermediate_layers(x, **arguments), peer.get_intermediate_layers(x, **arguments))


@pytest.mark.parametrize("prune", [{}, {"prune_norm": True}, {"prune_head": False}], ids=str)
@pytest.mark.parametrize("option", ["default", "pool_avg", "pool_map"])
def test_prune_intermediate_layers(option: str, prune: dict[str, bool]) -> None:
    peer, model = build(OPTIONS[option])
    assert model.prune_intermediate_layers([0, 1], **prune) == peer.prune_intermediate_layers([0, 1], **prune)
    assert list(model.state_dict()) == list(peer.state_dict())
    x = images({})
    assert_same(model(x), peer(x))


@pytest.mark.parametrize("pre_logits", [False, True])
@pytest.mark.parametrize("option", ["default", "pool_avg", "pool_map", "pool_none", "num_classes0"])
def test_forward_features_and_head(option: str, pre_logits: bool) -> None:
    peer, model = build(OPTIONS[option])
    x = images({})
    ours, theirs = model.forward_features(x), peer.forward_features(x)
    assert_same(ours, theirs)
    assert_same(model.forward_head(ours, pre_logits=pre_logits), peer.forward_head(theirs, pre_logits=pre_logits))


@pytest.mark.parametrize("pool_type", ["token", "avg", "max", "avgmax", ""])
def test_pool_override(pool_type: str) -> None:
    peer, model = build(OPTIONS["reg_tokens"])
    x = torch.randn(2, 13, 32, dtype=torch.float64)
    assert_same(model.pool(x, pool_type), peer.pool(x, pool_type))


@pytest.mark.parametrize("pool", [None, "avg", ""])
@pytest.mark.parametrize("option", ["default", "pool_map"])
def test_reset_classifier(option: str, pool: str | None) -> None:
    peer, model = build(OPTIONS[option])
    for each in (peer, model):
        torch.manual_seed(7)
        each.reset_classifier(3, pool)
    assert model.num_classes == 3
    assert model.global_pool == peer.global_pool
    assert list(model.state_dict()) == list(peer.state_dict())
    x = images({})
    assert_same(model(x), peer(x))
    assert not model.get_classifier().training


def test_parameter_groups_and_info() -> None:
    peer, model = build({})
    assert model.no_weight_decay() == peer.no_weight_decay()
    assert model.group_matcher() == peer.group_matcher()
    assert model.group_matcher(coarse=True) == peer.group_matcher(coarse=True)
    assert model.feature_info == peer.feature_info
    for name in ("num_features", "head_hidden_size", "embed_dim", "num_prefix_tokens", "num_reg_tokens"):
        assert getattr(model, name) == getattr(peer, name)


@pytest.mark.parametrize("option", ["default", "qk_norm", "reg_tokens", "norm_rms_name"])
def test_attention_maps_are_timms(option: str) -> None:
    peer, model = build(OPTIONS[option])
    caught: list[Tensor] = []
    for block in peer.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, args, out: caught.append(out))
    x = images({})
    peer(x)
    assert_same(model.attention_maps(x, layers=[0, -1, 1]), [caught[0], caught[2], caught[1]])
    assert_same(model.attention_maps(x), [caught[2]])
    assert_same(model.attention_maps(x, head_fusion="mean")[0], caught[2].mean(1))
    assert_same(model.attention_maps(x, head_fusion="max")[0], caught[2].amax(1))
    assert_same(model.attention_maps(x, head_fusion="min")[0], caught[2].amin(1))


def test_attention_maps_with_masks() -> None:
    peer, model = build({})
    caught: list[Tensor] = []
    for block in peer.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, args, out: caught.append(out))
    x = images({})
    peer(x, is_causal=True)
    assert_same(model.attention_maps(x, layers=range(3), is_causal=True), caught)
    caught.clear()
    mask = torch.rand(10, 10) > 0.5
    mask.fill_diagonal_(True)
    peer(x, attn_mask=mask)
    assert_same(model.attention_maps(x, layers=range(3), attn_mask=mask), caught)
    mask[3] = False
    assert (model.attention_maps(x, attn_mask=mask)[0][:, :, 3] == 0).all()


def test_autocast_is_as_close_to_float32_as_timm() -> None:
    peer, model = build(OPTIONS["layer_scale"], torch.float32)
    x = images({}, dtype=torch.float32)
    exact = peer(x)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = model(x), peer(x)
    assert ours.dtype == theirs.dtype
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 1e-2
