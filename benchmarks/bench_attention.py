"""`attention` beside PyTorch's own, back end by back end; the row names the one that served.

A shape is (B, H, Nq, Nk, d). The limit of a row is the longest of its bytes at the bandwidth of a copy, its products
at the speed of a large matrix product, and its exponentials at the data sheet's rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch.nn.functional as F
from torch import Tensor

from mmfast import ops
from mmfast.benchmarks import _attention, _harness
from mmfast.benchmarks._harness import Options, Spec
from mmfast.ops.attention import cost

VIT = tuple((b, h, n, n, d) for b, h, n, d in _attention.VIT)
CROSS = ((16, 8, 4096, 77, 40), (16, 8, 1024, 77, 80), (16, 8, 256, 77, 160))  # U-Net of Stable Diffusion 1.5
Q_FORMER = ((128, 12, 32, 257, 64), (8, 12, 32, 257, 64), (1, 12, 32, 257, 64))
LONG = (
    (4, 32, 4096, 4096, 64),
    (8, 32, 2048, 2048, 64),
    (2, 32, 8192, 8192, 64),
    (1, 32, 16384, 16384, 64),
    (8, 16, 2048, 2048, 128),
    (4, 16, 4096, 4096, 128),
    (2, 16, 8192, 8192, 128),
    (1, 16, 16384, 16384, 128),
)
U_NET_SELF = ((16, 8, 4096, 4096, 40), (16, 8, 1024, 1024, 80))
DECODE = tuple((1, 16, queries, keys, 64) for keys in (8192, 32768, 62464) for queries in (1, 4, 32))

BOTH, FORWARD = ("forward", "backward"), ("forward",)
# The most important first: a run with a budget leaves out the last. (shapes, modes, with torch.compile)
GPU_GROUPS = (
    (VIT, BOTH, True),
    (LONG[:1], BOTH, False),
    (CROSS, FORWARD, False),
    (Q_FORMER, FORWARD, False),
    (DECODE, FORWARD, False),
    (LONG[1:], BOTH, False),
    (U_NET_SELF, BOTH, False),
    (CROSS + Q_FORMER[:1], ("backward",), False),
)
CPU_GROUPS = ((((2, 3, 197, 197, 64), (2, 3, 65, 65, 64)), BOTH, True), (((1, 4, 32, 257, 64),), FORWARD, True))


def measurements(options: Options) -> Iterator[tuple[Spec, int]]:
    on_gpu = options.device == "cuda"
    flex = ("flex",) if on_gpu and (options.full or "flex" in options.peers) else ()
    for shapes, modes, compiled in (GPU_GROUPS if on_gpu else CPU_GROUPS)[: 1 if options.quick else None]:
        names = _attention.names(options, compiled=compiled or options.full, others=flex)
        chosen = tuple((shape, "bf16" if on_gpu else "fp32") for shape in shapes)
        yield from _harness.specs("attention", options, chosen[: 2 if options.quick else None], modes, names)


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def mmfast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ops.attention(q, k, v)


def flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return _harness.compiled(flex_attention)


def test_attention(spec: Spec, pass_number: int, options: Options, measure: Callable[..., None]) -> None:
    batch, heads, queries, keys, width = spec.shape
    q, k, v = (_harness.randn((batch, heads, n, width), spec, options.device) for n in (queries, keys, keys))
    _attention.run(
        spec,
        pass_number,
        options,
        measure,
        eager=eager,
        ours=mmfast,
        args=(q, k, v),
        cost=cost(q, k, v, backward=spec.mode == "backward"),
        others={"flex": flex},
    )
