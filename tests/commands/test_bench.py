"""`mmfast bench`: what it writes, how it compares, and that it stops where there is no GPU."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmfast import cli
from mmfast.benchmarks import _harness, _results
from mmfast.benchmarks._harness import Options, Record, Spec
from mmfast.commands import bench

SPEC = Spec("layer_norm", "mmfast", "forward", (10, 20), "fp32")


def test_command_appends_a_row_a_measurement(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    line = [sys.executable, "-m", "mmfast.cli", "bench", "registration", "--quick", "--device", "cpu"]
    # The bound on host time is a benchmark of its own; here a busy machine may break it and the rows still come.
    # pytest-benchmark does not measure where it finds itself beside other workers.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run([*line, "--csv", str(path)], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode in (0, 1), done.stderr
    assert f"rows appended to {path}" in done.stdout
    _results.append(path, _results.rows([Record(SPEC, times=[1.0])], None, Options()))
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    ways = {"F.layer_norm", "autograd.Function", "define/impl", "custom_op", "mmfast.ops.layer_norm"}
    assert {row["provider"] for row in rows if row["op"] == "registration"} == ways
    assert len(rows) == 1 + 2 * len(ways) + 1  # the copy, each way in two modes, and the row appended afterwards
    assert all(0 < float(row["p20_us"]) <= float(row["median_us"]) <= float(row["p80_us"]) for row in rows)
    assert {row["torch"] for row in rows} == {torch.__version__}
    (share,) = {row["copy_percent"] for row in rows if row["op"] == "copy"}
    assert share == "100.0"


def test_row_holds_bandwidth_and_its_share_of_the_copy() -> None:
    copy = Record(Spec("copy", "torch", "forward", (1,), "int8"), times=[1e-3] * 3, moved=4_000_000)
    record = Record(SPEC, times=[4e-6, 1e-6, 2e-6, 3e-6, 5e-6], moved=6000, images=3)
    row = _results.rows([record], copy, Options())[1]
    assert row["median_us"] == "3.000"
    assert (row["p20_us"], row["p80_us"]) == ("1.800", "4.200")
    assert row["gb_per_s"] == "2.0"  # 6000 B in 3 us
    assert row["copy_percent"] == "50.0"  # of 4 GB/s
    assert row["images_per_s"] == "1000000.0"
    assert row["rounds"] == "5"


def test_a_file_with_other_columns_is_not_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "old.csv"
    path.write_text("op,time\nx,1\n")
    with pytest.raises(ValueError, match="other columns"):
        _results.append(path, _results.rows([Record(SPEC, times=[1.0])], None, Options()))
    assert path.read_text() == "op,time\nx,1\n"


def test_passes_are_outermost_and_providers_alternate() -> None:
    found = list(_harness.specs("op", Options(passes=2), (((4,), "fp32"),), ("forward",), ("eager", "mmfast")))
    assert [(spec.provider, number) for spec, number in found] == [
        ("eager", 0),
        ("mmfast", 0),
        ("eager", 1),
        ("mmfast", 1),
    ]


def test_peers_are_chosen_by_name() -> None:
    names = ("eager", "compile", "mmfast", "liger")
    assert Options(peers=("liger",)).providers(names) == ["mmfast", "liger"]
    assert Options(quick=True).providers(names) == ["eager", "mmfast", "liger"]
    assert Options(device="cuda", quick=True).providers(names) == list(names)


def test_a_wrong_answer_is_not_timed() -> None:
    right = torch.randn(8)
    _harness.check_same(right + 1e-6, right, torch.float32, "x")
    with pytest.raises(ValueError, match="peer: result 0 is off by"):
        _harness.check_same(right * 1.01, right, torch.float32, "peer")
    with pytest.raises(ValueError, match="off by nan"):
        _harness.check_same(right * float("nan"), right, torch.float32, "peer")


@pytest.mark.parametrize("mode", ["forward", "backward", "forward+backward"])
def test_each_mode_times_what_it_says(mode: str) -> None:
    ran: list[str] = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ran.append("forward")
            return 3 * x

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            ran.append("backward")
            return 3 * grads[0]

    call = _harness.call_of(mode, Watched.apply, (torch.randn(2, requires_grad=mode != "forward"),))
    ran.clear()
    call()
    assert ran == mode.split("+")


def _spin(steps: int) -> Callable[[], float]:
    x = torch.ones(64)
    return lambda: sum(float(x.sum()) for _ in range(steps))


def test_interleaved_ratio_sees_which_is_faster() -> None:
    assert _harness.interleaved_ratio(_spin(40), _spin(10), seconds=0.2) > 2
    assert _harness.interleaved_ratio(_spin(10), _spin(40), seconds=0.2) < 0.5


def test_results_are_named_by_device_and_date(tmp_path: Path) -> None:
    parser = __import__("argparse").ArgumentParser()
    bench.add_arguments(parser)
    (path,) = bench._csv_paths(parser.parse_args(["--results", str(tmp_path)]), "cpu")
    assert path.parent == tmp_path
    assert path.stem[-10:].count("-") == 2
    assert path.stem == path.stem.lower()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["bench", "verify"])
def test_device_cuda_without_a_gpu_stops_early(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--device", "cuda"]) == 2
    assert "--device cuda: torch finds no GPU" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("target", ["gpu-check", "gpu-bench"])
def test_gpu_commands_stop_early_without_a_gpu(target: str) -> None:
    root = Path(__file__).parents[2]
    if not (root / "Makefile").exists():
        pytest.skip("not in a checkout")
    done = subprocess.run(["make", target, f"PYTHON={sys.executable}"], cwd=root, capture_output=True, text=True)
    assert done.returncode != 0
    assert "finds no GPU (nothing was run)" in done.stderr + done.stdout
    assert "installing" not in done.stdout
