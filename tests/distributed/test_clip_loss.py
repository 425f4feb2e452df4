"""`mmfast.ops.clip_loss` over gloo groups of 2 and 4 processes: what one process computes on the whole batch."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mmfast import ops, reference
from mmfast.ops import _exchange, _exchange_ranks
from tests.distributed.launch import Run, parameters

clip_loss_file: Any = sys.modules["mmfast.ops.clip_loss"]  # `mmfast.ops.clip_loss` is the function


class Batch:
    """The whole batch, the same on every rank, and a rank's part of it."""

    def __init__(self, rank: int, size: int, options: dict[str, Any], dtype: torch.dtype = torch.float64) -> None:
        self.rank, self.size = rank, size
        images, texts, width = options.pop("shape", (3, 3, 12))
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        m, n = size * images, size * texts
        shared = draw(max(m, n), width)
        image, text = shared[:m] + draw(m, width), shared[:n] + draw(n, width)
        if not options.get("normalize"):
            image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
        self.image, self.text = (x.to(dtype) for x in (image, text))
        self.scale = torch.tensor(options.pop("scale", 14.3), dtype=dtype)
        self.options = options
        self.rowwise: dict[str, Any] = {}
        if options.pop("ids", False):
            self.rowwise["image_ids"] = torch.randint(m // 2, (m,), generator=generator)
            self.rowwise["text_ids"] = torch.randint(m // 2 + 1, (n,), generator=generator)
        if options.pop("teacher", False):
            guide = F.normalize(draw(m, 5), dim=-1), F.normalize(draw(n, 5), dim=-1)
            self.rowwise["teacher"] = tuple(x.to(dtype) for x in guide)

    def arguments(self, own: bool) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
        """Of a call on this rank's part, or on all."""
        tensors = self.cut(self.image, own), self.cut(self.text, own), self.scale.clone()
        kwargs = {name: self.cut(x, own) for name, x in self.rowwise.items() if isinstance(x, Tensor)}
        if "teacher" in self.rowwise:
            kwargs["teacher"] = (*(self.cut(x, own) for x in self.rowwise["teacher"]), 20.0)
        return tuple(x.detach().requires_grad_() for x in tensors), {**self.options, **kwargs}  # type: ignore

    def cut(self, x: Tensor, own: bool = True) -> Tensor:
        return x.chunk(self.size)[self.rank].clone() if own else x.clone()


def total(result: Any) -> Tensor:
    """A scalar that each loss of `reduction="none"` has its own weight in."""
    if isinstance(result, Tensor):
        return result
    return sum((x * x.detach().cos()).sum() for x in result)


def gradients(loss: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs))


def summed(x: Tensor) -> Tensor:
    x = x.clone()
    dist.all_reduce(x)
    return x


def agrees(found: Tensor, expected: Tensor, dtype: torch.dtype, of: Tensor | None = None) -> None:
    """`expected` may be a small part `of` a larger tensor."""
    most = (expected if of is None else of).abs().max().item()
    bounds = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-6 + 1e-5 * most}
    torch.testing.assert_close(found.double(), expected.double(), **bounds)


def check(
    rank: int,
    size: int,
    options: dict[str, Any],
    grad_reduction: str = "ddp_mean",
    dtype: torch.dtype = torch.float64,
    loss: Any = ops.clip_loss,
) -> None:
    batch = Batch(rank, size, dict(options), dtype)
    inputs, kwargs = batch.arguments(own=True)
    found = loss(*inputs, **kwargs, group=dist.group.WORLD, grad_reduction=grad_reduction)
    grads = gradients(total(found), inputs)
    losses = [found] if isinstance(found, Tensor) else list(found)
    sums = [summed(x.detach()) for x in (losses[0], grads[2])]  # first what takes every rank, then what may fail
    exact = Batch(rank, size, dict(options))
    whole, kwargs = exact.arguments(own=False)
    expected = reference.clip_loss(*whole, **kwargs)
    wanted = gradients(total(expected), whole)
    if isinstance(found, tuple):
        for mine, its in zip(found, expected, strict=True):
            agrees(mine, exact.cut(its), dtype)
    else:
        agrees(found, expected, dtype)
        assert (sums[0] == size * found.detach()).all()  # the same bits on every rank
    factor = size if grad_reduction == "ddp_mean" else 1
    for mine, its in zip(grads[:2], wanted[:2], strict=True):
        agrees(mine, factor * exact.cut(its), dtype, of=factor * its)
    agrees(sums[1], factor * wanted[2], dtype)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "normalize": {"normalize": True},
    "smoothing": {"label_smoothing": 0.2},
    "ids": {"ids": True},
    "two captions an image": {"shape": (2, 4, 12), "ids": True, "normalize": True},
    "ids, smoothing, none": {"ids": True, "label_smoothing": 0.1, "reduction": "none"},
    "teacher": {"teacher": True},
    "teacher 0.5, smoothing": {"teacher": True, "teacher_weight": 0.5, "label_smoothing": 0.1},
    "teacher 0.5, ids": {"teacher": True, "teacher_weight": 0.5, "ids": True},
    "one pair a rank, scale 100": {"shape": (1, 1, 5), "scale": 100.0},
}


