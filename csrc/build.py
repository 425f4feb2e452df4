"""Builds mmfast._cuda with ninja: by nvcc for GPUs, or by a C++ compiler for a CPU, against `emulation/`.

setup.py calls `build`; so does the command line, for tests:

    python csrc/build.py emulated --sanitize address --output build/emulated/address

It imports neither torch nor setuptools. The C++ compiler is CXX or g++, nvcc that of CUDA_HOME or the path.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
ROOT = SOURCES.parent
ARCHITECTURES = "80;90;100"
"""What a build is for unless MMFAST_CUDA_ARCHS says otherwise: Ampere, Hopper, Blackwell.

No kernel uses what 90a and 100a alone have, so all are assembled from one PTX: half the time of a compilation for each,
and code for 100 runs on 10.3 too, which code for 100a does not.
"""
MEMORY_A_JOB = 2 << 30
"""Bytes that one compilation may need: parallel jobs are as many as fit."""
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX") or ".so"
SANITIZERS = {
    "address": "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer",
    "thread": "-fsanitize=thread",
}
PRELOADED = {"address": ("libasan.so", "libubsan.so", "libstdc++.so"), "thread": ("libtsan.so", "libstdc++.so")}


class BuildError(RuntimeError):
    """The extension cannot be built; the message says what is missing."""


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME or CUDA_PATH, of the path, or of /usr/local/cuda."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    found = [Path(home) / "bin" / "nvcc" for home in homes]
    on_path = shutil.which("nvcc")
    found += [Path(on_path)] if on_path else []
    return next((path for path in [*found, Path("/usr/local/cuda/bin/nvcc")] if path.exists()), None)


def mode_of(asked: str | None) -> str:
    """ "cuda", "emulated" or "none", of MMFAST_BUILD: "auto" (the default) is "cuda" where there is an nvcc."""
    asked = (asked or "auto").strip().lower()
    if asked not in ("auto", "cuda", "emulated", "none"):
        raise BuildError(f"MMFAST_BUILD must be auto, cuda, emulated or none, got {asked!r}")
    if asked == "cuda" and find_nvcc() is None:
        raise BuildError("MMFAST_BUILD=cuda needs nvcc, on the path or in CUDA_HOME, and there is none")
    if asked == "auto":
        return "none" if find_nvcc() is None else "cuda"
    return asked


def architectures(nvcc: Path) -> list[str]:
    """What MMFAST_CUDA_ARCHS lists, or those of ARCHITECTURES that this nvcc knows."""
    asked = os.environ.get("MMFAST_CUDA_ARCHS", "").replace(",", ";").replace(" ", ";")
    listed = [arch for arch in asked.split(";") if arch]
    if listed:
        return listed
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    return [arch for arch in ARCHITECTURES.split(";") if f"compute_{arch}" in known]


def code_options(archs: list[str]) -> str:
    """nvcc's options: those of a family of their own ("90a") each from its PTX, the others from that of the oldest."""
    own = [arch for arch in archs if not arch.isdigit()]
    options = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in own]
    shared = sorted((arch for arch in archs if arch.isdigit()), key=int)
    if shared:
        # One option for each: ninja's shell would take a list in brackets for a pattern.
        options += [f"-gencode=arch=compute_{shared[0]},code=sm_{arch}" for arch in shared]
    return " ".join(options)


def build(mode: str, output: Path, *, sanitize: str | None = None, folder: Path | None = None) -> Path:
    """Build the extension as the file `output`, and return it. `folder` is where objects are kept for the next build.

    Raises BuildError, with the compiler's words already printed, if a part is missing or does not compile.
    """
    if mode == "cuda" and sanitize:
        raise BuildError("a sanitizer needs the emulated build")
    folder = folder or ROOT / "build" / mode
    objects = folder / (sanitize or "plain") if mode == "emulated" else folder
    objects.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # two builds in one folder would spoil ninja's log
        fcntl.flock(lock, fcntl.LOCK_EX)
        plan = objects / f"{output.parent.name}.ninja"
        plan.write_text(_rules(mode, output.resolve(), objects.resolve(), folder.resolve(), sanitize))
        command = [_ninja(), "-f", str(plan), "-j", str(jobs()), "--quiet"]
        failed = subprocess.run(command, check=False).returncode
    if failed:
        raise BuildError(f"the {mode} build of mmfast._cuda failed: see the compiler's messages above")
    return output


