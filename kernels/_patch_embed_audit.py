"""What `mmfast audit` compiles of the patch embedding: the shapes of ViT-B/16, L/14, H/14 and S/8."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import triton

from . import _patch_embed_backward as backward
from . import patch_embed as forward
from ._common import AUDIT_DTYPES, Compilation, triton_type, whole_vectors
from ._patch_embed_pixels import MAX_FOLDED_CHANNELS, pack_weight_kernel

MODELS = ((16, 768), (14, 1024), (14, 1280), (8, 384))
"""Patch size and width."""
PROGRAMS = 2 * 132
"""Of an H200, two a multiprocessor."""
BATCHES = {256: "", 1: ", batch 1"}
CHANNELS = 3
WASTE = 1.15

GRID = {name: "i64" if "multiplier" in name else "i32" for name in backward.GRID}
STRIDES = dict.fromkeys(("stride_b", "stride_c", "stride_h"), "i32")
WEIGHT_STRIDES = dict.fromkeys(("stride_d", "stride_c", "stride_h", "stride_w"), "i32")
FOLD = {f"{name}_{index}": "fp32" for name in ("shift", "scale") for index in range(MAX_FOLDED_CHANNELS)}

PIXELS = {torch.uint8: "*u8", **{dtype: triton_type(dtype) for dtype in AUDIT_DTYPES}}


def audit_configurations() -> Iterator[Compilation]:
    """Every model in 16 bits, both layouts, uint8 and float32 pixels; the rest at ViT-B/16 and L/14."""
    for (patch, width), layout, batch in product(MODELS, (False, True), BATCHES):
        for pixels in (torch.bfloat16, torch.uint8, torch.float32):
            yield _forward(patch, width, layout, pixels, torch.bfloat16, batch=batch)
    for (patch, width), layout in product(MODELS, (False, True)):
        for pixels in (torch.bfloat16, torch.uint8, torch.float32):
            yield _weight_gradient(patch, width, layout, pixels, torch.bfloat16)
        yield _image_gradient(patch, width, layout, torch.bfloat16, torch.bfloat16)
    for patch, width in MODELS[:2]:
        yield _forward(patch, width, False, torch.float16, torch.float16)
        yield _forward(patch, width, False, torch.uint8, torch.float16)
        yield _forward(patch, width, False, torch.float32, torch.bfloat16, out=torch.float32)  # autocast
        yield _forward(patch, width, False, torch.uint8, torch.bfloat16, out=torch.float32)
        for layout, pixels in product((False, True), (torch.float32, torch.uint8)):
            yield _forward(patch, width, layout, pixels, torch.float32)
        yield _forward(patch, width, False, torch.float32, torch.float32, precision="ieee")
        yield _forward(patch, width, False, torch.float32, torch.float32, batch=1)
        yield _forward(patch, width, False, torch.bfloat16, torch.bfloat16, missing=("bias_ptr", "pos_ptr"))
        yield _weight_gradient(patch, width, False, torch.float16, torch.float16)
        yield _image_gradient(patch, width, False, torch.float32, torch.bfloat16)
        for dtype in AUDIT_DTYPES:
            yield _finish(patch, width, dtype)
            yield _pack(patch, width, dtype)


def _geometry(patch: int, layout: bool, width: int) -> dict[str, Any]:
    run = patch * CHANNELS if layout else patch
    return {
        "C": CHANNELS,
        "PH": patch,
        "PW": patch,
        "VEC": math.gcd(run, 16),
        "CHANNELS_LAST": layout,
        "D": width,
    }


def _pitch(patch: int, dtype: torch.dtype) -> int:
    """Columns of the weight that the kernel reads: its own, or those of a packed copy."""
    depth = CHANNELS * patch * patch
    return depth if depth * dtype.itemsize % 16 == 0 else triton.cdiv(depth, 64) * 64


def _label(what: str, patch: int, width: int, layout: bool, pixels: torch.dtype, dtype: torch.dtype) -> str:
    names = [what]
    names += ["uint8 pixels" if pixels == torch.uint8 else "float32 pixels"] if pixels != dtype else []
    names += ["channels_last"] if layout else []
    return f"{', '.join(names)}[{triton_type(dtype)[1:]}-P{patch}-{width}]"


def _padded(size: int, block: int) -> float:
    return triton.cdiv(size, block) * block / size


def _forward(
    patch: int,
    width: int,
    layout: bool,
    pixels: torch.dtype,
    dtype: torch.dtype,
    *,
    out: torch.dtype | None = None,
    precision: str = "tf32",
    batch: int = 256,
    missing: tuple[str, ...] = (),
) -> Compilation:
    depth, rows = CHANNELS * patch * patch, batch * (224 // patch) ** 2
    out_dtype = out or dtype
    config = forward.TileConfig.forward(rows, width, depth, pixels, dtype, out_dtype, precision, PROGRAMS)
    w, y = triton_type(dtype), triton_type(out_dtype)
    what = "forward" + BATCHES[batch] + (", ieee" if precision == "ieee" else "") + (", plain" if missing else "")
    what += ", float32 tokens" if out_dtype != dtype else ""
    waste = _padded(rows, config.block_m) * _padded(width, config.block_n) * _padded(depth, config.block_k)
    return Compilation(
        label=_label(what, patch, width, layout, pixels, dtype),
        kernel=forward.patch_embed_forward_kernel,
        arguments={
            **{"images_ptr": PIXELS[pixels], "weight_ptr": w, "bias_ptr": w, "pos_ptr": y, "prefix_ptr": y},
            **{"y_ptr": y, "n_images": "i32", "depth": "i32", **GRID, **STRIDES},
            **dict.fromkeys(missing),
        },
        constants={
            **_geometry(patch, layout, width),
            "PITCH": _pitch(patch, dtype),
            "PREFIX": 1,
            "POS_PREFIX": 1,
            "GAIN": 256 if pixels == torch.uint8 else 1,
            "PRECISION": precision,
            **{"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k},
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        vector_loads=not missing and whole_vectors(width, out_dtype),
        vector_stores=whole_vectors(width, out_dtype),
        tensor_cores=precision != "ieee",
        waste=waste,
        waste_limit=WASTE if batch > 1 else None,
    )


def _weight_gradient(patch: int, width: int, layout: bool, pixels: torch.dtype, dtype: torch.dtype) -> Compilation:
    depth = CHANNELS * patch * patch
    config = backward.GradientConfig.weight(width, depth)
    waste = _padded(width, config.block_d) * _padded(depth, config.block_k)
    return Compilation(
        label=_label("backward, weight", patch, width, layout, pixels, dtype),
        kernel=backward.patch_embed_weight_gradient_kernel,
        arguments={
            **{"dy_ptr": triton_type(dtype), "images_ptr": PIXELS[pixels], "partial_ptr": "*fp32"},
            **{"rows_per_split": "i32", "stride_dyb": "i32", "stride_dyn": "i32", **GRID, **STRIDES},
        },
        constants={
            **_geometry(patch, layout, width),
            **{"PREFIX": 1, "PRECISION": "tf32"},
            **{"BLOCK_M": config.block_m, "BLOCK_D": config.block_d, "BLOCK_K": config.block_k},
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        divisible=("stride_dyb", "stride_dyn"),
        vector_stores=True,
        tensor_cores=True,
        waste=waste,
        waste_limit=WASTE,
    )


def _image_gradient(patch: int, width: int, layout: bool, pixels: torch.dtype, dtype: torch.dtype) -> Compilation:
    depth, config = CHANNELS * patch * patch, backward.GradientConfig.images(CHANNELS * patch * patch)
    waste = _padded(depth, config.block_k) * _padded(width, config.block_d)
    return Compilation(
        label=_label("backward, images", patch, width, layout, pixels, dtype),
        kernel=backward.patch_embed_image_gradient_kernel,
        arguments={
            **{"dy_ptr": triton_type(dtype), "weight_ptr": triton_type(dtype), "dimages_ptr": PIXELS[pixels]},
            **{"width": "i32", "stride_dyb": "i32", "stride_dyn": "i32", **GRID, **STRIDES},
        },
        constants={
            **_geometry(patch, layout, width),
            **{"PITCH": _pitch(patch, dtype), "PREFIX": 1, "PRECISION": "tf32"},
            **{"BLOCK_M": config.block_m, "BLOCK_D": config.block_d, "BLOCK_K": config.block_k},
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        divisible=("stride_dyb", "stride_dyn"),
        vector_stores=patch == 16 and pixels.itemsize == 2,
        tensor_cores=True,
        waste=waste,
        waste_limit=WASTE,
    )


def _finish(patch: int, width: int, dtype: torch.dtype) -> Compilation:
    geometry = {name: value for name, value in _geometry(patch, False, width).items() if name != "VEC"}
    return Compilation(
        label=_label("backward, sum of splits", patch, width, False, dtype, dtype),
        kernel=backward.finish_weight_gradient_kernel,
        arguments={
            **{"partial_ptr": "*fp32", "dy_sum_ptr": "*fp32", "dweight_ptr": triton_type(dtype), "splits": "i32"},
            **{**WEIGHT_STRIDES, **FOLD},
        },
        constants={**geometry, "BLOCK": backward.FINISH_BLOCK},
        num_warps=4,
        vector_loads=True,
    )


def _pack(patch: int, width: int, dtype: torch.dtype) -> Compilation:
    depth = CHANNELS * patch * patch
    pitch = triton.cdiv(depth, 64) * 64
    return Compilation(
        label=_label("forward, pack weight", patch, width, True, dtype, dtype),
        kernel=pack_weight_kernel,
        arguments={
            **{"weight_ptr": triton_type(dtype), "bias_ptr": triton_type(dtype), "packed_ptr": triton_type(dtype)},
            **{"folded_ptr": "*fp32", **WEIGHT_STRIDES, **FOLD},
        },
        constants={
            **{"C": CHANNELS, "PH": patch, "PW": patch, "PITCH": pitch, "CHANNELS_LAST": True, "GAIN": 256},
            "BLOCK_K": min(1024, triton.next_power_of_2(pitch)),
        },
        num_warps=4,
    )
