"""What an emulated build lets Python ask: orders of threads, and what has been counted."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import mmfast
import mmfast.cuda

pytestmark = pytest.mark.cuda


@pytest.fixture
def extension() -> Iterator[Any]:
    if not mmfast.cuda.emulated():
        pytest.skip("needs an emulated build")
    found = mmfast.cuda.extension()
    found.reset_statistics()
    yield found
    found.set_thread_order(0)


def layer_norm(x: torch.Tensor) -> torch.Tensor:
    with mmfast.backend("cuda"):
        return mmfast.ops.layer_norm(x, None, None, 1e-5)


def test_statistics_count_launches_blocks_and_switches(extension: Any) -> None:
    assert set(extension.statistics().values()) == {0}
    layer_norm(torch.randn(3, 64))
    counted = extension.statistics()
    assert counted["launches"] == 1
    assert counted["blocks"] >= 1
    assert counted["switches"] >= 32 * counted["blocks"]  # every thread ran
    assert counted["ldmatrix_phases"] == counted["ldmatrix_conflicts"] == 0
    layer_norm(torch.randn(3, 64))
    assert extension.statistics() == {name: 2 * value for name, value in counted.items()}
    extension.reset_statistics()
    assert set(extension.statistics().values()) == {0}


def test_the_order_of_threads_can_be_chosen(extension: Any) -> None:
    x = torch.randn(5, 200)
    found = []
    for order in (0, 1, 2, 3, 2**63 + 1):
        extension.set_thread_order(order)
        found.append(layer_norm(x))
    torch.testing.assert_close(found[0], F.layer_norm(x, (200,)))
    assert all(torch.equal(found[0], other) for other in found[1:])
    with pytest.raises(TypeError):
        extension.set_thread_order(-1)


def test_kernels_started_from_several_threads_take_turns(extension: Any) -> None:
    x = [torch.randn(4, 96) for _ in range(8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(layer_norm, x))
    for value, y in zip(x, found, strict=True):
        torch.testing.assert_close(y, F.layer_norm(value, (96,)))
