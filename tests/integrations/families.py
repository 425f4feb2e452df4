"""Tiny models of each library, and what differs between them in a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import mmfast

DEPTH = 2
IMAGE = (3, 16, 16)


class Family(NamedTuple):
    """How to build one kind of model, the submodules that its accelerated block stands in for, its attention op."""

    build: Callable[[], nn.Module]
    block: Callable[[Any], Any]
    bypassed: tuple[str, ...]
    attention: str = "attention"


def images(batch: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, *IMAGE, dtype=dtype)


def logits(model: Any, x: Tensor) -> Tensor:
    out = model(x)
    return out if isinstance(out, Tensor) else out.logits


def _timm(**options: object) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    options = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "num_heads": 2, "num_classes": 5, **options}
    return VisionTransformer(depth=DEPTH, **options)  # type: ignore[arg-type]


def _torchvision() -> nn.Module:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(16, 8, DEPTH, 2, 16, 32, dropout=0.2, num_classes=5)
    nn.init.normal_(model.heads.head.weight)  # zero by default
    for block in model.encoder.layers:
        # After attention the original draws its mask for a transposed view, the op for a contiguous tensor.
        block.dropout.p = 0.0
    return model


SIZES = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 2,
    "num_labels": 5,
}

CLIP_SIZES = {key: value for key, value in SIZES.items() if key != "num_labels"} | {"intermediate_size": 32}


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**SIZES, intermediate_size=32, hidden_dropout_prob=0.2))


def _dinov2() -> nn.Module:
    from transformers import Dinov2Config, Dinov2ForImageClassification

    return Dinov2ForImageClassification(
        Dinov2Config(**SIZES, mlp_ratio=2, drop_path_rate=0.5, layerscale_value=0.5, hidden_dropout_prob=0.2)
    )


def _dinov2_with_registers() -> nn.Module:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersForImageClassification

    config = Dinov2WithRegistersConfig(**SIZES, mlp_ratio=2, drop_path_rate=0.5, layerscale_value=0.5)
    return Dinov2WithRegistersForImageClassification(config)


def _clip_vision() -> nn.Module:
    from transformers import CLIPConfig, CLIPForImageClassification

    return CLIPForImageClassification(CLIPConfig(vision_config=CLIP_SIZES, num_labels=5))


def _siglip_vision() -> nn.Module:
    from transformers import SiglipConfig, SiglipForImageClassification

    # Without the pooling head, which has attention of its own.
    return SiglipForImageClassification(
        SiglipConfig(vision_config={**CLIP_SIZES, "vision_use_head": False}, num_labels=5)
    )


def _timm_everything() -> nn.Module:
    return _timm(init_values=0.5, drop_path_rate=0.5, proj_drop_rate=0.2, reg_tokens=2, qk_norm=True)


def _open_clip(**options: object) -> nn.Module:
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(16, 8, 16, DEPTH, 2, 2.0, output_dim=5, **options)


def _open_clip_custom() -> nn.Module:
    from open_clip.transformer import QuickGELU

    custom = ("qk_norm", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")
    return _open_clip(act_layer=QuickGELU, **dict.fromkeys(custom, True))


_DINO = ("norm2", "layer_scale1", "drop_path")
FAMILIES = {
    "timm": Family(_timm, lambda m: m.blocks[-1], ("norm2", "ls1", "drop_path1"), "attention_qkv"),
    "timm-layerscale-droppath": Family(
        _timm_everything,
        lambda m: m.blocks[-1],
        ("norm2", "ls1", "drop_path1"),
    ),
    "torchvision": Family(_torchvision, lambda m: m.encoder.layers[-1], ("ln_2",), "attention_qkv"),
    "open_clip": Family(
        lambda: _open_clip(ls_init_value=0.5), lambda m: m.transformer.resblocks[-1], ("ln_2", "ls_1"), "attention_qkv"
    ),
    "open_clip-custom": Family(_open_clip_custom, lambda m: m.transformer.resblocks[-1], ("ln_2", "ls_1")),
    "vit": Family(_vit, lambda m: next(b for b in m.modules() if type(b).__name__ == "ViTLayer"), ("layernorm_after",)),
    "dinov2": Family(_dinov2, lambda m: m.dinov2.encoder.layer[-1], _DINO),
    "dinov2-registers": Family(
        _dinov2_with_registers,
        lambda m: m.dinov2_with_registers.encoder.layer[-1],
        _DINO,
    ),
    "clip": Family(_clip_vision, lambda m: m.vision_model.encoder.layers[-1], ("layer_norm2",)),
    "siglip": Family(_siglip_vision, lambda m: m.vision_model.encoder.layers[-1], ("layer_norm2",)),
}
DETERMINISTIC = ("timm", "open_clip", "open_clip-custom", "clip", "siglip")
"""Families whose training has no randomness."""


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The same model at each call, with weights far from their initial values, in evaluation mode."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        model = FAMILIES[name].build().to(dtype).eval()
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, dtype=dtype)
    return model


def fused(model: nn.Module) -> list[str]:
    """Names of the submodules that an op stands in for."""
    return [row.name for row in mmfast.report(model) if row.status == "fused"]


def compare(model: nn.Module, original: nn.Module, call: Callable[[Any], Tensor]) -> list[str]:
    """Assert that both give one output and the same gradients from one seed. Return the ops that ran on torch."""
    results = []
    for m in (model, original):
        m.zero_grad()
        torch.manual_seed(5)
        y = call(m)
        (y * torch.linspace(-1, 1, y.shape[-1], dtype=y.dtype)).sum().backward()
        results.append((y.detach(), {name: p.grad for name, p in m.named_parameters() if p.grad is not None}))
    (a, grads), (b, expected) = results
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
    assert grads.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")
    return [choice.op for choice in mmfast.explain(call, model)]


def outcome(model: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and the gradients of all parameters, from one seed."""
    torch.manual_seed(7)
    model.zero_grad()
    out = logits(model, x)
    (out * torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype)).sum().backward()
    return out.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(a: tuple[Tensor, dict[str, Tensor]], b: tuple[Tensor, dict[str, Tensor]], tol: float = 0.0) -> None:
    torch.testing.assert_close(a[0], b[0], rtol=tol, atol=tol)
    assert a[1].keys() == b[1].keys()
    for key in b[1]:
        torch.testing.assert_close(a[1][key], b[1][key], rtol=tol, atol=tol)


def assert_close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def tolerance(name: str, training: bool, dtype: torch.dtype) -> float:
    """0 where the op on its torch backend takes the steps of the original, in their order."""
    # torch.nn's attention has the sequence first; open_clip's scales heads before they are put side by side; DINOv2's
    # drop path divides before it multiplies by the mask: the last bits may differ.
    exact = not (name in ("torchvision", "open_clip", "open_clip-custom") or (training and "dinov2" in name))
    return 0.0 if exact else 1e-12 if dtype == torch.float64 else 2e-5
