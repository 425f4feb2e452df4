"""What a measurement is held against: the least time that its bytes, its FLOPs and its other work could take.

Rates are measured in the run itself: of bytes, by a large copy; of FLOPs, by a large matrix product in the row's
dtype, both PyTorch's own; and on a GPU of normal numbers from seeds, by the ops' own code. Another number is the data
sheet's peak of tensor-core FLOPs, where the device's name is known; exponentials have no measured rate, so their limit
comes from the sheet as well.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ._harness import DTYPES, CudaTime, Options, Record, Spec


class Sheet(NamedTuple):
    """A device's data sheet."""

    flops: float  # dense 16-bit tensor-core FLOPs a second
    exponentials: float  # 16 a clock and multiprocessor, at the boost clock


SHEETS = {
    "H200": Sheet(989e12, 3.87e12),
    "H100 80GB HBM3": Sheet(989e12, 3.87e12),  # the SXM board
    "A100": Sheet(312e12, 2.44e12),
}
"""By a part of the device's name."""


def sheet(name: str) -> Sheet | None:
    """The data sheet of the device with this name, where it is known."""
    return next((found for part, found in SHEETS.items() if part in name), None)


def exponential_seconds(count: int, options: Options) -> float | None:
    """The least time of `count` exponentials on a GPU whose data sheet is known, for `measure(limit=...)`."""
    found = sheet(torch.cuda.get_device_name()) if options.device == "cuda" else None
    return count / found.exponentials if found else None


def copy_bandwidth(options: Options) -> Record:
    """A large copy on the device: the limit that memory-bound rows are held against."""
    size = (1 << 30) if options.device == "cuda" else (1 << 26 if options.quick else 1 << 28)
    source = torch.randint(-100, 100, (size,), dtype=torch.int8, device=options.device)
    target = torch.empty_like(source)
    record = Record(Spec("copy", "torch", "forward", (size,), "int8"), moved=2 * size)
    _time(record, lambda: target.copy_(source), options)
    return record


def product_rate(dtype: str, options: Options) -> Record:
    """A large square matrix product in this dtype: the limit that rows with FLOPs are held against."""
    size = 8192 if options.device == "cuda" else (256 if options.quick else 1024)
    a, b = (torch.randn(size, size, device=options.device).to(DTYPES[dtype]) for _ in range(2))
    out = torch.empty_like(a)
    record = Record(Spec("matmul", "torch", "forward", (size, size, size), dtype), flops=2 * size**3)
    _time(record, lambda: torch.mm(a, b, out=out), options)
    return record


def normals_rate(options: Options) -> Record | None:
    """Normal numbers of the kernels' generator, not stored: the limit of rows that make noise. None without a GPU."""
    if options.device != "cuda":
        return None
    try:
        from ._philox import filler
    except ImportError:  # no Triton
        return None
    call, count = filler(1 << 28)
    record = Record(Spec("philox", "mmfast", "forward", (count,), "fp32"), normals=count)
    _time(record, call, options)
    return record


def _time(record: Record, call: Callable[[], Any], options: Options) -> None:
    for number in range(13):
        start: Any = CudaTime() if options.device == "cuda" else time.perf_counter()
        call()
        end: Any = CudaTime() if options.device == "cuda" else time.perf_counter()
        if number >= 3:
            record.times.append(end - start)


@dataclass
class Limits:
    """The rates measured in one run."""

    options: Options
    copy: Record | None = None
    products: dict[str, Record] = field(default_factory=dict)  # by dtype
    noise: Record | None = None

    def measure(self, record: Record) -> None:
        """Measure the rates that this record is held against, once each a run."""
        if self.copy is None:
            self.copy = copy_bandwidth(self.options)
        dtype = record.spec.dtype
        if record.flops and dtype not in self.products:
            self.products[dtype] = product_rate(dtype, self.options)
        if record.normals and self.noise is None:
            self.noise = normals_rate(self.options)

    @property
    def records(self) -> list[Record]:
        """The measurements themselves, which are rows too."""
        return [record for record in (self.copy, *self.products.values(), self.noise) if record]

    def seconds(self, record: Record) -> float | None:
        """The least time of a record's bytes, FLOPs, noise and other work: of what takes longest, where it is known."""
        product = self.products.get(record.spec.dtype)
        known = [
            record.moved / (1e9 * bandwidth(self.copy)) if record.moved and self.copy else None,
            record.flops / (1e12 * flops_rate(product)) if record.flops and product else None,
            record.normals * statistics.median(self.noise.times) / self.noise.normals
            if record.normals and self.noise and self.noise.times
            else None,
            record.limit,
        ]
        return max((seconds for seconds in known if seconds), default=None)


def bandwidth(record: Record) -> float:
    """Bytes that the op cannot do without over the median time, in GB/s; 0 where none are counted."""
    return record.moved / statistics.median(record.times) / 1e9 if record.times else 0.0


def flops_rate(record: Record) -> float:
    """FLOPs that the op cannot do without over the median time, in TFLOP/s; 0 where none are counted."""
    return record.flops / statistics.median(record.times) / 1e12 if record.times else 0.0
