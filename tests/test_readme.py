"""What the README says is so."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

import mmfast
from mmfast.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_first_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Its lines as they stand, on a CPU and with a smaller model."""
    pytest.importorskip("timm")
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    assert len([line for line in code.splitlines() if line]) == 5
    for on_gpu, on_cpu in ((".cuda()", ""), (', device="cuda"', ""), ("vit_base", "vit_tiny"), ("randn(8", "randn(1")):
        assert on_gpu in code
        code = code.replace(on_gpu, on_cpu)
    names: dict = {}
    exec(code, names)
    assert names["logits"].shape == (1, 1000)
    assert "add_layer_norm" in capsys.readouterr().out


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET", "0") == "1", reason="the interpreter gives another reason")
def test_the_explanation_is_what_is_printed() -> None:
    with mmfast.backend(None):
        printed = str(mmfast.explain(mmfast.ops.layer_norm, torch.randn(4, 768)))
    assert printed in README


def test_commands_and_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for command in set(re.findall(r"^mmfast ([a-z]+)", README, re.MULTILINE)) - {"makes"}:
        assert command in COMMANDS, command


def test_files_that_it_names_exist() -> None:
    for name in set(re.findall(r"`((?:mmfast|kernels|tests|benchmarks)/[\w/.]+)`", README)):
        assert (ROOT / name).exists(), name


def test_every_environment_variable_is_in_the_table() -> None:
    read = set()
    for path in (ROOT / "mmfast").rglob("*.py"):
        read |= set(re.findall(r"environ(?:\.get\(|\[)\"(\w+)\"", path.read_text()))
    ours = {name for name in read if name.startswith(("MMFAST", "TRITON"))}
    assert ours
    assert all(f"`{name}=" in README for name in ours), ours
