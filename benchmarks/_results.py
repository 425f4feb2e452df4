"""Rows of results: one a measurement, appended to a CSV file and shown as a table."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import mmfast
from mmfast.commands import _machine

from ._harness import Options, Record, bandwidth

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
)


def rows(records: Sequence[Record], copy: Record | None, options: Options) -> list[dict[str, str]]:
    """The rows of these measurements, held against the copy of the same run."""
    limit = bandwidth(copy) if copy else None
    where = _where(options)
    return [{**_row(record, limit), **where} for record in ([copy] if copy else []) + list(records) if record.times]


def _row(record: Record, limit: float | None) -> dict[str, str]:
    times = sorted(1e6 * seconds for seconds in record.times)
    fifths = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else times * 4
    median = statistics.median(times)
    rate = bandwidth(record)
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
        "copy_percent": f"{100 * rate / limit:.1f}" if rate and limit else "",
        "images_per_s": f"{1e6 * record.images / median:.1f}" if record.images else "",
        "peak_mem_mb": "" if record.peak_mb is None else f"{record.peak_mb:.1f}",
        "rounds": str(len(times)),
    }


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
    """Append rows; a new file gets a header, and a file with other columns is refused."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        with path.open(newline="") as stream:
            header = next(csv.reader(stream))
        if tuple(header) != COLUMNS:
            raise ValueError(f"bench: {path} has other columns than this version writes; name another file")
    with path.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerows(found)


def _short(number: float) -> str:
    return f"{number:.1f}" if number < 1000 else f"{number:.0f}"


def table(found: Sequence[dict[str, str]]) -> Any:
    """A table of rows, each group's fastest in bold, with its time relative to eager PyTorch's."""
    from rich.table import Table

    shown = Table(title="Median times", title_justify="left")
    for name in ("measurement", "provider"):
        shown.add_column(name)
    for name in ("median us", "p20-p80", "GB/s", "% of copy", "images/s", "peak MB", "vs eager"):
        shown.add_column(name, justify="right", no_wrap=True)
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in found:
        groups.setdefault((row["op"], row["mode"], row["shape"], row["dtype"]), []).append(row)
    for key, members in groups.items():
        times = {row["provider"]: float(row["median_us"]) for row in members}
        for index, row in enumerate(members):
            own = times[row["provider"]]
            # "timm mmfast" is held against "timm eager".
            baseline = times.get(f"{row['provider'].rpartition(' ')[0]} eager".strip())
            eager = f"{baseline / own:.2f}x" if baseline else ""
            rest = (row["gb_per_s"], row["copy_percent"], row["images_per_s"], row["peak_mem_mb"], eager)
            style = "bold" if len(times) > 1 and own == min(times.values()) else None
            spread = f"{_short(float(row['p20_us']))}-{_short(float(row['p80_us']))}"
            title = "" if index else " ".join(key)
            shown.add_row(title, row["provider"], _short(own), spread, *rest, style=style)
        shown.add_section()
    return shown
