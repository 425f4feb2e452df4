"""Rows of results: one a measurement, appended to a CSV file and shown as a table."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import mmfast
from mmfast.commands import _machine

from ._harness import Options, Record
from ._limits import Limits, bandwidth, flops_rate, sheet

COLUMNS = (
    "op",
    "provider",
    "mode",
    "shape",
    "dtype",
    "median_us",
    "p20_us",
    "p80_us",
    "gb_per_s",
    "copy_percent",
    "images_per_s",
    "peak_mem_mb",
    "rounds",
    "gpu",
    "driver",
    "torch",
    "triton",
    "cuda",
    "mmfast",
    "commit",
    "date",
    "tflop_per_s",
    "matmul_percent",
    "peak_percent",
    "limit_us",
    "limit_percent",
    "backend",
)
"""New ones go to the end: `append` widens the files of earlier versions."""


def rows(records: Sequence[Record], limits: Limits, options: Options) -> list[dict[str, str]]:
    """The rows of these measurements, held against the limits of the same run."""
    where = _where(options)
    return [{**_row(record, limits, where["gpu"]), **where} for record in records if record.times]


def _row(record: Record, limits: Limits, device: str) -> dict[str, str]:
    times = sorted(1e6 * seconds for seconds in record.times)
    fifths = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else times * 4
    median = statistics.median(times)
    rate, flops = bandwidth(record), flops_rate(record)
    copy = bandwidth(limits.copy) if limits.copy else 0.0
    product = limits.products.get(record.spec.dtype)
    matmul = flops_rate(product) if product else 0.0
    # The sheet's peak is of 16-bit products; float32 ones take tf32 or not, as the user has set.
    peak = sheet(device) if record.spec.dtype in ("fp16", "bf16") else None
    limit = limits.seconds(record)
    return {
        "op": record.spec.op,
        "provider": record.spec.provider,
        "mode": record.spec.mode,
        "shape": record.spec.size,
        "dtype": record.spec.dtype,
        "median_us": f"{median:.3f}",
        "p20_us": f"{fifths[0]:.3f}",
        "p80_us": f"{fifths[3]:.3f}",
        "gb_per_s": f"{rate:.1f}" if rate else "",
        "copy_percent": _percent(rate, copy),
        "images_per_s": f"{1e6 * record.images / median:.1f}" if record.images else "",
        "peak_mem_mb": "" if record.peak_mb is None else f"{record.peak_mb:.1f}",
        "rounds": str(len(times)),
        "tflop_per_s": f"{flops:.4g}" if flops else "",
        "matmul_percent": _percent(flops, matmul),
        "peak_percent": _percent(1e12 * flops, peak.flops if peak else 0.0),
        "limit_us": f"{1e6 * limit:.3f}" if limit else "",
        "limit_percent": _percent(1e6 * limit, median) if limit else "",
        "backend": record.backend,
    }


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}" if part and whole else ""


def _where(options: Options) -> dict[str, str]:
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    return {
        "gpu": _machine.device_name(options.device),
        "driver": _machine.driver(),
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda or "",
        "mmfast": mmfast.__version__,
        "commit": _machine.commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M"),
    }


def append(path: Path, found: Sequence[dict[str, str]]) -> None:
    """Append rows; a new file gets a header, one of an earlier version more columns; another file is refused."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        with path.open(newline="") as stream:
            header = tuple(next(csv.reader(stream)))
        if COLUMNS[: len(header)] != header:
            raise ValueError(f"bench: {path} has other columns than this version writes; name another file")
        if len(header) < len(COLUMNS):
            _widen(path)
    with path.open("a", newline="") as stream:
        _write(stream, found, header=new)


def _widen(path: Path) -> None:
    """Give every row of an earlier version's file the columns added since, empty."""
    with path.open(newline="") as stream:
        before = list(csv.DictReader(stream))
    copy = path.with_name(f".{path.name}.{os.getpid()}")
    with copy.open("w", newline="") as stream:
        _write(stream, before, header=True)
    copy.replace(path)


def _write(stream: Any, found: Sequence[dict[str, str]], *, header: bool) -> None:
    writer = csv.DictWriter(stream, COLUMNS, restval="")
    if header:
        writer.writeheader()
    writer.writerows(found)


def _short(number: float) -> str:
    return f"{number:.1f}" if number < 1000 else f"{number:.0f}"


def table(found: Sequence[dict[str, str]]) -> Any:
    """A table of rows, each group's fastest in bold, with eager PyTorch's time and the fastest peer's over its own."""
    from rich.table import Table

    shown = Table(title="Median times", title_justify="left")
    for name in ("measurement", "provider"):
        shown.add_column(name)
    for name in _NUMBERS:
        shown.add_column(name, justify="right", no_wrap=True)
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in found:
        groups.setdefault((row["op"], row["mode"], row["shape"], row["dtype"]), []).append(row)
    for key, members in groups.items():
        times = {row["provider"]: float(row["median_us"]) for row in members}
        for index, row in enumerate(members):
            own = times[row["provider"]]
            library = row["provider"].rpartition(" ")[0]  # "timm mmfast" is held against "timm eager"
            peers = {
                name: time
                for name, time in times.items()
                if name.rpartition(" ")[0] == library and "mmfast" not in name and name != row["provider"]
            }
            eager = times.get(f"{library} eager".strip())
            spread = f"{_short(float(row['p20_us']))}-{_short(float(row['p80_us']))}"
            numbers = [row[name] for name in _SHOWN]
            ratios = [f"{other / own:.2f}x" if other else "" for other in (eager, min(peers.values(), default=None))]
            style = "bold" if len(times) > 1 and own == min(times.values()) else None
            served = f" ({row['backend']})".replace("[", r"\[") if row["backend"] else ""
            title = "" if index else " ".join(key)
            shown.add_row(title, row["provider"] + served, _short(own), spread, *numbers, *ratios, style=style)
        shown.add_section()
    return shown


_SHOWN = ("gb_per_s", "tflop_per_s", "limit_percent", "images_per_s", "peak_mem_mb")
_NUMBERS = ("median us", "p20-p80", "GB/s", "TFLOP/s", "% limit", "images/s", "peak MB", "vs eager", "vs best peer")
