"""Checkpoints of CLIP: which architecture they are of, their layouts, and what is warned about."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmfast.models import CLIP, clip_names
from mmfast.models._clip_config import clip_config, vision_config
from mmfast.models._clip_load import _signature, clean, config_of

TEXT: dict[str, Any] = {"context_length": 9, "vocab_size": 30, "width": 64, "heads": 1, "layers": 1}
VIT: dict[str, Any] = {"layers": 1, "width": 64, "head_width": 64, "patch_size": 8, "image_size": 16}
CONFIG: dict[str, Any] = {"embed_dim": 8, "vision_cfg": VIT, "text_cfg": TEXT}


@pytest.fixture
def model() -> CLIP:
    torch.manual_seed(2)
    return CLIP(**CONFIG).eval()


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(4)
    return torch.randn(2, 3, 16, 16), torch.randint(0, 30, (2, 9))


def assert_same(ours: Any, theirs: Any, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


# One of each family, and those that others could be taken for.
DETECTED = (
    *("RN50", "RN50x64", "ViT-M-16-alt", "ViT-B-32-256", "ViT-L-14-336", "ViT-g-14", "ViT-L-14-CLIPA-336"),
    *("ViT-H-14-worldwide-378", "ViT-B-16-SigLIP-i18n-256", "ViT-B-16-SigLIP2-512", "ViT-SO400M-14-SigLIP2"),
    *("ViT-SO400M-16-SigLIP-i18n-256", "ViT-gopt-16-SigLIP2-384"),
)


@pytest.mark.parametrize("name", DETECTED)
def test_the_architecture_is_told_from_the_shapes(name: str) -> None:
    theirs = CLIP.from_config(name, device="meta")
    found = config_of(theirs.state_dict())
    ours = CLIP(**found, device="meta")
    wanted = clip_config(name)
    assert ours.vision_cfg == theirs.vision_cfg
    assert ours.text_cfg == theirs.text_cfg
    assert (ours.embed_dim, ours.custom_text) == (wanted["embed_dim"], wanted.get("custom_text", False))
    assert (ours.logit_bias is None) == (theirs.logit_bias is None)


def test_no_two_architectures_are_mistaken() -> None:
    """Architectures with the same shapes compute the same, but for QuickGELU."""
    seen: dict[str, list[str]] = {}
    for name in clip_names():
        seen.setdefault(repr(_signature(clip_config(name))), []).append(name)
    for names in seen.values():
        configs = [vision_config(clip_config(name)["vision_cfg"]) for name in names if "SigLIP" not in name]
        assert len({(c.head_width, c.pool_type, c.no_ln_pre, c.final_ln_after_pool) for c in configs}) <= 1, names


def test_a_known_architecture_at_other_sizes() -> None:
    text = {**clip_config("ViT-S-32")["text_cfg"], "context_length": 32, "vocab_size": 100}
    model = CLIP.from_config({**clip_config("ViT-S-32"), "text_cfg": text}, image_size=96, device="meta")
    found = config_of(model.state_dict())
    assert found["vision_cfg"] == {**clip_config("ViT-S-32")["vision_cfg"], "image_size": 96}
    assert found["text_cfg"] == text


def test_a_siglip_trunk_at_a_size_that_timm_has_no_name_for() -> None:
    model = CLIP.from_config("ViT-B-16-SigLIP", image_size=64, device="meta")
    other = CLIP(**config_of(model.state_dict()), device="meta")
    assert other.visual.image_size == (64, 64)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in other.state_dict().items()} == shapes


def test_an_unknown_architecture_by_openais_rules(model: CLIP, inputs: tuple[Tensor, Tensor]) -> None:
    other = CLIP.from_state_dict(model.state_dict())
    assert not other.training
    assert_same(other(*inputs), model(*inputs))


def test_what_the_shapes_leave_open_is_asked_for() -> None:
    narrow = CLIP(8, {**VIT, "width": 16, "head_width": 8}, TEXT)
    with pytest.raises(ValueError, match="a width is no multiple of 64, so the heads cannot be told; give config"):
        CLIP.from_state_dict(narrow.state_dict())
    wide = CLIP(8, {**VIT, "image_size": (16, 24)}, TEXT)
    with pytest.raises(ValueError, match="6 image positions are not a square; give config"):
        CLIP.from_state_dict(wide.state_dict())
    trunk = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 1, "class_token": False}
    siglip = CLIP(8, {"trunk": trunk, "timm_pool": "map", "timm_proj": "none"}, TEXT)
    with pytest.raises(ValueError, match="its heads cannot be told; give config"):
        CLIP.from_state_dict(siglip.state_dict())
    with pytest.raises(ValueError, match="must have tensors 'visual\\.\\*', got"):
        CLIP.from_state_dict({"weight": torch.zeros(3)})
    with pytest.raises(TypeError, match="must be a mapping of names to tensors, got list"):
        CLIP.from_state_dict([])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the checkpoint has no 'transformer"):
        CLIP.from_state_dict({"visual.conv1.weight": torch.zeros(8, 3, 8, 8)})


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
        lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
        lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}, "epoch": 3},
        lambda s: {f"text.{k}" if not k.startswith(("visual.", "logit")) else k: v for k, v in s.items()},
        lambda s: {**s, "attn_mask": torch.zeros(9, 9)},
        lambda s: {**s, "logit_scale": s["logit_scale"].reshape(1)},
        lambda s: {k: v.half() for k, v in s.items()},
    ],
    ids=["ddp", "compiled", "ddp_compiled", "training", "custom_text", "attn_mask", "scale_of_one", "half"],
)
def test_layouts(model: CLIP, inputs: tuple[Tensor, Tensor], wrap: Any) -> None:
    state = wrap(model.state_dict())
    keys = set(state)
    for other in (CLIP.from_state_dict(state), CLIP.from_state_dict(state, CONFIG)):
        assert_same(other(*inputs)[:2], model(*inputs)[:2], 2e-3)
        assert other.logit_scale.dtype == torch.float32
    assert set(state) == keys


def test_a_prefixed_text_tower_loads_into_either_layout(model: CLIP, inputs: tuple[Tensor, Tensor]) -> None:
    prefixed = CLIP.from_state_dict(model.state_dict(), CONFIG, custom_text=True)
    assert "text.ln_final.weight" in prefixed.state_dict()
    assert_same(prefixed(*inputs), model(*inputs))
    back = CLIP.from_state_dict(prefixed.state_dict(), CONFIG, custom_text=False)
    assert list(back.state_dict()) == list(model.state_dict())
    assert_same(back.state_dict(), model.state_dict(), 0.0)
    assert CLIP.from_state_dict(prefixed.state_dict()).custom_text


def test_a_bias_that_only_the_model_has_is_zero(model: CLIP) -> None:
    other = CLIP.from_state_dict(model.state_dict(), CONFIG, init_logit_bias=-10.0)
    assert other.logit_bias is not None
    assert other.logit_bias.item() == 0.0


def test_strict_names(model: CLIP) -> None:
    state = model.state_dict()
    del state["ln_final.bias"]
    with pytest.raises(RuntimeError, match=r"ln_final\.bias"):
        CLIP.from_state_dict(state)
    CLIP.from_state_dict(state, strict=False)


def test_text_positions_are_resampled(model: CLIP) -> None:
    longer = CLIP.from_state_dict(model.state_dict(), CONFIG, context_length=17)
    expected = torch.nn.functional.interpolate(model.positional_embedding.T[None], size=17, mode="linear")[0].T
    assert_same(longer.positional_embedding, expected)
    assert longer.context_length == 17


OPENAI = {
    "input_resolution": torch.tensor(16),
    "context_length": torch.tensor(9),
    "vocab_size": torch.tensor(30),
}


def test_openais_layout_means_quick_gelu(model: CLIP, inputs: tuple[Tensor, Tensor]) -> None:
    state = {**model.state_dict(), **OPENAI}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = CLIP.from_state_dict(state)
    assert other.quick_gelu
    assert_same(other(*inputs), CLIP.from_state_dict(model.state_dict(), quick_gelu=True)(*inputs))
    assert not torch.allclose(other(*inputs)[0], model(*inputs)[0], atol=1e-4)


@pytest.mark.parametrize(
    ("openai", "options", "message"),
    [
        (True, {"config": CONFIG}, "OpenAI's weights were trained with QuickGELU, but the model computes GELU"),
        (True, {"quick_gelu": False}, "pass quick_gelu=True"),
        (False, {"config": CONFIG, "tag": "openai"}, "weights tagged 'openai' were trained with QuickGELU"),
        (False, {"config": CONFIG, "tag": "dfn2b"}, "weights tagged 'dfn2b'"),
        (
            False,
            {"tag": "laion2b_s34b_b79k", "quick_gelu": True},
            "trained with GELU, but .* computes QuickGELU",
        ),
    ],
    ids=["openai_config", "openai_said_gelu", "tag_openai", "tag_dfn", "tag_laion"],
)
def test_another_gelu_is_warned_about(model: CLIP, openai: bool, options: dict[str, Any], message: str) -> None:
    state = {**model.state_dict(), **(OPENAI if openai else {})}
    with pytest.warns(UserWarning, match=message):
        CLIP.from_state_dict(state, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"tag": "openai"},
        {"config": {**CONFIG, "quick_gelu": True}, "tag": "metaclip-fullcc"},
        {"config": CONFIG, "tag": "openai", "quick_gelu": True},
        {"tag": "laion2b_s34b_b79k"},
        {"config": CONFIG},
    ],
    ids=["told_by_tag", "config", "said", "gelu", "unknown"],
)
def test_the_right_gelu_is_not(model: CLIP, options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = CLIP.from_state_dict(model.state_dict(), **options)
    assert found.quick_gelu == (options.get("tag") in ("openai", "metaclip-fullcc"))


# Files.


def test_files_of_torch(model: CLIP, inputs: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    plain, training = tmp_path / "plain.pt", tmp_path / "epoch_3.pt"
    torch.save(model.state_dict(), plain)
    wrapped = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": wrapped, "optimizer": {"lr": 1e-3}}, training)
    for path in (plain, str(training)):
        assert_same(CLIP.from_pretrained(path)(*inputs), model(*inputs))
    assert_same(CLIP.from_pretrained(model.state_dict(), CONFIG)(*inputs), model(*inputs))


def test_files_of_safetensors(model: CLIP, inputs: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "model.safetensors"
    safetensors.save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    assert_same(CLIP.from_pretrained(path)(*inputs), model(*inputs))


def test_torchscript_archives_as_openais(model: CLIP, inputs: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    class Holder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for key, value in OPENAI.items():
                self.register_buffer(key, value)

        def forward(self, x: Tensor) -> Tensor:
            return x

    holder = Holder()
    for name in ("visual", "transformer", "token_embedding", "ln_final"):
        part = torch.nn.Module()
        holder.add_module(name, part)
    for key, value in model.state_dict().items():
        owner: Any = holder
        *path, leaf = key.split(".")
        for step in path:
            if not hasattr(owner, step):
                owner.add_module(step, torch.nn.Module())
            owner = getattr(owner, step)
        owner.register_parameter(leaf, torch.nn.Parameter(value.clone()))
    file = tmp_path / "ViT.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(holder, torch.zeros(1)), str(file))
        found = CLIP.from_pretrained(file)
    assert found.quick_gelu
    assert_same(found(*inputs), CLIP.from_state_dict(model.state_dict(), quick_gelu=True)(*inputs))


def test_a_folder_of_open_clips(model: CLIP, inputs: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    narrow: dict[str, Any] = {
        "embed_dim": 8,
        "vision_cfg": {**VIT, "width": 16, "head_width": 8},
        "text_cfg": TEXT,
        "quick_gelu": True,
    }
    theirs = CLIP(**narrow).eval()
    processing = {"mean": [0.1, 0.2, 0.3], "size": 99}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": narrow, "preprocess_cfg": processing}))
    with pytest.raises(FileNotFoundError, match="no weights in"):
        CLIP.from_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    found = CLIP.from_pretrained(tmp_path)  # the shapes alone do not tell the heads
    assert found.quick_gelu
    assert_same(found(*inputs), theirs(*inputs))
    assert found.preprocess_cfg["mean"] == [0.1, 0.2, 0.3]
    assert found.preprocess_cfg["size"] == (16, 16)
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        CLIP.from_pretrained(tmp_path / "missing.pt")


def test_nothing_is_unpickled_that_is_no_tensor(tmp_path: Path) -> None:
    path = tmp_path / "evil.pt"
    torch.save({"state_dict": Path("x")}, path)
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        CLIP.from_pretrained(path)


def test_clean_leaves_its_argument_alone(model: CLIP) -> None:
    state = {**model.state_dict(), **OPENAI}
    found, layout = clean(state)
    assert layout == "openai"
    assert set(state) - set(found) == set(OPENAI)


def test_transformers_layout_loads_and_asks_for_the_gelu(inputs: tuple[Tensor, Tensor]) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = {**sizes, "vocab_size": 30, "max_position_embeddings": 9, "eos_token_id": 29, "bos_token_id": 28}
    image = {**sizes, "image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config={**text, "pad_token_id": 0}, vision_config=image, projection_dim=8)
    theirs = transformers.CLIPModel(config).eval()
    with pytest.raises(ValueError, match="do not say whether the weights need QuickGELU"):
        CLIP.from_state_dict(theirs.state_dict())
    model = CLIP.from_state_dict(theirs.state_dict(), tag="openai")
    x, ids = inputs
    ids = torch.where(ids == 29, 28, ids)
    ids[:, 6] = 29
    expected = theirs(input_ids=ids, pixel_values=x)
    assert_same(model.get_logits(x, ids)[0], expected.logits_per_image, 1e-4)
    assert_same(model(x, ids)[:2], (expected.image_embeds, expected.text_embeds), 1e-5)
