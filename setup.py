"""Build script. It never imports torch, and a machine without nvcc gets a pure Python install."""

from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent

# Directory of each top-level package. `kernels/` and `benchmarks/` are installed below `mmfast`, since
# plain `kernels` is the name of another project's package.
SOURCES = {"mmfast": "mmfast", "mmfast.kernels": "kernels", "mmfast.benchmarks": "benchmarks"}


def packages() -> list[str]:
    """All packages: every folder below a source that holds an `__init__.py`."""
    found = []
    for name, folder in SOURCES.items():
        for init in sorted((ROOT / folder).rglob("__init__.py")):
            parts = init.parent.relative_to(ROOT / folder).parts
            found.append(".".join((name, *parts)))
    return found


setup(
    packages=packages(),
    package_dir=SOURCES,
    package_data={"mmfast": ["py.typed"], "mmfast.benchmarks": ["results/*.csv"]},
)
