"""`q_step`: one step of the forward process, the Markov chain that `q_sample` jumps along."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..noise_schedule import NoiseSchedule
from ..reference._philox import Stream
from ._launchers import launchers
from ._noise import (
    check_noise,
    check_schedule,
    check_seed,
    check_timesteps,
    dense,
    facts,
    fresh_seeds,
    gather_pairs,
    memory_format,
    new_like,
    per_sample,
    traced,
)
from ._philox_torch import normals
from ._register import register, stats_dtype
from ._validate import check_input


def q_step(
    x: Tensor,
    t: int | Tensor,
    schedule: NoiseSchedule,
    *,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Draw x_t given x_{t-1}: `sqrt(1 - beta_t) x + sqrt(beta_t) noise`, the forward step of a diffusion model.

    beta_t comes from the schedule's alpha-bars before and at t without cancellation, in float32 whatever x's dtype, and
    the result is rounded once. Each timestep of a seed has noise of its own, apart from that of `q_sample` and of the
    reverse steps, so that one seed serves a whole chain.

    Args:
        x: (B, ...), float32, float16, bfloat16 or float64; contiguous and channels_last are read in place.
        t: the timesteps stepped to, from 0 (x is then x_0 itself): an int, or an integer tensor () or (B,). Out of
            range raises where t is on the CPU; on a GPU, where a look at it would have to wait, these samples become
            NaN.
        schedule: a `NoiseSchedule` on x's device.
        noise: (B, ...) to add instead of noise from a seed.
        seed: an int, or int64 (B,) of one seed a sample, as in `noise_like`; None draws new noise from PyTorch's
            generator.

    Returns:
        x_t in x's shape, dtype and layout, with gradients to x and to a given noise.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape, a device, a timestep or a seed does not fit, or both noise and seed are given.
        BackendError: a forced backend cannot serve.

    Source: Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", arXiv:2006.11239, equation 2.
    """
    check_input("q_step", "x", x)
    check_schedule("q_step", schedule, x)
    t = check_timesteps("q_step", "t", t, x, schedule)
    seeds, number = None, 0
    if noise is not None:
        check_noise("q_step", noise, x)
        if seed is not None:
            raise ValueError("q_step: noise and seed are both given: it takes one of them")
    elif seed is not None:
        seeds, number = check_seed("q_step", seed, x)
    table = schedule.alpha_table
    drawn = noise is None and seed is None
    if backends.torch_serves(x):
        if drawn:
            noise = torch.randn_like(x, dtype=stats_dtype(x), memory_format=memory_format(x))
        if not traced() and noise is not None:
            return q_step_torch(x, t, table, noise, None, 0, roots=_roots_at(schedule, t, x), scratch=drawn)
        by_torch = True
    else:
        if drawn:
            seeds = fresh_seeds(x)
        by_torch = backends.choose("q_step", facts(x)) == "torch"
    # To a compiler the noise of a seed is hundreds of small ops: it sees the one op instead.
    if by_torch and (noise is not None or not torch.compiler.is_compiling()):
        return q_step_torch(x, t, table, noise, seeds, number)
    return _q_step(x, t, table, noise, seeds, number)


def q_step_torch(
    x: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    seed: int,
    *,
    roots: tuple[Tensor, Tensor] | None = None,
    scratch: bool = False,
) -> Tensor:
    """The torch backend, differentiable. `roots`: those at t, where at hand; `scratch`: noise may be written over."""
    if noise is None:
        noise = normals(x, seeds, seed, Stream.Q_STEP + 4 * t.long())
    signal, sigma = roots or step_roots(table, t, x)
    x_wide = x.to(signal.dtype)
    if scratch:  # on a CPU, new memory costs as much as the arithmetic
        y = noise.mul_(sigma).addcmul_(x_wide, signal)
    else:
        y = torch.addcmul(noise.to(sigma.dtype) * sigma, x_wide, signal)
    return dense(y.to(x.dtype), x)


