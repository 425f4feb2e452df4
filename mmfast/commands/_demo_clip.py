"""`mmfast demo clip`: train a small CLIP on images with captions, then name and find held-out images by text.

On several processes: `torchrun --nproc-per-node 2 -m mmfast.cli demo clip`. Each takes its share of every batch,
and the loss is that of the whole batch.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from mmfast import models, ops

from ._demo_captions import CAPTIONS, Captions, Words
from ._demo_data import Images, load, shifted


@dataclass(frozen=True)
class Recipe:
    """A model and a training run that fit a data set."""

    image_size: int
    epochs: int
    train_images: int
    batch: int
    shift: int  # some training batches are moved by up to this many pixels
    least_accuracy: float


RECIPES = {
    "digits": Recipe(8, 25, 1437, 96, 1, 0.95),
    "fashion-mnist": Recipe(28, 4, 12000, 128, 2, 0.77),
}
WIDTH = 64


@dataclass(frozen=True)
class Process:
    """This process among those that torchrun started, or alone."""

    rank: int
    size: int
    device: torch.device

    @property
    def group(self) -> Any:
        """The process group that the loss spans."""
        return dist.group.WORLD if self.size > 1 else None


def run(args: argparse.Namespace) -> int:
    """Run the demo. Returns 1 on every process if the accuracy is below what the recipe reaches."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    process = Process(int(os.environ.get("RANK", "0")), size, torch.device(args.device))
    if process.device.type == "cpu":
        torch.set_num_threads(1)  # tensors this small are slower on several
    elif size > 1:
        process = Process(process.rank, size, torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))))
        torch.cuda.set_device(process.device)
    if size == 1:
        return _run(args, process)
    dist.init_process_group("gloo" if process.device.type == "cpu" else "nccl")
    try:
        return _run(args, process)
    finally:
        dist.destroy_process_group()


def _run(args: argparse.Namespace, process: Process) -> int:
    console = Console(quiet=process.rank > 0)
    recipe, captions = RECIPES[args.data], CAPTIONS[args.data]
    if recipe.batch % process.size:
        raise ValueError(f"{process.size} processes cannot share a batch of {recipe.batch} evenly")
    epochs = recipe.epochs if args.epochs is None else args.epochs
    images = load(args.data, args.data_dir)
    tokenizer = Words(template.format(name) for template in captions.training for name in captions.names)
    torch.manual_seed(args.seed)
    config = model_config(recipe, tokenizer)
    model = models.CLIP(**config).to(process.device)
    many = f", {process.size} processes" if process.size > 1 else ""
    console.print(
        f"[bold]mmfast demo clip[/]: {args.data}, {min(recipe.train_images, len(images.train))} training and "
        f"{len(images.test)} test images, {len(captions.training)} captions for each class, CLIP with "
        f"{sum(p.numel() for p in model.parameters()):,} parameters, on {process.device}{many}"
    )
    start = time.perf_counter()
    losses, floors, accuracies = train(model, images, captions, tokenizer, recipe, epochs, process, console)
    accuracy = accuracies[-1]
    console.print(
        f"zero-shot accuracy [bold]{accuracy:.1%}[/] by {len(captions.held_out)} captions not seen in training, "
        f"{epochs} epochs, {time.perf_counter() - start:.0f} s"
    )
    if process.rank == 0:
        draw(args, model, images, captions, tokenizer, (losses, floors, accuracies), process, console)
    if process.size == 1:
        compare_with_open_clip(model, config, images.test[:64], tokenizer, captions, process, console)
    if args.epochs is None and accuracy < recipe.least_accuracy:
        console.print(f"[red]zero-shot accuracy is below {recipe.least_accuracy:.0%}")
        return 1
    return 0


def model_config(recipe: Recipe, tokenizer: Words) -> dict[str, Any]:
    """The model in open_clip's fields."""
    return {
        "embed_dim": WIDTH,
        "vision_cfg": {
            "image_size": recipe.image_size,
            "patch_size": 4,
            "width": WIDTH,
            "layers": 3,
            "head_width": 16,
        },
        "text_cfg": {
            "context_length": tokenizer.context_length,
            "vocab_size": tokenizer.vocab_size,
            "width": WIDTH,
            "layers": 2,
            "heads": 4,
        },
    }


