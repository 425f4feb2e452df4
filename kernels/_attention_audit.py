"""What `mmfast audit` compiles of attention: the configurations that the rules choose at the shapes people have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ._attention_backward import key_gradient_kernel, query_gradient_kernel, short_backward_kernel
from ._attention_decode import MAX_ROWS, combine_kernel, split_forward_kernel
from ._attention_forward import forward_kernel, short_forward_kernel
from ._attention_tiles import TILE, Form, head_pieces, padded
from ._common import Compilation, triton_type
from .attention import Shape, backward_plan, decode_block, forward_plan

ARCHES, HOPPER = (90, 100), (90,)
"""What the rule serves: nothing before sm_90; heads wider than 192 columns, and split keys, on sm_90 alone."""
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# Queries, keys, head_dim. ViT-B/16 and L/14, at 336 pixels, B/32; g/14, H/14, bigG/14; U-Net, Q-Former, text; long.
SHAPES = (
    (197, 197, 64),
    (257, 257, 64),
    (577, 577, 64),
    (50, 50, 64),
    (257, 257, 88),
    (257, 257, 80),
    (257, 257, 104),
    (256, 256, 72),
    (4096, 77, 40),
    (1024, 77, 80),
    (256, 77, 160),
    (32, 257, 64),
    (77, 77, 64),
    (196, 196, 32),
    (49, 49, 16),
    (4096, 4096, 64),
    (4096, 4096, 128),
    (1024, 1024, 256),
)
WASTE_LIMIT = 1.15
LIMITED = ((197, 197, 64), (257, 257, 64), (577, 577, 64))
"""Shapes whose tiles may issue at most `WASTE_LIMIT` times the FLOPs that the answer takes."""


def audit_configurations() -> Iterator[Compilation]:
    """Each shape in bfloat16; masks, other dtypes and few queries at some."""
    for shape in SHAPES:
        yield from shape_configurations(shape, BF16)
    for shape in ((257, 257, 64), (577, 577, 64), (1024, 77, 80)):
        for mask in ("*u8", "*bf16"):
            yield from shape_configurations(shape, BF16, mask=mask)
        yield from shape_configurations(shape, BF16, causal=True)
    for shape in ((197, 197, 64), (577, 577, 64)):
        yield from shape_configurations(shape, FP16)
        yield from shape_configurations(shape, BF16, few_heads=True)
        yield from shape_configurations(shape, FP32)
    yield from shape_configurations((577, 577, 40), FP32)
    for rows in (1, 32, MAX_ROWS):
        for width in (64, 128, 256):
            yield from _decode(rows, width, BF16)
    yield from _decode(32, 64, FP16)
    yield from _decode(32, 64, FP32)


def shape_configurations(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    mask: str | None = None,
    causal: bool = False,
    few_heads: bool = False,
) -> Iterator[Compilation]:
    """Forward and backward. In float32 the rule takes the kernels only where products may be tf32."""
    n_q, n_k, width = shape
    marks = {"*u8": ", mask", "*bf16": ", added mask"}.get(mask or "", "") + (", causal" if causal else "")
    marks += ", few heads" if few_heads else ""
    suffix = f"{marks}[{triton_type(dtype)[1:]}-{n_q}x{n_k}x{width}]"
    form = Form(width, head_pieces(width), causal, mask not in (None, "*u8"), "tf32" if dtype == FP32 else "ieee")
    facts = Shape(n_q, n_k, width, dtype, mask is not None, causal)
    common: dict[str, Any] = {
        "vector_loads": width % 8 == 0,
        "vector_stores": width % 8 == 0,
        "tensor_cores": min(n_q, n_k) >= TILE,
    }
    if not few_heads:
        plan = forward_plan(facts)
        waste = padded(n_q, plan.block_m) * padded(n_k, plan.block_n or 1 << 30) / (n_q * n_k)
        yield _compilation(
            f"forward{suffix}",
            short_forward_kernel if plan.one_pass else forward_kernel,
            {"FORM": form._replace(stages=plan.stages), **plan.constants(n_q, n_k)},
            dtype,
            mask,
            plan.num_warps,
            **_waste(waste, shape, dtype, mask is not None or causal),
            **common,
        )
    plan_q, plan_k = backward_plan(facts, 1 if few_heads else 1 << 20, 264)
    if plan_q.per_head:
        area = 3 * padded(n_q, plan_q.block) * padded(n_k, plan_q.step)
        area += 4 * padded(n_k, plan_q.block) * padded(n_q, plan_q.step)
        yield _compilation(
            f"backward{suffix}",
            short_backward_kernel,
            {"FORM": form._replace(stages=plan_q.stages), **plan_q.head_constants(n_q, n_k)},
            dtype,
            mask,
            plan_q.num_warps,
            **_waste(area / (7 * n_q * n_k), shape, dtype, mask is not None or causal),
            **common,
        )
        return
    for name, kernel, walk, rows, others in (
        ("dq", query_gradient_kernel, plan_q, n_q, n_k),
        ("dk, dv", key_gradient_kernel, plan_k, n_k, n_q),
    ):
        area = walk.covered(rows, walk.block) * walk.covered(others, walk.step)
        for wanted in ("",) if name == "dq" else ("dk", "dv") if walk.apart else ("both",):
            constants = {
                "FORM": form._replace(stages=walk.stages, ragged=walk.ragged),
                **({"WANTED": wanted} if wanted else {}),
                **walk.constants(rows, others),
            }
            yield _compilation(
                f"backward, {wanted if wanted in ('dk', 'dv') else name}{suffix}",
                kernel,
                constants,
                dtype,
                mask,
                walk.num_warps,
                **_waste(area / (n_q * n_k), shape, dtype, mask is not None or causal),
                **common,
            )


def _waste(waste: float, shape: tuple[int, int, int], dtype: torch.dtype, masked: bool) -> dict[str, Any]:
    """FLOPs issued per useful FLOP, where the shape is whole, and the limit they are held to."""
    return {"waste": waste, "waste_limit": WASTE_LIMIT if shape in LIMITED and dtype != FP32 and not masked else None}


def _decode(rows: int, width: int, dtype: torch.dtype) -> Iterator[Compilation]:
    form = Form(width, head_pieces(width), stages=2)
    kind = triton_type(dtype)
    block = decode_block(dtype)
    rows_covered = padded(rows, MAX_ROWS)
    suffix = f"[{kind[1:]}-{rows}x{width}]"
    stores = {"vector_loads": True, "vector_stores": True}
    yield _compilation(
        f"forward, split{suffix}",
        split_forward_kernel,
        {"FORM": form, "ROWS": rows_covered, "BLOCK_N": block},
        dtype,
        None,
        4,
        **stores,
    )
    if dtype == BF16:
        yield _compilation(
            f"forward, combine{suffix}", combine_kernel, {"FORM": form, "ROWS": rows_covered}, dtype, None, 8
        )


def _compilation(
    label: str,
    kernel: Any,
    constants: dict[str, Any],
    dtype: torch.dtype,
    mask: str | None,
    num_warps: int,
    **proofs: Any,
) -> Compilation:
    kind = triton_type(dtype)
    types: dict[str, Any] = {
        **{f"{name}_ptr": kind for name in ("q", "k", "v", "out", "do", "dq", "dk", "dv")},
        **{f"{name}_ptr": "*fp32" for name in ("lse", "delta", "part", "stats")},
        **{f"stride_{name}": ("i32",) * 3 for name in ("q", "k", "v", "o", "do", "dq", "dk", "dv")},
        **{"mask_ptr": mask, "cu_q_ptr": None, "cu_k_ptr": None, "stride_mask": ("i32",) * 4, "stride_lse": "i32"},
        **dict.fromkeys(("tiles", "heads", "group", "n_q", "n_k", "keys_a_split"), "i32"),
        **{"scale": "fp32", "grad_scale": "fp32"},
    }
    return Compilation(
        label=label,
        kernel=kernel,
        arguments={name: types[name] for name in kernel.arg_names if name not in constants},
        constants=constants,
        num_warps=num_warps,
        arches=HOPPER if constants["FORM"].head_dim > 192 or "split" in label or "combine" in label else ARCHES,
        **proofs,
    )
