from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch

from mmfast.cli import main
from mmfast.commands._demo_data import load, shifted

pytest.importorskip("sklearn")
PNG = b"\x89PNG\r\n"


def test_one_epoch_writes_pictures_and_accelerates_the_peer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "vit", "--epochs", "1", "--output", str(tmp_path), "--device", "cpu"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["vit-digits-loss.png", "vit-digits-predictions.png"]
    assert all(path.read_bytes().startswith(PNG) and path.stat().st_size > 10_000 for path in tmp_path.iterdir())
    assert "test accuracy" in printed
    assert "add_layer_norm" in printed
    difference = float(printed.partition("largest output difference: ")[2].split()[0])
    assert difference < 1e-4
    ratio = float(printed.partition("in turn: ")[2].split()[0])
    assert 0.2 < ratio < 5


def test_digits_are_split_once_and_normalised() -> None:
    images = load("digits", None)
    assert (len(images.train), len(images.test)) == (1437, 360)
    torch.testing.assert_close(images.train.mean(), torch.tensor(0.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(images.train.std(), torch.tensor(1.0), atol=1e-4, rtol=0)
    again = load("digits", None)
    assert torch.equal(images.test, again.test)


@pytest.mark.parametrize("packed", [True, False], ids=["gzip", "plain"])
def test_fashion_mnist_files(packed: bool, tmp_path: Path) -> None:
    """IDX files: magic number with the rank, big-endian sizes, bytes."""
    pixels = {}
    for part, count in (("train", 5), ("t10k", 3)):
        pixels[part] = torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8)
        for name, data in (("images-idx3", pixels[part]), ("labels-idx1", torch.arange(count, dtype=torch.uint8))):
            sizes = b"".join(size.to_bytes(4, "big") for size in data.shape)
            raw = bytes([0, 0, 8, data.dim()]) + sizes + data.numpy().tobytes()
            path = tmp_path / f"{part}-{name}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(raw) if packed else raw)
    images = load("fashion-mnist", tmp_path)
    train = pixels["train"].float().unsqueeze(1)
    torch.testing.assert_close(images.train, (train - train.mean()) / train.std())
    assert images.test.shape == (3, 1, 28, 28)
    assert images.test_labels.tolist() == [0, 1, 2]


def test_missing_files_name_the_package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--data", "fashion-mnist", "--data-dir", str(tmp_path), "--device", "cpu"]) == 2
    assert "install Debian's package dataset-fashion-mnist" in capsys.readouterr().err


def test_shifted_moves_pixels() -> None:
    image = torch.arange(16.0).view(1, 1, 4, 4)
    torch.manual_seed(3)
    moves = {tuple(shifted(image, 1).flatten().tolist()) for _ in range(60)}
    assert len(moves) == 9
    assert tuple(image.flatten().tolist()) in moves
    down = torch.cat([image[:, :, :1], image[:, :, :3]], dim=2)
    assert tuple(down.flatten().tolist()) in moves
