"""Pictures of a demo's run, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
