"""`q_sample`: noised samples, and a model's training target, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from .._layouts import dense, memory_format, new_like
from ..noise_schedule import NoiseSchedule
from ._launchers import launchers
from ._noise import (
    check_noise,
    check_offset_noise,
    check_schedule,
    check_seed,
    check_timesteps,
    facts,
    fresh_seeds,
    signal_and_sigma,
    traced,
)
from ._register import register, stats_dtype
from ._validate import check_input
from .noise_like import noise_torch, seeded_noise

TARGETS = ("epsilon", "v_prediction", "sample")


def q_sample(
    x0: Tensor,
    t: int | Tensor,
    schedule: NoiseSchedule,
    *,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    target: str | None = None,
    offset_noise: float = 0.0,
) -> Any:
    """Draw x_t given x_0: `sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) noise`, and the training target if asked for.

    The schedule stays in float32 whatever x0's dtype, and the result is rounded once. Noise made from a seed is never
    stored; `noise_like` and `noise_mse` make the same again.

    Args:
        x0: (B, ...), float32, float16, bfloat16 or float64; contiguous and channels_last are read in place.
        t: timesteps from 0: an int, or an integer tensor () or (B,). Out of range raises where t is on the CPU; on a
            GPU, where a look at it would have to wait, these samples become NaN.
        schedule: a `NoiseSchedule` on x0's device.
        noise: (B, ...) to add instead of noise from a seed.
        seed: as in `noise_like`; None draws new noise from PyTorch's generator.
        target: None, "epsilon" (the noise), "v_prediction" (`sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x0`) or
            "sample" (x0).
        offset_noise: as in `noise_like`.

    Returns:
        x_t in x0's shape, dtype and layout; with a target (x_t, target).

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape, a device, a timestep or a number does not fit, or both noise and seed are given.
        BackendError: a forced backend cannot serve.

    Source: Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", arXiv:2006.11239, equation 4; v from Salimans
    and Ho, arXiv:2202.00512. The same as diffusers' `randn`, `add_noise` and `get_velocity`.
    """
    check_input("q_sample", "x0", x0)
    check_schedule("q_sample", schedule, x0)
    t = check_timesteps("q_sample", "t", t, x0, schedule)
    check_offset_noise("q_sample", offset_noise, x0)
    if target is not None and target not in TARGETS:
        raise ValueError(f"q_sample: target must be None or one of {', '.join(TARGETS)}, got {target!r}")
    seeds, number = None, 0
    if noise is not None:
        check_noise("q_sample", noise, x0)
        if seed is not None or offset_noise:
            raise ValueError("q_sample: noise is given: it takes the place of seed and offset_noise")
    elif seed is not None:
        seeds, number = check_seed("q_sample", seed, x0)
    # What is there already need not be written again.
    written = None if target == "sample" or (target == "epsilon" and noise is not None) else target
    table = schedule.alpha_table
    plain = backends.torch_serves(x0)
    drawn = plain and noise is None and seed is None and not offset_noise
    if noise is None and seed is None:
        if drawn:
            noise = torch.randn_like(x0, dtype=stats_dtype(x0), memory_format=memory_format(x0))
        else:
            seeds = fresh_seeds(x0)
    if plain or backends.choose("q_sample", facts(x0)) == "torch":
        if noise is None:
            noise = seeded_noise(x0, seeds, number, offset_noise)
        known = schedule if plain and not traced() else table
        scratch = drawn and target is None and not traced()
        noised, extra = q_sample_torch(x0, t, known, noise, target, scratch=scratch)
    else:
        noised, extra = _q_sample(x0, t, table, noise, seeds, number, written, offset_noise)
        if target is not None and written is None:
            extra = x0 if target == "sample" else noise
    return noised if target is None else (noised, extra)


def q_sample_torch(
    x0: Tensor,
    t: Tensor,
    table: Tensor | NoiseSchedule,
    noise: Tensor,
    target: str | None,
    *,
    scratch: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The torch backend, differentiable: x_t and the target.

    A schedule in place of its table says that t is in range; `scratch` that the noise may be written over.
    """
    if isinstance(table, NoiseSchedule) and x0.dtype != torch.float64:
        pairs = table._signal_and_sigma().index_select(0, t if t.dtype == torch.int64 else t.long())
        signal, sigma = pairs.view(-1, 2, *(1,) * (x0.dim() - 1)).unbind(1)
    else:
        table = table.alpha_table if isinstance(table, NoiseSchedule) else table
        signal, sigma = signal_and_sigma(table, t, x0)
    if scratch:  # on a CPU new memory costs as much as the arithmetic
        return noise.mul_(sigma).addcmul_(x0.to(noise.dtype), signal).to(x0.dtype), None
    noised = _combine(signal, x0, sigma, noise, x0)
    if target is None or target == "sample":
        return noised, None if target is None else x0
    if target == "epsilon":
        return noised, noise.to(x0.dtype)
    return noised, _combine(signal, noise, -sigma, x0, x0)


