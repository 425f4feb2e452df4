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

from .families import (
    DEPTH,
    DETERMINISTIC,
    FAMILIES,
    assert_close,
    assert_same,
    build,
    fused,
    images,
    logits,
    outcome,
    tolerance,
)

each_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(autouse=True)
def through_the_ops() -> Iterator[None]:
    """By default a CPU tensor takes the original code; these tests are to see the path that a GPU takes."""
    with mmfast.backend("torch"):
        yield


@each_family
def test_every_part_is_swapped(name: str) -> None:
    model = build(name)
    before = mmfast.report(model)
    kinds = {row.type.rpartition(".")[2] for row in before if row.status == "available"}
    mmfast.accelerate(model, strict=True)
    after = mmfast.report(model)
    assert after.counts["accelerated"] + after.counts["fused"] >= before.counts["available"]
    assert "available" not in after.counts
    swapped = Counter(row.op for row in after if row.status == "accelerated")
    norms = sum(row.op in ("layer_norm", "add_layer_norm") and "Norm" in row.type for row in after)
    assert swapped["add_layer_norm"] == swapped["attention"] == DEPTH
    assert swapped["linear_act"] == DEPTH
    assert swapped["patch_embed"] == 1
    assert swapped["layer_norm"] == norms - DEPTH
    assert {type(module).__name__ for module in model.modules() if isinstance(module, nn.LayerNorm)} <= kinds
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            assert type(module).__module__.startswith("mmfast.integrations.")


def expected_ops(name: str, model: nn.Module) -> dict[str, int]:
    """How often each op runs in one forward of the accelerated model."""
    norms = sum(isinstance(m, nn.LayerNorm) for m in model.modules())
    ran = {"add_layer_norm": DEPTH, "layer_norm": norms - DEPTH, "linear_act": DEPTH, "patch_embed": 1}
    return {**ran, FAMILIES[name].attention: DEPTH}


@each_family
def test_ops_run(name: str) -> None:
    model = build(name)
    assert not mmfast.explain(model, images())
    ran = Counter(choice.op for choice in mmfast.explain(mmfast.accelerate(model), images()))
    ran["layer_norm"] -= DEPTH  # on the torch backend add_layer_norm asks layer_norm for its second half
    assert ran == expected_ops(name, model)


@each_family
@pytest.mark.parametrize("op", ["layer_norm", "add_layer_norm", "attention", "patch_embed", "linear_act"])
def test_ops_select_what_is_swapped(name: str, op: str) -> None:
    model = mmfast.accelerate(build(name), ops=op, strict=True)
    rows = mmfast.report(model)
    assert {row.op for row in rows if row.status in ("accelerated", "fused")} == {op}
    ran = {choice.op for choice in mmfast.explain(model, images())}
    assert ran == {FAMILIES[name].attention if op == "attention" else op} | ({"layer_norm"} if "norm" in op else set())


@each_family
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_outputs_and_gradients_equal_the_original(name: str, training: bool, dtype: torch.dtype) -> None:
    original = build(name, dtype).train(training)
    model = mmfast.accelerate(copy.deepcopy(original))
    x = images(dtype=dtype)
    assert_same(outcome(model, x), outcome(original, x), tolerance(name, training, dtype))


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
    if name not in DETERMINISTIC:
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
    paths = fused(model)
    assert len(paths) > 3 * DEPTH
    for path in paths:
        seen: list[Tensor] = []
        for m in (model, original):
            handle = m.get_submodule(path).register_forward_hook(lambda _m, a, y, seen=seen: seen.extend((a[0], y)))
            logits(m, x)
            handle.remove()
        half = len(seen) // 2
        assert half >= 2
        for a, b in zip(seen[:half], seen[half:], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance(name, False, torch.float64))
    model.zero_grad()
    ran = Counter(c.op for c in mmfast.explain(model, x))
    assert {ran[op] for op in ("add_layer_norm", "linear_act")} == {DEPTH}  # the hooks are gone again
    assert ran["patch_embed"] == 1


@each_family
def test_a_hook_that_changes_the_output_is_obeyed(name: str) -> None:
    x = images()
    original = build(name)
    plain = logits(original, x)
    for path in fused(mmfast.accelerate(build(name))):
        model = mmfast.accelerate(build(name))
        handles = [
            m.get_submodule(path).register_forward_hook(lambda _m, _a, y: y * 1.5 + 0.1) for m in (model, original)
        ]
        expected = logits(original, x)
        handles[1].remove()
        assert_close(logits(model, x), expected)
        assert not torch.equal(expected, plain)
        reasons = [row.reason for row in mmfast.report(model) if "fuses nothing now" in row.reason]
        assert reasons, path
        assert all("hooks" in reason for reason in reasons)


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
    assert_close(logits(twin, x), logits(model, x))
    mmfast.restore(twin)
    assert "accelerated" in mmfast.report(model).counts
    assert "accelerated" not in mmfast.report(twin).counts
    assert_close(logits(twin, x), logits(model, x))


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
        torch.testing.assert_close(out if isinstance(out, torch.Tensor) else out.logits, expected, msg=path)
        mmfast.restore(model)
    assert "accelerated" not in mmfast.report(model).counts, path
