"""CLIP against open_clip's CLIP and CustomTextCLIP: configurations, names, draws, outputs, gradients, methods."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmfast.models import CLIP, ViT, _clip_block, clip_names
from mmfast.models._clip_config import TRUNKS, clip_config, trunk_arguments
from mmfast.models._clip_load import QUICK_GELU_TAGS, known_quick_gelu

open_clip = pytest.importorskip("open_clip")
timm = pytest.importorskip("timm")
from open_clip.model import CustomTextCLIP, resize_pos_embed, resize_text_pos_embed  # noqa: E402
from open_clip.pretrained import _PRETRAINED  # noqa: E402

LENGTH, VOCABULARY, DIM = 11, 60, 12
TEXT: dict[str, Any] = {"context_length": LENGTH, "vocab_size": VOCABULARY, "width": 32, "heads": 4, "layers": 3}
VIT: dict[str, Any] = {"layers": 3, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 24}
RESNET: dict[str, Any] = {"layers": [1, 2, 1, 1], "width": 16, "head_width": 64, "patch_size": None, "image_size": 64}
TRUNK: dict[str, Any] = {
    "img_size": 24,
    "patch_size": 8,
    "embed_dim": DIM,
    "depth": 2,
    "num_heads": 2,
    "class_token": False,
    "global_pool": "map",
    "act_layer": "gelu_tanh",
}
SIGLIP_TEXT = {
    **TEXT,
    "no_causal_mask": True,
    "proj_bias": True,
    "pool_type": "last",
    "norm_kwargs": {"eps": 1e-6},
    "act_kwargs": {"approximate": "tanh"},
}
CLIPA = {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}

# Name -> (vision_cfg, text_cfg, more arguments).
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "vit": (VIT, TEXT, {}),
    "vit_quick_gelu": (VIT, TEXT, {"quick_gelu": True}),
    "vit_layer_scale": ({**VIT, "ls_init_value": 0.3}, {**TEXT, "ls_init_value": 0.2}, {}),
    "vit_avg": ({**VIT, "pool_type": "avg"}, TEXT, {}),
    "vit_clipa": ({**VIT, **CLIPA}, {**TEXT, "pool_type": "last", "no_causal_mask": True}, {}),
    "vit_tok_final_ln": ({**VIT, "final_ln_after_pool": True}, {**TEXT, "pool_type": "first"}, {}),
    "vit_eos": (VIT, {**TEXT, "pool_type": "eos", "eos_id": 7}, {}),
    "vit_last_causal": (VIT, {**TEXT, "pool_type": "last"}, {}),
    "vit_one_layer": ({**VIT, "layers": 1}, {**TEXT, "layers": 1}, {}),
    "vit_mlp_ratio": ({**VIT, "mlp_ratio": 2.6}, {**TEXT, "mlp_ratio": 3.3}, {}),
    "vit_rectangle": ({**VIT, "image_size": (16, 32)}, TEXT, {}),
    "vit_norm_eps": ({**VIT, "norm_kwargs": {"eps": 1e-2}}, {**TEXT, "norm_kwargs": {"eps": 1e-2}}, {}),
    "vit_custom_text": (VIT, TEXT, {"custom_text": True}),
    "vit_bias": (VIT, TEXT, {"init_logit_bias": -10.0, "init_logit_scale": 2.3, "nonscalar_logit_scale": True}),
    "vit_output_dict": (VIT, TEXT, {"output_dict": True, "init_logit_bias": -1.0}),
    "vit_no_projection": (VIT, {**TEXT, "width": DIM, "heads": 2, "proj_type": "none"}, {}),
    "vit_linear_projection": (VIT, {**TEXT, "proj_bias": True}, {}),
    "resnet": (RESNET, TEXT, {}),
    "resnet_96": ({**RESNET, "image_size": 96, "head_width": 32}, TEXT, {"quick_gelu": True}),
    "siglip": ({"trunk": TRUNK, "timm_pool": "map", "timm_proj": "none"}, SIGLIP_TEXT, {"custom_text": True}),
    "siglip_linear": (
        {"trunk": {**TRUNK, "embed_dim": 16}, "timm_pool": "map", "timm_proj": "linear", "timm_proj_bias": True},
        SIGLIP_TEXT,
        {"custom_text": True, "init_logit_bias": -10.0},
    ),
    "siglip_head": ({"trunk": TRUNK, "timm_pool": "avg", "timm_proj": ""}, SIGLIP_TEXT, {"custom_text": True}),
}


@pytest.fixture(autouse=True)
def _tiny_trunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm has no small SigLIP: open_clip's tower builds whatever arguments the name holds."""

    def create_model(name: dict[str, Any], pretrained: bool = False, **options: Any) -> nn.Module:
        model = timm.models.vision_transformer.VisionTransformer(**{**name, **options})
        model.default_cfg = {}
        return model

    real = open_clip.timm_model.timm.create_model
    monkeypatch.setattr(
        open_clip.timm_model.timm,
        "create_model",
        lambda name, **options: (create_model if isinstance(name, dict) else real)(name, **options),
    )


