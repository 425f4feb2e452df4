"""The kernels of `clip_loss` below the op: plans, blocks, buffers that several row blocks share, and memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast import ops
from mmfast.ops import _clip_loss_torch as chunked
from mmfast.ops._clip_loss_torch import NOWHERE, Block, Weights

pytest.importorskip("triton")


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """As many resident programs as the test's parameter says, so that one has several blocks of rows."""
    from mmfast.kernels import clip_loss

    monkeypatch.setattr(clip_loss, "resident_programs", lambda device: request.param)
    return


def block(m: int, n: int, first: int, ids: bool, device: torch.device, width: int = 24) -> Block:
    """Logits of m rows by n columns."""
    image, text = (F.normalize(torch.randn(size, width, device=device), dim=1) for size in (m, n))
    scale = torch.tensor(14.3, device=device)
    if not ids:
        return Block(image, text, scale, first)
    return Block(image, text, scale, NOWHERE, *(torch.randint(30, (size,), device=device) for size in (m, n)))


@pytest.mark.triton
@pytest.mark.parametrize("few_programs", [1, 2, 5], indirect=True)
@pytest.mark.parametrize("ids", [False, True], ids=["place", "ids"])
@pytest.mark.parametrize(("m", "n", "first"), [(200, 70, 0), (65, 193, 128), (64, 128, -10), (30, 20, 500)])
@pytest.mark.usefixtures("few_programs", "poisoned")
def test_statistics_are_those_of_the_chunks(m: int, n: int, first: int, ids: bool, device: torch.device) -> None:
    """Rows' and columns' sides; positives by place, some or all of them another process's columns, or by id."""
    from mmfast.kernels.clip_loss import clip_loss_statistics

    given = block(m, n, first, ids, device)
    for best in (False, True):
        found = clip_loss_statistics(*given, best=best)
        for mine, theirs in zip(found, chunked.statistics(given, best=best), strict=True):
            for value, expected in zip(mine, theirs, strict=True):
                assert (value is None) == (expected is None)
                if value is not None and expected is not None:
                    torch.testing.assert_close(value, expected, atol=2e-5, rtol=2e-5)


def _weights(m: int, n: int, ids: bool, given: Block) -> Weights:
    rows, columns = chunked.statistics(given)
    device = given.image.device
    weights = Weights(
        rows.max, columns.max, torch.rand(m, device=device) / rows.sum, torch.rand(n, device=device) / columns.sum
    )
    if not ids:
        return weights
    return weights._replace(row_target=torch.rand(m, device=device), column_target=torch.rand(n, device=device))


@pytest.mark.triton
@pytest.mark.parametrize("own", [True, False], ids=["owned rows", "blocks"])
@pytest.mark.parametrize("ids", [False, True], ids=["place", "ids"])
@pytest.mark.parametrize(("m", "n", "first"), [(70, 50, 0), (33, 65, 20), (64, 64, -10)])
@pytest.mark.usefixtures("poisoned")
def test_gradients_are_those_of_the_chunks(
    m: int, n: int, first: int, ids: bool, own: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmfast.kernels import clip_loss

    monkeypatch.setattr(clip_loss, "BLOCK_SIDE", 40)  # several blocks, whose last is short
    given = block(m, n, first, ids, device)
    weights = _weights(m, n, ids, given)
    expected = chunked.gradients(given, weights, needs=(True, True))
    for needs in ((True, True), (True, False), (False, True)):
        found = clip_loss.clip_loss_gradients(*given, *weights, values=None, needs=needs, own=own)
        for value, other, need in zip(found, expected, needs, strict=True):
            assert (value is not None) == need
            if value is not None:
                torch.testing.assert_close(value, other, atol=2e-5, rtol=2e-5)


@pytest.mark.triton
def test_gradients_multiply_other_values(device: torch.device) -> None:
    """A teacher's probabilities by the student's features, of another width."""
    from mmfast.kernels.clip_loss import clip_loss_gradients

    given = block(20, 20, NOWHERE, False, device)
    weights = _weights(20, 20, False, given)
    values = torch.randn(20, 16, device=device), torch.randn(20, 16, device=device)
    expected = chunked.gradients(given, weights, values=values, needs=(True, True))
    found = clip_loss_gradients(*given, *weights, values=values, needs=(True, True))
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other, atol=2e-5, rtol=2e-5)


