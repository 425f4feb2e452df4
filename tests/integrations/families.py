"""Tiny models of each library, and what differs between them in a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

DEPTH = 2
IMAGE = (3, 16, 16)


class Family(NamedTuple):
    """How to build one kind of model, and the names of the submodules that its accelerated block stands in for."""

    build: Callable[[], nn.Module]
    block: Callable[[Any], Any]
    bypassed: tuple[str, ...]


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
    return model


_SIZES = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 2,
    "num_labels": 5,
}


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**_SIZES, intermediate_size=32, hidden_dropout_prob=0.2))


def _dinov2() -> nn.Module:
    from transformers import Dinov2Config, Dinov2ForImageClassification

    return Dinov2ForImageClassification(
        Dinov2Config(**_SIZES, mlp_ratio=2, drop_path_rate=0.5, layerscale_value=0.5, hidden_dropout_prob=0.2)
    )


def _dinov2_with_registers() -> nn.Module:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersForImageClassification

    config = Dinov2WithRegistersConfig(**_SIZES, mlp_ratio=2, drop_path_rate=0.5, layerscale_value=0.5)
    return Dinov2WithRegistersForImageClassification(config)


def _timm_everything() -> nn.Module:
    return _timm(init_values=0.5, drop_path_rate=0.5, proj_drop_rate=0.2, reg_tokens=2, qk_norm=True)


_DINO = ("norm2", "layer_scale1", "drop_path")
FAMILIES = {
    "timm": Family(_timm, lambda m: m.blocks[-1], ("norm2", "ls1", "drop_path1")),
    "timm-layerscale-droppath": Family(
        _timm_everything,
        lambda m: m.blocks[-1],
        ("norm2", "ls1", "drop_path1"),
    ),
    "torchvision": Family(_torchvision, lambda m: m.encoder.layers[-1], ("ln_2",)),
    "vit": Family(_vit, lambda m: next(b for b in m.modules() if type(b).__name__ == "ViTLayer"), ("layernorm_after",)),
    "dinov2": Family(_dinov2, lambda m: m.dinov2.encoder.layer[-1], _DINO),
    "dinov2-registers": Family(
        _dinov2_with_registers,
        lambda m: m.dinov2_with_registers.encoder.layer[-1],
        _DINO,
    ),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The same model at each call, with weights far from their initial values, in evaluation mode."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        model = FAMILIES[name].build().to(dtype).eval()
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, dtype=dtype)
    return model
