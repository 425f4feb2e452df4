"""Sampling with GaussianDiffusion: the steps, the seeds, and what may not happen on the way."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mmfast
from mmfast import NoiseSchedule, ops, reference, sample_seeds
from mmfast.commands._demo_unet import UNet
from mmfast.models import GaussianDiffusion
from tests.models.diffusion_networks import PREDICTIONS, SHAPE, Function, OnePoint, Pointwise, images, make

SAMPLERS: dict[str, dict[str, Any]] = {
    "ddim": {"sampler": "ddim"},
    "ddim_eta": {"sampler": "ddim", "eta": 0.7},
    "ddpm": {"sampler": "ddpm"},
}


@pytest.mark.parametrize("guidance", [None, 2.5], ids=["plain", "guided"])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_sampling_is_the_references_steps(name: str, prediction_type: str, guidance: float | None) -> None:
    """In float64, with the noise that each step's stream has."""
    diffusion, labels = make(prediction_type).double().eval(), torch.tensor([0, 1, 3])
    options = SAMPLERS[name]
    states, predictions = diffusion.sample(
        3, condition=labels, steps=5, guidance=guidance, seed=9, return_all=True, **options
    )
    schedule, seeds = diffusion.schedule, sample_seeds(9, 3)
    x = reference.noise_like(torch.empty(3, *SHAPE, dtype=torch.float64), seeds)
    torch.testing.assert_close(states[0], x)
    ddpm = options["sampler"] == "ddpm"
    extra = {} if ddpm else {"eta": options.get("eta", 0.0), "use_clipped_model_output": True}
    step = reference.ddpm_step if ddpm else reference.ddim_step
    for i, (t, t_prev) in enumerate(pairwise([800, 600, 400, 200, 0, -1])):
        now, before = (torch.full((3,), v) for v in (t, t_prev))
        output = diffusion.model(x, now, labels)
        if guidance is not None:
            output = torch.cat((diffusion.model(x, now, torch.full((3,), 4)), output))
        x, x0 = step(output, now, before, x, schedule, guidance=guidance, seed=seeds, return_x0=True, **extra)
        torch.testing.assert_close(states[i + 1], x.detach(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(predictions[i], x0.detach(), rtol=1e-9, atol=1e-9)
    assert torch.equal(predictions[-1], states[-1])
    assert predictions.abs().max() <= 1.0 + 1e-12  # as the schedule clips


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_a_perfect_network_samples_the_data(prediction_type: str, name: str) -> None:
    schedule = NoiseSchedule(prediction_type=prediction_type)
    image = images(1)[0]
    diffusion = GaussianDiffusion(OnePoint(image, schedule), schedule, image_shape=SHAPE)
    found = diffusion.sample(4, steps=10, seed=0, **SAMPLERS[name])
    torch.testing.assert_close(found, image.expand(4, *SHAPE), atol=2e-4, rtol=0)
    assert float(diffusion(image.expand(4, *SHAPE))) < 1e-9


@pytest.mark.parametrize("guidance", [None, 2.0], ids=["plain", "guided"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_do_not_depend_on_the_batch(name: str, guidance: float | None) -> None:
    diffusion, labels = make(), torch.tensor([0, 1, 2, 3, 0, 1])
    options = {"steps": 5, "guidance": guidance, "seed": 21, **SAMPLERS[name]}
    six = diffusion.sample(6, condition=labels, **options)
    assert torch.equal(six, diffusion.sample(6, condition=labels, batch_size=4, **options))
    assert torch.equal(six[:3], diffusion.sample(3, condition=labels[:3], **options))
    options["seed"] = sample_seeds(21, 6)[2:]
    assert torch.equal(six[2:], diffusion.sample(4, condition=labels[2:], **options))
    whole = diffusion.sample(4, condition=labels[2:], return_all=True, **options)
    parts = diffusion.sample(4, condition=labels[2:], return_all=True, batch_size=3, **options)
    assert whole[0].shape == whole[1].shape == (6, 4, *SHAPE)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert not torch.equal(six, diffusion.sample(6, condition=labels, **{**options, "seed": 22}))


def test_a_convolutional_network_gives_the_same_up_to_rounding() -> None:
    diffusion = GaussianDiffusion(UNet(1, (8, 16)), image_shape=(1, 8, 8), null_condition=10)
    nn.init.normal_(diffusion.model.conv_out.weight, std=0.2)
    options = {"condition": torch.arange(6), "steps": 4, "guidance": 2.0, "seed": 5, "sampler": "ddpm"}
    torch.testing.assert_close(diffusion.sample(6, **options), diffusion.sample(6, batch_size=4, **options))


@pytest.mark.triton
@pytest.mark.parametrize("guidance", [None, 2.0], ids=["plain", "guided"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_kernels_make_the_same_samples(name: str, guidance: float | None, device: torch.device) -> None:
    diffusion, labels = make("v_prediction").to(device), torch.tensor([0, 1, 3], device=device)
    options = {"condition": labels, "steps": 3, "guidance": guidance, "seed": 2, "return_all": True, **SAMPLERS[name]}
    x = images().to(device)
    with mmfast.backend("triton"):
        found = diffusion.sample(3, **options, cuda_graph=False)
        loss = diffusion.eval()(x, 1, seed=4)
    with mmfast.backend("torch"):
        expected = diffusion.sample(3, **options, cuda_graph=False)
        expected_loss = diffusion(x, 1, seed=4)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=1e-5)


def test_seeds_none_are_new_and_follow_the_generator() -> None:
    diffusion = make()
    torch.manual_seed(1)
    first, second = diffusion.sample(2, steps=2), diffusion.sample(2, steps=2)
    assert (first != second).any()
    torch.manual_seed(1)
    assert torch.equal(first, diffusion.sample(2, steps=2))


def test_every_part_is_in_the_mode_it_was_in() -> None:
    diffusion = make().train()
    diffusion.model.label.eval()
    found = diffusion.sample(2, steps=2, seed=1)  # in training mode dropout would change it
    assert torch.equal(found, diffusion.eval().sample(2, steps=2, seed=1))
    diffusion.train().model.label.eval()
    with pytest.raises(ValueError, match="condition must have shape"):
        diffusion.sample(2, condition=torch.zeros(3, dtype=torch.int64))
    assert diffusion.training
    assert diffusion.model.dropout.training
    assert not diffusion.model.label.training
    assert not diffusion.sample(2, steps=2).requires_grad


def test_a_channels_last_network_gets_channels_last() -> None:
    formats: list[bool] = []

    class Network(nn.Conv2d):
        def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
            formats.append(x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous())
            return super().forward(x)

    diffusion = GaussianDiffusion(Network(2, 2, 3, padding=1), image_shape=(2, 4, 4), null_condition=1)
    options = {"condition": 0, "guidance": 2.0, "steps": 3, "seed": 0}
    expected = diffusion.sample(2, **options)
    assert formats == [False] * 3
    found = diffusion.to(memory_format=torch.channels_last).sample(2, **options)
    assert formats[3:] == [True] * 3
    torch.testing.assert_close(found, expected)


def test_denoise_starts_in_the_middle() -> None:
    seen: list[int] = []
    schedule = NoiseSchedule()
    image = images(1)[0]
    exact = OnePoint(image, schedule)

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.append(int(t[0]))
        return exact(x, t)

    diffusion = GaussianDiffusion(Function(network), schedule, image_shape=SHAPE)
    noised = diffusion.q_sample(image.expand(2, *SHAPE), 450, seed=3)
    torch.testing.assert_close(
        noised, ops.q_sample(image.expand(2, *SHAPE), 450, schedule, seed=sample_seeds(3, 2)), rtol=0, atol=0
    )
    found = diffusion.denoise(noised, 450, steps=5)
    assert seen == [450, 400, 200, 0]
    torch.testing.assert_close(found, image.expand(2, *SHAPE), atol=2e-4, rtol=0)
    states, predictions = diffusion.denoise(noised, 400, steps=5, return_all=True)
    assert states.shape == predictions.shape == (4, 2, *SHAPE)
    assert torch.equal(states[0], noised)
    # From pure noise it is what `sample` does.
    start = ops.noise_like(noised, sample_seeds(8, 2))
    whole = diffusion.denoise(start, 800, steps=5, seed=8, sampler="ddpm")
    assert torch.equal(whole, diffusion.sample(2, steps=5, seed=8, sampler="ddpm"))


def test_interpolation() -> None:
    diffusion, (x1, x2) = make("sample").eval(), images(4).split(2)
    labels, options = torch.tensor([1, 2]), {"steps": 5, "seed": 4}
    row = diffusion.interpolate(x1, x2, 300, [0.0, 0.25, 1.0], condition=labels, guidance=2.0, **options)
    assert row.shape == (3, 2, *SHAPE)
    for weight, found in zip((0.0, 0.25, 1.0), row, strict=True):
        single = diffusion.interpolate(x1, x2, 300, weight, condition=labels, guidance=2.0, **options)
        assert torch.equal(found, single)
        # Both noised with the same noise, then mixed.
        states = [diffusion.q_sample(x, 300, seed=4) for x in (x1, x2)]
        mixed = (1 - weight) * states[0] + weight * states[1]
        expected = diffusion.denoise(mixed, 300, condition=labels, guidance=2.0, **options)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    default = diffusion.interpolate(x1, x2, **options)
    assert torch.equal(default, diffusion.interpolate(x1, x2, 500, 0.5, **options))
    # With t = 0 hardly any noise, a network that keeps x as it is returns the mix.
    same = GaussianDiffusion(Function(lambda x, t: x), diffusion.schedule, image_shape=SHAPE)
    torch.testing.assert_close(same.interpolate(x1, x2, 0, seed=1), (x1 + x2) / 2, atol=0.05, rtol=0)


class NoHost(TorchDispatchMode):
    """Raises where a value of the tensors is asked for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a value was read on the host")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("guidance", [None, 2.0], ids=["plain", "guided"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_sampling_reads_nothing_on_the_host(name: str, guidance: float | None) -> None:
    """Tensors without values, and tensors whose values must not be asked for."""
    diffusion = make()
    options = {"steps": 3, "guidance": guidance, "return_all": True, **SAMPLERS[name]}
    seeds, labels = sample_seeds(1, 4), torch.tensor([0, 1, 2, 3])
    with NoHost():
        diffusion.sample(4, condition=labels, seed=seeds, **options)
    diffusion.to("meta")
    for seed in (None, 1, seeds.to("meta")):
        states, predictions = diffusion.sample(4, condition=labels.to("meta"), seed=seed, **options)
        assert states.is_meta
        assert states.shape == predictions.shape == (4, 4, *SHAPE)
    x = torch.empty(4, *SHAPE, device="meta")
    assert diffusion.interpolate(x, x, 10, [0.1, 0.2], steps=3).shape == (2, 4, *SHAPE)
    diffusion(x, labels.to("meta")).backward()
    assert diffusion.model.scale.grad.is_meta


class Counted(TorchDispatchMode):
    """Counts operations that compute or copy: those that launch a kernel on a GPU."""

    FREE = ("expand", "select", "slice", "detach", "empty", "lift_fresh")  # the last: of the schedule, on the host

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.removesuffix("_forward")
        if name not in self.FREE:
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"noise_like": 1, "ddim_step": 25, "mul": 25}),
        ({"sampler": "ddpm"}, {"noise_like": 1, "ddpm_step": 25, "mul": 25}),
        ({"guidance": 2.0}, {"noise_like": 1, "ddim_step": 25, "mul": 25, "cat": 2, "full_like": 1}),
    ],
    ids=["ddim", "ddpm", "guided"],
)
def test_a_step_is_one_launch_beside_the_network(
    options: dict[str, Any], expected: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where kernels serve: the batch is doubled for guidance once, and coefficients and timesteps cost nothing."""
    monkeypatch.setattr(mmfast.backends, "torch_serves", lambda *tensors: False)
    monkeypatch.setattr(mmfast.backends, "choose", lambda op, facts: "triton")
    diffusion = GaussianDiffusion(
        Function(lambda x, t, label: x * 0.5), image_shape=SHAPE, null_condition=4, condition_dropout=0.0
    )
    diffusion.to("meta")
    labels = torch.zeros(3, dtype=torch.int64, device="meta")
    seeds = sample_seeds(0, 3).to("meta")
    with Counted() as counted:
        diffusion.sample(3, condition=labels, seed=seeds, **options)
    assert counted.count == Counter(expected)


def test_learned_variance_samples_and_does_not_train() -> None:
    schedule = NoiseSchedule(variance_type="learned_range")

    def network(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat((0.4 * x, torch.tanh(x)), 1)

    diffusion = GaussianDiffusion(Function(network), schedule, image_shape=SHAPE)
    seeds = sample_seeds(3, 2)
    x = ops.noise_like(torch.empty(2, *SHAPE), seeds)
    for t, t_prev in pairwise([500, 0, -1]):
        x = reference.ddpm_step(network(x, x), *(torch.full((2,), v) for v in (t, t_prev)), x, schedule, seed=seeds)
    torch.testing.assert_close(diffusion.sample(2, steps=2, sampler="ddpm", seed=3), x, rtol=1e-4, atol=1e-5)
    plain = GaussianDiffusion(Function(lambda x, t: 0.4 * x), image_shape=SHAPE)
    torch.testing.assert_close(diffusion.sample(2, steps=3, seed=3), plain.sample(2, steps=3, seed=3))
    with pytest.raises(ValueError, match="training needs a fixed variance_type, got 'learned_range'"):
        diffusion(images())


def test_zero_terminal_snr_samples_from_pure_noise() -> None:
    words = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    schedule = NoiseSchedule(prediction_type="v_prediction", **words)
    image = images(1)[0]
    diffusion = GaussianDiffusion(OnePoint(image, schedule), schedule, image_shape=SHAPE)
    torch.testing.assert_close(diffusion.sample(2, steps=5, seed=0), image.expand(2, *SHAPE), atol=2e-4, rtol=0)
    epsilon = GaussianDiffusion(Pointwise(), NoiseSchedule(**words), image_shape=SHAPE)
    with pytest.raises(ValueError, match="use 'v_prediction' or 'sample'"):
        epsilon.sample(2, steps=5)


EMPTY = {"sample": (0, *SHAPE), "interpolate": (0, *SHAPE), "row": (2, 0, *SHAPE)}


def test_no_images_at_all() -> None:
    diffusion, x = make(), torch.empty(0, *SHAPE)
    assert diffusion.sample(0, steps=2).shape == EMPTY["sample"]
    assert diffusion.interpolate(x, x, steps=2).shape == EMPTY["interpolate"]
    assert diffusion.interpolate(x, x, weight=[0.2, 0.3], steps=2).shape == EMPTY["row"]
    assert diffusion(x, reduction="sum").item() == 0
