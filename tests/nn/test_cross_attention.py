from __future__ import annotations

import copy
import math
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerMultiHeadAttention

import mmfast
from mmfast.nn import CrossAttention

BACKENDS = (pytest.param(None, id="default"), "torch", pytest.param("triton", marks=pytest.mark.triton))
B, NQ, NK, D, C, H = 2, 5, 7, 32, 24, 2


def build(device: torch.device, **options: Any) -> CrossAttention:
    return CrossAttention(D, **{"context_dim": C, "num_heads": H, "qkv_bias": True, **options}).to(device)


def draw(device: torch.device, batch: int = B, context_batch: int = B) -> tuple[Tensor, Tensor]:
    return (
        torch.randn(batch, NQ, D, device=device, requires_grad=True),
        torch.randn(context_batch, NK, C, device=device, requires_grad=True),
    )


def formula(layer: CrossAttention, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
    """In float64, with a context for each sample; mask is added, or True where a key is seen."""
    layer = copy.deepcopy(layer).double()
    x, context = x.double(), context.double()
    heads = (layer.num_heads, layer.head_dim)
    q, k, v = layer.to_q(x), layer.to_k(context), layer.to_v(context)
    outs = []
    for h in range(heads[0]):
        part = slice(h * heads[1], (h + 1) * heads[1])
        scores = q[..., part] @ k[..., part].mT / math.sqrt(heads[1])
        if mask is not None:
            one = mask.expand(x.shape[0], heads[0], *scores.shape[-2:])[:, h]
            scores = scores.masked_fill(~one, -math.inf) if one.dtype == torch.bool else scores + one
        outs.append(scores.softmax(-1).nan_to_num(0.0) @ v[..., part])
    return layer.to_out[0](torch.cat(outs, -1))


def check(found: Tensor, wanted: Tensor, x: Tensor, context: Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(found)
    grads = torch.autograd.grad(found, (x, context), upstream)
    truth = torch.autograd.grad(wanted, (x, context), upstream.double())
    torch.testing.assert_close(grads, truth, rtol=1e-3, atol=1e-5)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"qkv_bias": False, "out_bias": False},
    "head_dim": {"head_dim": 24, "num_heads": 3},
    "out_dim": {"out_dim": 20},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS)
def test_formula(options: str, backend: str | None, device: torch.device) -> None:
    layer, (x, context) = build(device, **OPTIONS[options]), draw(device)
    with mmfast.backend(backend):
        check(layer(x, context), formula(layer, x, context), x, context)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cross", [True, False], ids=["cross", "self"])
