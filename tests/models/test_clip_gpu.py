"""CLIP on a GPU, where the kernels serve it by default."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import mmfast
from mmfast.models import CLIP

pytestmark = pytest.mark.gpu
TEXT: dict[str, Any] = {"context_length": 77, "vocab_size": 200, "width": 128, "heads": 2, "layers": 3}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "vit": ({"layers": 3, "width": 192, "patch_size": 16, "image_size": 64}, TEXT, {"quick_gelu": True}),
    "vit_avg": (
        {"layers": 3, "width": 192, "patch_size": 16, "image_size": 64, "pool_type": "avg", "ls_init_value": 0.1},
        {**TEXT, "pool_type": "avg"},
        {},
    ),
    "resnet": ({"layers": [1, 1, 1, 1], "width": 32, "patch_size": None, "image_size": 64}, TEXT, {}),
    "siglip": (
        {
            "trunk": {
                "img_size": 64,
                "patch_size": 16,
                "embed_dim": 64,
                "depth": 3,
                "num_heads": 1,
                "class_token": False,
                "global_pool": "map",
                "act_layer": "gelu_tanh",
            },
            "timm_pool": "map",
            "timm_proj": "none",
        },
        {**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
        {"custom_text": True, "init_logit_bias": -10.0},
    ),
}


def make(name: str, device: torch.device, dtype: torch.dtype) -> tuple[CLIP, Tensor, Tensor]:
    vision, text, options = MODELS[name]
    model = CLIP(64, vision, text, **options).to(device, dtype).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "bn3.weight" in key:  # 0 at first: the branch would not count
                parameter.fill_(0.5)
    ids = torch.zeros(8, 77, dtype=torch.int64)
    for row in range(8):
        ids[row, : 5 + 9 * row] = torch.randint(1, 199, (5 + 9 * row,))
        ids[row, 5 + 9 * row] = 199
    return model, torch.randn(8, 3, 64, 64, device=device).to(dtype), ids.to(device)


def gradients(model: Any, parameters: list[Tensor], x: Tensor, ids: Tensor) -> list[Tensor]:
    first, second, scale, *_ = model(x, ids)
    logits = (scale * first @ second.T).float() if first.dtype != torch.float64 else scale * first @ second.T
    loss = torch.nn.functional.cross_entropy(logits, torch.arange(8, device=x.device))
    return [first, second, loss, *torch.autograd.grad(loss, parameters, allow_unused=True)]


def trained(model: CLIP) -> list[Tensor]:
    """All that the loss depends on: a key's bias adds the same to all scores, so its gradient is a rounding error."""
    without = ("logit_bias", "visual.attnpool.k_proj.bias")
    return [parameter for name, parameter in model.named_parameters() if name not in without]


def relative(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_as_good_as_torch(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Against float64, the kernels' error is at most twice that of PyTorch's own ops in the same dtype."""
    model, x, ids = make(name, device, dtype)
    assert "triton" in {choice.backend for choice in mmfast.explain(model, x, ids)}
    exact = copy.deepcopy(model).double()
    truth = gradients(exact, trained(exact), x.double(), ids)
    found = gradients(model, trained(model), x, ids)
    with mmfast.backend("torch"):
        peer = gradients(model, trained(model), x, ids)
    ours = sum(relative(a, t) for a, t in zip(found, truth, strict=True))
    theirs = sum(relative(a, t) for a, t in zip(peer, truth, strict=True))
    assert ours <= 2 * theirs


@pytest.mark.parametrize("name", ["vit", "siglip"])
def test_equals_open_clip(name: str, device: torch.device) -> None:
    open_clip = pytest.importorskip("open_clip")
    if name == "siglip":
        pytest.importorskip("timm")
        model = CLIP.from_config("ViT-B-16-SigLIP", device=device).eval()
        theirs = open_clip.create_model("ViT-B-16-SigLIP", device=device).eval()
    else:
        model = CLIP.from_config("ViT-B-32", device=device).eval()
        theirs = open_clip.create_model("ViT-B-32", device=device).eval()
    theirs.load_state_dict(model.state_dict())
    x = torch.randn(4, 3, 224, 224, device=device)
    ids = torch.randint(1, 31999, (4, model.context_length), device=device)
    with torch.no_grad():
        ours, peer = model(x, ids), theirs(x, ids)
    assert relative(ours[0], peer[0]) < 1e-3
    assert relative(ours[1], peer[1]) < 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_compiled_equals_eager(name: str, device: torch.device) -> None:
    model, x, ids = make(name, device, torch.float32)
    compiled = torch.compile(model, fullgraph=True)
    found, expected = gradients(compiled, trained(model), x, ids), gradients(model, trained(model), x, ids)
    assert all(relative(a, b) <= 1e-3 for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_captured_in_a_graph(name: str, device: torch.device) -> None:
    """Nothing waits for the GPU, the end of a text included."""
    model, x, ids = make(name, device, torch.bfloat16)
    with torch.no_grad():
        for _ in range(2):
            model(x, ids)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x, ids)
        x.copy_(torch.randn_like(x))
        ids.copy_(ids.flip(0))
        graph.replay()
        expected = model(x, ids)
    assert torch.equal(y[0], expected[0])
    assert torch.equal(y[1], expected[1])


def test_trimmed_texts_have_the_same_features(device: torch.device) -> None:
    model, _, ids = make("vit", device, torch.float32)
    short = model.trim_text(ids[:3].cpu()).to(device)
    assert short.shape == (3, 24)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(short), model.encode_text(ids[:3]), rtol=1e-4, atol=1e-4)


def test_bytes_are_normalised_in_the_kernel(device: torch.device) -> None:
    vision, text, _ = MODELS["vit"]
    model = CLIP(64, vision, text, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25)).to(device).eval()
    raw = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, device=device)
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.25)))
    with torch.no_grad():
        found, expected = model.encode_image(raw), model.encode_image((raw / 255 - mean) / std)
    assert relative(found, expected) < 1e-3


def test_training_under_autocast_learns(device: torch.device) -> None:
    torch.manual_seed(0)
    model, x, ids = make("vit", device, torch.float32)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-4)
    for _ in range(100):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            first, second, scale = model(x, ids)
            loss = torch.nn.functional.cross_entropy((scale * first @ second.T).float(), torch.arange(8, device=device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss) < 0.3


def test_same_bits_twice(device: torch.device) -> None:
    model, x, ids = make("vit", device, torch.bfloat16)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        first, second = (gradients(model, trained(model), x, ids) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
