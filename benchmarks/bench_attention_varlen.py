"""`attention_varlen` on a ragged batch, as NaFlex and NaViT have it, beside PyTorch's ways to run one.

A shape is (number of images, shortest, longest, H, d); the lengths lie evenly between. `eager` pads the tokens, runs
SDPA with a mask and takes the tokens out again, `nested` is SDPA of nested tensors, `varlen_attn` is
`torch.nn.attention.varlen`, `flash_attn` the library of that name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast import ops
from mmfast.benchmarks import _attention, _harness
from mmfast.benchmarks._harness import Options, Spec, Unavailable

GPU_SHAPES = ((256, 64, 256, 12, 64), (64, 128, 1024, 12, 64), (16, 16, 4096, 16, 64))
CPU_SHAPES = ((4, 16, 65, 3, 64),)


def measurements(options: Options) -> Iterator[tuple[Spec, int]]:
    on_gpu = options.device == "cuda"
    shapes = tuple((shape, "bf16" if on_gpu else "fp32") for shape in (GPU_SHAPES if on_gpu else CPU_SHAPES))
    others = ("nested", "varlen_attn", "flash_attn") if on_gpu else ()
    names = _attention.names(options, compiled=options.full, others=others, forced=False)
    shapes = shapes[: 1 if options.quick else None]
    yield from _harness.specs("attention_varlen", options, shapes, ("forward", "backward"), names)


def lengths(spec: Spec) -> list[int]:
    """Of the images of a ragged batch, in no order."""
    images, shortest, longest = spec.shape[:3]
    even = torch.linspace(shortest, longest, images).long()
    return even[torch.randperm(images, generator=torch.Generator().manual_seed(0))].tolist()


def eager(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int, slots: Tensor, mask: Tensor) -> Tensor:
    """Pad, attend with a mask over keys, unpad; `slots` is where each token goes among B * longest."""
    images = len(mask)
    padded = (
        x.new_zeros(images * longest, *x.shape[1:]).index_copy(0, slots, x).unflatten(0, (images, longest))
        for x in (q, k, v)
    )
    query, key, value = (x.transpose(1, 2) for x in padded)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, slots)


def mmfast(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int, *unused: Tensor) -> Tensor:
    return ops.attention_varlen(q, k, v, offsets, offsets, longest, longest)


def nested() -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int, *unused: Any) -> Tensor:
        query, key, value = (
            torch.nested.nested_tensor_from_jagged(x, offsets, min_seqlen=1, max_seqlen=longest).transpose(1, 2)
            for x in (q, k, v)
        )
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).values()

    return attend


def varlen_attn() -> Callable[..., Tensor]:
    try:
        from torch.nn.attention.varlen import varlen_attn as attend
    except ImportError as missing:
        raise Unavailable(f"varlen_attn: {missing}") from missing

    def run(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int, *unused: Any) -> Any:
        return attend(q, k, v, offsets, offsets, longest, longest)

    return run


def flash_attn() -> Callable[..., Tensor]:
    try:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]
    except ImportError as missing:
        raise Unavailable(f"flash_attn: {missing}") from missing
    return lambda q, k, v, offsets, longest, *unused: flash_attn_varlen_func(
        q, k, v, offsets, offsets, longest, longest
    )


def cost(spec: Spec, size: int) -> dict[str, int]:
    found = lengths(spec)
    heads, width = spec.shape[3:]
    tokens, pairs = sum(found) * heads * width, heads * sum(n * n for n in found)
    backward = spec.mode == "backward"
    return {
        "bytes": (8 if backward else 4) * tokens * size,
        "flops": (10 if backward else 4) * pairs * width,
        "exponentials": pairs,
    }


def test_attention_varlen(spec: Spec, pass_number: int, options: Options, measure: Callable[..., None]) -> None:
    if not hasattr(ops, "attention_varlen"):
        raise Unavailable("attention_varlen: not in this version")
    found, longest = lengths(spec), spec.shape[2]
    heads, width = spec.shape[3:]
    q, k, v = (_harness.randn((sum(found), heads, width), spec, options.device) for _ in range(3))
    sizes = torch.tensor(found, device=options.device)
    offsets = F.pad(sizes.cumsum(0), (1, 0)).int()
    inside = torch.arange(longest, device=options.device) < sizes[:, None]  # [B, longest]
    _attention.run(
        spec,
        pass_number,
        options,
        measure,
        eager=eager,
        ours=mmfast,
        args=(q, k, v, offsets, longest, inside.flatten().nonzero()[:, 0], inside[:, None, None, :]),
        cost=cost(spec, q.element_size()),
        others={"nested": nested, "varlen_attn": varlen_attn, "flash_attn": flash_attn},
    )
