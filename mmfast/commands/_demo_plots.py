"""Pictures of a demo's run, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
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