def build_theirs(name: str) -> Any:
    vision, text, more = copy.deepcopy(MODELS[name])
    if "trunk" in vision:
        vision["timm_model_name"] = vision.pop("trunk")
        vision["image_size"] = 24
    custom = more.pop("custom_text", False)
    return (CustomTextCLIP if custom else open_clip.CLIP)(DIM, vision, text, **more)


def build_ours(name: str) -> CLIP:
    vision, text, more = MODELS[name]
    return CLIP(DIM, vision, text, **more)


def build(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, CLIP]:
    """Return both models with the same random weights and statistics, all of them away from 0 and 1."""
    peer, model = build_theirs(name).to(dtype), build_ours(name).to(dtype)
    with torch.no_grad():
        for key, value in peer.state_dict().items():
            if value.is_floating_point():
                norm = key.endswith(("ln_pre.weight", "var")) or (("ln_" in key or "bn" in key) and "weight" in key)
                # Of a size that leaves the softmaxes soft, whose gradients are rounding errors otherwise.
                scale = value[0].numel() ** -0.5 if value.dim() > 1 and "embedding" not in key else 0.3
                noise = torch.randn_like(value) * scale
                value.copy_(noise.abs() + 0.5 if norm else noise)
    model.load_state_dict(peer.state_dict(), strict=True)
    return peer.eval(), model.eval()


