"""Shared fixtures: the device, poisoned memory, and what a run without a GPU skips."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

import mmfast.cuda
from mmfast.commands import _grading
from mmfast.commands._torchvision import declare_torchvision_ops
from tests.interpreter import prepare_once_a_launch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
EMULATED = bool(os.environ.get("MMFAST_EXTENSION"))

declare_torchvision_ops()
if INTERPRETED:
    prepare_once_a_launch()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="device that the tests run on")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no GPU")
    if EMULATED:
        if not mmfast.cuda.emulated():  # else every test of it would be skipped, or fail one by one
            raise pytest.UsageError(f"MMFAST_EXTENSION: {mmfast.cuda.missing() or 'not an emulated build'}")
        if "MMFAST_THREAD_ORDER" in os.environ:
            mmfast.cuda.extension().set_thread_order(int(os.environ["MMFAST_THREAD_ORDER"]))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this run has no GPU or interpreter for, and say so."""
    on_gpu = config.getoption("--device") == "cuda"
    for item in items:
        cuda = item.get_closest_marker("cuda")
        alone = item.get_closest_marker("bf16") and not cuda
        if (item.get_closest_marker("gpu") or alone) and not on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU: make gpu-check"))
        elif item.get_closest_marker("triton") and not (on_gpu or INTERPRETED):
            item.add_marker(pytest.mark.skip(reason="runs under TRITON_INTERPRET=1, in a process of its own"))
        elif cuda and not (on_gpu or EMULATED):
            item.add_marker(pytest.mark.skip(reason="runs with an emulated build, in a process of its own: make test"))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device of this run."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """One seed a test, and one thread: these tensors are too small for more."""
    # torch.manual_seed notes the stack for devices that are not there: two milliseconds.
    (torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed)(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill every fresh `torch.empty` with NaN, so that an element that a kernel leaves unwritten shows."""
    with _grading.poisoned():
        yield


@pytest.fixture
def wide_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, which runs programs one by one, sum columns in blocks of 512 instead of 32."""
    if INTERPRETED:
        from mmfast.kernels import _common

        monkeypatch.setitem(_common.COLUMN_SUMS, "BLOCK_C", 512)
