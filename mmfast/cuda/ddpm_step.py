"""Launcher of csrc/ddpm_step.cu: that of `mmfast.kernels.ddpm_step`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._common import extension
from ._reverse_step import launch_step

VARIANCES = {"fixed_small": 0, "fixed_large": 1, "learned": 2, "learned_range": 3}


def ddpm_step_forward(*inputs: Any) -> tuple[Tensor, Tensor | None]:
    """x_prev in x's dtype and layout, twice over if it is to be duplicated, and x_0 or None.

    The arguments are those of `torch.ops.mmfast.ddpm_step`: t and t_prev (B,) of any stride, `table` the schedule's
    alpha_table, and last the kind of variance.
    """
    *inputs, variance = inputs  # type: ignore[assignment]
    return launch_step(extension().ddpm_step_forward, *inputs, VARIANCES[variance])
