"""The feed-forward modules on `mmfast.ops.linear_act`: when they use it, when not, and that the answer is the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import mmfast
from mmfast import nn as mnn
from mmfast.nn import mlp as mlp_module
from mmfast.nn.activation import KNOWN_ACTIVATIONS, linear_then, plain_activation, plain_linear

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

MODULES: dict[str, Callable[[], nn.Module]] = {
    "gelu": lambda: mnn.Mlp(8, 12),
    "gelu_tanh": lambda: mnn.Mlp(8, 12, act_layer=mnn.get_act_layer("gelu_tanh")),
    "quick_gelu": lambda: mnn.Mlp(8, 12, act_layer=mnn.QuickGELU),
    "relu": lambda: mnn.Mlp(8, 12, act_layer=nn.ReLU, bias=False),
    "silu": lambda: mnn.Mlp(8, 12, 5, act_layer=nn.SiLU, norm_layer=nn.LayerNorm),
    "swiglu": lambda: mnn.SwiGLUPacked(8, 12),
    "geglu": lambda: mnn.GluMlp(8, 12, act_layer=nn.GELU),
    "GEGLU": lambda: mnn.GEGLU(8, 12),
}
UNFUSED: dict[str, Callable[[], nn.Module]] = {
    "sigmoid gate": lambda: mnn.GluMlp(8, 12),
    "gelu gate first": lambda: mnn.GluMlp(8, 12, act_layer=nn.GELU, gate_last=False),
    "silu gate last": lambda: mnn.GluMlp(8, 12, act_layer=nn.SiLU),
    "tanh": lambda: mnn.Mlp(8, 12, act_layer=nn.Tanh),
    "separate layers": lambda: mnn.SwiGLU(8, 12),
}


def steps(module: Any, x: Tensor) -> Tensor:
    """What the module computes, in PyTorch's own ops."""
    if isinstance(module, mnn.GEGLU):
        first, gate = F.linear(x, module.proj.weight, module.proj.bias).chunk(2, -1)
        return first * F.gelu(gate)
    h = F.linear(x, module.fc1.weight, module.fc1.bias)
    if isinstance(module, mnn.GluMlp):
        first, second = h.chunk(2, -1)
        h = first * module.act(second) if module.gate_last else module.act(first) * second
    else:
        h = module.act(h)
    return module.fc2(module.norm(h))


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The activations of the calls of `linear_act`."""
    from mmfast.nn import activation

    names: list[str] = []
    op = activation.linear_act

    def watch(*args: Any, activation: str) -> Tensor:
        names.append(activation)
        return op(*args, activation=activation)

    monkeypatch.setattr(activation, "linear_act", watch)
    return names


@pytest.mark.parametrize("name", MODULES)
def test_on_a_cpu_the_ops_are_pytorchs(name: str, fused: list[str]) -> None:
    """With nothing forced: the same bits as the steps, forward and backward, and no op."""
    module, x = MODULES[name](), torch.randn(2, 3, 8, requires_grad=True)
    found, wanted = module(x), steps(module, x)
    assert torch.equal(found, wanted)
    seed = torch.randn_like(wanted)
    inputs = [x, *module.parameters()]
    for got, want in zip(
        torch.autograd.grad(found, inputs, seed), torch.autograd.grad(wanted, inputs, seed), strict=True
    ):
        assert torch.equal(got, want)
    assert fused == []


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.triton)])
@pytest.mark.parametrize("name", MODULES)
def test_fused(name: str, backend: str, fused: list[str], device: torch.device) -> None:
    module, x = MODULES[name]().to(device), torch.randn(2, 3, 8, device=device, requires_grad=True)
    inputs = [x, *module.parameters()]
    with mmfast.backend(backend):
        y = module(x)
        found = torch.autograd.grad(y.square().sum(), inputs)
    assert fused == [name.lower()]
    wanted = steps(module, x)
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    for got, want in zip(found, torch.autograd.grad(wanted.square().sum(), inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", UNFUSED)
def test_what_the_op_lacks_is_not_fused(name: str, fused: list[str]) -> None:
    module, x = UNFUSED[name](), torch.randn(2, 3, 8)
    wanted = module(x)
    with mmfast.backend("torch"):
        assert torch.equal(module(x), wanted)
    assert fused == []


class Lora(nn.Linear):
    """A user's subclass."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1.0


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def _subclass(mlp: Any) -> None:
    mlp.fc1.__class__ = Lora


def _own_forward(mlp: Any) -> None:
    mlp.act.forward = lambda x: x + 3.0


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a forward hook of fc1": lambda mlp: mlp.fc1.register_forward_hook(lambda module, args, y: y + 1.0),
    "a pre-hook of fc1": lambda mlp: mlp.fc1.register_forward_pre_hook(lambda module, args: (args[0] + 1.0,)),
    "a hook of the activation": lambda mlp: mlp.act.register_forward_hook(lambda module, args, y: y * 2),
    "a forward of its own": _own_forward,
    "a subclass": _subclass,
    "a parametrized weight": lambda mlp: parametrize.register_parametrization(mlp.fc1, "weight", Double()),
    "another activation": lambda mlp: setattr(mlp, "act", nn.Hardswish()),
    "another linear layer": lambda mlp: setattr(mlp, "fc1", nn.Sequential(mlp.fc1, Double())),
    "pruning": lambda mlp: nn.utils.prune.random_unstructured(mlp.fc1, "weight", 0.5),  # type: ignore[attr-defined]
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_modules_are_called(change: str, fused: list[str]) -> None:
    import torch.nn.utils.prune

    module, x = mnn.Mlp(8, 12), torch.randn(2, 3, 8)
    before = module(x)
    CHANGES[change](module)
    wanted = module.fc2(module.act(module.fc1(x)))
    with mmfast.backend("torch"):
        assert torch.equal(module(x), wanted)
    assert not torch.equal(wanted, before)
    assert fused == []