def case_options(rank: int, size: int, *, name: str) -> None:
    for grad_reduction in ("ddp_mean", "sum"):
        check(rank, size, OPTIONS[name], grad_reduction)
    check(rank, size, OPTIONS[name], dtype=torch.float32)


def case_metrics(rank: int, size: int) -> None:
    for options in ({}, {"ids": True}, {"normalize": True}):
        batch = Batch(rank, size, {**options, "shape": (8, 8, 2), "scale": 3.0}, torch.float32)
        inputs, kwargs = batch.arguments(own=True)
        loss, metrics = ops.clip_loss(*inputs, **kwargs, group=dist.group.WORLD, return_metrics=True)
        whole, kwargs = batch.arguments(own=False)
        expected, wanted = ops.clip_loss(*whole, **kwargs, return_metrics=True)
        agrees(loss, expected, torch.float32)
        assert list(metrics) == list(wanted)
        assert 0 < wanted["image_to_text_top1"] < 1
        for name, value in metrics.items():
            torch.testing.assert_close(value, wanted[name], msg=name)


def case_unwanted_gradients(rank: int, size: int) -> None:
    for wanted in ((True, False, False), (False, True, False), (False, False, True), (False, True, True)):
        batch = Batch(rank, size, {"label_smoothing": 0.1})
        whole, kwargs = batch.arguments(own=False)
        every = gradients(reference.clip_loss(*whole, **kwargs), whole)
        inputs, kwargs = batch.arguments(own=True)
        for x, wish in zip(inputs, wanted, strict=True):
            x.requires_grad_(wish)
        ops.clip_loss(*inputs, **kwargs, group=dist.group.WORLD, grad_reduction="sum").backward()
        for i, (x, wish) in enumerate(zip(inputs, wanted, strict=True)):
            assert (x.grad is not None) == wish
            if x.grad is not None:
                agrees(batch.cut(x.grad, False) if i < 2 else summed(x.grad), batch.cut(every[i], i < 2), torch.float64)


def case_strided(rank: int, size: int) -> None:
    def strided(image: Tensor, text: Tensor, scale: Tensor, **kwargs: Any) -> Any:
        wide = torch.stack([image, image * 5], -1).flatten(1)[:, ::2]
        return ops.clip_loss(wide, text.T.contiguous().T, scale.reshape(1), **kwargs)

    check(rank, size, {}, loss=strided)


