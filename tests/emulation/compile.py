"""Compiles the CUDA C++ programs of these tests by a host compiler, once for each content, and runs them."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
KEPT = ROOT / "build" / "emulation-tests"
RACE = 66
"""The exit code of a program in which ThreadSanitizer found a race."""
OVERRUN = 67
"""The exit code of a program in which AddressSanitizer found an access to memory that is not the kernel's."""


def _build_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mmfast_build", CSRC / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = _build_script()


def compiler() -> str:
    """The host compiler; skips the test where there is none."""
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if found is None:
        pytest.skip("needs a C++ compiler")
    return found


def nvcc() -> Path:
    """NVIDIA's compiler; skips the test where there is none."""
    found: Path | None = build.find_nvcc()
    if found is None:
        pytest.skip("needs nvcc")
    return found


def compiled(source: str, *, sanitize: str | None = None, library: bool = False, flags: tuple[str, ...] = ()) -> Path:
    """A program, or a shared library, made of a source in this folder. Kept for as long as nothing in it changes."""
    level = ["-O1", "-g", *build.SANITIZERS[sanitize].split()] if sanitize else ["-O2"]
    command = [compiler(), "-std=c++20", *level, "-Wall", "-Wextra", "-fno-strict-aliasing"]
    command += ["-Wno-unknown-pragmas", "-I", str(CSRC), *(["-shared", "-fPIC"] if library else []), *flags]
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=True).stdout
    key = hashlib.sha256("\0".join([version, *command]).encode())
    for path in sorted(_read_by(HERE / source)):
        key.update(path.read_bytes())
    KEPT.mkdir(parents=True, exist_ok=True)
    name = "-".join([Path(source).stem, sanitize or "plain", *(flag.strip("-") for flag in flags)])
    made = KEPT / f"{name}.{key.hexdigest()[:16]}{'.so' if library else ''}"
    with open(KEPT / f"{name}.lock", "w") as lock:  # workers share the result
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            for old in KEPT.glob(f"{name}.*"):
                if old.suffix != ".lock":
                    old.unlink()
            partial = made.with_name(made.name + ".partial")
            command += ["-x", "c++", str(HERE / source), "-o", str(partial)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if sanitize and re.search(r"cannot find .*lib[at]san|cannot find -l[at]san", done.stderr):
                pytest.skip(f"needs the compiler's library for -fsanitize={sanitize}")
            if done.returncode:
                pytest.fail(f"{' '.join(command)}\n{done.stderr}", pytrace=False)
            partial.rename(made)
    return made


def _read_by(source: Path, found: set[Path] | None = None) -> set[Path]:
    """The source and every header of the project that it includes."""
    found = set() if found is None else found
    found.add(source)
    for name in re.findall(r'#include "([^"]+)"', source.read_text()):
        header = next(path for path in (source.parent / name, CSRC / name) if path.exists())
        if header not in found:
            _read_by(header, found)
    return found


def load(source: str) -> ctypes.CDLL:
    """The functions of a source in this folder."""
    return ctypes.CDLL(str(compiled(source, library=True)))


def run(program: Path, *args: object) -> tuple[int, str]:
    """Exit code, and output with errors. Where its memory map does not suit ThreadSanitizer, without randomisation."""
    environment = {
        **os.environ,
        "ASAN_OPTIONS": f"detect_leaks=0:exitcode={OVERRUN}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:exitcode={OVERRUN}",
        "TSAN_OPTIONS": f"halt_on_error=1:exitcode={RACE}:atexit_sleep_ms=0",
    }
    command = [str(program), *map(str, args)]
    for prefix in ([], ["setarch", platform.machine(), "-R"]):
        if prefix and not shutil.which("setarch"):
            break
        done = subprocess.run([*prefix, *command], capture_output=True, text=True, env=environment, timeout=120)
        output = done.stdout + done.stderr
        if not re.search("ThreadSanitizer: unexpected memory mapping", output):
            return done.returncode, output
    pytest.skip("ThreadSanitizer does not run here: set vm.mmap_rnd_bits to 28")
