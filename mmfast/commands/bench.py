"""`mmfast bench`: time ops and models beside their peers, show a table, and append a CSV row per measurement.

The benchmarks are pytest-benchmark files that are installed as `mmfast.benchmarks`.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import re
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("names", nargs="*", metavar="OP|MODEL", help=f"default: all of {', '.join(available())}")
    parser.add_argument("--peer", action="append", default=[], help="measure mmfast beside this alone; repeatable")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--csv", type=Path, metavar="PATH", help="append one row a measurement to this file")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="append to FOLDER/<device>-<date>.csv")
    parser.add_argument("--quick", action="store_true", help="few rounds, one pass, small shapes")
    parser.add_argument("--full", action="store_true", help="also what takes minutes: every shape, max-autotune")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="measure what has TEXT in its name")
    parser.add_argument(
        "--predict", action="store_true", help="times that the CUDA C++ kernels should take on an H200, by a model"
    )
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="start no new comparison after this; take turns"
    )


def run(args: argparse.Namespace) -> int:
    """Run the benchmarks; 1 if one failed or a bound does not hold."""
    if args.predict:
        _predict(args.csv)
        return 0
    import pytest
    import pytest_benchmark  # noqa: F401  (its absence is reported before anything runs)
    import torch

    files = [_file(name) for name in args.names or available()]
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU")
    line = [str(path) for path in files]
    # The settings of a checkout's own tests do not apply here, and an installed copy has none.
    line += ["-o", "python_files=bench_*.py", "-o", "addopts=", "--rootdir", str(folder()), "--import-mode=importlib"]
    line += ["-p", "no:cacheprovider", "-qq", "--capture=sys", "--tb=short"]
    line += ["--benchmark-quiet", "--benchmark-disable-gc", "--device", device]
    line += [f"--peer={peer}" for peer in args.peer] + [f"--only={text}" for text in args.only]
    line += [f"--{name}" for name in ("quick", "full") if getattr(args, name)]
    line += [] if args.budget is None else [f"--budget={args.budget}"]
    for path in _csv_paths(args, device):
        line += ["--csv", str(path.absolute())]
    return int(pytest.main(line, plugins=[_Progress()]))


def _predict(path: Path | None) -> None:
    """Print what the model says, and write it to `path` if there is one."""
    from rich.table import Table

    from mmfast.benchmarks import _predicted

    from ._console import console

    columns = _predicted.Prediction._fields[:6]
    table = Table(*columns, title="Predicted by a model, not measured: H200", title_justify="left")
    for row in _predicted.predictions():
        table.add_row(*map(str, row[: len(columns)]))
    console.print(table)
    if path is not None:
        _predicted.write(path)


def folder() -> Path:
    """Where the benchmarks are installed."""
    spec = importlib.util.find_spec("mmfast.benchmarks")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("the benchmarks are not installed: pip install mmfast, or pip install -e . in a checkout")
    return Path(next(iter(spec.submodule_search_locations)))


def available() -> list[str]:
    """Names of the benchmarks: ops and models."""
    return sorted(path.stem.removeprefix("bench_") for path in folder().glob("bench_*.py"))


def _file(name: str) -> Path:
    if name not in available():
        raise ValueError(f"expected a benchmark of {', '.join(available())}, got {name!r}")
    return folder() / f"bench_{name}.py"


def _csv_paths(args: argparse.Namespace, device: str) -> list[Path]:
    from ._machine import device_name

    paths = [args.csv] if args.csv else []
    if args.results:
        name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
        day = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        paths.append(args.results / f"{name}-{day}.csv")
    return paths


class _Progress:
    """A progress bar in place of pytest's dots."""

    def __init__(self) -> None:
        self.context: Any = None
        self.advance: Any = None

    def pytest_runtestloop(self, session: Any) -> None:
        from ._console import progress

        self.context = progress("measuring", len(session.items))
        self.advance = self.context.__enter__()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.advance(nodeid.rpartition("::")[2])

    def pytest_sessionfinish(self) -> None:
        if self.context is not None:
            self.context.__exit__(None, None, None)

    def pytest_report_teststatus(self, report: Any) -> tuple[str, str, str] | None:
        if report.passed or report.skipped:
            category = "skipped" if report.skipped else "passed" if report.when == "call" else ""
            return category, "", ""
        return None
