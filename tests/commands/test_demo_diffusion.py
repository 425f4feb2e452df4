from __future__ import annotations

import re
import struct
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from mmfast import NoiseSchedule
from mmfast.cli import main
from mmfast.commands import _demo_diffusion as demo
from mmfast.commands._demo_data import Images, from_minus_one_to_one, load
from mmfast.commands._demo_unet import TimeEmbedding, UNet
from mmfast.models import GaussianDiffusion

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
CPU = torch.device("cpu")
PICTURES = ("loss", "noise", "samples", "strips")


def pixels(png: Path) -> torch.Tensor:
    """Grey values (H, W) of a PNG from 0 to 1."""
    from matplotlib.image import imread

    data = png.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    values = torch.from_numpy(imread(png))[..., :3].mean(-1)
    assert values.shape == (height, width)
    return values


def small_recipe() -> demo.Recipe:
    return replace(demo.RECIPES["digits"], channels=(8, 16), classifier_steps=60)


def small_diffusion() -> GaussianDiffusion:
    schedule = NoiseSchedule("squaredcos_cap_v2", prediction_type="v_prediction")
    return GaussianDiffusion(UNet(1, (8, 16)), schedule, image_shape=(1, 8, 8), null_condition=10)


def test_a_short_run_draws_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(demo.RECIPES, "digits", small_recipe())
    monkeypatch.setattr(demo, "PER_CLASS", 2)
    monkeypatch.setattr(demo, "STEPS", 6)
    monkeypatch.setattr(demo, "NORMALS", 20_000)
    assert main(["demo", "diffusion", "--epochs", "1", "--output", str(tmp_path), "--device", "cpu"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "mmfast demo diffusion: digits, 1437 training images of 8 x 8" in printed
    assert re.search(r"step 22/22 loss [\d.]+", printed)
    agreement, tested = re.findall(r"([\d.]+)% of (?:20 samples|the test images)", printed)
    assert 0 <= float(agreement) <= 100
    assert float(tested) > 60
    for what in ("made 3 instead of 100 at a time", "DDIMScheduler from the same noise"):
        found = re.findall(rf"{what}: largest difference ([\d.e+-]+)", printed)
        if found or what.startswith("made"):
            assert float(found[0]) < 1e-3
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"diffusion-digits-{what}.png" for what in PICTURES]
    for path in tmp_path.iterdir():
        values = pixels(path)
        assert min(values.shape) > 400
        assert values.unique().numel() > 50
        assert 0.05 < float((values < 0.95).float().mean()) < 0.95 or "loss" in path.name
        assert float((values < 0.95).float().mean()) > 0.01


def test_the_loss_falls_and_samples_come_from_the_averaged_weights() -> None:
    torch.manual_seed(0)
    images, diffusion = from_minus_one_to_one(load("digits", None)), small_diffusion()
    losses, averaged = demo.train(diffusion, images, small_recipe(), 4, CPU, Console(quiet=True))
    assert len(losses) == 4 * 22
    assert sum(losses[:10]) / 10 > 0.8  # at first 0 is predicted, and the target's variance is about 0.9
    assert sum(losses[-10:]) / 10 < 0.55
    assert averaged is not diffusion
    assert not torch.equal(averaged.model.conv_in.weight, diffusion.model.conv_in.weight)
    torch.testing.assert_close(averaged.model.conv_in.weight, diffusion.model.conv_in.weight, atol=0.1, rtol=0)


def test_too_few_right_samples_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without --epochs the recipe's share is held."""
    monkeypatch.setattr(demo, "PER_CLASS", 2)
    monkeypatch.setattr(demo, "STEPS", 2)
    monkeypatch.setattr(demo, "draw", lambda *args: None)
    monkeypatch.setattr(demo, "compare_with_diffusers", lambda *args: None)
    short = replace(small_recipe(), epochs=1, classifier_steps=20)
    for least, code in ((1.01, 1), (0.0, 0)):
        monkeypatch.setitem(demo.RECIPES, "digits", replace(short, least_agreement=least))
        assert main(["demo", "diffusion", "--output", str(tmp_path), "--device", "cpu"]) == code


def test_recipes_ask_for_what_users_were_told() -> None:
    assert set(demo.RECIPES) == {"digits", "fashion-mnist"}
    assert all(recipe.least_agreement >= 0.7 for recipe in demo.RECIPES.values())


def test_diffusers_need_not_be_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    demo.compare_with_diffusers(small_diffusion(), torch.arange(2), torch.zeros(2, 1, 8, 8), 0, Console())
    assert "diffusers is not installed" in capsys.readouterr().out


def test_images_from_minus_one_to_one() -> None:
    digits = from_minus_one_to_one(load("digits", None))
    assert (float(digits.train.min()), float(digits.train.max())) == (-1.0, 1.0)
    raw = torch.randint(0, 256, (3, 1, 28, 28)).float()
    raw.view(-1)[:2] = torch.tensor([0.0, 255.0])
    labels = torch.arange(3)
    images = Images((raw - 70) / 80, labels, (raw[:2] - 70) / 80, labels[:2], ("a", "b", "c"))
    found = from_minus_one_to_one(images)
    assert found.train.shape == (3, 1, 16, 16)
    assert found.test.shape == (2, 1, 16, 16)
    scaled = raw / 127.5 - 1
    torch.testing.assert_close(found.train[:, 0, 1, 1], scaled[:, 0, :2, :2].mean((1, 2)))
    assert (found.train[:, 0, 0] == -1).all()  # the border


def test_unet_shapes_and_conditions() -> None:
    network = UNet(2, (8, 16, 24), num_classes=3).eval()
    x, t, labels = torch.randn(3, 2, 12, 8), torch.tensor([0, 10, 999]), torch.tensor([0, 1, 3])
    assert torch.equal(network(x, t, labels), torch.zeros_like(x))  # the last layer begins with zeros
    torch.nn.init.normal_(network.conv_out.weight, std=0.1)
    for block in network.modules():
        if hasattr(block, "conv2"):
            torch.nn.init.normal_(block.conv2.weight, std=0.1)
    found = network(x, t, labels)
    assert found.shape == x.shape
    torch.testing.assert_close(found[1:], network(x[1:], t[1:], labels[1:]))
    assert ((found - network(x, t + 300, labels)).abs().amax((1, 2, 3)) > 1e-4).all()
    assert ((found - network(x, t, (labels + 1) % 4)).abs().amax((1, 2, 3)) > 1e-4).all()
    found.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    with pytest.raises(RuntimeError):
        network(torch.randn(1, 2, 6, 6), t[:1], labels[:1])  # not a multiple of 4


def test_unet_attention_mixes_all_pixels() -> None:
    network = UNet(1, (8, 16), num_classes=1).eval()
    attention = network.middle[0]
    x = torch.randn(1, 16, 3, 5, requires_grad=True)
    assert torch.equal(attention(x), x)  # its last layer begins with zeros
    torch.nn.init.normal_(attention.proj.weight)
    (gradient,) = torch.autograd.grad(attention(x)[0, 0, 0, 0], x)
    assert (gradient[0].abs().amax(0) > 1e-7).all()


def test_time_embedding_waves() -> None:
    embedding = TimeEmbedding(8, 5)
    embedding.linear_1 = torch.nn.Linear(8, 8)
    with torch.no_grad():
        embedding.linear_1.weight.copy_(torch.eye(8))
        embedding.linear_1.bias.fill_(100.0)  # SiLU of large numbers is the number
    embedding.linear_2 = torch.nn.Identity()
    found = embedding(torch.tensor([0, 7])) - 100
    angles = 7 * 10000.0 ** -(torch.arange(4) / 4)
    expected = torch.stack((torch.cat((torch.ones(4), torch.zeros(4))), torch.cat((angles.cos(), angles.sin()))))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
