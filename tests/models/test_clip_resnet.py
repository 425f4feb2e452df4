"""The attention pool of CLIP's ResNets: one query, projections applied to one vector instead of to every token."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfast.models import CLIP
from mmfast.nn.attention_pool_2d import AttentionPool2d


def build(size: int | tuple[int, int] = 3, dim: int = 24, heads: int = 3, out: int | None = 10) -> AttentionPool2d:
    return AttentionPool2d(size, dim, heads, out).double()


def plainly(pool: AttentionPool2d, x: Tensor) -> Tensor:
    """By the formula, with all the keys and values."""
    batch, channels = x.shape[:2]
    tokens = x.flatten(2).transpose(1, 2)
    tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1) + pool.positional_embedding
    heads, d = pool.num_heads, channels // pool.num_heads
    q, k, v = (
        projection(t).view(batch, -1, heads, d).transpose(1, 2)
        for projection, t in ((pool.q_proj, tokens[:, :1]), (pool.k_proj, tokens), (pool.v_proj, tokens))
    )
    p = (q @ k.transpose(-1, -2) / math.sqrt(d)).softmax(dim=-1)
    return pool.c_proj((p @ v).transpose(1, 2).reshape(batch, channels))


def assert_same(ours: Any, theirs: Any, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "strided": lambda x: torch.cat([x, x], dim=-1)[..., : x.shape[-1]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("size", "dim", "heads", "out"),
    [(3, 24, 3, 10), ((2, 5), 16, 1, None), (1, 8, 8, 4)],
    ids=["3x3", "2x5_one_head", "one_position"],
)
def test_equals_the_formula(layout: str, size: Any, dim: int, heads: int, out: int | None) -> None:
    pool = build(size, dim, heads, out)
    rows, columns = (size, size) if isinstance(size, int) else size
    x = LAYOUTS[layout](torch.randn(3, dim, rows, columns, dtype=torch.float64)).detach().requires_grad_()
    ours, theirs = pool(x), plainly(pool, x)
    assert_same(ours, theirs)
    seed = torch.randn_like(theirs)
    inputs = [x, *pool.parameters()]
    assert_same(torch.autograd.grad(ours, inputs, seed), torch.autograd.grad(theirs, inputs, seed), 1e-10)


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
def test_projections_with_hooks_are_called_on_the_tokens(name: str) -> None:
    pool = build()
    x = torch.randn(2, 24, 3, 3, dtype=torch.float64)
    expected = pool(x)
    seen: list[torch.Size] = []
    handle = getattr(pool, name).register_forward_hook(lambda m, i, o: seen.append(o.shape))
    assert_same(pool(x), expected)
    assert seen == [(2, 1 if name == "q_proj" else 10, 24)]
    handle.remove()
    pool(x)
    assert len(seen) == 1


def test_a_replaced_projection_counts() -> None:
    pool = build()
    x = torch.randn(2, 24, 3, 3, dtype=torch.float64)

    class Adapted(nn.Module):
        """As LoRA's: the layer and something beside it."""

        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner, self.weight, self.bias = inner, inner.weight, inner.bias

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + x

    before = pool(x)
    pool.v_proj = Adapted(pool.v_proj)  # type: ignore[assignment]
    assert not torch.allclose(pool(x), before, atol=1e-3)
    assert_same(pool(x), plainly(pool, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision_is_as_near_to_float64_as_the_projected_tokens(dtype: torch.dtype) -> None:
    pool = AttentionPool2d(7, 256, 4, 64)
    x = torch.randn(16, 256, 7, 7)
    truth = plainly(copy.deepcopy(pool).double(), x.double())
    pool, x = pool.to(dtype), x.to(dtype)
    with torch.no_grad():
        ours, theirs = pool(x), plainly(pool, x)
    error, allowed = (ours.double() - truth).norm(), (theirs.double() - truth).norm()
    assert error <= 1.5 * allowed, (error / allowed).item()


def test_second_derivatives() -> None:
    pool = build(2, 8, 2, 3)
    x = torch.randn(2, 8, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(pool, (x,))
    assert torch.autograd.gradgradcheck(pool, (x,))


def test_large_scores_stay_finite() -> None:
    pool = build()
    with torch.no_grad():
        pool.q_proj.weight.mul_(1e4)
    x = torch.randn(2, 24, 3, 3, dtype=torch.float64)
    assert_same(pool(x), plainly(pool, x), 1e-9)


def test_invalid_arguments() -> None:
    with pytest.raises(ValueError, match="embed_dim must be a multiple of num_heads, got embed_dim=24, num_heads=5"):
        AttentionPool2d(3, 24, 5)
    with pytest.raises(ValueError, match=r"shape \(B, 24, H, W\) with H \* W = 9, got \(2, 24, 4, 3\)"):
        build()(torch.zeros(2, 24, 4, 3).double())


def test_a_stride_is_an_average_pool() -> None:
    """Anti-aliased: the mean of four positions, then a convolution of stride 1, in both branches."""
    vision = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 32, "patch_size": None, "image_size": 32}
    text = {"context_length": 4, "vocab_size": 9, "width": 8, "heads": 1, "layers": 1}
    block = CLIP(8, vision, text).eval().visual.layer2[0]
    with torch.no_grad():
        block.bn3.weight.fill_(0.7)
    x = torch.randn(2, 32, 8, 8)

    def normed(bn: nn.BatchNorm2d, y: Tensor) -> Tensor:
        return bn.weight.view(-1, 1, 1) * y / math.sqrt(1 + bn.eps) + bn.bias.view(-1, 1, 1)

    y = normed(block.bn1, F.conv2d(x, block.conv1.weight)).relu()
    y = normed(block.bn2, F.conv2d(y, block.conv2.weight, padding=1)).relu()
    y = normed(block.bn3, F.conv2d(y.unflatten(2, (4, 2)).unflatten(4, (4, 2)).mean(dim=(3, 5)), block.conv3.weight))
    short = x.unflatten(2, (4, 2)).unflatten(4, (4, 2)).mean(dim=(3, 5))
    short = normed(block.downsample[2], F.conv2d(short, block.downsample[1].weight))
    assert_same(block(x), (y + short).relu(), 1e-5)
