"""Modules and steps of a training script on 2 and 4 gloo processes: what open_clip's losses give, and one process."""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

open_clip = pytest.importorskip("open_clip")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
from open_clip import loss as theirs  # noqa: E402
from rich.console import Console  # noqa: E402

import mmfast  # noqa: E402
from mmfast.commands import _demo_clip as demo  # noqa: E402
from mmfast.commands._demo_captions import CAPTIONS, Words  # noqa: E402
from mmfast.commands._demo_data import load  # noqa: E402
from mmfast.ops import _exchange, _exchange_ranks  # noqa: E402
from tests.distributed.launch import Run, parameters  # noqa: E402
from tests.distributed.test_clip_loss import set_to  # noqa: E402

PAIRS = 4
"""On a rank."""


class Towers(nn.Module):
    """Called as open_clip's models are."""

    def __init__(self, bias: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.image, self.text = (
            nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Dropout(dropout), nn.Linear(12, 8)) for width in (6, 5)
        )
        self.logit_scale = nn.Parameter(torch.tensor(2.3))
        if bias:
            self.logit_bias = nn.Parameter(torch.tensor(-4.0))

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        image, text = (F.normalize(x, dim=-1) for x in (self.image(image), self.text(text)))
        found = {"image_features": image, "text_features": text, "logit_scale": self.logit_scale.exp()}
        return {**found, "logit_bias": self.logit_bias} if hasattr(self, "logit_bias") else found


def towers(**kwargs: Any) -> nn.Module:
    torch.manual_seed(5)
    return Towers(**kwargs).double()


