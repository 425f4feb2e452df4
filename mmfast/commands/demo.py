"""`mmfast demo`: train a model on real images, and look at what it does.

`mmfast demo vit` trains a small `mmfast.models.ViT`, saves its loss curve and a sheet of test images with
predictions, loads the trained weights into timm's ViT as they are, accelerates that one, and compares.
`mmfast demo clip` trains a small `mmfast.models.CLIP` on images with captions, names the classes of held-out images
by captions it has not seen, and saves what each caption finds.
`mmfast demo diffusion` trains a small U-Net in `mmfast.models.GaussianDiffusion`, samples images of each class, has a
classifier say how many are what was asked for, and saves them with the steps from noise to image.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import torch

DEMOS = ("vit", "clip", "diffusion")
DATA = ("digits", "fashion-mnist")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("name", choices=DEMOS, nargs="?", default="vit", help="which demo (default: vit)")
    parser.add_argument("--data", choices=DATA, default="digits", help="the images (default: digits)")
    parser.add_argument("--data-dir", type=Path, help="folder with Fashion-MNIST's files")
    parser.add_argument("--epochs", type=int, help="passes over the training images")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for the pictures")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """Run the demo. Returns 1 if the result is below what its recipe reaches."""
    if args.epochs is not None and args.epochs < 1:
        raise ValueError(f"--epochs must be at least 1, got {args.epochs}")
    return int(importlib.import_module(f"._demo_{args.name}", __package__).run(args))
