"""Build script. It never imports torch.

MMFAST_BUILD says what becomes of the CUDA C++ kernels in csrc/:

    auto      (the default) compiled by nvcc where there is one, else left out: a pure Python install
    cuda      compiled by nvcc, or the build fails
    emulated  compiled by the C++ compiler to run on a CPU, for `mmfast verify --backend cuda` without a GPU
    none      left out

MMFAST_CUDA_ARCHS ("80;90;100") lists the architectures, MAX_JOBS the compilations at a time. See csrc/build.py.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent

# Directory of each top-level package. `kernels/` and `benchmarks/` are installed below `mmfast`, since
# plain `kernels` is the name of another project's package.
SOURCES = {"mmfast": "mmfast", "mmfast.kernels": "kernels", "mmfast.benchmarks": "benchmarks"}
CSRC = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*") if path.suffix != ".pyc")


def builder():
    """The module csrc/build.py."""
    spec = importlib.util.spec_from_file_location("mmfast_build", ROOT / "csrc" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def packages() -> list[str]:
    """All packages: every folder below a source that holds an `__init__.py`."""
    found = []
    for name, folder in SOURCES.items():
        for init in sorted((ROOT / folder).rglob("__init__.py")):
            parts = init.parent.relative_to(ROOT / folder).parts
            found.append(".".join((name, *parts)))
    return found


class NinjaBuild(build_ext):
    """Leaves the compiling to csrc/build.py."""

    def build_extension(self, ext: Extension) -> None:
        """Build mmfast._cuda where setuptools wants it."""
        try:
            BUILDER.build(MODE, Path(self.get_ext_fullpath(ext.name)))
        except BUILDER.BuildError as failed:
            sys.exit(f"mmfast: {failed} (MMFAST_BUILD=none installs without CUDA C++ kernels)")


class CompleteSdist(sdist):
    """A source distribution holds csrc/ whatever is built here."""

    def make_distribution(self) -> None:
        """Add the files that setuptools cannot know of: the list it has made by now is egg_info's, not this class's."""
        self.filelist.extend(CSRC)
        super().make_distribution()


BUILDER = builder()
try:
    MODE = BUILDER.mode_of(os.environ.get("MMFAST_BUILD"))
except BUILDER.BuildError as refused:
    sys.exit(f"mmfast: {refused}")
if MODE == "none":
    print("mmfast: installing without CUDA C++ kernels (`mmfast info` says so too)", file=sys.stderr)

setup(
    packages=packages(),
    package_dir=SOURCES,
    package_data={"mmfast": ["py.typed"], "mmfast.benchmarks": ["*.csv", "results/*.csv"]},
    ext_modules=[] if MODE == "none" else [Extension("mmfast._cuda", ["csrc/bindings.cpp"])],
    cmdclass={"build_ext": NinjaBuild, "sdist": CompleteSdist},
)
