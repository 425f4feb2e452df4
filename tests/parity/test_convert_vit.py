"""Converters of ViT state dicts against the real models: random weights in, equal outputs out.

Every parameter is drawn at random, the gains and biases of norms, positions and LayerScale too, so that a name that is
missing or crossed shows in the output.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from mmfast import convert
from mmfast.models import ViT

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")
transformers = pytest.importorskip("transformers")
open_clip = pytest.importorskip("open_clip")
vit_pytorch = pytest.importorskip("vit_pytorch")

from timm.layers import Attention as TimmAttention  # noqa: E402
from timm.layers import QuickGELU, SwiGLU, SwiGLUPacked  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

Output = Callable[[nn.Module, Tensor], Tensor]
HF = {"hidden_size": 12, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 12, "patch_size": 4}
TIMM = {"embed_dim": 12, "depth": 3, "num_heads": 3, "img_size": 12, "patch_size": 4, "num_classes": 5}
CLIP = {"image_size": 12, "patch_size": 4, "width": 12, "layers": 3, "heads": 3, "mlp_ratio": 2.5, "output_dim": 5}
LUCID = {"image_size": 12, "patch_size": 4, "num_classes": 5, "dim": 12, "depth": 3, "mlp_dim": 20}


class Peer(NamedTuple):
    """A model of another library and what of its output a ViT gives."""

    build: Callable[[], nn.Module]
    layout: str
    output: Output = lambda model, x: model(x)
    image: tuple[int, int] = (12, 12)
    overrides: Mapping[str, Any] = {}  # what the model does not tell


def hf(name: str, **config: Any) -> Callable[[], nn.Module]:
    """Build transformers' class `name` from a tiny config."""

    def build() -> nn.Module:
        cls = getattr(transformers, name)
        return cls(cls.config_class(**{**HF, **config}))

    return build


def first_token(model: nn.Module, x: Tensor) -> Tensor:
    return model(pixel_values=x).last_hidden_state[:, 0]


def field(name: str) -> Output:
    return lambda model, x: getattr(model(pixel_values=x), name)


def build_timm(**changes: Any) -> Callable[[], nn.Module]:
    return lambda: VisionTransformer(**{**TIMM, **changes})


def build_torchvision() -> nn.Module:
    return torchvision.models.VisionTransformer(12, 4, 3, 3, 12, 20, num_classes=5)


def build_clip(**changes: Any) -> Callable[[], nn.Module]:
    return lambda: open_clip.transformer.VisionTransformer(**{**CLIP, **changes})


def build_lucid(**changes: Any) -> Callable[[], nn.Module]:
    return lambda: vit_pytorch.ViT(**{**LUCID, "heads": 3, "dim_head": 4, **changes})


