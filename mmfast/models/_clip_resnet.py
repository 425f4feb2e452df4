"""The ResNet of CLIP: three convolutions in the stem, anti-aliased strides, attention pooling."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..nn.attention_pool_2d import AttentionPool2d
from ..nn.patch_embed import Size, check_normalisation, pair_of_sizes
from ..ops._patch_embed_torch import normalised
from ._clip_config import VisionConfig
from ._clip_vision import check_images
from ._pos_embed import resample_pos_embed

EXPANSION = 4
STRIDE = 32


class BatchNorm2d(nn.BatchNorm2d):
    """torch.nn's, whose statistics can be frozen: it then stays in evaluation mode whatever `train` says."""

    frozen = False

    def train(self, mode: bool = True) -> BatchNorm2d:
        """Switch to training or evaluation."""
        return super().train(mode and not self.frozen)

    def freeze(self) -> None:
        """Keep the statistics as they are."""
        self.frozen = True
        self.eval()


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions in a residual branch; a stride is an average pool after the second.

    Args:
        inplanes: channels of the input.
        planes: channels of the convolutions; the output has four times as many.
        stride: 1 or more.
        factory: device and dtype of the parameters.

    Source: open_clip's `Bottleneck`: parameters `conv1`..`conv3`, `bn1`..`bn3`, `downsample.0`, `downsample.1`.
    """

    def __init__(self, inplanes: int, planes: int, stride: int, factory: dict[str, Any]) -> None:
        super().__init__()
        width = planes * EXPANSION
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False, **factory)
        self.bn1 = BatchNorm2d(planes, **factory)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False, **factory)
        self.bn2 = BatchNorm2d(planes, **factory)
        self.act2 = nn.ReLU(inplace=True)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(planes, width, 1, bias=False, **factory)
        self.bn3 = BatchNorm2d(width, **factory)
        self.act3 = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or inplanes != width:
            layers: dict[str, nn.Module] = {
                "-1": nn.AvgPool2d(stride),
                "0": nn.Conv2d(inplanes, width, 1, bias=False, **factory),
                "1": BatchNorm2d(width, **factory),
            }
            self.downsample = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inplanes, H, W) to (B, 4 * planes, H / stride, W / stride)."""
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.avgpool(self.act2(self.bn2(self.conv2(out))))
        out = self.bn3(self.conv3(out))
        return self.act3(out + (x if self.downsample is None else self.downsample(x)))


class ModifiedResNet(nn.Module):
    """The image tower of RN50, RN101, RN50x4, RN50x16 and RN50x64.

    Args:
        config: the tower; its `layers` are four numbers.
        embed_dim: width of the features.
        mean: of the channels; with std, uint8 images are accepted and become `(images / 255 - mean) / std`.
        std: likewise.
        factory: device and dtype of the parameters.

    Source: open_clip's `ModifiedResNet`: parameters `conv1`..`conv3`, `bn1`..`bn3`, `layer1`..`layer4`, `attnpool`;
    its initialisation, drawing the same numbers.
    """

    def __init__(
        self,
        config: VisionConfig,
        embed_dim: int,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        factory: dict[str, Any],
    ) -> None:
        super().__init__()
        layers: Any = config.layers
        width = config.width
        self.image_size = pair_of_sizes("CLIP", "image_size", config.image_size)
        self.output_dim = embed_dim
        self.grad_checkpointing = False
        self.normalisation = check_normalisation("CLIP", mean, std, 3)
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False, **factory)
        self.bn1 = BatchNorm2d(width // 2, **factory)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False, **factory)
        self.bn2 = BatchNorm2d(width // 2, **factory)
        self.act2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False, **factory)
        self.bn3 = BatchNorm2d(width, **factory)
        self.act3 = nn.ReLU(inplace=True)
        self.avgpool = nn.AvgPool2d(2)
        self.layer1 = _layer(width, width, layers[0], 1, factory)
        self.layer2 = _layer(width * EXPANSION, width * 2, layers[1], 2, factory)
        self.layer3 = _layer(width * 2 * EXPANSION, width * 4, layers[2], 2, factory)
        self.layer4 = _layer(width * 4 * EXPANSION, width * 8, layers[3], 2, factory)
        channels = width * 8 * EXPANSION
        self.attnpool = AttentionPool2d(self.grid_size, channels, channels // config.head_width, embed_dim, **factory)
        self._init_weights()

    def _init_weights(self) -> None:
        pool = self.attnpool
        for linear in (pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj):
            nn.init.normal_(linear.weight, std=pool.c_proj.in_features**-0.5)
        for block in self._blocks():
            nn.init.zeros_(block.bn3.weight)

    @property
    def grid_size(self) -> tuple[int, int]:
        """(rows, columns) of the last feature map."""
        return self.image_size[0] // STRIDE, self.image_size[1] // STRIDE

    def _blocks(self) -> list[Any]:
        return [block for layer in (self.layer1, self.layer2, self.layer3, self.layer4) for block in layer]

    def prepare(self, x: Tensor) -> Tensor:
        """Check images, and normalise uint8 ones."""
        check_images(x, self.image_size, self.normalisation)
        if x.dtype == torch.uint8 and self.normalisation is not None:
            return normalised(x, *self.normalisation, 255.0, self.conv1.weight.dtype)
        return x

    def stem(self, x: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to (B, width, H / 4, W / 4)."""
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.bn2(self.conv2(x)))
        return self.avgpool(self.act3(self.bn3(self.conv3(x))))

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to the last feature map (B, 32 * width, H / 32, W / 32)."""
        x = self.stem(self.prepare(x))
        # Recomputing a BatchNorm that trains would count the batch twice in its statistics.
        if self.grad_checkpointing and torch.is_grad_enabled() and not self.bn1.training:
            for block in self._blocks():
                x = checkpoint(block, x, use_reentrant=False)
            return x
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to features (B, embed_dim)."""
        return self.attnpool(self.forward_features(x))

    @torch.no_grad()
    def set_input_size(self, image_size: Size) -> None:
        """Change the image size; the pool's positions are resampled in place, bicubic with antialiasing."""
        old = self.grid_size
        self.image_size = pair_of_sizes("CLIP", "image_size", image_size)
        if self.grid_size != old:
            positions = self.attnpool.positional_embedding
            found = resample_pos_embed(positions[None], self.grid_size, old, 1)[0]
            self.attnpool.positional_embedding = nn.Parameter(found, positions.requires_grad)

    def lock(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freeze the tower; with `freeze_bn_stats` also the statistics of its BatchNorms, for good.

        Raises:
            ValueError: unlocked_groups is not 0.
        """
        if unlocked_groups != 0:
            raise ValueError(f"CLIP: a ResNet is locked as a whole (unlocked_groups=0), got {unlocked_groups}")
        for parameter in self.parameters():
            parameter.requires_grad = False
        for module in self.modules():
            if freeze_bn_stats and isinstance(module, BatchNorm2d):
                module.freeze()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass, where its BatchNorms do not train."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should leave alone, beside vectors."""
        return set()


def _layer(inplanes: int, planes: int, blocks: int, stride: int, factory: dict[str, Any]) -> nn.Sequential:
    first = Bottleneck(inplanes, planes, stride, factory)
    return nn.Sequential(first, *(Bottleneck(planes * EXPANSION, planes, 1, factory) for _ in range(1, blocks)))
