"""`mmfast verify`: passes what is right, and fails what is wrong, unwritten or not the same twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmfast import cli, ops
from mmfast.commands import _grading
from mmfast.reference._case import Case


def _case() -> Case:
    return Case("3x5", lambda: ((torch.randn(3, 5), torch.randn(5), torch.randn(5)), {}))


def _wrong(change: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> _grading.Grade:
    right = ops.layer_norm

    def op(x: Tensor, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
        return change(right(x, weight, bias, eps))

    monkeypatch.setattr(ops, "layer_norm", op)
    return _grading.grade("layer_norm", _case(), torch.float32, "torch")


def test_a_right_op_passes() -> None:
    grade = _grading.grade("layer_norm", _case(), torch.float32, "torch")
    assert grade.passed
    assert 0 < grade.error < 1e-6


@pytest.mark.parametrize(
    ("change", "note"),
    [
        pytest.param(lambda y: y * 1.0001, "error above 2x", id="off by 1e-4"),
        pytest.param(lambda y: y + torch.empty(1), "error above 2x", id="unwritten memory"),
        pytest.param(lambda y: y + 1e-7 * torch.rand(()), "differs between two runs", id="not deterministic"),
        pytest.param(lambda y: y[:, :4], "another shape", id="shape"),
    ],
)
def test_a_wrong_op_fails(change: Any, note: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grade = _wrong(change, monkeypatch)
    assert not grade.passed
    assert note in grade.note


def test_a_wrong_gradient_fails_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, bias: Tensor) -> Tensor:
            return bias.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return 2 * grads[0]

    right = ops.layer_norm
    monkeypatch.setattr(
        ops, "layer_norm", lambda x, weight=None, bias=None, eps=1e-5: right(x, weight, Doubled.apply(bias), eps)
    )
    grade = _grading.grade("layer_norm", _case(), torch.float32, "torch")
    assert not grade.passed
    assert grade.tensor == "d bias"
    assert grade.error == pytest.approx(1.0)


def test_poisoned_memory_is_nan_and_is_put_back() -> None:
    before = torch.empty
    with _grading.poisoned():
        assert torch.empty(3).isnan().all()
        assert torch.empty_like(torch.ones(2)).isnan().all()
        assert torch.empty(3, dtype=torch.int32).shape == (3,)
    assert torch.empty is before


def test_command_runs_the_kernels_in_the_interpreter(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In a process of its own, since Triton reads the variable when kernels are imported."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert cli.main(["verify", "layer_norm", "--device", "cpu", "--dtype", "float32", "--json"]) == 0
    grades = json.loads(capfd.readouterr().out)
    assert {grade["backend"] for grade in grades} == {"triton"}
    assert {"2x3x768", "5x197 plain"} <= {grade["case"] for grade in grades}
    assert all(grade["passed"] for grade in grades)


def test_command_fails_when_an_op_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(ops, "layer_norm", lambda x, weight=None, bias=None, eps=1e-5: x + 0 * x.sum())
    monkeypatch.setattr(_grading, "outputs_and_gradients", lambda fn, case, dtype=None: {"output": fn(case.args[0])})
    assert cli.main(["verify", "layer_norm", "--backend", "torch", "--device", "cpu", "--dtype", "float32"]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_a_kernel_that_raises_is_a_failed_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raises(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("out of registers")

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(ops, "layer_norm", raises)
    line = ["verify", "layer_norm", "--backend", "torch", "--device", "cpu", "--dtype", "float32", "--json"]
    assert cli.main(line) == 1
    grades = json.loads(capsys.readouterr().out)
    assert {grade["note"] for grade in grades} == {"RuntimeError: out of registers"}


@pytest.mark.cuda
def test_an_emulated_build_is_graded_in_bfloat16_too(capsys: pytest.CaptureFixture[str], device: torch.device) -> None:
    line = ["verify", "layer_norm", "--backend", "cuda", "--device", device.type, "--json"]
    assert cli.main(line) == 0
    grades = json.loads(capsys.readouterr().out)
    assert {grade["dtype"] for grade in grades} == {"float32", "float16", "bfloat16"}
    assert {grade["backend"] for grade in grades if "8192" not in grade["note"]} == {"cuda"}


def test_a_backend_that_cannot_run_here_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmfast import cuda

    monkeypatch.setattr(cuda, "_found", None)
    monkeypatch.setattr(cuda, "_missing", "built without nvcc")
    assert cli.main(["verify", "--backend", "cuda", "--device", "cpu"]) == 2
    assert "--backend cuda: built without nvcc" in capsys.readouterr().err
    monkeypatch.setattr(cuda, "_missing", None)
    monkeypatch.setattr(cuda, "_found", SimpleNamespace(emulated=False, architectures="90a"))
    assert cli.main(["verify", "--backend", "cuda", "--device", "cpu"]) == 2
    assert "built for GPUs" in capsys.readouterr().err
