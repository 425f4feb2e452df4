"""Launchers through Triton's own launch path up to the driver, which is a fake: arguments bind, and kernels compile.

The interpreter takes any Python value as an argument and the audit is told the types; only here are they what a launch
on an H100 would make of them. Nothing runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from mmfast.kernels import attention as attention_kernels

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") == "1", reason="interpreted kernels cannot be compiled"
)

HALF = torch.bfloat16


class Hopper:
    """What Triton asks of a driver before it loads a kernel."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels launched, each compiled for sm_90 and not run."""
    names: list[str] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        names.append(self.fn.__name__)
        assert all(size > 0 for size in (grid(kwargs) if callable(grid) else grid))
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", Hopper(), raising=False)
    monkeypatch.setattr(attention_kernels, "resident_programs", lambda device: 8)
    return names


def _heads(length: int, width: int, heads: int = 2) -> torch.Tensor:
    return torch.empty(1, length, heads, width, dtype=HALF).transpose(1, 2)


def attention() -> None:
    from mmfast.kernels.attention import attention_backward, attention_forward

    for n_q, n_k, mask in (
        (17, 17, torch.ones(1, 1, 1, 17, dtype=torch.bool)),
        (3, 300, None),
        (33, 330, torch.zeros(33, 330)),
    ):
        q, k, v = _heads(n_q, 24), _heads(n_k, 24, 1), _heads(n_k, 24, 1)
        out, lse = attention_forward(q, k, v, mask, is_causal=False, scale=0.2)
        attention_backward(out, q, k, v, out, lse, mask, is_causal=False, scale=0.2)
    q = _heads(33, 48)
    attention_forward(q, q, q, None, is_causal=True, scale=0.2)
    q = _heads(17, 16, 8)
    out, lse = attention_forward(q, q, q, None, is_causal=False, scale=0.2)
    attention_backward(out, q, q, q, out, lse, None, is_causal=False, scale=0.2)
    q = _heads(3, 24)
    attention_forward(q, _heads(2000, 24), _heads(2000, 24), None, is_causal=False, scale=0.2)


def attention_qkv() -> None:
    from mmfast.kernels.attention_qkv import attention_qkv_backward, attention_qkv_forward

    qkv = torch.empty(2, 17, 3 * 2 * 16, dtype=HALF)
    out, lse = attention_qkv_forward(qkv, 2, None, is_causal=False, scale=0.2)
    attention_qkv_backward(out, qkv, 2, out, lse, None, is_causal=False, scale=0.2)


def layer_norm() -> None:
    from mmfast.kernels.layer_norm import layer_norm_backward, layer_norm_forward

    x, weight = torch.empty(5, 64, dtype=HALF), torch.empty(64, dtype=HALF)
    y, mean, rstd = layer_norm_forward(x, weight, weight, 1e-5)
    layer_norm_backward(y, x, weight, mean, rstd, need_dx=True, dweight_dtype=HALF, dbias_dtype=HALF)


def clip_loss() -> None:
    from mmfast.kernels import _contrastive_rows
    from mmfast.kernels.clip_loss import clip_loss_gradients, clip_loss_statistics

    raw, scale = torch.empty(600, 30, dtype=HALF), torch.ones(())
    image, rnorm = _contrastive_rows.unit_rows(raw, HALF)
    for ids in (None, torch.arange(600)):
        for best in (False, True):
            rows, columns = clip_loss_statistics(image, image, scale, 0, ids, ids, best=best)
        weights = (rows[0], columns[0], rows[1], columns[1], *(rows[1], columns[1]) * (ids is not None))
        weights += (None,) * (6 - len(weights))
        for features, own in ((image[:, :24].contiguous(), True), (image, False)):
            sums, _ = clip_loss_gradients(
                features, features, scale, 0, ids, ids, *weights, values=None, needs=(True, True), own=own
            )
    clip_loss_statistics(image[:1], image[:1], scale, 0, None, None, best=True)  # sizes of 1 become constants
    _contrastive_rows.finish_rows(raw, rnorm, sums, scale, pair=rows[0], partner=image)


def siglip_loss() -> None:
    from mmfast.kernels.siglip_loss import siglip_loss_forward

    image, scalar, ids = torch.zeros(600, 48, dtype=HALF), torch.zeros(()), torch.arange(600)
    for labels, positive in ((None, torch.zeros(600)), (ids, None)):
        siglip_loss_forward(
            *(image, image, scalar, scalar, 0, labels, labels, positive),
            needs=(True, False, True, True),
            metrics=True,
        )
    siglip_loss_forward(
        *(image[:9], image[:7], scalar, scalar, -3, None, None, torch.zeros(9)),
        needs=(False, False, False, False),
        metrics=False,
    )


CALLS: dict[str, tuple[Callable[[], None], set[str]]] = {
    "attention": (
        attention,
        {
            *("short_forward_kernel", "forward_kernel", "split_forward_kernel", "combine_kernel"),
            *("short_backward_kernel", "query_gradient_kernel", "key_gradient_kernel"),
        },
    ),
    "attention_qkv": (attention_qkv, {"short_forward_kernel", "short_backward_kernel"}),
    "clip_loss": (
        clip_loss,
        {
            *("clip_loss_statistics_kernel", "clip_loss_combine_kernel", "logit_gradient_kernel"),
            *("feature_gradient_kernel", "unit_rows_kernel", "finish_rows_kernel"),
        },
    ),
    "layer_norm": (layer_norm, {"layer_norm_forward_kernel", "layer_norm_backward_kernel", "column_sums_kernel"}),
    "siglip_loss": (siglip_loss, {"siglip_loss_forward_kernel"}),
}


@pytest.mark.parametrize("op", CALLS)
def test_arguments_bind_and_kernels_compile(op: str, launched: list[str]) -> None:
    call, expected = CALLS[op]
    call()
    assert set(launched) == expected


@pytest.mark.usefixtures("launched")
def test_another_length_or_stride_compiles_nothing() -> None:
    """Lengths with the same tiles share a kernel, whatever the strides."""
    from mmfast.kernels.attention import attention_forward, short_forward_kernel

    for q in (_heads(18, 16), _heads(19, 16), _heads(19, 16, 5), torch.empty(3, 2, 31, 48, dtype=HALF)[..., 16:32]):
        attention_forward(q, q, q, None, is_causal=False, scale=0.2)
        compiled = len(short_forward_kernel.device_caches[0][0])
        if q.shape[2] == 18:
            first = compiled
    assert compiled == first