def train(
    model: models.CLIP,
    images: Images,
    captions: Captions,
    tokenizer: Words,
    recipe: Recipe,
    epochs: int,
    process: Process,
    console: Console,
) -> tuple[list[float], list[float], list[float]]:
    """Train in place; return each step's loss and the lowest it could be, and the accuracy after each epoch."""
    pixels, labels = images.train[: recipe.train_images], images.train_labels[: recipe.train_images]
    # Every caption of every class, as tokens [captions, classes, length].
    tokens = torch.stack([tokenizer([text.format(name) for name in captions.names]) for text in captions.training])
    steps = epochs * (len(pixels) // recipe.batch)
    if not steps:
        raise ValueError(f"{len(pixels)} training images are fewer than a batch of {recipe.batch}")
    parallel = nn.parallel.DistributedDataParallel(model) if process.size > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    losses: list[float] = []
    floors: list[float] = []
    accuracies: list[float] = []
    columns = (TextColumn("training"), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=steps)
        for epoch in range(1, epochs + 1):
            model.train()
            # Every process draws the same numbers, and takes its share of each batch.
            for batch in torch.randperm(len(pixels)).split(recipe.batch):
                if len(batch) < recipe.batch:
                    break
                x, classes = pixels[batch], labels[batch]
                text = tokens[torch.randint(len(tokens), (len(batch),)), classes]
                # One batch in four is moved; the last epochs see the images as they are.
                if epoch <= 0.8 * epochs and torch.rand(()) < 0.25:
                    x = shifted(x, recipe.shift)
                mine = slice(process.rank, None, process.size)
                ids = classes[mine].to(process.device)
                image_features, text_features, scale = parallel(rgb(x[mine], process), text[mine].to(process.device))
                # A caption fits every image of its class, not only the one it came with.
                loss = ops.clip_loss(
                    image_features, text_features, scale, image_ids=ids, text_ids=ids, group=process.group
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                with torch.no_grad():
                    model.logit_scale.clamp_(0, math.log(100))  # CLIP's bounds
                losses.append(loss.item())
                floors.append(lowest_loss(classes))
                progress.advance(task)
            accuracies.append(zero_shot_accuracy(model, images, captions, tokenizer, process))
            text_now = f"epoch {epoch}/{epochs}  loss {losses[-1]:.3f}  zero-shot accuracy {accuracies[-1]:.1%}"
            progress.update(task, description=text_now)
    return losses, floors, accuracies


def rgb(images: Tensor, process: Process) -> Tensor:
    """Grey images (N, 1, H, W) with the three channels that CLIP's towers take, on the device."""
    return images.to(process.device).expand(-1, 3, -1, -1)


def lowest_loss(classes: Tensor) -> float:
    """The loss of a batch that cannot be better: an image's n equal captions share its target, so log n is left."""
    return float(torch.bincount(classes)[classes].float().log().mean())


@torch.no_grad()
def encode_images(model: models.CLIP, images: Tensor, process: Process) -> Tensor:
    """Features (N, embed_dim) of length 1, on the CPU."""
    model.eval()
    return torch.cat([model.encode_image(rgb(part, process), normalize=True).cpu() for part in images.split(512)])


def zero_shot_accuracy(
    model: models.CLIP, images: Images, captions: Captions, tokenizer: Words, process: Process
) -> float:
    """Share of test images whose nearest class, by the mean of its held-out captions, is theirs."""
    classifier = models.zero_shot_classifier(model, captions.names, captions.held_out, tokenizer).cpu()
    similarity = encode_images(model, images.test, process) @ classifier
    return float((similarity.argmax(-1) == images.test_labels).float().mean())


def draw(
    args: argparse.Namespace,
    model: models.CLIP,
    images: Images,
    captions: Captions,
    tokenizer: Words,
    history: tuple[list[float], list[float], list[float]],
    process: Process,
    console: Console,
) -> None:
    """Save the training's curve and what captions and images find of each other; print how often that fits."""
    from ._demo_plots import NEAREST, contrastive_curve, retrieval_sheet

    texts = [text.format(name) for text in captions.held_out for name in captions.names]
    text_classes = torch.arange(len(captions.names)).repeat(len(captions.held_out))
    with torch.no_grad():
        text_features = model.encode_text(tokenizer(texts).to(process.device), normalize=True).cpu()
    image_features = encode_images(model, images.test, process)
    best = models.top_k_matches(text_features, image_features, NEAREST)[1]
    fit = (images.test_labels[best] == text_classes[:, None]).float().mean()
    recall = models.retrieval_recall(image_features, text_features, images.test_labels, text_classes, k=(1,))
    console.print(
        f"of the {NEAREST} images nearest to each of {len(texts)} captions, {fit:.1%} fit; "
        f"the nearest caption fits {recall['image_to_text_recall@1']:.1%} of the images"
    )
    args.output.mkdir(parents=True, exist_ok=True)
    curve, sheet = (args.output / f"clip-{args.data}-{what}.png" for what in ("loss", "retrieval"))
    losses, floors, accuracies = history
    contrastive_curve(
        curve, losses, floors, accuracies, f"CLIP on {args.data}: zero-shot accuracy {accuracies[-1]:.1%}"
    )
    similarity = text_features @ image_features.T
    retrieval_sheet(sheet, images.test, images.test_labels, similarity, texts, text_classes, captions.names)
    console.print(f"wrote {curve} and {sheet}")


@torch.no_grad()
def compare_with_open_clip(
    model: models.CLIP,
    config: dict[str, Any],
    images: Tensor,
    tokenizer: Words,
    captions: Captions,
    process: Process,
    console: Console,
) -> None:
    """Give open_clip's CLIP the trained weights, if it is installed, and print the largest difference of logits."""
    from ._torchvision import declare_torchvision_ops

    declare_torchvision_ops()
    try:
        from open_clip.model import CLIP as Peer
    except ModuleNotFoundError:
        console.print("open_clip is not installed: its CLIP was not given these weights")
        return
    peer = Peer(**config).to(process.device).eval()
    peer.load_state_dict(model.state_dict(), strict=True)  # the names are open_clip's
    pair = rgb(images, process), tokenizer([captions.held_out[0].format(n) for n in captions.names]).to(process.device)
    difference = (model.eval().get_logits(*pair)[0] - peer.get_logits(*pair)[0]).abs().max()
    console.print(f"open_clip's CLIP with these weights: largest difference of logits {difference:.1e}")
