"""`mmfast.ops.siglip_loss` over gloo groups of 2 and 4 processes: what one process computes on the whole batch."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mmfast import ops, reference
from mmfast.ops import _exchange
from tests.distributed.launch import Run, parameters

siglip_loss_file: Any = sys.modules["mmfast.ops.siglip_loss"]  # `mmfast.ops.siglip_loss` is the function


def whole_batch(size: int, images: int, texts: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Features of all ranks, a scale and a bias: the same on every rank."""
    generator = torch.Generator().manual_seed(1)
    shared, *own = (torch.randn(size * k, 12, generator=generator) for k in (max(images, texts), images, texts))
    image, text = (F.normalize(shared[: len(x)] + x, dim=-1) for x in own)
    return [x.to(dtype) for x in (image, text, torch.tensor(8.0), torch.tensor(-3.0))]


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


def share(tensors: list[Tensor], rank: int, size: int) -> list[Tensor]:
    """This rank's rows."""
    return [x.chunk(size)[rank] if x.dim() else x for x in tensors]


def summed(x: Tensor) -> Tensor:
    x = x.clone()
    dist.all_reduce(x)
    return x


def case_is_the_whole_batch(
    rank: int,
    size: int,
    *,
    images: int = 3,
    texts: int = 3,
    ids: bool = False,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> None:
    """Loss, metrics, gradients by this rank's rows, and by scale and bias, under both contracts."""
    bounds = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    batch = whole_batch(size, images, texts, dtype)
    all_ids = (
        {"image_ids": torch.arange(size * images) // 2, "text_ids": torch.arange(size * texts) // 3} if ids else {}
    )
    own_ids = {name: x.chunk(size)[rank] for name, x in all_ids.items()}
    inputs = leaves(batch)
    expected, wanted_metrics = ops.siglip_loss(*inputs, **all_ids, **options, return_metrics=True)
    torch.testing.assert_close(expected, reference.siglip_loss(*inputs, **all_ids, **options), **bounds)
    wanted = share(list(torch.autograd.grad(expected, inputs)), rank, size)
    for grad_reduction, factor in (("ddp_mean", size), ("sum", 1)):
        own = leaves(share(batch, rank, size))
        loss, metrics = ops.siglip_loss(
            *own, **own_ids, **options, group=dist.group.WORLD, grad_reduction=grad_reduction, return_metrics=True
        )
        found = torch.autograd.grad(loss, own)
        sums = [summed(x) for x in (loss.detach(), *found[2:])]  # first what takes every rank, then what may fail
        assert sums[0] == size * loss.detach()  # the same bits on every rank
        torch.testing.assert_close(loss, expected, **bounds)
        for name, value in metrics.items():
            torch.testing.assert_close(value, wanted_metrics[name], rtol=1e-5, atol=1e-6, msg=name)
        for mine, its in zip((*found[:2], *sums[1:]), wanted, strict=True):
            torch.testing.assert_close(mine, factor * its, **bounds)


def case_unwanted_gradients(rank: int, size: int) -> None:
    batch = whole_batch(size, 3, 3)
    inputs = leaves(batch)
    every = share(list(torch.autograd.grad(reference.siglip_loss(*inputs), inputs)), rank, size)
    for index in (1, 2, 4, 8, 12, 6):
        own = [x.requires_grad_(bool(index >> i & 1)) for i, x in enumerate(leaves(share(batch, rank, size)))]
        loss = ops.siglip_loss(*own, group=dist.group.WORLD, grad_reduction="sum")
        loss.backward()
        grads = [x.grad if x.dim() or x.grad is None else summed(x.grad) for x in own]
        for i, (found, wanted) in enumerate(zip(grads, every, strict=True)):
            assert (found is not None) == bool(index >> i & 1)
            if found is not None:
                torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def case_repeatable(rank: int, size: int) -> None:
    results = []
    for _ in range(2):
        own = leaves(share(whole_batch(size, 40, 40, torch.float32), rank, size))
        loss = ops.siglip_loss(*own, group=dist.group.WORLD)
        results.append((loss, *torch.autograd.grad(loss, own)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def case_compiled(rank: int, size: int) -> None:
    def step(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return ops.siglip_loss(image * 2, text, scale.exp(), bias, normalize=True, group=dist.group.WORLD)

    torch._dynamo.reset()
    found = []
    for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        own = leaves(share(whole_batch(size, 4, 4), rank, size))
        loss = function(*own)
        found.append([loss, *torch.autograd.grad(loss, own)])
    for eager, traced in zip(*found, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-10, atol=1e-10)


def case_opcheck(rank: int, size: int) -> None:
    own = leaves(share(whole_batch(size, 3, 3, torch.float32), rank, size))
    name = _exchange.group_name(dist.group.WORLD)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    arguments = (*own, None, None, True, True, torch.float32, name, 2.0)
    torch.library.opcheck(siglip_loss_file._siglip_loss, arguments, test_utils=tests)


def case_nan_and_empty(rank: int, size: int) -> None:
    """One NaN on one rank makes every rank's loss NaN; ranks without rows have a sum of 0. No rank waits."""
    own = leaves(share(whole_batch(size, 3, 3), rank, size))
    if rank == size - 1:
        own[0].data[0, 0] = float("nan")
    assert ops.siglip_loss(*own, group=dist.group.WORLD).isnan()
    x, scale = torch.ones(0, 4, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    loss = ops.siglip_loss(x, x, scale, 0.0, group=dist.group.WORLD, reduction="sum")
    loss.backward()
    assert (loss, scale.grad) == (0, 0)


def case_what_is_refused(rank: int, size: int) -> None:
    """Unequal batches, on every rank, and second derivatives."""
    x = torch.ones(2 if rank == size - 1 else 3, 8)
    with pytest.raises(ValueError, match=re.escape("siglip_loss: every rank of the group must give as many pairs")):
        ops.siglip_loss(x, x, 1.0, 0.0, group=dist.group.WORLD)
    own = leaves(share(whole_batch(size, 3, 3), rank, size))
    loss = ops.siglip_loss(*own, group=dist.group.WORLD)
    with pytest.raises(RuntimeError, match="over a process group cannot be differentiated again"):
        torch.autograd.grad(loss, own, create_graph=True)


def ringed(rank: int, size: int, *, case: Any, **kwargs: Any) -> None:
    """A case with columns that go round, however few."""
    before, _exchange.GATHERED = _exchange.GATHERED, 0
    try:
        case(rank, size, **kwargs)
    finally:
        _exchange.GATHERED = before


WHOLE: dict[str, dict[str, Any]] = {
    "plain": {},
    "float32": {"dtype": torch.float32},
    "sum, normalize": {"reduction": "sum", "normalize": True},
    "ids": {"ids": True},
    "two captions an image": {"images": 2, "texts": 4, "ids": True, "normalize": True},
    "one pair a rank": {"images": 1, "texts": 1},
}
CASES: dict[str, Any] = {name: partial(case_is_the_whole_batch, **options) for name, options in WHOLE.items()}
CASES |= {
    "unwanted gradients": case_unwanted_gradients,
    "repeatable": case_repeatable,
    "nan and empty": case_nan_and_empty,
}
CASES |= {f"{name} (ring)": partial(ringed, case=case) for name, case in CASES.items()}
CASES |= {"what is refused": case_what_is_refused, "compiled": case_compiled, "opcheck": case_opcheck}
FOUR = ("plain", "ids", "two captions an image", "nan and empty", "what is refused")
"""Cases whose shards or sums may go wrong only with more than two ranks."""
RUNS: dict[Run, dict[str, Any]] = {
    (2, "quick"): CASES,
    (4, "quick"): {name: case for name, case in CASES.items() if name.removesuffix(" (ring)") in FOUR},
}


@pytest.fixture(scope="module")
def failures(run_once: Callable[..., dict[str, str]]) -> Callable[[Run], dict[str, str]]:
    """Runs all cases of a run on one group of processes, once; what failed."""
    return cache(lambda of: run_once(__name__, RUNS[of], of))


@pytest.mark.parametrize(("of", "name"), parameters(RUNS))
def test_siglip_loss_of_a_group(failures: Callable[[Run], dict[str, str]], of: Run, name: str) -> None:
    if name in failures(of):
        pytest.fail(failures(of)[name], pytrace=False)
