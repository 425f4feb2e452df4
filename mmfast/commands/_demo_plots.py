"""Pictures of a demo's run, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
import torch.nn.functional as F
from torch import Tensor

matplotlib.use("Agg")  # no display is needed
import matplotlib.pyplot as plt


def loss_curve(path: Path, losses: Sequence[float], accuracies: Sequence[float], title: str) -> None:
    """Training loss of each step, and test accuracy after each epoch."""
    figure, left = plt.subplots(figsize=(8, 4.5), layout="constrained")
    steps = torch.arange(1, len(losses) + 1)
    left.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    smooth = torch.tensor(losses).unfold(0, min(20, len(losses)), 1).mean(-1)
    left.plot(steps[-len(smooth) :], smooth, color="tab:blue", label="training loss (mean of 20 steps)")
    left.set(xlabel="step", ylabel="cross-entropy", yscale="log", title=title)
    right = left.twinx()
    ends = torch.linspace(len(losses) / len(accuracies), len(losses), len(accuracies))
    right.plot(ends, [100 * a for a in accuracies], color="tab:orange", label="test accuracy")
    right.set(ylabel="test accuracy (%)", ylim=(0, 101))
    lines = [*left.get_lines()[1:], *right.get_lines()]
    figure.legend(lines, [str(line.get_label()) for line in lines], loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def prediction_sheet(
    path: Path, images: Tensor, labels: Tensor, probabilities: Tensor, names: Sequence[str], title: str
) -> None:
    """A sheet of test images (N, 1, H, W) with the predicted class and its probability; wrong ones in red, first."""
    confidence, predicted = probabilities.max(-1)
    order = torch.argsort((predicted == labels).int(), stable=True)[:40]
    figure, axes = plt.subplots(4, 10, figsize=(12, 6.2), layout="constrained")
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, index in zip(axes.flat, order.tolist(), strict=False):
        guess, label = int(predicted[index]), int(labels[index])
        right = guess == label
        text = f"{names[guess]} {100 * confidence[index]:.0f}%" + ("" if right else f"\n(is {names[label]})")
        axis.imshow(images[index, 0], cmap="gray")
        axis.set_title(text, fontsize=8, color="black" if right else "red")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


NEAREST = 15  # images shown beside a caption


def contrastive_curve(
    path: Path, losses: Sequence[float], floors: Sequence[float], accuracies: Sequence[float], title: str
) -> None:
    """Contrastive loss of each step, the lowest it could be, and zero-shot accuracy after each epoch."""
    figure, left = plt.subplots(figsize=(8, 4.5), layout="constrained")
    steps = torch.arange(1, len(losses) + 1)
    left.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    for values, colour, style, label in (
        (losses, "tab:blue", "-", "training loss (mean of 20)"),
        (floors, "tab:gray", "--", "lowest possible: captions fit several images"),
    ):
        smooth = torch.tensor(values).unfold(0, min(20, len(values)), 1).mean(-1)
        left.plot(steps[-len(smooth) :], smooth, color=colour, linestyle=style, label=label)
    left.set(xlabel="step", ylabel="contrastive loss", title=title)
    right = left.twinx()
    ends = torch.linspace(len(losses) / len(accuracies), len(losses), len(accuracies))
    right.plot(
        ends, [100 * a for a in accuracies], color="tab:orange", marker="o", markersize=3, label="zero-shot accuracy"
    )
    right.set(ylabel="zero-shot accuracy (%)", ylim=(0, 101))
    lines = [*left.get_lines()[1:], *right.get_lines()]
    figure.legend(lines, [str(line.get_label()) for line in lines], loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def retrieval_sheet(
    path: Path,
    images: Tensor,
    labels: Tensor,
    similarity: Tensor,
    texts: Sequence[str],
    text_classes: Tensor,
    names: Sequence[str],
) -> None:
    """What captions and images find of each other by `similarity` (texts, images); what does not fit, in red.

    Above, a caption of each class with the images nearest to it; below, images with the captions nearest to them, those
    with a wrong one first.
    """
    count = len(names)
    figure = plt.figure(figsize=(13, 11), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(1.7, 1))
    upper, lower = parts
    upper.suptitle(f"Captions and the {NEAREST} test images nearest to each (red frame: another class)")
    for row, (caption, strip) in enumerate(upper.subplots(count, 2, width_ratios=(1, 2.7))):
        text = row + count * (row % (len(texts) // count))  # another sentence for each class in turn
        caption.set_axis_off()
        place = {"ha": "right", "va": "center", "fontsize": 12, "transform": caption.transAxes}
        caption.text(1.0, 0.5, texts[text], **place)
        best = similarity[text].topk(NEAREST).indices
        _strip(strip, images[best, 0], (labels[best] == text_classes[text]).tolist())
    lower.suptitle("Test images and the three captions nearest to each (in red: another class)")
    nearest = similarity.topk(3, dim=0).indices  # [3, images]
    fits = text_classes[nearest] == labels
    order = torch.argsort(fits.sum(0), stable=True)
    wrong = int((~fits.all(0)).sum())
    shown = torch.cat([order[: min(6, wrong)], order[wrong:]])[:12]
    for axes, image in zip(lower.subplots(3, 8, width_ratios=[1, 3.6] * 4).reshape(-1, 2), shown.tolist(), strict=True):
        axes[0].imshow(images[image, 0], cmap="gray")
        axes[0].set(xticks=[], yticks=[])
        if not bool(fits[:, image].all()):
            axes[0].set_xlabel(f"({names[int(labels[image])]})", fontsize=8, labelpad=2)
        axes[1].set_axis_off()
        for line, text in enumerate(nearest[:, image].tolist()):
            colour = "black" if fits[line, image] else "red"
            place = {"va": "center", "fontsize": 9, "transform": axes[1].transAxes}
            axes[1].text(0.04, 0.8 - 0.3 * line, texts[text], color=colour, **place)
    figure.savefig(path, dpi=110)
    plt.close(figure)


class Forward(NamedTuple):
    """Images, and what noise makes of them."""

    states: Tensor  # [1 + timesteps, images, 1, H, W], first without noise
    timesteps: Sequence[int]
    alphas_cumprod: Sequence[float]
    labels: Sequence[str]


class Reverse(NamedTuple):
    """Noise, and what sampling makes of it."""

    states: Tensor  # [steps + 1, samples, 1, H, W]
    predictions: Tensor  # likewise
    timesteps: Sequence[int]
    labels: Sequence[str]


def diffusion_strips(path: Path, forward: Forward, reverse: Reverse) -> None:
    """From images to noise with alpha-bar, and below from noise to samples with the images predicted on the way."""
    columns, count, samples = len(forward.states), len(forward.labels), len(reverse.labels)
    figure = plt.figure(figsize=(1.45 * columns + 0.6, 1.5 * (count + 2 * samples) + 1.6), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(count + 0.5, 2 * samples + 0.4))
    parts[0].suptitle("Forward: test images with noise")
    pairs = zip(forward.timesteps, forward.alphas_cumprod, strict=True)
    titles = ["$x_0$", *(f"t = {t}\n{_alpha_bar(alpha_bar)}" for t, alpha_bar in pairs)]
    grid = parts[0].subplots(count, columns, squeeze=False)
    _image_rows(grid, list(forward.states.transpose(0, 1)[:, :, 0]), forward.labels, titles)
    parts[1].suptitle("Reverse: from noise to samples")
    shown = torch.linspace(0, len(reverse.states) - 1, columns).round().long().tolist()
    titles = [f"t = {reverse.timesteps[index]}" for index in shown[:-1]] + ["sample"]
    rows, labels = [], []
    for index, label in enumerate(reverse.labels):
        rows += [reverse.states[shown, index, 0], reverse.predictions[shown, index, 0]]
        labels += [f"{label}: $x_t$", "predicted $x_0$"]
    _image_rows(parts[1].subplots(2 * samples, columns, squeeze=False), rows, labels, titles)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _alpha_bar(value: float) -> str:
    """As text: 0.89780, or 2.4e-09 where that would be 0."""
    return rf"$\bar\alpha$ = {value:.5f}" if value >= 1e-3 else rf"$\bar\alpha$ = {value:.1e}"


def _image_rows(
    grid: Any, rows: Sequence[Tensor], labels: Sequence[str], titles: Sequence[str] = (), wrong: Tensor | None = None
) -> None:
    """Rows of images (N, H, W) from -1 to 1, with a label beside each and titles above; red frames say `wrong`."""
    for line, (axes, images) in enumerate(zip(grid, rows, strict=True)):
        for column, (axis, image) in enumerate(zip(axes, images, strict=True)):
            axis.imshow(image.numpy(), cmap="gray", vmin=-1, vmax=1)
            axis.set(xticks=[], yticks=[])
            red = wrong is not None and bool(wrong[line, column])
            axis.spines[:].set(color="red" if red else "black", linewidth=4 if red else 0.8)
        axes[0].set_ylabel(labels[line], fontsize=10)
    for axis, title in zip(grid[0], titles, strict=False):
        axis.set_title(title, fontsize=10)


def sample_grid(
    path: Path, samples: Tensor, wrong: Tensor, names: Sequence[str], rows: dict[str, Tensor], title: str
) -> None:
    """Samples (N, 1, H, W), one class a column, those that are `wrong` in red frames; below, rows with a label each."""
    count = len(names)
    shown = min(8, len(samples) // count)
    heights = [*[1.0] * shown, 0.2, *[1.0] * len(rows)]
    figure, grid = plt.subplots(
        *(len(heights), count), figsize=(count + 0.5, sum(heights) + 0.7), height_ratios=heights, layout="constrained"
    )
    images, frames = (x[: shown * count].unflatten(0, (shown, count)) for x in (samples[:, 0], wrong))
    _image_rows(grid[:shown], list(images), [f"sample {line + 1}" for line in range(shown)], names, frames)
    for axis in grid[shown]:
        axis.set_axis_off()
    _image_rows(grid[shown + 1 :], [images[:, 0] for images in rows.values()], list(rows))
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def denoising_curve(path: Path, losses: Sequence[float], title: str) -> None:
    """Training loss of each step."""
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    steps = torch.arange(1, len(losses) + 1)
    axis.plot(steps.numpy(), losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="each step")
    smooth = torch.tensor(losses).unfold(0, min(50, len(losses)), 1).mean(-1)
    axis.plot(steps[-len(smooth) :].numpy(), smooth.numpy(), color="tab:blue", label="mean of 50 steps")
    axis.set(xlabel="step", ylabel="mean squared error", ylim=(0, None), title=title)
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def normal_check(path: Path, noise: Tensor) -> None:
    """Histogram of noise (N,) beside the normal density, and its quantiles over the normal ones."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    values = noise.double().sort().values
    left.hist(values.numpy(), bins=150, range=(-5, 5), density=True, color="tab:blue", alpha=0.5, label="noise_like")
    x = torch.linspace(-5, 5, 400)
    density = torch.exp(-x.square() / 2) / (2 * torch.pi) ** 0.5
    left.plot(x.numpy(), density.numpy(), color="black", linewidth=1, label="normal density")
    left.set(xlabel="value", ylabel="density", title=f"mean {values.mean():.5f}, standard deviation {values.std():.5f}")
    left.legend(loc="upper left")
    # Points at equal distances, not one for each value: most would lie in the middle.
    most = torch.special.ndtri(torch.tensor(1 - 0.5 / len(values), dtype=torch.float64))
    rank = torch.special.ndtr(torch.linspace(-float(most), float(most), 300, dtype=torch.float64)) * len(values) - 0.5
    rank = rank.round().long().clamp(0, len(values) - 1).unique()
    expected = torch.special.ndtri((rank.double() + 0.5) / len(values)).numpy()
    right.plot(expected, expected, color="black", linewidth=1, label="normal")
    right.plot(expected, values[rank].numpy(), ".", color="tab:blue", markersize=4, label="noise_like")
    extremes = f"smallest {values[0]:.2f}, largest {values[-1]:.2f}"
    right.set(xlabel="normal quantile", ylabel="quantile of the noise", title=f"{len(values):,} values: {extremes}")
    right.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _strip(axis: Any, images: Tensor, right: Sequence[bool]) -> None:
    """Draw images (N, H, W) side by side, wrong ones in a red frame."""
    height, width = images.shape[1:]
    gap = max(1, width // 10)
    padded = F.pad(images, (gap,) * 4, value=float("nan"))  # NaN is left white
    axis.imshow(torch.cat(list(padded), -1), cmap="gray")
    axis.set_axis_off()
    axis.set_anchor("W")
    for index, fits in enumerate(right):
        if not fits:
            corner = (index * (width + 2 * gap) + gap - 0.5, gap - 0.5)
            axis.add_patch(plt.Rectangle(corner, width, height, fill=False, color="red", linewidth=3))
