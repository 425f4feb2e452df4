"""What the diffusion ops share: checks of schedules, timesteps, seeds and noise, and the layout of results."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import backends
from .._layouts import dense as dense
from .._layouts import memory_format as memory_format
from .._layouts import new_like as new_like
from ..noise_schedule import NoiseSchedule
from ..reference import _philox
from ._register import stats_dtype
from ._validate import check_input, check_tensor

LARGEST_SAMPLE = 1 << 30
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_schedule(op: str, schedule: object, x: Tensor) -> None:
    """Raise unless `schedule` is a NoiseSchedule on x's device."""
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"{op}: schedule must be a mmfast.NoiseSchedule, got {type(schedule).__name__}")
    device = schedule.alpha_table.device
    if device != x.device:
        raise ValueError(f"{op}: schedule must be on {x.device} like the samples, got {device}")


def check_timesteps(op: str, name: str, t: object, x: Tensor, schedule: NoiseSchedule, lowest: int = 0) -> Tensor:
    """Return `t`, an int or an integer tensor () or (B,), as (B,) on x's device, without a sync.

    Raises where values on the host are outside `lowest` to num_train_timesteps - 1.
    """
    batch, last = x.shape[0], schedule.num_train_timesteps - 1
    if isinstance(t, torch.SymInt):
        t = int(t)
    if isinstance(t, int) and not isinstance(t, bool):
        if not lowest <= t <= last:
            raise ValueError(f"{op}: {name} must be from {lowest} to {last}, got {t}")
        return schedule._index[t + 1].expand(batch)  # no copy from the host
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} must be an int or an integer tensor, got {type(t).__name__}")
    if t.dtype not in INTEGERS:
        raise TypeError(f"{op}: {name} must be an integer tensor, got {t.dtype}")
    if t.shape not in ((), (batch,)):
        raise ValueError(f"{op}: {name} must have shape ({batch},) or (), got {tuple(t.shape)}")
    if t.device.type == "cpu" and t.numel() and not traced():
        if t.numel() <= 256:  # a list is a tenth of the time
            values = t.tolist() if t.dim() else [t.item()]
            low, high = min(values), max(values)
        else:
            low, high = (int(value) for value in torch.aminmax(t))
        if low < lowest or high > last:
            raise ValueError(f"{op}: {name} must be from {lowest} to {last}, got values from {low} to {high}")
    if t.device != x.device:
        if t.device.type != "cpu":
            raise ValueError(f"{op}: {name} must be on {x.device} like the samples, or on the CPU, got {t.device}")
        t = t.to(x.device, non_blocking=True)
    return t.expand(batch) if t.dim() == 0 else t


def traced() -> bool:
    """Whether tensors may have no values that Python can ask for."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def facts(x: Tensor, refusal: str | None = None) -> backends.Facts:
    """What the choice of a backend looks at. Kernels count a sample's elements in 32 bits."""
    if x.numel() >= LARGEST_SAMPLE * max(1, x.shape[0]):
        refusal = f"a sample of {x.numel() // x.shape[0]} elements: kernels count them in 32 bits"
    return backends.Facts(x.device, x.dtype, x.shape[-1], refusal=refusal)


def check_seed(op: str, seed: object, x: Tensor) -> tuple[Tensor | None, int]:
    """Return a seed as int64 (B,) on x's device, or None, and the int that serves if it is None."""
    if isinstance(seed, (int, torch.SymInt)) and not isinstance(seed, bool):
        if not isinstance(seed, torch.SymInt):
            if not -(1 << 63) <= seed < 1 << 64:
                raise ValueError(f"{op}: seed must fit in 64 bits, got {seed}")
            seed = _philox.signed(seed)
        return None, seed  # type: ignore[return-value]  # a SymInt while it is traced
    if not isinstance(seed, Tensor):
        raise TypeError(f"{op}: seed must be an int or an int64 tensor of one seed a sample, got {type(seed).__name__}")
    if seed.dtype != torch.int64:
        raise TypeError(f"{op}: seed must be an int or an int64 tensor, got {seed.dtype}")
    if seed.shape != (x.shape[0],):
        raise ValueError(f"{op}: seed must have shape ({x.shape[0]},), one seed a sample, got {tuple(seed.shape)}")
    if seed.device != x.device:
        if seed.device.type != "cpu":
            raise ValueError(f"{op}: seed must be on {x.device} like the samples, or on the CPU, got {seed.device}")
        seed = seed.to(x.device, non_blocking=True)
    return seed, 0


