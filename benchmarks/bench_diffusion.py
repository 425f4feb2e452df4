"""Sampling and training with `mmfast.models.GaussianDiffusion` beside diffusers' schedulers, around one small U-Net.

Sampling is 25 DDIM steps with guidance from the same noise: `eager` is a pipeline's loop with diffusers' DDIMScheduler,
`compile` the same around a compiled network, `mmfast` the facade without a graph, `mmfast+cuda_graph` with the whole
loop captured. Training is the loss and its gradients: `eager` draws noise, adds it, makes the target and compares, as
diffusers' scripts do. Launch gaps are part of these times, as a user has them. On a GPU `test_launches` prints how
often the host launches something in one sampling loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmfast
from mmfast.benchmarks import _harness
from mmfast.benchmarks._harness import DTYPES, Options, Spec, Unavailable
from mmfast.commands._demo_unet import UNet
from mmfast.models import GaussianDiffusion

STEPS, GUIDANCE, CLASSES = 25, 2.0, 10
WORDS = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
# (batch, pixels a side) and dtype, the most important first.
GPU_SHAPES = (((4, 32), "bf16"), ((64, 32), "bf16"), ((1, 32), "bf16"))
CPU_SHAPES = (((4, 8), "fp32"),)
SAMPLING = ("eager", "compile", "mmfast", "mmfast+cuda_graph", "mmfast+compile")
# Of 25 steps in bf16 each implementation rounds in its own places.
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 0.2}


def measurements(options: Options) -> Iterator[tuple[Spec, int]]:
    on_gpu = options.device == "cuda"
    shapes = GPU_SHAPES if on_gpu else CPU_SHAPES
    names = [name for name in SAMPLING if on_gpu or not name.endswith("cuda_graph")]
    yield from _harness.specs("diffusion_sampling", options, shapes, ("inference",), names)
    yield from _harness.specs("diffusion_training", options, shapes[:2], ("training",), ("eager", "mmfast"))


@cache
def model(size: int, device: str, dtype: torch.dtype) -> GaussianDiffusion:
    torch.manual_seed(0)
    network = UNet(3, (64, 128, 256) if device == "cuda" else (8, 16), CLASSES)
    for part in network.modules():
        if isinstance(part, nn.Conv2d):  # some begin with zeros
            nn.init.normal_(part.weight, std=(1 / part.weight[0].numel()) ** 0.5)
    made = GaussianDiffusion(
        network,
        mmfast.NoiseSchedule.from_diffusers(WORDS),
        image_shape=(3, size, size),
        null_condition=CLASSES,
        condition_dropout=0.0,
    )
    return made.to(device, dtype).eval()


@cache
def compiled(network: nn.Module) -> Callable[..., Tensor]:
    return _harness.compiled(network)


def scheduler(name: str) -> Any:
    try:
        import diffusers
    except ImportError as missing:
        raise Unavailable(f"diffusers: {missing}") from missing
    return getattr(diffusers, name)(**WORDS)


def diffusers_loop(network: Callable[..., Tensor], x: Tensor, labels: Tensor) -> Tensor:
    """What a pipeline does: timesteps on the device, the batch doubled for guidance, and the scheduler's step."""
    steps = scheduler("DDIMScheduler")
    steps.set_timesteps(STEPS, device=x.device)
    both = torch.cat((torch.full_like(labels, CLASSES), labels))
    for t in steps.timesteps:
        unconditional, conditional = network(torch.cat((x, x)), t.expand(len(both)), both).chunk(2)
        output = unconditional + GUIDANCE * (conditional - unconditional)
        x = steps.step(output, t, x, use_clipped_model_output=True).prev_sample
    return x


