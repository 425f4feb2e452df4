"""What `mmfast.accelerate` keeps, for each library: keys, numbers, hooks, copies, files, compilation."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmfast

from .families import DEPTH, FAMILIES, build, images, logits

each_family = pytest.mark.parametrize("name", FAMILIES)
few_families = pytest.mark.parametrize("name", ["timm-layerscale-droppath", "torchvision", "dinov2"])


@pytest.fixture(autouse=True)
def through_the_ops() -> Iterator[None]:
    """By default a CPU tensor takes the original code; these tests are to see the path that a GPU takes."""
    with mmfast.backend("torch"):
        yield


def outcome(model: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and the gradients of all parameters, from one seed."""
    torch.manual_seed(7)
    model.zero_grad()
    out = logits(model, x)
    (out * torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype)).sum().backward()
    return out.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(a: tuple[Tensor, dict[str, Tensor]], b: tuple[Tensor, dict[str, Tensor]], tol: float = 0.0) -> None:
    torch.testing.assert_close(a[0], b[0], rtol=tol, atol=tol)
    assert a[1].keys() == b[1].keys()
    for key in b[1]:
        torch.testing.assert_close(a[1][key], b[1][key], rtol=tol, atol=tol)


@each_family
def test_every_block_and_norm_is_swapped(name: str) -> None:
    model = build(name)
    before = mmfast.report(model)
    kinds = {row.type.rpartition(".")[2] for row in before if row.status == "available"}
    mmfast.accelerate(model, strict=True)
    after = mmfast.report(model)
    assert after.counts["accelerated"] + after.counts["fused"] >= before.counts["available"]
    assert "available" not in after.counts
    blocks = [row for row in after if row.op == "add_layer_norm" and row.status == "accelerated"]
    assert len(blocks) == DEPTH
    assert {type(module).__name__ for module in model.modules() if isinstance(module, nn.LayerNorm)} <= kinds
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            assert type(module).__module__.startswith("mmfast.integrations.")


@each_family
def test_ops_run(name: str) -> None:
    model = build(name)
    assert not mmfast.explain(model, images())
    ran = Counter(choice.op for choice in mmfast.explain(mmfast.accelerate(model), images()))
    # On the torch backend add_layer_norm asks layer_norm for its second half.
    assert ran == {"add_layer_norm": DEPTH, "layer_norm": sum(isinstance(m, nn.LayerNorm) for m in model.modules())}


@each_family
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_outputs_and_gradients_equal_the_original(name: str, training: bool, dtype: torch.dtype) -> None:
    original = build(name, dtype).train(training)
    model = mmfast.accelerate(copy.deepcopy(original))
    x = images(dtype=dtype)
    # DINOv2's own drop path divides before it multiplies by the mask: the last bit may differ.
    exact = not (training and "dinov2" in name)
    assert_same(outcome(model, x), outcome(original, x), 0.0 if exact else 1e-12 if dtype == torch.float64 else 2e-5)


@each_family
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_on_a_cpu_the_original_code_runs(name: str, training: bool) -> None:
    original = build(name).train(training)
    model, x = mmfast.accelerate(copy.deepcopy(original)), images()
    with mmfast.backend(None):
        assert_same(outcome(model, x), outcome(original, x))  # to the last bit, drop path too


@each_family
def test_drop_path_and_dropout_draw_the_same_masks(name: str) -> None:
    original = build(name, torch.float64).train()
    model = mmfast.accelerate(copy.deepcopy(original))
    x = images(64, dtype=torch.float64)
    torch.manual_seed(3)
    expected = logits(original, x)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    torch.testing.assert_close(logits(model, x), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    if name != "timm":  # without any randomness
        assert not torch.equal(logits(model, x), expected)


@each_family
def test_keys_parameters_and_repr_stay(name: str) -> None:
    model = build(name)
    state, text, classes = model.state_dict(keep_vars=True), repr(model), [type(m) for m in model.modules()]
    mmfast.accelerate(model)
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state)
    assert all(after[key] is state[key] for key in state)
    assert repr(model) == text
    assert all(
        isinstance(m, cls) and type(m).__name__ == cls.__name__ for m, cls in zip(model.modules(), classes, strict=True)
    )


@each_family
def test_restore_is_exact(name: str) -> None:
    model = build(name)
    x = images()
    expected = outcome(model, x)
    classes = [type(m) for m in model.modules()]
    members = [dict(m.__dict__) for m in model.modules()]
    mmfast.accelerate(model)
    assert [type(m) for m in model.modules()] != classes
    assert mmfast.restore(model) is model
    assert [type(m) for m in model.modules()] == classes
    for module, before in zip(model.modules(), members, strict=True):
        assert module.__dict__.keys() == before.keys()
        assert all(module.__dict__[key] is before[key] for key in before)
    got = outcome(model, x)
    assert_same(got, expected)


