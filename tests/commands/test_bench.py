"""`mmfast bench`: what it writes, how it compares, and that it stops where there is no GPU."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmfast import cli
from mmfast.benchmarks import _harness, _limits, _results, conftest
from mmfast.benchmarks._harness import Options, Record, Spec
from mmfast.benchmarks._limits import Limits
from mmfast.commands import bench

SPEC = Spec("layer_norm", "mmfast", "forward", (10, 20), "fp32")
PART = "attention_qkv forward 2x3x197x64 fp32 eager"


def rows_of(*records: Record, limits: Limits | None = None) -> list[dict[str, str]]:
    return _results.rows(records, limits or Limits(Options()), Options())


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_command_appends_a_row_a_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of one benchmark all, of another the part that `--only` names; and the limits, once."""
    path = tmp_path / "results.csv"
    # pytest-benchmark does not measure where it finds itself beside other workers.
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        monkeypatch.delenv(name)
    line = ["bench", "registration", "attention_qkv", "--quick", "--device", "cpu", "--csv", str(path)]
    assert cli.main([*line, "--only", "registration", "--only", PART]) == 0
    assert f"rows appended to {path}" in capfd.readouterr().out
    _results.append(path, rows_of(Record(SPEC, times=[1.0])))
    rows = read(path)
    ways = {"F.layer_norm", "autograd.Function", "define/impl", "custom_op", "mmfast.ops.layer_norm"}
    assert {row["provider"] for row in rows if row["op"] == "registration"} == ways
    assert sorted(row["op"] for row in rows) == sorted(
        ["copy", "matmul", *["registration"] * 2 * len(ways), "attention_qkv", "layer_norm"]
    )
    assert all(0 < float(row["p20_us"]) <= float(row["median_us"]) <= float(row["p80_us"]) for row in rows)
    assert {row["torch"] for row in rows} == {torch.__version__}
    by_op = {row["op"]: row for row in rows}
    assert by_op["copy"]["copy_percent"] == "100.0"
    assert by_op["matmul"]["matmul_percent"] == "100.0"
    part = by_op["attention_qkv"]
    assert (part["provider"], part["backend"]) == ("eager", "flash_for_cpu")
    rate = 4 * 2 * 3 * 197**2 * 64 / float(part["median_us"]) / 1e6
    assert float(part["tflop_per_s"]) == pytest.approx(rate, rel=1e-3)


def test_row_holds_bandwidth_and_its_share_of_the_copy() -> None:
    copy = Record(Spec("copy", "torch", "forward", (1,), "int8"), times=[1e-3] * 3, moved=4_000_000)
    record = Record(SPEC, times=[4e-6, 1e-6, 2e-6, 3e-6, 5e-6], moved=6000, images=3)
    (row,) = rows_of(record, limits=Limits(Options(), copy))
    assert row["median_us"] == "3.000"
    assert (row["p20_us"], row["p80_us"]) == ("1.800", "4.200")
    assert row["gb_per_s"] == "2.0"  # 6000 B in 3 us
    assert row["copy_percent"] == "50.0"  # of 4 GB/s
    assert row["images_per_s"] == "1000000.0"
    assert row["rounds"] == "5"


def test_row_holds_flops_beside_the_limits_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_results._machine, "device_name", lambda device: "NVIDIA H200")
    copy = Record(Spec("copy", "torch", "forward", (1,), "int8"), times=[1.0], moved=4 * 10**12)
    product = Record(Spec("matmul", "torch", "forward", (1, 1, 1), "bf16"), times=[1.0], flops=700 * 10**12)
    limits = Limits(Options(), copy, {"bf16": product})
    spec = Spec("attention", "eager", "forward", (1,), "bf16")
    record = Record(spec, times=[20e-6], moved=8 * 10**6, flops=7 * 10**9, backend="cudnn")
    (row,) = rows_of(record, limits=limits)
    assert row["tflop_per_s"] == "350"
    assert row["matmul_percent"] == "50.0"
    assert row["peak_percent"] == "35.4"  # of the data sheet's 989
    assert (row["limit_us"], row["limit_percent"]) == ("10.000", "50.0")  # the products take longer than the bytes
    assert row["backend"] == "cudnn"
    record.moved *= 6
    assert rows_of(record, limits=limits)[0]["limit_us"] == "12.000"  # now the bytes do
    record.limit = 16e-6
    assert rows_of(record, limits=limits)[0]["limit_percent"] == "80.0"
    record.spec = Spec("attention", "eager", "forward", (1,), "fp32")  # whose product was not measured
    assert rows_of(record, limits=limits)[0]["matmul_percent"] == ""


