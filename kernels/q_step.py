"""One step of the forward process: `q_sample`'s kernels with another pair of coefficients and stream of noise.

    y  = sqrt(1 - beta_t) x + sqrt(beta_t) noise          beta_t = (alpha_bar_{t-1} - alpha_bar_t) / alpha_bar_{t-1}
    dx = sqrt(1 - beta_t) dy                              dnoise = sqrt(beta_t) dy

The traffic and the shape of a program are those of `q_sample`. beta comes from the schedule's pairs without
cancellation; the noise is that of stream 1 + 4 t, so that a seed's steps and its jump have nothing in common.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from . import q_sample
from ._common import AUDIT_DTYPES, Compilation


def q_step_forward(
    x: Tensor, t: Tensor, table: Tensor, noise: Tensor | None, seeds: Tensor | None, seed: int
) -> Tensor:
    """x_t in x's dtype and layout. t is (B,) of any stride; noise is given, or made of seeds (B,), or of seed."""
    return q_sample.q_sample_forward(x, t, table, noise, seeds, seed, step=True)[0]


def q_step_backward(
    dy: Tensor, t: Tensor, table: Tensor, *, need_dx: bool, need_dnoise: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and of given noise in dy's dtype and layout, None where not needed."""
    return q_sample.q_sample_backward(dy, None, t, table, need_dx0=need_dx, need_dnoise=need_dnoise, step=True)


FORWARD: tuple[tuple[str, tuple[int, ...], dict[str, Any]], ...] = (
    ("", q_sample.IMAGES, {}),
    (", one seed", q_sample.IMAGES, {"seeds": False}),
    (", noise given", q_sample.IMAGES, {"noise": True}),
    (", any size", q_sample.ODD, {}),
    (", channels_last", (64, 320, 64, 64), {"last": True}),
    (", channels_last, any size", q_sample.ODD, {"last": True}),
)


def audit_configurations() -> Iterator[Compilation]:
    """What `mmfast audit` compiles: each origin of the noise, and both layouts."""
    for dtype in AUDIT_DTYPES:
        for label, shape, options in FORWARD:
            yield q_sample.audit_forward(f"forward{label}", shape, dtype, step=True, **options)
        yield q_sample.audit_backward("backward", dtype, step=True)