def step_roots(table: Tensor, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(1 - beta) and sqrt(beta) at t (B,), shaped to multiply x, in float32 (float64 for a float64 x)."""
    dtype, t = stats_dtype(x), t.long()
    high, low = gather_pairs(table, t).to(dtype).unbind(1)
    before_high, before_low = gather_pairs(table, t - 1).to(dtype).unbind(1)
    # Before timestep 0 nothing is noised: row 0 of the table is what samplers end on, which may be another.
    first = t == 0
    before_high, before_low = torch.where(first, 1.0, before_high), torch.where(first, 0.0, before_low)
    before = before_high + before_low
    beta = ((before_high - high) + (before_low - low)) / before
    return per_sample(((high + low) / before).sqrt(), x), per_sample(beta.sqrt(), x)


def _roots_at(schedule: NoiseSchedule, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """`step_roots` at timesteps in range, from a table: on small samples its dozen ops would take the longest."""
    if x.dtype == torch.float64:
        return None
    pairs = schedule._step_signal_and_sigma().index_select(0, t.long())
    signal, sigma = pairs.view(-1, 2, *(1,) * (x.dim() - 1)).unbind(1)
    return signal, sigma


def cost(x: Tensor, *, noise: bool = False, backward: bool = False) -> dict[str, int]:
    """Bytes through device memory that the op cannot do without; noise from a seed costs none."""
    # Forward reads x and writes y; backward reads dy and writes dx. A given noise is one more tensor in either.
    return {"bytes": (2 + noise) * x.numel() * x.element_size()}


class QStepFunction(torch.autograd.Function):
    """Autograd of `q_step`: it is linear, so only the timesteps are saved."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        _, t, table, noise, _, _ = args
        ctx.save_for_backward(t, table)
        ctx.noise_dtype = None if noise is None else noise.dtype
        with torch._C._AutoDispatchBelowAutograd():
            return _q_step(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        t, table = ctx.saved_tensors
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[3])
        if torch.is_grad_enabled():  # create_graph=True
            found = _gradients_torch(grads[0], t, table, ctx.noise_dtype)
        else:
            found = _q_step_backward(grads[0], t, table, ctx.noise_dtype, needs)
        dx, dnoise = (g if need else None for g, need in zip(found, needs, strict=True))
        return dx, None, None, dnoise, None, None


def _gradients_torch(dy: Tensor, t: Tensor, table: Tensor, noise_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Gradients of x and of given noise by PyTorch's ops, the second in `noise_dtype`."""
    signal, sigma = step_roots(table, t, dy)
    return (signal * dy).to(dy.dtype), (sigma * dy).to(noise_dtype or dy.dtype)


# What the registered ops run. A gradient that is not wanted is an empty tensor: a schema's results cannot be None.


def _implementation(
    x: Tensor, t: Tensor, table: Tensor, noise: Tensor | None, seeds: Tensor | None, seed: int
) -> Tensor:
    backend = backends.pick("q_step", facts(x))
    if backend == "torch":
        return q_step_torch(x, t, table, noise, seeds, seed)
    return launchers(backend, "q_step").q_step_forward(x, t, table, noise, seeds, seed)


def _backward(
    dy: Tensor, t: Tensor, table: Tensor, noise_dtype: torch.dtype | None, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    backend = backends.pick("q_step", facts(dy))
    if backend == "torch":
        found: tuple[Tensor | None, ...] = _gradients_torch(dy, t, table, noise_dtype)
    else:
        backward = launchers(backend, "q_step").q_step_backward
        found = backward(dy, t, table, need_dx=needs[0], need_dnoise=needs[1])
    dx, dnoise = (
        dense(g.to(dtype), dy) if g is not None and need else dy.new_empty(0)
        for g, need, dtype in zip(found, needs, (dy.dtype, noise_dtype or dy.dtype), strict=True)
    )
    return dx, dnoise


def _backward_fake(
    dy: Tensor, t: Tensor, table: Tensor, noise_dtype: torch.dtype | None, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    dx = new_like(dy) if needs[0] else dy.new_empty(0)
    return dx, new_like(dy, dtype=noise_dtype) if needs[1] else dy.new_empty(0)


_q_step = register(
    "q_step(Tensor x, Tensor t, Tensor table, Tensor? noise, Tensor? seeds, SymInt seed) -> Tensor",
    _implementation,
    fake=lambda x, t, table, noise, seeds, seed: new_like(x),
    autograd=QStepFunction.apply,
)
_q_step_backward = register(
    "q_step_backward(Tensor dy, Tensor t, Tensor table, ScalarType? noise_dtype, bool[2] needs) -> (Tensor, Tensor)",
    _backward,
    fake=_backward_fake,
)
