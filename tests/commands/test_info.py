"""`mmfast info` tells what is here, what is not, and why."""

from __future__ import annotations

import platform

import pytest
import torch

from mmfast import backends, cli
from mmfast.commands import info


def test_versions_are_those_that_run() -> None:
    found = dict(info.versions())
    assert found["torch"] == torch.__version__
    assert found["python"] == platform.python_version()
    assert found["mmfast"].startswith("0.")


def test_a_machine_without_a_gpu_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (cuda, *_), (cpu, *_) = info.devices()
    name = info.devices()[0][1]
    assert (cuda, cpu) == ("cuda", "cpu")
    assert name in ("none: torch finds no GPU", "none: torch is a CPU build")


def test_missing_triton_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "TRITON_MISSING", "triton is not installed")
    assert dict(info.backend_states())["triton"] == "missing: triton is not installed"
    assert {row[4] for row in info.choices() if row[1] == "cpu"} == {"triton: triton is not installed"}


def test_choices_are_the_ops_own() -> None:
    rows = {(op, dtype): (backend, why) for op, device, dtype, backend, why in info.choices() if device == "cpu"}
    assert set(rows) == {(op, d) for op in backends.TABLE for d in ("float32", "float16", "bfloat16", "float64")}
    assert rows["layer_norm", "float64"] == ("torch", "triton: float64 has no kernel")


def test_a_forced_backend_shows(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMFAST_BACKEND", "torch")
    with backends.backend("torch"):
        assert ("forced", "torch") in info.backend_states()
        assert cli.main(["info"]) == 0
    shown = capsys.readouterr().out
    assert "torch is forced" in shown
    assert "MMFAST_BACKEND" in shown
