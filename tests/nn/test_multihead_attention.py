from __future__ import annotations

import copy
import io
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmfast
from mmfast.nn import MultiheadAttention

BACKENDS = (pytest.param(None, id="default"), "torch", pytest.param("triton", marks=pytest.mark.triton))
E, H, B, L, S = 32, 2, 2, 5, 7

MODULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "kdim and vdim": {"kdim": 20, "vdim": 12},
    "kdim without bias": {"kdim": 20, "vdim": 12, "bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "bias_kv and zero_attn": {"add_bias_kv": True, "add_zero_attn": True},
}


def build(device: torch.device, **options: Any) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
    """torch.nn's module and ours with its weights, biases not zero."""
    peer = nn.MultiheadAttention(E, H, **options).to(device)
    with torch.no_grad():
        for bias in (peer.in_proj_bias, peer.out_proj.bias):
            if bias is not None:
                bias.normal_()
    ours = MultiheadAttention(E, H, **options).to(device)
    ours.load_state_dict(peer.state_dict())
    return peer, ours


def inputs(module: nn.MultiheadAttention, kind: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    def sequence(length: int, width: int) -> Tensor:
        shape = (B, length, width) if module.batch_first else (length, B, width)
        return torch.randn(shape, device=device, requires_grad=True)

    query = sequence(L, E)
    if kind == "self":
        return query, query, query
    key = sequence(S, module.kdim)
    return query, key, key if kind == "cross" else sequence(S, module.vdim)


def check(  # type: ignore[no-untyped-def]
    peer: nn.Module, ours: nn.Module, args: tuple[Tensor, ...], backend: str | None, options: dict[str, Any]
) -> None:
    """Output, weights, and the gradients of inputs and parameters are torch.nn's."""
    results = []
    for module in (peer, ours):
        with mmfast.backend(backend if module is ours else None):
            out, weights = module(*args, **options)
            loss = out.sin().sum() if weights is None else out.sin().sum() + weights.cos().sum()
            wanted = [*dict.fromkeys(args), *module.parameters()]
            results.append((out, weights, torch.autograd.grad(loss, wanted)))
    (out, weights, grads), (found_out, found_weights, found_grads) = results
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found_out, out, **tolerance)
    assert (weights is None) == (found_weights is None)
    if weights is not None:
        torch.testing.assert_close(found_weights, weights, **tolerance)
    names = ["input"] * (len(grads) - len(list(peer.parameters()))) + [name for name, _ in peer.named_parameters()]
    for name, got, want in zip(names, found_grads, grads, strict=True):
        torch.testing.assert_close(got, want, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize(
    ("options", "kind", "batch_first", "backend"),
    [
        *(
            pytest.param(options, kind, batch_first, backend)
            for options in MODULES
            for kind in ("self", "cross", "three tensors")
            if kind == "three tensors" or "kdim" not in options  # of one width
            for batch_first in (True, False)
            for backend in (None, "torch")
        ),
        # What the kernels see of it: packed projections, two tensors, and keys that were added.
        pytest.param("plain", "self", True, "triton", marks=pytest.mark.triton),
        pytest.param("plain", "self", False, "triton", marks=pytest.mark.triton),
        pytest.param("plain", "cross", False, "triton", marks=pytest.mark.triton),
        pytest.param("bias_kv and zero_attn", "self", True, "triton", marks=pytest.mark.triton),
    ],
)
def test_equals_torch(
    options: str, kind: str, batch_first: bool, need_weights: bool, backend: str | None, device: torch.device
) -> None:
    peer, ours = build(device, batch_first=batch_first, **MODULES[options])
    check(peer, ours, inputs(peer, kind, device), backend, {"need_weights": need_weights})


def padding(device: torch.device, keys: int = S) -> Tensor:
    return torch.arange(keys, device=device) >= torch.tensor([[keys], [3]], device=device)


def pairs(device: torch.device, *lead: int) -> Tensor:
    mask = torch.rand(*lead, L, S, device=device) > 0.6
    mask[..., 0] = False  # every query sees a key
    return mask


MASKS: dict[str, Any] = {
    "padding": lambda d: {"key_padding_mask": padding(d)},
    "added padding": lambda d: {"key_padding_mask": torch.randn(B, S, device=d)},
    "pairs": lambda d: {"attn_mask": pairs(d)},
    "pairs of each head": lambda d: {"attn_mask": pairs(d, B * H)},
    "added": lambda d: {"attn_mask": torch.randn(L, S, device=d)},
    "added to each head": lambda d: {"attn_mask": torch.randn(B * H, L, S, device=d)},
    "padding and pairs": lambda d: {"key_padding_mask": padding(d), "attn_mask": pairs(d, B * H)},
    "both added": lambda d: {
        "key_padding_mask": torch.randn(B, S, device=d),
        "attn_mask": torch.randn(L, S, device=d),
    },
}


@pytest.mark.parametrize("backend", [None, "torch"], ids=str)
@pytest.mark.parametrize("options", ["plain", "bias_kv and zero_attn"])
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask: str, need_weights: bool, options: str, backend: str | None, device: torch.device) -> None:
    peer, ours = build(device, batch_first=True, **MODULES[options])
    arguments = {**MASKS[mask](device), "need_weights": need_weights, "average_attn_weights": False}
    check(peer, ours, inputs(peer, "cross", device), backend, arguments)