@each_family
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_on_every_submodule_fire_as_often(name: str, when: str) -> None:
    def count(model: nn.Module, accelerate: bool) -> Counter[str]:
        fired: Counter[str] = Counter()
        if accelerate and when == "after":
            mmfast.accelerate(model)
        for path, module in model.named_modules():
            module.register_forward_pre_hook(lambda *a, path=path: fired.update([f"{path} pre"]))
            module.register_forward_hook(lambda *a, path=path: fired.update([f"{path} forward"]))
            module.register_full_backward_hook(lambda *a, path=path: fired.update([f"{path} backward"]))
        if accelerate and when == "before":
            mmfast.accelerate(model)
        logits(model, x).sum().backward()
        return fired

    x = images().requires_grad_()
    original = build(name)
    assert count(copy.deepcopy(original), accelerate=True) == count(original, accelerate=False)


@each_family
def test_a_hook_added_after_sees_what_the_original_gives(name: str) -> None:
    model, original = mmfast.accelerate(build(name, torch.float64)), build(name, torch.float64)
    x = images(dtype=torch.float64)
    for child in FAMILIES[name].bypassed:
        seen: list[Tensor] = []
        for m in (model, original):
            module = FAMILIES[name].block(m)._modules[child]
            handle = module.register_forward_hook(lambda _m, a, y, seen=seen: seen.extend((a[0], y)))
            logits(m, x)
            handle.remove()
        half = len(seen) // 2
        assert half >= 2
        assert all(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:], strict=True))
    assert Counter(c.op for c in mmfast.explain(model, x))["add_layer_norm"] == DEPTH  # the hooks are gone again


@each_family
def test_a_hook_that_changes_the_output_is_obeyed(name: str) -> None:
    model, original = mmfast.accelerate(build(name)), build(name)
    x = images()
    for m in (model, original):
        FAMILIES[name].block(m)._modules[FAMILIES[name].bypassed[0]].register_forward_hook(lambda _m, _a, y: y * 2)
    assert torch.equal(logits(model, x), logits(original, x))
    skipped = [row for row in mmfast.report(model) if "fuses nothing now" in row.reason]
    assert len(skipped) == 1
    assert "hooks" in skipped[0].reason


@each_family
def test_global_hooks_fire_as_often(name: str) -> None:
    fired: list[Counter[str]] = []
    for model in (build(name), mmfast.accelerate(build(name))):
        seen: Counter[str] = Counter()
        handle = nn.modules.module.register_module_forward_hook(
            lambda m, _a, _y, seen=seen: seen.update([type(m).__name__])
        )
        try:
            logits(model, images())
        finally:
            handle.remove()
        fired.append(seen)
    assert fired[0] == fired[1]


@each_family
def test_deepcopy_is_accelerated_and_independent(name: str) -> None:
    model = mmfast.accelerate(build(name))
    twin = copy.deepcopy(model)
    x = images()
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(logits(twin, x), logits(model, x))
    mmfast.restore(twin)
    assert "accelerated" in mmfast.report(model).counts
    assert "accelerated" not in mmfast.report(twin).counts
    assert torch.equal(logits(twin, x), logits(model, x))


LOADER = """
import sys, torch
if not torch.version.cuda:
    library = torch.library.Library("torchvision", "DEF")
    for op in ("nms", "qnms"):
        library.define(op + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
torch.set_num_threads(1)
for path in sys.argv[1:]:
    model, x, expected = torch.load(path, weights_only=False)
    import mmfast
    assert "accelerated" in mmfast.report(model).counts, path
    for _ in range(2):
        out = model(x)
        assert torch.equal(out if isinstance(out, torch.Tensor) else out.logits, expected), path
        mmfast.restore(model)
    assert "accelerated" not in mmfast.report(model).counts, path
print("loaded", len(sys.argv) - 1)
"""


def test_a_saved_model_loads_in_a_fresh_process(tmp_path: Path) -> None:
    paths = []
    for name in FAMILIES:
        model, x = mmfast.accelerate(build(name)), images()
        paths.append(str(tmp_path / f"{name}.pt"))
        torch.save((model, x, logits(model, x).detach()), paths[-1])
    done = subprocess.run([sys.executable, "-c", LOADER, *paths], capture_output=True, text=True)
    assert done.stdout.strip().endswith(f"loaded {len(FAMILIES)}"), done.stderr


