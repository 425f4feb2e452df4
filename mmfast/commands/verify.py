"""`mmfast verify`: grade every op on every dtype and shape against its float64 reference, forward and gradients.

The rule: the error is at most twice PyTorch's own in the same dtype, plus the rounding of a single value. Each call
also runs twice and must give the same bits, in memory filled with NaN. Without a GPU the real Triton kernels run in
Triton's interpreter, and the CUDA C++ kernels in an emulated build (MMFAST_BUILD=emulated, or MMFAST_EXTENSION).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
from typing import TYPE_CHECKING, Any

from ._process import run_again

if TYPE_CHECKING:
    import torch

    from ._grading import Grade

DTYPES = ("float32", "float16", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("ops", nargs="*", metavar="OP", help="ops to grade (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--backend", choices=("cuda", "triton", "torch"), help="default: all that can run here")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--failures", action="store_true", help="list only what failed")
    parser.add_argument("--json", action="store_true", help="print the grades as JSON")


def run(args: argparse.Namespace) -> int:
    """Grade, print a table, and return 1 if an op fails."""
    import torch

    from .. import backends, ops

    for op in args.ops:
        if op not in ops.NAMES:
            raise ValueError(f"expected an op of {', '.join(ops.NAMES)}, got {op!r}")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU")
    states = {"cuda": _cuda_missing(device), "triton": backends.TRITON_MISSING, "torch": None}
    if args.backend and states[args.backend]:
        raise ValueError(f"--backend {args.backend}: {states[args.backend]}")
    chosen = [args.backend] if args.backend else [name for name in ("triton", "cuda") if not states[name]] or ["torch"]
    if args.json and len(chosen) > 1:
        raise ValueError(f"--json: name one --backend of {', '.join(chosen)}")
    failed = 0
    for backend in chosen:
        interpreted = backend == "triton" and device == "cpu"
        if (os.environ.get("TRITON_INTERPRET", "0") == "1") != interpreted:  # read when the kernels are imported
            line = _command_line(args, device, backend)
            failed |= run_again("verify", line, TRITON_INTERPRET=str(int(interpreted)))
        else:
            failed |= _grade_all(args, torch.device(device), backend, interpreted)
    return failed


def _cuda_missing(device: str) -> str | None:
    """Why the CUDA C++ kernels cannot be graded on this kind of device, or None."""
    from .. import cuda

    why_not = cuda.missing()
    if why_not is None and cuda.emulated() != (device == "cpu"):
        built = "an emulated build" if cuda.emulated() else "built for GPUs"
        why_not = f"the extension is {built}, which cannot run on device {device}"
    return why_not


def _grade_all(args: argparse.Namespace, device: torch.device, backend: str, interpreted: bool) -> int:
    import torch

    from .. import ops
    from ._console import console, progress

    emulated = backend == "cuda" and device.type == "cpu"
    if interpreted or emulated:
        torch.set_num_threads(1)  # small tensors: threads only get in the way
    names = [name for name in args.dtype if not (interpreted and name == "bfloat16")]
    graded = [op for op in args.ops or ops.NAMES if _has(op, backend)]
    groups = [(op, getattr(torch, name)) for op in graded for name in names]
    grades: list[Grade] = []
    with progress("verifying", len(groups)) as advance:
        for op, dtype in groups:
            torch.manual_seed(0)
            cases = importlib.import_module(f"mmfast.reference.{op}").cases(dtype, device, large=device.type == "cuda")
            share = 1 / len(cases)
            while cases:  # one at a time: the large ones take much memory
                case = cases.pop(0)
                grades.append(_grade(op, case, dtype, backend))
                advance(f"{op} {str(dtype).removeprefix('torch.')} {case.label}", share)
    failed = [grade for grade in grades if not grade.passed]
    if args.json:
        print(json.dumps([grade._asdict() for grade in grades], indent=1))
        return 1 if failed else 0
    _print_table(failed if args.failures else grades)
    if interpreted and "bfloat16" in args.dtype:
        console.print("bfloat16: not run, since Triton's interpreter computes it wrongly; it needs a GPU")
    where = "Triton's interpreter" if interpreted else "an emulated build" if emulated else str(device)
    console.print(f"{len(grades) - len(failed)} of {len(grades)} passed ({backend} on {where})", highlight=False)
    return 1 if failed else 0


def _has(op: str, backend: str) -> bool:
    """Whether the op has kernels of this backend at all."""
    from .. import backends

    return backend == "torch" or any(name == backend for name, _ in backends.TABLE[op])


def _grade(op: str, case: Any, dtype: torch.dtype, backend: str) -> Grade:
    """`grade`, where a kernel that raises is a failure of its case and not the end of the run."""
    import torch

    from ._grading import Grade, grade

    try:
        return grade(op, case, dtype, backend)
    except Exception as raised:  # reported in the table, and by the exit code
        note = f"{type(raised).__name__}: {str(raised).strip().splitlines()[-1][:200]}" if str(raised) else repr(raised)
        small = isinstance(raised, torch.OutOfMemoryError)  # the reference in float64 needs the most
        note = f"skipped: {note}" if small else note
        nan = float("nan")
        name = str(dtype).removeprefix("torch.")
        return Grade(op, name, case.label, backend, "-", nan, nan, nan, small, note)


def _command_line(args: argparse.Namespace, device: str, backend: str) -> list[str]:
    line = [*args.ops, "--device", device, "--backend", backend, "--dtype", *args.dtype]
    return line + [f"--{name}" for name in ("failures", "json") if getattr(args, name)]


def _print_table(grades: list[Grade]) -> None:
    from rich.table import Table

    from ._console import console

    table = Table(title="Relative error against float64", title_justify="left")
    for column in ("op", "dtype", "case", "backend", "worst tensor"):
        table.add_column(column)
    for column in ("error", "PyTorch's", "ratio"):
        table.add_column(column, justify="right")
    table.add_column("verdict")
    for grade in grades:
        table.add_row(
            *(text.replace("[", r"\[") for text in grade[:5]),
            f"{grade.error:.2e}",
            f"{grade.torch_error:.2e}",
            f"{grade.ratio:.2f}",
            ("[green]pass[/] " if grade.passed else "[red]FAIL[/] ") + grade.note.replace("[", r"\["),
        )
    if grades:
        console.print(table)
