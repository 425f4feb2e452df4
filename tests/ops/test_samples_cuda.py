"""What only the CUDA C++ kernels of the diffusion ops have: their layouts, tiles and orders of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import mmfast
from mmfast import NoiseSchedule, ops, reference
from tests.grading import DTYPES, check_against_reference

pytestmark = pytest.mark.cuda

LAST = torch.channels_last
SHAPES = {
    "vectors": (2, 4, 4, 6),  # contiguous: WIDE; channels_last: LINE in 16 bits, ROWS in 32
    "channels of a vector": (3, 16, 2, 6),  # ROWS
    "three channels": (2, 3, 4, 4),
    "ten channels": (2, 10, 2, 2),
    "odd pixels": (2, 8, 3, 3),
    "any size": (2, 3, 5, 7),
    "one element": (3, 1, 1, 1),
}
OPS: dict[str, Callable[[Tensor, Tensor], Any]] = {}


def define(fn: Callable[[Tensor, Tensor], Any]) -> Callable[[Tensor, Tensor], Any]:
    OPS[fn.__name__] = fn
    return fn


def schedule(x: Tensor) -> NoiseSchedule:
    return NoiseSchedule(clip_sample=False).to(x.device)


def times(x: Tensor) -> Tensor:
    return torch.tensor([40, 900, 3], device=x.device)[: len(x)]


@define
def noise_like(x: Tensor, m: Tensor) -> Any:
    return ops.noise_like(x, 7, offset_noise=0.5)


@define
def q_sample(x: Tensor, m: Tensor) -> Any:
    t, s = times(x), schedule(x)
    made = ops.q_sample(x, t, s, seed=times(x) + 5, target="v_prediction", offset_noise=0.3)
    given = ops.q_sample(x, t, s, noise=m, target="v_prediction")
    return *made, *given, *ops.q_sample(x, t, s, seed=1, target="epsilon")


@define
def q_step(x: Tensor, m: Tensor) -> Any:
    return ops.q_step(x, times(x), schedule(x), seed=3), ops.q_step(x, times(x), schedule(x), noise=m)


@define
def noise_mse(x: Tensor, m: Tensor) -> Any:
    leaf = x.clone().requires_grad_()
    found = []
    for target in ("epsilon", "v_prediction", "sample"):
        loss = ops.noise_mse(leaf, 3, target=target, x0=m, t=times(x), schedule=schedule(x), snr_gamma=5.0)
        found += torch.autograd.grad(loss, leaf)
    return found


@define
def ddim_step(x: Tensor, m: Tensor) -> Any:
    t, s, both = times(x), schedule(x), torch.cat((m, x)).contiguous(memory_format=memory(x))
    first = ops.ddim_step(both, t, t - 3, x, s, guidance=3.0, duplicate=True, return_x0=True)
    return *first, ops.ddim_step(m, t, t - 3, x, s, eta=0.7, seed=5, clip_sample=0.8)


@define
def ddpm_step(x: Tensor, m: Tensor) -> Any:
    t, s = times(x), schedule(x)
    twice = torch.cat((m, x / 8), 1).contiguous(memory_format=memory(x))
    plain = ops.ddpm_step(m, t, t - 3, x, s, seed=5, return_x0=True)
    learned = ops.ddpm_step(twice, t, t - 3, x, s, seed=5, variance_type="learned_range")
    given = ops.ddpm_step(twice, t, t - 3, x, s, noise=m, variance_type="learned_range")
    return *plain, learned, given, ops.ddpm_step(twice, 0, -1, x, s, variance_type="learned")


def memory(x: Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.is_contiguous() else LAST


def inputs(name: str, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    x, m = torch.randn(2, *SHAPES[name], device=device).to(dtype)
    return x, m


def tensors(found: Any) -> Iterator[Tensor]:
    yield from (found,) if isinstance(found, Tensor) else found


def same(first: Any, second: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(second), strict=True))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.usefixtures("poisoned")
def test_layout_and_alignment_change_no_bit(op: str, dtype: torch.dtype, name: str, device: torch.device) -> None:
    """channels_last, and samples that begin an element after a multiple of 16 bytes, have the contiguous ones' bits."""
    x, m = inputs(name, dtype, device)
    last = (v.contiguous(memory_format=LAST) for v in (x, m))
    shifted = (torch.cat((v.new_zeros(1), v.flatten()))[1:].view(v.shape) for v in (x, m))
    with mmfast.backend("cuda"):
        wanted = list(tensors(OPS[op](x, m)))
        assert same(OPS[op](*shifted), wanted)
        found = list(tensors(OPS[op](*last)))
    assert same(found, wanted)
    assert all(value.is_contiguous(memory_format=LAST) for value in found)
    assert not any(value.isnan().any() for value in wanted)