def test_global_hooks_are_called(fused: list[str]) -> None:
    module, x, called = mnn.Mlp(8, 12), torch.randn(2, 8), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: called.append(type(m).__name__))
    try:
        with mmfast.backend("torch"):
            module(x)
    finally:
        handle.remove()
    assert called[:2] == ["Linear", "GELU"]
    assert fused == []


def test_what_the_op_does_not_take_is_the_modules_to_refuse(fused: list[str]) -> None:
    """PyTorch's own messages; and under autocast mixtures of dtypes are taken."""
    module = mnn.Mlp(8, 12)
    with mmfast.backend("torch"):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            module(torch.randn(2, 9))
        with pytest.raises(RuntimeError, match="dtype"):
            module(torch.randn(2, 8).double())
        assert fused == []
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = module(torch.randn(2, 8).bfloat16())
    assert fused == ["gelu"]
    assert y.dtype == torch.bfloat16


def test_a_tracer_sees_the_modules() -> None:
    module, x = mnn.Mlp(8, 12), torch.randn(2, 8)
    graph = torch.fx.symbolic_trace(module)
    assert [n.target for n in graph.graph.nodes if n.op == "call_module"][:2] == ["fc1", "act"]
    assert torch.equal(graph(x), module(x))


@pytest.mark.parametrize("name", ["gelu", "swiglu", "GEGLU"])
@pytest.mark.parametrize("forced", [None, "torch"])
def test_compiles_in_one_graph(name: str, forced: str | None) -> None:
    module, x = MODULES[name](), torch.randn(2, 3, 8)
    wanted = module(x)
    with mmfast.backend(forced):
        torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), wanted)


def test_dropout_draws_the_same_numbers() -> None:
    module, x = mnn.Mlp(8, 12, drop=0.5), torch.randn(4, 8)
    torch.manual_seed(3)
    wanted = module(x)
    torch.manual_seed(3)
    with mmfast.backend("torch"):
        assert torch.equal(module(x), wanted)


def test_geglu_has_diffusers_parameters_and_order() -> None:
    module = mnn.GEGLU(1, 1, bias=False)
    assert [*mnn.GEGLU(8, 12).state_dict()] == ["proj.weight", "proj.bias"]
    assert mnn.GEGLU(8, 12).proj.weight.shape == (24, 8)
    assert module.proj.bias is None
    with torch.no_grad():
        module.proj.weight.copy_(torch.tensor([[2.0], [3.0]]))
    wanted = 2.0 * F.gelu(torch.tensor(3.0))
    torch.testing.assert_close(module(torch.ones(1)), wanted[None])


def test_plain_activation() -> None:
    assert plain_activation(nn.GELU()) == "gelu"
    assert plain_activation(nn.GELU(approximate="tanh")) == "gelu_tanh"
    assert plain_activation(mnn.QuickGELU()) == "quick_gelu"
    assert plain_activation(nn.ReLU(inplace=True)) == "relu"
    assert plain_activation(nn.SiLU()) == "silu"
    assert plain_activation(nn.Sigmoid()) is None
    assert plain_activation(None) is None
    hooked = nn.GELU()
    handle = hooked.register_full_backward_hook(lambda *args: None)
    assert plain_activation(hooked) is None
    handle.remove()
    assert plain_activation(hooked) == "gelu"
    x = torch.linspace(-4, 4, 33)
    for cls in KNOWN_ACTIVATIONS:
        module = cls()
        wanted = mmfast.ops.linear_act(x[:, None], torch.ones(1, 1), activation=plain_activation(module))  # type: ignore[arg-type]
        torch.testing.assert_close(module(x), wanted[:, 0])


def test_plain_linear() -> None:
    layer = nn.Linear(3, 4)
    assert plain_linear(layer)
    assert not plain_linear(None)
    assert not plain_linear(Lora(3, 4))
    hooked = copy.deepcopy(layer)
    hooked.register_forward_pre_hook(lambda module, args: None)
    assert not plain_linear(hooked)


def test_linear_then_on_a_cpu_leaves_it_to_the_modules() -> None:
    assert linear_then(nn.Linear(3, 4), nn.GELU(), torch.randn(2, 3)) is None
    with mmfast.backend("torch"):
        assert linear_then(nn.Linear(3, 4), nn.GELU(), torch.randn(2, 3)) is not None
        assert linear_then(nn.Linear(3, 4), nn.GELU(), torch.randn(2, 3), gate_last=False) is None


def test_explain_names_the_op() -> None:
    said = mmfast.explain(mnn.Mlp(8, 12), torch.randn(2, 8))
    assert [choice.op for choice in said] == ["linear_act"]


def test_names() -> None:
    assert mlp_module.GEGLU is mnn.GEGLU
    assert "GEGLU" in mnn.__all__
