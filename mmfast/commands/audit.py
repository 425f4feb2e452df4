"""`mmfast audit`: compile every kernel configuration that ships, without a GPU, and read what the compiler made of it.

For each architecture: registers, spills, shared memory, and in the machine code the width of the loads and stores of
global memory and the tensor-core instructions. These fail the audit: a spill; shared memory above the limit; a row of
whole 16-byte pieces that is not read and written 16 bytes at a time; on sm_90 a dot of 64 rows or more that is not
wgmma; more FLOPs issued per useful one than a configuration allows. Said beside the verdict: why the assembler waits
for each wgmma before the next, where it does.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import pkgutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from functools import cache
from typing import Any, NamedTuple

from . import _audit_cuda, _sass
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
    tensor: Counter[str]  # tensor-core instructions by name
    problems: tuple[str, ...]
    notes: tuple[str, ...]  # what costs speed and fails nothing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("ops", nargs="*", metavar="OP", help="ops whose kernels to compile (default: all)")
    parser.add_argument("--arch", nargs="+", type=int, default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--jobs", type=int, default=0, help="processes (default: one a core)")
    parser.add_argument("--problems", action="store_true", help="list only configurations with a problem")
    parser.add_argument("--cuda", action="store_true", help="only the CUDA C++ kernels, of the extension")
    parser.add_argument(
        "--code", nargs="*", type=int, choices=ARCHITECTURES, help="of CUDA C++ kernels, read the machine code of these"
    )
    parser.add_argument("--extension", metavar="FILE", help="the extension to read (default: the installed one)")


def run(args: argparse.Namespace) -> int:
    """Print a table of Triton's kernels and one of the CUDA C++ kernels; return 1 if one of them has a problem."""
    if args.cuda:
        return _audit_cuda.run(args)
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
    _print_waste(failed if args.problems else results)
    _print_summary(results)
    return max(int(bool(failed)), _audit_cuda.run(args))


def all_tasks(ops: tuple[str, ...] = (), arches: tuple[int, ...] = ARCHITECTURES) -> Iterator[Task]:
    """Every configuration of these ops (default: all) on these architectures. Raises ValueError for an unknown op."""
    found = configurations()
    known = {op for op, _ in found} - {"common"}
    for op in ops:
        if op not in known:
            raise ValueError(f"audit: expected an op of {', '.join(sorted(known))}, got {op!r}")
    for arch in arches:
        for op, label in found:
            shipped = found[op, label].arches
            if (not ops or op in ops or op == "common") and (shipped is None or arch in shipped):
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
            if name in compilation.divisible or (isinstance(kind, str) and kind.startswith("*")):
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=compilation.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": compilation.num_warps}
    if compilation.num_stages is not None:
        options["num_stages"] = compilation.num_stages
    kernel = triton.compile(source, target=GPUTarget("cuda", task.arch, 32), options=options)
    return _inspect(task, compilation, kernel)


def _inspect(task: Task, compilation: Any, kernel: Any) -> Result:
    code = _sass.disassemble(kernel.asm["cubin"])
    spills, shared = _sass.spills(code), kernel.metadata.shared
    loads, stores, tensor = _sass.loads(code), _sass.stores(code), _sass.tensor_instructions(code)
    problems: list[str] = []
    notes: tuple[str, ...] = ()
    if spills:
        problems.append(f"spills ({spills})")
    if shared > SHARED_LIMIT[task.arch]:
        problems.append(f"shared memory {shared} > {SHARED_LIMIT[task.arch]}")
    if compilation.vector_loads and not _sass.widest(loads):
        problems.append("no 128-bit loads")
    if compilation.vector_stores and not _sass.widest(stores):
        problems.append("no 128-bit stores")
    wanted = _sass.TENSOR_CORE[task.arch]
    if compilation.tensor_cores and not any(tensor[name] for name in wanted):
        problems.append(f"no {' or '.join(wanted)}")
    if task.arch == 90:
        problems += [f"a {tile} dot without wgmma" for tile in dict.fromkeys(_sass.slow_dots(kernel.asm["ttgir"]))]
        if tensor["HGMMA"]:
            notes = _sass.wgmma_serialized(kernel.asm["ptx"], task.arch)
    if compilation.normals is not None:
        calls = _sass.philox_calls(code)
        if not 0.8 <= 4 * calls / compilation.normals <= 1.2:  # the first round's products are half of them scalar
            problems.append(f"{calls:.1f} Philox for {compilation.normals:g} normals a thread")
    problems += _waste_problems(compilation)
    return Result(
        task=task,
        registers=_sass.resources(code)["REG"],
        threads=32 * kernel.metadata.num_warps,  # with those that warp specialization adds
        spills=spills,
        shared=shared,
        loads=loads,
        stores=stores,
        tensor=tensor,
        problems=tuple(problems),
        notes=tuple(f"wgmma in turn: {reason}" for reason in notes),
    )


