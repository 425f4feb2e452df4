"""torch.compile, torch.export, torch.jit.trace, torch.func, checkpointing and autocast of accelerated models."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import mmfast

from .families import FAMILIES, assert_same, build, images, logits, outcome

each_family = pytest.mark.parametrize("name", FAMILIES)
few_families = pytest.mark.parametrize("name", ["timm-layerscale-droppath", "torchvision", "open_clip", "dinov2"])


@pytest.fixture(autouse=True)
def through_the_ops() -> Iterator[None]:
    """By default a CPU tensor takes the original code; these tests are to see the path that a GPU takes."""
    with mmfast.backend("torch"):
        yield


@pytest.mark.parametrize(
    ("name", "training"),
    [
        pytest.param("timm", False, marks=pytest.mark.slow),
        ("timm-layerscale-droppath", True),
        ("torchvision", True),
        ("open_clip", True),
        pytest.param("open_clip-custom", False, marks=pytest.mark.slow),
        pytest.param("vit", False, marks=pytest.mark.slow),
        ("dinov2-registers", True),
    ],
)
def test_compiled_without_graph_breaks_equals_eager(name: str, training: bool) -> None:
    torch._dynamo.reset()
    model = mmfast.accelerate(build(name, torch.float64)).train(training)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = images(dtype=torch.float64)
    assert_same(
        (outcome(compiled, x)[0], {n: p.grad for n, p in model.named_parameters() if p.grad is not None}),
        outcome(model, x),
        1e-12,
    )


@pytest.mark.parametrize(
    ("name", "strict"),
    [
        ("timm-layerscale-droppath", True),
        ("timm-layerscale-droppath", False),
        ("torchvision", False),
        ("dinov2", False),
    ],
    ids=["timm-strict", "timm", "torchvision", "dinov2"],
)
def test_export(name: str, strict: bool) -> None:
    model = mmfast.accelerate(build(name))
    x = images()
    program = torch.export.export(model, (x,), strict=strict)
    torch.testing.assert_close(logits(program.module(), x), logits(model, x))


@few_families
def test_jit_trace(name: str) -> None:
    class Logits(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return logits(self.model, x)

    model = Logits(mmfast.accelerate(build(name)))
    x = images()
    torch.testing.assert_close(torch.jit.trace(model, (x,), check_trace=False)(x), model(x))


@few_families
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of PyTorch's own attention under vmap
def test_gradients_of_each_sample(name: str) -> None:
    model, original = mmfast.accelerate(build(name, torch.float64)), build(name, torch.float64)
    x = images(dtype=torch.float64)

    def gradients(m: nn.Module) -> dict[str, Tensor]:
        def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
            out = torch.func.functional_call(m, parameters, (image[None],))
            return (out if isinstance(out, Tensor) else out.logits).square().sum()

        return torch.func.vmap(torch.func.grad(loss), (None, 0))(dict(m.named_parameters()), x)

    found, expected = gradients(model), gradients(original)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-10, atol=1e-10)


@each_family
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    original = build(name, torch.float64).train()
    model = mmfast.accelerate(copy.deepcopy(original))
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    elif hasattr(model, "gradient_checkpointing_enable"):  # transformers 4
        model.gradient_checkpointing_enable()
    elif hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing()
    else:
        pytest.skip("the library has no checkpointing")
    if name == "open_clip-custom":
        pytest.skip("open_clip gives its custom blocks arguments that they do not take")
    calls: list[int] = []
    FAMILIES[name].block(model).mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    x = images(dtype=torch.float64).requires_grad_()
    assert_same(outcome(model, x), outcome(original, x), 1e-12)
    assert len(calls) == 2  # once more in the backward pass


@each_family
def test_autocast(name: str) -> None:
    model, original = mmfast.accelerate(build(name)), build(name)
    x = images()
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = logits(model, x), logits(original, x)
    exact = logits(original, x)
    assert got.dtype == expected.dtype
    assert (got - exact).abs().max() <= 2 * (expected - exact).abs().max() + 1e-2