def case_bfloat16(rank: int, size: int) -> None:
    """Features in 16 bits, and float32 ones under autocast: as one process computes them."""
    for autocast, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        batch = Batch(rank, size, {"teacher": True, "teacher_weight": 0.5, "normalize": True}, dtype)
        found = []
        for own in (True, False):
            inputs, kwargs = batch.arguments(own)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast), set_to(clip_loss_file, "SMALL", 0):
                loss = ops.clip_loss(*inputs, **kwargs, group=dist.group.WORLD if own else None, grad_reduction="sum")
                assert loss.dtype == torch.float32
                found.append((loss, *gradients(loss, inputs)))
        (loss, image, text, scale), whole = found
        assert image.dtype == text.dtype == dtype
        torch.testing.assert_close(loss, whole[0], rtol=1e-5, atol=1e-5)
        for mine, its in ((image, whole[1]), (text, whole[2])):
            torch.testing.assert_close(mine, batch.cut(its), rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(summed(scale), whole[3], rtol=4e-3, atol=1e-3)  # sums to 0 nearly


@contextmanager
def set_to(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def case_repeatable(rank: int, size: int) -> None:
    batch = Batch(rank, size, {"shape": (40, 40, 24), "label_smoothing": 0.1}, torch.float32)
    results = []
    for _ in range(3):
        inputs, kwargs = batch.arguments(own=True)
        loss = ops.clip_loss(*inputs, **kwargs, group=dist.group.WORLD)
        results.append((loss, *gradients(loss, inputs)))
    for again in results[1:]:
        for a, b in zip(results[0], again, strict=True):
            assert (a == b).all()


def case_compiled(rank: int, size: int) -> None:
    group = dist.group.WORLD

    def step(image: Tensor, text: Tensor, scale: Tensor, **kwargs: Any) -> Any:
        return ops.clip_loss(image * 2, text, scale.exp(), normalize=True, **kwargs)

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    found = []
    for function in (step, compiled):
        inputs, kwargs = Batch(rank, size, {"shape": (4, 4, 12), "scale": 2.0}).arguments(own=True)
        loss, metrics = function(*inputs, **kwargs, group=group, return_metrics=True)
        found.append([loss, *metrics.values(), *gradients(loss, inputs)])
    for eager, traced in zip(*found, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-10, atol=1e-10)


def case_opcheck(rank: int, size: int) -> None:
    batch = Batch(rank, size, {"label_smoothing": 0.1, "teacher": True}, torch.float32)
    (image, text, scale), kwargs = batch.arguments(own=True)
    guide = (kwargs["teacher"][0], kwargs["teacher"][1], torch.tensor(20.0))
    arguments = (image, text, scale, None, None, *guide, 0.1, 0.5, True, True, torch.float32)
    name = _exchange.group_name(dist.group.WORLD)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(clip_loss_file._clip_loss, (*arguments, name, 2.0), test_utils=tests)


def case_saved_bytes(rank: int, size: int) -> None:
    """Kept between forward and backward: text features of all and a few numbers a row, linear in the batch."""
    counts = []
    for pairs in (64, 128, 256):
        kept: dict[int, int] = {}

        def count(x: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[x.data_ptr()] = x.numel() * x.element_size()
            return x

        inputs, kwargs = Batch(rank, size, {"shape": (pairs, pairs, 8)}, torch.float32).arguments(own=True)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            ops.clip_loss(*inputs, **kwargs, group=dist.group.WORLD)
        counts.append(sum(kept.values()) / pairs)
    gathered = 0 if _exchange.rings(inputs[1], size) else size * 8 * 4
    most = 2 * 8 * 4 + gathered + (size + 8) * 4  # bytes a pair: features, and numbers of this row and of all columns
    assert max(counts) <= most + 1, (counts, most)


def case_other_groups(rank: int, size: int) -> None:
    """Halves of the world, with ranks of their own, and a group in another order of ranks than the world's."""
    halves = [list(range(0, size, 2)), list(range(1, size, 2))]
    groups = [dist.new_group(ranks) for ranks in halves]
    mine = rank % 2
    group, ranks = groups[mine], halves[mine]
    assert _exchange.group_size(group) == len(ranks) == _exchange.group_size(_exchange.group_name(group))
    with pytest.raises(ValueError, match="this process must be one of the group's"):
        ops.clip_loss(torch.ones(2, 2), torch.ones(2, 2), 1.0, group=groups[1 - mine])
    batch = Batch(ranks.index(rank), len(ranks), {})
    inputs, _ = batch.arguments(own=True)
    whole, _ = batch.arguments(own=False)
    expected = reference.clip_loss(*whole) * (1 + mine)
    wanted = gradients(expected, whole)
    found = ops.clip_loss(*inputs, group=group, grad_reduction="sum") * (1 + mine)
    everywhere = ops.clip_loss(*Batch(rank, size, {}).arguments(own=True)[0], group=dist.group.WORLD)  # in between
    agrees(found, expected, torch.float64)
    for mine_, its in zip(gradients(found, inputs)[:2], wanted[:2], strict=True):
        agrees(mine_, batch.cut(its), torch.float64)
    agrees(everywhere, reference.clip_loss(*Batch(rank, size, {}).arguments(own=False)[0]), torch.float64)


def case_nan(rank: int, size: int) -> None:
    """One NaN on one rank: every loss of the batch is NaN, and no rank waits."""
    inputs, _ = Batch(rank, size, {}).arguments(own=True)
    if rank == size - 1:
        inputs[0].data[0, 0] = float("nan")
    loss = ops.clip_loss(*inputs, group=dist.group.WORLD)
    assert loss.isnan()
    assert all(grad.isnan().any() for grad in gradients(loss, inputs)[1:])


def case_empty(rank: int, size: int) -> None:
    image, text = torch.ones(2, 0, 4, requires_grad=True)
    scale = torch.tensor(2.0, requires_grad=True)
    loss = ops.clip_loss(image, text, scale, group=dist.group.WORLD, reduction="sum")
    loss.backward()
    assert (loss, scale.grad) == (0, 0)


def case_no_second_derivative(rank: int, size: int) -> None:
    inputs, _ = Batch(rank, size, {}).arguments(own=True)
    loss = ops.clip_loss(*inputs, group=dist.group.WORLD)
    with pytest.raises(RuntimeError, match="over a process group cannot be differentiated again"):
        torch.autograd.grad(loss, inputs, create_graph=True)


def case_disagreements(rank: int, size: int) -> None:
    """Every rank raises, and says which rank has what."""
    odd = rank == size - 1
    others = "rank 0" if size == 2 else "ranks 0, 1, 2"
    x = torch.ones(3, 8)

    def fails(message: str, *args: Tensor, **kwargs: Any) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            ops.clip_loss(*args, 1.0, group=dist.group.WORLD, **kwargs)

    few = x[: 2 if odd else 3]
    pairs = f"clip_loss: every rank of the group must give as many pairs; images x width x texts, got 3x8x3 on {others}"
    fails(f"{pairs}, 2x8x2 on rank {size - 1}", few, few)
    wide = torch.ones(3, 9 if odd else 8)
    fails(f"{pairs}, 3x9x3 on rank {size - 1}", wide, wide)
    message = "clip_loss: label_smoothing must be the same on every rank of the group, got 0 on"
    fails(f"{message} {others}, 0.25 on rank {size - 1}", x, x, label_smoothing=0.25 * odd)
    ids = {"image_ids": torch.arange(3), "text_ids": torch.arange(3)} if odd else {}
    fails("clip_loss: ids must be the same on every rank", x, x, **ids)
    half = x.bfloat16() if odd else x
    fails("clip_loss: float_bits must be the same on every rank", half, half)
    with set_to(_exchange_ranks, "CHECKS", False):  # this difference stops no exchange
        assert ops.clip_loss(x, x, 1.0, group=dist.group.WORLD, normalize=odd).isfinite()
    check(rank, size, {})  # and the group still works


def ringed(rank: int, size: int, *, case: Any, **kwargs: Any) -> None:
    """A case with columns that go round, however few."""
    with set_to(_exchange, "GATHERED", 0):
        case(rank, size, **kwargs)


CASES: dict[str, Any] = {name: partial(case_options, name=name) for name in OPTIONS}
CASES |= {
    function.__name__.removeprefix("case_").replace("_", " "): function
    for function in (
        case_metrics,
        case_unwanted_gradients,
        case_strided,
        case_bfloat16,
        case_repeatable,
        case_compiled,
        case_opcheck,
        case_saved_bytes,
        case_other_groups,
        case_nan,
        case_empty,
        case_no_second_derivative,
        case_disagreements,
    )
}
ALIKE = ("compiled", "disagreements", "other groups", "no second derivative")
"""Cases that do not ask how columns travel."""
CASES |= {f"{name} (ring)": partial(ringed, case=case) for name, case in CASES.items() if name not in ALIKE}


COSTLY = ("compiled", "opcheck", "opcheck (ring)")
"""Cases that compile: two ranks show as much as four."""
FOUR = (
    "plain",
    "ids, smoothing, none",
    "two captions an image",
    "teacher 0.5, ids",
    "metrics",
    "other groups",
    "nan",
    "disagreements",
)
"""Cases that four ranks run each time, with columns that go round too: the others show there what they do on two."""
RUNS: dict[Run, dict[str, Any]] = {
    (2, "quick"): CASES,
    (4, "quick"): {name: case for name, case in CASES.items() if name.removesuffix(" (ring)") in FOUR},
    (4, "slow"): {
        name: case for name, case in CASES.items() if name.removesuffix(" (ring)") not in FOUR and name not in COSTLY
    },
}


@pytest.fixture(scope="module")
def failures(run_once: Callable[..., dict[str, str]]) -> Callable[[Run], dict[str, str]]:
    """Runs all cases of a run on one group of processes, once; what failed."""
    return cache(lambda of: run_once(__name__, RUNS[of], of))


@pytest.mark.parametrize(("of", "name"), parameters(RUNS))
def test_clip_loss_of_a_group(failures: Callable[[Run], dict[str, str]], of: Run, name: str) -> None:
    if name in failures(of):
        pytest.fail(failures(of)[name], pytrace=False)
