"""Launchers of csrc/q_sample.cu: those of `mmfast.kernels.q_sample`."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import current, dtype_code, extension, pointer
from ._samples import MASK, beside, channel_noise, dense, samples, schedule, timesteps


def q_sample_forward(
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    seed: int,
    *,
    target: str | None = None,
    offset_noise: float = 0.0,
    step: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """x_t and the target (None, "epsilon" or "v_prediction") in x0's dtype and layout; with `step`, one Markov step.

    t is (B,), of any stride; `table` the schedule's alpha_table. Without `noise` it is made of `seeds`, int64 (B,), or
    of `seed` and the samples' indices.
    """
    x0, layout = dense(x0)
    y = torch.empty_like(x0, memory_format=layout)
    extra = None if target is None else torch.empty_like(y)
    if y.numel() == 0:
        return y, extra
    channels = None
    if noise is not None:
        noise = beside(noise, x0.dtype, layout)
    else:
        seeds = None if seeds is None else seeds.contiguous()
        channels = channel_noise(x0, seeds, seed, offset_noise)
    code = dtype_code(x0)
    extension().q_sample_forward(
        *(x0.data_ptr(), *timesteps(t), *schedule(table), pointer(noise), code if noise is None else dtype_code(noise)),
        *(pointer(seeds), seed & MASK, pointer(channels), offset_noise, y.data_ptr(), pointer(extra)),
        *(target == "v_prediction", step, *samples(x0, layout), code, *current(x0)),
    )
    return y, extra


def q_sample_backward(
    dy: Tensor,
    dv: Tensor | None,
    t: Tensor,
    table: Tensor,
    *,
    need_dx0: bool = True,
    need_dnoise: bool = False,
    step: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x0 and of given noise in dy's dtype and layout, None where not needed; dv is the target v's."""
    dy, layout = dense(dy)
    dx = torch.empty_like(dy, memory_format=layout) if need_dx0 else None
    dnoise = torch.empty_like(dy, memory_format=layout) if need_dnoise else None
    if dy.numel() == 0 or (dx is None and dnoise is None):
        return dx, dnoise
    dv = None if dv is None else dv.to(dy.dtype).contiguous(memory_format=layout)
    batch = len(dy)
    extension().q_sample_backward(
        *(
            dy.data_ptr(),
            pointer(dv),
            *timesteps(t),
            *schedule(table),
            pointer(dx),
            pointer(dnoise),
            step,
            batch,
            dy.numel() // batch,
        ),
        *(dtype_code(dy), *current(dy)),
    )
    return dx, dnoise