@pytest.mark.triton
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("mask", ["padding and pairs", "both added"])
def test_masks_in_the_kernels(mask: str, need_weights: bool, device: torch.device) -> None:
    peer, ours = build(device, batch_first=True)
    arguments = {**MASKS[mask](device), "need_weights": need_weights}
    check(peer, ours, inputs(peer, "cross", device), "triton", arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("added", ["attn_mask", "key_padding_mask"])
def test_one_mask_boolean_and_one_added(added: str, backend: str | None, device: torch.device) -> None:
    """torch.nn deprecates the pair, and does the same."""
    peer, ours = build(device, batch_first=True)
    masks = {"key_padding_mask": padding(device), "attn_mask": pairs(device)}
    masks[added] = torch.randn(masks[added].shape, device=device)
    as_added = {
        name: torch.zeros(m.shape, device=device).masked_fill(m, -torch.inf) if m.dtype == torch.bool else m
        for name, m in masks.items()
    }
    args = inputs(peer, "cross", device)
    with mmfast.backend(backend):
        found = ours(*args, **masks)
    torch.testing.assert_close(found, peer(*args, **as_added), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("padded", [True, False], ids=["padding", "no padding"])
@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("self", None),
        ("self", "torch"),
        ("cross", None),
        ("cross", "torch"),
        pytest.param("self", "triton", marks=pytest.mark.triton),
    ],
)
def test_is_causal(kind: str, padded: bool, need_weights: bool, backend: str | None, device: torch.device) -> None:
    peer, ours = build(device, batch_first=True)
    args = inputs(peer, kind, device)
    keys = args[1].shape[1]
    options = {
        "attn_mask": torch.ones(L, keys, dtype=torch.bool, device=device).triu(1),
        "key_padding_mask": padding(device, keys) if padded else None,
        "need_weights": need_weights,
        "is_causal": True,
    }
    check(peer, ours, args, backend, options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_causal_sees_the_added_keys(backend: str | None, device: torch.device) -> None:
    """With and without weights; torch.nn hides them without."""
    peer, ours = build(device, batch_first=True, add_bias_kv=True, add_zero_attn=True)
    args = inputs(peer, "self", device)
    options = {"attn_mask": torch.ones(L, L, dtype=torch.bool, device=device).triu(1), "is_causal": True}
    wanted, weights = peer(*args, **options)
    assert (weights[:, 0, L:] > 0).all()
    with mmfast.backend(backend):
        for need_weights in (True, False):
            found = ours(*args, need_weights=need_weights, **options)[0]
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", [None, "torch"], ids=str)
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "length first"])
@pytest.mark.parametrize("average", [True, False], ids=["averaged", "each head"])
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "no mask"])
def test_without_a_batch(
    masked: bool, average: bool, batch_first: bool, backend: str | None, device: torch.device
) -> None:
    peer, ours = build(device, batch_first=batch_first)
    query, key = (torch.randn(n, E, device=device, requires_grad=True) for n in (L, S))
    options: dict[str, Any] = {"average_attn_weights": average}
    if masked:
        options.update(key_padding_mask=padding(device)[1], attn_mask=pairs(device, H))
    check(peer, ours, (query, key, key), backend, options)
    check(peer, ours, (query, query, query), backend, {"average_attn_weights": average})
    check(peer, ours, (query, query, query), backend, {"need_weights": False})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("which", ["key_padding_mask", "attn_mask"])
def test_queries_without_keys(which: str, need_weights: bool, backend: str | None, device: torch.device) -> None:
    """Weights 0 and attention 0, so that the output is the bias: in training, in inference, and in the gradient."""
    _, ours = build(device, batch_first=True)
    x = torch.randn(B, L, E, device=device, requires_grad=True)
    hidden = torch.zeros(B, L, dtype=torch.bool, device=device)
    hidden[1] = True
    pairs_hidden = torch.zeros(L, L, dtype=torch.bool, device=device)
    pairs_hidden[2] = True
    mask = {which: hidden if which == "key_padding_mask" else pairs_hidden}
    rows = (slice(1, 2),) if which == "key_padding_mask" else (slice(None), slice(2, 3))
    with mmfast.backend(backend):
        out, weights = ours(x, x, x, need_weights=need_weights, **mask)
        (grad,) = torch.autograd.grad(out.square().sum(), x)
        with torch.inference_mode():
            fast, _ = ours.eval()(x, x, x, need_weights=need_weights, **mask)
    assert grad.isfinite().all()
    for y in (out, fast):
        torch.testing.assert_close(y[rows], ours.out_proj.bias.expand_as(y[rows]), rtol=1e-5, atol=1e-6)
    assert out.isfinite().all()
    if weights is not None:
        assert (weights[rows] == 0).all()
        torch.testing.assert_close(weights[0, 0].sum(), torch.ones((), device=device))


