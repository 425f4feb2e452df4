from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Attention as TimmAttention
from torch import Tensor, nn

import mmfast
from mmfast.nn import Attention, AttentionPoolLatent, AttentionPoolPrr

BACKENDS = (pytest.param(None, id="default"), "torch", pytest.param("triton", marks=pytest.mark.triton))
B, N, D, H = 2, 7, 32, 2


def draw(device: torch.device) -> Tensor:
    return torch.randn(B, N, D, device=device, requires_grad=True)


def outputs_and_gradients(module: nn.Module, x: Tensor, **options: Any) -> list[Tensor]:
    out = module(x, **options)
    grads = torch.autograd.grad(out.sin().sum(), (x, *module.parameters()), allow_unused=True)
    return [out, *(g for g in grads if g is not None)]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"qkv_bias": True},
    "qk_norm": {"qk_norm": True, "norm_layer": nn.LayerNorm},
    "qk_norm of mmfast": {"qk_norm": True, "norm_layer": mmfast.nn.LayerNorm},
    "scale_norm": {"scale_norm": True, "norm_layer": nn.LayerNorm},
    "head_dim": {"attn_head_dim": 24, "dim_out": 20},
    "gated": {"gated": True},
}
MASKS: dict[str, Any] = {
    "no mask": lambda d: {},
    "causal": lambda d: {"is_causal": True},
    "bool": lambda d: {"attn_mask": (torch.rand(B, 1, N, N, device=d) > 0.5) | torch.eye(N, device=d).bool()},
    "added": lambda d: {"attn_mask": torch.randn(H, N, N, device=d)},
}


