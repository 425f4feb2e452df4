"""CUDA graphs of the sampling loop, recorded from CPU tensors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from mmfast import NoiseSchedule, sample_seeds
from mmfast.models import GaussianDiffusion, _diffusion_graphs
from tests.fake_cuda import FakeCuda, FakeGraph
from tests.models.diffusion_networks import Function, Pointwise

SHAPE = (2, 4, 3)
LABELS = torch.tensor([0, 1, 3])
OPTIONS: dict[str, Any] = {"condition": LABELS, "steps": 3, "guidance": 2.0, "sampler": "ddpm"}


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    monkeypatch.setattr(_diffusion_graphs, "DEVICE", "cpu")
    return FakeCuda(monkeypatch)


def make() -> GaussianDiffusion:
    return GaussianDiffusion(Pointwise(), image_shape=SHAPE, null_condition=4)


def graphs() -> int:
    return len(FakeGraph.made)


def replays() -> int:
    return sum(graph.replays for graph in FakeGraph.made)


def test_the_second_call_is_captured() -> None:
    diffusion, eager = make(), make()
    eager.load_state_dict(diffusion.state_dict())
    for call, seed in enumerate((1, 2, 3, 1)):
        labels = LABELS.roll(call)
        found = diffusion.sample(3, **{**OPTIONS, "condition": labels}, seed=seed)
        expected = eager.sample(3, **{**OPTIONS, "condition": labels}, seed=seed, cuda_graph=False)
        assert torch.equal(found, expected)
        assert (graphs(), replays()) == (min(call, 1), call)
    assert diffusion.training


def test_asked_for_it_is_captured_at_once() -> None:
    diffusion = make()
    found = diffusion.sample(3, **OPTIONS, seed=5, cuda_graph=True)
    assert (graphs(), replays()) == (1, 1)
    assert torch.equal(found, diffusion.sample(3, **OPTIONS, seed=5, cuda_graph=False))
    assert replays() == 1


def test_seeds_are_new_in_each_replay() -> None:
    diffusion = make()
    found = [diffusion.sample(3, **OPTIONS, cuda_graph=True) for _ in range(3)]
    assert (graphs(), replays()) == (1, 3)
    assert (found[0] != found[1]).any()
    assert (found[1] != found[2]).any()


def test_one_graph_for_each_way_to_call() -> None:
    diffusion = make()
    ways: list[dict[str, Any]] = [
        {},
        {"steps": 4},
        {"guidance": 3.0},
        {"sampler": "ddim"},
        {"sampler": "ddim", "eta": 0.5},
        {"return_all": True},
    ]
    for way in ways * 2:
        options = {**OPTIONS, **way, "seed": 1}
        found = diffusion.sample(3, **options, cuda_graph=True)
        expected = diffusion.sample(3, **options, cuda_graph=False)
        pairs = zip(*(y if isinstance(y, tuple) else (y,) for y in (found, expected)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert (graphs(), replays()) == (6, 12)
    diffusion.sample(2, **{**OPTIONS, "condition": LABELS[:2]}, cuda_graph=True)
    noised = diffusion.q_sample(torch.zeros(3, *SHAPE), 500, seed=1)
    assert torch.equal(
        diffusion.denoise(noised, 500, **OPTIONS, seed=2, cuda_graph=True),
        diffusion.denoise(noised, 500, **OPTIONS, seed=2, cuda_graph=False),
    )
    assert graphs() == 8
    diffusion.sample(3, steps=2, cuda_graph=True)  # one too many: the others are dropped
    assert graphs() == 9
    diffusion.sample(3, **OPTIONS, cuda_graph=True)
    assert graphs() == 10


def test_weights_stay_live() -> None:
    diffusion = make()
    first = diffusion.sample(3, **OPTIONS, seed=1, cuda_graph=True)
    with torch.no_grad():
        diffusion.model.scale += 0.2
    found = diffusion.sample(3, **OPTIONS, seed=1, cuda_graph=True)
    assert (found != first).any()
    assert torch.equal(found, diffusion.sample(3, **OPTIONS, seed=1, cuda_graph=False))
    assert graphs() == 1
    diffusion.model.scale = torch.nn.Parameter(torch.tensor(0.1))  # another tensor: captured again
    found = diffusion.sample(3, **OPTIONS, seed=1, cuda_graph=True)
    assert torch.equal(found, diffusion.sample(3, **OPTIONS, seed=1, cuda_graph=False))
    assert graphs() == 2
    diffusion.to(torch.float64)
    assert diffusion.sample(3, **OPTIONS, seed=1, cuda_graph=True).dtype == torch.float64
    assert graphs() == 3


def test_graphs_are_released_and_not_copied() -> None:
    diffusion = make()
    found = diffusion.sample(3, **OPTIONS, seed=1, cuda_graph=True)
    held = diffusion._graphs._graph
    assert held is not None
    copied = copy.deepcopy(diffusion)
    assert copied._graphs._graph is None
    assert torch.equal(copied.sample(3, **OPTIONS, seed=1), found)
    diffusion.release_graphs()
    assert diffusion._graphs._graph is None
    assert not held._graphs
    for _ in range(2):  # as at first: captured when it comes for the second time
        assert graphs() == 1
        assert torch.equal(diffusion.sample(3, **OPTIONS, seed=1), found)
    assert graphs() == 2


def test_a_network_that_waits_for_the_host_runs_without() -> None:
    def network(x: Tensor, t: Tensor) -> Tensor:
        return x * (1.0 if float(x.mean()) > -1e9 else 0.0) * 0.4

    diffusion = GaussianDiffusion(Function(network), NoiseSchedule(), image_shape=SHAPE)
    expected = diffusion.sample(2, steps=3, seed=1)
    with pytest.warns(UserWarning, match="sampling without a CUDA graph: cuda_graph: the model cannot be captured"):
        found = diffusion.sample(2, steps=3, seed=1)
    assert torch.equal(found, expected)
    tries = graphs()
    assert torch.equal(diffusion.sample(2, steps=3, seed=1), expected)
    assert graphs() == tries  # it is not tried again
    with pytest.raises(RuntimeError, match="the model cannot be captured: it reads results on the host"):
        diffusion.sample(2, steps=3, seed=1, cuda_graph=True)


def test_parts_of_a_batch_share_a_graph() -> None:
    diffusion, labels = make(), torch.tensor([0, 1, 2, 3, 0, 1])
    seeds = sample_seeds(3, 6)
    found = diffusion.sample(6, **{**OPTIONS, "condition": labels}, seed=seeds, batch_size=2, cuda_graph=True)
    assert (graphs(), replays()) == (1, 3)
    expected = diffusion.sample(6, **{**OPTIONS, "condition": labels}, seed=seeds, cuda_graph=False)
    assert torch.equal(found, expected)
