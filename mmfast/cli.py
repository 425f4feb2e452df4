"""The command line: `mmfast info | verify | audit | bench | demo`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from . import __version__

COMMANDS = {
    "info": "versions, devices, backends and which one each op takes",
    "verify": "grade every op against its float64 reference",
    "audit": "compile every kernel without a GPU: registers, spills, shared memory, vector loads",
    "bench": "time ops and models beside their peers; append to a CSV file",
    "demo": "train a model on real images: a ViT, or a CLIP; compare with a peer's",
}
"""Command -> help. `mmfast.commands.NAME` has `add_arguments(parser)` and `run(args) -> exit code`."""

EXTRAS = {
    "rich": "cli",
    "pytest": "bench",
    "pytest_benchmark": "bench",
    "matplotlib": "demo",
    "sklearn": "demo",
    "timm": "demo",
}
"""Module that a command may lack -> the extra that brings it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 good, 1 a check failed, 2 it could not run."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="mmfast", description="Fused kernels for vision-language and diffusion models in PyTorch."
    )
    parser.add_argument("--version", action="version", version=f"mmfast {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((word for word in argv if not word.startswith("-")), None)
    try:
        for name, text in COMMANDS.items():
            command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
            if name == chosen:
                importlib.import_module(f".commands.{name}", __package__).add_arguments(command)
        args = parser.parse_args(argv)
        return int(importlib.import_module(f".commands.{args.command}", __package__).run(args))
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        print(
            f"mmfast {chosen}: {package} is not installed: pip install 'mmfast[{EXTRAS[package]}]'",
            file=sys.stderr,
        )
        return 2
    except ValueError as wrong:
        print(f"mmfast {chosen}: {wrong}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
