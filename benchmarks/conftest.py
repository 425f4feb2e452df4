"""Options of the benchmarks, the fixtures that measure, and the results at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mmfast.benchmarks import _harness, _results
from mmfast.benchmarks._harness import Options, Record, Spec
from mmfast.commands._torchvision import declare_torchvision_ops

declare_torchvision_ops()

OPTIONS = pytest.StashKey[Options]()
RECORDS = pytest.StashKey[dict[Spec, Record]]()
COPY = pytest.StashKey[Record]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mmfast")
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="device to measure on")
    group.addoption("--quick", action="store_true", help="few rounds, one pass, small shapes")
    group.addoption("--peer", action="append", default=[], help="measure mmfast beside this provider alone; repeatable")
    group.addoption("--csv", type=Path, action="append", default=[], help="append rows to this file; repeatable")


def pytest_configure(config: pytest.Config) -> None:
    device, quick = config.getoption("--device"), config.getoption("--quick")
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no GPU")
    passes = 1 if quick else 3
    config.stash[OPTIONS] = Options(device, quick, tuple(config.getoption("--peer")), passes)
    config.stash[RECORDS] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give each `test_*(spec, ...)` the measurements that its module's `measurements(options)` lists."""
    if "spec" in metafunc.fixturenames:
        found = list(metafunc.module.measurements(metafunc.config.stash[OPTIONS]))
        ids = [spec.label(number) for spec, number in found]
        metafunc.parametrize(("spec", "pass_number"), found, ids=ids)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.stash[OPTIONS].device != "cuda":
        return
    for item in items:
        spec = getattr(item, "callspec", None) and item.callspec.params.get("spec")  # type: ignore[attr-defined]
        if spec is not None and not spec.mode.startswith("host"):
            item.add_marker(pytest.mark.benchmark(timer=_harness.CudaTime))


@pytest.fixture(scope="session")
def options(request: pytest.FixtureRequest) -> Options:
    """What the command line asked for."""
    return request.config.stash[OPTIONS]


@pytest.fixture(scope="session")
def copy(request: pytest.FixtureRequest, options: Options) -> Record:
    """The copy that this run's memory-bound rows are held against."""
    return request.config.stash.setdefault(COPY, _harness.copy_bandwidth(options))


@pytest.fixture
def measure(
    request: pytest.FixtureRequest, benchmark: Any, copy: Record, options: Options, spec: Spec, pass_number: int
) -> Callable[..., None]:
    """`measure(call, moved=bytes)` times a call and records it under the test's spec."""

    def run(call: Callable[[], Any], *, moved: int = 0, images: int = 0, gaps: bool = False) -> None:
        record = request.config.stash[RECORDS].setdefault(spec, Record(spec, moved=moved, images=images))
        _harness.measure(benchmark, record, call, options, gaps=gaps)

    return run


@pytest.fixture(autouse=True)
def _ready(options: Options) -> Iterator[None]:
    torch.manual_seed(0)
    if options.device == "cuda":
        yield
        torch.cuda.empty_cache()  # so that peak memory is the measurement's own
        return
    with _harness.one_thread():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    """A peer that is not installed, or does not serve a call, is skipped and says why."""
    try:
        return (yield)
    except _harness.Unavailable as reason:
        pytest.skip(str(reason))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    records = list(config.stash[RECORDS].values())
    found = _results.rows(records, config.stash.get(COPY, None), config.stash[OPTIONS])
    if not found:
        return
    _show(terminalreporter, found)
    reasons = {report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", [])}
    for reason in sorted(reasons):
        terminalreporter.write_line(f"not measured: {reason}")
    for path in config.getoption("--csv"):
        _results.append(path, found)
        terminalreporter.write_line(f"{len(found)} rows appended to {path}")


def _show(terminalreporter: Any, found: list[dict[str, str]]) -> None:
    try:
        from mmfast.commands._console import console
    except ModuleNotFoundError:
        for row in found:
            terminalreporter.write_line(" ".join(row[name] for name in _results.COLUMNS[:12] if row[name]))
        return
    console.print()
    console.print(_results.table(found))
