"""`NormedPatchEmbed`, vit-pytorch's patch embedding, against its formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmfast.models import ViT
from mmfast.nn import NormedPatchEmbed


def random_embed(**kwargs: object) -> NormedPatchEmbed:
    embed = NormedPatchEmbed(patch_size=(2, 4), in_chans=3, embed_dim=5, dtype=torch.float64, **kwargs)
    with torch.no_grad():
        for p in embed.parameters():
            p.normal_()
    return embed


@pytest.mark.parametrize("output_fmt", [None, "NLC", "NCL", "NHWC", "NCHW"])
@torch.no_grad()
def test_norm_project_norm(output_fmt: str | None) -> None:
    embed = random_embed(img_size=(6, 8), output_fmt=output_fmt)
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    patches = F.unfold(x, (2, 4), stride=(2, 4)).transpose(1, 2)  # [B, N, C * P * P], channel first as the kernel
    patches = F.layer_norm(patches, (24,), embed.norm_in.weight, embed.norm_in.bias)
    patches = F.linear(patches, embed.proj.weight.flatten(1), embed.proj.bias)
    expected = F.layer_norm(patches, (5,), embed.norm.weight, embed.norm.bias)
    expected = {
        "NCL": expected.transpose(1, 2),
        "NHWC": expected.unflatten(1, (3, 2)),
        "NCHW": expected.transpose(1, 2).unflatten(2, (3, 2)),
    }.get(output_fmt or "NLC", expected)
    torch.testing.assert_close(embed(x), expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_padding_and_size_checks() -> None:
    embed = random_embed(img_size=8, strict_img_size=False, dynamic_img_pad=True)
    x = torch.randn(1, 3, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(embed(x), embed(F.pad(x, (0, 2, 0, 1))), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"image size must be \(8, 8\), got \(6, 8\)"):
        random_embed(img_size=8)(torch.randn(1, 3, 6, 8, dtype=torch.float64))


@torch.no_grad()
def test_serves_a_vit_of_any_image_size() -> None:
    torch.manual_seed(0)
    vit = ViT(
        img_size=8,
        patch_size=4,
        embed_dim=12,
        depth=1,
        num_heads=3,
        embed_layer=NormedPatchEmbed,
        dynamic_img_size=True,
    ).eval()
    x = torch.randn(2, 3, 8, 8)
    fixed = ViT(img_size=8, patch_size=4, embed_dim=12, depth=1, num_heads=3, embed_layer=NormedPatchEmbed).eval()
    fixed.load_state_dict(vit.state_dict(), strict=True)
    torch.testing.assert_close(vit(x), fixed(x))
    assert vit(torch.randn(2, 3, 12, 16)).isfinite().all()