def batch(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    images, texts = (torch.randn(size * PAIRS, w, generator=generator, dtype=torch.float64) for w in (6, 5))
    return images, texts


def own(x: Tensor, rank: int, size: int) -> Tensor:
    return x.chunk(size)[rank]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(model: nn.Module, pair: tuple[Tensor, ...], loss: Any, extra: dict[str, Any] | None = None) -> Tensor:
    """One iteration of open_clip's training loop; the loss that it logs."""
    losses = loss(**model(*pair), **(extra or {}), output_dict=True)
    total = sum(losses.values())
    total.backward()
    return total.detach()


def whole_batch(
    size: int, loss: Any, extra: dict[str, Any] | None = None, **kwargs: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one process on all pairs."""
    model = towers(**kwargs)
    total = step(model, batch(size), loss, extra)
    return total, gradients(model)


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], factor: float = 1.0) -> None:
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name].double(), factor * grad.double(), rtol=1e-9, atol=1e-11, msg=name)


def case_clip_loss_in_ddp(rank: int, size: int) -> None:
    """As open_clip's, whose gradients are right with gather_with_grad, and as one process."""
    pair = tuple(own(x, rank, size) for x in batch(size))
    expected, wanted = whole_batch(size, theirs.ClipLoss())
    for local_loss in (False, True):
        options = {"local_loss": local_loss, "gather_with_grad": True, "rank": rank, "world_size": size}
        found = []
        for loss in (mmfast.nn.ClipLoss(**options), theirs.ClipLoss(**options)):
            model = DistributedDataParallel(towers())
            found.append((step(model, pair, loss), gradients(model)))
        (total, grads), (their_total, their_grads) = found
        dist.all_reduce(their_total)
        compare(grads, their_grads)
        compare(grads, wanted)
        torch.testing.assert_close(total, expected)
        torch.testing.assert_close(total, their_total / size)  # each rank's is its own share with local_loss


def case_clip_loss_without_gathered_gradients(rank: int, size: int) -> None:
    """What open_clip computes with its default arguments: the towers' gradients 1 / size of the right ones."""
    pair = tuple(own(x, rank, size) for x in batch(size))
    found = []
    for module in (mmfast.nn, theirs):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            loss = module.ClipLoss(rank=rank, world_size=size)
        assert len(said) == (module is mmfast.nn)
        model = DistributedDataParallel(towers())
        step(model, pair, loss)
        found.append(gradients(model))
    compare(found[0], whole_batch(size, theirs.ClipLoss())[1])
    scale = "logit_scale"
    compare({scale: found[0].pop(scale)}, {scale: found[1].pop(scale)})
    compare(found[0], found[1], factor=size)


def case_distill_in_ddp(rank: int, size: int) -> None:
    generator = torch.Generator().manual_seed(4)
    drawn = torch.randn(2, size * PAIRS, 7, generator=generator, dtype=torch.float64)
    teacher = F.normalize(drawn, dim=-1).unbind()

    def extra(cut: Any) -> dict[str, Any]:
        keys = "dist_image_features", "dist_text_features"
        scale = torch.tensor(15.0, dtype=torch.float64)
        return {**dict(zip(keys, map(cut, teacher), strict=True)), "dist_logit_scale": scale}

    options = {"local_loss": True, "gather_with_grad": True, "rank": rank, "world_size": size}
    found = []
    for module in (mmfast.nn, theirs):
        model = DistributedDataParallel(towers())
        pair = tuple(own(x, rank, size) for x in batch(size))
        total = step(model, pair, module.DistillClipLoss(**options), extra(lambda x: own(x, rank, size)))
        found.append((total, gradients(model)))
    expected, wanted = whole_batch(size, theirs.DistillClipLoss(), extra(lambda x: x))
    compare(found[0][1], found[1][1])
    compare(found[0][1], wanted)
    torch.testing.assert_close(found[0][0], expected)


def case_siglip_in_ddp(rank: int, size: int) -> None:
    expected, wanted = whole_batch(size, theirs.SigLipLoss(), bias=True)
    pair = tuple(own(x, rank, size) for x in batch(size))
    found = []
    for loss in (mmfast.nn.SigLipLoss(rank=rank, world_size=size), theirs.SigLipLoss(rank=rank, world_size=size)):
        model = DistributedDataParallel(towers(bias=True))
        found.append((step(model, pair, loss), gradients(model)))
    compare(found[0][1], found[1][1])
    compare(found[0][1], wanted)
    torch.testing.assert_close(found[0][0], expected)


def case_sum_without_ddp(rank: int, size: int) -> None:
    """Parameters whose gradients are added up by hand, and a group in place of world_size."""
    group = dist.new_group(list(range(size)))
    for name, bias in (("ClipLoss", False), ("SigLipLoss", True)):
        loss = getattr(mmfast.nn, name)(group=group, grad_reduction="sum")
        model = towers(bias=bias)
        pair = tuple(own(x, rank, size) for x in batch(size))
        step(model, pair, copy.deepcopy(loss))
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        compare(gradients(model), whole_batch(size, getattr(theirs, name)(), bias=bias)[1])
    with pytest.raises(ValueError, match=f"world_size must be the size of the group, {size}, got {size + 1}"):
        mmfast.nn.SigLipLoss(world_size=size + 1, group=group)


def case_compiled_loss(rank: int, size: int) -> None:
    """The module of a training script, compiled with its model."""
    torch._dynamo.reset()
    loss = mmfast.nn.ClipLoss(True, True, rank=rank, world_size=size, grad_reduction="sum")

    def iteration(model: nn.Module, image: Tensor, text: Tensor) -> Tensor:
        return loss(**model(image, text))

    model = towers()
    pair = [own(x, rank, size) for x in batch(size)]
    torch.compile(iteration, backend="aot_eager", fullgraph=True)(model, *pair).backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
    compare(gradients(model), whole_batch(size, theirs.ClipLoss())[1])


def case_contrastive_step_in_ddp(rank: int, size: int) -> None:
    """Two micro-batches on each rank: one loss over all, one reduction of gradients."""
    expected, wanted = whole_batch(size, theirs.ClipLoss())
    pair = tuple(own(x, rank, size) for x in batch(size))
    model = DistributedDataParallel(towers())
    reductions = []

    def hook(state, bucket):  # torch wants its own classes as annotations, or none
        reductions.append(bucket.index())
        return default_hooks.allreduce_hook(dist.group.WORLD, bucket)

    model.register_comm_hook(None, hook)
    loss = mmfast.nn.ClipLoss(True, True, rank=rank, world_size=size)
    for _ in range(2):
        reductions.clear()
        model.zero_grad()
        found = mmfast.contrastive_step(model, zip(*(x.split(PAIRS // 2) for x in pair), strict=True), loss)
        compare(gradients(model), wanted)
        torch.testing.assert_close(found.loss, expected)
        assert sorted(reductions) == sorted(set(reductions))  # each bucket once
        assert reductions


def case_contrastive_step_with_dropout_and_batch_norm(rank: int, size: int) -> None:
    """As without DistributedDataParallel, whose first forward pass takes over rank 0's running statistics."""
    pair = tuple(own(x, rank, size) for x in batch(size))
    found = []
    for wrapped in (True, False):
        model = towers(dropout=0.4)
        model.image.insert(1, nn.BatchNorm1d(12).double())
        loss = mmfast.nn.ClipLoss(group=dist.group.WORLD, grad_reduction="ddp_mean" if wrapped else "sum")
        torch.manual_seed(rank)
        module = DistributedDataParallel(model) if wrapped else model
        model.image[1].running_mean += 1.0 + (rank if wrapped else 0)
        mmfast.contrastive_step(module, zip(*(x.split(PAIRS // 2) for x in pair), strict=True), loss)
        if not wrapped:
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
        grads = gradients(model)
        grads.pop("image.0.bias")  # 0 but for rounding
        found.append((grads, dict(model.named_buffers())))
    compare(found[0][0], found[1][0])
    compare(found[0][1], found[1][1])
    assert found[0][1]["image.1.num_batches_tracked"] == 2


@contextmanager
def counted_bytes(size: int) -> Iterator[Counter[str]]:
    """Count what one rank sends, from the tensors given to torch.distributed."""
    counter: Counter[str] = Counter()

    def all_gather(out: Tensor, tensor: Tensor, **kwargs: Any) -> Any:
        kind = "features" if tensor.dim() == 2 else "statistics"
        counter[kind] += (size - 1) * tensor.nbytes
        return gather(out, tensor, **kwargs)

    def reduce_scatter(out: Tensor, tensor: Tensor, **kwargs: Any) -> Any:
        counter["gradient"] += (size - 1) * out.nbytes
        return scatter(out, tensor, **kwargs)

    def all_reduce(tensor: Tensor, **kwargs: Any) -> Any:
        counter["reduced"] += tensor.nbytes
        return reduce(tensor, **kwargs)

    def batch_isend_irecv(moves: list[dist.P2POp]) -> Any:
        for move in moves:
            if move.op is dist.isend:
                counter["gradient" if move.tag >= _exchange_ranks.GRADIENT_TAG else "features"] += move.tensor.nbytes
        return exchange(moves)

    gather, scatter = _exchange_ranks._all_gather, _exchange_ranks._reduce_scatter
    reduce, exchange = dist.all_reduce, dist.batch_isend_irecv
    with (
        set_to(_exchange_ranks, "_all_gather", all_gather),
        set_to(_exchange_ranks, "_reduce_scatter", reduce_scatter),
        set_to(dist, "all_reduce", all_reduce),
        set_to(dist, "batch_isend_irecv", batch_isend_irecv),
    ):
        yield counter


def case_bytes_per_step(rank: int, size: int) -> None:
    width = 16
    for dtype in (torch.float32, torch.bfloat16):
        for ids in (False, True):
            for smoothing in (0.0, 0.1):
                loss = mmfast.nn.ClipLoss(True, True, rank=rank, world_size=size, label_smoothing=smoothing)
                image, text = torch.randn(2, PAIRS, width).to(dtype).requires_grad_()
                extra = {"image_ids": torch.arange(PAIRS), "text_ids": torch.arange(PAIRS)} if ids else {}
                with counted_bytes(size) as counter:
                    loss(image, text, 2.0, **extra).backward()
                planned = loss.bytes_per_step(PAIRS, width, dtype, ids=ids)
                assert planned.ring == (_exchange.GATHERED == 0)
                assert planned.features == counter["features"]
                assert planned.gradient == counter["gradient"]
                assert planned.statistics == counter["statistics"] + 2 * (size - 1) * counter["reduced"] // size


def case_clip_demo(rank: int, size: int) -> None:
    """`mmfast demo clip`: each process has half of every batch, and the losses are those of one process."""
    epochs, classes = 1, CAPTIONS["digits"]
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()) as stream:
        folder = Path(name)
        args = argparse.Namespace(data="digits", data_dir=None, epochs=epochs, output=folder, seed=0)
        assert demo._run(args, demo.Process(rank, size, torch.device("cpu"))) == 0
        pictures = sorted(path.name for path in folder.iterdir())
    printed = " ".join(stream.getvalue().split())
    if rank:  # rank 0 alone prints and draws
        assert (printed, pictures) == ("", [])
        return
    assert pictures == ["clip-digits-loss.png", "clip-digits-retrieval.png"]
    assert printed.count("mmfast demo clip: digits") == 1
    assert f"on cpu, {size} processes" in printed

    torch.manual_seed(0)
    tokenizer = Words(text.format(name) for text in classes.training for name in classes.names)
    recipe = demo.RECIPES["digits"]
    model = mmfast.models.CLIP(**demo.model_config(recipe, tokenizer))
    alone, console = demo.Process(0, 1, torch.device("cpu")), Console(quiet=True)
    losses, _, accuracies = demo.train(model, load("digits", None), classes, tokenizer, recipe, epochs, alone, console)
    loss, accuracy = re.findall(r"epoch 1/1 loss ([\d.]+) zero-shot accuracy ([\d.]+)%", printed)[-1]
    assert float(loss) == pytest.approx(losses[-1], abs=2e-3)
    assert float(accuracy) == pytest.approx(100 * accuracies[-1], abs=1.0)


def ringed(rank: int, size: int, *, case: Any) -> None:
    with set_to(_exchange, "GATHERED", 0):
        case(rank, size)


CASES: dict[str, Any] = {
    function.__name__.removeprefix("case_").replace("_", " "): function
    for function in (
        case_clip_loss_in_ddp,
        case_clip_loss_without_gathered_gradients,
        case_distill_in_ddp,
        case_siglip_in_ddp,
        case_sum_without_ddp,
        case_compiled_loss,
        case_contrastive_step_in_ddp,
        case_contrastive_step_with_dropout_and_batch_norm,
        case_bytes_per_step,
        case_clip_demo,
    )
}
RINGED = ("clip loss in ddp", "distill in ddp", "siglip in ddp", "sum without ddp", "bytes per step")
CASES |= {f"{name} (ring)": partial(ringed, case=CASES[name]) for name in RINGED}


COSTLY = ("compiled loss", "clip demo")
"""Cases that compile or train: two ranks show as much as four."""
RUNS: dict[Run, dict[str, Any]] = {
    (2, "quick"): CASES,
    (4, "quick"): {name: CASES[name] for name in ("clip loss in ddp", "clip loss in ddp (ring)", "siglip in ddp")},
}
RUNS[4, "slow"] = {name: case for name, case in CASES.items() if name not in (*RUNS[4, "quick"], *COSTLY)}


@pytest.fixture(scope="module")
def failures(run_once: Callable[..., dict[str, str]]) -> Callable[[Run], dict[str, str]]:
    """Runs all cases of a run on one group of processes, once; what failed."""
    return cache(lambda of: run_once(__name__, RUNS[of], of))


@pytest.mark.parametrize(("of", "name"), parameters(RUNS))
def test_training_on_a_group(failures: Callable[[Run], dict[str, str]], of: Run, name: str) -> None:
    if name in failures(of):
        pytest.fail(failures(of)[name], pytrace=False)
