"""Launchers of csrc/q_sample.cu for one Markov step: those of `mmfast.kernels.q_step`."""

from __future__ import annotations

from torch import Tensor

from .q_sample import q_sample_backward, q_sample_forward


def q_step_forward(
    x: Tensor, t: Tensor, table: Tensor, noise: Tensor | None, seeds: Tensor | None, seed: int
) -> Tensor:
    """x_t in x's dtype and layout. t is (B,) of any stride; noise is given, or made of seeds (B,), or of seed."""
    return q_sample_forward(x, t, table, noise, seeds, seed, step=True)[0]


def q_step_backward(
    dy: Tensor, t: Tensor, table: Tensor, *, need_dx: bool, need_dnoise: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and of given noise in dy's dtype and layout, None where not needed."""
    return q_sample_backward(dy, None, t, table, need_dx0=need_dx, need_dnoise=need_dnoise, step=True)
