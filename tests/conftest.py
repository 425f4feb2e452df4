"""Shared fixtures: the device, poisoned memory, and what a run without a GPU skips."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from mmfast.commands import _grading
from mmfast.commands._torchvision import declare_torchvision_ops

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

declare_torchvision_ops()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="device that the tests run on")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no GPU")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this run has no GPU or interpreter for, and say so."""
    on_gpu = config.getoption("--device") == "cuda"
    for item in items:
        if item.get_closest_marker("gpu") and not on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU: make gpu-check"))
        elif item.get_closest_marker("triton") and not (on_gpu or INTERPRETED):
            item.add_marker(pytest.mark.skip(reason="runs under TRITON_INTERPRET=1, in a process of its own"))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device of this run."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """One seed a test, and one thread: these tensors are too small for more."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill every fresh `torch.empty` with NaN, so that an element that a kernel leaves unwritten shows."""
    with _grading.poisoned():
        yield
