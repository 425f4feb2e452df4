"""GaussianDiffusion on a GPU: the loop without a wait, its graph, and the same images as on a CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import mmfast
from mmfast import NoiseSchedule
from mmfast.commands._demo_unet import UNet
from mmfast.models import GaussianDiffusion

pytestmark = pytest.mark.gpu
LABELS = [0, 1, 2, 3]
WAYS: dict[str, dict[str, Any]] = {
    "ddim": {},
    "ddim_guided": {"guidance": 2.0},
    "ddim_eta": {"eta": 0.8, "guidance": 2.0},
    "ddpm": {"sampler": "ddpm"},
    "ddpm_guided_all": {"sampler": "ddpm", "guidance": 2.0, "return_all": True},
}


def make(device: torch.device, dtype: torch.dtype = torch.float32) -> GaussianDiffusion:
    torch.manual_seed(0)
    schedule = NoiseSchedule("squaredcos_cap_v2", prediction_type="v_prediction")
    network = UNet(3, (16, 32))
    for part in network.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.normal_(part.weight, std=(2 / part.weight[0].numel()) ** 0.5)
    diffusion = GaussianDiffusion(network, schedule, image_shape=(3, 16, 16), null_condition=10, snr_gamma=5.0)
    return diffusion.to(device, dtype)


def flat(found: Any) -> list[torch.Tensor]:
    return list(found) if isinstance(found, tuple) else [found]


@pytest.mark.parametrize("name", WAYS)
def test_graph_equals_eager_and_nothing_waits(name: str, device: torch.device) -> None:
    diffusion, labels = make(device), torch.tensor(LABELS, device=device)
    options = {"condition": labels, "steps": 5, **WAYS[name]}
    expected = flat(diffusion.sample(4, seed=1, cuda_graph=False, **options))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = flat(diffusion.sample(4, seed=1, cuda_graph=False, **options))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for call in range(3):
        found = flat(diffusion.sample(4, seed=1, cuda_graph=True, **options))
        for a, b, c in zip(found, expected, again, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(c, b, rtol=1e-3, atol=1e-3)
        assert (flat(diffusion.sample(4, seed=call + 2, cuda_graph=True, **options))[0] != found[0]).any()
    fresh = [flat(diffusion.sample(4, cuda_graph=True, **options))[0] for _ in range(2)]
    assert (fresh[0] != fresh[1]).any()


def test_the_second_call_is_captured(device: torch.device) -> None:
    diffusion = make(device)
    options = {"condition": 2, "steps": 3, "seed": 1}
    first = diffusion.sample(4, **options)
    assert diffusion._graphs._graph is None
    second = diffusion.sample(4, **options)
    assert diffusion._graphs._graph is not None
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)
    diffusion.release_graphs()
    assert diffusion._graphs._graph is None


def test_weights_stay_live_in_the_graph(device: torch.device) -> None:
    diffusion, options = make(device), {"condition": 2, "steps": 3, "seed": 1}
    before = diffusion.sample(4, **options, cuda_graph=True)
    with torch.no_grad():
        diffusion.model.conv_in.weight *= 1.5
    found = diffusion.sample(4, **options, cuda_graph=True)
    assert (found != before).any()
    torch.testing.assert_close(found, diffusion.sample(4, **options, cuda_graph=False), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["ddim_guided", "ddpm"])
def test_the_same_images_as_on_a_cpu(name: str, device: torch.device) -> None:
    diffusion = make(device)
    options = {"steps": 5, "seed": 3, **WAYS[name]}
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False, benchmark=False, deterministic=True):
        found = diffusion.sample(4, condition=torch.tensor(LABELS, device=device), **options)
    expected = copy.deepcopy(diffusion).cpu().sample(4, condition=torch.tensor(LABELS), **options)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-2, atol=1e-2)


def test_the_loss_of_a_seed_is_that_of_a_cpu(device: torch.device) -> None:
    diffusion, x = make(device), torch.rand(8, 3, 16, 16) * 2 - 1
    labels = torch.arange(8)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False, benchmark=False, deterministic=True):
        found = diffusion(x.to(device), labels.to(device), seed=5, reduction="none")
    expected = copy.deepcopy(diffusion).cpu()(x, labels, seed=5, reduction="none")
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-4)


def test_training_waits_for_nothing_and_keeps_no_noise(device: torch.device) -> None:
    diffusion, x = make(device), torch.rand(8, 3, 16, 16, device=device) * 2 - 1
    labels = torch.arange(8, device=device)
    diffusion(x, labels).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = diffusion(x, labels)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()
    chosen = {choice.op: choice.backend for choice in mmfast.explain(diffusion, x, labels)}
    assert chosen["noise_mse"] == "triton"
    assert chosen["q_sample"] == "triton"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision(dtype: torch.dtype, device: torch.device) -> None:
    diffusion, options = make(device, dtype), {"condition": 1, "steps": 5, "guidance": 2.0, "seed": 2}
    found = diffusion.sample(4, cuda_graph=True, **options)
    assert found.dtype == dtype
    assert found.isfinite().all()
    exact = make(device).sample(4, cuda_graph=False, **options)
    assert float((found.float() - exact).norm() / exact.norm()) < 0.05
    assert diffusion(torch.zeros(4, 3, 16, 16, device=device), 1).isfinite()


def test_channels_last_is_kept(device: torch.device) -> None:
    diffusion = make(device).to(memory_format=torch.channels_last)
    options = {"condition": 1, "steps": 3, "guidance": 2.0, "seed": 2}
    found = diffusion.sample(4, **options, cuda_graph=False)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, make(device).sample(4, **options, cuda_graph=False), rtol=2e-2, atol=2e-2)
