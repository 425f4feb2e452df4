"""What an install brings, and what a build does without."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A pure wheel built from a copy of the sources, by a Python in which torch cannot be imported."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in listed:
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            target.write_bytes((ROOT / name).read_bytes())
    code = (
        "import runpy, sys; sys.modules['torch'] = None; "
        "sys.argv = ['setup.py', 'bdist_wheel', '-d', sys.argv[1]]; runpy.run_path('setup.py', run_name='__main__')"
    )
    environment = {**os.environ, "MMFAST_BUILD": "none"}
    line = [sys.executable, "-c", code, str(folder)]
    subprocess.run(line, cwd=source, env=environment, check=True, capture_output=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_wheel_is_pure_python_and_holds_every_package(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert Path(str(wheel.filename)).name.endswith("-py3-none-any.whl")
    for folder, installed in (("mmfast", "mmfast"), ("kernels", "mmfast/kernels"), ("benchmarks", "mmfast/benchmarks")):
        for path in (ROOT / folder).rglob("*.py"):
            assert f"{installed}/{path.relative_to(ROOT / folder)}" in names
    assert "mmfast/py.typed" in names
    tops = {name.split("/")[0] for name in names}
    assert all(top == "mmfast" or top.endswith(".dist-info") for top in tops), tops


def test_requirements_are_floors(wheel: zipfile.ZipFile) -> None:
    metadata = wheel.read(next(name for name in wheel.namelist() if name.endswith("METADATA"))).decode()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert len(required) == 2
    assert "Requires-Dist: torch>=" in required[0]
    assert re.match(r"Requires-Dist: triton>=[\d.]+; platform_system == .Linux.", required[1])
    assert "==" not in re.sub(r";.*", "", "".join(required))


def test_nothing_imports_plain_kernels() -> None:
    """`kernels` is the name of another project's package."""
    pattern = re.compile(r"^\s*(from|import) kernels\b", re.MULTILINE)
    found = [path for path in ROOT.glob("*/**/*.py") if ".venv" not in path.parts and pattern.search(path.read_text())]
    assert found == []


def test_floors_point_down() -> None:
    """models -> nn -> ops -> kernels | reference: no floor imports one above it."""
    above = {
        "kernels": "reference|ops|nn|models|backends",
        "reference": "ops|nn|models",
        "ops": "nn|models",
        "nn": "models",
    }
    for floor, names in above.items():
        folder = ROOT / floor if floor == "kernels" else ROOT / "mmfast" / floor
        pattern = re.compile(
            rf"^\s*(from|import) \.*(mmfast\.)?({names})\b|^\s*from \.\. import .*\b({names})\b", re.MULTILINE
        )
        for path in folder.glob("*.py"):
            found = pattern.search(path.read_text())
            assert found is None, f"{path}: {found.group(0) if found else ''}"


def test_an_op_has_its_name_everywhere() -> None:
    from mmfast import backends, ops

    for name in ops.NAMES:
        for place in (
            f"mmfast/ops/{name}.py",
            f"mmfast/reference/{name}.py",
            f"kernels/{name}.py",
            f"tests/ops/test_{name}.py",
            f"benchmarks/bench_{name}.py",
        ):
            assert (ROOT / place).is_file(), place
    assert set(backends.TABLE) == set(ops.NAMES)
