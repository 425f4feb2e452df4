"""The fused residual stream of ViT: the same numbers as blocks called one by one, and hooks always fire."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmfast
from mmfast.models import ViT, _vit_block
from mmfast.nn import LayerNorm

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "layer_scale": {"init_values": 0.3},
    "drop_path": {"drop_path_rate": 0.5},
    "layer_scale_drop_path": {"init_values": 0.3, "drop_path_rate": 0.5},
    "pool_avg": {"global_pool": "avg", "drop_path_rate": 0.5},
    "no_final_norm": {"final_norm": False},
    "pre_norm": {"pre_norm": True},
    "width_equals_batch": {"embed_dim": 8, "num_heads": 2, "drop_path_rate": 0.5},
}


def build(**options: Any) -> ViT:
    arguments: dict[str, Any] = {
        "img_size": 16,
        "patch_size": 8,
        "embed_dim": 16,
        "depth": 3,
        "num_heads": 2,
        "num_classes": 5,
    }
    model = ViT(**{**arguments, **options}).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return model


def run(model: ViT, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return output and gradients, with the same random draws in each call."""
    model.zero_grad()
    torch.manual_seed(11)
    y = model(x)
    y.square().sum().backward()
    return y.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def calls_of(model: ViT, x: Tensor) -> int:
    """How many fused adds one forward makes."""
    return sum(choice.op == "add_layer_norm" for choice in mmfast.explain(model, x))


def plainly(block: _vit_block.Block, x: Tensor) -> Tensor:
    """The block by its formula, module by module."""
    x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("option", OPTIONS)
def test_fused_stream_is_the_plain_sequence(option: str, train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(**OPTIONS[option]).train(train)
    x = torch.randn(8, 3, 16, 16, dtype=torch.float64)
    fused, fused_grads = run(model, x)
    monkeypatch.setattr(_vit_block.Block, "fusable", lambda self: False)
    plain, plain_grads = run(model, x)
    torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fused_grads, plain_grads, rtol=1e-10, atol=1e-10)
    with torch.no_grad():  # and both are the formula
        torch.manual_seed(11)
        tokens = model._embed(x)
        for block in model.blocks:
            tokens = plainly(block, tokens)
        torch.testing.assert_close(model.forward_head(model.norm(tokens)), fused, rtol=1e-12, atol=1e-12)


def test_every_add_but_the_first_norm_is_fused() -> None:
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    # Two adds a block: each with the next norm, the last with the final one.
    assert calls_of(build(), x) == 6
    assert calls_of(build(global_pool="avg"), x) == 5  # no norm before pooling
    assert calls_of(build(norm_layer="rmsnorm"), x) == 0
    assert calls_of(build(norm_layer=nn.LayerNorm), x) == 6


def test_a_block_alone_is_the_formula() -> None:
    block = build(init_values=0.3).blocks[1]
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(block(x), plainly(block, x), rtol=1e-12, atol=1e-12)