@pytest.mark.parametrize("backend", [None, "torch"], ids=str)
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "no mask"])
def test_dropout(masked: bool, need_weights: bool, backend: str | None, device: torch.device) -> None:
    """The same draws as torch.nn's from the same seed, and weights after dropout; none in eval mode."""
    peer, ours = build(device, dropout=0.4, batch_first=True)
    args = inputs(peer, "cross", device)
    options = {"need_weights": need_weights, "average_attn_weights": False}
    if masked:
        options["key_padding_mask"] = padding(device)
    for training in (True, False):
        results = []
        for module in (peer.train(training), ours.train(training)):
            torch.manual_seed(3)
            with mmfast.backend(backend if module is ours else None):
                results.append(module(*args, **options))
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    if need_weights:
        torch.manual_seed(3)
        assert (ours.train()(*args, **options)[1] == 0).any(-1).any()


def test_gradient_of_an_added_mask(device: torch.device) -> None:
    """A learned bias of the scores, as in Swin."""
    peer, ours = build(device, batch_first=True)
    args = inputs(peer, "cross", device)
    bias = torch.randn(B * H, L, S, device=device, requires_grad=True)
    for need_weights in (True, False):
        found, wanted = (
            torch.autograd.grad(m(*args, attn_mask=bias, need_weights=need_weights)[0].sin().sum(), bias)[0]
            for m in (ours, peer)
        )
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_the_cpu_runs_torchs_own_forward() -> None:
    """Bit for bit, and with its inference fast path."""
    peer, ours = (m.eval() for m in build(torch.device("cpu"), batch_first=True))
    x = torch.randn(B, L, E)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert torch.equal(ours(x, x, x)[0], peer(x, x, x)[0])
            assert torch.equal(ours(x, x, x)[1], peer(x, x, x)[1])


@pytest.mark.parametrize(("kind", "gemms"), [("self", 2), ("cross", 3), ("three tensors", 4)])
def test_number_of_projections(kind: str, gemms: int, device: torch.device) -> None:
    """One GEMM for q, k and v of self-attention, two where key and value are one tensor; and that of the output."""
    _, ours = build(device, batch_first=True)
    args = inputs(ours, kind, device)
    with mmfast.backend("torch"), torch.profiler.profile() as profile:
        ours(*args, need_weights=False)
    assert sum(event.count for event in profile.key_averages() if event.key == "aten::linear") == gemms


def test_which_ops_run(device: torch.device) -> None:
    _, ours = build(device, batch_first=True)
    args, (query, key, _) = inputs(ours, "self", device), inputs(ours, "cross", device)
    with mmfast.backend("torch"):
        assert [c.op for c in mmfast.explain(ours, *args, need_weights=False)] == ["attention_qkv"]
        assert [c.op for c in mmfast.explain(ours, query, key, key, need_weights=False)] == ["attention"]
        assert [c.op for c in mmfast.explain(ours, query, key, key)] == ["attention_maps"]


@pytest.mark.triton
def test_weights_from_the_statistics_of_the_attention(device: torch.device) -> None:
    _, ours = build(device, batch_first=True)
    with mmfast.backend("triton"):
        found = mmfast.explain(ours, *inputs(ours, "self", device))
    assert [c.op for c in found] == ["attention", "attention_maps"]


def test_is_torchs_class_in_every_other_way() -> None:
    torch.manual_seed(1)
    peer = nn.MultiheadAttention(E, H, dropout=0.1, add_bias_kv=True, batch_first=True)
    torch.manual_seed(1)
    ours = MultiheadAttention(E, H, dropout=0.1, add_bias_kv=True, batch_first=True)
    assert isinstance(ours, nn.MultiheadAttention)
    assert list(ours.state_dict()) == list(peer.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), peer.state_dict().values(), strict=True))
    assert repr(ours) == repr(peer)


def test_copies() -> None:
    _, ours = build(torch.device("cpu"), batch_first=True, kdim=20, vdim=12)
    args = inputs(ours, "three tensors", torch.device("cpu"))
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(buffer, weights_only=False),
    ):
        assert type(other) is MultiheadAttention
        assert torch.equal(other(*args)[0], ours(*args)[0])