PEERS: dict[str, Peer] = {
    "torchvision": Peer(build_torchvision, "torchvision"),
    "hf-vit-classifier": Peer(
        hf("ViTForImageClassification", intermediate_size=20, num_labels=5), "transformers", field("logits")
    ),
    "hf-vit": Peer(hf("ViTModel", intermediate_size=20), "transformers", first_token),
    "hf-vit-relu-no-qkv-bias": Peer(
        hf("ViTModel", intermediate_size=20, hidden_act="relu", qkv_bias=False, layer_norm_eps=1e-2),
        "transformers",
        first_token,
    ),
    "hf-vit-oblong": Peer(
        hf("ViTModel", intermediate_size=20, image_size=[8, 12]), "transformers", first_token, (8, 12)
    ),
    "hf-deit": Peer(
        hf("DeiTForImageClassification", intermediate_size=20, num_labels=5), "transformers", field("logits")
    ),
    "hf-dinov2": Peer(hf("Dinov2Model", mlp_ratio=2), "transformers", first_token),
    "hf-dinov2-other-size": Peer(hf("Dinov2Model", mlp_ratio=2), "transformers", first_token, (20, 8)),
    "hf-dinov2-swiglu": Peer(hf("Dinov2Model", use_swiglu_ffn=True), "transformers", first_token),
    "hf-dinov2-registers": Peer(
        hf("Dinov2WithRegistersModel", num_register_tokens=2, mlp_ratio=2), "transformers", first_token
    ),
    "hf-dinov2-registers-other-size": Peer(
        hf("Dinov2WithRegistersModel", num_register_tokens=2, mlp_ratio=2), "transformers", first_token, (20, 8)
    ),
    "hf-dinov2-registers-swiglu": Peer(
        hf("Dinov2WithRegistersModel", num_register_tokens=4, use_swiglu_ffn=True), "transformers", first_token
    ),
    "hf-clip": Peer(
        hf("CLIPVisionModel", intermediate_size=20, hidden_act="quick_gelu"),
        "transformers_clip",
        field("pooler_output"),
    ),
    "hf-clip-projection": Peer(
        hf("CLIPVisionModelWithProjection", intermediate_size=20, hidden_act="gelu", projection_dim=5),
        "transformers_clip",
        field("image_embeds"),
    ),
    "hf-siglip": Peer(hf("SiglipVisionModel", intermediate_size=20), "transformers_clip", field("pooler_output")),
    "open_clip": Peer(build_clip(), "open_clip"),
    "open_clip-quickgelu": Peer(build_clip(act_layer=open_clip.transformer.QuickGELU), "open_clip"),
    "open_clip-layer-scale": Peer(build_clip(ls_init_value=0.1), "open_clip"),
    "open_clip-no-ln-pre": Peer(build_clip(no_ln_pre=True), "open_clip"),
    "open_clip-avg": Peer(build_clip(pool_type="avg"), "open_clip"),
    "open_clip-avg-ln-after": Peer(build_clip(pool_type="avg", final_ln_after_pool=True), "open_clip"),
    "vit_pytorch": Peer(build_lucid(), "vit_pytorch"),
    "vit_pytorch-mean": Peer(build_lucid(pool="mean"), "vit_pytorch"),
    "vit_pytorch-wide-heads": Peer(build_lucid(dim_head=7), "vit_pytorch"),
    "vit_pytorch-one-head": Peer(build_lucid(heads=1, dim_head=12), "vit_pytorch"),
    "vit_pytorch-gray-oblong": Peer(
        build_lucid(channels=1, image_size=(8, 12), patch_size=(2, 4)),
        "vit_pytorch",
        image=(8, 12),
        overrides={"img_size": (8, 12)},
    ),
    "vit_pytorch-no-head": Peer(build_lucid(num_classes=0), "vit_pytorch"),
    "timm": Peer(build_timm(), "timm"),
    "timm-clip": Peer(build_timm(pre_norm=True, norm_layer=partial(nn.LayerNorm, eps=1e-5)), "timm"),
    "timm-quickgelu": Peer(build_timm(pre_norm=True, act_layer=QuickGELU), "timm"),
    "timm-reg4-swiglu-packed": Peer(
        build_timm(reg_tokens=4, no_embed_class=True, init_values=0.1, mlp_layer=SwiGLUPacked, act_layer=nn.SiLU),
        "timm",
    ),
    "timm-swiglu": Peer(build_timm(mlp_layer=SwiGLU, act_layer=nn.SiLU, mlp_ratio=2.7), "timm"),
    "timm-gap": Peer(build_timm(global_pool="avg", class_token=False), "timm"),
    "timm-map": Peer(build_timm(global_pool="map", class_token=False), "timm"),
    "timm-norms": Peer(build_timm(qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True, qkv_bias=False), "timm"),
}


def randomize(model: nn.Module) -> nn.Module:
    """Draw every parameter at random, in float64; gains around 1."""
    generator = torch.Generator().manual_seed(7)
    model = model.double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            draw = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            gain = p.dim() == 1 and name.endswith(("weight", "gamma", "lambda1"))
            p.copy_(1 + 0.3 * draw if gain else 0.3 * draw)
    return model


