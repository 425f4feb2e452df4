"""One run of a module's cases for all pytest workers."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from typing import Any

import pytest

from tests.distributed.launch import run_cases


@pytest.fixture(scope="session")
def run_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, dict[str, Any], int], dict[str, str]]:
    """`run_cases`, of which pytest-xdist's workers share the result; while one runs, its ranks have the machine."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def run(module: str, cases: dict[str, Any], size: int) -> dict[str, str]:
        with open(shared / "ranks.lock", "w") as lock:  # closing it gives it back
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = shared / f"{module}-{size}.json"
            if not found.exists():
                found.write_text(json.dumps(run_cases(cases, size)))
            return json.loads(found.read_text())

    return run
