"""`mmfast info`: versions, devices, backends, and which backend serves each op, with the reason."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from typing import Any

ENVIRONMENT = ("MMFAST_BACKEND", "MMFAST_CHECK_RANKS", "MMFAST_EXTENSION", "TRITON_INTERPRET")
PEERS = ("timm", "torchvision", "transformers", "open_clip_torch", "vit-pytorch", "liger-kernel", "quack-kernels")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments: none."""


def run(args: argparse.Namespace) -> int:
    """Print the tables."""
    from ._console import console

    for title, header, rows in (
        ("Versions", None, versions()),
        ("Devices", ("device", "name", "capability", "memory", "multiprocessors"), devices()),
        ("Backends", ("backend", "state"), backend_states()),
        ("Ops", ("op", "device", "dtype", "backend", "why"), choices()),
        ("Environment", None, [(name, os.environ.get(name, "not set")) for name in ENVIRONMENT]),
    ):
        console.print(_table(title, header, rows))
    return 0


def versions() -> list[tuple[str, str]]:
    """(name, version) of what a report of a bug needs."""
    import torch

    from .. import __version__
    from ._machine import commit, driver

    return [
        ("mmfast", f"{__version__} {commit() or 'not from a git checkout'}"),
        ("python", platform.python_version()),
        ("platform", platform.platform()),
        ("torch", torch.__version__),
        ("triton", _version("triton")),
        ("CUDA of torch", torch.version.cuda or "none: a CPU build"),
        ("GPU driver", driver() or "none found"),
        *((name, _version(name)) for name in PEERS),
    ]


def devices() -> list[tuple[str, ...]]:
    """One row a GPU, or one that says why there is none; and the CPU."""
    import torch

    rows: list[tuple[str, ...]] = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        card = torch.cuda.get_device_properties(index)
        memory = f"{card.total_memory / 2**30:.1f} GiB"
        rows.append((f"cuda:{index}", card.name, f"{card.major}.{card.minor}", memory, str(card.multi_processor_count)))
    if not rows:
        reason = "torch finds no GPU" if torch.version.cuda or torch.version.hip else "torch is a CPU build"
        rows.append(("cuda", f"none: {reason}", "-", "-", "-"))
    rows.append(("cpu", f"{platform.machine()}, {torch.get_num_threads()} threads of torch", "-", "-", "-"))
    return rows


def backend_states() -> list[tuple[str, str]]:
    """(backend, whether it can serve, and if not why)."""
    import torch

    from .. import backends

    if backends.TRITON_MISSING:
        triton = f"missing: {backends.TRITON_MISSING}"
    elif torch.cuda.is_available():
        triton = "ready"
    elif backends.interpreting():
        triton = "in Triton's interpreter, for who forces it"
    else:
        triton = "no GPU; TRITON_INTERPRET=1 runs it in Triton's interpreter"
    forced = backends.forced()
    force = [("forced", forced)] if forced else []
    return [("cuda", _cuda_state()), ("triton", triton), ("torch", "ready: PyTorch's own ops serve everything"), *force]


def _cuda_state() -> str:
    """Whether there is an extension, and what it was built for."""
    import torch

    from .. import cuda

    if cuda.missing():
        return f"missing: {cuda.missing()}"
    if cuda.emulated():
        return "emulated: serves CPU tensors, for who forces it"
    built = f"built for {', '.join(f'sm_{arch}' for arch in cuda.architectures())}"
    if not torch.cuda.is_available():
        return f"{built}; no GPU"
    cards = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    others = [f"{major}.{minor}" for major, minor in sorted(cards) if not cuda.runs_on((major, minor))]
    return f"{built}, not for compute capability {', '.join(others)}" if others else f"ready: {built}"


def choices() -> list[tuple[str, ...]]:
    """(op, device, dtype, backend, why) at width 768, as the ops themselves choose."""
    import torch

    from .. import backends

    names = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    rows: list[tuple[str, ...]] = []
    for op in backends.TABLE:
        for name in names:
            for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
                facts = backends.Facts(torch.device(name, 0) if name == "cuda" else torch.device(name), dtype, 768)
                rows.append((op, name, str(dtype).removeprefix("torch."), *_choice(op, facts)))
    return rows


def _choice(op: str, facts: Any) -> tuple[str, str]:
    from .. import backends

    try:
        explained = backends.explain(backends.choose, op, facts)
    except backends.BackendError as refused:
        return "error", str(refused)
    return explained[0].backend, explained[0].reason


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _table(title: str, header: tuple[str, ...] | None, rows: list[Any]) -> Any:
    from rich.table import Table

    table = Table(*(header or ("", "")), title=title, title_justify="left", show_header=header is not None)
    for row in rows:
        table.add_row(*(str(cell).replace("[", r"\[") for cell in row))
    return table
