"""Options of the benchmarks, the fixtures that measure, the order of a run with a budget, and the rows of results.

The rows of a group (an op, mode, shape and dtype) are appended to the CSV files as soon as its last provider is
measured, so that a run that is cut off leaves what it has.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

from mmfast.benchmarks import _harness, _results
from mmfast.benchmarks._harness import Options, Record, Spec
from mmfast.benchmarks._limits import Limits
from mmfast.commands._torchvision import declare_torchvision_ops

declare_torchvision_ops()

OPTIONS = pytest.StashKey[Options]()
RUN = pytest.StashKey["Run"]()


class Run:
    """What one run has measured, and what of it is in the CSV files."""

    def __init__(self, options: Options, paths: list[Path], budget: float | None) -> None:
        self.options, self.paths, self.budget = options, paths, budget
        self.limits = Limits(options)
        self.records: dict[Spec, Record] = {}
        self.started = time.monotonic()
        self.group: Any = None
        self.stopped = False
        self._written: set[Spec] = set()

    def rows(self, records: list[Record]) -> list[dict[str, str]]:
        return _results.rows(records, self.limits, self.options)

    def write(self) -> None:
        """Append the rows that are not in the files yet."""
        records = [*self.limits.records, *self.records.values()]
        new = self.rows([record for record in records if record.spec not in self._written])
        self._written |= {record.spec for record in records if record.times}
        for path in self.paths if new else ():
            _results.append(path, new)

    def everything(self) -> list[dict[str, str]]:
        """All rows, an op's together."""
        ops = list(dict.fromkeys(spec.op for spec in self.records))
        records = sorted(self.records.values(), key=lambda record: ops.index(record.spec.op))
        return self.rows([*self.limits.records, *records])

    def enter(self, group: Any) -> None:
        """Skip a test of a group that would start after the budget is spent."""
        if group is None:
            return
        if group != self.group:
            self.group = group
            self.stopped = self.budget is not None and time.monotonic() - self.started > self.budget
        if self.stopped:
            op, mode, shape, dtype = group
            raise pytest.skip.Exception(f"{op} {mode} {'x'.join(map(str, shape))} {dtype}: no time left")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mmfast")
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="device to measure on")
    group.addoption("--quick", action="store_true", help="few rounds, one pass, small shapes")
    group.addoption("--full", action="store_true", help="also what takes minutes: every shape, max-autotune")
    group.addoption("--peer", action="append", default=[], help="measure mmfast beside this provider alone; repeatable")
    group.addoption("--only", action="append", default=[], help="measure what has this in its name; repeatable")
    group.addoption("--budget", type=float, help="seconds after which no new group of providers is started")
    group.addoption("--csv", type=Path, action="append", default=[], help="append rows to this file; repeatable")


def pytest_configure(config: pytest.Config) -> None:
    device, quick = config.getoption("--device"), config.getoption("--quick")
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no GPU")
    passes = 1 if quick else 3
    options = Options(device, quick, tuple(config.getoption("--peer")), passes, config.getoption("--full"))
    config.stash[OPTIONS] = options
    config.stash[RUN] = Run(options, config.getoption("--csv"), config.getoption("--budget"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give each `test_*(spec, ...)` the measurements that its module's `measurements(options)` lists."""
    if "spec" in metafunc.fixturenames:
        found = list(metafunc.module.measurements(metafunc.config.stash[OPTIONS]))
        ids = [spec.label(number) for spec, number in found]
        metafunc.parametrize(("spec", "pass_number"), found, ids=ids)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    only = config.getoption("--only")
    if only:
        chosen = [item for item in items if (spec := spec_of(item)) and any(text in spec.title for text in only)]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
        items[:] = chosen
    if config.getoption("--budget") is not None:
        items[:] = in_turn(items)
    if config.stash[OPTIONS].device != "cuda":
        return
    for item in items:
        spec = spec_of(item)
        if spec is not None and not spec.mode.startswith("host"):
            item.add_marker(pytest.mark.benchmark(timer=_harness.CudaTime))


def spec_of(item: pytest.Item | None) -> Spec | None:
    """The measurement that a test is a pass of."""
    call = getattr(item, "callspec", None)
    return call.params.get("spec") if call else None


def group_of(item: pytest.Item | None) -> Any:
    spec = spec_of(item)
    return spec.group if spec else None


def in_turn(items: list[pytest.Item]) -> list[pytest.Item]:
    """The first group of every file, then the second of every file: each file has its most important groups first.

    What is left out when the time is spent is then the least important part of each file, and no file is left out.
    """
    order: dict[int, int] = {}
    for _, members in groupby(items, key=lambda item: item.path):
        for turn, (_, group) in enumerate(groupby(members, key=group_of)):
            order |= dict.fromkeys(map(id, group), turn)
    return sorted(items, key=lambda item: order[id(item)])


@pytest.fixture(scope="session")
def options(request: pytest.FixtureRequest) -> Options:
    """What the command line asked for."""
    return request.config.stash[OPTIONS]


@pytest.fixture
def measure(
    request: pytest.FixtureRequest, benchmark: Any, options: Options, spec: Spec, pass_number: int
) -> Callable[..., None]:
    """`measure(call, moved=bytes, flops=...)` times a call and records it under the test's spec.

    `normals` counts numbers that are drawn; `limit` is the least time in seconds of other work; `backend` is what
    serves the call.
    """
    state = request.config.stash[RUN]

    def run(
        call: Callable[[], Any],
        *,
        moved: int = 0,
        flops: int = 0,
        normals: int = 0,
        limit: float | None = None,
        images: int = 0,
        backend: str = "",
        gaps: bool = False,
    ) -> None:
        made = Record(spec, moved=moved, flops=flops, normals=normals, limit=limit, images=images, backend=backend)
        record = state.records.setdefault(spec, made)
        record.backend = record.backend or backend
        state.limits.measure(record)
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
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Any:
    """Write a group's rows when the next test is of another."""
    result = yield
    if nextitem is None or group_of(nextitem) != group_of(item):
        item.config.stash[RUN].write()
    return result


def pytest_runtest_setup(item: pytest.Item) -> None:
    item.config.stash[RUN].enter(group_of(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    """A peer that is not installed, or does not serve a call, is skipped and says why."""
    try:
        return (yield)
    except _harness.Unavailable as reason:
        pytest.skip(str(reason))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    state = config.stash[RUN]
    state.write()
    found = state.everything()
    if found:
        _show(terminalreporter, found)
    reasons = {report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", [])}
    for reason in sorted(reasons):
        terminalreporter.write_line(f"not measured: {reason}")
    for path in state.paths if found else ():
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
