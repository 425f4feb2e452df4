"""`mmfast demo diffusion`: train a small class-conditional U-Net to denoise real images, and sample with it."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import mmfast
from mmfast.models import GaussianDiffusion

from ._demo_data import Images, from_minus_one_to_one, load
from ._demo_unet import UNet


@dataclass(frozen=True)
class Recipe:
    """A model and a training run that fit a data set."""

    channels: tuple[int, ...]
    epochs: int
    train_images: int
    batch: int
    classifier_steps: int
    least_agreement: float


RECIPES = {
    "digits": Recipe((24, 48), 32, 1437, 64, 500, 0.9),
    "fashion-mnist": Recipe((16, 32, 64), 3, 16000, 64, 500, 0.7),
}
LEARNING_RATE = 3e-3
STEPS = 25
GUIDANCE = 2.0
PER_CLASS = 20  # samples that the classifier looks at
NORMALS = 1_000_000  # that are compared with the normal distribution
TIMESTEPS = (0, 50, 200, 500, 999)  # of the forward strip
MIXED_AT = 300  # timestep of the row between two images
SHOWN = (3, 8)  # classes of the reverse strip


def run(args: argparse.Namespace) -> int:
    """Run the demo. Returns 1 if the samples are less often of the asked class than the recipe reaches."""
    console = Console()
    recipe = RECIPES[args.data]
    epochs = recipe.epochs if args.epochs is None else args.epochs
    device = torch.device(args.device)
    images = from_minus_one_to_one(load(args.data, args.data_dir))
    torch.manual_seed(args.seed)
    if device.type == "cpu":
        torch.set_num_threads(1)  # tensors this small gain little from more, and lose much on a busy machine
    count = len(images.names)
    schedule = mmfast.NoiseSchedule("squaredcos_cap_v2", prediction_type="v_prediction")
    diffusion = GaussianDiffusion(
        UNet(1, recipe.channels, count), schedule, image_shape=images.train.shape[1:], null_condition=count
    ).to(device)
    size, used = images.train.shape[2:], min(recipe.train_images, len(images.train))
    console.print(
        f"[bold]mmfast demo diffusion[/]: {args.data}, {used} training images of {size[0]} x {size[1]}, U-Net with "
        f"{sum(p.numel() for p in diffusion.parameters()):,} parameters, on {device}"
    )
    start = time.perf_counter()
    losses, averaged = train(diffusion, images, recipe, epochs, device, console)
    console.print(
        f"loss [bold]{smoothed(losses):.3f}[/] after {len(losses)} steps, {time.perf_counter() - start:.0f} s"
    )
    classifier, accuracy = train_classifier(images, recipe, device)

    start = time.perf_counter()
    labels = torch.arange(count, device=device).repeat(PER_CLASS)
    options: dict[str, Any] = {"steps": STEPS, "guidance": GUIDANCE, "seed": args.seed}
    samples = averaged.sample(len(labels), condition=labels, batch_size=100, **options)
    seconds = time.perf_counter() - start
    right = predict(classifier, samples) == labels
    agreement = float(right.float().mean())
    console.print(
        f"[bold]{agreement:.1%}[/] of {len(labels)} samples are what was asked for, says a classifier that is right on "
        f"{accuracy:.1%} of the test images; {STEPS} DDIM steps with guidance {GUIDANCE:g}, {seconds:.0f} s"
    )
    again = averaged.sample(count, condition=labels[:count], batch_size=3, **options)
    difference = float((again - samples[:count]).abs().max())
    console.print(f"the same samples made 3 instead of 100 at a time: largest difference {difference:.1e}")
    compare_with_diffusers(averaged, labels[:count], samples[:count], args.seed, console)
    draw(args, averaged, images, losses, samples, again, right, agreement, console)
    if args.epochs is None and agreement < recipe.least_agreement:
        console.print(f"[red]fewer than {recipe.least_agreement:.0%} of the samples are what was asked for")
        return 1
    return 0


def train(
    diffusion: GaussianDiffusion, images: Images, recipe: Recipe, epochs: int, device: torch.device, console: Console
) -> tuple[list[float], GaussianDiffusion]:
    """Train in place; return the loss of each step, and the model with the moving averages of the weights."""
    inputs, labels = images.train[: recipe.train_images], images.train_labels[: recipe.train_images]
    steps = epochs * (len(inputs) // recipe.batch)
    optimizer = torch.optim.AdamW(diffusion.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=steps, pct_start=0.1)
    average = AveragedModel(diffusion, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    losses: list[float] = []
    columns = (TextColumn("training"), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=steps)
        for epoch in range(1, epochs + 1):
            for batch in torch.randperm(len(inputs)).split(recipe.batch):
                if len(batch) < recipe.batch:
                    break
                loss = diffusion(inputs[batch].to(device), labels[batch].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rates.step()
                average.update_parameters(diffusion)
                losses.append(loss.item())
                progress.advance(task)
                if 5 * len(losses) // steps > 5 * (len(losses) - 1) // steps:
                    progress.console.print(f"step {len(losses)}/{steps}  loss {smoothed(losses):.3f}")
            progress.update(task, description=f"epoch {epoch}/{epochs}  loss {smoothed(losses):.3f}")
    return losses, cast(GaussianDiffusion, average.module)


def smoothed(losses: list[float]) -> float:
    """The mean of the last 50 losses: a single one depends most on the timesteps that were drawn."""
    return sum(losses[-50:]) / len(losses[-50:])


def train_classifier(images: Images, recipe: Recipe, device: torch.device) -> tuple[nn.Module, float]:
    """A small convolutional network and its accuracy on the test images; it has seen no sample."""
    side = images.train.shape[-1] // 4
    layers: list[nn.Module] = []
    for before, after, stride in ((1, 32, 1), (32, 32, 2), (32, 64, 2)):
        layers += [nn.Conv2d(before, after, 3, stride, padding=1), nn.ReLU()]
    layers += [nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * side * side, len(images.names))]
    model = nn.Sequential(*layers).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=recipe.classifier_steps)
    for _ in range(recipe.classifier_steps):
        batch = torch.randint(len(images.train), (64,))
        loss = F.cross_entropy(model(images.train[batch].to(device)), images.train_labels[batch].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
    right = predict(model, images.test.to(device)).cpu() == images.test_labels
    return model, float(right.float().mean())


@torch.no_grad()
def predict(classifier: nn.Module, images: Tensor) -> Tensor:
    """The classes (N,) that it finds."""
    classifier.eval()
    return torch.cat([classifier(part).argmax(-1) for part in images.split(500)])


@torch.no_grad()
def compare_with_diffusers(
    diffusion: GaussianDiffusion, labels: Tensor, samples: Tensor, seed: int, console: Console
) -> None:
    """Sample with diffusers' DDIMScheduler from the same noise, if it is installed, and print the difference."""
    try:
        from diffusers import DDIMScheduler
    except ImportError:
        console.print("diffusers is not installed: its scheduler was not compared")
        return
    words = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    scheduler = DDIMScheduler(**words)
    scheduler.set_timesteps(STEPS)
    n = len(labels)
    x = mmfast.ops.noise_like(torch.empty_like(samples), mmfast.sample_seeds(seed, n, device=labels.device))
    both = torch.cat((torch.full_like(labels, diffusion.null_condition), labels))  # type: ignore[arg-type]
    network = diffusion.model.eval()
    for t in scheduler.timesteps:
        unconditional, conditional = network(torch.cat((x, x)), t.to(x.device).expand(2 * n), both).chunk(2)
        output = unconditional + GUIDANCE * (conditional - unconditional)
        x = scheduler.step(output, t, x, use_clipped_model_output=True).prev_sample
    console.print(f"diffusers' DDIMScheduler from the same noise: largest difference {(x - samples).abs().max():.1e}")


