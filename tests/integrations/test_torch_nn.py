"""torch.nn's attention, under each of its conventions, and sequences of linear layers and activations."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import mmfast
from mmfast.integrations import Accelerated

B, N, S, D, H = 2, 5, 7, 16, 2


@pytest.fixture(autouse=True)
def through_the_ops(request: pytest.FixtureRequest) -> Iterator[None]:
    with mmfast.backend("triton" if request.node.get_closest_marker("triton") else "torch"):
        yield


def attentions(**options: Any) -> tuple[nn.Module, nn.Module]:
    """One accelerated and its original, with weights far from their initial values."""
    torch.manual_seed(1)
    original = nn.MultiheadAttention(D, H, **{"batch_first": True, **options})
    with torch.no_grad():
        for parameter in original.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    return mmfast.accelerate(copy.deepcopy(original)), original


def tokens(length: int = N, batch_first: bool = True) -> Tensor:
    return torch.randn((B, length, D) if batch_first else (length, B, D), requires_grad=True)


def compare(model: nn.Module, original: nn.Module, inputs: list[Tensor], call: Any, op: str | None) -> None:
    """The same output and gradients, by `op` or by none."""
    results = []
    for m in (model, original):
        for x in inputs:
            x.grad = None
        m.zero_grad()
        y = call(m)
        (y * torch.linspace(-1, 1, y.shape[-1])).sum().backward()
        results.append([y.detach(), *(x.grad for x in inputs), *(p.grad for p in m.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    ran = [choice.op for choice in mmfast.explain(call, model)]
    assert ran == ([] if op is None else [op])


def float_mask(*shape: int) -> Tensor:
    return torch.randn(shape)


def bool_mask(*shape: int) -> Tensor:
    """True is masked out; never a whole row."""
    mask = torch.rand(shape) < 0.4
    mask[..., 0] = False
    return mask


MASKS = {
    "none": lambda n, s: {},
    "bool": lambda n, s: {"attn_mask": bool_mask(n, s)},
    "float": lambda n, s: {"attn_mask": float_mask(n, s)},
    "bool per head": lambda n, s: {"attn_mask": bool_mask(B * H, n, s)},
    "float per head": lambda n, s: {"attn_mask": float_mask(B * H, n, s)},
    "padding": lambda n, s: {"key_padding_mask": bool_mask(B, s)},
    "float padding": lambda n, s: {"key_padding_mask": float_mask(B, s)},
    "bool and padding": lambda n, s: {"attn_mask": bool_mask(n, s), "key_padding_mask": bool_mask(B, s)},
    "float and padding": lambda n, s: {"attn_mask": float_mask(n, s), "key_padding_mask": float_mask(B, s)},
    "float and bool padding": lambda n, s: {"attn_mask": float_mask(n, s), "key_padding_mask": bool_mask(B, s)},
    "per head and padding": lambda n, s: {"attn_mask": bool_mask(B * H, n, s), "key_padding_mask": bool_mask(B, s)},
}


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "sequence first"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", ["self", "cross", "three inputs"])
def test_attention_equals_torch(kind: str, mask: str, batch_first: bool, bias: bool) -> None:
    model, original = attentions(batch_first=batch_first, bias=bias)
    check_attention(model, original, kind, mask, batch_first)


def check_attention(model: nn.Module, original: nn.Module, kind: str, mask: str, batch_first: bool) -> None:
    if kind == "self":
        x = tokens(batch_first=batch_first)
        inputs, given, sizes, op = [x], (x, x, x), (N, N), "attention_qkv"
    else:
        q, k, v = tokens(N, batch_first), tokens(S, batch_first), tokens(S, batch_first)
        sizes, op = (N, S), "attention"
        inputs, given = ([q, k], (q, k, k)) if kind == "cross" else ([q, k, v], (q, k, v))
    masks = MASKS[mask](*sizes)
    compare(model, original, inputs, lambda m: m(*given, need_weights=False, **masks)[0], op)


@pytest.mark.triton
@pytest.mark.parametrize("mask", ["none", "bool and padding", "float per head"])
@pytest.mark.parametrize("kind", ["self", "three inputs"])
def test_attention_by_kernels_equals_torch(kind: str, mask: str) -> None:
    model, original = attentions(batch_first=kind == "self")
    check_attention(model, original, kind, mask, kind == "self")


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "sequence first"])
def test_keys_and_values_of_other_widths(batch_first: bool) -> None:
    model, original = attentions(kdim=8, vdim=12, batch_first=batch_first)
    q, k, v = (torch.randn(2, 2, width, requires_grad=True) for width in (D, 8, 12))
    compare(model, original, [q, k, v], lambda m: m(q, k, v, need_weights=False)[0], "attention")


def test_the_causal_hint() -> None:
    model, original = attentions()
    x = tokens()
    causal = torch.ones(N, N, dtype=torch.bool).triu(1)
    options = {"need_weights": False, "attn_mask": causal, "is_causal": True}
    compare(model, original, [x], lambda m: m(x, x, x, **options)[0], "attention_qkv")
    wrong = {**options, "attn_mask": torch.zeros(N, N)}  # torch.nn believes the hint
    compare(model, original, [x], lambda m: m(x, x, x, **wrong)[0], "attention_qkv")
    padded = {**options, "key_padding_mask": torch.zeros(B, N, dtype=torch.bool)}  # and now the mask
    compare(model, original, [x], lambda m: m(x, x, x, **padded)[0], "attention_qkv")


def test_a_padded_batch_gives_what_each_sequence_gives() -> None:
    model, _ = attentions()
    x = tokens()
    padding = torch.zeros(B, N, dtype=torch.bool)
    padding[0, 3:] = True  # True is padding
    y = model(x, x, x, key_padding_mask=padding, need_weights=False)[0]
    alone = x[:1, :3]
    torch.testing.assert_close(y[:1, :3], model(alone, alone, alone, need_weights=False)[0], rtol=1e-4, atol=1e-5)


def test_calls_that_are_torchs_own() -> None:
    model, original = attentions()
    x = tokens()
    y, weights = model(x, x, x)
    assert torch.equal(weights, original(x, x, x)[1])
    assert torch.equal(y, original(x, x, x)[0])
    assert not mmfast.explain(model, x, x, x)
    per_head = model(x, x, x, average_attn_weights=False)[1]
    assert per_head.shape == (B, H, N, N)
    single = x[0]  # without a batch
    compare(model, original, [x], lambda m: m(single, single, single, need_weights=False)[0], None)
    learned = torch.randn(N, N, requires_grad=True)  # a mask with a gradient
    compare(model, original, [x, learned], lambda m: m(x, x, x, need_weights=False, attn_mask=learned)[0], None)
    nested = torch.nested.nested_tensor([torch.randn(2, D), torch.randn(4, D)])
    with torch.no_grad():
        pair = [m.eval()(nested, nested, nested, need_weights=False)[0].unbind() for m in (model, original)]
    assert all(torch.equal(a, b) for a, b in zip(*pair, strict=True))


def test_dropout_in_training_is_torchs() -> None:
    model, original = attentions(dropout=0.5)
    x = tokens()
    found = []
    for m in (model, original):
        torch.manual_seed(3)
        found.append(m(x, x, x, need_weights=False)[0])
    assert torch.equal(*found)
    assert not mmfast.explain(model, x, x, x, need_weights=False)
    model.eval(), original.eval()
    compare(model, original, [x], lambda m: m(x, x, x, need_weights=False)[0], "attention_qkv")


@pytest.mark.parametrize(
    "arguments",
    [
        {"attn_mask": torch.zeros(N, N + 1)},
        {"attn_mask": torch.zeros(1, 1, N, N)},
        {"attn_mask": torch.zeros(3, N, N)},
        {"key_padding_mask": torch.zeros(B, N + 1, dtype=torch.bool)},
        {"is_causal": True},
    ],
    ids=["mask of another size", "mask of four dimensions", "mask of three heads", "padding", "hint without mask"],
)
def test_wrong_arguments_raise_as_torch_does(arguments: dict[str, Any]) -> None:
    model, original = attentions()
    x = tokens()
    with pytest.raises((RuntimeError, AssertionError)) as expected:
        original(x, x, x, need_weights=False, **arguments)
    with pytest.raises(expected.type) as found:
        model(x, x, x, need_weights=False, **arguments)
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"add_bias_kv": True}, "has bias_k and bias_v"),
        ({"add_zero_attn": True}, "has add_zero_attn set"),
    ],
    ids=["add_bias_kv", "add_zero_attn"],
)
def test_attention_that_is_skipped(options: dict[str, Any], reason: str) -> None:
    model = mmfast.accelerate(nn.MultiheadAttention(D, H, **options))
    row = mmfast.report(model)[0]
    assert (row.status, row.op, row.reason) == ("skipped", "attention", reason)
    assert type(model) is nn.MultiheadAttention


def test_wide_heads_are_skipped() -> None:
    row = mmfast.report(nn.MultiheadAttention(514, 2))[0]
    assert (row.status, row.reason) == ("skipped", "has heads of width 257, above 256")


def test_a_hook_on_out_proj_stays_silent_as_in_torch() -> None:
    fired: list[int] = []
    for m in attentions():
        m.out_proj.register_forward_hook(lambda *_: fired.append(1))
        x = tokens()
        m(x, x, x, need_weights=False)
    assert not fired


def test_attention_of_half_precision_and_autocast() -> None:
    model, original = attentions()
    x = tokens().detach()
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = (m(x, x, x, need_weights=False)[0] for m in (model, original))
        assert [c.op for c in mmfast.explain(model, x, x, x, need_weights=False)] == ["attention_qkv"]
    assert got.dtype == expected.dtype == torch.bfloat16
    exact = original(x, x, x, need_weights=False)[0]
    assert (got - exact).abs().max() <= 2 * (expected - exact).abs().max() + 1e-2
    model.bfloat16(), original.bfloat16()
    x = x.bfloat16()
    got, expected = (m(x, x, x, need_weights=False)[0] for m in (model, original))
    assert (got - exact).abs().max() <= 2 * (expected - exact).abs().max() + 1e-2


def test_fx_records_attention_as_a_leaf() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(D, H, batch_first=True)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.attn(x, x, x, attn_mask=mask, need_weights=False)[0]

    model = mmfast.accelerate(Net())
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["attn"]
    x, mask = tokens(), float_mask(N, N)
    assert torch.equal(traced(x, mask), model(x, mask))


@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_layers(norm_first: bool) -> None:
    """Their calls, masks and padding included; the encoder's fast path is the original's."""
    torch.manual_seed(0)
    original = nn.Transformer(D, H, 1, 1, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
    model = mmfast.accelerate(copy.deepcopy(original))
    source, target = tokens(S), tokens(N)
    options = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(N),
        "tgt_is_causal": True,
        "src_key_padding_mask": torch.arange(S).expand(B, S) > torch.tensor([[4], [6]]),
    }
    options["memory_key_padding_mask"] = options["src_key_padding_mask"]
    found = [m(source, target, **options) for m in (model, original)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    ran = [c.op for c in mmfast.explain(model, source, target, **options) if "attention" in c.op]
    assert ran == ["attention_qkv", "attention_qkv", "attention"]
    model.eval(), original.eval()
    with torch.no_grad():
        fast = [m.encoder(source, src_key_padding_mask=options["src_key_padding_mask"]) for m in (model, original)]
        assert torch.equal(*fast)
        ran = mmfast.explain(model.encoder, source, src_key_padding_mask=options["src_key_padding_mask"])
    assert not [c for c in ran if "attention" in c.op]


def sequences(*layers: nn.Module) -> tuple[nn.Sequential, nn.Sequential]:
    original = nn.Sequential(*layers)
    return mmfast.accelerate(copy.deepcopy(original)), original


def test_a_sequence_fuses_each_linear_layer_with_its_activation() -> None:
    model, original = sequences(
        nn.Linear(D, 8), nn.GELU(), nn.Linear(8, 8), nn.Dropout(0.0), nn.ReLU(), nn.Linear(8, 4), nn.SiLU()
    )
    x = tokens()
    results = []
    for m in (model, original):
        x.grad = None
        m(x).pow(2).sum().backward()
        results.append([m(x).detach(), x.grad, *(p.grad for p in m.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert [c.op for c in mmfast.explain(model, x)] == ["linear_act"] * 2
    fused = [row.name for row in mmfast.report(model) if row.status == "fused"]
    assert fused == ["0", "1", "5", "6"]
    assert type(mmfast.restore(model)) is nn.Sequential


@pytest.mark.parametrize(
    "layers",
    [(nn.Linear(4, 4), nn.Tanh()), (nn.GELU(), nn.Linear(4, 4)), (nn.Linear(4, 4),), (nn.Conv2d(1, 1, 1), nn.ReLU())],
    ids=["tanh", "activation first", "linear alone", "convolution"],
)
def test_sequences_that_are_none_of_mmfasts(layers: tuple[nn.Module, ...]) -> None:
    model, _ = sequences(*layers)
    assert type(model) is nn.Sequential
    assert mmfast.report(model)[0][2:] == ("unknown", "", "mmfast has no op for this type")


def test_a_sequence_with_hooks_on_all_its_pairs_is_skipped() -> None:
    original = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    original[1].register_forward_hook(lambda _m, _a, y: y + 1)
    row = mmfast.report(mmfast.accelerate(original))[0]
    assert (row.status, row.reason) == ("skipped", "1 has hooks or a forward of its own")


def test_a_sequence_stays_a_sequence() -> None:
    model, original = sequences(nn.Linear(D, 8), nn.GELU(), nn.Linear(8, 4))
    x = tokens()
    assert isinstance(model, nn.Sequential)
    assert isinstance(model, Accelerated)
    assert torch.equal(model[:2](x), original[:2](x))
    assert len(model) == 3
    model[1] = nn.Tanh()  # nothing is fused any more
    original[1] = nn.Tanh()
    assert torch.equal(model(x), original(x))
    assert not mmfast.explain(model, x)
    assert mmfast.report(model)[0].reason.endswith("fuses nothing now: has no linear layer followed by an activation")


def test_a_parametrized_or_pruned_linear_layer_is_called() -> None:
    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model, original = sequences(nn.Linear(D, 8), nn.GELU())
    x = tokens()
    for m in (model, original):
        nn.utils.parametrize.register_parametrization(m[0], "weight", Double())
    assert torch.equal(model(x), original(x))
    model, original = sequences(nn.Linear(D, 8), nn.GELU())
    for m in (model, original):
        torch.manual_seed(0)
        prune.random_unstructured(m[0], "weight", 0.5)  # a pre-hook writes the weight
    assert torch.equal(model(x), original(x))