def check_noise(op: str, noise: object, x: Tensor, name: str = "noise") -> None:
    """Raise unless `noise` is a floating tensor of x's shape on its device."""
    check_tensor(op, name, noise)
    if noise.shape != x.shape:  # type: ignore[attr-defined]
        raise ValueError(f"{op}: {name} must have shape {tuple(x.shape)}, got {tuple(noise.shape)}")  # type: ignore[attr-defined]
    if noise.device != x.device:  # type: ignore[attr-defined]
        raise ValueError(f"{op}: {name} must be on {x.device} like the samples, got {noise.device}")  # type: ignore[attr-defined]


def check_offset_noise(op: str, offset_noise: object, x: Tensor) -> None:
    """Raise unless `offset_noise` is a finite number, and 0 where x has no channels."""
    if not isinstance(offset_noise, (int, float)) or isinstance(offset_noise, bool):
        raise TypeError(f"{op}: offset_noise must be a number, got {type(offset_noise).__name__}")
    if not math.isfinite(offset_noise):
        raise ValueError(f"{op}: offset_noise must be finite, got {offset_noise}")
    if offset_noise and x.dim() < 2:
        raise ValueError(f"{op}: offset_noise needs samples with channels (B, C, ...), got {tuple(x.shape)}")


def check_samples(op: str, name: str, x: object) -> None:
    """Raise unless `x` is a floating tensor (B, ...)."""
    check_input(op, name, x)


def fresh_seeds(x: Tensor) -> Tensor:
    """New int64 seeds (B,) from PyTorch's generator of x's device: new ones too in each replay of a CUDA graph."""
    # 63 bits: a compiler takes high - low in int64.
    return torch.randint((1 << 63) - 1, (x.shape[0],), device=x.device)


def per_sample(values: Tensor, x: Tensor) -> Tensor:
    """values (B,) shaped to multiply x (B, ...)."""
    return values.view(-1, *(1,) * (x.dim() - 1))


def gather_pairs(table: Tensor, t: Tensor, lowest: int = 0) -> Tensor:
    """Rows (B, 2) of a schedule's `alpha_table` at timesteps t (B,), NaN where t is out of range; no sync."""
    index = t.long() + 1
    inside = (index > lowest) & (index < table.shape[0])
    return torch.where(inside[:, None], table[torch.where(inside, index, 0)], float("nan"))


def signal_and_sigma(table: Tensor, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(alpha_bar) and sqrt(1 - alpha_bar) at t (B,), shaped to multiply x, in float32 (float64 for a float64 x)."""
    high, low = gather_pairs(table, t).to(stats_dtype(x)).unbind(1)
    # The pair keeps the digits that 1 - alpha_bar would lose.
    return per_sample((high + low).sqrt(), x), per_sample((1.0 - high - low).clamp_min(0).sqrt(), x)


def sample_seeds(seed: int, n: int, *, start: int = 0, device: torch.device | str | None = None) -> Tensor:
    """Seeds of samples `start` to `start + n - 1`, derived from one: the same sample gets the same at any batch size.

    Args:
        seed: any int of 64 bits.
        n: how many.
        start: index of the first sample.
        device: where the result lies; by default on the CPU.

    Returns:
        int64 (n,), for the `seed` of `q_sample`, `ddim_step` and the others.

    Raises:
        TypeError: an argument is not an int.
        ValueError: it is out of range.
    """
    for name, value in (("seed", seed), ("n", n), ("start", start)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"sample_seeds: {name} must be an int, got {type(value).__name__}")
    if n < 0 or start < 0:
        raise ValueError(f"sample_seeds: n and start must not be negative, got {n} and {start}")
    if not -(1 << 63) <= seed < 1 << 64:
        raise ValueError(f"sample_seeds: seed must fit in 64 bits, got {seed}")
    index = torch.arange(start, start + n, device=device)
    low, high, _, _ = _philox.philox(
        seed & _philox.MASK, (seed >> 32) & _philox.MASK, index & _philox.MASK, index >> 32, 0, _philox.SEEDS
    )
    return (high << 32) | low
