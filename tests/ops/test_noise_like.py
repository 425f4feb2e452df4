"""`noise_like`: grading, layouts, tiles, seeds. Its statistics are in tests/test_philox_statistics.py."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch.library import opcheck

import mmfast
from mmfast import ops, reference
from mmfast.reference.noise_like import cases
from tests.grading import ALL_BACKENDS, DTYPES, check_against_reference

LABELS = [case.label for case in cases(torch.float32, torch.device("cpu"), large=False)]
GPU_LABELS = [case.label for case in cases(torch.float32, torch.device("cpu"), large=True)][len(LABELS) :]


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("label", [*LABELS, *(pytest.param(x, marks=pytest.mark.gpu) for x in GPU_LABELS)])
@pytest.mark.usefixtures("poisoned")
def test_matches_the_reference(label: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    case = next(c for c in cases(dtype, device, large=label in GPU_LABELS) if c.label == label)
    check_against_reference(ops.noise_like, reference.noise_like, case.args, case.kwargs, backend, dtype)


SHAPES = {
    "wide": ((2, 2, 4, 4), False),
    "flat": ((2, 3, 5, 7), False),
    "line": ((2, 4, 4, 6), True),
    "channels_last": ((2, 40, 4, 3), True),
    "channels_last, odd": ((2, 3, 5, 3), True),
    "video, channels_last": ((2, 3, 2, 4, 5), True),
}


def samples(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    shape, last = SHAPES[name]
    formats = {False: torch.contiguous_format, True: torch.channels_last if len(shape) == 4 else torch.channels_last_3d}
    return torch.randn(shape, device=device).to(dtype).contiguous(memory_format=formats[last])


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.usefixtures("poisoned")
def test_layout_is_kept_and_changes_no_number(name: str, backend: str, device: torch.device) -> None:
    x = samples(name, device)
    with mmfast.backend(backend):
        found = ops.noise_like(x, 7, offset_noise=0.5)
        plain = ops.noise_like(x.contiguous(), 7, offset_noise=0.5)
    assert found.stride() == x.stride()
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.double(), reference.noise_like(x.double(), 7, offset_noise=0.5), rtol=0, atol=2e-6)


@pytest.mark.triton
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.usefixtures("poisoned")
def test_tiles_of_any_size_make_the_same_bits(name: str, device: torch.device) -> None:
    from mmfast.kernels._samples import SamplePlan
    from mmfast.kernels.noise_like import noise_like_forward

    x = samples(name, device)
    plan = SamplePlan.of(x)
    found = [noise_like_forward(x, None, 3, 0.25, plan=plan.with_block(block)) for block in (8, 16, plan.block)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.triton
def test_every_layout_has_a_case(device: torch.device) -> None:
    from mmfast.kernels._samples import SamplePlan

    assert sorted(SamplePlan.of(samples(name, device)).layout for name in SHAPES) == [-1, 0, 1, 2, 2, 3]


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_seeds(backend: str, device: torch.device) -> None:
    """All 64 bits count; a negative seed is the unsigned one; sample 0 of a seed is the sample with that seed."""
    x = torch.empty(3, 10, device=device)
    with mmfast.backend(backend):
        found = ops.noise_like(x, 5)
        assert torch.equal(found, ops.noise_like(x, 5))
        assert torch.equal(found[:2], ops.noise_like(x[:2], 5))
        assert torch.equal(ops.noise_like(x, -1), ops.noise_like(x, 2**64 - 1))
        assert torch.equal(found[:1], ops.noise_like(x[:1], torch.tensor([5], device=device)))
        high = ops.noise_like(x, 5 + (1 << 32))
        seeds = torch.tensor([9, -4, 5], device=device)
        several = ops.noise_like(x, seeds)
        assert torch.equal(several[1:], ops.noise_like(x[1:], seeds[1:]))
        assert torch.equal(several[::2], ops.noise_like(x[::2], seeds[::2]))
    assert not torch.isclose(found, high, atol=1e-3).any()
    assert not torch.isclose(found[0], found[1], atol=1e-3).any()


@pytest.mark.parametrize("backend", [None, *ALL_BACKENDS])
def test_without_a_seed_noise_is_new_and_follows_manual_seed(backend: str | None, device: torch.device) -> None:
    x = torch.empty(2, 64, device=device)
    with mmfast.backend(backend):
        torch.manual_seed(1)
        first, second = ops.noise_like(x), ops.noise_like(x, offset_noise=0.1)
        assert not torch.isclose(first, second, atol=1e-4).any()
        torch.manual_seed(1)
        assert torch.equal(first, ops.noise_like(x))
        assert torch.equal(second, ops.noise_like(x, offset_noise=0.1))


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0), (3, 2, 0)], ids=str)
def test_empty(shape: tuple[int, ...], backend: str, device: torch.device) -> None:
    with mmfast.backend(backend):
        assert ops.noise_like(torch.empty(shape, device=device), 1, offset_noise=0.1).shape == shape


def test_opcheck_and_compile() -> None:
    x = torch.empty(2, 3, 4, 5)
    opcheck(torch.ops.mmfast.noise_like.default, (x, torch.tensor([1, 2]), 0, 0.1))
    opcheck(torch.ops.mmfast.noise_like.default, (x.half(), None, 4, 0.0))

    def fn(x: torch.Tensor, seed: int) -> torch.Tensor:
        return 2 * ops.noise_like(x, seed)

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for seed in (3, 4, 2**63 - 1):
        assert torch.equal(compiled(x, seed), fn(x, seed))


@pytest.mark.parametrize(
    ("error", "message", "wrong"),
    [
        (TypeError, "x must be a tensor, got int", lambda x: (3, 1)),
        (TypeError, "x must be floating point, got torch.int64", lambda x: (x.long(), 1)),
        (TypeError, "seed must be an int or an int64 tensor of one seed a sample, got float", lambda x: (x, 1.5)),
        (TypeError, "seed must be an int or an int64 tensor of one seed a sample, got bool", lambda x: (x, True)),
        (TypeError, "seed must be an int or an int64 tensor, got torch.int32", lambda x: (x, torch.ones(2).int())),
        (ValueError, "seed must have shape (2,), one seed a sample, got (3,)", lambda x: (x, torch.arange(3))),
        (ValueError, "seed must fit in 64 bits, got 18446744073709551616", lambda x: (x, 2**64)),
        (TypeError, "offset_noise must be a number, got str", lambda x: (x, 1, "0")),
        (ValueError, "offset_noise must be finite, got nan", lambda x: (x, 1, float("nan"))),
        (ValueError, "offset_noise needs samples with channels (B, C, ...), got (2,)", lambda x: (x[:, 0], 1, 0.1)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors(error: type[Exception], message: str, wrong: Any) -> None:
    x, seed, *offset_noise = wrong(torch.zeros(2, 3))
    with pytest.raises(error, match=re.escape(f"noise_like: {message}")):
        ops.noise_like(x, seed, **({"offset_noise": offset_noise[0]} if offset_noise else {}))


def test_explain() -> None:
    (choice,) = mmfast.explain(ops.noise_like, torch.empty(2, 3), 1)
    assert choice.op == "noise_like"
    assert choice.backend == "torch"
