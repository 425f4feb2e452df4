"""`import mmfast` in fresh processes: light, and possible without a GPU and without Triton."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.fresh import run

HIDE_TRITON = "import sys; sys.modules['triton'] = None\n"
RUN_AN_OP = """
import torch, mmfast
x = torch.randn(3, 8, requires_grad=True)
y = mmfast.ops.layer_norm(x, torch.ones(8), torch.zeros(8))
torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (8,)))
mmfast.ops.add_layer_norm(y, x, scale=torch.ones(8))[0].sum().backward()
assert x.grad is not None
print(mmfast.explain(mmfast.ops.layer_norm, x))
"""


def test_without_a_gpu() -> None:
    assert "layer_norm: torch (cuda: CPU tensor: CUDA needs a GPU; triton: CPU tensor: Triton needs a GPU)" in run(
        RUN_AN_OP, CUDA_VISIBLE_DEVICES="", MMFAST_BACKEND="", TRITON_INTERPRET="0"
    )


def test_with_triton_hidden() -> None:
    assert "triton: triton is not installed)" in run(HIDE_TRITON + RUN_AN_OP, MMFAST_BACKEND="")


def test_forcing_triton_where_it_is_hidden_says_why() -> None:
    code = HIDE_TRITON + (
        "import torch, mmfast\n"
        "try:\n    mmfast.ops.layer_norm(torch.ones(2, 2))\n"
        "except mmfast.BackendError as error:\n    print(error)\n"
    )
    found = run(code, MMFAST_BACKEND="triton")
    assert found.strip() == ("layer_norm: backend 'triton' is forced and cannot serve: triton: triton is not installed")


def test_import_touches_no_driver_triton_or_submodule() -> None:
    code = (
        "import sys, torch, mmfast\n"
        "assert 'triton' not in sys.modules and not torch.cuda.is_initialized()\n"
        "print([name for name in sys.modules if name.startswith('mmfast')])\n"
        "mmfast.ops; mmfast.nn; mmfast.models; mmfast.backend\n"
        "assert 'triton' not in sys.modules and not torch.cuda.is_initialized()\n"
        "assert 'torch._dynamo' not in sys.modules and 'rich' not in sys.modules\n"
    )
    assert run(code).strip() == "['mmfast']"


def test_unknown_attribute() -> None:
    code = "import mmfast\ntry:\n    mmfast.nothing\nexcept AttributeError as error:\n    print(error)\n"
    assert "has no attribute 'nothing'" in run(code)


def test_wrong_environment_variable_says_what_is_possible() -> None:
    code = "import mmfast\ntry:\n    mmfast.backend\nexcept ValueError as error:\n    print(error)\n"
    assert "expected one of cuda, triton, torch, got 'tritn'" in run(code, MMFAST_BACKEND="tritn")


@pytest.mark.timing
def test_import_adds_under_half_a_second_to_torch() -> None:
    """Everything that `import mmfast` and the first use of ops, nn, models and accelerate bring in."""
    code = (
        "import torch, time\n"
        "start = time.perf_counter()\n"
        "import mmfast\n"
        "mmfast.ops, mmfast.nn, mmfast.models, mmfast.accelerate\n"
        "print(time.perf_counter() - start)\n"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, check=True) for _ in range(3)]
    assert min(float(done.stdout) for done in runs) < 0.5


def test_the_folder_of_kernels_imports_as_kernels() -> None:
    """transformers and diffusers import a package of that name where they find one: from our root, our folder."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    assert run(f"import sys; sys.path.insert(0, {root!r}); import kernels; print(kernels.NAMES[0])") == "layer_norm\n"
