"""What the CUDA C++ kernels should take on an H200 by a stated model: no measurement, but what one is held against.

A launch takes the longest of these, and START for the machine to fill and drain:

    bytes that it cannot do without, at SHARE of 4.8 TB/s
    FLOPs that its tiles issue, padding included, at the rate of mma.sync: two thirds of the dense 989 TFLOP/s
    exponentials, 16 a clock and multiprocessor
    instructions of its threads, counted in the machine code for sm_90, 128 a clock and multiprocessor

`mmfast bench --predict` prints the rows; with `--csv` it writes them, as predicted-h200.csv beside this file was.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from mmfast.benchmarks._attention import VIT
from mmfast.cuda.attention import waste
from mmfast.ops.add_layer_norm import cost as add_layer_norm_cost
from mmfast.ops.attention import cost as attention_cost
from mmfast.ops.ddim_step import cost as ddim_step_cost
from mmfast.ops.layer_norm import cost as layer_norm_cost
from mmfast.ops.noise_mse import cost as noise_mse_cost
from mmfast.ops.q_sample import cost as q_sample_cost

BYTES = 4.8e12  # a second
SHARE = {"forward": 0.88, "backward": 0.80}
MMA_FLOPS = 989e12 * 2 / 3
EXPONENTIALS = 3.87e12
INSTRUCTIONS = 132 * 128 * 1.83e9
START = 2e-6

NORMS: tuple[tuple[int, ...], ...] = ((50432, 768), (65792, 1024), (2056, 1024))
IMAGES: tuple[tuple[int, ...], ...] = ((256, 3, 64, 64), (64, 3, 256, 256))


class Prediction(NamedTuple):
    """One row."""

    op: str
    mode: str
    shape: str
    dtype: str
    predicted_us: str
    bound_by: str
    bytes: int
    flops_issued: int
    exponentials: int
    instructions: int


def predict(
    op: str,
    mode: str,
    shape: tuple[int, ...],
    moved: int,
    flops: float = 0.0,
    exponentials: int = 0,
    instructions: float = 0.0,
) -> Prediction:
    """A row from the work that a call is."""
    times = {
        "memory": moved / (SHARE[mode] * BYTES),
        "tensor cores": flops / MMA_FLOPS,
        "exponentials": exponentials / EXPONENTIALS,
        "instructions": instructions / INSTRUCTIONS,
    }
    longest = max(times, key=lambda name: times[name])
    microseconds = f"{1e6 * (times[longest] + START):.1f}"
    size = "x".join(map(str, shape))
    return Prediction(
        *(op, mode, size, "bf16", microseconds, longest), *map(round, (moved, flops, exponentials, instructions))
    )


def predictions() -> Iterator[Prediction]:
    """The shapes that have figures to reach, in bfloat16."""
    for shape in NORMS:
        x = _meta(shape)
        for mode in SHARE:
            backward = mode == "backward"
            yield predict("layer_norm", mode, shape, layer_norm_cost(x, backward=backward)["bytes"])
            yield predict("add_layer_norm", mode, shape, add_layer_norm_cost(x, backward=backward)["bytes"])
    for shape in VIT:
        q = _meta(shape)
        for mode in SHARE:
            work = attention_cost(q, q, q, backward=mode == "backward")
            padded = waste(shape[2], shape[2], shape[3])
            yield predict(
                "attention", mode, shape, work["bytes"], work["flops"] * padded, round(work["exponentials"] * padded)
            )
    for shape in IMAGES:
        x = _meta(shape)
        count = x.numel()
        yield predict("q_sample", "forward", shape, q_sample_cost(x)["bytes"], instructions=42 * count)
        # Not counted: that of q_sample, which makes the same noise.
        yield predict("noise_mse", "forward", shape, noise_mse_cost(x)["bytes"], instructions=42 * count)
        guided = _meta((2 * shape[0], *shape[1:]))
        moved = ddim_step_cost(x, guided, duplicate=True)["bytes"]
        yield predict("ddim_step", "forward", shape, moved, instructions=21 * count)


def write(path: Path) -> None:
    """Write the rows as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Prediction._fields)
        writer.writerows(predictions())


def _meta(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")