print("loaded", len(sys.argv) - 1)
"""


@pytest.mark.parametrize(
    "names", [("timm", "torchvision"), pytest.param(tuple(FAMILIES), marks=pytest.mark.slow)], ids=["quick", "all"]
)
def test_a_saved_model_loads_in_a_fresh_process(names: tuple[str, ...], tmp_path: Path) -> None:
    paths = []
    for name in names:
        model, x = mmfast.accelerate(build(name)), images()
        paths.append(str(tmp_path / f"{name}.pt"))
        torch.save((model, x, logits(model, x).detach()), paths[-1])
    done = subprocess.run([sys.executable, "-c", LOADER, *paths], capture_output=True, text=True)
    assert done.stdout.strip().endswith(f"loaded {len(names)}"), done.stderr


@each_family
def test_safetensors_and_state_dict_load_into_the_original(name: str, tmp_path: Path) -> None:
    from safetensors.torch import load_model, save_model

    model, original = mmfast.accelerate(build(name)), FAMILIES[name].build().eval()
    x = images()
    save_model(model, str(tmp_path / "model.safetensors"))
    load_model(original, str(tmp_path / "model.safetensors"))
    assert_close(logits(original, x), logits(model, x))
    fresh = mmfast.accelerate(FAMILIES[name].build().eval())
    assert not fresh.load_state_dict(original.state_dict(), strict=True).missing_keys
    assert_close(logits(fresh, x), logits(model, x))


@each_family
def test_submodules_replaced_after_are_called(name: str) -> None:
    """As peft does: a wrapper takes the place of a submodule that an op stood in for."""

    class Adapter(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        @property
        def weight(self) -> Tensor:
            return self.base.weight  # type: ignore[return-value]

        def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
            return self.base(x, *args, **kwargs) * 1.5 + 0.1

    x = images()
    for path in fused(mmfast.accelerate(build(name))):
        if path.endswith("patch_embeddings"):
            continue  # transformers asks it for its projection
        found = []
        for model in (mmfast.accelerate(build(name)), build(name)):
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, Adapter(model.get_submodule(path)))
            found.append(logits(model, x))
        assert_close(*found)
        rows = [row for row in mmfast.report(mmfast.restore(model)) if "is a Adapter" in row.reason]
        if rows:  # a Sequential without a linear layer and its activation is none of mmfast's
            assert rows[0].status == "skipped"
        else:
            assert isinstance(model.get_submodule(parent), nn.Sequential)


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
    assert_close(logits(models[0], x), expected)
    mmfast.restore(models[0])
    assert type(norms[0]).__bases__ == type(norms[1]).__bases__
    assert_close(logits(models[0], x), expected)
    nn.utils.parametrize.remove_parametrizations(norms[0], "weight")
    assert type(norms[0]) is type(norms[1]).__bases__[0]
    assert_close(logits(models[0], x), expected)


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
    assert_close(logits(models[0], x), logits(models[1], x))
    with pytest.raises(ValueError, match=f"{child} is a Mine"):
        mmfast.accelerate(build_with(name, child, Mine), strict=True)


def build_with(name: str, child: str, cls: type[nn.Module]) -> nn.Module:
    model = build(name)
    setattr(FAMILIES[name].block(model), child, cls(16))
    return model


KERNELS = [
    *((name, False) for name in FAMILIES),
    *((name, True) for name in ("timm-layerscale-droppath", "torchvision", "dinov2")),
]


@pytest.mark.triton
@pytest.mark.parametrize(("name", "training"), KERNELS, ids=[f"{n}-{'train' if t else 'eval'}" for n, t in KERNELS])
def test_triton_kernels_give_the_same_outputs_and_gradients(name: str, training: bool, device: torch.device) -> None:
    original = build(name).to(device).train(training)
    model = mmfast.accelerate(copy.deepcopy(original))
    x = images(2).to(device)
    exact = outcome(copy.deepcopy(original).double(), x.double()) if not training else outcome(original, x)
    got: list[Any] = []
    with mmfast.backend("triton"):
        choices = mmfast.explain(lambda: got.append(outcome(model, x)))
    ran = Counter((choice.op, choice.backend) for choice in choices)
    assert ran == {(op, "triton"): times for op, times in expected_ops(name, model).items()}
    reference = (exact[0].float(), {key: grad.float() for key, grad in exact[1].items()})
    assert_same(got[0], reference, 1e-4)