def draw(
    args: argparse.Namespace,
    diffusion: GaussianDiffusion,
    images: Images,
    losses: list[float],
    samples: Tensor,
    again: Tensor,
    right: Tensor,
    agreement: float,
    console: Console,
) -> None:
    """Save what noise does to images and back, samples of each class, the loss curve and the noise's distribution."""
    from . import _demo_plots as plots

    device, count, names = samples.device, len(images.names), images.names
    paths = [args.output / f"diffusion-{args.data}-{what}.png" for what in ("strips", "samples", "loss", "noise")]
    args.output.mkdir(parents=True, exist_ok=True)
    steps: dict[str, Any] = {"steps": STEPS, "seed": args.seed}

    of_class = [(images.test_labels == label).nonzero()[:, 0] for label in range(count)]
    clean = images.test[[int(found[0]) for found in of_class[:3]]].to(device)
    noised = torch.stack([clean, *(diffusion.q_sample(clean, t, seed=args.seed) for t in TIMESTEPS)])
    alphas_cumprod = diffusion.schedule.alphas_cumprod[list(TIMESTEPS)].tolist()
    labels = torch.arange(count, device=device)
    states, predictions = diffusion.sample(count, condition=labels, guidance=GUIDANCE, return_all=True, **steps)
    plots.diffusion_strips(
        paths[0],
        plots.Forward(noised.cpu(), TIMESTEPS, alphas_cumprod, [f"real {n}" for n in names[:3]]),
        plots.Reverse(
            states[:, list(SHOWN)].cpu(),
            predictions[:, list(SHOWN)].cpu(),
            diffusion.schedule.timesteps(STEPS).tolist(),
            [f"sampled {names[label]}" for label in SHOWN],
        ),
    )
    first, last = (images.test[found[:1]].to(device) for found in (of_class[0], of_class[6]))
    weights = torch.linspace(0, 1, count)
    rows = {
        "real\nimages": images.test[[int(found[1]) for found in of_class]],
        "sample 1,\n3 at a time": again.cpu(),
        "between\ntwo real": diffusion.interpolate(first, last, MIXED_AT, weights, **steps)[:, 0].cpu(),
    }
    title = f"{agreement:.1%} of {len(samples)} samples are what was asked for (red frame: the classifier says no)"
    plots.sample_grid(paths[1], samples.cpu(), ~right.cpu(), names, rows, title)
    plots.denoising_curve(paths[2], losses, f"U-Net on {args.data}: loss {smoothed(losses):.3f}")
    noise = mmfast.ops.noise_like(torch.empty(NORMALS // 1000, 1000, device=device), args.seed)
    plots.normal_check(paths[3], noise.flatten().cpu())
    console.print(f"wrote {', '.join(map(str, paths))}")
