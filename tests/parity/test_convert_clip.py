"""Converters of whole CLIP and SigLIP models against the real ones: random weights in, equal outputs out.

Every parameter is drawn at random, also gains, biases, positions and the logit scalars, so that a name that is missing
or crossed shows in the output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmfast import convert
from mmfast.models import CLIP

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
open_clip = pytest.importorskip("open_clip")

from open_clip.model import CLIP as OpenCLIP  # noqa: E402
from open_clip.model import CustomTextCLIP  # noqa: E402
from timm.models.vision_transformer import _create_vision_transformer  # noqa: E402

EOS = 28  # of the tiny vocabulary of 30, whose last id is a word that was added later
TEXT = {
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "vocab_size": 30,
    "max_position_embeddings": 7,
    "bos_token_id": 1,
    "pad_token_id": 0,
    "eos_token_id": EOS,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 12,
    "patch_size": 4,
}
VISION_CFG = {"image_size": 12, "patch_size": 4, "width": 16, "layers": 3, "head_width": 4, "mlp_ratio": 1.5}
TEXT_CFG = {"context_length": 7, "vocab_size": 30, "width": 12, "heads": 3, "layers": 2}
RESNET_CFG = {"image_size": 64, "layers": [1, 2, 1, 1], "width": 8, "head_width": 32}
TRUNK = {"embed_dim": 16, "depth": 3, "num_heads": 4, "mlp_ratio": 1.5, "img_size": 12, "patch_size": 4}


@timm.models.register_model
def vit_tiny_patch4_siglip_12(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A tiny image tower for open_clip to build by its name."""
    arguments = {**TRUNK, "class_token": False, "global_pool": "map", "act_layer": "gelu_tanh", **kwargs}
    return _create_vision_transformer("test_vit", pretrained=False, **arguments)


def hf_clip(**changes: Any) -> Callable[[], nn.Module]:
    """transformers' CLIPModel; changes of its towers' configs as `text_...`, `vision_...` or of both."""

    def build() -> nn.Module:
        text, vision = (_part(base, part, changes) for base, part in ((TEXT, "text"), (VISION, "vision")))
        return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=5))

    return build