@pytest.mark.parametrize("padded", [True, False], ids=["padding", "no padding"])
def test_equals_the_q_formers(cross: bool, padded: bool, backend: str | None, device: torch.device) -> None:
    """transformers' attention of BLIP-2's Q-Former, with its weights; output and gradients."""
    config = Blip2QFormerConfig(
        hidden_size=D, num_attention_heads=H, encoder_hidden_size=C, attention_probs_dropout_prob=0.0
    )
    config._attn_implementation = "eager"
    peer = Blip2QFormerMultiHeadAttention(config, is_cross_attention=cross).to(device)
    layer = build(device, context_dim=C if cross else None)
    for ours, theirs in (("to_q", "query"), ("to_k", "key"), ("to_v", "value")):
        getattr(layer, ours).load_state_dict(getattr(peer, theirs).state_dict())
    layer.to_out = nn.Identity()
    x, context = draw(device)
    inputs = (x, context) if cross else (x,)
    keys = NK if cross else NQ
    keep = torch.arange(keys, device=device) < torch.tensor([[keys], [3]], device=device) if padded else None
    added = None if keep is None else torch.zeros(B, 1, 1, keys, device=device).masked_fill(~keep[:, None, None], -1e30)
    options = (
        {"encoder_hidden_states": context, "encoder_attention_mask": added} if cross else {"attention_mask": added}
    )
    wanted = peer(x, **options)[0]
    with mmfast.backend(backend):
        found = layer(x, context if cross else None, context_mask=keep)
        grads = torch.autograd.grad(found.sin().sum(), inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grads, torch.autograd.grad(wanted.sin().sum(), inputs), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_context_mask(backend: str | None, device: torch.device) -> None:
    """Padding takes no part: neither its values nor their gradients; a sample without keys gives the bias."""
    layer, (x, context) = build(device), draw(device)
    keep = torch.arange(NK, device=device) < torch.tensor([[4], [0]], device=device)
    with mmfast.backend(backend):
        found = layer(x, context, context_mask=keep)
        (grad,) = torch.autograd.grad(found.square().sum(), context)
    torch.testing.assert_close(found[:1].double(), formula(layer, x[:1], context[:1, :4]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], layer.to_out[0].bias.expand(NQ, D), rtol=1e-5, atol=1e-6)
    assert (grad[0, 4:] == 0).all()
    assert (grad[1] == 0).all()
    assert grad[0, :4].abs().min() > 0


@pytest.mark.parametrize("backend", [None, "torch"], ids=str)
@pytest.mark.parametrize("shared", [1, 3])
@pytest.mark.parametrize("shape", ["pairs", "each head", "each sample", "of keys"])
@pytest.mark.parametrize("added", [True, False], ids=["added", "bool"])
def test_masks_of_samples_that_share_a_context(
    added: bool, shape: str, shared: int, backend: str | None, device: torch.device
) -> None:
    """Each sample of x keeps its own mask, next to the padding of the context that it shares."""
    layer = build(device)
    x, context = draw(device, B * shared)
    shapes = {"pairs": (NQ, NK), "each head": (H, NQ, NK), "each sample": (B * shared, 1, NQ, NK), "of keys": (1, NK)}
    mask = torch.randn(shapes[shape], device=device)
    mask = mask if added else mask > -0.5
    keep = torch.arange(NK, device=device) < torch.tensor([[NK], [4]], device=device)
    with mmfast.backend(backend):
        found = layer(x, context, context_mask=keep, attn_mask=mask)
    each = keep.repeat_interleave(shared, 0)[:, None, None]
    whole = mask.double().masked_fill(~each, -math.inf) if added else mask & each
    wanted = formula(layer, x, context.repeat_interleave(shared, 0), whole)
    check(found, wanted, x, context)


@pytest.mark.parametrize(
    ("context_batch", "backend"),
    [
        (1, None),
        (2, None),
        (6, None),
        (1, "torch"),
        (2, "torch"),
        (6, "torch"),
        pytest.param(2, "triton", marks=pytest.mark.triton),
    ],
)
def test_keys_and_values_computed_once(context_batch: int, backend: str | None, device: torch.device) -> None:
    """As over the steps of a diffusion, or for the beams of a search, whose context is not repeated in memory."""
    layer = build(device)
    x, context = draw(device, 6, context_batch)
    with mmfast.backend(backend):
        kv = layer.project_kv(context)
        assert all(t.shape == (context_batch, H, NK, D // H) for t in kv)
        for step in ((x * 2).detach(), x):
            found = layer(step, kv=kv)
            wanted = formula(layer, step, context.repeat_interleave(6 // context_batch, 0))
            torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found, layer(step, context), rtol=1e-6, atol=1e-6)
    check(found, wanted, x, context)


def test_kv_saves_the_projections(device: torch.device) -> None:
    layer, (x, context) = build(device), draw(device)
    kv = layer.project_kv(context)
    calls: list[str] = []
    for name in ("to_q", "to_k", "to_v"):
        getattr(layer, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    layer(x, kv=kv)
    assert calls == ["to_q"]
    with mmfast.backend("torch"):
        assert [choice.op for choice in mmfast.explain(layer, x, kv=kv)] == ["attention"]


def test_self_attention_without_a_context(device: torch.device) -> None:
    layer = CrossAttention(D, num_heads=H).to(device)
    x = torch.randn(B, NQ, D, device=device)
    torch.testing.assert_close(layer(x).double(), formula(layer, x, x), rtol=1e-4, atol=1e-5)


def test_names_and_shapes_are_diffusers() -> None:
    """`attn2` of the first block of Stable Diffusion 1.5's U-Net."""
    layer = CrossAttention(320, 768, 8, 40)
    assert {name: tuple(p.shape) for name, p in layer.state_dict().items()} == {
        "to_q.weight": (320, 320),
        "to_k.weight": (320, 768),
        "to_v.weight": (320, 768),
        "to_out.0.weight": (320, 320),
        "to_out.0.bias": (320,),
    }


def test_dropout_in_training(device: torch.device) -> None:
    x, context = draw(device)
    layer = build(device, attn_drop=0.5)
    torch.manual_seed(1)
    first, second = layer(x, context), layer(x, context)
    assert not torch.equal(first, second)
    layer.eval()
    torch.testing.assert_close(layer(x, context).double(), formula(layer, x, context), rtol=1e-4, atol=1e-5)
    layer = build(device, dropout=0.5)
    out = layer(x, context)
    assert 0.2 < (out == 0).float().mean() < 0.8
    kept = out != 0
    torch.testing.assert_close(out[kept], layer.eval()(x, context)[kept] * 2)


def test_copies(device: torch.device) -> None:
    layer, (x, context) = build(device), draw(device)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x, context), layer(x, context))
    assert "num_heads=2, head_dim=16" in repr(layer)


@pytest.mark.parametrize("backend", ["torch"])
def test_compiled_equals_eager(backend: str, device: torch.device) -> None:
    layer, (x, context) = build(device), draw(device, 4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    keep = torch.arange(NK, device=device) < torch.tensor([[NK], [3]], device=device)
    with mmfast.backend(backend):
        torch.testing.assert_close(compiled(x, context, keep), layer(x, context, keep), rtol=1e-5, atol=1e-6)


X, CONTEXT = torch.zeros(4, NQ, D), torch.zeros(2, NK, C)
KV = (torch.zeros(2, H, NK, D // H), torch.zeros(2, H, NK, D // H))
BAD: dict[str, Any] = {
    "x is a list": (([1.0],), {}, TypeError, "x must be a tensor, got list"),
    "x's rank": ((X[0],), {}, ValueError, "x must have shape (B, N, 32), got (5, 32)"),
    "context's width": ((X, X), {}, ValueError, "context must have shape (B, N, 24), got (4, 5, 32)"),
    "context's batch": ((X[:3], CONTEXT), {}, ValueError, "the batch of the context must divide x's 3, got 2"),
    "no context of its width": ((X,), {}, ValueError, "context must have shape (B, N, 24), got (4, 5, 32)"),
    "context and kv": ((X, CONTEXT), {"kv": KV}, ValueError, "give context or kv, got both"),
    "kv's heads": (
        (X,),
        {"kv": (KV[0][:, :1], KV[1])},
        ValueError,
        "k of kv must have shape (B, 2, Nk, 16), got (2, 1, 7, 16)",
    ),
    "kv's lengths": (
        (X,),
        {"kv": (KV[0], KV[1][:, :, 1:])},
        ValueError,
        "v of kv must have shape (B, 2, Nk, 16), got (2, 2, 6, 16)",
    ),
    "context_mask": (
        (X, CONTEXT),
        {"context_mask": torch.ones(4, NK).bool()},
        ValueError,
        "context_mask must be torch.bool of shape (2, 7), got torch.bool (4, 7)",
    ),
    "context_mask's dtype": (
        (X, CONTEXT),
        {"context_mask": torch.ones(2, NK)},
        ValueError,
        "context_mask must be torch.bool of shape (2, 7), got torch.float32 (2, 7)",
    ),
    "attn_mask": (
        (X, CONTEXT),
        {"attn_mask": torch.ones(NK, NQ).bool()},
        ValueError,
        "attn_mask must broadcast to (4, 2, 5, 7), got (7, 5)",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what: str) -> None:
    args, options, kind, message = BAD[what]
    with pytest.raises(kind, match=re.escape(f"CrossAttention: {message}")):
        build(torch.device("cpu"))(*args, **options)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"query_dim must be a multiple of num_heads.*got query_dim=30, num_heads=4"):
        CrossAttention(30, num_heads=4)
    assert CrossAttention(30, num_heads=4, head_dim=8).to_q.out_features == 32
