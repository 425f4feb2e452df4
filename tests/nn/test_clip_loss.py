"""`ClipLoss`, `DistillClipLoss`, `SigLipLoss` on one process: open_clip's values and gradients, and the arguments."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

open_clip = pytest.importorskip("open_clip")
from open_clip import loss as theirs  # noqa: E402

from mmfast import nn, ops  # noqa: E402

CLASSES = ("ClipLoss", "DistillClipLoss", "SigLipLoss")


def features(count: int = 2, pairs: int = 7, width: int = 12) -> list[Tensor]:
    return [F.normalize(torch.randn(pairs, width, dtype=torch.float64), dim=-1).requires_grad_() for _ in range(count)]


def arguments(name: str) -> tuple[Tensor, ...]:
    scale, bias = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (12.0, -5.0))
    if name == "DistillClipLoss":
        teacher = [x.detach() for x in features(width=5)]
        return (*features(), scale, *teacher, torch.tensor(20.0))
    return (*features(), scale, bias)


def values(result: Any) -> list[Tensor]:
    return list(result.values() if isinstance(result, dict) else result if isinstance(result, tuple) else [result])


@pytest.mark.parametrize("name", CLASSES)
def test_constructor_and_call_begin_as_open_clips(name: str) -> None:
    for method in ("__init__", "forward"):
        ours = inspect.signature(getattr(getattr(nn, name), method)).parameters.values()
        wanted = inspect.signature(getattr(getattr(theirs, name), method)).parameters.values()
        shared = [(p.name, p.default) for p in ours if p.kind is not p.KEYWORD_ONLY]
        expected = [(p.name, p.default) for p in wanted]
        assert shared == expected


@pytest.mark.parametrize("output_dict", [False, True], ids=["scalars", "dict"])
@pytest.mark.parametrize("name", CLASSES)
def test_values_and_gradients_are_open_clips(name: str, output_dict: bool) -> None:
    inputs = arguments(name)
    results = [getattr(module, name)()(*inputs, output_dict=output_dict) for module in (nn, theirs)]
    if output_dict:
        assert list(results[0]) == list(results[1])
    leaves = [x for x in inputs if x.requires_grad]
    ours, expected = ([*values(r), *torch.autograd.grad(sum(values(r)), leaves)] for r in results)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_keyword_arguments_reach_the_op() -> None:
    image, text = (3 * x for x in features())
    ids = {"image_ids": torch.arange(7) // 2, "text_ids": torch.arange(7) // 3}
    loss = nn.ClipLoss(normalize=True, label_smoothing=0.2)
    found, metrics = loss(image, text, 9.0, return_metrics=True, output_dict=True, **ids)
    expected, wanted = ops.clip_loss(image, text, 9.0, normalize=True, label_smoothing=0.2, return_metrics=True, **ids)
    assert found["contrastive_loss"] == expected
    assert metrics == wanted
    found, metrics = nn.SigLipLoss(normalize=True)(image, text, 9.0, -3.0, return_metrics=True, **ids)
    expected, wanted = ops.siglip_loss(image, text, 9.0, -3.0, normalize=True, return_metrics=True, **ids)
    assert found == expected
    assert metrics == wanted


def test_distillation_smooths_the_contrastive_loss_alone() -> None:
    inputs = arguments("DistillClipLoss")
    contrastive, distill = nn.DistillClipLoss(label_smoothing=0.3)(*inputs)
    assert contrastive == ops.clip_loss(*inputs[:3], label_smoothing=0.3)
    assert distill == ops.clip_loss(*inputs[:3], teacher=inputs[3:])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CLASSES)
def test_compiles_without_a_graph_break(name: str) -> None:
    torch._dynamo.reset()
    inputs, loss = arguments(name), getattr(nn, name)()
    found = torch.compile(loss, backend="eager", fullgraph=True)(*inputs)
    assert values(found) == values(loss(*inputs))


@pytest.mark.parametrize("name", CLASSES)
def test_copies_pickles_and_has_no_state(name: str) -> None:
    inputs, loss = arguments(name), getattr(nn, name)()
    assert not loss.state_dict()
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert values(other(*inputs)) == values(loss(*inputs))
        assert repr(other) == repr(loss)


def test_repr() -> None:
    loss = nn.ClipLoss(gather_with_grad=True, rank=1, world_size=4, normalize=True, grad_reduction="sum")
    assert repr(loss) == "ClipLoss(rank=1, world_size=4, grad_reduction='sum', normalize=True)"
    assert repr(nn.ClipLoss(label_smoothing=0.1)) == "ClipLoss(label_smoothing=0.1)"
    assert repr(nn.SigLipLoss()) == "SigLipLoss()"


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="ClipLoss: use_horovod must be False"):
        nn.ClipLoss(use_horovod=True)
    for rank, world_size in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"rank must be in .* got rank={rank} and world_size={world_size}"):
            nn.ClipLoss(gather_with_grad=True, rank=rank, world_size=world_size)
    with pytest.raises(ValueError, match="SigLipLoss: grad_reduction must be one of ddp_mean, sum, got 'mean'"):
        nn.SigLipLoss(grad_reduction="mean")
    with pytest.raises(ValueError, match=r"SigLipLoss: dist_impl must be one of bidir, .* got 'ring'"):
        nn.SigLipLoss(dist_impl="ring")
    with pytest.raises(TypeError, match=r"group: expected a torch\.distributed process group or None, got list"):
        nn.ClipLoss(group=[0, 1])
    with pytest.raises(ValueError, match="group: this process must be one of the group's"):
        nn.ClipLoss(group=dist.GroupMember.NON_GROUP_MEMBER)
    loss = nn.ClipLoss(gather_with_grad=True, world_size=2)
    with pytest.raises(ValueError, match=r"ClipLoss: world_size=2 needs torch\.distributed\.init_process_group first"):
        loss(*arguments("ClipLoss"))


@pytest.mark.parametrize(("local_loss", "words"), [(False, "are 1/4 of"), (True, "lack what other ranks")])
def test_says_where_open_clips_gradients_differ(local_loss: bool, words: str) -> None:
    with pytest.warns(UserWarning, match=f"ClipLoss: .*{words}"):
        nn.ClipLoss(local_loss, rank=1, world_size=4)


@pytest.mark.filterwarnings("error")
def test_is_silent_where_they_do_not() -> None:
    nn.ClipLoss(gather_with_grad=True, world_size=4)
    nn.ClipLoss()


def test_bytes_per_step() -> None:
    loss = nn.ClipLoss()
    assert loss.bytes_per_step(1024, 512).total == 0
    found = loss.bytes_per_step(1024, 512, world_size=8)
    assert (found.features, found.gradient, found.ring) == (7 * 1024 * 512 * 2, 7 * 1024 * 512 * 4, False)
    # Maximum and sum of every column in two all_reduces, the weight of every column, the comparison and the totals.
    columns = 8 * 1024
    assert found.statistics == 7 * (1024 * 4 + 128) + 2 * 7 * (2 * columns * 4 + 7 * 4) // 8
    assert found.total == found.features + found.gradient + found.statistics
    ring = loss.bytes_per_step(1 << 17, 1024, torch.float32, world_size=8)
    assert (ring.features, ring.ring) == (2 * 7 * (1 << 17) * 1024 * 4, True)