def test_noise_that_is_made_is_held_against_the_generator_alone() -> None:
    copy = Record(Spec("copy", "torch", "forward", (1,), "int8"), times=[1.0], moved=4 * 10**12)
    noise = Record(Spec("philox", "mmfast", "forward", (1,), "fp32"), times=[2.0, 1.0, 1.0], normals=10**12)
    limits = Limits(Options(), copy, noise=noise)
    record = Record(SPEC, times=[20e-6], moved=8 * 10**6, normals=5 * 10**6)
    (row,) = rows_of(record, limits=limits)
    assert (row["limit_us"], row["limit_percent"]) == ("5.000", "25.0")  # 2 us of memory
    record.moved *= 4
    assert rows_of(record, limits=limits)[0]["limit_us"] == "8.000"
    assert limits.records == [copy, noise]
    assert _limits.normals_rate(Options()) is None  # on a CPU


@pytest.mark.gpu
def test_rate_of_the_generator_alone() -> None:
    """Between what PyTorch's generator does, which also writes, and what the multiplications alone would allow."""
    record = _limits.normals_rate(Options(device="cuda"))
    assert record is not None
    rate = record.normals / min(record.times)
    assert 1e10 < rate < 1e13


def test_limits_are_measured_once_a_run_and_are_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setattr(_limits, "copy_bandwidth", lambda options: ran.append("copy") or Record(SPEC, times=[1.0]))
    monkeypatch.setattr(_limits, "product_rate", lambda dtype, options: ran.append(dtype) or Record(SPEC, times=[1.0]))
    limits = Limits(Options())
    for flops, dtype in ((0, "fp32"), (1, "bf16"), (1, "bf16"), (1, "fp32")):
        limits.measure(Record(Spec("op", "eager", "forward", (1,), dtype), flops=flops))
    assert ran == ["copy", "bf16", "fp32"]
    assert len(limits.records) == 3


def test_product_rate_counts_multiplications_and_additions() -> None:
    record = _limits.product_rate("fp32", Options(quick=True))
    assert record.flops == 2 * 256**3
    assert len(record.times) == 10
    assert _limits.flops_rate(record) > 0