def sampler(provider: str, diffusion: GaussianDiffusion, batch: int) -> Callable[[], Tensor]:
    """A call that samples."""
    device = diffusion.schedule.alpha_table.device
    labels, seeds = torch.arange(batch, device=device) % CLASSES, mmfast.sample_seeds(0, batch).to(device)
    if provider in ("eager", "compile"):
        network = diffusion.model if provider == "eager" else compiled(diffusion.model)
        dtype = next(diffusion.parameters()).dtype
        empty = torch.empty(batch, *diffusion.image_shape, device=device, dtype=dtype)
        scheduler("DDIMScheduler")

        def peer() -> Tensor:
            with torch.no_grad():
                return diffusers_loop(network, mmfast.ops.noise_like(empty, seeds), labels)

        return peer
    chosen = diffusion
    if provider == "mmfast+compile":
        chosen = GaussianDiffusion(
            compiled(diffusion.model),  # type: ignore[arg-type]
            diffusion.schedule,
            image_shape=diffusion.image_shape,
            null_condition=CLASSES,
        ).eval()
    graph = provider == "mmfast+cuda_graph"
    return lambda: chosen.sample(batch, condition=labels, seed=seeds, steps=STEPS, guidance=GUIDANCE, cuda_graph=graph)


def trainer(provider: str, diffusion: GaussianDiffusion, images: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """A call that returns the loss of a training step and leaves its gradients."""
    noise_scheduler = scheduler("DDPMScheduler") if provider == "eager" else None

    def loss() -> Tensor:
        if noise_scheduler is None:
            return diffusion(images, labels)
        noise = torch.randn_like(images)
        t = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(images),), device=images.device)
        noised = noise_scheduler.add_noise(images, noise, t)
        target = noise_scheduler.get_velocity(images, noise, t)
        return nn.functional.mse_loss(diffusion.model(noised, t, labels).float(), target.float())

    def call() -> Tensor:
        for parameter in diffusion.parameters():
            parameter.grad = None
        found = loss()
        found.backward()
        return found

    return call


def check_close(found: Tensor, truth: Tensor, dtype: torch.dtype, name: str) -> None:
    error = float((found.float() - truth.float()).norm() / truth.float().norm())
    if not error <= TOLERANCE[dtype]:
        raise ValueError(f"{name}: the result is off by {error:.2g} from diffusers' in float32")


def test_diffusion(spec: Spec, pass_number: int, options: Options, measure: Callable[..., None]) -> None:
    dtype, (batch, size) = DTYPES[spec.dtype], spec.shape
    diffusion = model(size, options.device, dtype)
    if spec.mode == "training":
        images = (torch.rand(batch, 3, size, size, device=options.device) * 2 - 1).to(dtype)
        call = trainer(spec.provider, diffusion, images, torch.arange(batch, device=options.device) % CLASSES)
        assert call().isfinite()
    else:
        call = sampler(spec.provider, diffusion, batch)
        if pass_number == 0:
            truth = sampler("eager", model(size, options.device, torch.float32), batch)()
            check_close(call(), truth, dtype, spec.provider)
    measure(call, images=batch, gaps=True)


def test_launches(options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    """Print the launches of one sampling loop: what the host asks for, and the kernels that run."""
    if options.device != "cuda":
        pytest.skip("diffusion: launches are counted on a GPU")
    diffusion = model(32, "cuda", torch.bfloat16)
    for provider in SAMPLING:
        try:
            call = sampler(provider, diffusion, 4)
        except Unavailable as reason:
            with capsys.disabled():
                print(f"\ndiffusion_sampling {provider}: not counted: {reason}")
            continue
        for _ in range(2):
            call()
        torch.cuda.synchronize()
        with torch.profiler.profile() as profile:
            call()
            torch.cuda.synchronize()
        events = profile.events()
        asked = sum("LaunchKernel" in event.name or "GraphLaunch" in event.name for event in events)
        ran = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in events)
        waits = sum(event.name in ("cudaStreamSynchronize", "cudaMemcpy") for event in events)
        with capsys.disabled():
            print(f"\ndiffusion_sampling {provider}, {STEPS} steps: {asked} launches, {ran} kernels, {waits} waits")
