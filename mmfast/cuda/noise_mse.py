"""Launchers of csrc/noise_mse.cu: those of `mmfast.kernels.noise_mse`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mmfast._layouts import memory_format

from ._common import current, dtype_code, extension, pointer
from ._samples import MASK, beside, channel_noise, dense, samples, schedule, timesteps

TARGETS = {"epsilon": 0, "v_prediction": 1, "sample": 2}


def noise_mse_forward(*inputs: Any, count: int, save_parts: bool = False) -> tuple[Tensor, Tensor | None]:
    """The loss in float32, () or (B,) for reduction "none", and parts (B,), its gradient by the weight.

    The arguments are those of `torch.ops.mmfast.noise_mse`: x0 is None for target "epsilon"; t (B,) and `table` are
    needed for "v_prediction" and `snr_gamma`; t and weight may have any stride. `count` is what a sum of squares is
    divided by.
    """
    prediction, reduction = inputs[0], inputs[-1]
    device, batch, each = prediction.device, len(prediction), reduction == "none"
    shape = (batch,) if each else ()
    if prediction.numel() == 0:
        loss = torch.full(shape, 0.0 if count else math.nan, dtype=torch.float32, device=device)
        return loss, loss.new_full((batch,), 0.0 if count else math.nan) if save_parts else None
    loss = torch.empty(shape, dtype=torch.float32, device=device)
    parts = torch.empty(batch, dtype=torch.float32, device=device) if save_parts else None
    call = _Arguments(*inputs)
    blocks = extension().noise_mse_blocks(call.shape[1])
    partial = torch.empty(batch * blocks, dtype=torch.float32, device=device)
    extension().noise_mse_forward(
        *(*call.first, partial.data_ptr(), loss.data_ptr(), pointer(parts), *call.wanted, 1.0 / count, each),
        *(*call.shape, *call.launch),
    )
    return loss, parts


def noise_mse_backward(dloss: Tensor, *inputs: Any, count: int) -> Tensor:
    """The prediction's gradient in its dtype and layout; dloss is () or (B,) float32 of any stride."""
    prediction = inputs[0]
    layout = memory_format(prediction)
    dprediction = torch.empty(prediction.shape, dtype=prediction.dtype, device=prediction.device, memory_format=layout)
    if dprediction.numel() == 0:
        return dprediction
    dloss = dloss.expand(len(dprediction))
    call = _Arguments(*inputs)
    extension().noise_mse_backward(
        *(dloss.data_ptr(), dloss.stride(0), *call.first, dprediction.data_ptr(), *call.wanted, 2.0 / count),
        *(*call.shape, *call.launch),
    )
    return dprediction


class _Arguments:
    """The op's arguments as both passes hand them over; holds the tensors that the pointers are of."""

    def __init__(
        self,
        prediction: Tensor,
        x0: Tensor | None,
        t: Tensor | None,
        table: Tensor | None,
        weight: Tensor | None,
        seeds: Tensor | None,
        seed: int,
        target: str,
        snr_gamma: float | None,
        offset_noise: float,
        reduction: str,
    ) -> None:
        prediction, layout = dense(prediction)
        x0 = None if x0 is None else beside(x0, prediction.dtype, layout)
        seeds = None if seeds is None else seeds.contiguous()
        channels = None if target == "sample" else channel_noise(prediction, seeds, seed, offset_noise)
        code = dtype_code(prediction)
        self.held = prediction, x0, seeds, channels
        self.first = (
            *(prediction.data_ptr(), pointer(x0), code if x0 is None else dtype_code(x0)),
            *(*timesteps(t), *schedule(table), pointer(weight), 0 if weight is None else weight.stride(0)),
            *(pointer(seeds), seed & MASK, pointer(channels), offset_noise),
        )
        self.wanted = TARGETS[target], snr_gamma or 0.0
        self.shape = samples(prediction, layout)
        self.launch = code, *current(prediction)
