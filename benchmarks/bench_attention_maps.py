"""`attention_maps` beside the formula in plain torch, which stores the scores, and the same compiled.

A shape is (B, H, Nq, Nk, d); the maps of all heads are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from mmfast import ops
from mmfast.benchmarks import _attention, _harness
from mmfast.benchmarks._harness import Options, Spec, Unavailable

GPU_SHAPES = ((32, 12, 197, 197, 64), (32, 16, 257, 257, 64), (8, 16, 577, 577, 64), (1, 16, 4096, 4096, 64))
CPU_SHAPES = ((2, 3, 65, 65, 64),)


def measurements(options: Options) -> Iterator[tuple[Spec, int]]:
    on_gpu = options.device == "cuda"
    shapes = tuple((shape, "bf16" if on_gpu else "fp32") for shape in (GPU_SHAPES if on_gpu else CPU_SHAPES))
    names = _attention.names(options, compiled=True, forced=False)
    yield from _harness.specs("attention_maps", options, shapes[: 1 if options.quick else None], ("forward",), names)


def eager(q: Tensor, k: Tensor) -> Tensor:
    return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1)


def mmfast(q: Tensor, k: Tensor) -> Tensor:
    return ops.attention_maps(q, k)


def test_attention_maps(spec: Spec, pass_number: int, options: Options, measure: Callable[..., None]) -> None:
    if not hasattr(ops, "attention_maps"):
        raise Unavailable("attention_maps: not in this version")
    batch, heads, queries, keys, width = spec.shape
    q, k = (_harness.randn((batch, heads, n, width), spec, options.device) for n in (queries, keys))
    pairs = batch * heads * queries * keys
    _attention.run(
        spec,
        pass_number,
        options,
        measure,
        eager=eager,
        ours=mmfast,
        args=(q, k),
        cost={
            "bytes": (q.numel() + k.numel() + pairs) * q.element_size(),
            "flops": 2 * pairs * width,
            "exponentials": pairs,
        },
        named=False,
    )