@pytest.mark.sanitized
@pytest.mark.parametrize("name", ["vectors", "channels of a vector", "any size"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.usefixtures("poisoned")
def test_order_of_threads_changes_no_bit(op: str, name: str, device: torch.device) -> None:
    extension = mmfast.cuda.extension()
    if not extension.emulated:
        pytest.skip("a GPU has its own order")
    x, m = inputs(name, torch.float16, device)
    last = [v.contiguous(memory_format=LAST) for v in (x, m)]
    found = []
    try:
        for order in (0, 1, 3):
            extension.set_thread_order(order)
            with mmfast.backend("cuda"):
                found.append([*tensors(OPS[op](x, m)), *tensors(OPS[op](*last))])
    finally:
        extension.set_thread_order(0)
    assert same(found[0], found[1])
    assert same(found[0], found[2])


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=str)
def test_blocks_of_several_tiles(layout: torch.memory_format, device: torch.device) -> None:
    """Large enough that blocks take two tiles, the last in part: as one tile a block, and as the definition."""
    x = torch.empty((2, 4, 528, 516), dtype=torch.float16, device=device).to(memory_format=layout)
    with mmfast.backend("cuda"):
        whole = ops.noise_like(x, 9)
        alone = ops.noise_like(x[:1], 9)
    assert torch.equal(whole[:1], alone)
    with mmfast.backend("torch"):
        torch.testing.assert_close(whole, ops.noise_like(x, 9), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 70_001), (2, 8, 96, 100), (150, 5)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_loss_of_many_tiles_and_samples(
    shape: tuple[int, ...], layout: torch.memory_format, device: torch.device
) -> None:
    """More tiles than partial sums of a sample, and more samples than the last block adds up at a time."""
    x = torch.randn(shape, device=device)
    x = x.to(memory_format=layout) if x.dim() == 4 else x
    weight = torch.rand(len(x), device=device)
    with mmfast.backend("cuda"):
        each = ops.noise_mse(x, 5, reduction="none")
        mean = ops.noise_mse(x, 5, weight=weight)
        assert torch.equal(ops.noise_mse(x[:1], 5, reduction="none"), each[:1])
    wanted = (x.double() - reference.noise_like(x.double(), 5)).square().flatten(1).mean(1)
    torch.testing.assert_close(each.double(), wanted, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(mean.double(), (wanted * weight).mean(), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("model", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 4, 6), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("op", ["ddim_step", "ddpm_step"])
def test_any_dtype_beside_the_samples(
    op: str, shape: tuple[int, ...], dtype: torch.dtype, model: torch.dtype, device: torch.device
) -> None:
    """Model output and noise are read in their own dtype, in vectors and element by element."""
    x, noise, u, c = torch.randn(4, *shape, device=device)
    t = torch.tensor([40, 900], device=device)
    args = (torch.cat((u, c)).to(model), t, t - 20, x.to(dtype), NoiseSchedule().to(device))
    kwargs = {"noise": noise.to(model), "guidance": 2.0, **({"eta": 0.5} if op == "ddim_step" else {})}
    check_against_reference(getattr(ops, op), getattr(reference, op), args, kwargs, "cuda", dtype)


@pytest.mark.parametrize("other", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_and_x0_of_any_dtype(dtype: torch.dtype, other: torch.dtype, device: torch.device) -> None:
    x, y = torch.randn(2, 2, 4, 4, 4, device=device)
    x, y = x.to(dtype), y.to(other)
    t, s = torch.tensor([40, 900], device=device), NoiseSchedule().to(device)
    check_against_reference(ops.q_sample, reference.q_sample, (x, t, s), {"noise": y}, "cuda", dtype)
    for target in ("sample", "v_prediction"):
        with mmfast.backend("cuda"):
            found = ops.noise_mse(x, 1, x0=y, target=target, t=t, schedule=s)
        wanted = reference.noise_mse(x.double(), 1, x0=y.double(), target=target, t=t, schedule=s)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=0.0)


def test_the_extension_says_what_is_wrong() -> None:
    extension = mmfast.cuda.extension()
    y = torch.empty(16)

    def call(size: int = 16, channels: int = 1, dtype: int = 0, batch: int = 1) -> None:
        extension.noise_like_forward(y.data_ptr(), 0, 0, 1, batch, size, channels, False, 0.0, 0, dtype, -1, 0)

    with pytest.raises(ValueError, match="noise_like_forward: a sample must have fewer than 1073741824 elements, got"):
        call(size=1 << 30)
    with pytest.raises(ValueError, match="size must be a multiple of channels, got 16 and 3"):
        call(channels=3)
    with pytest.raises(ValueError, match="batch and size must be positive, got 0 and 16"):
        call(batch=0)
    with pytest.raises(ValueError, match="dtype must be 0"):
        call(dtype=7)