def images(peer: Peer, model: nn.Module) -> Tensor:
    channels = 1 if "gray" in next(k for k, v in PEERS.items() if v is peer) else 3
    return torch.randn(2, channels, *peer.image, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def real_timm(config: Mapping[str, Any]) -> VisionTransformer:
    """timm's own model with these arguments, its classes in place of mmfast's."""
    config = {k: v for k, v in config.items() if not k.startswith("pos_embed_")}
    if isinstance(config.get("mlp_layer"), str):
        config["mlp_layer"] = {"swiglu_packed": SwiGLUPacked, "swiglu": SwiGLU}[config["mlp_layer"]]
    if "attn_layer" in config:
        fixed = config["attn_layer"].keywords

        class Wide(TimmAttention):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs, **fixed)

        config["attn_layer"] = Wide
    return VisionTransformer(**config).double().eval()


every_peer = pytest.mark.parametrize("peer", list(PEERS.values()), ids=list(PEERS))
# timm's own model cannot differ from itself, and it resamples positions by another rule than transformers.
not_timm = pytest.mark.parametrize(
    "peer", [pytest.param(p, id=k) for k, p in PEERS.items() if p.layout != "timm" and not k.endswith("other-size")]
)


@every_peer
@pytest.mark.filterwarnings("ignore:vit_from. a ViT has no pooler")
@torch.no_grad()
def test_vit_from_equals_the_peer(peer: Peer) -> None:
    model = randomize(peer.build())
    x = images(peer, model)
    expected = peer.output(model, x)
    vit = convert.vit_from(model, **peer.overrides)
    assert isinstance(vit, ViT)
    assert not vit.training
    torch.testing.assert_close(vit(x), expected, rtol=1e-9, atol=1e-9)


@not_timm
@torch.no_grad()
def test_timms_own_model_equals_the_peer(peer: Peer) -> None:
    model = randomize(peer.build())
    x = images(peer, model)
    options = {"fc_norm": True} if getattr(model, "final_ln_after_pool", False) else {}
    state = convert.to_timm(
        model.state_dict(), **options, **({"patch_size": model.patch_size} if peer.layout == "vit_pytorch" else {})
    )
    canonical = real_timm(convert.vit_config(model, **peer.overrides))
    canonical.load_state_dict(state, strict=True)
    torch.testing.assert_close(canonical(x), peer.output(model, x), rtol=1e-9, atol=1e-9)


@every_peer
def test_detect(peer: Peer) -> None:
    assert convert.detect(peer.build().state_dict()) == peer.layout


@pytest.mark.parametrize("name", [name for name, p in PEERS.items() if p.layout != "timm" and "registers" not in name])
def test_round_trip_is_exact(name: str) -> None:
    state = randomize(PEERS[name].build()).state_dict()
    options = {"patch_size": (2, 4)} if "gray" in name else {}
    if name == "open_clip-avg-ln-after":
        options["fc_norm"] = True
    before = {key: value.clone() for key, value in state.items()}
    layout = PEERS[name].layout
    back = convert.from_timm(convert.to_timm(state, layout, **options), layout)
    assert list(state) == list(before)
    assert back.keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(back[key], value), key
        assert torch.equal(state[key], value), f"{key} was changed"


@torch.no_grad()
def test_round_trip_of_registers_computes_the_same() -> None:
    """The class token's position is added to the token, so the parts differ but not their sum."""
    peer = PEERS["hf-dinov2-registers"]
    model = randomize(peer.build())
    x = images(peer, model)
    expected = peer.output(model, x)
    back = convert.from_timm(convert.to_timm(model.state_dict()), "transformers")
    assert torch.count_nonzero(back["embeddings.position_embeddings"][:, 0]) == 0
    fresh = randomize(peer.build())
    fresh.load_state_dict(back, strict=True)
    torch.testing.assert_close(peer.output(fresh, x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, p in PEERS.items() if name.startswith("hf-")])
