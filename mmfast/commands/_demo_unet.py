"""A small U-Net of plain torch modules, conditioned on a timestep and a class: what `mmfast demo diffusion` trains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 8


class UNet(nn.Module):
    """A U-Net with one residual block a level each way, and self-attention at the smallest size.

    Its input and output have one shape (B, in_channels, H, W), H and W multiples of 2^(levels - 1). Class index
    `num_classes` says that no class is asked for.
    """

    def __init__(self, in_channels: int = 1, channels: Sequence[int] = (32, 64), num_classes: int = 10) -> None:
        super().__init__()
        width = 4 * channels[0]
        self.time = TimeEmbedding(channels[0], width)
        self.label = nn.Embedding(num_classes + 1, width)
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        pairs = list(pairwise(channels))
        self.down = nn.ModuleList(ResidualBlock(c, c, width) for c in channels)
        self.smaller = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairs)
        self.middle = nn.ModuleList((SelfAttention(channels[-1]), ResidualBlock(channels[-1], channels[-1], width)))
        self.up = nn.ModuleList(ResidualBlock(2 * c, c, width) for c in reversed(channels))
        self.larger = nn.ModuleList(nn.Conv2d(b, a, 3, padding=1) for a, b in reversed(pairs))
        self.norm_out = nn.GroupNorm(GROUPS, channels[0])
        self.conv_out = nn.Conv2d(channels[0], in_channels, 3, padding=1)
        _begin_with_zeros(self.conv_out)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """What is predicted of images (B, C, H, W) at timesteps (B,) of classes (B,)."""
        embedding = F.silu(self.time(t) + self.label(labels))
        h = self.conv_in(x)
        skips = []
        for level, block in enumerate(self.down):
            h = block(self.smaller[level - 1](h) if level else h, embedding)
            skips.append(h)
        attention, block = self.middle
        h = block(attention(h), embedding)
        for level, block in enumerate(self.up):
            if level:
                h = self.larger[level - 1](F.interpolate(h, scale_factor=2.0, mode="nearest"))
            h = block(torch.cat((h, skips.pop()), 1), embedding)
        return self.conv_out(F.silu(self.norm_out(h)))


class TimeEmbedding(nn.Module):
    """Cosines and sines of a timestep at frequencies from 1 to 1 / 10000, and two linear layers."""

    frequencies: Tensor

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        exponents = torch.arange(dim // 2) / (dim // 2)
        self.register_buffer("frequencies", torch.exp(-math.log(10000.0) * exponents), persistent=False)
        self.linear_1 = nn.Linear(dim, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        """(B,) -> (B, width)."""
        angles = t[:, None].float() * self.frequencies.float()
        waves = torch.cat((angles.cos(), angles.sin()), -1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(waves)))


class ResidualBlock(nn.Module):
    """Two convolutions with norms; the embedding scales and shifts between them."""

    def __init__(self, in_channels: int, out_channels: int, width: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.modulation = nn.Linear(width, 2 * out_channels)
        self.norm2 = nn.GroupNorm(GROUPS, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)
        _begin_with_zeros(self.conv2)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, 1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.shortcut(x) + self.conv2(F.silu(h))


class SelfAttention(nn.Module):
    """Attention of every pixel to every other, added to what came in."""

    def __init__(self, channels: int, head_dim: int = 16) -> None:
        super().__init__()
        self.heads = channels // head_dim
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        _begin_with_zeros(self.proj)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # [B, HW, C]
        qkv = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [3, B, heads, HW, d]
        mixed = F.scaled_dot_product_attention(*qkv.unbind(0))
        return x + self.proj(mixed.transpose(1, 2).flatten(2)).transpose(1, 2).view_as(x)


def _begin_with_zeros(layer: nn.Module) -> None:
    """At first a block passes on what it gets, and the network predicts 0."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
