"""Run a function on the ranks of a gloo group: real processes, forked from a server that has imported torch once."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import multiprocessing.connection
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

TIMEOUT = 60
"""Seconds until a collective gives up."""
LIMIT = 240
"""Seconds until a whole run does."""

Case = Callable[[int, int], None]
Run = tuple[int, str]
"""How many ranks, and which set of cases: "quick" or "slow"."""


def run(function: Callable[..., Any], size: int, *args: Any, timeout: float = LIMIT) -> list[Any]:
    """Call `function(rank, size, *args)` on every rank of a new default group; their results, by rank.

    Raises AssertionError with the traceback of the first rank that failed, and ends what still runs.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.preload"])
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_work, args=(theirs, function, rank, size, os.path.join(folder, "store"), args), daemon=True
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            found = _collect(pipes, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.join(2)
                if process.is_alive():
                    process.kill()
                    process.join()
    failures = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(found) if error]
    assert not failures, "\n".join(failures)
    return [result for _, result in found]


def parameters(runs: dict[Run, dict[str, Any]]) -> list[Any]:
    """A parameter `(run, name)` for each case, those of a slow run marked so."""
    return [
        pytest.param(of, name, id=f"{of[0]}-{name}", marks=[pytest.mark.slow] if of[1] == "slow" else [])
        for of, cases in runs.items()
        for name in cases
    ]


def run_cases(cases: dict[str, Case], size: int, timeout: float = LIMIT) -> dict[str, str]:
    """Run every case on every rank of one group; of those that failed anywhere, the tracebacks."""
    found: dict[str, str] = {}
    for result in run(_all_cases, size, cases, timeout=timeout):
        for name, error in result.items():
            found[name] = found.get(name, "") + error
    return found


def _all_cases(rank: int, size: int, cases: dict[str, Case]) -> dict[str, str]:
    """The errors of this rank. After each case all ranks learn whether one failed."""
    errors: dict[str, str] = {}
    for name, case in cases.items():
        torch.manual_seed(0)
        try:
            case(rank, size)
        except Exception:
            errors[name] = f"rank {rank}: {traceback.format_exc()}\n"
        with contextlib.suppress(RuntimeError):  # the others may wait for what this one did not do
            dist.barrier()
            continue
        for other in list(cases)[list(cases).index(name) + 1 :]:
            errors[other] = f"rank {rank}: not run, since a rank was lost in {name!r}\n"
        break
    return errors


def _work(pipe: Any, function: Callable[..., Any], rank: int, size: int, store: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        limit = datetime.timedelta(seconds=TIMEOUT)
        # A file in place of a port: nothing to find free.
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=limit)
        result = function(rank, size, *args)
        pipe.send((None, result))
        dist.destroy_process_group()
    except BaseException:
        pipe.send((traceback.format_exc(), None))
    pipe.close()


def _collect(pipes: list[Any], deadline: float) -> list[tuple[str | None, Any]]:
    found: list[tuple[str | None, Any]] = [("no answer in time", None)] * len(pipes)
    waiting = dict(enumerate(pipes))
    while waiting and time.monotonic() < deadline:
        for pipe in multiprocessing.connection.wait(list(waiting.values()), timeout=1):
            rank = pipes.index(pipe)
            try:
                found[rank] = pipe.recv()
            except EOFError:
                found[rank] = ("the process died", None)
            del waiting[rank]
    return found
