"""How the extension with the CUDA C++ kernels is found, and what is said where it is not."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mmfast
from mmfast import ops

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As before the first call that asks for the extension."""
    monkeypatch.setattr(mmfast.cuda, "_found", None)
    monkeypatch.setattr(mmfast.cuda, "_missing", None)


@pytest.mark.usefixtures("nothing_loaded")
@pytest.mark.parametrize("content", [None, b"not a library"], ids=["no file", "not a library"])
def test_a_wrong_path_is_named(content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "_cuda.so"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setenv("MMFAST_EXTENSION", str(path))
    assert str(path) in str(mmfast.cuda.missing())
    assert mmfast.cuda.architectures() == ()
    assert not mmfast.cuda.emulated()
    assert not mmfast.cuda.runs_on((9, 0))
    with pytest.raises(ImportError, match=r"mmfast: .*_cuda\.so"):
        mmfast.cuda.extension()


def test_importing_mmfast_loads_no_extension() -> None:
    code = "import sys, mmfast, mmfast.nn, mmfast.models; sys.exit('mmfast._cuda' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def build_module() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "csrc" / "build.py"))


def test_modes_of_a_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    build = build_module()
    mode_of, failed = build["mode_of"], build["BuildError"]
    namespace = mode_of.__globals__
    monkeypatch.setitem(namespace, "find_nvcc", lambda: None)
    assert [mode_of(asked) for asked in (None, "auto", "none", "Emulated ")] == ["none", "none", "none", "emulated"]
    with pytest.raises(failed, match="needs nvcc"):
        mode_of("cuda")
    with pytest.raises(failed, match="auto, cuda, emulated or none, got 'gpu'"):
        mode_of("gpu")
    monkeypatch.setitem(namespace, "find_nvcc", lambda: tmp_path / "nvcc")
    assert [mode_of(asked) for asked in (None, "cuda")] == ["cuda", "cuda"]


def test_compilations_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = build_module()["jobs"]
    monkeypatch.setenv("MAX_JOBS", "7")
    assert jobs() == 7
    monkeypatch.delenv("MAX_JOBS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    pages = {"SC_PAGE_SIZE": 4096, "SC_AVPHYS_PAGES": (9 << 30) // 4096}
    monkeypatch.setattr(os, "sysconf", lambda name: pages[name])
    assert jobs() == 4  # 2 GiB each
    pages["SC_AVPHYS_PAGES"] = 1
    assert jobs() == 1


def test_the_architectures_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    architectures = build_module()["architectures"]
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho compute_80\necho compute_90\n")
    nvcc.chmod(0o755)
    monkeypatch.delenv("MMFAST_CUDA_ARCHS", raising=False)
    assert architectures(nvcc) == ["80", "90"]  # this compiler knows no 100
    monkeypatch.setenv("MMFAST_CUDA_ARCHS", "86, 90a")
    assert architectures(nvcc) == ["86", "90a"]


def test_a_build_without_tools_says_which(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    build = build_module()
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build["BuildError"], match="no C\\+\\+ compiler"):
        build["_compiler"]()
    monkeypatch.setitem(sys.modules, "ninja", None)
    with pytest.raises(build["BuildError"], match="no ninja"):
        build["_ninja"]()


@pytest.mark.cuda
def test_the_emulated_build_serves_who_forces_it(device: torch.device) -> None:
    if device.type == "cuda":
        pytest.skip("of the emulated build alone")
    x = torch.randn(3, 64)
    assert mmfast.explain(ops.layer_norm, x)[0].backend == "torch"
    with mmfast.backend("cuda"):
        choice = mmfast.explain(ops.layer_norm, x)[0]
    assert tuple(choice) == ("layer_norm", "cuda", "cuda is forced")


@pytest.mark.cuda
@pytest.mark.sanitized
def test_a_wrong_call_raises_with_the_values() -> None:
    """The host functions check what they are promised: a ValueError, before anything runs."""
    extension = mmfast.cuda.extension()
    with pytest.raises(ValueError, match="layer_norm_forward: width must be 1 to 8192, got 9000"):
        extension.layer_norm_forward(0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 9000, 1e-5, 0, -1, 0)
    with pytest.raises(ValueError, match="got 7"):
        extension.layer_norm_forward(0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 64, 1e-5, 7, -1, 0)


def test_one_ptx_serves_all_but_families_of_their_own() -> None:
    options = build_module()["code_options"]
    assert options(["100", "80", "90"]).split() == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=sm_90",
        "-gencode=arch=compute_80,code=sm_100",
    ]
    assert options(["90a"]) == "-gencode=arch=compute_90a,code=sm_90a"
    assert options(["90a", "86"]).split()[1] == "-gencode=arch=compute_86,code=sm_86"