def _waste_problems(compilation: Any) -> list[str]:
    if compilation.waste_limit is None:
        return []
    if compilation.waste is None:
        return ["has a waste_limit and no waste"]
    if compilation.waste <= compilation.waste_limit:
        return []
    return [f"{compilation.waste:.3f} FLOPs issued per useful one > {compilation.waste_limit}"]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _command_line(args: argparse.Namespace) -> list[str]:
    line = [*args.ops, "--arch", *map(str, args.arch), "--jobs", str(args.jobs)]
    line += ["--extension", args.extension] if args.extension else []
    line += ["--code", *map(str, args.code)] if args.code is not None else []
    return [*line, "--problems"] if args.problems else line


def _print_table(results: list[Result]) -> None:
    from rich.table import Table

    from ._console import console

    table = Table(title="Kernels as they ship", title_justify="left")
    table.add_column("op", no_wrap=True)
    table.add_column("configuration", min_width=24)
    table.add_column("sm", no_wrap=True)
    for column in ("threads", "registers", "spills", "shared B"):
        table.add_column(column, justify="right")
    for column in ("loads, bits", "stores, bits", "tensor cores", "verdict"):
        table.add_column(column)
    for result in results:
        table.add_row(
            result.task.op,
            result.task.label.replace("[", r"\["),
            str(result.task.arch),
            *map(str, (result.threads, result.registers, result.spills, result.shared)),
            _sass.counted(result.loads),
            _sass.counted(result.stores),
            _sass.counted(result.tensor),
            _verdict(result),
        )
    if results:
        console.print(table)


def _verdict(result: Result) -> str:
    verdict = f"[red]{'; '.join(result.problems)}[/]" if result.problems else "[green]ok[/]"
    return "; ".join([verdict, *result.notes])


def _print_waste(results: list[Result]) -> None:
    """A line for each op and number: several configurations of one shape have the same."""
    from rich.table import Table

    from ._console import console

    found = configurations()
    lines: dict[tuple[str, str, str], list[str]] = {}
    for op, label in dict.fromkeys((result.task.op, result.task.label) for result in results):
        compilation = found[op, label]
        if compilation.waste is not None:
            limit = "-" if compilation.waste_limit is None else f"{compilation.waste_limit:.2f}"
            color = "red" if _waste_problems(compilation) else "green"
            lines.setdefault((op, f"[{color}]{compilation.waste:.3f}[/]", limit), []).append(label)
    if not lines:
        return
    table = Table(title="FLOPs issued per useful FLOP", title_justify="left")
    for column in ("op", "configuration"):
        table.add_column(column)
    for column in ("issued / useful", "limit"):
        table.add_column(column, justify="right")
    for (op, waste, limit), labels in lines.items():
        more = f" and {len(labels) - 1} more" if len(labels) > 1 else ""
        table.add_row(op, labels[0].replace("[", r"\[") + more, waste, limit)
    console.print(table)


def _print_summary(results: list[Result]) -> None:
    import triton

    from ._console import console

    for arch in sorted({result.task.arch for result in results}):
        chosen = [result for result in results if result.task.arch == arch]
        most = max(chosen, key=lambda result: result.registers)
        bad = sum(bool(result.problems) for result in chosen)
        noted = sum(bool(result.notes) for result in chosen)
        aside = f", {noted} with wgmma in turn" if noted else ""
        console.print(
            f"sm_{arch}: {len(chosen)} configurations, {bad} with a problem{aside}; at most {most.registers} registers "
            f"({most.task.op} {most.task.label}) and {max(result.shared for result in chosen)} B of shared memory",
            markup=False,
            highlight=False,
        )
    console.print(f"Triton {triton.__version__}", highlight=False)
