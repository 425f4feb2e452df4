"""Checks of arguments. Every message names the op, the argument, what was expected and what came."""

from __future__ import annotations

import math

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_tensor(op: str, name: str, value: object) -> None:
    """Raise TypeError unless `value` is a tensor of a floating dtype."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} must be floating point, got {value.dtype}")


def check_input(op: str, name: str, value: object) -> None:
    """Raise unless `value` is a floating tensor with at least one dimension."""
    check_tensor(op, name, value)
    if value.dim() == 0:  # type: ignore[attr-defined]
        raise ValueError(f"{op}: {name} must have at least 1 dimension, got 0")


def check_vector(
    op: str, name: str, value: object, x: torch.Tensor, length: int, dtype: torch.dtype | None = None
) -> None:
    """Raise unless `value` is None or a (length,) tensor on x's device, in `dtype` (default x's) or float32."""
    if value is None:
        return
    check_tensor(op, name, value)
    vector: torch.Tensor = value  # type: ignore[assignment]
    dtype = dtype or x.dtype
    if vector.shape != (length,):
        raise ValueError(f"{op}: {name} must have shape ({length},), got {tuple(vector.shape)}")
    if vector.dtype != dtype and (vector.dtype != torch.float32 or dtype == torch.float64):
        wanted = dtype if dtype in (torch.float64, torch.float32) else f"{dtype} or torch.float32"
        raise TypeError(f"{op}: {name} must be {wanted}, got {vector.dtype}")
    if vector.device != x.device:
        raise ValueError(f"{op}: {name} must be on {x.device} like x, got {vector.device}")


def check_eps(op: str, eps: object) -> None:
    """Raise unless `eps` is a positive finite number."""
    if not isinstance(eps, (float, int)) or isinstance(eps, bool):
        raise TypeError(f"{op}: eps must be a number, got {type(eps).__name__}")
    if not 0.0 < eps < math.inf:
        raise ValueError(f"{op}: eps must be positive and finite, got {eps}")
