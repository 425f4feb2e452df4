"""`mmfast audit`: compile every kernel configuration that ships, without a GPU, and read what the compiler made of it.

For each architecture: registers, spills, shared memory, and the width of the loads and stores of global memory in the
machine code. A spill, shared memory above the limit, or a row of whole 16-byte pieces that is not read and written 16
bytes at a time fails the audit.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import multiprocessing
import os
import pkgutil
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ._process import run_again

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
"""Bytes of shared memory that one program may have."""


class Task(NamedTuple):
    """One compilation, small enough to send to another process."""

    op: str
    label: str
    arch: int


class Result(NamedTuple):
    """What the compiler made of one task."""

    task: Task
    registers: int
    threads: int
    spills: int  # bytes of local memory a thread, plus instructions that read or write it
    shared: int  # bytes
    loads: Counter[int]  # instructions by bits moved a thread
    stores: Counter[int]
    problems: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("ops", nargs="*", metavar="OP", help="ops whose kernels to compile (default: all)")
    parser.add_argument("--arch", nargs="+", type=int, default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--jobs", type=int, default=0, help="processes (default: one a core)")
    parser.add_argument("--problems", action="store_true", help="list only configurations with a problem")


def run(args: argparse.Namespace) -> int:
    """Compile, print a table, and return 1 if a configuration has a problem."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1":  # kernels imported under it cannot be compiled
        return run_again("audit", _command_line(args), TRITON_INTERPRET="0")
    from .. import backends
    from ._console import console, progress

    if backends.TRITON_MISSING:
        console.print(f"mmfast audit: {backends.TRITON_MISSING}")
        return 2
    tasks = list(all_tasks(tuple(args.ops), tuple(args.arch)))
    with progress("compiling", len(tasks)) as advance:
        results = []
        for result in compile_all(tasks, args.jobs):
            results.append(result)
            advance(f"{result.task.label} sm_{result.task.arch}")
    results.sort(key=lambda result: tasks.index(result.task))
    failed = [result for result in results if result.problems]
    _print_table(failed if args.problems else results)
    _print_summary(results)
    return 1 if failed else 0


def all_tasks(ops: tuple[str, ...] = (), arches: tuple[int, ...] = ARCHITECTURES) -> Iterator[Task]:
    """Every configuration of these ops (default: all) on these architectures. Raises ValueError for an unknown op."""
    found = configurations()
    known = {op for op, _ in found} - {"common"}
    for op in ops:
        if op not in known:
            raise ValueError(f"audit: expected an op of {', '.join(sorted(known))}, got {op!r}")
    for arch in arches:
        for op, label in found:
            if not ops or op in ops or op == "common":
                yield Task(op, label, arch)


@cache
def configurations() -> dict[tuple[str, str], Any]:
    """(op, label) -> `Compilation`, collected from every kernel file. `_layer_norm_wide.py` belongs to `layer_norm`."""
    from .. import kernels

    found: dict[tuple[str, str], Any] = {}
    for info in pkgutil.iter_modules(kernels.__path__):
        module = importlib.import_module(f"{kernels.__name__}.{info.name}")
        if not hasattr(module, "audit_configurations"):
            continue
        name = info.name.removeprefix("_")
        owners = [op for op in kernels.NAMES if name == op or name.startswith(f"{op}_")]
        op = max(owners, key=len, default=name)
        for compilation in module.audit_configurations():
            if (op, compilation.label) in found:
                raise ValueError(f"audit: {op} has two configurations called {compilation.label!r}")
            found[op, compilation.label] = compilation
    return found


