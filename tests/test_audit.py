"""The kernels as they ship: no spills, shared memory within the limit, 16-byte loads and stores.

A few configurations of each kernel for one architecture; `mmfast audit` compiles them all for three.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections import Counter

import pytest

pytest.importorskip("triton")

from mmfast import cli
from mmfast.commands import _sass, audit

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") == "1", reason="interpreted kernels cannot be compiled"
)

QUICK = (
    ("layer_norm", "forward[bf16-768]"),
    ("layer_norm", "backward[bf16-768]"),
    ("layer_norm", "backward[fp32-8192]"),
    ("layer_norm", "forward[bf16-72]"),
    ("layer_norm", "wide backward[bf16-12288]"),
    ("add_layer_norm", "forward[bf16-768]"),
    ("add_layer_norm", "backward[bf16-768]"),
    ("add_layer_norm", "backward[fp32-4096]"),
    ("add_layer_norm", "backward, no scale[fp32-8192]"),
    ("common", "column_sums[fp32-3x8192]"),
    ("attention", "forward[bf16-257x257x64]"),
    ("attention", "forward[bf16-577x577x64]"),
    ("attention", "backward[bf16-257x257x64]"),
    ("attention_varlen", "forward[bf16-160x64]"),
    ("attention_maps", "probabilities[bf16-197x64]"),
    ("patch_embed", "forward[bf16-P16-768]"),
    ("linear_act", "backward gelu[bf16-3072]"),
    ("clip_loss", "forward 128, sm_90[bf16-512]"),
    ("clip_loss", "backward, block 128, sm_90[bf16-512]"),
    ("clip_loss", "backward, owned rows, sm_90[bf16-256]"),
    ("siglip_loss", "forward and backward, sm_90[bf16-768]"),
    ("noise_mse", "forward[bf16-64x4x64x64]"),
    ("noise_mse", "backward, one seed, v, all options[bf16-64x3x256x256]"),
    ("noise_like", "forward[fp32-64x3x64x64]"),
    ("q_sample", "forward, epsilon[bf16-64x3x64x64]"),
    ("q_sample", "forward, channels_last latents[bf16-64x4x64x64]"),
    ("q_step", "forward[bf16-64x3x64x64]"),
    ("ddpm_step", "forward, clipped, seeds[bf16-64x3x256x256]"),
    ("ddim_step", "forward, guided, duplicated[bf16-64x4x64x64]"),
)


WITHOUT_BACKWARD = ("attention_maps", "noise_like", "ddpm_step", "ddim_step")
"""Ops whose gradients are PyTorch's own, or that have none."""


@pytest.mark.parametrize(("op", "label"), QUICK, ids=[f"{op} {label}" for op, label in QUICK])
def test_shipped_configuration(op: str, label: str) -> None:
    result = audit.compile_one(audit.Task(op, label, 90))
    assert result.problems == ()
    assert result.spills == 0
    assert 16 <= result.registers <= 255
    assert result.registers * result.threads <= 65536
    assert result.shared <= audit.SHARED_LIMIT[90]
    assert result.loads[128] > 0 or op == "noise_like"  # which reads nothing


@pytest.mark.parametrize("arch", [80, 100])
def test_other_architectures_compile(arch: int) -> None:
    result = audit.compile_one(audit.Task("layer_norm", "backward[bf16-768]", arch))
    assert result.problems == ()


def test_every_kernel_and_dtype_has_a_configuration() -> None:
    from mmfast import kernels

    found = audit.configurations()
    for op in kernels.NAMES:
        for dtype in ("fp32", "fp16", "bf16"):
            labels = [label for o, label in found if o == op and f"[{dtype}-" in label]
            assert labels, f"{op} {dtype}"
            if op not in WITHOUT_BACKWARD:
                assert any("forward" in label for label in labels), f"{op} {dtype}"
                assert any("backward" in label for label in labels), f"{op} {dtype}"
    audited = {compilation.kernel.fn.__name__ for compilation in found.values()}
    assert audited >= {"column_sums_kernel", "wide_forward_kernel", "wide_weight_gradient_kernel"}


def test_arguments_are_those_of_the_kernel() -> None:
    for (op, label), compilation in audit.configurations().items():
        given = set(compilation.arguments) | set(compilation.constants)
        assert given == set(compilation.kernel.arg_names), f"{op} {label}"


def test_narrow_loads_are_found() -> None:
    """Rows that start anywhere cannot be read 16 bytes at a time: the audit sees it."""
    shipped = audit.configurations()["layer_norm", "forward, strided[bf16-768]"]
    audit.configurations()["layer_norm", "unaligned"] = dataclasses.replace(shipped, divisible=())
    try:
        result = audit.compile_one(audit.Task("layer_norm", "unaligned", 90))
    finally:
        del audit.configurations()["layer_norm", "unaligned"]
    assert result.loads[16] > 0


def test_noise_made_several_times_is_found() -> None:
    """Where a chunk's four elements are not in one thread, each of them computes Philox anew."""
    label = "forward, channels_last, any size[bf16-64x3x15x15]"
    shipped = audit.configurations()["q_sample", label]
    assert shipped.normals is None
    audit.configurations()["q_sample", "declared"] = dataclasses.replace(shipped, normals=8.0)
    try:
        result = audit.compile_one(audit.Task("q_sample", "declared", 90))
    finally:
        del audit.configurations()["q_sample", "declared"]
    assert [problem.partition(" for ")[2] for problem in result.problems] == ["8 normals a thread"]


def test_spills_are_found() -> None:
    """A row of 32768 columns in 4 warps does not fit in registers."""
    shipped = audit.configurations()["layer_norm", "forward[fp32-8192]"]
    constants = {**shipped.constants, "C": 32768, "BLOCK_C": 32768}
    audit.configurations()["layer_norm", "huge"] = dataclasses.replace(shipped, constants=constants, num_warps=4)
    try:
        result = audit.compile_one(audit.Task("layer_norm", "huge", 90))
    finally:
        del audit.configurations()["layer_norm", "huge"]
    assert result.spills > 0
    assert any("spills" in problem for problem in result.problems)


def test_widths_of_instructions() -> None:
    code = "LDG.E.128 R4, [R2.64] ; LDG.E.U16 R4, ; @P0 LDG.E R1 ; LDG.E.64.CONSTANT R2 ; LDG.E.ENL2.256 R8"
    assert _sass.loads(code) == Counter({128: 1, 16: 1, 32: 1, 64: 1, 256: 1})


def test_command_reports_and_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = [audit.Task("layer_norm", "forward[bf16-768]", 90), audit.Task("layer_norm", "forward[fp32-768]", 90)]
    monkeypatch.setattr(audit, "all_tasks", lambda ops, arches: iter(tasks))
    assert cli.main(["audit", "layer_norm", "--arch", "90"]) == 0
    assert "2 configurations, 0 with a problem" in capsys.readouterr().out
    monkeypatch.setitem(audit.SHARED_LIMIT, 90, 1)
    assert cli.main(["audit", "layer_norm", "--arch", "90"]) == 1
    assert "shared memory" in capsys.readouterr().out


def test_command_leaves_the_interpreter() -> None:
    """With TRITON_INTERPRET=1 set the command compiles all the same, in a process of its own."""
    code = (
        "import sys; from mmfast.commands import audit; from mmfast import cli;"
        "audit.run_again = lambda *args, **environment: print(args, environment) or 7;"
        "sys.exit(cli.main(['audit', 'layer_norm', '--arch', '90']))"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 7
    assert "'TRITON_INTERPRET': '0'" in done.stdout
