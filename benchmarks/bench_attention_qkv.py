"""`attention_qkv` beside what timm does: three views of the packed projections, SDPA, a transpose and a copy.

A shape is (B, H, N, d) for packed projections (B, N, 3 * H * d).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch.nn.functional as F
from torch import Tensor

from mmfast import ops
from mmfast.benchmarks import _attention, _harness
from mmfast.benchmarks._harness import Options, Spec, Unavailable

GPU_SHAPES = _attention.VIT
CPU_SHAPES = ((2, 3, 197, 64), (2, 3, 65, 64))


def measurements(options: Options) -> Iterator[tuple[Spec, int]]:
    on_gpu = options.device == "cuda"
    shapes = tuple((shape, "bf16" if on_gpu else "fp32") for shape in (GPU_SHAPES if on_gpu else CPU_SHAPES))
    names = _attention.names(options, compiled=True, others=("flash_attn",) if on_gpu else ())
    shapes = shapes[: 1 if options.quick else None]
    yield from _harness.specs("attention_qkv", options, shapes, ("forward", "backward"), names)


def eager(qkv: Tensor, heads: int) -> Tensor:
    """As `timm.models.vision_transformer.Attention`, between its two linear layers."""
    batch, length, width = qkv.shape
    q, k, v = qkv.reshape(batch, length, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width // 3)


def mmfast(qkv: Tensor, heads: int) -> Tensor:
    return ops.attention_qkv(qkv, heads)


def flash_attn() -> Callable[..., Tensor]:
    try:
        from flash_attn import flash_attn_qkvpacked_func  # type: ignore[import-not-found]
    except ImportError as missing:
        raise Unavailable(f"flash_attn: {missing}") from missing

    def packed(qkv: Tensor, heads: int) -> Tensor:
        return flash_attn_qkvpacked_func(qkv.unflatten(-1, (3, heads, -1))).flatten(2)

    return packed


def cost(spec: Spec, size: int) -> dict[str, int]:
    """Reads the projections and writes the output; backward reads both and the gradient and writes one of each."""
    batch, heads, length, width = spec.shape
    tokens, pairs = batch * length * heads * width, batch * heads * length**2
    backward = spec.mode == "backward"
    return {
        "bytes": (8 if backward else 4) * tokens * size,
        "flops": (10 if backward else 4) * pairs * width,
        "exponentials": pairs,
    }


def test_attention_qkv(spec: Spec, pass_number: int, options: Options, measure: Callable[..., None]) -> None:
    batch, heads, length, width = spec.shape
    qkv = _harness.randn((batch, length, 3 * heads * width), spec, options.device)
    _attention.run(
        spec,
        pass_number,
        options,
        measure,
        eager=eager,
        ours=mmfast,
        args=(qkv, heads),
        cost=cost(spec, qkv.element_size()),
        others={"flash_attn": flash_attn},
    )
