"""Names, shapes and configurations of the CLIP converters, without any peer library."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmfast import convert
from mmfast.convert import ConvertedState
from mmfast.models import CLIP

CONFIG: dict[str, Any] = {
    "embed_dim": 5,
    "vision_cfg": {"image_size": 12, "patch_size": 4, "width": 16, "layers": 2, "head_width": 4},
    "text_cfg": {"context_length": 7, "vocab_size": 30, "width": 12, "heads": 3, "layers": 2},
}


def clip_state(**changes: Any) -> dict[str, Tensor]:
    """The state dict of a tiny CLIP with every parameter random."""
    model = CLIP(**{**CONFIG, **changes})
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    return dict(model.state_dict())


def transformers_names(
    vision: tuple[int, int, int, int], text: tuple[int, int, int, int], embed: int
) -> dict[str, Tensor]:
    """transformers' CLIPModel written out from its names and shapes; a tower is (width, depth, positions, patch or
    vocabulary)."""

    def t(*shape: int) -> Tensor:
        return torch.randn(shape)

    state = {"logit_scale": t()}
    for part, (width, depth, positions, size) in (("text_model", text), ("vision_model", vision)):
        state[f"{part}.embeddings.position_embedding.weight"] = t(positions, width)
        state[f"{part}.embeddings.position_ids"] = torch.arange(positions)[None]
        if part == "text_model":
            state[f"{part}.embeddings.token_embedding.weight"] = t(size, width)
        else:
            state[f"{part}.embeddings.class_embedding"] = t(width)
            state[f"{part}.embeddings.patch_embedding.weight"] = t(width, 3, size, size)
        norms = ("final_layer_norm",) if part == "text_model" else ("pre_layrnorm", "post_layernorm")
        layers = {f"encoder.layers.{i}" for i in range(depth)}
        norms += tuple(f"{layer}.layer_norm{n}" for layer in layers for n in (1, 2))
        for name in norms:
            state[f"{part}.{name}.weight"], state[f"{part}.{name}.bias"] = t(width), t(width)
        for layer in layers:
            shapes = {f"self_attn.{n}_proj": (width, width) for n in ("q", "k", "v", "out")}
            shapes |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
            for name, shape in shapes.items():
                state[f"{part}.{layer}.{name}.weight"] = t(*shape)
                state[f"{part}.{layer}.{name}.bias"] = t(shape[0])
    state["visual_projection.weight"], state["text_projection.weight"] = t(embed, vision[0]), t(embed, text[0])
    return state


def tiny_names() -> dict[str, Tensor]:
    return transformers_names((16, 2, 10, 4), (12, 2, 7, 30), 5)


def test_every_name_of_a_clip() -> None:
    state = tiny_names()
    out = convert.to_open_clip(state)
    assert out.source == "transformers"
    assert {key: t.shape for key, t in out.items()} == {key: t.shape for key, t in clip_state().items()}
    assert torch.equal(out["visual.proj"], state["visual_projection.weight"].t())
    assert torch.equal(out["text_projection"], state["text_projection.weight"].t())
    layer = "text_model.encoder.layers.1.self_attn"
    packed = torch.cat([state[f"{layer}.{name}_proj.weight"] for name in "qkv"])
    assert torch.equal(out["transformer.resblocks.1.attn.in_proj_weight"], packed)
    pre = state["vision_model.pre_layrnorm.bias"]
    assert torch.equal(out["visual.ln_pre.bias"], pre)
    assert out["visual.ln_pre.bias"].data_ptr() == pre.data_ptr()  # nothing is copied that need not be
    assert set(out.aside) == {"text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"}
    assert all("position" in why for why in out.reasons.values())
    back = convert.from_open_clip(out, "transformers")
    assert set(back) == set(state)
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_wrappers_are_taken_off() -> None:
    state = clip_state()
    wrapped = {f"module._orig_mod.{key}": tensor for key, tensor in state.items()}
    assert set(convert.to_open_clip(wrapped)) == set(state)


def test_openai_files() -> None:
    """Three sizes and half precision; QuickGELU and heads of 64 are what its own loader takes."""
    sizes = {"input_resolution": 12, "context_length": 7, "vocab_size": 49408}
    changes = {
        "vision_cfg": CONFIG["vision_cfg"] | {"width": 64, "head_width": 64},
        "text_cfg": CONFIG["text_cfg"] | {"width": 64, "heads": 1, "vocab_size": 49408},
    }
    state = clip_state(**changes, dtype=torch.float16) | {key: torch.tensor(value) for key, value in sizes.items()}
    out = convert.to_open_clip(state)
    assert set(out.aside) == set(sizes)
    clip = convert.clip_from(state)
    assert (clip.quick_gelu, clip.text_cfg.heads, clip.vision_cfg.head_width) == (True, 1, 64)
    assert clip.logit_scale.dtype == torch.float16
    back = convert.from_open_clip(out, "openai")
    assert set(back) == set(state)


def test_text_prefix_both_ways() -> None:
    state = clip_state()
    custom = convert.from_open_clip(state, "open_clip", text_prefix="text.")
    expected = clip_state(custom_text=True)
    assert set(custom) == set(expected)
    CLIP(**CONFIG, custom_text=True).load_state_dict(custom, strict=True)
    plain = convert.from_open_clip(custom, "open_clip", text_prefix="")
    assert set(plain) == set(state)
    assert all(torch.equal(plain[key], state[key]) for key in state)
    with pytest.raises(ValueError, match=r"text_prefix must be '' or 'text\.', got 'txt\.'"):
        convert.from_open_clip(state, "open_clip", text_prefix="txt.")


def test_missing_bias_of_keys_is_zero() -> None:
    """Checkpoints whose key projection has no bias: a zero one is filled in, and left out on the way back."""
    state = tiny_names()
    gone = [key for key in state if key.endswith("k_proj.bias")]
    for key in gone:
        del state[key]
    out = convert.to_open_clip(state)
    assert sorted(out.added) == sorted(gone)
    assert not out["transformer.resblocks.0.attn.in_proj_bias"][12:24].any()
    assert set(convert.from_open_clip(out, "transformers")) == set(state)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("text_model.encoder.layers.0.lora_A", r"to_open_clip\(transformers\): 1 unknown key\(s\): text_model.*lora_A"),
        ("vision_model.encoder.layers.0.lora_A", r"to_open_clip\(transformers\): 1 unknown key\(s\): .*lora_A"),
        ("classifier.weight", r"not representable in the CLIP layout: classifier.weight \(a classifier over the mean"),
    ],
)
def test_unknown_names_are_refused_or_kept_aside(extra: str, message: str) -> None:
    state = tiny_names() | {extra: torch.zeros(1)}
    with pytest.raises(ValueError, match=message):
        convert.to_open_clip(state)
    out = convert.to_open_clip(state, strict=False)
    assert extra in out.aside
    assert extra in convert.from_open_clip(out, "transformers")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("text_decoder.ln_final.weight", "CoCa's"),
        ("cls_emb", "CoCa's"),
        ("text.transformer.embeddings.word_embeddings.weight", "a Hugging Face text encoder"),
        ("transformer.resblocks.0.ln_attn.weight", "a custom text block"),
        ("visual.attn_pool.query", "CoCa's attentional pool"),
        ("visual.transformer.resblocks.0.attn.head_scale", "scaled cosine attention or scaled heads"),
        ("visual.lora_A", r"1 unknown key\(s\): visual.lora_A"),
        ("lora_A", r"1 unknown key\(s\): lora_A"),
    ],
)
def test_open_clip_names_that_are_refused(extra: str, message: str) -> None:
    state = clip_state() | {extra: torch.zeros(1)}
    with pytest.raises(ValueError, match=f"^to_open_clip.*{message}"):
        convert.to_open_clip(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ln_final.bias": torch.zeros(11)}, r"ln_final.bias must have shape \(12\), got \(11,\)"),
        (
            {"transformer.resblocks.1.mlp.c_proj.weight": torch.zeros(12, 12)},
            r"must have shape \(12, 48\), got \(12, 12\)",
        ),
        ({"logit_scale": torch.zeros(2)}, r"logit_scale must have one element, got shape \(2,\)"),
        ({"transformer.resblocks.3.ln_1.weight": torch.zeros(12)}, r"numbered from 0 without a gap, got \[0, 1, 3\]"),
        ({"transformer.resblocks.1.ls_1.gamma": torch.zeros(12)}, r"resblocks 0 and 1 differ in ls_1.gamma"),
        ({"visual.ln_post.weight": torch.zeros(3)}, r"norm.weight must have shape \(16\), got \(3,\)"),
    ],
)
def test_shapes_that_contradict_each_other(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert.to_open_clip(clip_state() | change)


def test_what_is_not_a_clip() -> None:
    with pytest.raises(TypeError, match="state_dict must be a mapping of names to tensors, got int"):
        convert.to_open_clip(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="state_dict is empty"):
        convert.to_open_clip({})
    with pytest.raises(ValueError, match=r"no CLIP layout .* has these keys: fc.weight"):
        convert.to_open_clip({"fc.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="an image tower alone is for to_timm"):
        convert.to_open_clip({"class_embedding": torch.zeros(1)})
    with pytest.raises(ValueError, match="layout must be one of open_clip, transformers, got 'lavis'"):
        convert.to_open_clip(clip_state(), "lavis")
    with pytest.raises(TypeError, match=r"torch.nn.modules.linear.Linear is not a CLIP of transformers or open_clip"):
        convert.clip_from(nn.Linear(1, 1))


def test_options_of_the_layouts() -> None:
    state = clip_state()
    with pytest.raises(TypeError, match="open_clip has no option model or flat"):
        convert.from_open_clip(state, "open_clip", flat=True)
    with pytest.raises(TypeError, match="transformers has no option text_prefix"):
        convert.from_open_clip(state, "transformers", text_prefix="")
    with pytest.raises(ValueError, match=r"model must be one of CLIPModel, .* for these weights, got 'SiglipModel'"):
        convert.from_open_clip(state, "transformers", model="SiglipModel")
    with pytest.raises(ValueError, match="flat must be False for CLIPTextModelWithProjection"):
        convert.from_open_clip(state, "transformers", model="CLIPTextModelWithProjection", flat=True)
    text = {key: tensor for key, tensor in state.items() if not key.startswith("visual.")}
    with pytest.raises(ValueError, match="CLIPVisionModel has a vision tower, and the state dict has none"):
        convert.from_open_clip(text, "transformers", model="CLIPVisionModel")
    found = convert.from_open_clip(text, "transformers")  # all that the weights have
    assert "text_projection.weight" in found
    assert "logit_scale" not in found
    flat = convert.from_open_clip(state, "transformers", model="CLIPTextModel", flat=True)
    assert "embeddings.token_embedding.weight" in flat
    assert not any("projection" in key or key.startswith("text_model.") for key in flat)


def test_what_a_state_dict_does_not_tell() -> None:
    state = clip_state()
    words = {"vocab_size": 49408}
    with pytest.raises(ValueError, match=r"which token holds a text's features .* pass text_cfg="):
        convert.clip_config(state)
    state = clip_state(text_cfg=CONFIG["text_cfg"] | words)
    with pytest.raises(ValueError, match=r"heads of the vision tower .* pass vision_cfg=\{'head_width'"):
        convert.clip_config(state)
    with pytest.raises(ValueError, match=r"heads of the text tower .* pass text_cfg=\{'heads'"):
        convert.clip_config(state, vision_cfg={"head_width": 4})
    with pytest.raises(ValueError, match="pass quick_gelu=True"):
        convert.clip_config(state, vision_cfg={"head_width": 4}, text_cfg={"heads": 3})
    with pytest.raises(ValueError, match="head_width of the vision tower must divide its width 16, got 5"):
        convert.clip_config(state, vision_cfg={"head_width": 5})
    found = convert.clip_config(state, vision_cfg={"head_width": 4}, text_cfg={"heads": 3}, quick_gelu=False)
    assert found == {**CONFIG, "text_cfg": CONFIG["text_cfg"] | words}
    no_norm = {key: t for key, t in state.items() if not key.startswith("visual.ln_pre.")}
    with pytest.raises(ValueError, match=r"without visual.ln_pre .* pass config="):
        convert.clip_config(no_norm)
    only_text = {key: t for key, t in state.items() if not key.startswith("visual.")}
    with pytest.raises(ValueError, match=r"visual.\* is missing, so this is not a whole CLIP"):
        convert.clip_config(only_text, quick_gelu=True)


def test_configs_by_name_and_of_another_kind() -> None:
    with torch.device("meta"):
        state = CLIP.from_config("ViT-B-32", nonscalar_logit_scale=True).state_dict()
    found = convert.clip_config(state, config="ViT-B-32-quickgelu")
    assert found["quick_gelu"] is True
    assert found["nonscalar_logit_scale"] is True  # the state's own
    assert convert.clip_config(state, config="ViT-B-32", quick_gelu=True) == found
    with pytest.raises(ValueError, match="config must be a CLIPConfig or SiglipConfig, a name"):
        convert.clip_config(state, config=SimpleNamespace(hidden_act="gelu"))
    tower = {"num_attention_heads": 12, "layer_norm_eps": 1e-5, "hidden_act": "gelu", "image_size": 224}
    text = SimpleNamespace(**tower, eos_token_id=[2, 3])
    odd = SimpleNamespace(text_config=text, vision_config=SimpleNamespace(**tower))
    with pytest.raises(ValueError, match=r"eos_token_id must be an integer, got \[2, 3\]"):
        convert.clip_config(state, config=odd)


def test_canonical_states_remember_where_they_came_from() -> None:
    out = convert.to_open_clip(tiny_names())
    assert isinstance(out, ConvertedState)
    again = convert.to_open_clip(out)
    assert again.source == "transformers"
    assert again.aside == out.aside
