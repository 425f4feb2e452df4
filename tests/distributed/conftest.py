"""One run of the cases for all pytest workers."""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.distributed.launch import Run, run_cases


@pytest.fixture(scope="session")
def run_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, dict[str, Any], Run], dict[str, str]]:
    """`run_cases`, of which pytest-xdist's workers share the result; while one runs, its ranks have the machine.

    Where there are workers, the first that asks runs what all modules have for this run: ranks, and the server that
    they are forked from, start once.
    """
    base = tmp_path_factory.getbasetemp()
    workers = "PYTEST_XDIST_WORKER" in os.environ
    shared = base.parent if workers else base

    def run(module: str, cases: dict[str, Any], of: Run) -> dict[str, str]:
        size, kind = of
        runs = {module: cases}
        if workers:
            collected = {name: m for name, m in sys.modules.items() if name.startswith(f"{__package__}.test_")}
            runs |= {name: m.RUNS.get(of, {}) for name, m in sorted(collected.items())}
        with open(shared / "ranks.lock", "w") as lock:  # closing it gives it back
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = shared / f"{module}-{size}-{kind}.json"
            if not found.exists():
                every = {f"{m}: {name}": case for m, of_m in runs.items() for name, case in of_m.items()}
                errors = run_cases(every, size)
                for m, of_m in runs.items():
                    own = {name: errors[f"{m}: {name}"] for name in of_m if f"{m}: {name}" in errors}
                    (shared / f"{m}-{size}-{kind}.json").write_text(json.dumps(own))
            return json.loads(found.read_text())

    return run
