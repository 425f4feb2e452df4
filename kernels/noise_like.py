"""Standard normal noise from seeds.

    y[b, e] = number e % 4 of the four normals of (seed of b, chunk e / 4)      (+ offset_noise * n[b, channel of e])

One pass that writes 1 element (2 B in bf16) and reads nothing, bound by the arithmetic of the noise: about 40
instructions an element against a fraction of a byte each. A program makes one tile of one sample; see `_samples`.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from mmfast._layouts import new_like

from ._common import AUDIT_DTYPES, Compilation, on_device, triton_type
from ._samples import (
    HOST_NUMBERS,
    SamplePlan,
    add_channel_noise,
    channel_noise,
    meta_samples,
    sample_key,
    seed_arguments,
    seed_words,
    tile_noise,
    tile_offsets,
)


@triton.jit(do_not_specialize=[name for name in HOST_NUMBERS if name in ("blocks", "seed_low", "seed_high")])
def noise_like_forward_kernel(
    y_ptr,  # [B, size], contiguous or channels_last within a sample
    seeds_ptr,  # [B] int64, or None
    channel_noise_ptr,  # [B, C] float32, or None
    seed_low,
    seed_high,
    size,
    blocks,
    n_channels,
    offset_noise,
    STREAM: tl.constexpr,
    CHANNELS: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks
    key_low, key_high, sample = sample_key(seeds_ptr, seed_low, seed_high, b)
    stream = (b * 0 + STREAM).to(tl.uint32)
    noise = tile_noise(i, size, key_low, key_high, sample, stream, CHANNELS, LAYOUT, BLOCK, BLOCK_C)
    noise = add_channel_noise(
        noise, i, size, b, channel_noise_ptr, n_channels, offset_noise, CHANNELS, LAYOUT, BLOCK, BLOCK_C
    )
    offsets, inside = tile_offsets(i, size, CHANNELS, LAYOUT, BLOCK, BLOCK_C)
    tl.store(y_ptr + b * size + offsets, noise.to(y_ptr.dtype.element_ty), mask=inside)


def noise_like_forward(
    x: Tensor,
    seeds: Tensor | None,
    seed: int,
    offset_noise: float,
    *,
    stream: int = 0,
    plan: SamplePlan | None = None,
) -> Tensor:
    """Noise in x's shape, dtype and layout; `seeds` is int64 (B,), or None for `seed` and the samples' indices."""
    y = new_like(x)
    if y.numel() == 0:
        return y
    plan = plan or SamplePlan.of(y)
    size = y[0].numel()
    blocks = plan.blocks(size)
    with on_device(x):
        channels = channel_noise(x, seeds, seed, offset_noise)
        noise_like_forward_kernel[(blocks * len(y),)](
            y,
            None if seeds is None else seeds.contiguous(),
            channels,
            *seed_words(seed),
            size,
            blocks,
            y.shape[1] if channels is not None else 1,
            offset_noise,
            STREAM=stream,
            **plan.constants,
            num_warps=plan.num_warps,
        )
    return y


def audit_configurations() -> Iterator[Compilation]:
    """What `mmfast audit` compiles: both layouts, sizes that are and are not a multiple of 16, each kind of seed."""
    for dtype in AUDIT_DTYPES:
        for label, shape, last, seeds, offset in (
            ("forward", (64, 3, 64, 64), False, True, False),
            ("forward, one seed, offset", (64, 3, 64, 64), False, False, True),
            ("forward, any size", (64, 3, 15, 15), False, True, False),
            ("forward, channels_last", (64, 320, 64, 64), True, True, True),
            ("forward, channels_last latents", (64, 4, 64, 64), True, True, False),
            ("forward, channels_last, any size", (64, 3, 15, 15), True, True, False),
        ):
            plan = SamplePlan.of(meta_samples(shape, last))
            name = triton_type(dtype)
            yield Compilation(
                label=f"{label}[{name[1:]}-{'x'.join(map(str, shape))}]",
                kernel=noise_like_forward_kernel,
                arguments={
                    "y_ptr": name,
                    **seed_arguments(seeds),
                    "channel_noise_ptr": "*fp32" if offset else None,
                    **dict.fromkeys(("size", "blocks", "n_channels"), "i32"),
                    "offset_noise": "fp32",
                },
                constants={"STREAM": 0, **plan.constants},
                num_warps=plan.num_warps,
                divisible=("size",) if plan.whole_vectors else (),
                vector_stores=plan.whole_vectors,
                normals=plan.normals,
            )