@pytest.mark.parametrize(
    ("name", "flops"), [("NVIDIA H200", 989e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", None)]
)
def test_data_sheet_is_found_by_name(name: str, flops: float | None) -> None:
    found = _limits.sheet(name)
    assert (found and found.flops) == flops


def test_a_file_with_other_columns_is_not_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "old.csv"
    path.write_text("op,time\nx,1\n")
    with pytest.raises(ValueError, match="other columns"):
        _results.append(path, rows_of(Record(SPEC, times=[1.0])))
    assert path.read_text() == "op,time\nx,1\n"


def test_a_file_of_an_earlier_version_gets_the_new_columns(tmp_path: Path) -> None:
    path = tmp_path / "old.csv"
    earlier = _results.COLUMNS[: _results.COLUMNS.index("date") + 1]
    path.write_text(f"{','.join(earlier)}\n{','.join(f'{name}-1' for name in earlier)}\n")
    _results.append(path, rows_of(Record(SPEC, times=[1.0], backend="triton")))
    before, added = read(path)
    assert tuple(before) == _results.COLUMNS
    assert all(before[name] == f"{name}-1" for name in earlier)
    assert before["backend"] == ""
    assert added["backend"] == "triton"
    assert list(tmp_path.iterdir()) == [path]


def test_committed_results_can_be_appended_to(tmp_path: Path) -> None:
    committed = sorted((bench.folder() / "results").glob("*.csv"))
    if not committed:
        pytest.skip("an installed copy has no results")
    for path in committed:
        copied = tmp_path / path.name
        copied.write_bytes(path.read_bytes())
        _results.append(copied, rows_of(Record(SPEC, times=[1.0])))
        assert len(read(copied)) == len(read(path)) + 1


def test_rows_are_written_a_group_at_a_time_and_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    state = conftest.Run(Options(), [path], None)
    for shape in ((1,), (2,)):
        for provider in ("eager", "mmfast"):
            spec = Spec("op", provider, "forward", shape, "fp32")
            state.records[spec] = Record(spec, times=[1.0])
        state.write()
        assert read(path)[-1]["shape"] == str(shape[0])
    state.write()
    assert [row["provider"] for row in read(path)] == ["eager", "mmfast"] * 2


class Item:
    """A test as the order of a run sees it."""

    def __init__(self, path: str, spec: Spec | None) -> None:
        self.path, self.callspec = Path(path), SimpleNamespace(params={"spec": spec} if spec else {})


def test_files_take_turns_when_there_is_a_budget() -> None:
    def of(path: str, shapes: str) -> list[Any]:
        return [
            Item(path, Spec(path, provider, "forward", (int(shape),), "fp32"))
            for shape in shapes
            for provider in ("eager", "mmfast")
        ]

    order = conftest.in_turn([*of("a", "123"), *of("b", "45"), Item("b", None), *of("c", "6")])
    found = [f"{item.path}{spec.shape[0]}" if (spec := conftest.spec_of(item)) else "bound" for item in order]
    assert found == ["a1", "a1", "b4", "b4", "c6", "c6", "a2", "a2", "b5", "b5", "a3", "a3", "bound"]


def test_a_group_is_finished_and_none_is_begun_when_time_is_up() -> None:
    state = conftest.Run(Options(), [], 60.0)
    state.enter(("op", "forward", (1,), "fp32"))
    state.started -= 61
    state.enter(("op", "forward", (1,), "fp32"))
    with pytest.raises(pytest.skip.Exception, match="op forward 2x3 bf16: no time left"):
        state.enter(("op", "forward", (2, 3), "bf16"))
    state.enter(None)  # a bound on time is no measurement


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
def test_gpu_commands_stop_early_without_a_gpu() -> None:
    """Both wait for the check that finds none: in one run that keeps going, neither begins."""
    root = Path(__file__).parents[2]
    if not (root / "Makefile").exists():
        pytest.skip("not in a checkout")
    line = ["make", "--keep-going", "gpu-check", "gpu-bench", f"PYTHON={sys.executable}"]
    done = subprocess.run(line, cwd=root, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    assert done.returncode != 0
    assert (done.stderr + done.stdout).count("finds no GPU (nothing was run)") == 1
    for target in ("gpu-check", "gpu-bench"):
        assert re.search(f"Target .{target}. not remade because of errors", done.stderr)
    assert "installing" not in done.stdout


def test_predictions_follow_from_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """LayerNorm of 50432 x 768 moves 155 MB: 36.7 us at 88 % of 4.8 TB/s, and 2 to start."""
    path = tmp_path / "predicted.csv"
    assert cli.main(["bench", "--predict", "--csv", str(path)]) == 0
    assert "not measured" in capsys.readouterr().out
    with path.open() as file:
        rows = list(csv.DictReader(file))
    first = next(r for r in rows if (r["op"], r["mode"], r["shape"]) == ("layer_norm", "forward", "50432x768"))
    assert int(first["bytes"]) == 2 * 2 * 50432 * 768
    assert (first["predicted_us"], first["bound_by"]) == ("38.7", "memory")
    # mma.sync has two thirds of the rate of the instructions that Triton takes: enough up to 257 keys, forward.
    bound = {r["shape"]: r["bound_by"] for r in rows if (r["op"], r["mode"]) == ("attention", "forward")}
    assert bound["256x12x197x64"] == bound["256x16x257x64"] == "memory"
    assert bound["64x16x577x64"] == "tensor cores"


def test_the_committed_prediction_is_the_models() -> None:
    from mmfast.benchmarks import _predicted

    with (bench.folder() / "predicted-h200.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows == [list(_predicted.Prediction._fields), *([str(v) for v in row] for row in _predicted.predictions())]
