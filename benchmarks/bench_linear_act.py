"""`linear_act` beside a linear layer and an activation, each an op of its own, the same compiled, and cuBLASLt's own.

A shape is (rows, K, rows of the weight); "forward" is inference, the other modes are training. "mmfast" is what users
get, and the row names what served; "mmfast epilogue" and "mmfast pass" are the two ways that it may take, and the K
from which the second is faster is what `EPILOGUE_DEPTH` in mmfast/ops/linear_act.py should be (for gated activations
three quarters of it). A row's limit is its FLOPs at the rate of a large product, or its bytes at that of a copy.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from mmfast import explain, nn, ops
from mmfast.benchmarks import _harness
from mmfast.benchmarks._harness import DTYPES, MODES, Options, Shapes, Spec, Unavailable

op = importlib.import_module("mmfast.ops.linear_act")  # the name is also the function's

# fc1 of ViT-B and L at batch 256, of ViT-B at batch 1, of ViT-S and H; feed-forwards of Stable Diffusion's U-Net at
# batch 16, of DINOv2 g and of CLIP.
GPU_SHAPES: dict[str, Shapes] = {
    "gelu": (
        ((50432, 768, 3072), "bf16"),
        ((65792, 1024, 4096), "bf16"),
        ((197, 768, 3072), "bf16"),
        ((50432, 384, 1536), "bf16"),
        ((65792, 1280, 5120), "bf16"),
        ((1576, 768, 3072), "bf16"),
        ((50432, 768, 3072), "fp32"),
    ),
    "geglu": (((65536, 320, 2560), "bf16"), ((16384, 640, 5120), "bf16"), ((4096, 1280, 10240), "bf16")),
    "quick_gelu": (((65792, 1024, 4096), "bf16"),),
    "gelu_tanh": (((50432, 768, 3072), "bf16"),),
    "swiglu": (((65792, 1536, 8192), "bf16"),),
}
CPU_SHAPES: dict[str, Shapes] = {"gelu": (((394, 192, 768), "fp32"),), "geglu": (((256, 64, 512), "fp32"),)}


def eager(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    return op.linear_act_torch(x, weight, bias, activation)


def mmfast(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    return ops.linear_act(x, weight, bias, activation=activation)


def planned(plan: str) -> Callable[..., Tensor]:
    """The op by one of its two plans, whatever its rule says, and not by the library's epilogue."""

    def call(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
        with mock.patch.object(op, "_plan", return_value=(plan, "")):
            return torch.ops.mmfast.linear_act.default(x, weight, bias, activation)

    return call


def library(spec: Spec) -> Callable[..., Tensor]:
    if spec.mode != "forward" or spec.op.split()[1] not in ("relu", "gelu_tanh"):
        raise Unavailable("addmm_activation: relu and gelu_tanh, for inference, are what it has")
    return op.library_epilogue


PROVIDERS: dict[str, Callable[[Spec], Callable[..., Tensor]]] = {
    "eager": lambda spec: eager,
    "compile": lambda spec: _harness.compiled(eager),
    "addmm_activation": library,
    "mmfast": lambda spec: mmfast,
    "mmfast+compile": lambda spec: _harness.compiled(mmfast),
    "mmfast epilogue": lambda spec: planned("epilogue"),
    "mmfast pass": lambda spec: planned("pass"),
}


def measurements(options: Options) -> Iterator[tuple[Spec, int]]:
    on_gpu = options.device == "cuda"
    for activation, shapes in (GPU_SHAPES if on_gpu else CPU_SHAPES).items():
        names = ["eager", "compile", "mmfast", "mmfast+compile"]
        if on_gpu:
            names += ["mmfast epilogue", "mmfast pass"] + (["addmm_activation"] if activation == "gelu_tanh" else [])
        own = ("mmfast", "mmfast epilogue", "mmfast pass")
        chosen = options.providers(names, own)
        for spec, number in _harness.specs(
            f"linear_act {activation}", options, shapes[: 1 if options.quick else None], MODES, names
        ):
            if spec.provider in chosen:
                yield spec, number
    yield from _harness.specs("linear_act gelu", options, (((4, 16, 32), "fp32"),), ("host",), names[:4])


def test_linear_act(spec: Spec, pass_number: int, options: Options, measure: Callable[..., None]) -> None:
    activation = spec.op.split()[1]
    fn = PROVIDERS[spec.provider](spec)
    rows, depth, width = spec.shape
    x, weight = (_harness.randn(shape, spec, options.device) for shape in ((rows, depth), (width, depth)))
    with torch.no_grad():
        weight *= depth**-0.5
    args = (x, weight, _harness.randn((width,), spec, options.device), activation)
    call = _harness.call_of(spec.mode, fn, args)
    if pass_number == 0:
        _harness.check_same(call(), _harness.call_of(spec.mode, eager, args)(), DTYPES[spec.dtype], spec.provider)
    passes = {"forward": (False,), "backward": (True,), "forward+backward": (False, True)}.get(spec.mode, ())
    needs = [op.cost(x, weight, activation=activation, backward=backward) for backward in passes]
    moved, flops = (sum(need[name] for need in needs) for name in ("bytes", "flops"))
    measure(call, moved=moved, flops=flops, backend=_backend(spec, args))


def _backend(spec: Spec, args: tuple[Any, ...]) -> str:
    """What serves mmfast's own rows: PyTorch, or the Triton kernel, or cuBLAS and a pass."""
    if spec.provider != "mmfast":
        return ""
    with torch.set_grad_enabled(spec.mode != "forward"):
        (choice,) = explain(mmfast, *args)
    if choice.backend == "torch":
        return "addmm_activation" if op.LIBRARY in choice.reason else "torch"
    return op._plan(*spec.shape[:2], DTYPES[spec.dtype].itemsize, args[3])[0]


@pytest.mark.parametrize("name", ["Mlp", "SwiGLUPacked"])
@pytest.mark.parametrize("mode", ["forward", "training"])
def test_module_is_never_slower_than_its_steps_on_a_cpu(name: str, mode: str) -> None:
    """The modules beside the calls that they replace, of the same layers: a ratio of at least 0.97."""
    module = getattr(nn, name)(192, 768)
    x = torch.randn(2, 197, 192, requires_grad=True)
    grad = torch.randn_like(x)

    def steps(x: Tensor) -> Tensor:
        hidden = module.fc1(x)
        if name == "Mlp":
            hidden = module.act(hidden)
        else:
            first, second = hidden.chunk(2, dim=-1)
            hidden = module.act(first) * second
        return module.drop2(module.fc2(module.norm(module.drop1(hidden))))

    def run(fn: Callable[[Tensor], Tensor]) -> None:
        if mode == "training":
            fn(x).backward(grad)
            return
        with torch.no_grad():
            fn(x)

    with _harness.one_thread():
        ratio = _harness.interleaved_ratio(lambda: run(steps), lambda: run(module))
    assert ratio >= 0.97, f"the steps take {ratio:.3f} of the time of {name}"
