"""`mmfast info` tells what is here, what is not, and why."""

from __future__ import annotations

import platform
from types import SimpleNamespace

import pytest
import torch

import mmfast
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
    assert all("triton: triton is not installed" in row[4] for row in info.choices() if row[1] == "cpu")


def test_choices_are_the_ops_own() -> None:
    rows = {(op, dtype): (backend, why) for op, device, dtype, backend, why in info.choices() if device == "cpu"}
    assert set(rows) == {(op, d) for op in backends.TABLE for d in ("float32", "float16", "bfloat16", "float64")}
    assert rows["layer_norm", "float64"] == (
        "torch",
        "cuda: CPU tensor: CUDA needs a GPU; triton: float64 has no kernel",
    )


def test_the_state_of_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmfast.cuda, "_found", None)
    monkeypatch.setattr(mmfast.cuda, "_missing", "built without nvcc")
    assert dict(info.backend_states())["cuda"] == "missing: built without nvcc"
    monkeypatch.setattr(mmfast.cuda, "_missing", None)
    monkeypatch.setattr(mmfast.cuda, "_found", SimpleNamespace(emulated=True, architectures=""))
    assert dict(info.backend_states())["cuda"].startswith("emulated: serves CPU tensors")
    monkeypatch.setattr(mmfast.cuda, "_found", SimpleNamespace(emulated=False, architectures="80;90a"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dict(info.backend_states())["cuda"] == "built for sm_80, sm_90a; no GPU"
    for capability, state in (((9, 0), "ready: built for sm_80, sm_90a"), ((12, 0), "not for compute capability 12.0")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert state in dict(info.backend_states())["cuda"]


def test_a_forced_backend_shows(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMFAST_BACKEND", "torch")
    with backends.backend("torch"):
        assert ("forced", "torch") in info.backend_states()
        assert cli.main(["info"]) == 0
    shown = capsys.readouterr().out
    assert "torch is forced" in shown
    assert "MMFAST_BACKEND" in shown