def test_files_and_memory_convert_alike(name: str, tmp_path: Any) -> None:
    """`save_pretrained` writes the names of version 4; `state_dict()` has those of the version installed."""
    safetensors = pytest.importorskip("safetensors.torch")
    model = randomize(PEERS[name].build())
    model.save_pretrained(tmp_path)
    files = safetensors.load_file(tmp_path / "model.safetensors")
    memory = convert.to_timm(model.state_dict())
    disk = convert.to_timm(files)
    assert disk.keys() == memory.keys()
    for key, value in memory.items():
        assert torch.equal(disk[key], value), key
    assert disk.facts == memory.facts
    back = convert.from_timm(disk, disk.source)
    if "registers" not in name:
        assert back.keys() == files.keys()


def test_files_have_the_old_names() -> None:
    """The two dialects of transformers are written on demand."""
    state = convert.to_timm(randomize(PEERS["hf-vit"].build()).state_dict())
    assert "encoder.layer.2.attention.attention.query.weight" in convert.from_timm(
        state, "transformers", dialect="vit/disk"
    )
    assert "layers.2.attention.q_proj.weight" in convert.from_timm(state, "transformers", dialect="vit/memory")


def test_another_layout_and_back() -> None:
    """torchvision -> transformers -> torchvision, each loading strictly into its own model."""
    model = randomize(build_torchvision())
    hf_model = hf("ViTForImageClassification", intermediate_size=20, num_labels=5, layer_norm_eps=1e-6)().double()
    where = "memory" if "vit.layers.0.layernorm_before.weight" in hf_model.state_dict() else "disk"
    state = convert.from_timm(
        convert.to_timm(model.state_dict()), "transformers", prefix="vit.", dialect=f"vit/{where}"
    )
    hf_model.load_state_dict(state, strict=True)
    hf_model.eval()
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(hf_model(x).logits, model(x), rtol=1e-9, atol=1e-9)
    again = convert.convert(state, dst="torchvision")
    model.load_state_dict(again, strict=True)


@torch.no_grad()
def test_whole_clip_and_timm_tower() -> None:
    """The image tower is found inside a CLIP; its text tower is kept aside."""
    vision = {"image_size": 12, "patch_size": 4, "width": 12, "layers": 2, "head_width": 4}
    text = {"context_length": 4, "vocab_size": 11, "width": 8, "heads": 2, "layers": 1}
    clip = randomize(open_clip.CLIP(5, vision, text, quick_gelu=True))
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    torch.testing.assert_close(convert.vit_from(clip)(x), clip.encode_image(x), rtol=1e-9, atol=1e-9)
    state = convert.to_timm(clip.state_dict())
    assert "token_embedding.weight" in state.aside
    assert state.reasons["token_embedding.weight"] == "not the image tower"
    assert convert.from_timm(state, "open_clip").keys() == clip.state_dict().keys()
    with pytest.raises(ValueError, match="pass act_layer='quick_gelu'"):
        convert.vit_config(clip.state_dict(), num_heads=3)
    vit = convert.vit_from(clip.state_dict(), num_heads=3, act_layer="quick_gelu")
    torch.testing.assert_close(vit(x), clip.encode_image(x), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_pooler_is_reported() -> None:
    model = randomize(PEERS["hf-vit"].build())
    with pytest.warns(UserWarning, match="no pooler: pooler.dense.bias, pooler.dense.weight left out"):
        vit = convert.vit_from(model)
    state = convert.to_timm(model.state_dict())
    assert sorted(state.aside) == ["pooler.dense.bias", "pooler.dense.weight"]
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    out = model(x)
    torch.testing.assert_close(vit.forward_features(x), out.last_hidden_state, rtol=1e-9, atol=1e-9)
    pooled = (vit(x) @ state.aside["pooler.dense.weight"].T + state.aside["pooler.dense.bias"]).tanh()
    torch.testing.assert_close(pooled, out.pooler_output, rtol=1e-9, atol=1e-9)


def test_dropout_rates_and_mode_are_carried_over() -> None:
    model = torchvision.models.VisionTransformer(12, 4, 2, 3, 12, 20, dropout=0.1, attention_dropout=0.2)
    config = convert.vit_config(model.train())
    assert (config["pos_drop_rate"], config["proj_drop_rate"], config["attn_drop_rate"]) == (0.1, 0.1, 0.2)
    assert convert.vit_from(model).training


def test_weights_are_copied() -> None:
    model = build_torchvision()
    vit = convert.vit_from(model)
    with torch.no_grad():
        vit.cls_token.fill_(7.0)
    assert model.class_token.abs().max() < 7


def test_no_warning_without_a_pooler() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert.vit_from(transformers.ViTModel(transformers.ViTConfig(**HF), add_pooling_layer=False))


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: hf("Dinov2ForImageClassification")(), "classifier reads the class token and the mean"),
        (lambda: hf("ViTMAEModel", intermediate_size=20)(), "is not a ViT of"),
        (lambda: build_clip(attentional_pool=True, attn_pooler_heads=1)(), "attentional pool"),
        (lambda: torchvision.models.VisionTransformer(12, 4, 1, 3, 12, 20, representation_size=8), "tanh"),
        (lambda: nn.Linear(2, 2), "is not a ViT of"),
    ],
    ids=["dinov2-classifier", "mae", "attentional-pool", "representation", "linear"],
)
def test_what_a_vit_cannot_compute_is_refused(build: Callable[[], nn.Module], match: str) -> None:
    with pytest.raises((ValueError, TypeError), match=match):
        convert.vit_from(build())


