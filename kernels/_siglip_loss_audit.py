"""What `mmfast audit` compiles of `siglip_loss`: large batches at SigLIP's widths, with each option."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ._common import Compilation, triton_type, whole_vectors
from .siglip_loss import BLOCK_SIDE, GROUP, TileConfig, raising, siglip_loss_forward_kernel

WIDTHS = (512, 1024, 1152)
"""Widths of features beside 768, which B/16 has: CLIP's, L/16's and So400m's."""


def audit_configurations() -> Iterator[Compilation]:
    """Each option in 16 bits; an odd width; few rows, float32 among them."""
    bf16, fp32 = torch.bfloat16, torch.float32
    for arch in (80, 90, 100):
        for dtype in (bf16, torch.float16):
            for ids, metrics in ((False, False), (True, False), (False, True), (True, True)):
                yield _audit(dtype, 768, arch, gradient=True, ids=ids, metrics=metrics)
        for width in WIDTHS:
            yield _audit(bf16, width, arch, gradient=True)
        for ids, metrics in ((False, False), (True, True)):
            yield _audit(bf16, 768, arch, gradient=False, ids=ids, metrics=metrics)
        yield _audit(torch.float16, 768, arch, gradient=False)
        yield _audit(bf16, 513, arch, gradient=True)
        for dtype in (bf16, fp32):
            yield _audit(dtype, 768, arch, side=256, gradient=True, ids=True, metrics=True)
            yield _audit(dtype, 768, arch, side=256, gradient=False)


def _audit(
    dtype: torch.dtype,
    width: int,
    arch: int,
    *,
    gradient: bool,
    side: int = BLOCK_SIDE,
    ids: bool = False,
    metrics: bool = False,
) -> Compilation:
    config = TileConfig.choose(side, side, width, dtype, arch // 10, ids=ids)
    features = triton_type(dtype)
    what = ["forward and backward" if gradient else "forward", "few rows" if side < BLOCK_SIDE else ""]
    what += ["ids" if ids else "", "metrics" if metrics else "", f"sm_{arch}"]
    arguments: dict[str, Any] = dict.fromkeys(("n_rows", "n_columns", "first", "stride", "steps"), "i32")
    arguments |= {"image_ptr": features, "text_ptr": features, "scale_ptr": "*fp32", "bias_ptr": "*fp32"}
    arguments |= dict.fromkeys(("image_ids_ptr", "text_ids_ptr"), "*i32" if ids else None)
    arguments |= {"positive_ptr": None if ids else "*fp32", "gradient_ptr": features if gradient else None}
    whole = whole_vectors(width, dtype)
    return Compilation(
        label=f"{', '.join(filter(None, what))}[{features[1:]}-{width}]",
        kernel=siglip_loss_forward_kernel,
        arguments={**arguments, "sums_ptr": "*fp32"},
        constants={
            **{"D": width, "GRADIENT": gradient, "METRICS": metrics, "PRECISION": "ieee", "RAISE": raising(dtype)},
            **{"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k},
            **{"GROUP_M": GROUP, "PARTS": config.parts},
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        divisible=("stride", *(() if side < BLOCK_SIDE else ("n_rows", "n_columns"))),
        vector_loads=whole,
        vector_stores=gradient,
        tensor_cores=dtype != torch.float32 and whole,
        arches=(arch,),
    )
