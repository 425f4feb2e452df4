from __future__ import annotations

import argparse
import os
import re
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from mmfast import models, ops
from mmfast.cli import main
from mmfast.commands import _demo_clip as demo
from mmfast.commands._demo_captions import CAPTIONS, Words
from mmfast.commands._demo_data import load

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

ALONE = demo.Process(0, 1, torch.device("cpu"))
DIGITS = CAPTIONS["digits"]


def words() -> Words:
    return Words(text.format(name) for text in DIGITS.training for name in DIGITS.names)


def size_of(png: Path) -> tuple[int, int]:
    """Width and height in the header of a PNG."""
    data = png.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_few_epochs_name_most_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sixth of the default run: most digits are named by captions that were not trained on; pictures are drawn."""
    assert main(["demo", "clip", "--epochs", "4", "--output", str(tmp_path), "--device", "cpu"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    accuracy = float(re.findall(r"zero-shot accuracy ([\d.]+)% by 4 captions not seen in training", printed)[0])
    assert 75 < accuracy <= 100
    fit = float(re.findall(r"nearest to each of 40 captions, ([\d.]+)% fit", printed)[0])
    assert 75 < fit <= 100
    assert size_of(tmp_path / "clip-digits-loss.png") == (960, 540)
    assert size_of(tmp_path / "clip-digits-retrieval.png") == (1430, 1210)
    assert all(path.stat().st_size > 30_000 for path in tmp_path.iterdir())


def test_loss_falls_towards_the_lowest_possible() -> None:
    torch.manual_seed(0)
    recipe, images, tokenizer = demo.RECIPES["digits"], load("digits", None), words()
    model = models.CLIP(**demo.model_config(recipe, tokenizer))
    console = Console(quiet=True)
    losses, floors, accuracies = demo.train(model, images, DIGITS, tokenizer, recipe, 4, ALONE, console)
    assert len(losses) == len(floors) == 4 * (1437 // recipe.batch)
    assert len(accuracies) == 4
    assert all(loss > floor for loss, floor in zip(losses, floors, strict=True))
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    assert first > 4.4
    assert last < 3.3
    assert accuracies[-1] > accuracies[0]


def test_too_low_an_accuracy_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without --epochs the recipe's accuracy is held."""
    short = replace(demo.RECIPES["digits"], epochs=1, least_accuracy=0.9)
    monkeypatch.setitem(demo.RECIPES, "digits", short)
    monkeypatch.setattr(demo, "draw", lambda *args: None)
    monkeypatch.setattr(demo, "compare_with_open_clip", lambda *args: None)
    assert main(["demo", "clip", "--output", str(tmp_path), "--device", "cpu"]) == 1


def test_open_clip_need_not_be_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = words()
    config = demo.model_config(demo.RECIPES["digits"], tokenizer)
    arguments = (models.CLIP(**config), config, torch.zeros(2, 1, 8, 8), tokenizer, DIGITS, ALONE, Console())
    demo.compare_with_open_clip(*arguments)
    found = re.findall(r"largest difference of logits ([\d.e+-]+)", " ".join(capsys.readouterr().out.split()))
    assert float(found[0]) < 1e-4
    monkeypatch.setitem(sys.modules, "open_clip.model", None)
    demo.compare_with_open_clip(*arguments)
    assert "open_clip is not installed" in capsys.readouterr().out


@pytest.mark.parametrize("name", CAPTIONS)
def test_held_out_captions_are_not_trained_on(name: str) -> None:
    captions = CAPTIONS[name]
    trained = {text.format(c).lower() for text in captions.training for c in captions.names}
    held_out = {text.format(c).lower() for text in captions.held_out for c in captions.names}
    assert len(captions.names) == 10
    assert len(trained) == 80
    assert not trained & held_out
    tokenizer = Words(sorted(trained))
    unknown = (tokenizer(sorted(held_out)) == 1).any(-1)
    assert 0 < int(unknown.sum()) < len(held_out)  # some have words that no training caption has, not all


def test_words_have_clips_order() -> None:
    tokenizer = Words(["a photo of the T-shirt", "a coat"])
    assert tokenizer.ids == {"a": 3, "coat": 4, "of": 5, "photo": 6, "t-shirt": 7, "the": 8}
    assert (tokenizer.vocab_size, tokenizer.context_length) == (10, 9)
    ids = tokenizer(["A photo, of THE t-shirt.", "a big coat", ""])
    assert ids.tolist() == [[2, 3, 6, 5, 8, 7, 9, 0, 0], [2, 3, 1, 4, 9, 0, 0, 0, 0], [2, 9, 0, 0, 0, 0, 0, 0, 0]]
    assert ids.argmax(-1).tolist() == [6, 4, 1]  # the end of text, where CLIP pools
    assert tokenizer("a coat").shape == (1, 9)
    with pytest.raises(ValueError, match="a caption may have 7 words"):
        tokenizer("a photo of a photo of a coat")


def test_lowest_loss_is_that_of_perfect_features() -> None:
    classes = torch.tensor([0, 0, 0, 1, 2, 2])
    features = F.one_hot(classes).float()
    loss = ops.clip_loss(features, features, 100.0, image_ids=classes, text_ids=classes)
    assert demo.lowest_loss(classes) == pytest.approx(float(loss), abs=1e-5)
    assert demo.lowest_loss(torch.arange(4)) == 0


def test_processes_must_share_a_batch_evenly() -> None:
    args = argparse.Namespace(data="digits", epochs=1)
    with pytest.raises(ValueError, match="5 processes cannot share a batch of 96 evenly"):
        demo._run(args, demo.Process(0, 5, torch.device("cpu")))


def test_processes_of_torchrun_join_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what torchrun says in the environment; the group is left even if training fails. How they train is tested
    in tests/distributed/test_training.py."""
    calls: list[object] = []

    def stop(args: argparse.Namespace, process: demo.Process) -> int:
        calls.append(process)
        raise RuntimeError("stopped")

    monkeypatch.setattr(demo.dist, "init_process_group", calls.append)
    monkeypatch.setattr(demo.dist, "destroy_process_group", lambda: calls.append("left"))
    monkeypatch.setattr(demo, "_run", stop)
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match="stopped"):
        demo.run(argparse.Namespace(device="cpu"))
    assert calls == ["gloo", demo.Process(1, 2, torch.device("cpu")), "left"]


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Under torchrun each process has half of every batch, and the losses are those of one process."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mmfast.cli"]
    line += ["demo", "clip", "--epochs", "1", "--device", "cpu", "--output", str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)
    assert done.returncode == 0, done.stderr
    printed = " ".join(done.stdout.split())
    assert printed.count("mmfast demo clip: digits") == 1  # rank 0 alone prints
    assert "on cpu, 2 processes" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip-digits-loss.png", "clip-digits-retrieval.png"]

    torch.manual_seed(0)
    recipe, tokenizer = demo.RECIPES["digits"], words()
    model = models.CLIP(**demo.model_config(recipe, tokenizer))
    images = load("digits", None)
    losses, _, accuracies = demo.train(model, images, DIGITS, tokenizer, recipe, 1, ALONE, Console(quiet=True))
    loss, accuracy = re.findall(r"epoch 1/1 loss ([\d.]+) zero-shot accuracy ([\d.]+)%", printed)[-1]
    assert float(loss) == pytest.approx(losses[-1], abs=2e-3)
    assert float(accuracy) == pytest.approx(100 * accuracies[-1], abs=1.0)