HOOKED: dict[str, Callable[[ViT], nn.Module]] = {
    "blocks": lambda m: m.blocks,
    "block": lambda m: m.blocks[1],
    "first_norm1": lambda m: m.blocks[0].norm1,
    "norm1": lambda m: m.blocks[1].norm1,
    "norm2": lambda m: m.blocks[1].norm2,
    "attn": lambda m: m.blocks[1].attn,
    "mlp": lambda m: m.blocks[1].mlp,
    "fc1": lambda m: m.blocks[1].mlp.fc1,
    "ls1": lambda m: m.blocks[1].ls1,
    "ls2": lambda m: m.blocks[1].ls2,
    "drop_path1": lambda m: m.blocks[2].drop_path1,
    "drop_path2": lambda m: m.blocks[2].drop_path2,
    "norm": lambda m: m.norm,
    "patch_embed": lambda m: m.patch_embed,
    "norm_pre": lambda m: m.norm_pre,
    "head_drop": lambda m: m.head_drop,
    "head": lambda m: m.head,
    "head_act": lambda m: m.head_act,
    "fc_norm": lambda m: m.fc_norm,
    "patch_drop": lambda m: m.patch_drop,
    "pos_drop": lambda m: m.pos_drop,
}


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "backward"])
@pytest.mark.parametrize("where", HOOKED)
def test_hooks_fire_once_and_change_nothing(where: str, kind: str) -> None:
    model = build(init_values=0.3, drop_path_rate=0.2).eval()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    y, grads = run(model, x)
    fired: list[nn.Module] = []
    module = HOOKED[where](model)
    if kind == "forward":
        handle = module.register_forward_hook(lambda m, args, out: fired.append(m))
    elif kind == "forward_pre":
        handle = module.register_forward_pre_hook(lambda m, args: fired.append(m))
    else:
        handle = module.register_full_backward_hook(lambda m, grad_in, grad_out: fired.append(m))
    hooked, hooked_grads = run(model, x)
    assert fired == [module]
    torch.testing.assert_close(hooked, y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(hooked_grads, grads, rtol=1e-10, atol=1e-10)
    handle.remove()
    assert calls_of(model, x) == 6


@pytest.mark.parametrize("where", ["block", "norm1", "norm2", "ls1", "drop_path2", "norm"])
def test_a_hook_that_changes_its_output_is_heard(where: str) -> None:
    model = build(init_values=0.3, drop_path_rate=0.2).eval()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    before = model(x)
    HOOKED[where](model).register_forward_hook(lambda m, args, out: out * 1.5)
    assert not torch.allclose(model(x), before, rtol=1e-3)


def test_global_hooks_see_every_module() -> None:
    model = build(init_values=0.3, drop_path_rate=0.2).eval()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    seen: set[int] = set()
    with nn.modules.module.register_module_forward_pre_hook(lambda m, args: seen.add(id(m))):
        model(x)
    unused = {name for name, m in model.named_modules() if id(m) not in seen}
    # SDPA has the rate of this one, in timm too.
    assert unused == {f"blocks.{i}.attn.attn_drop" for i in range(3)}


class ShiftedNorm(LayerNorm):
    """A user's own norm."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1.0


@pytest.mark.parametrize("where", ["norm1", "norm2"])
def test_a_subclassed_norm_is_called(where: str) -> None:
    model = build().eval()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    before = model(x)
    module = HOOKED[where](model)
    module.__class__ = ShiftedNorm
    assert not torch.allclose(model(x), before, rtol=1e-3)


@pytest.mark.parametrize("where", ["block", "norm1", "norm2", "ls2", "norm"])
def test_a_forward_bound_to_an_instance_is_called(where: str) -> None:
    model = build(init_values=0.3).eval()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    module = HOOKED[where](model)
    calls: list[int] = []
    original = module.forward
    module.forward = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)  # type: ignore[method-assign]
    model(x)
    assert calls == [1]


def test_a_parametrized_gamma_is_evaluated() -> None:
    class Double(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return 2.0 * value

    model = build(init_values=0.3).eval()
    expected = copy.deepcopy(model)
    with torch.no_grad():
        expected.blocks[1].ls1.gamma.mul_(2.0)
    nn.utils.parametrize.register_parametrization(model.blocks[1].ls1, "gamma", Double())
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(model(x), expected(x), rtol=1e-12, atol=1e-12)


def test_compiled_submodules_are_called() -> None:
    model = build().eval()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    y = model(x)
    model.blocks[1].compile(backend="eager")
    assert calls_of(model, x) < 6
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("option", OPTIONS)
def test_gradient_checkpointing_changes_no_gradient(option: str) -> None:
    model = build(**OPTIONS[option]).train()
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    y, grads = run(model, x)
    model.set_grad_checkpointing()
    saved, saved_grads = run(model, x)
    torch.testing.assert_close(saved, y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(saved_grads, grads, rtol=1e-10, atol=1e-10)
    model.set_grad_checkpointing(False)
    assert not model.grad_checkpointing


def test_gradient_checkpointing_recomputes_blocks() -> None:
    model = build().train()
    model.set_grad_checkpointing()
    calls: list[int] = []
    model.blocks[1].attn.qkv.register_forward_hook(lambda m, args, out: calls.append(1))
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    loss = model(x).sum()
    assert len(calls) == 1
    loss.backward()
    assert len(calls) == 2
    with torch.no_grad():  # nothing to save for
        model(x)
    assert len(calls) == 3


def test_gradient_checkpointing_with_masks_and_intermediates() -> None:
    model = build().train()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected, states = model.forward_intermediates(x, is_causal=True)
    model.set_grad_checkpointing()
    found, saved = model.forward_intermediates(x, is_causal=True)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(saved, states)
    assert not torch.allclose(model.forward_features(x), expected)


def test_intermediates_of_hooked_and_fused_models_agree() -> None:
    model = build(init_values=0.3).eval()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    fused = model.forward_intermediates(x, norm=True)
    seen: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda m, args, out: seen.append(out))
    hooked = model.forward_intermediates(x, norm=True)
    torch.testing.assert_close(fused, hooked, rtol=1e-12, atol=1e-12)
    states = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
    for state, out in zip(states, seen, strict=False):
        assert torch.equal(state, out[:, 1:])


def test_drop_path_is_the_formula() -> None:
    """One block whose branch is dropped for a sample returns that sample's input."""
    model = build(depth=1).train()
    block = model.blocks[0]
    block.drop_path1 = mmfast.nn.DropPath(0.5).train()
    block.drop_path2 = mmfast.nn.DropPath(0.5).train()
    x = torch.randn(64, 4, 16, dtype=torch.float64)
    torch.manual_seed(2)
    y = block(x)
    torch.manual_seed(2)
    first = torch.empty(64, 1, 1, dtype=torch.float64).bernoulli_(0.5) / 0.5
    second = torch.empty(64, 1, 1, dtype=torch.float64).bernoulli_(0.5) / 0.5
    middle = x + first * block.attn(block.norm1(x))
    torch.testing.assert_close(y, middle + second * block.mlp(block.norm2(middle)), rtol=1e-12, atol=1e-12)
    untouched = ((first == 0) & (second == 0)).flatten()
    assert untouched.any()
    assert torch.equal(y[untouched], x[untouched])


@pytest.mark.triton
@pytest.mark.parametrize("option", ["default", "layer_scale_drop_path"])
def test_the_kernels_give_the_numbers_of_torch(option: str, device: torch.device) -> None:
    model = build(**OPTIONS[option], depth=2).to(device, torch.float32).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if "norm" in name and "weight" in name else 0.0))
    x = torch.randn(2, 3, 16, 16, device=device)
    with mmfast.backend("torch"):
        expected, expected_grads = run(model, x)
    with mmfast.backend("triton"):
        assert {choice.backend for choice in mmfast.explain(model, x)} == {"triton"}
        found, grads = run(model, x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-3, atol=1e-3)
