from __future__ import annotations

import re
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import mmfast
from mmfast.models import ViT

BACKENDS = (pytest.param(None, id="default"), "torch", pytest.param("triton", marks=pytest.mark.triton))
SIZE: dict[str, Any] = {
    "img_size": 24,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 3,
    "num_heads": 3,
    "mlp_ratio": 1.0,
    "num_classes": 5,
}


def pair(device: torch.device, **options: Any) -> tuple[nn.Module, ViT]:
    """timm's model with unfused attention, and ours with its weights."""
    peer = timm.models.VisionTransformer(**SIZE, **options).to(device).eval()
    for block in peer.blocks:
        block.attn.fused_attn = False
        nn.init.normal_(block.attn.qkv.weight, std=0.3)  # maps that are far from uniform
    return peer, ViT.from_timm(peer).eval()


def caught(peer: nn.Module, x: Tensor, **options: Any) -> list[Tensor]:
    """The probabilities that timm's blocks apply."""
    found: list[Tensor] = []
    handles = [b.attn.attn_drop.register_forward_hook(lambda m, a, out: found.append(out)) for b in peer.blocks]
    peer(x, **options)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(
    ("option", "heads", "backend"),
    [
        *((o, h, b) for o in ("plain", "qk_norm", "registers") for h in (None, 1, (2, 0)) for b in (None, "torch")),
        pytest.param("qk_norm", None, "triton", marks=pytest.mark.triton),
        pytest.param("registers", range(-2, 0), "triton", marks=pytest.mark.triton),
    ],
    ids=str,
)
def test_equals_timms_unfused_probabilities(heads: Any, option: str, backend: str | None, device: torch.device) -> None:
    options = {"plain": {}, "qk_norm": {"qk_norm": True}, "registers": {"reg_tokens": 2}}[option]
    peer, model = pair(device, **options)
    x = torch.randn(2, 3, 24, 24, device=device)
    wanted = caught(peer, x)
    index = [0, 1, 2] if heads is None else [heads] if isinstance(heads, int) else list(heads)
    with mmfast.backend(backend):
        found = model.attention_maps(x, layers=(2, 0, -1), heads=heads)
    for layer, maps in zip((2, 0, 2), found, strict=True):
        assert maps.std() > 0.05
        torch.testing.assert_close(maps, wanted[layer][:, index], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", [None, "torch"], ids=str)
@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
def test_fusion_is_over_the_chosen_heads(fusion: str, backend: str | None, device: torch.device) -> None:
    peer, model = pair(device)
    x = torch.randn(1, 3, 24, 24, device=device)
    maps = caught(peer, x)[-1][:, [0, 2]]
    wanted = {"mean": maps.mean(1), "max": maps.amax(1), "min": maps.amin(1)}[fusion]
    with mmfast.backend(backend):
        (found,) = model.attention_maps(x, head_fusion=fusion, heads=(0, 2))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks(backend: str | None, device: torch.device) -> None:
    peer, model = pair(device)
    x = torch.randn(1, 3, 24, 24, device=device)
    mask = (torch.rand(10, 10, device=device) > 0.5).fill_diagonal_(True)
    for options in ({"attn_mask": mask}, {"is_causal": True}):
        with mmfast.backend(backend):
            found = model.attention_maps(x, layers=[0, 1], heads=2, **options)
        for maps, wanted in zip(found, caught(peer, x, **options)[:2], strict=True):
            torch.testing.assert_close(maps, wanted[:, 2:3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_reach_the_image(backend: str | None, device: torch.device) -> None:
    """As methods that weigh attention by its gradient need."""
    peer, model = pair(device)
    x = torch.randn(1, 3, 24, 24, device=device, requires_grad=True)
    (wanted,) = torch.autograd.grad(caught(peer, x)[1][0, 2, 0, 1:].max(), x)
    with mmfast.backend(backend):
        (found,) = torch.autograd.grad(model.attention_maps(x, layers=[1], heads=2)[0][0, 0, 0, 1:].max(), x)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def test_other_heads_are_not_computed(device: torch.device) -> None:
    """The memory is that of the chosen heads: one of three."""
    _, model = pair(device)
    x = torch.randn(1, 3, 24, 24, device=device)
    shapes: list[torch.Size] = []

    class Seen(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if getattr(func, "__name__", "") == "softmax":
                shapes.append(out.shape)
            return out

    with torch.no_grad(), Seen():
        model.attention_maps(x, heads=1)
    assert shapes == [(1, 1, 10, 10)]


def test_unknown_heads(device: torch.device) -> None:
    _, model = pair(device)
    x = torch.zeros(1, 3, 24, 24, device=device)
    for heads in (3, [], [0, -4]):
        with pytest.raises(ValueError, match=re.escape(f"heads must be head indices in -3..2, got {heads!r}")):
            model.attention_maps(x, heads=heads)