def compile_all(tasks: list[Task], jobs: int = 0) -> Iterator[Result]:
    """Compile the tasks in several processes, yielding results as they come."""
    jobs = min(jobs or _cores(), max(1, len(tasks) // 8))
    if jobs == 1:
        yield from map(compile_one, tasks)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        pending: list[Future[Result]] = [pool.submit(compile_one, task) for task in tasks]
        for future in as_completed(pending):
            yield future.result()


def compile_one(task: Task) -> Result:
    """Compile one configuration for one architecture and inspect the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    compilation = configurations()[task.op, task.label]
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(compilation.kernel.arg_names):
        kind = compilation.arguments.get(name)
        if name in compilation.constants or kind is None:
            signature[name] = "constexpr"
            constants[(index,)] = compilation.constants.get(name)
        else:
            signature[name] = kind
            if kind.startswith("*") or name in compilation.divisible:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=compilation.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": compilation.num_warps}
    kernel = triton.compile(source, target=GPUTarget("cuda", task.arch, 32), options=options)
    return _inspect(task, compilation, _disassemble(kernel.asm["cubin"]), kernel.metadata.shared)


def _disassemble(cubin: bytes) -> str:
    """Resource usage and machine code, kept beside Triton's own cache: the disassembler takes half a second."""
    from triton.runtime.cache import get_cache_manager

    store = get_cache_manager(hashlib.sha256(b"mmfast audit" + cubin).hexdigest())
    path = store.get_file("kernel.sass")
    if path is not None:
        return Path(path).read_text()
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(cubin)
        text = _tool("cuobjdump", "-res-usage", str(binary)) + _tool("nvdisasm", "-c", str(binary))
    store.put(text, "kernel.sass", binary=False)
    return text


def _inspect(task: Task, compilation: Any, code: str, shared: int) -> Result:
    resources = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", code)}
    if "REG" not in resources:
        raise RuntimeError(f"audit: cannot read the registers of {task.label} from: {code[:200]}")
    # A spill shows as a stack frame and as instructions on local memory; so does an array with a run-time index.
    spills = resources.get("STACK", 0) + resources.get("LOCAL", 0) + len(re.findall(r"\b(?:LDL|STL)\b", code))
    loads = _widths(r"\b(?:LDG|LDGSTS)((?:\.\w+)*)", code)
    stores = _widths(r"\b(?:STG)((?:\.\w+)*)", code)
    problems = []
    if spills:
        problems.append(f"spills ({spills})")
    if shared > SHARED_LIMIT[task.arch]:
        problems.append(f"shared memory {shared} > {SHARED_LIMIT[task.arch]}")
    if compilation.vector_loads and not _wide(loads):
        problems.append("no 128-bit loads")
    if compilation.vector_stores and not _wide(stores):
        problems.append("no 128-bit stores")
    threads = 32 * compilation.num_warps
    return Result(task, resources["REG"], threads, spills, shared, loads, stores, tuple(problems))


def _widths(pattern: str, code: str) -> Counter[int]:
    """How many instructions move how many bits a thread; without a suffix that names a width it is 32."""
    counts: Counter[int] = Counter()
    for suffixes in re.findall(pattern, code):
        parts = suffixes.split(".")
        named = [int(part) for part in parts if part in ("64", "128", "256")]
        narrow = [int(part[1:]) for part in parts if part in ("U8", "S8", "U16", "S16")]
        counts[256 if "ENL2" in parts else (named or narrow or [32])[-1]] += 1
    return counts


def _wide(counts: Counter[int]) -> int:
    return sum(count for bits, count in counts.items() if bits >= 128)


def _tool(name: str, *args: str) -> str:
    """Output of one of the tools that Triton's wheel carries."""
    import triton.backends.nvidia

    path = Path(triton.backends.nvidia.__file__).parent / "bin" / name
    done = subprocess.run([str(path), *args], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"audit: {name} failed: {(done.stderr or done.stdout).strip()[:300]}")
    return done.stdout


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _command_line(args: argparse.Namespace) -> list[str]:
    line = [*args.ops, "--arch", *map(str, args.arch), "--jobs", str(args.jobs)]
    return [*line, "--problems"] if args.problems else line


def _counts(counts: Counter[int]) -> str:
    return " ".join(f"{count}x{bits}" for bits, count in sorted(counts.items(), reverse=True)) or "-"


def _print_table(results: list[Result]) -> None:
    from rich.table import Table

    from ._console import console

    table = Table(title="Kernels as they ship", title_justify="left")
    for column in ("op", "configuration", "sm"):
        table.add_column(column, no_wrap=column != "configuration")
    for column in ("threads", "registers", "spills", "shared B"):
        table.add_column(column, justify="right")
    for column in ("loads, bits", "stores, bits", "verdict"):
        table.add_column(column)
    for result in results:
        table.add_row(
            result.task.op,
            result.task.label.replace("[", r"\["),
            str(result.task.arch),
            *map(str, (result.threads, result.registers, result.spills, result.shared)),
            _counts(result.loads),
            _counts(result.stores),
            f"[red]{'; '.join(result.problems)}[/]" if result.problems else "[green]ok[/]",
        )
    if results:
        console.print(table)


def _print_summary(results: list[Result]) -> None:
    import triton

    from ._console import console

    for arch in sorted({result.task.arch for result in results}):
        chosen = [result for result in results if result.task.arch == arch]
        most = max(chosen, key=lambda result: result.registers)
        bad = sum(bool(result.problems) for result in chosen)
        console.print(
            f"sm_{arch}: {len(chosen)} configurations, {bad} with a problem; at most {most.registers} registers "
            f"({most.task.op} {most.task.label}) and {max(result.shared for result in chosen)} B of shared memory",
            markup=False,
            highlight=False,
        )
    console.print(f"Triton {triton.__version__}", highlight=False)
