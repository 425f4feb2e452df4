"""What `mmfast audit` compiles of `clip_loss`: each kernel at CLIP's widths, in each dtype, with ids and with top-1."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ._clip_loss_gradients import feature_gradient_kernel, logit_gradient_kernel
from ._clip_loss_statistics import clip_loss_combine_kernel, clip_loss_statistics_kernel
from ._common import Compilation, triton_type, whole_vectors
from .clip_loss import COMBINE, TileConfig, owns, raising

ARCHES = (80, 90, 100)


def audit_configurations() -> Iterator[Compilation]:
    """Large batches at CLIP's widths; odd sizes and small tiles at one."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for arch in ARCHES:
        for dtype, width in ((bf16, 512), (bf16, 768), (fp16, 512)):
            for ids, best in ((False, False), (True, False), (False, True), (True, True)):
                yield _statistics(dtype, width, arch, ids=ids, best=best)
            for ids in (False, True):
                yield _logit_gradient(dtype, width, arch, ids=ids)
        for dtype, width in ((bf16, 640), (bf16, 1024)):
            yield _statistics(dtype, width, arch)
            yield _logit_gradient(dtype, width, arch)
        yield _statistics(bf16, 512, arch, even=False)
        for dtype in (bf16, fp32):
            yield _statistics(dtype, 512, arch, side=64, even=False, ids=True, best=True)
            yield _logit_gradient(dtype, 512, arch, side=64, ids=True)
        for dtype, width in ((bf16, 64), (bf16, 128), (fp16, 128), (bf16, 256), (fp16, 256)):
            for ids in (False, True):
                if owns(width, dtype, arch // 10):
                    yield _feature_gradient(dtype, width, arch, ids=ids)
    yield _feature_gradient(bf16, 512, 90)  # these are not the choice
    yield _feature_gradient(fp32, 64, 90)
    for ids, best in ((False, False), (True, True)):
        yield _combine(ids=ids, best=best)


def _label(name: str, dtype: torch.dtype, width: int, arch: int, **flags: bool) -> str:
    words = [name, *(flag for flag, on in flags.items() if on)]
    return f"{', '.join(words)}, sm_{arch}[{triton_type(dtype)[1:]}-{width}]"


def _rows(side: int) -> int:
    """A batch that takes tiles of this side."""
    return 1 << 15 if side == 128 else side


def _tensor_cores(dtype: torch.dtype) -> bool:
    return dtype != torch.float32


def _ids(names: tuple[str, str], on: bool) -> dict[str, str | None]:
    return dict.fromkeys(names, "*i32" if on else None)


def _statistics(
    dtype: torch.dtype,
    width: int,
    arch: int,
    *,
    side: int = 128,
    even: bool = True,
    ids: bool = False,
    best: bool = False,
) -> Compilation:
    config = TileConfig.statistics(_rows(side), 1 << 15, dtype, arch // 10, ids=ids, best=best)
    features = triton_type(dtype)
    arguments: dict[str, Any] = {"image_ptr": features, "text_ptr": features, "scale_ptr": "*fp32"}
    arguments |= _ids(("image_ids_ptr", "text_ids_ptr"), ids)
    for end in ("row", "column"):
        arguments |= {f"{end}_max_ptr": "*fp32", f"{end}_sum_ptr": "*fp32"}
        arguments[f"{end}_positive_ptr"] = "*fp32" if ids or end == "row" else None
        arguments[f"{end}_count_ptr"] = "*fp32" if ids else None
        arguments[f"{end}_best_ptr"] = "*i32" if best else None
    arguments |= dict.fromkeys(("n_rows", "n_columns", "first", "blocks", "steps"), "i32")
    return Compilation(
        label=_label(f"forward {side}", dtype, width, arch, ragged=not even, ids=ids, best=best),
        kernel=clip_loss_statistics_kernel,
        arguments=arguments,
        constants={
            "D": width,
            "EVEN": even,
            "PRECISION": "ieee",
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "PARTS": config.parts(),
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        divisible=("n_rows", "n_columns") if even else (),
        vector_loads=whole_vectors(width, dtype),
        tensor_cores=_tensor_cores(dtype),
        arches=(arch,),
    )


def _weights(ids: bool) -> dict[str, Any]:
    names = ("row_max_ptr", "column_max_ptr", "row_ptr", "column_ptr")
    return dict.fromkeys(names, "*fp32") | dict.fromkeys(
        ("row_target_ptr", "column_target_ptr"), "*fp32" if ids else None
    )


def _logit_gradient(dtype: torch.dtype, width: int, arch: int, *, side: int = 128, ids: bool = False) -> Compilation:
    config = TileConfig.logits(_rows(side), 1 << 15, dtype, arch // 10)
    features = triton_type(dtype)
    return Compilation(
        label=_label(f"backward, block {side}", dtype, width, arch, ids=ids),
        kernel=logit_gradient_kernel,
        arguments={
            **{"image_ptr": features, "text_ptr": features, "scale_ptr": "*fp32", "gradient_ptr": features},
            **_weights(ids),
            **_ids(("image_ids_ptr", "text_ids_ptr"), ids),
            **dict.fromkeys(("n_rows", "n_columns", "first", "steps"), "i32"),
        },
        constants={
            "D": width,
            "PRECISION": "ieee",
            "RAISE": raising(dtype),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "GROUP_M": 8,
            "PARTS": config.parts(),
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        divisible=("n_rows", "n_columns"),
        vector_loads=whole_vectors(width, dtype),
        vector_stores=dtype != torch.float32,
        tensor_cores=_tensor_cores(dtype),
        arches=(arch,),
    )


def _feature_gradient(dtype: torch.dtype, width: int, arch: int, *, ids: bool = False) -> Compilation:
    config = TileConfig.features(width, dtype, arch // 10)
    features = triton_type(dtype)
    return Compilation(
        label=_label("backward, owned rows", dtype, width, arch, ids=ids),
        kernel=feature_gradient_kernel,
        arguments={
            **{"own_ptr": features, "other_ptr": features, "scale_ptr": "*fp32", "gradient_ptr": "*fp32"},
            **_weights(ids),
            **_ids(("own_ids_ptr", "other_ids_ptr"), ids),
            **dict.fromkeys(("n_rows", "n_columns", "first", "blocks"), "i32"),
        },
        constants={
            "D": width,
            "PRECISION": "ieee",
            "RAISE": raising(dtype),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_D": config.block_k,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        divisible=("n_rows", "n_columns"),
        vector_loads=whole_vectors(width, dtype),
        tensor_cores=_tensor_cores(dtype),
        arches=(arch,),
    )


def _combine(*, ids: bool, best: bool) -> Compilation:
    given = {"max": True, "sum": True, "positive": ids, "count": ids, "best": best}
    arguments: dict[str, Any] = {"parts": "i32", "size": "i32"}
    for name, on in given.items():
        kind = ("*i32", "*i64") if name == "best" else ("*fp32", "*fp32")
        arguments |= {f"{name}_ptr": kind[0] if on else None, f"{name}_out_ptr": kind[1] if on else None}
    return Compilation(
        label=f"combine{', ids' if ids else ''}{', best' if best else ''}",
        kernel=clip_loss_combine_kernel,
        arguments=arguments,
        constants={"BLOCK": COMBINE},
        num_warps=4,
        divisible=("size",),
    )
