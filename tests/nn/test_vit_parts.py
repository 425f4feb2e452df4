"""The parts of a ViT beside timm's: Mlp, GluMlp, SwiGLU, Attention, pools, PatchEmbed, DropPath, PatchDropout."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmfast import nn as mnn

timm_layers = pytest.importorskip("timm.layers")


def pair(name: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Return timm's module and mmfast's of the same class name and weights, in float64."""
    torch.manual_seed(1)
    theirs = getattr(timm_layers, name)(*args, **kwargs).double()
    torch.manual_seed(1)
    ours = getattr(mnn, name)(*args, **kwargs).double()
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), f"{key} is initialised differently"
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def assert_same(theirs: Any, ours: Any, x: Tensor, **kwargs: Any) -> None:
    """Same output and gradients, the generator in the same state."""
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.manual_seed(2)
    expected = theirs(x1, **kwargs)
    torch.manual_seed(2)
    found = ours(x2, **kwargs)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    seed = torch.randn_like(expected)
    expected.backward(seed)
    found.backward(seed)
    torch.testing.assert_close(x2.grad, x1.grad, rtol=1e-9, atol=1e-9)
    peers = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, peers[name].grad, rtol=1e-9, atol=1e-9)


MLPS: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp": ("Mlp", {}),
    "mlp_options": ("Mlp", {"hidden_features": 12, "out_features": 5, "act_layer": nn.ReLU, "bias": False}),
    "mlp_bias_pair": ("Mlp", {"bias": (True, False), "norm_layer": nn.LayerNorm}),
    "mlp_drop": ("Mlp", {"drop": (0.2, 0.4)}),
    "glu": ("GluMlp", {}),
    "glu_gate_first": ("GluMlp", {"gate_last": False, "hidden_features": 12, "norm_layer": nn.LayerNorm, "drop": 0.3}),
    "swiglu_packed": ("SwiGLUPacked", {"hidden_features": 20, "out_features": 3}),
    "swiglu": ("SwiGLU", {"hidden_features": 12, "bias": (False, True)}),
    "swiglu_aligned": ("SwiGLU", {"hidden_features": 11, "align_to": 8, "norm_layer": nn.LayerNorm, "drop": 0.3}),
}


@pytest.mark.parametrize("case", MLPS)
def test_mlps_are_timms(case: str) -> None:
    name, kwargs = MLPS[case]
    theirs, ours = pair(name, 8, **kwargs)
    assert_same(theirs, ours, torch.randn(2, 5, 8, dtype=torch.float64))


def test_swiglu_packed_is_its_formula() -> None:
    mlp = mnn.SwiGLUPacked(4, 6)
    x = torch.randn(3, 4)
    first, second = (x @ mlp.fc1.weight.T + mlp.fc1.bias).split(3, dim=-1)
    expected = (first * torch.sigmoid(first) * second) @ mlp.fc2.weight.T + mlp.fc2.bias
    torch.testing.assert_close(mlp(x), expected)


@pytest.mark.parametrize("name", ["GluMlp", "SwiGLU"])
def test_gates_start_open(name: str) -> None:
    torch.manual_seed(4)
    theirs = getattr(timm_layers, name)(8, 8)
    theirs.init_weights()
    torch.manual_seed(4)
    ours = getattr(mnn, name)(8, 8)
    ours.init_weights()
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value)


ATTENTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "bias_norms": {
        "qkv_bias": True,
        "qk_norm": True,
        "scale_norm": True,
        "norm_layer": nn.LayerNorm,
        "proj_bias": False,
    },
    "head_dim_out": {"attn_head_dim": 6, "dim_out": 5},
    "gated": {"gated": True, "qkv_bias": True},
    "drop": {"attn_drop": 0.3, "proj_drop": 0.3},
    "one_head": {"num_heads": 1},
}


@pytest.mark.parametrize("mask", [None, "bool", "float", "causal"])
@pytest.mark.parametrize("case", ATTENTIONS)
def test_attention_is_timms(case: str, mask: str | None) -> None:
    theirs, ours = pair("Attention", 8, **{"num_heads": 2, **ATTENTIONS[case]})
    allowed = (torch.rand(5, 5) > 0.5).fill_diagonal_(True)
    bias = torch.randn(5, 5, dtype=torch.float64)
    masks = {None: {}, "bool": {"attn_mask": allowed}, "float": {"attn_mask": bias}, "causal": {"is_causal": True}}
    assert_same(theirs, ours, torch.randn(2, 5, 8, dtype=torch.float64), **masks[mask])


def test_pools_are_timms() -> None:
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    for kwargs in ({}, {"norm_layer": nn.LayerNorm, "act_layer": nn.ReLU, "mlp_ratio": 2.0}):
        theirs, ours = pair("AttentionPoolLatent", 8, num_heads=2, **kwargs)
        assert_same(theirs, ours, x)
        mask = torch.rand(2, 1, 1, 5) > 0.3
        mask[..., 0] = True
        assert_same(theirs, ours, x, attn_mask=mask)
    for pool_type in ("token", "avg"):
        theirs, ours = pair("AttentionPoolPrr", 8, num_heads=2, pool_type=pool_type)
        assert_same(theirs, ours, x)


