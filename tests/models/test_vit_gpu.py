"""A ViT on a GPU, where the kernels serve it by default."""

from __future__ import annotations

import copy

import pytest
import torch

import mmfast
from mmfast.models import ViT

pytestmark = pytest.mark.gpu
CONFIG = {"img_size": 64, "patch_size": 16, "embed_dim": 192, "depth": 4, "num_heads": 3, "num_classes": 10}


def pair(device: torch.device, dtype: torch.dtype, **options: object) -> tuple[ViT, torch.Tensor]:
    model = ViT(**{**CONFIG, "init_values": 0.1, **options}).to(device, dtype)
    return model, torch.randn(8, 3, 64, 64, device=device).to(dtype)


def gradients(model: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    loss = torch.nn.functional.cross_entropy(model(x).float(), torch.arange(8, device=x.device))
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_outputs_and_gradients_are_as_good_as_torch(dtype: torch.dtype, device: torch.device) -> None:
    """Against float64, the kernels' error is at most twice that of PyTorch's own ops in the same dtype."""
    model, x = pair(device, dtype)
    assert {choice.backend for choice in mmfast.explain(model, x)} == {"triton"}
    truth = gradients(copy.deepcopy(model).double(), x.double())
    found = gradients(model, x)
    with mmfast.backend("torch"):
        peer = gradients(model, x)
    ours = sum(relative(a, t) for a, t in zip(found, truth, strict=True))
    theirs = sum(relative(a, t) for a, t in zip(peer, truth, strict=True))
    assert ours <= 2 * theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_compiled_equals_eager(dtype: torch.dtype, device: torch.device) -> None:
    model, x = pair(device, dtype)
    compiled = torch.compile(model, fullgraph=True)
    bound = 1e-4 if dtype == torch.float32 else 5e-2
    for a, b in zip(gradients(compiled, x), gradients(model, x), strict=True):
        assert relative(a, b) <= bound


def test_training_under_autocast_learns(device: torch.device) -> None:
    """bfloat16 branches onto a float32 residual stream, drop path on: the loss of one batch goes to zero."""
    torch.manual_seed(0)
    model, x = pair(device, torch.float32, drop_path_rate=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    labels = torch.arange(8, device=device)
    for _ in range(60):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(x).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss) < 0.1


def test_captured_in_a_graph(device: torch.device) -> None:
    model, x = pair(device, torch.bfloat16)
    model.eval()
    with torch.no_grad():
        for _ in range(2):
            model(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, model(x))


def test_same_bits_twice(device: torch.device) -> None:
    model, x = pair(device, torch.bfloat16)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        first, second = gradients(model, x), gradients(model, x)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
