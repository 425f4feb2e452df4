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


def _step_inputs(x: torch.Tensor, copies: int = 1, noise: torch.Tensor | None = None) -> tuple[Any, ...]:
    """Model output, t and t_prev of unlike dtypes and strides, x, table, noise, seeds and seed."""
    t, t_prev = torch.ones(len(x), dtype=torch.int32), torch.zeros(1, dtype=torch.int64).expand(len(x))
    seeds = None if noise is not None else torch.arange(len(x))
    return torch.cat((x,) * copies).float(), t, t_prev, x, torch.ones(11, 2), noise, seeds, 0


def ddpm_step() -> None:
    from mmfast.kernels.ddpm_step import ddpm_step_forward

    x = torch.empty(2, 4, 8, 8, dtype=HALF)
    ddpm_step_forward(*_step_inputs(x), "epsilon", None, 1.0, True, True, False, "fixed_small")
    x = x.contiguous(memory_format=torch.channels_last)
    inputs = list(_step_inputs(x, 2))
    inputs[0] = torch.cat((inputs[0], inputs[0]), 1)
    ddpm_step_forward(*inputs, "v_prediction", 7.5, 0.0, True, False, True, "learned_range")


def ddim_step() -> None:
    from mmfast.kernels.ddim_step import ddim_step_forward

    x = torch.empty(1, 3, 5, 5, dtype=HALF)  # a batch of one: sizes of 1 become constants
    ddim_step_forward(*_step_inputs(x, noise=x), "sample", None, 1.0, True, True, False, 0.5, True)
    ddim_step_forward(*_step_inputs(x, 2), "epsilon", 7.5, 0.0, False, False, True, 0.0, False)


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


def noise_mse() -> None:
    from mmfast.kernels.noise_mse import noise_mse_backward, noise_mse_forward, noise_mse_forward_kernel

    t, table, weight, seeds = torch.zeros(3).long(), torch.zeros(11, 2), torch.ones(3), torch.arange(3)
    x = torch.empty(3, 2, 8, 8, dtype=HALF)
    last = torch.empty(3, 8, 5, 7, dtype=HALF).to(memory_format=torch.channels_last)
    for args in (
        (x, None, None, None, None, seeds, 0, "epsilon", None, 0.0, "mean"),
        (last, last, t[:1].expand(3), table, weight, None, -(1 << 40), "v_prediction", 5.0, 0.1, "sum"),
        (x, x, t, table, weight[:1].expand(3), seeds, 0, "sample", 5.0, 0.0, "none"),
        (x[:1, :1, 0, 0], None, None, None, weight[:1], seeds[:1], 1, "epsilon", None, 0.0, "none"),
    ):
        loss, _ = noise_mse_forward(*args, count=2, save_parts=args[4] is not None)
        noise_mse_backward(loss, *args, count=2)
    compiled = len(noise_mse_forward_kernel.device_caches[0][0])
    for seed in (1, 16, 1 << 40, -1):  # nor does another seed or number of samples compile anew
        noise_mse_forward(x[: 1 + seed % 2], *(None,) * 5, seed, "epsilon", None, 0.0, "mean", count=2)
    assert len(noise_mse_forward_kernel.device_caches[0][0]) == compiled + 1  # seeds are a tensor above


def noise_like() -> None:
    from mmfast.kernels.noise_like import noise_like_forward, noise_like_forward_kernel

    x = torch.empty(3, 4, 8, 8, dtype=HALF)
    for samples in (x, x[:, :, :5, :3].contiguous(), x.to(memory_format=torch.channels_last), x[:1, :1, 0, 0]):
        noise_like_forward(samples, torch.arange(len(samples)), 0, 0.1)
        for seed in (1, 16, 1 << 40, -1):
            noise_like_forward(samples, None, seed, 0.0)
    compiled = len(noise_like_forward_kernel.device_caches[0][0])
    noise_like_forward(x[:2], None, 12345, 0.0)  # neither a seed nor a batch compiles anew
    assert len(noise_like_forward_kernel.device_caches[0][0]) == compiled


def q_sample() -> None:
    from mmfast.kernels.q_sample import q_sample_backward, q_sample_forward, q_sample_forward_kernel

    t, table, x = torch.zeros(3).long(), torch.zeros(11, 2), torch.empty(3, 2, 8, 8, dtype=HALF)
    for noise, seeds, target in ((x, None, None), (None, torch.arange(3), "epsilon"), (None, None, "v_prediction")):
        q_sample_forward(x, t, table, noise, seeds, 1, target=target, offset_noise=0.1 * (seeds is not None))
    compiled = len(q_sample_forward_kernel.device_caches[0][0])
    for size in (1, 2, 3):  # nor do timesteps that are all the same, or the length of the table
        table = torch.zeros(size + 1, 2)
        q_sample_forward(x[:size], t[:1].expand(size), table, None, None, 1 << 33, target="v_prediction")
    assert len(q_sample_forward_kernel.device_caches[0][0]) == compiled
    q_sample_backward(x, x, t[:1].expand(3), table, need_dnoise=True)


def q_step() -> None:
    from mmfast.kernels.q_step import q_step_backward, q_step_forward

    t, table, x = torch.zeros(3).long(), torch.zeros(11, 2), torch.empty(3, 2, 8, 8, dtype=HALF)
    for noise, seeds, seed in ((x, None, 0), (None, torch.arange(3), 0), (None, None, 1), (None, None, -(1 << 40))):
        q_step_forward(x, t, table, noise, seeds, seed)
    q_step_backward(x, t[:1].expand(3), table, need_dx=True, need_dnoise=True)


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
    "ddim_step": (ddim_step, {"ddim_step_forward_kernel"}),
    "ddpm_step": (ddpm_step, {"ddpm_step_forward_kernel"}),
    "layer_norm": (layer_norm, {"layer_norm_forward_kernel", "layer_norm_backward_kernel", "column_sums_kernel"}),
    "noise_mse": (
        noise_mse,
        {
            *("noise_mse_forward_kernel", "noise_mse_finish_kernel", "noise_mse_backward_kernel"),
            "noise_like_forward_kernel",  # offset noise
        },
    ),
    "noise_like": (noise_like, {"noise_like_forward_kernel"}),
    "q_sample": (q_sample, {"q_sample_forward_kernel", "q_sample_backward_kernel", "noise_like_forward_kernel"}),
    "q_step": (q_step, {"q_sample_forward_kernel", "q_sample_backward_kernel"}),
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


@pytest.mark.usefixtures("launched")
def test_another_step_of_a_sampler_compiles_nothing() -> None:
    """Guidance, the range of the clip, eta, the seed, the batch, a larger sample: none is part of a kernel."""
    from mmfast.kernels.ddim_step import ddim_step_forward, ddim_step_forward_kernel

    for batch, guidance, clip, eta in ((2, 7.5, 1.0, 0.5), (3, 1.0, 2.0, 1.0), (1, 0.0, 0.7, 0.1), (16, 3.0, 4.0, 0.3)):
        x = torch.empty(batch, 4, 16, 16 * batch, dtype=HALF)
        inputs = list(_step_inputs(x, 2))
        inputs[6], inputs[7] = None, batch << 40
        ddim_step_forward(*inputs, "epsilon", guidance, clip, True, False, True, eta, False)
        compiled = len(ddim_step_forward_kernel.device_caches[0][0])
        if batch == 2:
            first = compiled
    assert compiled == first