@each_family
def test_safetensors_and_state_dict_load_into_the_original(name: str, tmp_path: Path) -> None:
    from safetensors.torch import load_model, save_model

    model, original = mmfast.accelerate(build(name)), FAMILIES[name].build().eval()
    x = images()
    save_model(model, str(tmp_path / "model.safetensors"))
    load_model(original, str(tmp_path / "model.safetensors"))
    assert torch.equal(logits(original, x), logits(model, x))
    fresh = mmfast.accelerate(FAMILIES[name].build().eval())
    assert not fresh.load_state_dict(original.state_dict(), strict=True).missing_keys
    assert torch.equal(logits(fresh, x), logits(model, x))


@pytest.mark.parametrize(
    ("name", "training"),
    [("timm-layerscale-droppath", False), ("timm-layerscale-droppath", True), ("torchvision", True), ("dinov2", True)],
    ids=["timm-eval", "timm-train", "torchvision-train", "dinov2-train"],
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
    calls: list[int] = []
    FAMILIES[name].block(model).mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    x = images(dtype=torch.float64).requires_grad_()
    assert_same(outcome(model, x), outcome(original, x), 1e-12)
    assert len(calls) == 2  # once more in the backward pass


@each_family
def test_submodules_replaced_after_are_called(name: str) -> None:
    """As peft does: a wrapper takes the place of a submodule that the fused op stood in for."""

    class Adapter(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) * 1.5 + 0.1

    x = images()
    for child in FAMILIES[name].bypassed:
        found = []
        for model in (mmfast.accelerate(build(name)), build(name)):
            block = FAMILIES[name].block(model)
            setattr(block, child, Adapter(getattr(block, child)))
            found.append(logits(model, x))
        assert torch.equal(*found)
        row = next(row for row in mmfast.report(mmfast.restore(model)) if "Adapter" in row.reason)
        assert row.status == "skipped"
        assert row.reason == f"{child} is a Adapter"


@each_family
def test_parametrized_norm(name: str) -> None:
    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    x = images()
    models = [mmfast.accelerate(build(name)), build(name)]
    norms = [FAMILIES[name].block(m)._modules[FAMILIES[name].bypassed[0]] for m in models]
    for norm in norms:
        nn.utils.parametrize.register_parametrization(norm, "weight", Double())
    expected = logits(models[1], x)
    assert torch.equal(logits(models[0], x), expected)
    mmfast.restore(models[0])
    assert type(norms[0]).__bases__ == type(norms[1]).__bases__
    assert torch.equal(logits(models[0], x), expected)
    nn.utils.parametrize.remove_parametrizations(norms[0], "weight")
    assert type(norms[0]) is type(norms[1]).__bases__[0]
    assert torch.equal(logits(models[0], x), expected)


@each_family
def test_a_norm_of_a_user_class_is_left_alone(name: str) -> None:
    class Mine(nn.LayerNorm):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    models = []
    for _ in range(2):
        model = build(name)
        block = FAMILIES[name].block(model)
        child = FAMILIES[name].bypassed[0]
        setattr(block, child, Mine(16))
        models.append(model)
    x = images()
    mmfast.accelerate(models[0])
    assert type(FAMILIES[name].block(models[0])._modules[child]) is Mine
    rows = {row.reason: row for row in mmfast.report(models[0])}
    assert rows["derives from LayerNorm; only exact types are swapped"].status == "unknown"
    assert rows[f"{child} is a Mine"].status == "skipped"
    assert torch.equal(logits(models[0], x), logits(models[1], x))
    with pytest.raises(ValueError, match=f"{child} is a Mine"):
        mmfast.accelerate(build_with(name, child, Mine), strict=True)


def build_with(name: str, child: str, cls: type[nn.Module]) -> nn.Module:
    model = build(name)
    setattr(FAMILIES[name].block(model), child, cls(16))
    return model


@each_family
def test_autocast(name: str) -> None:
    model, original = mmfast.accelerate(build(name)), build(name)
    x = images()
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = logits(model, x), logits(original, x)
    exact = logits(original, x)
    assert got.dtype == expected.dtype
    assert (got - exact).abs().max() <= 2 * (expected - exact).abs().max() + 1e-2


@pytest.mark.triton
@each_family
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_triton_kernels_give_the_same_outputs_and_gradients(name: str, training: bool, device: torch.device) -> None:
    original = build(name).to(device).train(training)
    model = mmfast.accelerate(copy.deepcopy(original))
    x = images(2).to(device)
    exact = outcome(copy.deepcopy(original).double(), x.double()) if not training else outcome(original, x)
    with mmfast.backend("triton"):
        ran = Counter((choice.op, choice.backend) for choice in mmfast.explain(copy.deepcopy(model), x))
        got = outcome(model, x)
    norms = sum(isinstance(m, nn.LayerNorm) for m in model.modules())
    assert ran == {("add_layer_norm", "triton"): DEPTH, ("layer_norm", "triton"): norms - DEPTH}
    reference = (exact[0].float(), {key: grad.float() for key, grad in exact[1].items()})
    assert_same(got, reference, 1e-4)
