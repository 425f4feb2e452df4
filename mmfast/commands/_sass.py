"""What `mmfast audit` reads from a compiled kernel: its resources, its memory and tensor-core instructions, its dots.

The tools are those that Triton's wheel carries. What they print is kept beside Triton's own cache, since a
disassembly takes half a second and an assembly more.
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TENSOR_CORE = {80: ("HMMA",), 90: ("HGMMA",), 100: ("UTCHMMA", "HMMA")}
"""Instructions that Triton makes of a 16-bit or tf32 dot of 64 rows or more. On sm_100 HMMA is the slow one."""


def disassemble(cubin: bytes, *, code: bool = True) -> str:
    """Resource usage and, unless `code` is false, machine code."""

    def run(path: str) -> str:
        return _tool("cuobjdump", "-res-usage", path) + (_tool("nvdisasm", "-c", path) if code else "")

    return _kept("kernel.sass" if code else "kernel.resources", cubin, run)


def cubins(file: Path) -> Iterator[tuple[str, bytes]]:
    """(architecture, machine code) of each translation unit in a library that nvcc linked: ("90a", ...)."""
    with tempfile.TemporaryDirectory() as folder:
        _tool("cuobjdump", "-xelf", "all", str(file.resolve()), folder=folder)
        for path in sorted(Path(folder).glob("*.cubin")):
            found = re.search(r"\.sm_(\d+[af]?)\.cubin$", path.name)
            if found is None:
                raise RuntimeError(f"audit: cannot read the architecture of {path.name}")
            yield found[1], path.read_bytes()


def functions(code: str) -> dict[str, str]:
    """What `disassemble` says, kernel by kernel: its line of resources and its instructions."""
    found = dict(re.findall(r"^ *Function (\S+):\n(.*REG:.*)$", code, re.MULTILINE))
    pieces = re.split(r"^\.text\.(\S+):$", code, flags=re.MULTILINE)
    for name, instructions in zip(pieces[1::2], pieces[2::2], strict=True):
        if name in found:  # else a function that kernels call
            found[name] += "\n" + instructions
    return found


def launch_bounds(cubin: bytes) -> dict[str, int]:
    """Threads that a block of each kernel may have, of those that say so: an attribute of the ELF file."""
    table, size, count, names = struct.unpack_from("<Q10xHHH", cubin, 0x28)
    sections = [struct.unpack_from("<I20xQQ", cubin, table + size * i) for i in range(count)]  # name, offset, length
    found = {}
    for start, offset, length in sections:
        start += sections[names][1]
        name = cubin[start : cubin.index(b"\0", start)].decode()
        if not name.startswith(".nv.info."):
            continue
        at = offset
        while at < offset + length:
            kind, attribute, value = struct.unpack_from("<BBH", cubin, at)
            if (kind, attribute) == (4, 5):  # EIFMT_SVAL, EIATTR_MAX_THREADS
                found[name.removeprefix(".nv.info.")] = math.prod(struct.unpack_from("<3I", cubin, at + 4))
            at += 4 + (value if kind == 4 else 0)
    return found


def wgmma_serialized(ptx: str, arch: int) -> tuple[str, ...]:
    """Why the assembler waits for each wgmma before it starts the next; empty where it does not."""

    def run(path: str) -> str:
        return _tool("ptxas", f"--gpu-name=sm_{arch}a", path, "-o", f"{path}.cubin")

    try:
        said = _kept("kernel.ptxas", ptx.encode(), run)
    except RuntimeError as failed:  # Triton 3.9 assembles with another program; the note alone is lost
        return (f"not known, {str(failed).partition(': ')[2][:80]}",)
    return tuple(
        dict.fromkeys(re.findall(r"wgmma\S* instructions are serialized due to (.*?) in (?:the )?function", said))
    )


def _kept(name: str, content: bytes, run: Callable[[str], str]) -> str:
    """`run` of a file with this content, or what it returned the last time."""
    from triton.runtime.cache import get_cache_manager

    store = get_cache_manager(hashlib.sha256(b"mmfast audit " + name.encode() + content).hexdigest())
    path = store.get_file(name)
    if path is not None:
        return Path(path).read_text()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel")
        file.write_bytes(content)
        text = run(str(file))
    store.put(text, name, binary=False)
    return text


def _tool(name: str, *args: str, folder: str | None = None) -> str:
    import triton.backends.nvidia

    path = Path(triton.backends.nvidia.__file__).parent / "bin" / name
    done = subprocess.run([str(path), *args], capture_output=True, text=True, cwd=folder)
    if done.returncode:
        raise RuntimeError(f"audit: {name} failed: {(done.stderr or done.stdout).strip()[:300]}")
    return done.stdout + (done.stderr if name == "ptxas" else "")


def resources(code: str) -> dict[str, int]:
    """Registers and bytes of local memory a thread, as `cuobjdump -res-usage` names them: REG, STACK, SHARED, LOCAL."""
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", code)}
    if "REG" not in found:
        raise RuntimeError(f"audit: cannot read the registers from: {code[:200]}")
    return found


def spills(code: str) -> int:
    """A stack frame, and instructions on local memory. An array with a run-time index shows in the same way."""
    found = resources(code)
    return found.get("STACK", 0) + found.get("LOCAL", 0) + len(re.findall(r"\b(?:LDL|STL)\b", code))


def loads(code: str) -> Counter[int]:
    """Loads of global memory by bits moved a thread; a bulk copy, made by one thread, counts as its widest, 128."""
    return _widths(r"\b(?:LDGSTS|LDG)\b((?:\.\w+)*)", code) + _bulk(r"\bUTMALDG\b", code)


def stores(code: str) -> Counter[int]:
    """Stores to global memory, likewise."""
    return _widths(r"\b(?:STG)((?:\.\w+)*)", code) + _bulk(r"\bUTMASTG\b", code)


def _bulk(pattern: str, code: str) -> Counter[int]:
    count = len(re.findall(pattern, code))
    return Counter({128: count} if count else {})


def _widths(pattern: str, code: str) -> Counter[int]:
    """How many instructions move how many bits a thread; without a suffix that names a width it is 32."""
    counts: Counter[int] = Counter()
    for suffixes in re.findall(pattern, code):
        parts = suffixes.split(".")
        named = [int(part) for part in parts if part in ("64", "128", "256")]
        narrow = [int(part[1:]) for part in parts if part in ("U8", "S8", "U16", "S16")]
        counts[256 if "ENL2" in parts else (named or narrow or [32])[-1]] += 1
    return counts


def counted(counts: Counter[Any]) -> str:
    """For a table: "2x128 1x32"."""
    return " ".join(f"{count}x{what}" for what, count in sorted(counts.items(), reverse=True)) or "-"


def widest(counts: Counter[int]) -> int:
    """How many instructions move 16 bytes or more a thread."""
    return sum(count for bits, count in counts.items() if bits >= 128)


def tensor_instructions(code: str) -> Counter[str]:
    """Tensor-core instructions by name: HMMA (mma.sync), HGMMA (wgmma), UTCHMMA (tcgen05)."""
    return Counter(re.findall(r"\b(UTCHMMA|HGMMA|HMMA)\b", code))


def philox_calls(code: str) -> float:
    """How often a thread computes Philox4x32-10, by its twenty wide unsigned products."""
    return len(re.findall(r"\bIMAD\.WIDE\.U32\b", code)) / 20


_DOT = re.compile(
    r"\btt\.dot\b.*?(?:inputPrecision\s*=\s*(?P<precision>\w+).*?)?:\s*tensor<(?:\d+x)+(?P<operand>\w+)[,>].*"
    r"->\s*tensor<(?P<result>(?:\d+x)+)\w+"
)


def slow_dots(ttgir: str) -> list[str]:
    """Dots of 64 rows or more, 16-bit or tf32, that Triton left as `tt.dot`: mma.sync, at half wgmma's speed or less.

    A dot made into wgmma or tcgen05 is a `ttng` operation by then. A tile of fewer rows cannot be one, and a float32
    dot without tf32 needs no tensor core.
    """
    found = []
    for line in ttgir.splitlines():
        match = _DOT.search(line)
        if match is None:
            continue
        sizes = match["result"].rstrip("x").split("x")
        on_tensor_cores = match["operand"] in ("f16", "bf16") or (
            match["operand"] == "f32" and match["precision"] == "tf32"
        )
        if int(sizes[-2]) >= 64 and on_tensor_cores:
            found.append("x".join(sizes))
    return found