@pytest.mark.parametrize("layer", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
@pytest.mark.parametrize("backend", BACKENDS)
def test_inside_a_transformer_layer(layer: Any, backend: str | None, device: torch.device) -> None:
    """Put in the place of torch.nn's, as `accelerate` does: with a causal mask and padding."""
    peer = layer(E, H, 64, dropout=0.0, batch_first=True).to(device)
    ours = copy.deepcopy(peer)
    for module in ours.modules():
        if type(module) is nn.MultiheadAttention:
            module.__class__ = MultiheadAttention
    x = torch.randn(B, L, E, device=device)
    causal = nn.Transformer.generate_square_subsequent_mask(L, device=device)
    if layer is nn.TransformerDecoderLayer:
        args: tuple[Tensor, ...] = (x, torch.randn(B, S, E, device=device))
        options = {"tgt_mask": causal, "tgt_is_causal": True, "memory_key_padding_mask": padding(device)}
    else:
        args = (x,)
        options = {"src_mask": causal, "is_causal": True}
    with mmfast.backend(backend):
        found = ours(*args, **options)
        eval_found = ours.eval()(*args, **options)
    torch.testing.assert_close(found, peer(*args, **options), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(eval_found, peer.eval()(*args, **options), rtol=1e-4, atol=1e-5)


def test_nested_tensors_are_torchs(device: torch.device) -> None:
    peer, ours = (m.eval() for m in build(device, batch_first=True))
    ragged = [torch.randn(n, E, device=device) for n in (3, 5)]
    x = torch.nested.nested_tensor(ragged)
    with torch.inference_mode(), mmfast.backend("torch"):
        found, wanted = (m(x, x, x, need_weights=False)[0].to_padded_tensor(0.0) for m in (ours, peer))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend: str | None, device: torch.device) -> None:
    half = torch.float16 if device.type == "cpu" else torch.bfloat16
    peer, ours = build(device, batch_first=True, add_bias_kv=True)
    args = inputs(peer, "cross", device)
    options = {"attn_mask": torch.randn(L, S, device=device), "key_padding_mask": torch.randn(B, S, device=device)}
    wanted = peer(*args, **options)
    with torch.autocast(device.type, dtype=half), mmfast.backend(backend):
        found = ours(*args, **options)
    assert found[0].dtype == half
    torch.testing.assert_close([x.float() for x in found], list(wanted), rtol=3e-2, atol=2e-2)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.triton)])
def test_compiled_equals_eager(backend: str, device: torch.device) -> None:
    _, ours = build(device, batch_first=True)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    query, key, _ = inputs(ours, "cross", device)
    mask = padding(device)
    with mmfast.backend(backend):
        torch.testing.assert_close(compiled(query, key, key, mask), ours(query, key, key, mask))
        found, wanted = (m(query, query, query, need_weights=False)[0] for m in (compiled, ours))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


X = torch.zeros(B, L, E)
K = torch.zeros(B, S, E)
BAD: dict[str, Any] = {
    "query's rank": ((torch.zeros(E), K, K), {}, ValueError, "query must have 2 or 3 dimensions, got (32,)"),
    "query's width": (
        (X[..., 1:], K, K),
        {},
        ValueError,
        "query must have 3 dimensions, the last of 32, got (2, 5, 31)",
    ),
    "key's rank": ((X, K[0], K[0]), {}, ValueError, "key must have 3 dimensions, the last of 32, got (7, 32)"),
    "value's length": ((X, K, K[:, 1:]), {}, ValueError, "value must have dimensions (2, 7) like key, got (2, 6)"),
    "key's batch": ((X, K[:1], K[:1]), {}, ValueError, "key must have a batch of 2 like query, got 1"),
    "padding": (
        (X, K, K),
        {"key_padding_mask": torch.zeros(S, B).bool()},
        ValueError,
        "key_padding_mask must have shape (2, 7), got (7, 2)",
    ),
    "mask": (
        (X, K, K),
        {"attn_mask": torch.zeros(B, L, S).bool()},
        ValueError,
        "attn_mask must have shape (5, 7) or (4, 5, 7), got (2, 5, 7)",
    ),
    "mask's dtype": (
        (X, K, K),
        {"attn_mask": torch.zeros(L, S).int()},
        TypeError,
        "attn_mask must be boolean or floating point, got torch.int32",
    ),
    "causal without a mask": ((X, K, K), {"is_causal": True}, ValueError, "is_causal is a hint about attn_mask"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what: str) -> None:
    args, options, kind, message = BAD[what]
    ours = MultiheadAttention(E, H, batch_first=True)
    with mmfast.backend("torch"), pytest.raises(kind, match=re.escape(f"MultiheadAttention: {message}")):
        ours(*args, **options)
