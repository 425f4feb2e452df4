"""`mmfast demo vit`: train a small ViT on real images, then accelerate timm's ViT with its weights."""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import mmfast
from mmfast.benchmarks._harness import interleaved_ratio

from ._demo_data import Images, load, shifted


@dataclass(frozen=True)
class Recipe:
    """A model and a training run that fit a data set."""

    model: dict[str, Any]
    epochs: int
    train_images: int
    batch: int
    shift: int  # some training batches are moved by up to this many pixels
    least_accuracy: float


SMALL_VIT = {"embed_dim": 64, "depth": 3, "num_heads": 4, "global_pool": "avg"}
RECIPES = {
    "digits": Recipe({"img_size": 8, "patch_size": 4, **SMALL_VIT}, 40, 1437, 32, 1, 0.97),
    "fashion-mnist": Recipe({"img_size": 28, "patch_size": 4, **SMALL_VIT}, 3, 20000, 64, 2, 0.80),
}


def run(args: argparse.Namespace) -> int:
    """Run the demo. Returns 1 if the accuracy is below what the recipe reaches."""
    console = Console()
    recipe = RECIPES[args.data]
    epochs = recipe.epochs if args.epochs is None else args.epochs
    device = torch.device(args.device)
    images = load(args.data, args.data_dir)
    torch.manual_seed(args.seed)
    if device.type == "cpu":
        torch.set_num_threads(1)  # tensors this small are slower on several
    arguments = {**recipe.model, "in_chans": 1, "num_classes": len(images.names)}
    model = mmfast.models.ViT(**arguments).to(device)
    count = sum(p.numel() for p in model.parameters())
    console.print(
        f"[bold]mmfast demo vit[/]: {args.data}, {min(recipe.train_images, len(images.train))} training and "
        f"{len(images.test)} test images, ViT with {count:,} parameters, on {device}"
    )
    start = time.perf_counter()
    losses, accuracies = train(model, images, recipe, epochs, device, console)
    seconds = time.perf_counter() - start
    accuracy = accuracies[-1]
    console.print(f"test accuracy [bold]{accuracy:.1%}[/] after {epochs} epochs, {seconds:.0f} s")

    from ._demo_plots import loss_curve, prediction_sheet

    args.output.mkdir(parents=True, exist_ok=True)
    curve, sheet = (args.output / f"vit-{args.data}-{what}.png" for what in ("loss", "predictions"))
    loss_curve(curve, losses, accuracies, f"ViT on {args.data}: test accuracy {accuracy:.1%}")
    probabilities = predict(model, images.test, device).softmax(-1)
    title = f"{accuracy:.1%} of {len(images.test)} test images right; wrong ones first, in red"
    prediction_sheet(sheet, images.test, images.test_labels, probabilities, images.names, title)
    console.print(f"wrote {curve} and {sheet}")
    accelerate_peer(model, arguments, images, device, console)
    if args.epochs is None and accuracy < recipe.least_accuracy:
        console.print(f"[red]test accuracy is below {recipe.least_accuracy:.0%}")
        return 1
    return 0


def train(
    model: nn.Module, images: Images, recipe: Recipe, epochs: int, device: torch.device, console: Console
) -> tuple[list[float], list[float]]:
    """Train in place; return the loss of each step and the test accuracy after each epoch."""
    inputs, labels = images.train[: recipe.train_images], images.train_labels[: recipe.train_images]
    steps = epochs * (len(inputs) // recipe.batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    losses: list[float] = []
    accuracies: list[float] = []
    columns = (TextColumn("training"), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=steps)
        for epoch in range(1, epochs + 1):
            model.train()
            for batch in torch.randperm(len(inputs)).split(recipe.batch):
                if len(batch) < recipe.batch:
                    break
                x = inputs[batch]
                # One batch in four is moved; the last epochs see the images as they are.
                if epoch <= 0.8 * epochs and torch.rand(()) < 0.25:
                    x = shifted(x, recipe.shift)
                loss = F.cross_entropy(model(x.to(device)), labels[batch].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                progress.advance(task)
            found = predict(model, images.test, device).argmax(-1)
            accuracies.append(float((found == images.test_labels).float().mean()))
            text = f"epoch {epoch}/{epochs}  loss {losses[-1]:.3f}  test accuracy {accuracies[-1]:.1%}"
            progress.update(task, description=text)
    return losses, accuracies


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    """Logits (N, classes) on the CPU."""
    model.eval()
    return torch.cat([model(batch.to(device)).cpu() for batch in images.split(512)])


def accelerate_peer(
    model: nn.Module, arguments: dict[str, Any], images: Images, device: torch.device, console: Console
) -> None:
    """Give timm's ViT the trained weights, accelerate it, and print report, largest difference and time ratio."""
    from ._torchvision import declare_torchvision_ops

    declare_torchvision_ops()
    from timm.models.vision_transformer import VisionTransformer

    peer = VisionTransformer(**arguments).to(device)
    peer.load_state_dict(model.state_dict(), strict=True)  # the names are timm's
    before = predict(peer, images.test, device)
    # Two models on one set of weights: where weights lie in memory is worth a few percent on a CPU.
    fast = mmfast.accelerate(copy.deepcopy(peer, memo={id(p): p for p in peer.parameters()}))
    console.print("\n[bold]timm's ViT with these weights, accelerated[/]")
    console.print(str(mmfast.report(fast)), highlight=False, markup=False, soft_wrap=True)
    after = predict(fast, images.test, device)
    console.print(f"largest output difference: {(before - after).abs().max():.2e}")
    batch = images.test[:256].to(device)
    ratio = interleaved_ratio(
        lambda: predict(peer, batch, device), lambda: predict(fast, batch, device), seconds=3.0, attempts=1
    )
    console.print(f"time ratio, timm's over accelerated, {len(batch)} images, in turn: {ratio:.2f}", soft_wrap=True)
    if device.type == "cpu":
        console.print("On a CPU the ops are PyTorch's own, so about 1.00 is expected; kernels run on a GPU.")