@pytest.mark.triton
@pytest.mark.parametrize("width", [1, 7, 24, 130])
@pytest.mark.usefixtures("poisoned")
def test_rows(width: int, device: torch.device) -> None:
    """Division by the length and the gradient through it, with everything added, against PyTorch's ops."""
    from mmfast.ops._contrastive import Extra, finish_rows, unit_rows

    x = torch.randn(9, 2 * width, device=device)[:, ::2]
    x[4] = 0
    for dtype in (torch.float32, torch.float16):
        expected, rnorm = unit_rows(x, dtype, True)
        found, mine = unit_rows(x, dtype, True, "triton")
        torch.testing.assert_close(found, expected, atol=2e-3 if dtype == torch.float16 else 1e-6, rtol=1e-6)
        torch.testing.assert_close(mine, rnorm)
    full = Extra(*(torch.randn(shape, device=device) for shape in ((9,), (9, width), (9,), (width,), (width,))))
    factor = torch.tensor(0.3, device=device)
    for extra in (None, full):
        for lengths in (rnorm, rnorm.new_empty(0)):
            gradient = torch.randn(9, width, device=device)
            found = finish_rows(x, lengths, gradient.clone(), factor, extra, "triton")
            expected = finish_rows(x, lengths, gradient.clone(), factor, extra)
            for mine, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_every_tile_has_a_program() -> None:
    from mmfast.kernels.clip_loss import split_columns

    for rows in (1, 3, 64, 157, 256, 2048):
        for columns in (1, 5, 157, 2048):
            over, splits = split_columns(rows, columns, 264)
            assert 1 <= over <= rows
            assert 1 <= splits <= columns
            assert over * splits <= 264
            busiest = -(-rows // over) * -(-columns // splits)
            assert busiest * 264 <= 2 * rows * columns + 264 * 264, (rows, columns, over, splits)
    assert split_columns(256, 256, 264) == (256, 1)


PEAK = """
import resource, sys, torch
from mmfast import ops
torch.set_num_threads(1)
image, text = (torch.nn.functional.normalize(torch.randn(4096, 32), dim=1).requires_grad_() for _ in range(2))
def eager():
    logits, places = 10.0 * image @ text.T, torch.arange(4096)
    return (torch.nn.functional.cross_entropy(logits, places) + torch.nn.functional.cross_entropy(logits.T, places)) / 2
small = image[:64].detach().requires_grad_()
loss = eager if sys.argv[1] == "eager" else lambda: ops.clip_loss(image, text, 10.0)
ops.clip_loss(small, small, 10.0).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loss().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_on_a_cpu_is_a_tenth_of_eagers() -> None:
    peaks = []
    for which in ("ours", "eager"):
        done = subprocess.run(
            [sys.executable, "-c", PEAK, which], capture_output=True, text=True, timeout=120, check=True
        )
        peaks.append(int(done.stdout))
    assert peaks[0] <= peaks[1] / 10, peaks


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "limit"), [(32768, 0.35e9), (262144, 2.8e9)])
def test_memory_on_a_gpu(batch: int, limit: float, device: torch.device) -> None:
    """Forward and backward beside the features and their gradients: 17 GB in eager open_clip at 32768."""
    image, text = (
        F.normalize(torch.randn(batch, 512, device=device), dim=1).bfloat16().requires_grad_() for _ in range(2)
    )
    scale = torch.tensor(14.3, device=device, requires_grad=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = ops.clip_loss(image, text, scale)
    loss.backward()
    assert torch.cuda.max_memory_allocated() - before < limit
    assert torch.isfinite(loss)
    assert torch.isfinite(image.grad).all()
    assert torch.isfinite(text.grad).all()


@pytest.mark.gpu
@pytest.mark.parametrize("width", [256, 512])
def test_no_host_sync_and_graph_capture(width: int, device: torch.device) -> None:
    def step(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        loss = ops.clip_loss(image, text, scale, normalize=True)
        return (loss, *torch.autograd.grad(loss, (image, text, scale)))

    image, text = (torch.randn(2048, width, device=device).bfloat16().requires_grad_() for _ in range(2))
    scale = torch.tensor(14.3, device=device, requires_grad=True)
    expected = step(image, text, scale)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(image, text, scale)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(image, text, scale)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        found = step(image, text, scale)
    graph.replay()
    torch.testing.assert_close(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("own", [True, False], ids=["owned rows", "blocks"])
@pytest.mark.parametrize("width", [64, 200, 256, 384, 512, 640, 768, 1024])
def test_gradients_in_bfloat16(width: int, own: bool, device: torch.device) -> None:
    """Both ways at CLIP's widths, several blocks, against chunks in float32."""
    from mmfast.kernels.clip_loss import clip_loss_gradients, owns

    if own and not owns(width, torch.bfloat16, 9):
        pytest.skip("the sums of so wide a row do not fit")
    given = block(8300, 1000, 0, False, device, width)
    given = given._replace(image=given.image.bfloat16(), text=given.text.bfloat16())
    exact = given._replace(image=given.image.float(), text=given.text.float())
    weights = _weights(8300, 1000, False, exact)
    expected = chunked.gradients(exact, weights, needs=(True, True))
    found = clip_loss_gradients(*given, *weights, values=None, needs=(True, True), own=own)
    for value, other in zip(found, expected, strict=True):
        assert float((value - other).norm() / other.norm()) < 2e-3
