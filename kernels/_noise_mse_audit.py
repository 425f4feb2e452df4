"""What `mmfast audit` compiles of `noise_mse`: each target, origin of the noise, layout and option."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ._common import AUDIT_DTYPES, Compilation, triton_type
from ._samples import SamplePlan, meta_samples, seed_arguments
from .noise_mse import (
    FINISH,
    TARGETS,
    noise_mse_backward_kernel,
    noise_mse_finish_kernel,
    noise_mse_forward_kernel,
)

LATENTS, IMAGES, ODD, FEATURES = (64, 4, 64, 64), (64, 3, 256, 256), (64, 3, 15, 15), (64, 320, 64, 64)


def audit_configurations() -> Iterator[Compilation]:
    """Both passes over samples in each layout, and the sum of the first's partial sums."""
    for dtype in AUDIT_DTYPES:
        for make in (_forward, _backward):
            yield make("", LATENTS, dtype)
            yield make(", one seed, v, all options", IMAGES, dtype, target="v_prediction", seeds=False, options=True)
            yield make(", sample", LATENTS, dtype, target="sample", options=True)
            yield make(", channels_last sample, any size", ODD, dtype, True, target="sample")
            yield make(", any size", ODD, dtype)
            yield make(", channels_last, v, all options", FEATURES, dtype, True, target="v_prediction", options=True)
            yield make(", channels_last latents", LATENTS, dtype, True)
            yield make(", channels_last, any size", ODD, dtype, True)
    for target in TARGETS:
        yield _finish(target, each=False, options=True)
    yield _finish("epsilon", each=False, options=False)
    yield _finish("epsilon", each=True, options=False)


def _forward(
    label: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    last: bool = False,
    *,
    target: str = "epsilon",
    seeds: bool = True,
    options: bool = False,
) -> Compilation:
    plan = SamplePlan.of(meta_samples(shape, last), made=target != "sample")
    velocity = target == "v_prediction"
    arguments: dict[str, str | None] = {
        **_tensors(dtype, target, seeds, options, table=velocity),
        "partial_ptr": "*fp32",
        **dict.fromkeys(("stride_t", "last", "size", "blocks", "tiles", "per_program", "n_channels"), "i32"),
        "offset_noise": "fp32",
    }
    return _compilation(f"forward{label}", shape, dtype, plan, noise_mse_forward_kernel, arguments, target)


def _backward(
    label: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    last: bool = False,
    *,
    target: str = "epsilon",
    seeds: bool = True,
    options: bool = False,
) -> Compilation:
    plan = SamplePlan.of(meta_samples(shape, last), made=target != "sample")
    table = options or target == "v_prediction"
    arguments: dict[str, str | None] = {
        **_tensors(dtype, target, seeds, options, table=table),
        **{"dloss_ptr": "*fp32", "weight_ptr": "*fp32" if options else None, "dprediction_ptr": triton_type(dtype)},
        **dict.fromkeys(("stride_dloss", "stride_t", "stride_weight", "last", "size", "blocks", "n_channels"), "i32"),
        **{"offset_noise": "fp32", "gamma": "fp32" if options else None, "scale": "fp32"},
    }
    return _compilation(f"backward{label}", shape, dtype, plan, noise_mse_backward_kernel, arguments, target, True)


def _tensors(dtype: torch.dtype, target: str, seeds: bool, options: bool, *, table: bool) -> dict[str, str | None]:
    return {
        "prediction_ptr": triton_type(dtype),
        "x0_ptr": None if target == "epsilon" else triton_type(dtype),
        "t_ptr": "*i64" if table else None,
        "table_ptr": "*fp32" if table else None,
        **seed_arguments(seeds),
        "channel_noise_ptr": "*fp32" if options else None,
    }


def _compilation(
    label: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    plan: SamplePlan,
    kernel: object,
    arguments: dict[str, str | None],
    target: str,
    stores: bool = False,
) -> Compilation:
    return Compilation(
        label=f"{label}[{triton_type(dtype)[1:]}-{'x'.join(map(str, shape))}]",
        kernel=kernel,
        arguments=arguments,
        constants={"TARGET": TARGETS[target], **plan.constants},
        num_warps=plan.num_warps,
        divisible=("size",) if plan.whole_vectors else (),
        vector_loads=plan.whole_vectors,
        vector_stores=plan.whole_vectors and stores,
        normals=None if target == "sample" else plan.normals,
    )


def _finish(target: str, *, each: bool, options: bool) -> Compilation:
    text = "none" if each else "mean"
    more = ", all options" if options else ""
    return Compilation(
        label=f"finish, {target}{more}[fp32-{text}]",
        kernel=noise_mse_finish_kernel,
        arguments={
            "partial_ptr": "*fp32",
            **dict.fromkeys(("t_ptr",), "*i64" if options else None),
            **dict.fromkeys(("table_ptr", "weight_ptr", "parts_ptr"), "*fp32" if options else None),
            "loss_ptr": "*fp32",
            **dict.fromkeys(("stride_t", "stride_weight", "last", "batch", "blocks"), "i32"),
            **{"gamma": "fp32", "scale": "fp32"},
        },
        constants={"EACH": each, "TARGET": TARGETS[target], **FINISH},
        num_warps=8,
    )
