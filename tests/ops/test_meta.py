"""Ops on tensors without memory, as models are built on before their weights are loaded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import mmfast
from mmfast import ops


def empty(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


CALLS: dict[str, tuple[Callable[[], Tensor], tuple[int, ...]]] = {
    "layer_norm": (lambda: ops.layer_norm(empty(2, 3, 8), empty(8), empty(8)), (2, 3, 8)),
    "add_layer_norm": (lambda: ops.add_layer_norm(empty(2, 3, 8), empty(2, 3, 8), empty(8), empty(8))[0], (2, 3, 8)),
    "attention": (lambda: ops.attention(empty(2, 4, 5, 16), empty(2, 4, 7, 16), empty(2, 4, 7, 16)), (2, 4, 5, 16)),
    "attention_qkv": (lambda: ops.attention_qkv(empty(2, 5, 3 * 64), 4), (2, 5, 64)),
    "linear_act": (lambda: ops.linear_act(empty(2, 5, 8), empty(12, 8), empty(12), activation="gelu"), (2, 5, 12)),
    "patch_embed": (lambda: ops.patch_embed(empty(2, 3, 8, 8), empty(6, 3, 4, 4), empty(6)), (2, 4, 6)),
    "clip_loss": (lambda: ops.clip_loss(empty(2000, 8), empty(2000, 8), 1.0), ()),
    "siglip_loss": (lambda: ops.siglip_loss(empty(2000, 8), empty(2000, 8), 1.0, 0.0), ()),
    "noise_like": (lambda: ops.noise_like(empty(2, 3, 8, 8), 1), (2, 3, 8, 8)),
    "q_sample": (lambda: ops.q_sample(empty(2, 3, 8, 8), 3, mmfast.NoiseSchedule().to("meta"), seed=1), (2, 3, 8, 8)),
    "noise_mse": (lambda: ops.noise_mse(empty(2, 3, 8, 8), 1, reduction="none"), (2,)),
    "q_step": (lambda: ops.q_step(empty(2, 3, 8, 8), 3, mmfast.NoiseSchedule().to("meta"), seed=1), (2, 3, 8, 8)),
    "ddpm_step": (
        lambda: ops.ddpm_step(empty(2, 3, 8), 9, 8, empty(2, 3, 8), mmfast.NoiseSchedule().to("meta")),
        (2, 3, 8),
    ),
    "ddim_step": (
        lambda: ops.ddim_step(
            *(empty(4, 3, 8), 9, -1, empty(2, 3, 8), mmfast.NoiseSchedule().to("meta")), guidance=2.0, duplicate=True
        ),
        (4, 3, 8),
    ),
}


@pytest.mark.parametrize("op", CALLS)
def test_shape(op: str) -> None:
    call, shape = CALLS[op]
    found = call()
    assert found.device.type == "meta"
    assert found.shape == shape