def hf_siglip(**changes: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        text, vision = (_part(base, part, changes) for base, part in ((TEXT, "text"), (VISION, "vision")))
        config = transformers.SiglipConfig(text_config={**text, "projection_size": 16}, vision_config=vision)
        return transformers.SiglipModel(config)

    return build


def _part(base: Mapping[str, Any], part: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    own = {key.removeprefix(f"{part}_"): value for key, value in changes.items() if key.startswith(f"{part}_")}
    both = {key: value for key, value in changes.items() if not key.startswith(("text_", "vision_"))}
    return {**base, **both, **own}


def oc(
    vision: Mapping[str, Any] | None = None, text: Mapping[str, Any] | None = None, cls: Any = OpenCLIP, **top: Any
) -> Callable[[], nn.Module]:
    """open_clip's CLIP."""
    image = (
        vision if vision and ("layers" in vision or "timm_model_name" in vision) else {**VISION_CFG, **(vision or {})}
    )
    arguments = {"embed_dim": 5, "vision_cfg": dict(image), "text_cfg": {**TEXT_CFG, **(text or {})}, **top}
    return lambda: cls(**arguments)


SIGLIP_VISION = {
    "image_size": 12,
    "timm_model_name": "vit_tiny_patch4_siglip_12",
    "timm_pool": "map",
    "timm_proj": "none",
}
SIGLIP_TEXT = {
    "no_causal_mask": True,
    "proj_bias": True,
    "pool_type": "last",
    "norm_kwargs": {"eps": 1e-6},
    "act_kwargs": {"approximate": "tanh"},
}
CLIPA = {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}

PEERS: dict[str, Callable[[], nn.Module]] = {
    "hf-clip": hf_clip(),
    "hf-clip-eos-2": hf_clip(text_eos_token_id=2),
    "hf-clip-gelu": hf_clip(hidden_act="gelu"),
    "hf-clip-tanh-in-text": hf_clip(text_hidden_act="gelu_pytorch_tanh", vision_hidden_act="gelu"),
    "hf-clip-eps": hf_clip(text_layer_norm_eps=1e-2, vision_layer_norm_eps=1e-3),
    "hf-siglip": hf_siglip(),
    "hf-siglip-gelu-eps": hf_siglip(hidden_act="gelu", text_layer_norm_eps=1e-2, vision_layer_norm_eps=1e-3),
    "oc-clip": oc(),
    "oc-quickgelu": oc(quick_gelu=True),
    "oc-custom-text": oc(cls=CustomTextCLIP),
    "oc-scale-of-shape-1": oc(nonscalar_logit_scale=True, init_logit_bias=-10),
    "oc-layer-scale": oc({"ls_init_value": 0.1}, {"ls_init_value": 0.1}),
    "oc-clipa": oc(CLIPA, {"pool_type": "last", "no_causal_mask": True}),
    "oc-avg": oc({"pool_type": "avg"}),
    "oc-oblong": oc({"image_size": (8, 12)}),
    "oc-eps-tanh": oc(
        {"norm_kwargs": {"eps": 1e-3}}, {"norm_kwargs": {"eps": 1e-2}, "act_kwargs": {"approximate": "tanh"}}
    ),
    "oc-eos": oc(text={"pool_type": "eos", "eos_id": EOS}),
    "oc-first": oc(text={"pool_type": "first", "no_causal_mask": True}, cls=CustomTextCLIP),
    "oc-no-text-projection": oc(text={"proj_type": "none"}, embed_dim=12),
    "oc-text-projection-with-bias": oc(text={"proj_bias": True}),
    "oc-odd-mlp": oc({"mlp_ratio": 2.7}, {"mlp_ratio": 3.3}),
    "oc-resnet": oc(RESNET_CFG),
    "oc-resnet-quickgelu": oc(RESNET_CFG, quick_gelu=True),
    "oc-siglip": oc(SIGLIP_VISION, SIGLIP_TEXT, CustomTextCLIP, embed_dim=16, init_logit_bias=-10),
    "oc-timm-linear": oc({**SIGLIP_VISION, "timm_proj": "linear"}, cls=CustomTextCLIP),
    "oc-timm-linear-bias": oc({**SIGLIP_VISION, "timm_proj": "linear", "timm_proj_bias": True}, quick_gelu=True),
    "oc-timm-own-head": oc({**SIGLIP_VISION, "timm_proj": ""}, cls=CustomTextCLIP),
}
every_peer = pytest.mark.parametrize("name", PEERS)
of_transformers = pytest.mark.parametrize("name", [name for name in PEERS if name.startswith("hf-")])


def randomize(model: nn.Module) -> nn.Module:
    """Draw every parameter and statistic at random, in float64; gains around 1, variances positive."""
    generator = torch.Generator().manual_seed(7)
    model = model.double().eval()
    with torch.no_grad():
        for name, p in (*model.named_parameters(), *model.named_buffers()):
            if not p.is_floating_point() or "mask" in name:
                continue
            draw = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            gain = p.dim() == 1 and name.endswith(("weight", "gamma", "running_var"))
            p.copy_(1 + 0.3 * draw.abs() if gain else 0.3 * draw)
    return model


def inputs(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Images, and texts that end early, at the last place, and twice: padding may repeat the end of text."""
    generator = torch.Generator().manual_seed(3)
    config = getattr(model, "config", None)
    size = config.vision_config.image_size if config is not None else model.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.randn(3, 3, height, width, dtype=torch.float64, generator=generator)
    text = torch.randint(3, EOS, (4, 7), generator=generator)
    text[0, 3:] = EOS  # padded with the end of text, as transformers pads CLIP's ids
    text[1, 2], text[1, 3:] = EOS, 0  # padded with 0, as open_clip does
    text[2, 6] = EOS
    text[3, 1], text[3, 4], text[3, 5:] = 29, EOS, 0  # a word with a larger id than the end of text
    return images, text


def logits(model: nn.Module, images: Tensor, text: Tensor) -> Tensor:
    if hasattr(model, "get_logits"):
        return model.get_logits(images, text)[0]
    return model(input_ids=text, pixel_values=images).logits_per_image


def features(model: nn.Module, images: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    if hasattr(model, "encode_image"):
        return model.encode_image(images), model.encode_text(text)
    found = model.get_image_features(pixel_values=images), model.get_text_features(input_ids=text)
    return tuple(x if isinstance(x, Tensor) else x.pooler_output for x in found)  # type: ignore[return-value]


def equal(state: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Assert equal keys, shapes and bits."""
    assert set(state) == set(other)
    for key in state:
        assert state[key].shape == other[key].shape, key
        assert torch.equal(state[key], other[key]), key


@every_peer
@torch.no_grad()
def test_clip_from_computes_what_the_peer_does(name: str) -> None:
    model = randomize(PEERS[name]())
    clip = convert.clip_from(model)
    images, text = inputs(model)
    assert isinstance(clip, CLIP)
    assert not clip.training
    for got, expected in zip(features(clip, images, text), features(model, images, text), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(clip.get_logits(images, text)[0], logits(model, images, text), rtol=1e-9, atol=1e-11)


@every_peer
def test_round_trips_are_exact(name: str) -> None:
    model = randomize(PEERS[name]())
    state = model.state_dict()
    canonical = convert.to_open_clip(state)
    equal(convert.from_open_clip(canonical, "transformers" if name.startswith("hf") else "open_clip"), state)
    again = convert.to_open_clip(canonical)
    equal(again, canonical)
    assert again.source == canonical.source


def to_peer(model: nn.Module) -> nn.Module:
    """open_clip's model for a transformers model: its own class, its own configuration."""
    config = convert.clip_config(model)
    if config.pop("custom_text", False):
        config["vision_cfg"] = SIGLIP_VISION
        peer = CustomTextCLIP(**config)
        trunk = model.config.vision_config
        norms = [m for m in peer.visual.modules() if isinstance(m, nn.LayerNorm)]
        for norm in norms:
            norm.eps = trunk.layer_norm_eps
        if trunk.hidden_act == "gelu":
            for module in peer.visual.modules():
                if hasattr(module, "act"):
                    module.act = nn.GELU()
        return peer.double().eval()
    return OpenCLIP(**config).double().eval()


@of_transformers
@torch.no_grad()
def test_transformers_weights_in_open_clip(name: str) -> None:
    """open_clip's own model, built from `clip_config`, loads them with strict=True and gives transformers' logits."""
    model = randomize(PEERS[name]())
    peer = to_peer(model)
    peer.load_state_dict(convert.to_open_clip(model.state_dict()), strict=True)
    images, text = inputs(model)
    torch.testing.assert_close(logits(peer, images, text), logits(model, images, text), rtol=1e-9, atol=1e-11)


OPEN_CLIP_IN_TRANSFORMERS = {
    "oc-clip": hf_clip(hidden_act="gelu", text_intermediate_size=48, text_eos_token_id=2),
    "oc-quickgelu": hf_clip(text_intermediate_size=48, text_eos_token_id=2),
    "oc-custom-text": hf_clip(hidden_act="gelu", text_intermediate_size=48, text_eos_token_id=2),
    "oc-eos": hf_clip(hidden_act="gelu", text_intermediate_size=48),
    "oc-siglip": hf_siglip(text_intermediate_size=48),
}


@pytest.mark.parametrize("name", OPEN_CLIP_IN_TRANSFORMERS)
@torch.no_grad()
def test_open_clip_weights_in_transformers(name: str) -> None:
    model = randomize(PEERS[name]())
    peer = OPEN_CLIP_IN_TRANSFORMERS[name]().double().eval()
    foreign = convert.from_open_clip(model.state_dict(), "transformers")
    peer.load_state_dict(foreign, strict=True)
    images, text = inputs(model)
    torch.testing.assert_close(logits(peer, images, text), logits(model, images, text), rtol=1e-9, atol=1e-11)
    prefix = "text." if isinstance(model, CustomTextCLIP) else ""
    back = convert.from_open_clip(convert.to_open_clip(foreign), "open_clip", text_prefix=prefix)
    equal(back, model.state_dict())


TOWERS = {
    "CLIPTextModel": transformers.CLIPTextConfig(**TEXT),
    "CLIPTextModelWithProjection": transformers.CLIPTextConfig(**TEXT, projection_dim=5),
    "CLIPVisionModel": transformers.CLIPVisionConfig(**VISION),
    "CLIPVisionModelWithProjection": transformers.CLIPVisionConfig(**VISION, projection_dim=5),
    "SiglipTextModel": transformers.SiglipTextConfig(**TEXT, projection_size=16),
    "SiglipVisionModel": transformers.SiglipVisionConfig(**VISION),
}


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_towers_alone(name: str) -> None:
    """Each tower's names, with and without a prefix, and its part of the whole model."""
    tower = randomize(getattr(transformers, name)(TOWERS[name]))
    state = tower.state_dict()
    canonical = convert.to_open_clip(state)
    equal(convert.from_open_clip(canonical, "transformers"), state)

    prefix = "text_model." if "Text" in name else "vision_model."
    own = ("text_projection.", "visual_projection.", prefix)
    long = {key if key.startswith(own) else prefix + key: tensor for key, tensor in state.items()}
    old = convert.to_open_clip(long)
    equal(old, canonical)
    equal(convert.from_open_clip(old, "transformers"), long)
    equal(convert.from_open_clip(old, "transformers", model=name, flat=False), long)
    if not name.endswith("WithProjection"):
        short = {key.removeprefix(prefix): tensor for key, tensor in long.items()}
        equal(convert.from_open_clip(old, "transformers", flat=True), short)

    # The whole model's names are those of its parts.
    whole = randomize((hf_siglip if name.startswith("Siglip") else hf_clip)()())
    part = convert.from_open_clip(convert.to_open_clip(whole.state_dict()), "transformers", model=name, flat=False)
    flat = name.endswith("Model") and not any(key.startswith(prefix) for key in state)
    tower.load_state_dict({key.removeprefix(prefix) if flat else key: t for key, t in part.items()}, strict=True)
    images, text = inputs(whole)
    image_features, text_features = features(whole, images, text)
    if name == "CLIPTextModelWithProjection":
        torch.testing.assert_close(tower(text).text_embeds, text_features)
    elif name == "CLIPVisionModelWithProjection":
        torch.testing.assert_close(tower(images).image_embeds, image_features)
    elif name == "SiglipVisionModel":
        torch.testing.assert_close(tower(images).pooler_output, image_features)
    elif name == "SiglipTextModel":
        torch.testing.assert_close(tower(text).pooler_output, text_features)


@torch.no_grad()
def test_first_end_of_text_counts() -> None:
    """transformers pads with the end of text, and pools at the first one: so do its converted models."""
    model = randomize(hf_clip(text_eos_token_id=EOS)())
    clip = convert.clip_from(model)
    assert (clip.text_cfg.pool_type, clip.text_cfg.eos_id) == ("eos", EOS)
    short = torch.tensor([[1, 5, EOS]])
    padded = torch.tensor([[1, 5, EOS, EOS, EOS, EOS, EOS]])
    torch.testing.assert_close(clip.encode_text(padded), clip.encode_text(short))
    torch.testing.assert_close(clip.encode_text(padded), features(model, torch.zeros(1, 3, 12, 12).double(), short)[1])
    # A larger id than the end of text: only the old rule, the largest id, takes it for the end.
    odd = torch.tensor([[1, 29, 5, EOS, 0, 0, 0]])
    other = odd.clone()
    other[0, 2] = 9  # after the largest id, before the end of text
    assert not torch.allclose(clip.encode_text(odd), clip.encode_text(other))
    old = convert.clip_from(randomize(hf_clip(text_eos_token_id=2)()))
    assert old.text_cfg.pool_type == "argmax"
    torch.testing.assert_close(old.encode_text(odd), old.encode_text(other))


def meta(build: Callable[[], nn.Module]) -> dict[str, Tensor]:
    with torch.device("meta"):
        return build().state_dict()


def test_vit_b_32_has_the_published_names() -> None:
    """OpenAI's ViT-B/32: 302 tensors of 151,277,313 parameters; 398 with transformers' names."""
    hf = meta(lambda: transformers.CLIPModel(transformers.CLIPConfig()))
    config = open_clip.get_model_config("ViT-B-32")
    ours = meta(lambda: OpenCLIP(**config))
    assert (len(ours), len(hf)) == (302, 398)
    assert sum(t.numel() for t in ours.values()) == 151_277_313
    shapes = {key: t.shape for key, t in ours.items()}
    assert {key: t.shape for key, t in convert.to_open_clip(hf).items()} == shapes
    assert {key: t.shape for key, t in convert.from_open_clip(ours, "transformers").items()} == {
        key: t.shape for key, t in hf.items()
    }
    found = convert.clip_config(hf, quick_gelu=True, vision_cfg={"head_width": 64}, text_cfg={"heads": 8})
    assert found["quick_gelu"] is True
    assert meta(lambda: CLIP(**found)).keys() == ours.keys()


def test_siglip_b_16_has_the_published_names() -> None:
    hf = meta(lambda: transformers.SiglipModel(transformers.SiglipConfig()))
    config = open_clip.get_model_config("ViT-B-16-SigLIP")
    config.pop("custom_text")
    ours = meta(lambda: CustomTextCLIP(**config))
    assert {key: t.shape for key, t in convert.to_open_clip(hf).items()} == {key: t.shape for key, t in ours.items()}
    back = convert.from_open_clip(ours, "transformers")
    assert {key: t.shape for key, t in back.items()} == {key: t.shape for key, t in hf.items()}
    found = convert.clip_config(hf, vision_cfg={"head_width": 64}, text_cfg={"heads": 12})
    same = convert.clip_config(hf, config=transformers.SiglipConfig())
    assert found["text_cfg"] == same["text_cfg"]
    assert found["vision_cfg"]["trunk"]["num_heads"] == same["vision_cfg"]["trunk"]["num_heads"] == 12
    assert meta(lambda: CLIP(**found)).keys() == ours.keys()


@pytest.mark.parametrize("name", ["hf-clip", "hf-siglip"])
@torch.no_grad()
def test_state_dict_with_a_config(name: str) -> None:
    """A checkpoint and its config make the same model as the model itself; saved position_ids are kept aside."""
    model = randomize(PEERS[name]())
    state = dict(model.state_dict())
    state["text_model.embeddings.position_ids"] = torch.arange(7)[None]
    state["vision_model.embeddings.position_ids"] = torch.arange(10)[None]
    clip = convert.clip_from(state, config=model.config)
    images, text = inputs(model)
    torch.testing.assert_close(clip.get_logits(images, text)[0], logits(model, images, text), rtol=1e-9, atol=1e-11)
    canonical = convert.to_open_clip(state)
    assert set(canonical.aside) == {key for key in state if key.endswith("position_ids")}
    equal(convert.from_open_clip(canonical, "transformers"), state)


@torch.no_grad()
def test_open_clip_state_dict_with_fields() -> None:
    model = randomize(PEERS["oc-clipa"]())
    fields = convert.clip_config(model)
    clip = convert.clip_from(model.state_dict(), config=fields)
    images, text = inputs(model)
    torch.testing.assert_close(clip.get_logits(images, text)[0], logits(model, images, text), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "name", [name for name in PEERS if name.startswith("oc-") and "timm" not in name and name != "oc-siglip"]
)
def test_config_rebuilds_open_clips_model(name: str) -> None:
    """The fields are open_clip's own: its class takes them and has the same parameters, in the same order."""
    model = PEERS[name]()
    fields = convert.clip_config(model)
    fields.pop("custom_text", None)
    again = type(model)(**fields)
    assert [(k, t.shape) for k, t in again.state_dict().items()] == [
        (k, t.shape) for k, t in model.state_dict().items()
    ]


def test_two_activations_are_refused() -> None:
    with pytest.raises(ValueError, match="quick_gelu is one field for both towers"):
        convert.clip_config(hf_clip(text_hidden_act="gelu")())
    with pytest.raises(ValueError, match="hidden_act must be one of"):
        convert.clip_config(hf_clip(vision_hidden_act="mish")())
    with pytest.raises(ValueError, match="activation of the text tower must be one of gelu, gelu_tanh, quick_gelu"):
        convert.clip_config(hf_clip(text_hidden_act="relu", vision_hidden_act="gelu")())


def test_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match=r"global_pool='map' and attn_pool\.latent need each other"):
        convert.clip_config(hf_siglip(vision_vision_use_head=False)())
    config = open_clip.get_model_config("coca_ViT-B-32")
    config.pop("custom_text", None)
    for part, fields in config.items():
        if part.endswith("_cfg"):
            fields |= {"layers": 1, "width": 64} | ({} if part == "vision_cfg" else {"heads": 2})
    with torch.device("meta"):
        coca = open_clip.CoCa(**config)
    with pytest.raises(TypeError, match=r"open_clip.coca_model.CoCa is not a CLIP"):
        convert.clip_config(coca)
    with pytest.raises(ValueError, match="CoCa's"):
        convert.to_open_clip(coca.state_dict())
    classifier = transformers.CLIPForImageClassification(
        transformers.CLIPConfig(text_config=TEXT, vision_config=VISION)
    )
    with pytest.raises(
        ValueError, match=r"to_open_clip\(transformers\): .*classifier.weight \(a classifier over the mean"
    ):
        convert.to_open_clip(classifier.state_dict())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("oc-resnet", r"visual.layer1.\* is a ResNet"),
        ("oc-layer-scale", r"no name for 4 key\(s\): transformer.resblocks.0.ls_1.gamma"),
        ("oc-clipa", r"CLIPModel needs norm_pre.weight \(image tower\)"),
        ("oc-no-text-projection", "CLIPModel needs text_projection"),
        ("oc-scale-of-shape-1", "CLIPModel has no logit_bias"),
        ("oc-timm-linear", "CLIPModel cannot have attn_pool.latent"),
    ],
)
def test_what_transformers_cannot_compute(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert.from_open_clip(PEERS[name]().state_dict(), "transformers")


def test_text_tower_of_a_resnet_clip() -> None:
    """The image tower does not matter where only the text tower is wanted."""
    tower = transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(**{**TEXT, "intermediate_size": 48}, projection_dim=5)
    )
    state = PEERS["oc-resnet"]().state_dict()
    tower.load_state_dict(convert.from_open_clip(state, "transformers", model="CLIPTextModelWithProjection"))
    torch.testing.assert_close(tower.text_projection.weight.double(), state["text_projection"].T.double())


def test_dtype_device_and_mode_are_kept() -> None:
    model = PEERS["hf-clip"]().to(torch.bfloat16).train()
    clip = convert.clip_from(model)
    assert {p.dtype for p in clip.parameters()} == {torch.bfloat16}
    assert clip.training
    first = next(iter(clip.parameters()))
    assert first.data_ptr() not in {p.data_ptr() for p in model.parameters()}  # a copy