@pytest.mark.parametrize(
    ("options", "mask", "backend"),
    [
        *((options, mask, backend) for options in OPTIONS for mask in MASKS for backend in (None, "torch")),
        pytest.param("plain", "added", "triton", marks=pytest.mark.triton),
        pytest.param("qk_norm of mmfast", "causal", "triton", marks=pytest.mark.triton),
    ],
)
def test_equals_timm(options: str, mask: str, backend: str | None, device: torch.device) -> None:
    """Output and gradients of timm's unfused attention, whichever op serves."""
    ours = Attention(D, H, **OPTIONS[options]).to(device)
    peer = TimmAttention(D, H, **OPTIONS[options]).to(device)
    peer.load_state_dict(ours.state_dict())
    peer.fused_attn = False
    x = draw(device)
    arguments = MASKS[mask](device)
    wanted = outputs_and_gradients(peer, x, **arguments)
    with mmfast.backend(backend):
        found = outputs_and_gradients(ours, x, **arguments)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mask_and_causal_both_hold(backend: str | None, device: torch.device) -> None:
    layer, x = Attention(D, H).to(device), draw(device)
    mask = torch.rand(N, N, device=device) > 0.3
    with mmfast.backend(backend):
        found = layer(x, attn_mask=mask, is_causal=True)
        wanted = layer(x, attn_mask=mask & torch.ones_like(mask).tril())
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_which_ops_run(device: torch.device) -> None:
    """The projection goes in packed, unless its heads are normalised on the way."""
    x = draw(device)
    with mmfast.backend("torch"):
        for options, op in (({}, "attention_qkv"), (OPTIONS["qk_norm"], "attention")):
            layer = Attention(D, H, **options).to(device)
            assert [c.op for c in mmfast.explain(layer, x)] == [op]
        hooked = Attention(D, H).to(device)
        hooked.k_norm.register_forward_hook(lambda module, args, out: out * 0)
        assert [c.op for c in mmfast.explain(hooked, x)] == ["attention"]
        uniform = hooked.probabilities(x)
        torch.testing.assert_close(uniform, torch.full((B, H, N, N), 1 / N, device=device))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hook_on_attn_drop_sees_the_probabilities(backend: str | None, device: torch.device) -> None:
    """As tools that draw attention maps expect, and may change; the output is the same to rounding."""
    layer, x = Attention(D, H).to(device), draw(device)
    plain = layer(x)
    caught: list[Tensor] = []
    handle = layer.attn_drop.register_forward_hook(lambda module, args, out: caught.append(out))
    with mmfast.backend(backend):
        found = layer(x, is_causal=True)
        wanted = layer.probabilities(x, is_causal=True)
        torch.testing.assert_close(layer(x), plain, rtol=1e-4, atol=1e-5)
        handle.remove()
        torch.testing.assert_close(layer(x, is_causal=True), found, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(caught[0], wanted)
    assert len(caught) == 2

    layer.attn_drop.register_forward_hook(lambda module, args, out: out * 0)
    torch.testing.assert_close(layer(x), layer.proj.bias.expand(B, N, D))


def test_another_module_in_the_place_of_attn_drop(device: torch.device) -> None:
    layer, x = Attention(D, H).to(device), draw(device)
    plain = layer(x)
    layer.attn_drop = nn.Identity()
    assert torch.equal(layer.train()(x), plain)
    layer.attn_drop = nn.Threshold(1 / N, 0.0)
    p, v = layer.probabilities(x), layer._heads(x)[2]
    wanted = layer.proj((torch.where(p > 1 / N, p, 0.0) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-6)


def test_dropout_of_the_probabilities_in_training(device: torch.device) -> None:
    """The draws of PyTorch's own op."""
    layer, x = Attention(D, H, attn_drop=0.5).to(device), draw(device)
    q, k, v = layer._heads(x)
    for backend in (None, "torch"):
        torch.manual_seed(5)
        wanted = layer.proj(F.scaled_dot_product_attention(q, k, v, dropout_p=0.5).transpose(1, 2).flatten(2))
        torch.manual_seed(5)
        with mmfast.backend(backend):
            torch.testing.assert_close(layer(x), wanted)
    torch.testing.assert_close(layer.eval()(x), copy.deepcopy(layer).eval()(x))


def test_the_cpu_gives_the_bits_of_pytorchs_op() -> None:
    layer, x = Attention(D, H).eval(), draw(torch.device("cpu"))
    q, k, v = layer._heads(x)
    wanted = layer.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D))
    assert torch.equal(layer(x), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_probabilities(backend: str | None, device: torch.device) -> None:
    """Of chosen heads; times the values they are what forward applies."""
    layer, x = Attention(D, 4).to(device), draw(device)
    mask = torch.rand(B, 4, N, N, device=device) > 0.3
    with mmfast.backend(backend):
        whole = layer.probabilities(x, mask)
        chosen = layer.probabilities(x, mask, heads=(3, -3))
    torch.testing.assert_close(chosen, whole[:, [3, 1]], rtol=1e-5, atol=1e-6)
    v = layer._heads(x)[2]
    out = layer.proj((whole @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, mask), out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no mask"])
def test_pool_of_a_learned_query(masked: bool, backend: str | None, device: torch.device) -> None:
    layer, x = AttentionPoolLatent(D, H).to(device), draw(device)
    mask = (torch.arange(N, device=device) < torch.tensor([[N], [3]], device=device))[:, None, None]
    options = {"attn_mask": mask} if masked else {}
    wanted = outputs_and_gradients(layer, x, **options)
    with mmfast.backend(backend):
        found = outputs_and_gradients(layer, x, **options)
        if backend:
            assert "attention" in [c.op for c in mmfast.explain(layer, x, **options)]
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=2e-5)
    if masked:
        torch.testing.assert_close(found[0][1:], layer(x[1:, :3]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pool_type", ["token", "avg"])
def test_pool_without_parameters(pool_type: str, backend: str | None, device: torch.device) -> None:
    layer, x = AttentionPoolPrr(D, H, pool_type), draw(device)
    heads = x.unflatten(-1, (H, -1)).transpose(1, 2).double()
    tokens = ((heads @ heads.mT / (D // H) ** 0.5).softmax(-1) @ heads).transpose(1, 2).flatten(2)
    wanted = tokens[:, 0] if pool_type == "token" else tokens.mean(1)
    with mmfast.backend(backend):
        found = layer(x)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
    (grad,) = torch.autograd.grad(found.sin().sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(wanted.sin().sum(), x)[0].float(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.triton)])
def test_compiled_equals_eager(backend: str, device: torch.device) -> None:
    layer, x = Attention(D, H).to(device), draw(device)
    with mmfast.backend(backend):
        found = outputs_and_gradients(torch.compile(layer, fullgraph=True, backend="aot_eager"), x)
        wanted = outputs_and_gradients(layer, x)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend: str | None, device: torch.device) -> None:
    half = torch.float16 if device.type == "cpu" else torch.bfloat16
    for options in ({}, OPTIONS["qk_norm of mmfast"]):
        layer, x = Attention(D, H, **options).to(device), draw(device)
        with torch.autocast(device.type, dtype=half), mmfast.backend(backend):
            found = layer(x)
        assert found.dtype == half
        torch.testing.assert_close(found.float(), layer(x), rtol=3e-2, atol=2e-2)
