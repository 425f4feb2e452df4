"""`mmfast audit --cuda`: what nvcc made of the CUDA C++ kernels, read from the extension without a GPU.

For each kernel and architecture: registers, local memory, shared memory, launch bounds, and in the machine code the
width of the loads and stores of global memory and the tensor-core instructions. These fail the audit: a spill or a
stack frame; a block whose registers a multiprocessor does not have, or no bound on a block; no 16-byte loads or stores
in a kernel that should move whole vectors.
"""

from __future__ import annotations

import argparse
import os
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from . import _sass

REGISTERS = 65536
"""Of a multiprocessor, all that one block can have."""
WITHOUT_VECTORS = (
    (r"^(column_sums|noise_mse_finish|philox_words)_kernel\b", "loads stores"),  # sums of float32, a word at a time
    (r"_norm_\w+_kernel<\w+, 1,", "loads stores"),  # one element at a time: rows that start anywhere
    (r"Layout\(3\)", "loads stores"),  # Scattered, of samples.cuh
    (r"^noise_like_forward_kernel\b", "loads"),  # which reads seeds alone
    (r"^noise_mse_forward_kernel\b", "stores"),  # which writes a sum a block
)
"""Kernels, by readable name, that need not move 16 bytes a thread. All others must."""


class Kernel(NamedTuple):
    """What the compiler made of one kernel for one architecture."""

    name: str  # readable
    arch: str  # "90a"
    registers: int
    threads: int | None  # that a block may have by the launch bounds; None without
    spills: int  # bytes of local memory a thread, plus instructions that read or write it
    shared: int  # bytes, static ones
    loads: Counter[int] | None  # instructions by bits moved a thread; None where the machine code was not read
    stores: Counter[int] | None
    tensor: Counter[str] | None  # tensor-core instructions by name

    @property
    def problems(self) -> list[str]:
        """What fails the audit."""
        found = []
        if self.spills:
            found.append(f"spills ({self.spills})")
        if self.threads is None:
            found.append("no launch bounds")
        elif -(-self.registers // 8) * 8 * self.threads > REGISTERS:
            found.append(f"{self.registers} registers x {self.threads} threads > {REGISTERS}")
        spared = " ".join(what for pattern, what in WITHOUT_VECTORS if re.search(pattern, self.name))
        for what, counts in (("loads", self.loads), ("stores", self.stores)):
            if counts is not None and what not in spared and not _sass.widest(counts):
                found.append(f"no 128-bit {what}")
        return found


def run(args: argparse.Namespace) -> int:
    """Print a table of the extension's kernels, and return 1 if one has a problem, 2 if there is nothing to read."""
    from ._console import console

    if find_spec("triton") is None:
        console.print("mmfast audit: the tools that read machine code come with triton, which is not installed")
        return 2
    extension, why_not = find(args.extension)
    if extension is None:
        console.print(f"CUDA C++ kernels: not audited: {why_not}", highlight=False)
        return 2 if args.cuda else 0
    wanted = {str(arch) for arch in args.arch}
    read = wanted if args.code is None else {str(arch) for arch in args.code}
    found = kernels(extension, wanted, read)
    if args.ops:
        found = [kernel for kernel in found if kernel.name.startswith(tuple(args.ops))]
    failed = [kernel for kernel in found if kernel.problems]
    _print(failed if args.problems else found, found, extension)
    if not found and not args.ops:
        console.print(f"CUDA C++ kernels: {extension} has none for sm_{', sm_'.join(sorted(wanted))}", highlight=False)
        return 2
    return 1 if failed else 0


def find(given: str | None = None) -> tuple[Path | None, str]:
    """The extension file that nvcc built, or None and why there is none. It is found without loading it.

    Raises ValueError if the file `given` does not exist.
    """
    if given is not None and not Path(given).is_file():
        raise ValueError(f"audit: --extension must be a file, got {given!r}")
    file = given or os.environ.get("MMFAST_EXTENSION")
    if not file:
        spec = find_spec("mmfast._cuda")
        if spec is None or spec.origin is None:
            return None, "this install has no CUDA C++ kernels (built without nvcc)"
        file = spec.origin
    if not Path(file).is_file():
        return None, f"MMFAST_EXTENSION={file} is not a file"
    if b".nv_fatbin" not in Path(file).read_bytes():
        return None, f"{file} was not built by nvcc (an emulated build has no machine code of a GPU)"
    return Path(file), ""


def kernels(extension: Path, wanted: set[str] | None = None, read: set[str] | None = None) -> list[Kernel]:
    """Every kernel of the file for the `wanted` architectures ("90"), by name and architecture; by default for all.

    Machine code is read of the architectures in `read`, by default of all: it takes nearly all of the time.
    """

    def of(cubin: tuple[str, bytes]) -> list[Kernel]:
        number = cubin[0].rstrip("af")
        if wanted is not None and number not in wanted:
            return []
        return list(_of_cubin(*cubin, code=read is None or number in read))

    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2) as pool:
        found = [kernel for part in pool.map(of, _sass.cubins(extension)) for kernel in part]
    return sorted(found, key=lambda kernel: (kernel.name, int(kernel.arch.rstrip("af"))))