def _combine(a: Tensor, u: Tensor, b: Tensor, v: Tensor, like: Tensor) -> Tensor:
    """`a u + b v` in the coefficients' dtype, rounded once, in the layout of `like`."""
    if traced():
        return dense(torch.addcmul(a * u, v.to(a.dtype), b).to(like.dtype), like)
    if u.dtype == a.dtype:
        return dense((a * u).addcmul_(v.to(a.dtype), b).to(like.dtype), like)
    learned = torch.is_grad_enabled() and (u.requires_grad or v.requires_grad)
    if u.is_cpu and u.numel() > CACHED and not learned:
        return _combine_in_pieces(a, u, b, v, like)
    # Mixed arithmetic is slow on a CPU: cast, then stay in one dtype.
    return dense(u.to(a.dtype).mul_(a).addcmul_(v.to(a.dtype), b).to(like.dtype), like)


CACHED = 1 << 18
"""Elements up to which 16-bit samples are cast to float32 whole on a CPU; beyond, new memory would cost the most."""


def _combine_in_pieces(a: Tensor, u: Tensor, b: Tensor, v: Tensor, like: Tensor) -> Tensor:
    out = new_like(like)
    rows = max(1, CACHED // 4 // u[0].numel())
    first, second = (torch.empty((rows, *u.shape[1:]), dtype=a.dtype) for _ in range(2))
    for start in range(0, len(u), rows):
        part = slice(start, start + rows)
        count = len(u[part])
        wide = first[:count].copy_(u[part]).mul_(a[part])
        out[part] = wide.addcmul_(second[:count].copy_(v[part]), b[part])
    return out


def cost(x0: Tensor, *, target: bool = False, noise: bool = False, backward: bool = False) -> dict[str, int]:
    """Bytes through device memory that the op cannot do without; noise from a seed costs none."""
    tensors = 2 + target + noise  # forward reads x0 (and noise) and writes x_t (and the target)
    if backward:
        tensors = 2 + target  # reads the gradients and writes x0's
    return {"bytes": tensors * x0.numel() * x0.element_size()}


class QSampleFunction(torch.autograd.Function):
    """Autograd of `q_sample`: it is linear, so only the timesteps are saved."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        _, t, table, noise, _, _, target, _ = args
        ctx.save_for_backward(t, table)
        ctx.target = target
        ctx.noise_dtype = None if noise is None else noise.dtype
        ctx.set_materialize_grads(False)
        noised, extra = _q_sample_forward(*args)
        if target is None:
            ctx.mark_non_differentiable(extra)
        return noised, extra

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        t, table = ctx.saved_tensors
        dnoised, dtarget = grads
        needs = ctx.needs_input_grad
        if dnoised is None and dtarget is None:
            return (None,) * 8
        if dnoised is None:
            dnoised = torch.zeros_like(dtarget)  # type: ignore[arg-type]
        if torch.is_grad_enabled():
            dx0, dnoise = _gradients_torch(dnoised, dtarget, t, table, ctx.target)
        else:
            dx0, dnoise = _q_sample_backward(dnoised, dtarget, t, table, ctx.target, [needs[0], needs[3]])
        found = dx0 if needs[0] else None, dnoise.to(ctx.noise_dtype) if needs[3] else None
        return (found[0], None, None, found[1], None, None, None, None)


def _gradients_torch(
    dnoised: Tensor, dtarget: Tensor | None, t: Tensor, table: Tensor, target: str | None
) -> tuple[Tensor, Tensor]:
    """Gradients of x0 and of given noise by PyTorch's ops, in the dtype of what came."""
    signal, sigma = signal_and_sigma(table, t, dnoised)
    dx0, dnoise = signal * dnoised, sigma * dnoised
    if target == "v_prediction" and dtarget is not None:
        dx0, dnoise = dx0 - sigma * dtarget, dnoise + signal * dtarget
    return dx0.to(dnoised.dtype), dnoise.to(dnoised.dtype)


def _implementation(
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    seed: int,
    target: str | None,
    offset_noise: float,
) -> tuple[Tensor, Tensor]:
    backend = backends.pick("q_sample", facts(x0))
    if backend == "torch":
        noise = noise_torch(x0, seeds, seed, offset_noise) if noise is None else noise
        noised, extra = q_sample_torch(x0, t, table, noise, target)
        return dense(noised, x0), x0.new_empty(0) if extra is None else dense(extra, x0)
    forward = launchers(backend, "q_sample").q_sample_forward
    noised, extra = forward(x0, t, table, noise, seeds, seed, target=target, offset_noise=offset_noise)
    return noised, x0.new_empty(0) if extra is None else extra


def _backward(
    dnoised: Tensor, dtarget: Tensor | None, t: Tensor, table: Tensor, target: str | None, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    dtarget = dtarget if target == "v_prediction" else None
    backend = backends.pick("q_sample", facts(dnoised))
    if backend == "torch":
        found: tuple[Tensor | None, Tensor | None] = _gradients_torch(dnoised, dtarget, t, table, target)
    else:
        backward = launchers(backend, "q_sample").q_sample_backward
        found = backward(dnoised, dtarget, t, table, need_dx0=needs[0], need_dnoise=needs[1])
    dx0, dnoise = (
        g.contiguous(memory_format=memory_format(dnoised)) if g is not None and need else dnoised.new_empty(0)
        for g, need in zip(found, needs, strict=True)
    )
    return dx0, dnoise


def _forward_fake(x0: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    target = args[5]
    return new_like(x0), x0.new_empty(0) if target is None else new_like(x0)


def _backward_fake(
    dnoised: Tensor, dtarget: Tensor | None, t: Tensor, table: Tensor, target: str | None, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    dx0, dnoise = (new_like(dnoised) if need else dnoised.new_empty(0) for need in needs)
    return dx0, dnoise


_q_sample = register(
    "q_sample(Tensor x0, Tensor t, Tensor table, Tensor? noise, Tensor? seeds, SymInt seed, str? target, "
    "float offset_noise) -> (Tensor, Tensor)",
    _implementation,
    fake=_forward_fake,
    autograd=QSampleFunction.apply,
)
_q_sample_forward = register(
    "q_sample_forward(Tensor x0, Tensor t, Tensor table, Tensor? noise, Tensor? seeds, SymInt seed, str? target, "
    "float offset_noise) -> (Tensor, Tensor)",
    _implementation,
    fake=_forward_fake,
)
_q_sample_backward = register(
    "q_sample_backward(Tensor dnoised, Tensor? dtarget, Tensor t, Tensor table, str? target, bool[2] needs) "
    "-> (Tensor, Tensor)",
    _backward,
    fake=_backward_fake,
)