def images(name: str, batch: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    size = MODELS[name][0].get("image_size", 24)
    height, width = size if isinstance(size, tuple) else (size, size)
    return torch.randn(batch, 3, height, width, dtype=dtype)


def texts(batch: int = 3) -> Tensor:
    """Ids whose largest comes more than once: the first of them is the end. Id 7 is in every text."""
    ids = torch.randint(8, VOCABULARY - 2, (batch, LENGTH))
    ends = torch.tensor([(3 * row + 4) % (LENGTH - 3) for row in range(batch)])
    for row, end in enumerate(ends.tolist()):
        ids[row, end] = ids[row, end + 2] = VOCABULARY - 1
        ids[row, end + 1] = 7
        ids[row, -1] = VOCABULARY - 1 if row % 2 else 0
    return ids


def assert_same(ours: Any, theirs: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def gradients(model: nn.Module, *features: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    torch.manual_seed(5)
    sum((x * torch.randn_like(x)).sum() for x in features).backward()  # type: ignore[union-attr]
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def theirs_on_meta(name: str) -> dict[str, torch.Size]:
    config = open_clip.get_model_config(name)
    kind = CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    with torch.device("meta"):
        return {key: value.shape for key, value in kind(**config).state_dict().items()}


@contextmanager
def no_draws() -> Iterator[None]:
    """Leave out what initialisation draws, which takes most of the time to build a model without data."""
    with pytest.MonkeyPatch.context() as patch:
        for draw in ("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "erfinv_", "clamp_"):
            for owner in (torch.Tensor, nn.init):
                if hasattr(owner, draw):
                    patch.setattr(owner, draw, lambda tensor, *args, **kwargs: tensor)
        yield


EVERY_FAMILY = (
    *("RN50x4", "ViT-M-16-alt", "ViT-B-32", "ViT-B-16-plus-240", "ViT-L-14-336-quickgelu", "ViT-g-14"),
    *("ViT-bigG-14-CLIPA-336", "ViT-B-16-SigLIP-384", "ViT-SO400M-16-SigLIP-i18n-256", "ViT-gopt-16-SigLIP2-256"),
)


def assert_same_tensors(name: str) -> None:
    with no_draws():
        ours, theirs = CLIP.from_config(name, device="meta"), theirs_on_meta(name)
    found = {key: value.shape for key, value in ours.state_dict().items()}
    assert found == theirs
    assert list(found) == list(theirs)  # an optimizer's state goes by the order


def test_configurations_are_open_clips() -> None:
    for name in clip_names():
        assert clip_config(name) == open_clip.get_model_config(name), name
    ours = set(clip_names())
    theirs = {name for name in open_clip.list_models() if name.startswith(("RN", "ViT-"))}
    assert ours == theirs


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_names_and_shapes(name: str) -> None:
    assert_same_tensors(name)


@pytest.mark.slow
def test_names_and_shapes_of_the_others() -> None:
    """Of models that differ in their activation alone one is built: that their configurations are open_clip's is
    tested above."""
    different = {repr({**clip_config(name), "quick_gelu": None}): name for name in reversed(clip_names())}
    for name in sorted(set(different.values()) - set(EVERY_FAMILY)):
        assert_same_tensors(name)


@pytest.mark.parametrize("kind", TRUNKS)
def test_trunks_are_timms(kind: str) -> None:
    names = [name for name in timm.list_models(f"vit_{kind}_*_siglip_*") if "gap" not in name]
    assert names
    for name in names:
        with torch.device("meta"):
            # One block: their number is a matter of names and shapes.
            peer = timm.create_model(name, num_classes=0, depth=1)
            model = ViT(num_classes=0, **{**trunk_arguments(name), "depth": 1})
        assert_same_configuration(model, peer)


def assert_same_configuration(ours: ViT, theirs: Any) -> None:
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    for mine, other in ((ours.blocks[0], theirs.blocks[0]), (ours.attn_pool, theirs.attn_pool)):
        x = torch.linspace(-4, 4, 99, dtype=torch.float64)
        assert_same(mine.mlp.act(x), other.mlp.act(x))  # type: ignore[union-attr,operator]
    assert ours.blocks[0].attn.num_heads == theirs.blocks[0].attn.num_heads
    assert ours.attn_pool.num_heads == theirs.attn_pool.num_heads  # type: ignore[union-attr]
    assert ours.norm.eps == theirs.norm.eps
    assert ours.patch_embed.img_size == theirs.patch_embed.img_size


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients(name: str) -> None:
    peer, model = build(name)
    x, ids = images(name), texts()
    ours, theirs = model(x, ids), peer(x, ids)
    assert_same(ours, theirs)
    features = (model.encode_image(x), model.encode_text(ids))
    others = (peer.encode_image(x), peer.encode_text(ids))
    assert_same(features, others)
    assert_same(model.get_logits(x, ids), peer.get_logits(x, ids))
    ours, theirs = (list(x.values()) if isinstance(x, dict) else list(x) for x in (ours, theirs))
    found, expected = gradients(model, *features, *ours[2:]), gradients(peer, *others, *theirs[2:])
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert gradient is not None, key
        assert_same(found[key], gradient, 1e-9)


@pytest.mark.parametrize("name", ["vit", "resnet", "siglip"])
def test_batch_of_one_and_one_tower(name: str) -> None:
    peer, model = build(name)
    x, ids = images(name, 1), texts(1)
    assert_same(model(x, ids), peer(x, ids))
    image_only, none, scale = model(x)
    assert none is None
    assert_same((image_only, scale), (peer(x)[0], peer(x)[2]))
    assert model(None, ids)[0] is None
    assert_same(model(text=ids)[1], peer(text=ids)[1])


@pytest.mark.parametrize("name", ["vit", "vit_quick_gelu", "resnet", "siglip"])
def test_training_step_in_training_mode(name: str) -> None:
    peer, model = build(name)
    x, ids = images(name, 4), texts(4)
    losses = []
    for net in (model, peer):
        net.train()
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
        for _ in range(3):
            first, second, scale = net(x, ids)
            logits = scale * first @ second.T
            target = torch.arange(4)
            loss = nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    assert_same(torch.stack(losses[:3]), torch.stack(losses[3:]), 1e-7)
    for (key, ours), theirs in zip(model.state_dict().items(), peer.state_dict().values(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6), key


@pytest.mark.parametrize("name", ["vit", "vit_layer_scale", "vit_bias", "vit_custom_text", "resnet", "siglip"])
def test_draws_are_open_clips(name: str) -> None:
    torch.manual_seed(3)
    peer = build_theirs(name)
    torch.manual_seed(3)
    model = build_ours(name)
    for (key, ours), (other, theirs) in zip(model.state_dict().items(), peer.state_dict().items(), strict=True):
        assert key == other
        assert torch.equal(ours, theirs), key


@pytest.mark.parametrize("name", ["vit", "resnet", "siglip"])
def test_strict_load_both_ways(name: str) -> None:
    peer, model = build_theirs(name), build_ours(name)
    peer.load_state_dict(model.state_dict(), strict=True)
    shuffled = dict(reversed(list(peer.state_dict().items())))
    other = build_ours(name)
    other.load_state_dict(shuffled, strict=True)
    x, ids = images(name, 2, torch.float32), texts(2)
    torch.testing.assert_close(other.eval()(x, ids), peer.eval()(x, ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "vit_quick_gelu", "resnet", "siglip"])
def test_autocast_bf16_is_as_near_to_float64(name: str) -> None:
    peer, model = build(name, torch.float32)
    exact = copy.deepcopy(peer).double()
    x, ids = images(name, 8, torch.float32), texts(8)
    truth = exact(x.double(), ids)[:2]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        ours, theirs = model(x, ids)[:2], peer(x, ids)[:2]
    for mine, other, right in zip(ours, theirs, truth, strict=True):
        error, allowed = (mine.double() - right).norm(), (other.double() - right).norm()
        assert error <= 1.5 * allowed + 1e-3, (error, allowed)


@pytest.mark.parametrize("name", ["vit", "resnet", "siglip"])
def test_pure_bfloat16_is_as_near_to_float64(name: str) -> None:
    peer, model = build(name, torch.float32)
    exact = copy.deepcopy(peer).double()
    x, ids = images(name, 8, torch.float32), texts(8)
    truth = exact(x.double(), ids)[:2]
    with torch.no_grad():
        ours, theirs = (net.bfloat16()(x.bfloat16(), ids)[:2] for net in (model, peer))
    for mine, other, right in zip(ours, theirs, truth, strict=True):
        error, allowed = (mine.double() - right).norm(), (other.double() - right).norm()
        assert error <= 1.5 * allowed + 1e-3, (error, allowed)


def test_mixed_weights_as_open_clip_makes_them() -> None:
    """Matrices in bfloat16, norms and embeddings in float32 (open_clip's precision="bf16")."""
    peer, model = build("vit", torch.float32)
    for net in (peer, model):
        for module in net.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.bfloat16()
            for key in ("in_proj_weight", "in_proj_bias", "proj", "text_projection"):
                parameter = getattr(module, key, None)
                if isinstance(parameter, nn.Parameter):
                    parameter.data = parameter.data.bfloat16()
    x, ids = images("vit", 4, torch.bfloat16), texts(4)
    ours, theirs = model(x, ids), peer(x, ids)
    assert ours[0].dtype == theirs[0].dtype
    assert ours[1].dtype == theirs[1].dtype
    torch.testing.assert_close(ours[:2], theirs[:2], rtol=3e-2, atol=3e-2)


@pytest.mark.filterwarnings("ignore:Importing from timm")
@pytest.mark.parametrize("unlocked", [0, 1, 2, 3, 5, 99])
@pytest.mark.parametrize("name", ["vit", "vit_custom_text", "siglip"])
def test_locks(name: str, unlocked: int) -> None:
    peer, model = build(name)
    for net in (peer, model):
        net.lock_text_tower(unlocked)
        net.lock_image_tower(unlocked)
    found = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    assert found == {key: parameter.requires_grad for key, parameter in peer.named_parameters()}


def test_lock_of_a_resnet_with_its_statistics() -> None:
    peer, model = build("resnet")
    for net in (peer, model):
        net.lock_image_tower(freeze_bn_stats=True)
        net.train()
    keys = set(model.state_dict())
    x = images("resnet", 2)
    assert_same(model.encode_image(x), peer.encode_image(x))
    assert set(model.state_dict()) == keys
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad == (not key.startswith("visual."))
    before = model.visual.bn1.running_mean.clone()
    model.encode_image(x + 3)
    assert torch.equal(model.visual.bn1.running_mean, before)


@pytest.mark.parametrize("name", ["vit", "vit_custom_text", "resnet", "siglip"])
def test_no_weight_decay(name: str) -> None:
    peer, model = build(name)
    assert model.no_weight_decay() == peer.no_weight_decay()


@pytest.mark.parametrize("size", [16, 40, (16, 40)])
def test_positions_at_another_size(size: Any) -> None:
    peer, _ = build("vit", torch.float32)
    vision, text = {**VIT, "image_size": size}, {**TEXT, "context_length": 17}
    larger = open_clip.CLIP(DIM, vision, text)
    state = copy.deepcopy(peer.state_dict())
    resize_pos_embed(state, larger)
    resize_text_pos_embed(state, larger)
    model = CLIP.from_state_dict(
        peer.state_dict(),
        {"embed_dim": DIM, "vision_cfg": VIT, "text_cfg": TEXT},
        image_size=size,
        context_length=17,
    )
    assert_same(model.state_dict(), state, 1e-6)
    larger.load_state_dict(state)
    x = torch.randn(2, 3, *(size if isinstance(size, tuple) else (size, size)))
    ids = torch.randint(0, VOCABULARY, (2, 17))
    assert_same(model(x, ids), larger.eval()(x, ids), 1e-4)


def test_trunk_at_another_size() -> None:
    peer, model = build("siglip", torch.float32)
    peer.visual.set_input_size(40)
    config = {"embed_dim": DIM, "vision_cfg": MODELS["siglip"][0], "text_cfg": SIGLIP_TEXT, "custom_text": True}
    larger = CLIP.from_state_dict(model.state_dict(), config, image_size=40)
    x = torch.randn(2, 3, 40, 40)
    assert_same(larger.encode_image(x), peer.encode_image(x), 1e-4)
    assert larger.visual.image_size == (40, 40)


def test_tags_with_quick_gelu_are_open_clips() -> None:
    for name, tags in _PRETRAINED.items():
        if name in clip_names():
            for tag, config in tags.items():
                expected = bool(config.get("quick_gelu", False))
                assert bool(known_quick_gelu(name, tag, "open_clip")) == expected, (name, tag)
    assert set(QUICK_GELU_TAGS) <= {tag for tags in _PRETRAINED.values() for tag in tags}


def test_openai_state_dict_as_open_clip_reads_it() -> None:
    """The layout of OpenAI's files: float16 matrices, three numbers beside the weights, QuickGELU."""
    vision = {**VIT, "width": 128, "head_width": 64}
    text = {**TEXT, "width": 128, "heads": 2}
    peer = open_clip.CLIP(DIM, vision, text, quick_gelu=True).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    state = {key: value.half() for key, value in peer.state_dict().items()}
    numbers = {"input_resolution": torch.tensor(24), "context_length": torch.tensor(LENGTH)}
    state.update(numbers, vocab_size=torch.tensor(VOCABULARY))
    theirs = open_clip.model.build_model_from_openai_state_dict(dict(state), cast_dtype=None).float()
    model = CLIP.from_state_dict(state)
    assert model.quick_gelu
    assert model.logit_scale.dtype == torch.float32
    assert not model.training
    assert set(state) >= set(numbers)  # not changed
    x, ids = torch.randn(2, 3, 24, 24), texts(2)
    assert_same(model(x, ids), theirs(x, ids), 1e-5)


def test_only_the_pooled_token_of_the_last_block_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """And doing so changes nothing: outputs and gradients equal those of whole blocks."""
    _, model = build("vit_layer_scale")
    x, ids = images("vit"), texts()
    seen: list[torch.Size] = []
    real = _clip_block.Mlp.forward

    def record(self: Any, y: Tensor) -> Tensor:
        seen.append(y.shape)
        return real(self, y)

    monkeypatch.setattr(_clip_block.Mlp, "forward", record)
    short = (model.encode_image(x), model.encode_text(ids))
    assert [shape[:-1] for shape in seen[:3]] == [(3, 10), (3, 10), (3,)]
    grads = gradients(model, *short)
    monkeypatch.setattr(_clip_block.ResidualAttentionBlock, "prunable", lambda self: False)
    seen.clear()
    whole = (model.encode_image(x), model.encode_text(ids))
    assert [shape[:-1] for shape in seen[:3]] == [(3, 10)] * 3
    assert_same(short, whole, 1e-12)
    assert_same(grads, gradients(model, *whole), 1e-11)


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16-SigLIP"])
def test_preprocessing_is_open_clips(name: str) -> None:
    tag = "openai" if name == "ViT-B-32" else "webli"
    ours = CLIP.from_config(name, device="meta").preprocess_cfg
    theirs = open_clip.get_pretrained_cfg(name, tag)
    for field in ("mean", "std", "interpolation", "resize_mode"):
        assert ours[field] == theirs[field]
    assert ours["size"] == (224, 224)
    transform = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**ours), is_train=False)
    assert callable(transform)


INTERMEDIATES: dict[str, dict[str, Any]] = {
    "all": {},
    "some": {"image_indices": [0, -1], "text_indices": 2, "normalize_intermediates": True},
    "tokens": {"image_output_fmt": "NLC", "image_output_extra_tokens": True, "normalize": False},
    "only": {"intermediates_only": True, "image_indices": 1, "output_logits": True},
    "stopped": {"intermediates_only": True, "image_indices": [0], "text_indices": [1], "stop_early": True},
    "logits": {"output_logits": True, "output_logit_scale_bias": True},
}


@pytest.mark.parametrize("options", INTERMEDIATES)
@pytest.mark.parametrize("name", ["vit_bias", "vit_clipa", "vit_custom_text", "vit_eos", "resnet", "siglip"])
def test_intermediates(name: str, options: str) -> None:
    peer, model = build(name)
    x, ids, given = images(name), texts(), INTERMEDIATES[options]
    if name == "resnet":
        if options == "tokens":
            with pytest.raises(ValueError, match="must be one of 'NCHW', got 'NLC'"):
                model.forward_intermediates(x, ids, **given)
            return
        if options == "stopped":  # open_clip does not stop there
            given = {**given, "stop_early": False}
    if name == "siglip" and options == "tokens":
        given = {**given, "image_output_extra_tokens": False}
    ours, theirs = model.forward_intermediates(x, ids, **given), peer.forward_intermediates(x, ids, **given)
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert_same(ours[key], theirs[key])


def test_logits_of_intermediates_need_both() -> None:
    _, model = build("vit")
    with pytest.raises(ValueError, match="output_logits needs image and text"):
        model.forward_intermediates(images("vit"), output_logits=True)
    assert set(model.forward_intermediates(text=texts())) == {"text_intermediates", "text_features"}
