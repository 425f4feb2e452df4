"""Names, shapes and constructor arguments of the ViT converters, without any peer library."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmfast import convert
from mmfast.models import ViT

TINY = {"img_size": 12, "patch_size": 4, "embed_dim": 12, "depth": 3, "num_heads": 3, "num_classes": 5}


def tiny(**changes: Any) -> dict[str, Tensor]:
    """The state dict of a tiny ViT with every parameter random."""
    model = ViT(**{**TINY, **changes})
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    return dict(model.state_dict())


def rename(state: Mapping[str, Tensor], *pairs: tuple[str, str]) -> dict[str, Tensor]:
    """Apply regular expressions to the keys."""
    out = {}
    for key, value in state.items():
        for pattern, new in pairs:
            key = re.sub(pattern, new, key)
        out[key] = value
    return out


def torchvision_names(depth: int = 12, width: int = 768, tokens: int = 197, patch: int = 16) -> dict[str, Tensor]:
    """torchvision's `vit_b_16`, written out from its names and shapes, without memory."""

    def t(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    state = {"class_token": t(1, 1, width), "conv_proj.weight": t(width, 3, patch, patch), "conv_proj.bias": t(width)}
    state["encoder.pos_embedding"] = t(1, tokens, width)
    for i in range(depth):
        layer = f"encoder.layers.encoder_layer_{i}"
        state[f"{layer}.self_attention.in_proj_weight"] = t(3 * width, width)
        state[f"{layer}.self_attention.in_proj_bias"] = t(3 * width)
        for name, shape in {
            "ln_1": (width,),
            "ln_2": (width,),
            "self_attention.out_proj": (width, width),
            "mlp.0": (4 * width, width),
            "mlp.3": (width, 4 * width),
        }.items():
            state[f"{layer}.{name}.weight"], state[f"{layer}.{name}.bias"] = t(*shape), t(shape[0])
    state |= {"encoder.ln.weight": t(width), "encoder.ln.bias": t(width)}
    state |= {"heads.head.weight": t(1000, width), "heads.head.bias": t(1000)}
    return state


def test_vit_b_16_has_152_tensors_of_86567656_parameters() -> None:
    state = torchvision_names()
    out = convert.to_timm(state)
    assert len(state) == len(out) == 152
    assert sum(t.numel() for t in out.values()) == 86_567_656
    assert all(t.is_meta for t in out.values())
    config = convert.vit_config(state, num_heads=12)
    expected = {"img_size": 224, "patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, "mlp_ratio": 4.0}
    assert {key: config[key] for key in expected} == expected
    model = ViT(**config, device="meta", weight_init="skip")
    model.load_state_dict(out, strict=True)
    assert {key: tuple(t.shape) for key, t in out.items()} == {
        k: tuple(t.shape) for k, t in ViT(device="meta").state_dict().items()
    }
    back = convert.from_timm(out, "torchvision")
    assert {key: t.shape for key, t in back.items()} == {key: t.shape for key, t in state.items()}


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "oblong": {"img_size": (8, 12), "patch_size": (4, 2)},
    "gap": {"global_pool": "avg", "class_token": False},
    "gap-norm-first": {"global_pool": "avg", "class_token": False, "fc_norm": False},
    "map": {"global_pool": "map", "class_token": False},
    "no-head": {"num_classes": 0},
    "registers": {"reg_tokens": 3},
    "registers-without-position": {"reg_tokens": 2, "no_embed_class": True},
    "clip": {"pre_norm": True},
    "layer-scale": {"init_values": 0.1},
    "norms": {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
    "no-biases": {"qkv_bias": False, "proj_bias": False},
    "swiglu": {"mlp_layer": "swiglu", "mlp_ratio": 2.7},
    "swiglu-packed": {"mlp_layer": "swiglu_packed"},
    "odd-ratio": {"mlp_ratio": 3.7362},
    "no-positions": {"pos_embed": "none"},
    "no-final-norm": {"final_norm": False},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config_rebuilds_the_model(name: str) -> None:
    """The arguments read off a state dict give a model with exactly its parameters."""
    changes = CONFIGS[name]
    state = tiny(**changes)
    needed = {key: changes[key] for key in ("img_size",) if key in changes}
    if name == "no-positions":
        needed["img_size"] = 12
    config = convert.vit_config(state, num_heads=3, **needed)
    model = ViT(**config)
    model.load_state_dict(convert.to_timm(state), strict=True)
    built = ViT(**{**TINY, **changes})
    built.load_state_dict(state)
    size = built.patch_embed.img_size
    x = torch.randn(2, 3, *size)
    if name not in ("swiglu", "swiglu-packed"):  # there the activation is silu, as everywhere in practice
        torch.testing.assert_close(model.eval()(x), built.eval()(x))
    assert config["act_layer"] == ("silu" if "swiglu" in name else "gelu")
    assert config["norm_layer"].keywords["eps"] == (1e-5 if name == "clip" else 1e-6)


def test_gated_attention_and_wide_heads() -> None:
    from functools import partial

    from mmfast.nn import Attention

    state = tiny(attn_layer=partial(Attention, attn_head_dim=7, gated=True))
    config = convert.vit_config(state, num_heads=3)
    assert config["attn_layer"].keywords == {"attn_head_dim": 7, "gated": True}
    ViT(**config).load_state_dict(state, strict=True)


def test_layouts_know_their_eps_and_activation() -> None:
    plain = convert.to_timm(tiny())
    eps = {}
    for layout in ("torchvision", "transformers"):
        foreign = convert.from_timm(plain, layout)
        eps[layout] = convert.vit_config(foreign, num_heads=3)["norm_layer"].keywords["eps"]
    assert eps == {"torchvision": 1e-6, "transformers": 1e-12}
    clip = convert.from_timm(convert.to_timm(tiny(pre_norm=True, num_classes=0)), "open_clip")
    config = convert.vit_config(clip, num_heads=3, act_layer="quick_gelu")
    assert (config["norm_layer"].keywords["eps"], config["act_layer"]) == (1e-5, "quick_gelu")
    openai = {f"visual.{key}": value for key, value in clip.items()}
    openai |= dict.fromkeys(("input_resolution", "context_length", "vocab_size"), torch.tensor(1))
    assert convert.vit_config(openai, num_heads=3)["act_layer"] == "quick_gelu"
    assert convert.vit_config(tiny(), num_heads=3, eps=0.5)["norm_layer"].keywords["eps"] == 0.5


def test_config_of_a_transformers_config() -> None:
    """Anything with the attributes of a vision config will do."""

    class Config:
        num_attention_heads, layer_norm_eps, hidden_act, image_size = 3, 1e-3, "gelu_pytorch_tanh", 12

    config = convert.vit_config(convert.from_timm(tiny(), "transformers"), config=Config())
    assert (config["num_heads"], config["act_layer"], config["norm_layer"].keywords["eps"]) == (3, "gelu_tanh", 1e-3)
    Config.hidden_act = "sine"
    with pytest.raises(ValueError, match=r"hidden_act must be one of .*, got 'sine'"):
        convert.vit_config(tiny(), config=Config())


def test_nothing_is_copied_but_merged_tensors() -> None:
    state = convert.from_timm(tiny(), "transformers")
    out = convert.to_timm(state)
    shared = {t.data_ptr() for t in state.values()}
    new = [key for key, t in out.items() if t.data_ptr() not in shared]
    assert new == [f"blocks.{i}.attn.qkv.{p}" for i in range(3) for p in ("weight", "bias")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=["bf16", "f16", "f64"])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    state = {key: t.to(dtype) for key, t in convert.from_timm(tiny(), "transformers").items()}
    del state["encoder.layer.1.attention.attention.key.bias"]
    out = convert.to_timm(state)
    assert {t.dtype for t in out.values()} == {dtype}
    assert convert.vit_from(state, num_heads=3).head.weight.dtype == dtype


@pytest.mark.gpu
def test_device_is_kept() -> None:
    state = {key: t.cuda() for key, t in convert.from_timm(tiny(), "transformers").items()}
    assert {t.device.type for t in convert.to_timm(state).values()} == {"cuda"}
    assert convert.vit_from(state, num_heads=3).head.weight.is_cuda


def test_missing_key_bias_is_zero_and_stays_missing() -> None:
    state = convert.from_timm(tiny(), "transformers")
    missing = [f"encoder.layer.{i}.attention.attention.key.bias" for i in range(3)]
    for name in missing:
        del state[name]
    out = convert.to_timm(state)
    bias = out["blocks.1.attn.qkv.bias"]
    assert torch.equal(bias[:12], state["encoder.layer.1.attention.attention.query.bias"])
    assert torch.count_nonzero(bias[12:24]) == 0
    assert torch.equal(bias[24:], state["encoder.layer.1.attention.attention.value.bias"])
    assert out.added == missing
    assert convert.from_timm(out, "transformers").keys() == state.keys()


WRAPPED = ["module.", "_orig_mod.", "_orig_mod.module."]


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrappers_are_taken_off(wrapper: str) -> None:
    state = tiny()
    out = convert.to_timm({wrapper + key: value for key, value in state.items()})
    assert out.keys() == state.keys()


def test_older_timm_names() -> None:
    state = tiny(init_values=0.1)
    old = rename(state, (r"ls(\d)\.gamma", r"gamma_\1"))
    old["patch_embed.proj.weight"] = old["patch_embed.proj.weight"].flatten(1)
    for i in range(3):
        bias = old.pop(f"blocks.{i}.attn.qkv.bias")
        old[f"blocks.{i}.attn.q_bias"], _, old[f"blocks.{i}.attn.v_bias"] = bias.chunk(3)
    out = convert.to_timm(old)
    for key, value in state.items():
        if key.endswith("qkv.bias"):
            value = torch.cat((value[:12], torch.zeros(12), value[24:]))
        assert torch.equal(out[key], value), key
    assert out.keys() == state.keys()


def test_distillation_token_is_a_register_with_a_position() -> None:
    state = tiny(reg_tokens=1)
    config = convert.vit_config(rename(state, ("reg_token", "dist_token")), num_heads=3)
    assert (config["reg_tokens"], config["no_embed_class"]) == (1, False)
    with pytest.raises(ValueError, match=r"head_dist.weight .the logits are the mean of two heads"):
        convert.to_timm({**state, "head_dist.weight": torch.zeros(5, 12)})


def test_timm_tower_in_open_clip() -> None:
    state = tiny()
    tower = {f"visual.trunk.{k}": v for k, v in state.items() if not k.startswith("head.")}
    clip = tower | {"visual.head.proj.weight": state["head.weight"], "text.token_embedding.weight": torch.zeros(3, 3)}
    out = convert.to_timm(clip)
    assert torch.equal(out["head.weight"], state["head.weight"])
    assert torch.count_nonzero(out["head.bias"]) == 0
    assert list(out.aside) == ["text.token_embedding.weight"]
    assert convert.from_timm(out, "timm").keys() == clip.keys()
    with pytest.raises(ValueError, match="a head after a timm tower"):
        convert.to_timm(clip | {"visual.head.mlp.fc1.weight": torch.zeros(3, 3)})


def test_old_torchvision_mlp_names_survive_the_way_back() -> None:
    state = convert.from_timm(tiny(), "torchvision", dialect="old")
    assert "encoder.layers.encoder_layer_2.mlp.linear_1.weight" in state
    assert convert.from_timm(convert.to_timm(state), "torchvision").keys() == state.keys()
    assert "encoder.layers.encoder_layer_2.mlp.3.bias" in convert.from_timm(tiny(), "torchvision")


def test_transformers_names_of_both_versions_mixed() -> None:
    plain = tiny()
    old = convert.from_timm(plain, "transformers", prefix="vit.")
    mixed = rename(
        old,
        (r"attention\.attention\.(q|k|v)\w+", r"attention.\1_proj"),
        (r"encoder\.layer\.(\d)\.output\.dense", r"layers.\1.mlp.fc2"),
    )
    assert "vit.encoder.layer.1.attention.q_proj.bias" in mixed
    assert "vit.layers.1.mlp.fc2.bias" in mixed
    out = convert.to_timm(mixed)
    assert all(torch.equal(out[key], value) for key, value in plain.items())


def edited(edit: Callable[[dict[str, Tensor]], Any]) -> Callable[[], dict[str, Tensor]]:
    def build() -> dict[str, Tensor]:
        state = convert.from_timm(tiny(), "transformers")
        edit(state)
        return state

    return build


KEY = "encoder.layer.1.attention.attention.key.weight"
ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "unknown": (
        edited(lambda s: s.update(extra=torch.zeros(1))),
        ValueError,
        r"1 unknown key\(s\): extra\. strict=False",
    ),
    "part-missing": (edited(lambda s: s.pop(KEY)), ValueError, f"{KEY} is missing, which is a part of"),
    "part-dtype": (edited(lambda s: s.update({KEY: s[KEY].half()})), ValueError, "must have one dtype and device"),
    "part-shape": (edited(lambda s: s.update({KEY: s[KEY][:3]})), ValueError, r"\(12, 12\), got \(3, 12\)"),
    "shape": (
        edited(lambda s: s.update({"layernorm.weight": torch.zeros(7)})),
        ValueError,
        r"to_timm\(transformers\): norm.weight must have shape \(12\), got \(7,\)",
    ),
    "block-differs": (
        edited(lambda s: s.pop("encoder.layer.2.layernorm_after.bias")),
        ValueError,
        "blocks 0 and 2 differ in norm2.bias",
    ),
    "gap": (
        lambda: {k: v for k, v in tiny().items() if not k.startswith("blocks.1.")},
        ValueError,
        r"without a gap, got \[0, 2\]",
    ),
    "twice": (
        edited(lambda s: s.update({"layers.1.layernorm_after.bias": torch.zeros(12)})),
        ValueError,
        "are both blocks.1.norm2.bias",
    ),
    "gated-width": (
        lambda: (
            tiny()
            | {f"blocks.{i}.mlp.fc1.weight": torch.zeros(50, 12) for i in range(3)}
            | {f"blocks.{i}.mlp.fc1.bias": torch.zeros(50) for i in range(3)}
        ),
        ValueError,
        r"\(48\), or twice as many \(a packed gate\), got 50",
    ),
    "nested": (lambda: {"model": tiny()}, TypeError, r"must be a tensor, got dict; pass state_dict\['model'\]"),
    "a-module": (lambda: nn.Linear(2, 2), TypeError, "must be a mapping of names to tensors, got Linear"),
    "empty": (dict, ValueError, "state_dict is empty"),
    "foreign": (lambda: {"layer1.0.conv1.weight": torch.zeros(1)}, ValueError, "no ViT layout"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_is_wrong(name: str) -> None:
    build, kind, match = ERRORS[name]
    with pytest.raises(kind, match=match):
        convert.to_timm(build())


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"layout must be one of .*, got 'jax'"):
        convert.to_timm(tiny(), src="jax")
    with pytest.raises(ValueError, match=r"layout must be one of .*, got 'jax'"):
        convert.convert(tiny(), dst="jax")
    with pytest.raises(TypeError, match="timm has no option pool"):
        convert.to_timm(tiny(), pool="cls")
    with pytest.raises(TypeError, match="torchvision has no option prefix"):
        convert.from_timm(tiny(), "torchvision", prefix="x.")
    with pytest.raises(ValueError, match="dialect must be one of vit/disk"):
        convert.from_timm(tiny(), "transformers", dialect="v4")
    with pytest.raises(ValueError, match="num_heads is not in a state dict"):
        convert.vit_config(tiny())
    with pytest.raises(ValueError, match="num_heads must divide the attention's width 12, got 5"):
        convert.vit_config(tiny(), num_heads=5)
    assert convert.vit_config(tiny(qk_norm=True))["num_heads"] == 3


def test_positions_that_fit_both_ways_need_an_answer() -> None:
    """9 positions and 5 prefix tokens: a grid of 3 x 3 patches, or of 2 x 2 and positions of the prefix."""
    state = tiny(reg_tokens=4, no_embed_class=True)
    with pytest.raises(ValueError, match="fits no_embed_class=True and False: pass no_embed_class="):
        convert.vit_config(state, num_heads=3)
    assert convert.vit_config(state, num_heads=3, no_embed_class=True)["img_size"] == 12
    assert convert.vit_config(state, num_heads=3, no_embed_class=False)["img_size"] == 8
    with pytest.raises(ValueError, match=r"not a square grid of patches: pass img_size=\(height, width\)"):
        convert.vit_config(tiny(img_size=(8, 12)), num_heads=3)
    with pytest.raises(ValueError, match=r"img_size \(16, 16\) must have the patches of pos_embed"):
        convert.vit_config(tiny(), num_heads=3, img_size=16)


def test_not_strict_keeps_what_it_does_not_know() -> None:
    extra = torch.arange(3.0)
    state = convert.from_timm(tiny(), "torchvision") | {"extra": extra, "heads.pre_logits.weight": extra}
    out = convert.to_timm(state, strict=False)
    assert out.aside.keys() == {"extra", "heads.pre_logits.weight"}
    assert out.reasons == {
        "extra": "unknown name",
        "heads.pre_logits.weight": "a representation layer with tanh before the head",
    }
    back = convert.from_timm(out, "torchvision")
    assert back["extra"] is extra
    assert "extra" not in convert.from_timm(out, "transformers")


@pytest.mark.parametrize(
    ("changes", "dst", "match"),
    [
        ({"init_values": 0.1}, "torchvision", "torchvision has no name for 6 key"),
        ({"reg_tokens": 2, "pre_norm": True, "num_classes": 0}, "open_clip", r"open_clip has no name for .* reg_token"),
        ({"pre_norm": True}, "open_clip", "head.bias must be zero: the target has no such bias"),
        ({}, "vit_pytorch", "normalises patches before and after projecting"),
    ],
    ids=["layer-scale", "registers", "head-bias", "patch-norms"],
)
def test_what_a_layout_cannot_hold_is_refused(changes: dict[str, Any], dst: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        convert.from_timm(tiny(**changes), dst)


def test_converted_state_is_an_ordinary_dict() -> None:
    out = convert.to_timm(convert.from_timm(tiny(), "torchvision"))
    for twin in (copy.deepcopy(out), pickle.loads(pickle.dumps(out)), convert.to_timm(out)):
        assert twin.source == "torchvision"
        assert twin.facts == out.facts
        assert all(torch.equal(twin[key], out[key]) for key in out)
    assert convert.convert(out, dst="torchvision").keys() == convert.from_timm(tiny(), "torchvision").keys()
