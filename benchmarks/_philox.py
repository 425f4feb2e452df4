"""The kernels' normal numbers and nothing else: how fast noise can be made on a GPU whose memory has no part in it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from mmfast.kernels._philox import normals4

CHUNKS = 256  # of a tile, as the ops' kernels have them: 8 numbers a thread
TILES = 16  # of a program, so that its start costs nothing


@triton.jit
def normals_kernel(out_ptr, key, CHUNKS: tl.constexpr, TILES: tl.constexpr):
    low = tl.load(key).to(tl.uint32)
    high = tl.load(key + 1).to(tl.uint32)
    lane = tl.arange(0, CHUNKS)
    total = tl.zeros([CHUNKS], dtype=tl.float32)
    for i in range(TILES):
        chunk = (tl.program_id(0) * TILES + i) * CHUNKS + lane
        a, b, c, d = normals4(low, high, chunk, low * 0, low * 0)
        total += (a + b) + (c + d)
    tl.store(out_ptr + lane, total, mask=total > 1e30)  # never: it keeps the compiler from leaving all out


def filler(count: int) -> tuple[Callable[[], None], int]:
    """A call that makes about `count` normal numbers on the GPU, and how many they are."""
    out = torch.zeros(CHUNKS, device="cuda")
    key = torch.tensor([1, 2], device="cuda")
    programs = triton.cdiv(count, 4 * CHUNKS * TILES)

    def run() -> None:
        normals_kernel[(programs,)](out, key, CHUNKS=CHUNKS, TILES=TILES, num_warps=4)

    return run, programs * 4 * CHUNKS * TILES
