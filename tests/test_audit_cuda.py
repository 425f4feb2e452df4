"""What `mmfast audit --cuda` finds in machine code, of kernels made for it and of the extension where nvcc built it."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from mmfast import cli
from mmfast.commands import _audit_cuda, _sass
from mmfast.commands._audit_cuda import Kernel, readable

ROOT = Path(__file__).resolve().parent.parent
NVCC = runpy.run_path(str(ROOT / "csrc" / "build.py"))["find_nvcc"]()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
SOURCE = """
#include <cuda_fp16.h>
namespace {
template <class T, int N>
__global__ void __launch_bounds__(256) copy_kernel(const uint4* x, uint4* y) { y[threadIdx.x] = x[threadIdx.x]; }
__global__ void __launch_bounds__(256) narrow_kernel(const float* x, uint4* y) {
    y[threadIdx.x] = make_uint4(__float_as_uint(x[threadIdx.x]), 0, 0, 0);
}
template <bool STORED>
__global__ void __launch_bounds__(1024, 2) spill_kernel(const uint4* x, uint4* y) {
    uint4 all[16];
    for (int i = 0; i < 16; ++i) all[i] = x[i * 1024 + threadIdx.x];
    __syncthreads();
    for (int i = 0; i < 16; ++i) y[i * 1024 + threadIdx.x] = all[15 - i];
}
__global__ void __launch_bounds__(32) frame_kernel(const uint4* x, uint4* y, int n) {
    uint4 all[32];
    for (int i = 0; i < 32; ++i) all[i] = x[i];
    for (int i = 0; i < 32; ++i) y[i] = all[i * n & 31];
}
__global__ void boundless_kernel(const uint4* x, uint4* y) { y[threadIdx.x] = x[threadIdx.x]; }
__global__ void __launch_bounds__(32) column_sums_kernel(const float* x, float* y) { *y = x[0] + x[1]; }
}
extern "C" void start(uint4* p) {
    copy_kernel<__half, 8><<<1, 1>>>(p, p);
    narrow_kernel<<<1, 1>>>(nullptr, p);
    spill_kernel<true><<<1, 1>>>(p, p);
    frame_kernel<<<1, 1>>>(p, p, 3);
    boundless_kernel<<<1, 1>>>(p, p);
    column_sums_kernel<<<1, 1>>>(nullptr, nullptr);
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kernels with each of the faults, and without."""
    folder = tmp_path_factory.mktemp("audited")
    (folder / "faults.cu").write_text(SOURCE)
    line = [NVCC, "-std=c++20", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-Xcompiler=-fPIC", "-shared"]
    subprocess.run([*line, "-o", folder / "faults.so", folder / "faults.cu"], check=True, capture_output=True)
    return folder / "faults.so"


@needs_nvcc
def test_each_fault_is_found(library: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {kernel.name: kernel for kernel in _audit_cuda.kernels(library)}
    assert set(found) == {
        "copy_kernel<__half, 8>",
        "narrow_kernel",
        "spill_kernel<true>",
        "frame_kernel",
        "boundless_kernel",
        "column_sums_kernel",
    }
    good = found["copy_kernel<__half, 8>"]
    assert (good.arch, good.threads, good.spills, good.problems) == ("90a", 256, 0, [])
    assert (good.loads, good.stores) == ({128: 1}, {128: 1})
    assert 4 <= good.registers <= 32
    assert found["narrow_kernel"].problems == ["no 128-bit loads"]
    assert found["spill_kernel<true>"].registers == 32  # 65536 of 2048 threads
    assert found["spill_kernel<true>"].spills > 0
    assert found["frame_kernel"].spills >= 128
    for name in ("spill_kernel<true>", "frame_kernel"):
        assert [problem.partition(" ")[0] for problem in found[name].problems] == ["spills"]
    assert found["boundless_kernel"].problems == ["no launch bounds"]
    assert found["column_sums_kernel"].problems == []
    assert cli.main(["audit", "--cuda", "--extension", str(library)]) == 1
    said = capsys.readouterr().out
    assert "sm_90a: 6 CUDA C++ kernels, 4 with a problem" in said
    assert re.search(r"at most \d+ registers \(frame_kernel\)", said)
    assert cli.main(["audit", "copy", "--cuda", "--extension", str(library)]) == 0
    assert "1 CUDA C++ kernels, 0 with a problem" in capsys.readouterr().out
    assert cli.main(["audit", "--cuda", "--arch", "80", "--extension", str(library)]) == 2
    unread = {kernel.name: kernel for kernel in _audit_cuda.kernels(library, {"90"}, set())}
    assert unread["narrow_kernel"][-3:] == (None, None, None)
    assert unread["narrow_kernel"].problems == []  # its loads were not read, but a stack frame is known without
    assert unread["frame_kernel"].problems


def test_readable_names() -> None:
    assert readable("_Z25layer_norm_forward_kernelI6__halfLi8ELi4ELi1EEv11ForwardArgs") == (
        "layer_norm_forward_kernel<__half, 8, 4, 1>"
    )
    inner = "_ZN36_GLOBAL__N__a1e05b9f_4_t_cu_8658dfc013narrow_kernelIfLb1EEEvPKT_PS1_"
    assert readable(inner) == "narrow_kernel<float, true>"
    layout = "_ZN7samples19reverse_step_kernelINS_4StepE13__nv_bfloat16LNS_6LayoutE3EEEvv"
    assert readable(layout) == "reverse_step_kernel<Step, __nv_bfloat16, Layout(3)>"
    nested = "_Z23q_sample_forward_kernelI13__nv_bfloat16LN7samples6LayoutE3EEvv"
    assert readable(nested) == "q_sample_forward_kernel<__nv_bfloat16, Layout(3)>"
    twice = "_Z6kernelI6__halfS0_Evv"
    assert readable(twice) == twice  # a type by its number: beyond the rules
    assert readable("kernel") == "kernel"


def test_what_must_move_vectors() -> None:
    def problems(name: str) -> list[str]:
        some = _sass.loads("LDG.E R1 ;")
        return Kernel(name, "90a", 32, 128, 0, 0, some, some, _sass.tensor_instructions("")).problems

    both = ["no 128-bit loads", "no 128-bit stores"]
    assert problems("layer_norm_forward_kernel<float, 4, 2, 1>") == both
    assert problems("layer_norm_forward_kernel<float, 1, 2, 1>") == []
    assert problems("q_sample_forward_kernel<__half, Layout(2)>") == both
    assert problems("q_sample_forward_kernel<__half, Layout(3)>") == []
    assert problems("noise_like_forward_kernel<float, Layout(0)>") == both[1:]
    assert problems("attention_forward_kernel<64, __half>") == both
    assert problems("a_new_kernel") == both


def test_registers_of_a_block_that_no_multiprocessor_has() -> None:
    kernel = Kernel("column_sums_kernel", "80", 122, 544, 0, 0, *[_sass.loads("")] * 2, _sass.tensor_instructions(""))
    assert kernel.problems == ["122 registers x 544 threads > 65536"]  # 128 are taken for each
    assert kernel._replace(threads=512).problems == []


def test_why_there_is_nothing_to_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    emulated = tmp_path / "_cuda.so"
    emulated.write_bytes(b"\x7fELF")
    monkeypatch.setenv("MMFAST_EXTENSION", str(emulated))
    assert cli.main(["audit", "--cuda"]) == 2
    assert "not audited:" in capsys.readouterr().out
    assert "was not built by nvcc" in _audit_cuda.find()[1]
    monkeypatch.setenv("MMFAST_EXTENSION", str(tmp_path / "none.so"))
    assert "none.so is not a file" in _audit_cuda.find()[1]
    monkeypatch.setenv("MMFAST_EXTENSION", "")
    monkeypatch.setattr(_audit_cuda, "find_spec", lambda name: None)
    assert "built without nvcc" in _audit_cuda.find()[1]
    with pytest.raises(ValueError, match="--extension must be a file, got 'nothing'"):
        _audit_cuda.find("nothing")


@pytest.mark.slow
@needs_nvcc
def test_the_extension_passes(capsys: pytest.CaptureFixture[str]) -> None:
    """As `make test` does before the tests, of the objects that it left."""
    line = [sys.executable, str(ROOT / "csrc" / "build.py"), "cuda"]
    built = subprocess.run(line, check=True, capture_output=True, text=True).stdout.split()[-1]
    assert cli.main(["audit", "--cuda", "--extension", built]) == 0, capsys.readouterr().out
    said = capsys.readouterr().out
    assert "sm_80" in said
    assert "sm_90" in said
