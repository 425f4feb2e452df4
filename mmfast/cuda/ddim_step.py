"""Launcher of csrc/ddim_step.cu: that of `mmfast.kernels.ddim_step`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._common import extension
from ._reverse_step import launch_step


def ddim_step_forward(*inputs: Any) -> tuple[Tensor, Tensor | None]:
    """x_prev in x's dtype and layout, twice over if it is to be duplicated, and x_0 or None.

    The arguments are those of `torch.ops.mmfast.ddim_step`: t and t_prev (B,) of any stride, `table` the schedule's
    alpha_table, and last eta and use_clipped.
    """
    return launch_step(extension().ddim_step_forward, *inputs)
