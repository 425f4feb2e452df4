"""What the launchers of the two sampling steps share: tensors, and the arguments that csrc/ddim_step.h begins with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._common import current, dtype_code, pointer
from ._samples import MASK, beside, dense, samples, schedule, timesteps

PREDICTIONS = {"epsilon": 0, "v_prediction": 1, "sample": 2}


def launch_step(
    forward: Callable[..., None],
    model_output: Tensor,
    t: Tensor,
    t_prev: Tensor,
    x: Tensor,
    table: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    seed: int,
    prediction: str,
    guidance: float | None,
    clip: float,
    noisy: bool,
    return_x0: bool,
    duplicate: bool,
    *extra: Any,
) -> tuple[Tensor, Tensor | None]:
    """Run a step's kernel: x_prev (twice over if `duplicate`) and x_0, or None. `extra` are arguments of one step."""
    x, layout = dense(x)
    shape = (2 * x.shape[0], *x.shape[1:]) if duplicate else x.shape
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    x0 = torch.empty_like(x, memory_format=layout) if return_x0 else None
    if x.numel() == 0:
        return y, x0
    model_output = beside(model_output, x.dtype, layout)
    code = dtype_code(x)
    noise = beside(noise, x.dtype, layout) if noisy and noise is not None else None
    seeds = seeds.contiguous() if noisy and seeds is not None else None
    forward(
        *(model_output.data_ptr(), dtype_code(model_output), *timesteps(t), *timesteps(t_prev), x.data_ptr()),
        *(*schedule(table), pointer(noise), code if noise is None else dtype_code(noise), pointer(seeds), seed & MASK),
        *(y.data_ptr(), pointer(x0), PREDICTIONS[prediction], guidance is not None, guidance or 0.0, clip, noisy),
        *(duplicate, *extra, *samples(x, layout), code, *current(x)),
    )
    return y, x0