EMBEDS: dict[str, dict[str, Any]] = {
    "default": {},
    "nhwc": {"output_fmt": "NHWC"},
    "ncl": {"output_fmt": "NCL"},
    "nlc": {"output_fmt": "NLC"},
    "nchw": {"output_fmt": "NCHW"},
    "no_flatten": {"flatten": False},
    "norm": {"norm_layer": nn.LayerNorm},
    "no_bias": {"bias": False},
    "any_size": {"img_size": None},
    "rectangle": {"img_size": (8, 12), "patch_size": (4, 3)},
    "pad": {"img_size": (7, 11), "dynamic_img_pad": True, "strict_img_size": False},
}


@pytest.mark.parametrize("case", EMBEDS)
def test_patch_embed_is_timms(case: str) -> None:
    kwargs = {"img_size": (8, 12), "patch_size": 4, **EMBEDS[case]}
    if isinstance(kwargs["patch_size"], tuple):
        theirs = timm_layers.PatchEmbed(embed_dim=6, **kwargs).double()
        ours = mnn.PatchEmbed(embed_dim=6, **kwargs).double()
        ours.load_state_dict(theirs.state_dict())
    else:
        theirs, ours = pair("PatchEmbed", embed_dim=6, **kwargs)
    height, width = kwargs["img_size"] or (8, 12)
    assert_same(theirs, ours, torch.randn(2, 3, height, width, dtype=torch.float64))
    assert (ours.grid_size, ours.num_patches) == (theirs.grid_size, theirs.num_patches)
    assert ours.dynamic_feat_size((9, 13)) == theirs.dynamic_feat_size((9, 13))
    assert ours.feat_ratio() == theirs.feat_ratio()
    assert ours.feat_ratio(as_scalar=False) == theirs.feat_ratio(as_scalar=False)


def test_drop_path_is_timms() -> None:
    x = torch.randn(16, 3, 4)
    for kwargs in ({"drop_prob": 0.4}, {"drop_prob": 0.4, "scale_by_keep": False}, {"drop_prob": 1.0}, {}):
        theirs, ours = pair("DropPath", **kwargs)
        torch.manual_seed(3)
        expected = theirs(x)
        torch.manual_seed(3)
        assert torch.equal(ours(x), expected)
        assert torch.equal(ours.eval()(x), x)
    assert repr(mnn.DropPath(0.1)) == repr(timm_layers.DropPath(0.1))


def test_patch_dropout_is_timms() -> None:
    x = torch.randn(4, 11, 3)
    for kwargs in (
        {"prob": 0.5},
        {"prob": 0.3, "num_prefix_tokens": 0},
        {"prob": 0.99},
        {"prob": 0.5, "ordered": True},
    ):
        theirs, ours = pair("PatchDropout", **kwargs)
        torch.manual_seed(3)
        expected = theirs(x)
        torch.manual_seed(3)
        assert torch.equal(ours(x), expected)
        assert torch.equal(ours.eval()(x), x)


def test_patch_dropout_keeps_prefix_and_rows() -> None:
    x = torch.arange(8.0).reshape(1, 8, 1)
    kept = mnn.PatchDropout(0.5, num_prefix_tokens=2, ordered=True)(x).flatten().tolist()
    assert kept[:2] == [0.0, 1.0]
    assert len(kept) == 5
    assert kept[2:] == sorted(set(kept[2:]))


def test_layer_scale() -> None:
    scale = mnn.LayerScale(3, init_values=0.5)
    x = torch.randn(2, 3)
    assert torch.equal(scale(x), x * 0.5)
    assert repr(scale) == "LayerScale(3, init_values=0.5)"
    y = x.clone()
    assert mnn.LayerScale(3, 0.5, inplace=True).requires_grad_(False)(y) is y
    assert torch.equal(y, x * 0.5)


@pytest.mark.parametrize("name", mnn.activation.ACTIVATIONS)
def test_activations_are_timms(name: str) -> None:
    from timm.layers import create_act_layer

    x = torch.linspace(-5, 5, 101)
    torch.testing.assert_close(mnn.get_act_layer(name)()(x), create_act_layer(name)(x), rtol=1e-6, atol=1e-6)


ERRORS: dict[str, tuple[Any, str]] = {
    "attention_heads": (lambda: mnn.Attention(10, 3), "dim must be a multiple of num_heads, got dim=10, num_heads=3"),
    "attention_norm": (lambda: mnn.Attention(8, 2, qk_norm=True), "qk_norm and scale_norm need norm_layer, got None"),
    "pool_heads": (lambda: mnn.AttentionPoolLatent(10, 3), "in_features=10, num_heads=3"),
    "prr_heads": (lambda: mnn.AttentionPoolPrr(10, 3), "dim=10, num_heads=3"),
    "prr_type": (lambda: mnn.AttentionPoolPrr(8, 2, "max"), "pool_type must be 'token' or 'avg', got 'max'"),
    "glu_odd": (lambda: mnn.GluMlp(3), "hidden_features must be even, got 3"),
    "format": (lambda: mnn.PatchEmbed(output_fmt="HWC"), "output_fmt must be one of NCHW, NHWC, NCL, NLC, got 'HWC'"),
    "rate": (lambda: mnn.DropPath(-0.1), "drop_prob must be in [0, 1], got -0.1"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    build, message = ERRORS[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        build()
