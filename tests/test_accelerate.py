"""`mmfast.accelerate`, `report`, `restore`, `accelerated` on models of torch.nn alone."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

import mmfast
from mmfast.integrations import Accelerated
from tests.fresh import run


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU())
        self.norm = nn.LayerNorm(8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.inner(x))


def norms(model: nn.Module) -> list[bool]:
    return [isinstance(m, Accelerated) for m in model.modules() if isinstance(m, nn.LayerNorm)]


@pytest.mark.parametrize(
    "code",
    [
        "import mmfast; mmfast.restore; accelerate = mmfast.accelerate; accelerate(m)\n"
        "from mmfast.accelerate import accelerate, Report",
        "from mmfast.accelerate import accelerate; import mmfast",
        "import mmfast; mmfast.accelerate(m)\nfrom mmfast import accelerate, Report, report, restore, accelerated",
    ],
    ids=["attribute first", "module first", "from mmfast"],
)
def test_function_and_module_share_a_name(code: str) -> None:
    check = (
        "import sys, torch; m = torch.nn.Sequential(torch.nn.LayerNorm(4))\n"
        f"{code}\n"
        "import mmfast.accelerate\n"
        "assert accelerate(m) is m and mmfast.accelerate(m) is m and mmfast.accelerate.accelerate(m) is m\n"
        "assert mmfast.report(m).counts == {'accelerated': 1, 'unknown': 1}\n"
        "assert not {'timm', 'torchvision', 'transformers'} & set(sys.modules)\n"  # never imported for the user
        "print('done')"
    )
    assert run(check).strip() == "done"


@pytest.mark.parametrize("call", ["accelerate", "report", "restore"])
def test_not_a_module(call: str) -> None:
    with pytest.raises(TypeError, match=f"{call}: model must be a torch.nn.Module, got int"):
        getattr(mmfast, call)(3)


@pytest.mark.parametrize(
    ("ops", "message"),
    [
        (
            ["layer_norm", "mlp"],
            "ops must be 'auto' or some of 'layer_norm', 'add_layer_norm', 'attention', 'patch_embed', 'linear_act', "
            "got 'mlp'",
        ),
        ("norm", "got 'norm'"),
        ([], "got none"),
    ],
    ids=["one unknown", "string", "empty"],
)
def test_unknown_ops(ops: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mmfast.accelerate(Net(), ops=ops)  # type: ignore[arg-type]


def test_parts_that_an_op_stands_in_for() -> None:
    model = nn.ModuleDict(
        {
            "attn": nn.MultiheadAttention(8, 2),
            "mlp": nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)),
            "other": nn.Sequential(nn.Linear(8, 8), nn.Tanh()),
        }
    )
    available = {row.name: (row.op, row.status) for row in mmfast.report(model) if row.op}
    assert available == {"attn": ("attention", "available"), "mlp": ("linear_act", "available")}
    mmfast.accelerate(model)
    rows = {row.name: (row.op, row.status, row.reason) for row in mmfast.report(model) if row.op}
    part = "part of the module it is in"
    assert rows == {
        "attn": ("attention", "accelerated", "mmfast.integrations.torch_nn.MultiheadAttention"),
        "mlp": ("linear_act", "accelerated", "mmfast.integrations.torch_nn.Sequential"),
        "mlp.0": ("linear_act", "fused", part),
        "mlp.1": ("linear_act", "fused", part),
    }
    handle = model["mlp"][1].register_forward_hook(lambda *_: None)
    rows = {row.name: row.reason for row in mmfast.report(model) if row.op}
    reason = "which fuses nothing now: 1 has hooks or a forward of its own"
    assert rows["mlp"] == f"mmfast.integrations.torch_nn.Sequential, {reason}"
    assert "mlp.1" not in rows
    handle.remove()
    assert [type(m) for m in mmfast.restore(model).values()] == [nn.MultiheadAttention, nn.Sequential, nn.Sequential]


@pytest.mark.parametrize(("ops", "expected"), [("auto", True), ("layer_norm", True), (["add_layer_norm"], False)])
def test_ops_limit_what_is_swapped(ops: object, expected: bool) -> None:
    assert norms(mmfast.accelerate(Net(), ops=ops)) == [expected] * 2  # type: ignore[arg-type]


def test_report_says_what_and_why() -> None:
    class Mine(nn.LayerNorm):
        pass

    model = nn.Sequential(
        nn.LayerNorm(8),
        nn.LayerNorm((2, 8)),
        nn.LayerNorm(8, eps=0.0),
        Mine(8),
        nn.Linear(8, 8),
        mmfast.nn.LayerNorm(8),
        torch.jit.script(nn.LayerNorm(8)),
    )
    patched = nn.LayerNorm(8)
    patched.forward = lambda x: x  # type: ignore[method-assign]
    model.append(patched)
    mmfast.accelerate(model)
    found = [(row.name, row.status, row.op, row.reason) for row in mmfast.report(model)]
    assert found == [
        ("", "unknown", "", "mmfast has no op for this type"),
        ("0", "accelerated", "layer_norm", "mmfast.integrations.torch_nn.LayerNorm"),
        ("1", "skipped", "layer_norm", "normalises over 2 dimensions"),
        ("2", "skipped", "layer_norm", "has eps 0.0, which must be positive"),
        ("3", "unknown", "", "derives from LayerNorm; only exact types are swapped"),
        ("4", "unknown", "", "mmfast has no op for this type"),
        ("5", "native", "", "mmfast's own"),
        ("6", "unknown", "", "TorchScript"),
        ("7", "skipped", "layer_norm", "its forward is replaced on the instance"),
    ]
    report = mmfast.report(model)
    assert report[1].type == "torch.nn.modules.normalization.LayerNorm"
    assert report.rows == tuple(report)
    assert report.counts == {"accelerated": 1, "skipped": 3, "native": 1, "unknown": 4}
    assert report.summary() == "9 modules: 1 accelerated, 3 skipped, 1 native, 4 unknown (1 layer_norm)"


def test_report_prints_equal_blocks_in_one_line() -> None:
    model = nn.Sequential(*(Net() for _ in range(12)))
    lines = str(mmfast.report(mmfast.accelerate(model))).splitlines()
    assert lines[0].split() == ["modules", "count", "type", "status", "op", "reason"]
    assert "0-11.inner.1  12     LayerNorm   accelerated  layer_norm  mmfast.integrations.torch_nn.LayerNorm" in lines
    assert lines[-1] == "73 modules: 24 accelerated, 49 unknown (24 layer_norm)"
    assert "(others)      12     Linear      unknown                  mmfast has no op for this type" in lines
    assert len(lines) == 9
    mmfast.restore(model[3])
    names = {line[0] for line in mmfast.report(model).lines()}
    assert {"0-2,4-11.norm", "3.norm"} <= names


def test_report_renders_with_rich() -> None:
    rich_console = pytest.importorskip("rich.console")
    console = rich_console.Console(width=120, record=True, file=io.StringIO())
    console.print(mmfast.report(mmfast.accelerate(Net())))
    text = console.export_text()
    assert "accelerated" in text
    assert "6 modules" in text


def test_accelerate_twice_and_restore_twice() -> None:
    model = Net()
    members = [dict(m.__dict__) for m in model.modules()]
    mmfast.accelerate(model)
    classes = [type(m) for m in model.modules()]
    assert mmfast.accelerate(model) is model
    assert [type(m) for m in model.modules()] == classes
    mmfast.restore(model)
    mmfast.restore(model)
    assert norms(model) == [False, False]
    assert [m.__dict__ for m in model.modules()] == members


def test_the_model_itself_is_swapped() -> None:
    norm = nn.LayerNorm(8)
    assert mmfast.accelerate(norm) is norm
    assert isinstance(norm, Accelerated)
    assert isinstance(norm, mmfast.nn.LayerNorm)
    assert type(mmfast.restore(norm)) is nn.LayerNorm


def test_strict() -> None:
    ops = "layer_norm, add_layer_norm, attention, patch_embed, linear_act"
    with pytest.raises(ValueError, match=f"strict=True, but Linear has nothing to run any of {ops} in"):
        mmfast.accelerate(nn.Linear(2, 2), strict=True)
    with pytest.raises(ValueError, match="has nothing to run any of attention in"):
        mmfast.accelerate(Net(), ops="attention", strict=True)
    model = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm((2, 8)))
    with pytest.raises(ValueError, match="1 modules are skipped: 1: normalises over 2 dimensions"):
        mmfast.accelerate(model, strict=True)
    assert norms(model) == [False, False]  # all or nothing
    mmfast.accelerate(Net(), strict=True)
    mmfast.accelerate(mmfast.accelerate(Net()), strict=True)  # already done is no failure


def test_mmfast_models_are_left_alone() -> None:
    model = nn.Sequential(mmfast.nn.LayerNorm(8))
    classes = [type(m) for m in model.modules()]
    mmfast.accelerate(model, strict=False)
    assert [type(m) for m in model.modules()] == classes
    assert mmfast.report(model)[1][2:] == ("native", "", "mmfast's own")
    mmfast.restore(model)
    assert [type(m) for m in model.modules()] == classes


def test_context_manager_restores() -> None:
    model = Net()
    with mmfast.accelerated(model) as inside:
        assert inside is model
        assert norms(model) == [True, True]
        with mmfast.accelerated(model):
            assert norms(model) == [True, True]
        assert norms(model) == [True, True]
    assert norms(model) == [False, False]
    with pytest.raises(RuntimeError, match="boom"), mmfast.accelerated(model):
        raise RuntimeError("boom")
    assert norms(model) == [False, False]


def test_context_manager_keeps_what_was_accelerated_before() -> None:
    model = Net()
    mmfast.accelerate(model.inner)
    with mmfast.accelerated(model):
        assert norms(model) == [True, True]
    assert norms(model) == [True, False]
    with pytest.raises(ValueError, match="accelerated: ops must be"), mmfast.accelerated(model, ops="no"):
        pass


def test_a_shared_module_is_listed_once() -> None:
    norm = nn.LayerNorm(8)
    model = nn.ModuleDict({"a": norm, "b": nn.Sequential(norm)})
    mmfast.accelerate(model)
    assert [row.name for row in mmfast.report(model) if row.op] == ["a"]
    assert model["b"][0] is model["a"]
    mmfast.restore(model)
    assert type(norm) is nn.LayerNorm


def test_compiled_and_wrapped_models() -> None:
    torch._dynamo.reset()
    model = Net()
    wrapped = nn.DataParallel(torch.compile(model, backend="eager"))
    x = torch.randn(2, 8)
    expected = wrapped(x)  # compiled before it is accelerated
    mmfast.accelerate(wrapped, strict=True)
    assert norms(model) == [True, True]
    torch._dynamo.reset()
    torch.testing.assert_close(wrapped(x), expected)
    assert [c.op for c in mmfast.explain(model, x)] == ["layer_norm", "layer_norm"]


def test_a_model_compiled_before_is_compiled_again() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    model = Net()
    compiled = torch.compile(model, backend=counter)
    x = torch.randn(2, 8)
    expected = compiled(x)
    mmfast.accelerate(model)
    torch.testing.assert_close(compiled(x), expected)
    assert counter.frame_count == 2


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("forced", [None, "torch"])
def test_layer_norm_variants_equal_torch(affine: bool, bias: bool, forced: str | None) -> None:
    original = nn.LayerNorm(16, eps=1e-3, elementwise_affine=affine, bias=bias)
    model = mmfast.accelerate(copy.deepcopy(original))
    x = torch.randn(2, 3, 16)
    with mmfast.backend(forced):
        assert torch.equal(model(x), original(x))
    assert repr(model) == repr(original)


@pytest.mark.parametrize("forced", [None, "torch"])
def test_tensors_that_the_op_does_not_take_go_to_torch(forced: str | None) -> None:
    with mmfast.backend(forced):
        _check_odd_tensors()


def _check_odd_tensors() -> None:
    original = nn.LayerNorm(4)
    model = mmfast.accelerate(copy.deepcopy(original))
    nested = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)])
    assert all(torch.equal(a, b) for a, b in zip(model(nested).unbind(), original(nested).unbind(), strict=True))
    for x in (torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 5)):  # torch refuses these, in its own words
        with pytest.raises((RuntimeError, ValueError)):
            original(x)
        with pytest.raises((RuntimeError, ValueError)):
            model(x)
    mixed = mmfast.accelerate(nn.LayerNorm(4, dtype=torch.float64))  # float64 weights of a float32 input
    with pytest.raises(RuntimeError):
        mixed(torch.randn(3, 4))


def test_wrapper_subclasses_go_to_torch() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    model = mmfast.accelerate(nn.LayerNorm(4))
    a, b = torch.randn(2, 4), torch.randn(2, 4)
    pair = TwoTensor(a, b)
    assert not mmfast.explain(model, pair)
    out = model(pair)
    assert torch.equal(out.a, model(a))
    assert torch.equal(out.b, model(b))


def test_fx_records_the_module() -> None:
    model = mmfast.accelerate(Net())
    traced = torch.fx.symbolic_trace(model)
    targets = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert targets == ["inner.0", "inner.1", "inner.2", "norm"]
    x = torch.randn(2, 8)
    assert torch.equal(traced(x), model(x))
    assert len(mmfast.explain(traced, x)) == 2
    assert torch.equal(torch.fx.symbolic_trace(model.norm)(x), model.norm(x))
    before = torch.fx.symbolic_trace(Net())
    assert norms(mmfast.accelerate(before)) == [True, True]


def test_functorch() -> None:
    model, x = mmfast.accelerate(Net()), torch.randn(3, 2, 8)
    torch.testing.assert_close(torch.func.vmap(model)(x), model(x))
    parameters = {name: 2 * p for name, p in model.named_parameters()}
    original = mmfast.restore(copy.deepcopy(model))
    assert torch.equal(
        torch.func.functional_call(model, parameters, (x,)), torch.func.functional_call(original, parameters, (x,))
    )


def test_transformer_encoder_layer_keeps_its_fast_path() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        expected = layer(x)
        assert torch.equal(mmfast.accelerate(layer)(x), expected)
    torch.testing.assert_close(layer(x), expected)


def test_a_model_spread_over_devices() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8, device="meta"))
    mmfast.accelerate(model, strict=True)
    assert model[1](torch.empty(2, 8, device="meta")).shape == (2, 8)
    assert model[0](torch.zeros(2, 8)).abs().max() == 0
