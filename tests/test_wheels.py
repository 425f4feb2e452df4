"""Wheels of every mode, installed into environments that hold nothing else, and what runs there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SITE = Path(torch.__file__).parent.parent
"""Where torch is installed here."""
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
EXTENSION = f"mmfast/_cuda{SUFFIX}"
OURS = ("MMFAST_", "PYTHON", "CUDA_HOME", "CUDA_PATH", "TRITON_", "CXX", "MAX_JOBS")
# nvcc may lie in /usr/local/cuda, which no variable hides.
WITHOUT_NVCC = """
import pathlib
exists = pathlib.Path.exists
pathlib.Path.exists = lambda path, **options: path.name != "nvcc" and exists(path, **options)
"""
RUN_SETUP = """
import runpy, sys
runpy.run_path("setup.py", run_name="__main__")
"""

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not in a checkout")


def clean(**more: str) -> dict[str, str]:
    """The environment without what this run has set, and without a sanitizer."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OURS) and name != "LD_PRELOAD"}
    return {**kept, **more}


def call(line: list[Any], **options: Any) -> str:
    done = subprocess.run([str(part) for part in line], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copy_of_the_sources(folder: Path, *, linked: bool) -> Path:
    """What git would commit. With `linked` csrc is the tree's own, so that its objects serve again."""
    listed = call(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT).splitlines()
    for name in listed:
        if (ROOT / name).is_file() and not (linked and name.startswith("csrc/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    if linked:
        (folder / "csrc").symlink_to(ROOT / "csrc")
    return folder


def setup(source: Path, mode: str, *arguments: Any, before: str = "", **environment: str) -> str:
    """Run setup.py; what it said if it failed."""
    line = [sys.executable, "-c", before + RUN_SETUP, *map(str, arguments)]
    variables = clean(MMFAST_BUILD=mode, **environment)
    done = subprocess.run(line, cwd=source, env=variables, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def wheel(source: Path, mode: str, folder: Path, **options: Any) -> Path:
    said = setup(source, mode, "bdist_wheel", "-d", folder, **options)
    assert not said, said
    return next(folder.glob("*.whl"))


class Venv:
    """A new environment with a wheel, and the torch of this one by a path alone, which brings no mmfast."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        call([sys.executable, "-m", "venv", "--without-pip", folder])
        self.python = folder / "bin" / "python"
        self.site = next((folder / "lib").glob("python*/site-packages"))
        line = [sys.executable, "-m", "pip", "--python", self.python, "install", "-q", "--no-index", "--no-deps", wheel]
        call(line, env=clean(PIP_DISABLE_PIP_VERSION_CHECK="1"))
        (self.site / "torch_of_the_tests.pth").write_text(f"{SITE}\n")
        self.folder = folder

    def run(self, code: str, **environment: str) -> str:
        """What the code prints, run away from the sources. All of mmfast must come from the wheel."""
        code = textwrap.dedent(code) + (
            "\nimport sys\n"
            "ours = [m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == 'mmfast' and m.__file__]\n"
            f"assert ours and all(file.startswith({str(self.site)!r}) for file in ours), ours\n"
        )
        return call([self.python, "-c", code], cwd=self.folder, env=clean(**environment))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources in which an extension of another build lies about, as after `make gpu-check`."""
    folder = copy_of_the_sources(tmp_path_factory.mktemp("source"), linked=True)
    (folder / EXTENSION).write_bytes(b"stale")
    return folder


@pytest.fixture(scope="module")
def pure(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel(source, "none", tmp_path_factory.mktemp("pure"))


def modules(source: Path) -> set[str]:
    """Every Python file of these sources, as it is named in a wheel."""
    folders = {"mmfast": "mmfast", "kernels": "mmfast/kernels", "benchmarks": "mmfast/benchmarks"}
    return {
        f"{installed}/{path.relative_to(source / folder)}"
        for folder, installed in folders.items()
        for path in (source / folder).rglob("*.py")
    }


def test_a_pure_wheel_takes_no_extension_that_lies_about(source: Path, pure: Path) -> None:
    assert pure.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(pure).namelist()
    assert modules(source) <= set(names)
    assert not [name for name in names if name.endswith((".so", ".cu", ".cuh", ".h", ".cpp"))]


def test_a_pure_wheel_says_why_it_has_no_cuda(pure: Path, tmp_path: Path) -> None:
    venv = Venv(tmp_path / "venv", pure)
    said = venv.run(
        """
        import torch, mmfast, mmfast.cuda
        from mmfast import cli
        x = torch.randn(3, 8)
        torch.testing.assert_close(mmfast.ops.layer_norm(x), torch.nn.functional.layer_norm(x, (8,)))
        print(mmfast.cuda.missing())
        try:
            with mmfast.backend("cuda"):
                mmfast.ops.layer_norm(x)
        except mmfast.BackendError as error:
            print(error)
        cli.main(["info"])
        """,
        COLUMNS="200",
    )
    assert said.count("this install has no CUDA C++ kernels (built without nvcc)") >= 3


def test_auto_without_nvcc_is_pure_and_cuda_fails(source: Path, tmp_path: Path) -> None:
    made = wheel(source, "auto", tmp_path / "auto", before=WITHOUT_NVCC, PATH="/nowhere")
    assert made.name.endswith("-py3-none-any.whl")
    said = setup(source, "cuda", "bdist_wheel", "-d", tmp_path / "cuda", before=WITHOUT_NVCC, PATH="/nowhere")
    assert "MMFAST_BUILD=cuda needs nvcc, on the path or in CUDA_HOME, and there is none" in said
    assert not (tmp_path / "cuda").exists()
    assert "MMFAST_BUILD must be auto, cuda, emulated or none, got 'gpu'" in setup(source, "gpu", "--version")


def extension_is_fresh(built: Path) -> bool:
    """Whether the tree's build is of its sources as they are, so that nothing is compiled again."""
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cu", ".cuh", ".h", ".cpp", ".py")]
    return built.exists() and built.stat().st_mtime > max(path.stat().st_mtime for path in sources)


IS_LAYER_NORM = """
import torch, mmfast, mmfast.cuda
x, weight, bias = torch.randn(5, 72), torch.randn(72), torch.randn(72)
leaves = [t.requires_grad_() for t in (x, weight, bias)]
with mmfast.backend("cuda"):
    choice = mmfast.explain(mmfast.ops.layer_norm, x)[0]
    found = mmfast.ops.layer_norm(*leaves)
wanted = torch.nn.functional.layer_norm(x, (72,), weight, bias)
torch.testing.assert_close(found, wanted)
dy = torch.randn(5, 72)
for got, want in zip(torch.autograd.grad(found, leaves, dy), torch.autograd.grad(wanted, leaves, dy)):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
print(choice.backend, mmfast.cuda.emulated(), mmfast.cuda.extension().__file__)
"""


@pytest.mark.cuda
@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="of the plain build")
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_an_emulated_wheel_computes(source: Path, tmp_path: Path, device: torch.device) -> None:
    """And `build_ext --inplace`, as an editable install does it, puts the extension where git ignores it."""
    if device.type == "cuda":
        pytest.skip("of the emulated build alone")
    made = wheel(source, "emulated", tmp_path)
    tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert made.name.endswith(f"-cp{sys.version_info[0]}{sys.version_info[1]}-{tag}.whl")
    assert {EXTENSION, *modules(source)} <= set(zipfile.ZipFile(made).namelist())
    venv = Venv(tmp_path / "venv", made)
    assert venv.run(IS_LAYER_NORM).split() == ["cuda", "True", str(venv.site / EXTENSION)]
    (source / EXTENSION).unlink()
    said = setup(source, "emulated", "build_ext", "--inplace")
    assert not said, said
    assert (source / EXTENSION).stat().st_size > 100_000
    assert call(["git", "check-ignore", EXTENSION], cwd=ROOT).strip() == EXTENSION


DRIVER = """
#include <cstdio>
#include <cstdlib>
__attribute__((constructor)) static void loaded() { std::puts("the driver was loaded"); }
"""


@pytest.mark.skipif(
    not extension_is_fresh(ROOT / "build" / "cuda" / f"_cuda{SUFFIX}"), reason="there is no CUDA build: make cuda"
)
def test_a_cuda_wheel_imports_without_a_gpu(source: Path, tmp_path: Path) -> None:
    """Small, without libcudart, and its import leaves the driver alone: here a library that says when it is loaded."""
    asked = os.environ.get("MMFAST_CUDA_ARCHS", "")
    made = wheel(source, "cuda", tmp_path, MMFAST_CUDA_ARCHS=asked)
    assert made.stat().st_size < 10e6
    venv = Venv(tmp_path / "venv", made)
    needed = call(["ldd", venv.site / EXTENSION])
    assert not re.search("libcuda|libcudart|libtorch|libc10|not found", needed), needed
    (tmp_path / "driver.cpp").write_text(DRIVER)
    library = tmp_path / "libcuda.so.1"
    call(["g++", "-shared", "-fPIC", "-o", library, tmp_path / "driver.cpp"])
    said = venv.run(
        """
        import torch, mmfast, mmfast.cuda
        assert mmfast.cuda.missing() is None and not mmfast.cuda.emulated()
        print(";".join(mmfast.cuda.architectures()))
        x = torch.randn(3, 8)
        print(mmfast.explain(mmfast.ops.layer_norm, x)[0].backend)
        """,
        LD_LIBRARY_PATH=str(tmp_path),
        CUDA_VISIBLE_DEVICES="",
    )
    assert said.split() == [asked or "80;90;100", "torch"]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source distribution, made of a copy and unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    said = setup(copy_of_the_sources(folder / "source", linked=False), "none", "sdist", "-d", folder)
    assert not said, said
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data") if hasattr(tarfile, "data_filter") else archive.extractall(folder)
    return next(folder.glob("mmfast-*[0-9]"))


def test_a_source_distribution_holds_what_a_build_needs(unpacked: Path) -> None:
    listed = call(["git", "ls-files", "--cached", "--others", "--exclude-standard", "csrc"], cwd=ROOT).splitlines()
    for name in [name for name in listed if (ROOT / name).is_file()]:
        assert (unpacked / name).read_bytes() == (ROOT / name).read_bytes(), name
    assert len(list((unpacked / "csrc" / "emulation").iterdir())) > 1
    for folder in ("mmfast", "kernels", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            assert (unpacked / path.relative_to(ROOT)).is_file(), path
    assert not list(unpacked.rglob("*.so"))


@pytest.fixture(scope="module")
def isolated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with what pyproject.toml asks for to build, and no more."""
    folder = tmp_path_factory.mktemp("isolated")
    call([sys.executable, "-m", "venv", "--without-pip", folder])
    site = next((folder / "lib").glob("python*/site-packages"))
    for name in ("setuptools", "_distutils_hack", "pybind11", "ninja"):
        for path in (SITE / name, *SITE.glob(f"{name}-*.dist-info")):
            (site / path.name).symlink_to(path)
    call([folder / "bin" / "python", "-c", "import setuptools, pybind11, ninja"])
    return folder / "bin" / "python"


def built_from(unpacked: Path, isolated: Path, mode: str, folder: Path) -> Path:
    """A wheel by the build backend's own hook, which is what pip calls."""
    code = f"import setuptools.build_meta as backend; print(backend.build_wheel({str(folder)!r}))"
    hidden = f"import importlib.util as u; assert not u.find_spec('torch') and not u.find_spec('numpy'); {code}"
    call([isolated, "-c", hidden], cwd=unpacked, env=clean(MMFAST_BUILD=mode))
    return next(folder.glob("*.whl"))


def test_a_source_distribution_builds_a_pure_wheel(unpacked: Path, isolated: Path, tmp_path: Path) -> None:
    made = built_from(unpacked, isolated, "none", tmp_path)
    assert made.name.endswith("-py3-none-any.whl")
    assert modules(unpacked) <= set(zipfile.ZipFile(made).namelist())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_a_source_distribution_builds_an_emulated_wheel(unpacked: Path, isolated: Path, tmp_path: Path) -> None:
    """Every file is compiled anew: a minute or two."""
    made = built_from(unpacked, isolated, "emulated", tmp_path)
    venv = Venv(tmp_path / "venv", made)
    assert venv.run(IS_LAYER_NORM).split() == ["cuda", "True", str(venv.site / EXTENSION)]