def jobs() -> int:
    """Compilations at a time: one a core, as far as memory reaches, or MAX_JOBS."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("MAX_JOBS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    try:
        memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        memory = cores * MEMORY_A_JOB
    return max(1, min(cores, memory // MEMORY_A_JOB))


def environment(sanitize: str) -> dict[str, str]:
    """Variables under which Python can load an extension that was built with a sanitizer."""
    compiler = _compiler()
    paths = []
    for name in PRELOADED[sanitize]:
        said = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        paths.append(str(Path(said.stdout.strip()).resolve()))
    return {
        "LD_PRELOAD": ":".join(paths),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:halt_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "TSAN_OPTIONS": "halt_on_error=1:exitcode=66:report_signal_unsafe=0:atexit_sleep_ms=0",
    }


def _rules(mode: str, output: Path, objects: Path, shared: Path, sanitize: str | None) -> str:
    """The ninja file. Bindings know neither CUDA nor the emulation: one object serves every emulated build."""
    compiler = _compiler()
    warnings = "-Wall -Wextra"
    common = f"-std=c++20 -O2 -fPIC -fvisibility=hidden {warnings}"
    includes = " ".join(f"-isystem {path}" for path in (_pybind11(), sysconfig.get_path("include")))
    if mode == "cuda":
        nvcc = find_nvcc()
        if nvcc is None:
            raise BuildError("a CUDA build needs nvcc, on the path or in CUDA_HOME, and there is none")
        archs = architectures(nvcc)
        kernel = (
            f"{nvcc} -MD -MF $out.d -std=c++20 -O3 -ccbin {compiler} -Xcompiler=-fPIC,-fvisibility=hidden "
            f"-Xptxas=-warn-spills {code_options(archs)} -c $in -o $out"
        )
        link = f"{nvcc} -shared -cudart=static -ccbin {compiler} -Xlinker=--exclude-libs,ALL -Xlinker=-s $in -o $out"
        define = f"-DMMFAST_ARCHITECTURES='\"{';'.join(archs)}\"'"
    else:
        checks = SANITIZERS[sanitize] if sanitize else ""
        # To compile takes longer than to run; AddressSanitizer's checks are what an optimiser is slowest with.
        level = common.replace("-O2", {"address": "-O0 -g", "thread": "-O1 -g"}.get(sanitize or "", "-O1"))
        kernel = (
            f"{compiler} -MMD -MF $out.d {level} -fno-strict-aliasing -Wno-unknown-pragmas {checks} "
            "-x c++ -c $in -o $out"
        )
        link = f"{compiler} -shared {checks} $in -o $out"
        define = "-DMMFAST_EMULATED"
    lines = [
        "ninja_required_version = 1.8",
        f"builddir = {shared}",  # one log: what a build made, the next need not make again
        f"rule cxx\n  command = {compiler} -MMD -MF $out.d {common} {includes} {define} -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc\n  description = $in",
        f"rule cu\n  command = {kernel}\n  depfile = $out.d\n  deps = gcc\n  description = $in",
        f"rule link\n  command = {link}\n  description = $out",
    ]
    made = []
    # The largest first: the last to finish decides how long a build takes.
    for source in sorted(kernels(mode), key=lambda path: -path.stat().st_size):
        target = objects / f"{source.stem}.o"
        lines.append(f"build {_path(target)}: cu {_path(source)}")
        made.append(target)
    bindings = shared / "bindings.o"
    lines.insert(6, f"build {_path(bindings)}: cxx {_path(SOURCES / 'bindings.cpp')}")
    lines.append(f"build {_path(output)}: link {' '.join(map(_path, [bindings, *made]))}")
    return "\n".join([*lines, f"default {_path(output)}", ""])


def kernels(mode: str) -> list[Path]:
    """The .cu files of a build: files named after an architecture are not for the emulation, its own for it alone."""
    found = sorted(SOURCES.glob("*.cu"))
    if mode == "emulated":
        return [path for path in found if "_sm" not in path.stem] + sorted((SOURCES / "emulation").glob("*.cu"))
    return found


def _path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _compiler() -> str:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not compiler:
        raise BuildError("there is no C++ compiler: install g++ 11 or newer, or name one in CXX")
    return compiler


def _ninja() -> str:
    try:
        import ninja

        bundled = Path(ninja.BIN_DIR) / "ninja"
        if bundled.exists():
            return str(bundled)
    except ImportError:
        pass
    found = shutil.which("ninja")
    if found is None:
        raise BuildError("there is no ninja: pip install ninja")
    return found


def _pybind11() -> str:
    """pybind11's headers: its own package's, or those that PyTorch carries."""
    for package, below in (("pybind11", "include"), ("torch", "include")):
        spec = importlib.util.find_spec(package)
        for place in (spec.submodule_search_locations or []) if spec else []:
            if (Path(place) / below / "pybind11" / "pybind11.h").exists():
                return str(Path(place) / below)
    raise BuildError("there is no pybind11: pip install pybind11")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("mode", choices=("cuda", "emulated"))
    parser.add_argument("--sanitize", choices=tuple(SANITIZERS))
    parser.add_argument("--output", type=Path, help="folder of the extension (default: build/MODE[/SANITIZER])")
    args = parser.parse_args()
    name = args.sanitize or ("plain" if args.mode == "emulated" else "")
    folder = args.output or ROOT / "build" / args.mode / name
    try:
        print(build(args.mode, folder.resolve() / f"_cuda{SUFFIX}", sanitize=args.sanitize))
        if args.sanitize:
            print("\n".join(f"{key}={value}" for key, value in environment(args.sanitize).items()))
    except BuildError as failed:
        print(f"csrc/build.py: {failed}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
