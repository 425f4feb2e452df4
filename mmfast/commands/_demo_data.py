"""Real images for the demos: scikit-learn's digits, and Fashion-MNIST where its files are."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FASHION_NAMES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
# Where Debian's package dataset-fashion-mnist puts its files.
FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")


class Images(NamedTuple):
    """Grey images (N, 1, H, W) with mean 0 and standard deviation 1 over the training set, and their labels (N,)."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    names: tuple[str, ...]


def load(name: str, folder: Path | None) -> Images:
    """Load "digits" or "fashion-mnist" (from `folder`, gzipped or not, or the Debian package's).

    Raises ValueError if the files are not there.
    """
    return _digits() if name == "digits" else _fashion_mnist(folder or FASHION_FOLDER)


def _digits() -> Images:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = order[:360], order[360:]
    return _normalised(images[train], labels[train], images[test], labels[test], tuple("0123456789"))


def _fashion_mnist(folder: Path) -> Images:
    train = _idx(folder, "train-images-idx3-ubyte").unsqueeze(1).float()
    test = _idx(folder, "t10k-images-idx3-ubyte").unsqueeze(1).float()
    labels = [_idx(folder, f"{part}-labels-idx1-ubyte").long() for part in ("train", "t10k")]
    return _normalised(train, labels[0], test, labels[1], FASHION_NAMES)


def _idx(folder: Path, stem: str) -> Tensor:
    """Read a file in MNIST's IDX format: a magic number with the rank, the sizes, then bytes."""
    for path in (folder / f"{stem}.gz", folder / stem):
        if path.is_file():
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            rank = data[3]
            sizes = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank)]
            return torch.frombuffer(bytearray(data[4 + 4 * rank :]), dtype=torch.uint8).view(sizes)
    raise ValueError(f"{stem} is not in {folder}: install Debian's package dataset-fashion-mnist, or give --data-dir")


def _normalised(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, names: tuple[str, ...]
) -> Images:
    mean, std = train.mean(), train.std()
    return Images((train - mean) / std, train_labels, (test - mean) / std, test_labels, names)


def from_minus_one_to_one(images: Images) -> Images:
    """The same images with values from -1 to 1, and those of 28 x 28 as 16 x 16: a border of 2, then means of 2 x 2."""
    low, high = images.train.min(), images.train.max()

    def scaled(x: Tensor) -> Tensor:
        x = 2 * (x - low) / (high - low) - 1
        return F.avg_pool2d(F.pad(x, (2,) * 4, value=-1.0), 2) if x.shape[-1] == 28 else x

    return images._replace(train=scaled(images.train), test=scaled(images.test))


def shifted(images: Tensor, most: int) -> Tensor:
    """Images (N, 1, H, W), each moved by a random offset of up to `most` pixels each way, its border repeated."""
    padded = F.pad(images, (most,) * 4, mode="replicate")
    windows = padded.unfold(2, images.shape[2], 1).unfold(3, images.shape[3], 1)  # [N, 1, offset, offset, H, W]
    dy, dx = torch.randint(2 * most + 1, (2, len(images)))
    return windows[torch.arange(len(images)), :, dy, dx]