class OldLucid(nn.Module):
    """vit_pytorch.ViT as of releases before 1.0: PreNorm wrappers, no norm around the patch projection, LN in the head.

    Written from its parameter names; no such release is installed.
    """

    def __init__(self, pool: str) -> None:
        super().__init__()
        self.pool = pool
        self.to_patch_embedding = nn.Sequential(nn.Identity(), nn.Linear(48, 12))
        self.pos_embedding = nn.Parameter(torch.zeros(1, 10, 12))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 12))
        self.transformer = nn.Module()
        self.transformer.layers = nn.ModuleList()
        for _ in range(2):
            attention, mlp = nn.Module(), nn.Module()
            attention.norm, mlp.norm = nn.LayerNorm(12), nn.LayerNorm(12)
            attention.fn, mlp.fn = nn.Module(), nn.Module()
            attention.fn.to_qkv = nn.Linear(12, 24 * 3, bias=False)
            attention.fn.to_out = nn.Sequential(nn.Linear(24, 12))
            mlp.fn.net = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Identity(), nn.Linear(20, 12))
            self.transformer.layers.append(nn.ModuleList([attention, mlp]))
        self.mlp_head = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 5))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        x = x.reshape(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(b, -1, 16 * c)
        x = torch.cat((self.cls_token.expand(b, -1, -1), self.to_patch_embedding[1](x)), 1) + self.pos_embedding
        for attention, mlp in self.transformer.layers:
            qkv = attention.fn.to_qkv(attention.norm(x)).reshape(b, -1, 3, 3, 8).permute(2, 0, 3, 1, 4)
            out = nn.functional.scaled_dot_product_attention(*qkv)
            x = x + attention.fn.to_out(out.transpose(1, 2).flatten(2))
            x = x + mlp.fn.net(mlp.norm(x))
        return self.mlp_head(x.mean(1) if self.pool == "mean" else x[:, 0])


@pytest.mark.parametrize("pool", ["cls", "mean"])
@torch.no_grad()
def test_old_vit_pytorch(pool: str) -> None:
    model = randomize(OldLucid(pool))
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    state = convert.to_timm(model.state_dict(), pool=pool)
    vit = convert.vit_from(state, num_heads=3)
    torch.testing.assert_close(vit(x), model(x), rtol=1e-9, atol=1e-9)
    back = convert.from_timm(state, "vit_pytorch")
    assert all(torch.equal(back[k], v) for k, v in model.state_dict().items())
    assert back.keys() == model.state_dict().keys()