def _of_cubin(arch: str, cubin: bytes, *, code: bool) -> Iterator[Kernel]:
    threads = _sass.launch_bounds(cubin)
    for name, text in _sass.functions(_sass.disassemble(cubin, code=code)).items():
        resources = _sass.resources(text)
        yield Kernel(
            name=readable(name),
            arch=arch,
            registers=resources["REG"],
            threads=threads.get(name),
            spills=_sass.spills(text),
            shared=resources.get("SHARED", 0),
            loads=_sass.loads(text) if code else None,
            stores=_sass.stores(text) if code else None,
            tensor=_sass.tensor_instructions(text) if code else None,
        )


TYPES = {"f": "float", "d": "double", "i": "int", "j": "unsigned", "b": "bool", "l": "long", "m": "unsigned long"}


def readable(mangled: str) -> str:
    """A kernel's name with its template arguments, without namespaces and parameters: `copy_kernel<__half, 8>`.

    A name beyond these few rules of the C++ ABI is returned as it is.
    """
    try:
        return _name(mangled, 2)[0] if mangled.startswith("_Z") else mangled
    except (ValueError, KeyError, IndexError):
        return mangled


def _name(text: str, at: int) -> tuple[str, int]:
    """The name that starts here, the last part of a nested one, and where it ends."""
    nested = text[at] == "N"
    at += nested
    if nested and text[at] == "S":  # a namespace that was named before
        at = text.index("_", at) + 1
    while True:
        digits = re.compile(r"\d+").match(text, at)
        if digits is None:
            raise ValueError(text)
        end = digits.end() + int(digits[0])
        part, at = text[digits.end() : end], end
        if text[at : at + 1] == "I":
            arguments, at = _arguments(text, at + 1)
            part += f"<{', '.join(arguments)}>"
        if not nested:
            return part, at
        if text[at] == "E":
            return part, at + 1


def _arguments(text: str, at: int) -> tuple[list[str], int]:
    found = []
    while text[at] != "E":
        constant = text[at] == "L"
        kind, at = _type(text, at + constant)
        if constant:
            end = text.index("E", at)
            number = text[at:end].replace("n", "-")
            if kind == "bool":
                number = "true" if number == "1" else "false"
            kind, at = (number if kind in TYPES.values() else f"{kind}({number})"), end + 1
        found.append(kind)
    return found, at + 1


def _type(text: str, at: int) -> tuple[str, int]:
    return (TYPES[text[at]], at + 1) if text[at] in TYPES else _name(text, at)


def _print(shown: list[Kernel], found: list[Kernel], extension: Path) -> None:
    from rich.table import Table

    from ._console import console

    table = Table(title="CUDA C++ kernels", title_justify="left")
    table.add_column("kernel", min_width=24, overflow="fold")
    table.add_column("sm", no_wrap=True)
    for column in ("threads", "registers", "spills", "shared B"):
        table.add_column(column, justify="right")
    for column in ("loads, bits", "stores, bits", "tensor cores", "verdict"):
        table.add_column(column)
    for kernel in shown:
        table.add_row(
            kernel.name.replace("[", r"\["),
            kernel.arch,
            "-" if kernel.threads is None else str(kernel.threads),
            *map(str, (kernel.registers, kernel.spills, kernel.shared)),
            *("not read" if x is None else _sass.counted(x) for x in (kernel.loads, kernel.stores, kernel.tensor)),
            f"[red]{'; '.join(kernel.problems)}[/]" if kernel.problems else "[green]ok[/]",
        )
    if shown:
        console.print(table)
    for arch in sorted({kernel.arch for kernel in found}, key=lambda arch: int(arch.rstrip("af"))):
        chosen = [kernel for kernel in found if kernel.arch == arch]
        most = max(chosen, key=lambda kernel: kernel.registers)
        bad = sum(bool(kernel.problems) for kernel in chosen)
        console.print(
            f"sm_{arch}: {len(chosen)} CUDA C++ kernels, {bad} with a problem; at most {most.registers} registers "
            f"({most.name})",
            markup=False,
            highlight=False,
        )
    console.print(f"{extension}: {extension.stat().st_size / 1e6:.1f} MB", markup=False, highlight=False)
