"""ViT itself: the lecture's numbers, what it works with (compile, export, dtypes, pickling), and its errors."""

from __future__ import annotations

import copy
import io
import pickle
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mmfast
from mmfast.models import ViT
from mmfast.nn import Attention, LayerNorm, QuickGELU

BASE: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}


def build(**options: Any) -> ViT:
    model = ViT(**{**BASE, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return model


# The lecture's Vision Transformer, page by page.


def test_lecture_patch_embedding_224() -> None:
    """A 224 x 224 x 3 image in patches of 16: 1 x 14 x 14 x 768, N = HW / P^2 = 196 tokens."""
    model = ViT(depth=1, num_classes=0)
    assert model.patch_embed.grid_size == (14, 14)
    assert model.patch_embed.num_patches == 224 * 224 // 16**2 == 196
    x = torch.randn(1, 3, 224, 224)
    z = model.patch_embed(x)
    assert z.shape == (1, 196, 768)
    assert z.unflatten(1, (14, 14)).shape == (1, 14, 14, 768)
    # Token i is W_e x_i + b_e of the i-th flattened patch, W_e of D x (P^2 C).
    patches = F.unfold(x, 16, stride=16).transpose(1, 2)
    weight = model.patch_embed.proj.weight.flatten(1)
    assert weight.shape == (768, 16 * 16 * 3)
    torch.testing.assert_close(z, patches @ weight.T + model.patch_embed.proj.bias, rtol=1e-4, atol=1e-5)


def test_lecture_token_with_position() -> None:
    """z_i = x_i + p_i."""
    model = build(class_token=False, global_pool="avg")
    x = model.patch_embed(torch.randn(2, 3, 16, 16))
    assert model.pos_embed is not None
    torch.testing.assert_close(model._pos_embed(x), x + model.pos_embed)


def test_lecture_mlp_is_relu_with_four_times_the_width() -> None:
    """MLP(x) = ReLU(x W1 + b1) W2 + b2 with W1 of D x 4D."""
    model = build(act_layer="relu")
    mlp = model.blocks[0].mlp
    assert mlp.fc1.weight.shape == (4 * 16, 16)
    x = torch.randn(1, 196, 16)
    expected = torch.relu(x @ mlp.fc1.weight.T + mlp.fc1.bias) @ mlp.fc2.weight.T + mlp.fc2.bias
    torch.testing.assert_close(mlp(x), expected)
    assert (F.gelu(mlp.fc1(x)) - F.relu(mlp.fc1(x))).abs().max() > 0.01


def test_lecture_block_of_torch_parts() -> None:
    """x + attn(LN(x)), then x + MLP(LN(x)), with torch's LayerNorm and MultiheadAttention, 8 heads, [1, 196, 768]."""
    model = ViT(depth=1, num_heads=8, act_layer="relu", num_classes=0).eval()
    block = model.blocks[0]
    attention = nn.MultiheadAttention(embed_dim=768, num_heads=8, batch_first=True)
    attention.load_state_dict(
        {
            "in_proj_weight": block.attn.qkv.weight,
            "in_proj_bias": block.attn.qkv.bias,
            "out_proj.weight": block.attn.proj.weight,
            "out_proj.bias": block.attn.proj.bias,
        }
    )
    x = torch.randn(1, 196, 768)
    norm = F.layer_norm(x, (768,), eps=1e-6)
    y = x + attention(norm, norm, norm)[0]
    norm = F.layer_norm(y, (768,), eps=1e-6)
    y = y + block.mlp.fc2(F.relu(block.mlp.fc1(norm)))
    assert y.shape == (1, 196, 768)
    torch.testing.assert_close(block(x), y, rtol=1e-4, atol=1e-5)


def test_lecture_softmax_head() -> None:
    """The output layer is Linear(D, 1000) and softmax over the classes."""
    model = build(num_classes=1000, head_act="softmax")
    x = torch.randn(3, 3, 16, 16)
    logits = F.linear(
        model.forward_head(model.forward_features(x), pre_logits=True), model.head.weight, model.head.bias
    )
    expected = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model(x).sum(dim=1), torch.ones(3))
    plain = build(num_classes=1000)
    assert list(plain.state_dict()) == list(model.state_dict())
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(x), logits)


def test_patch_sizes_give_their_number_of_tokens() -> None:
    for patch, tokens in ((8, 784), (14, 256), (16, 196), (32, 49)):
        model = ViT(patch_size=patch, embed_dim=8, num_heads=2, depth=0, class_token=False, global_pool="avg")
        assert model.forward_features(torch.zeros(1, 3, 224, 224)).shape == (1, tokens, 8)


def test_base_model_has_the_known_number_of_parameters() -> None:
    model = ViT(device="meta")
    assert sum(p.numel() for p in model.parameters()) == 86_567_656
    assert len(model.state_dict()) == 152


def test_depth_zero_is_embedding_norm_and_head() -> None:
    model = build(depth=0)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(x), model.head(model.norm(model._embed(x))[:, 0]))


# What it works with.

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "layer_scale_map": {"init_values": 0.3, "global_pool": "map"},
    "qk_norm_registers": {"qk_norm": True, "reg_tokens": 2, "no_embed_class": True},
    "rms": {"norm_layer": "rmsnorm"},
    "dynamic": {"dynamic_img_size": True, "dynamic_img_pad": True},
}


@pytest.mark.parametrize(
    "variant", ["layer_scale_map", pytest.param("qk_norm_registers", marks=pytest.mark.slow), "dynamic"]
)
def test_compile_fullgraph(variant: str) -> None:
    torch.compiler.reset()
    model = build(**VARIANTS[variant], depth=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 16, 16)
    y = model(x)
    y.square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    z = compiled(x)
    z.square().sum().backward()
    torch.testing.assert_close(z, y, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-4, atol=1e-4)


def test_compile_with_drop_path_and_checkpointing() -> None:
    torch.compiler.reset()
    model = build(drop_path_rate=0.5, init_values=0.3, depth=1).train()
    model.blocks[0].drop_path2 = mmfast.nn.DropPath(0.5)
    x = torch.randn(4, 3, 16, 16)
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).sum().backward()
    model.set_grad_checkpointing()
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_compiled_intermediates() -> None:
    torch.compiler.reset()
    model = build()
    x = torch.randn(2, 3, 16, 16)
    compiled = torch.compile(lambda t: model.forward_intermediates(t, norm=True), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model.forward_intermediates(x, norm=True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("variant", "strict"), [*((variant, False) for variant in VARIANTS), ("default", True)], ids=str
)
def test_export_with_a_dynamic_batch(variant: str, strict: bool) -> None:
    model = build(**VARIANTS[variant], depth=1)
    batch = torch.export.Dim("batch", min=1, max=64)
    x = torch.randn(2, 3, 16, 16)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch}}, strict=strict)
    x = torch.randn(7, 3, 16, 16)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


def test_export_static() -> None:
    model = build()
    x = torch.randn(2, 3, 16, 16)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


def test_export_with_a_dynamic_image_size() -> None:
    model = build(depth=1, dynamic_img_size=True)
    rows, columns = torch.export.Dim("rows", min=2, max=9), torch.export.Dim("columns", min=2, max=9)
    program = torch.export.export(
        model, (torch.randn(1, 3, 24, 32),), dynamic_shapes={"x": {2: 8 * rows, 3: 8 * columns}}, strict=False
    )
    for size in ((16, 40), (32, 24)):
        x = torch.randn(1, 3, *size)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_copies_and_files(variant: str) -> None:
    model = build(**VARIANTS[variant])
    x = torch.randn(2, 3, 16, 16)
    y = model(x)
    assert torch.equal(copy.deepcopy(model)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), y)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_dtypes(variant: str, dtype: torch.dtype) -> None:
    model = build(**VARIANTS[variant])
    x = torch.randn(2, 3, 16, 16)
    exact = model(x)
    found = copy.deepcopy(model).to(dtype)(x.to(dtype))
    assert found.dtype == dtype
    bound = 1e-5 if dtype == torch.float64 else 16 * torch.finfo(dtype).eps
    assert (found.float() - exact).abs().max() <= bound * exact.abs().max()


def test_norms_kept_in_float32() -> None:
    model = build(init_values=0.3)
    x = torch.randn(2, 3, 16, 16)
    exact = model(x)
    model.bfloat16()
    for module in model.modules():
        if isinstance(module, LayerNorm):
            module.float()
    found = model(x.bfloat16())
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).abs().max() <= 16 * torch.finfo(torch.bfloat16).eps * exact.abs().max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_trains(variant: str) -> None:
    model = build(**VARIANTS[variant], drop_path_rate=0.2).train()
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(4, 3, 16, 16)).float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_empty_batch(variant: str, train: bool) -> None:
    model = build(**VARIANTS[variant], drop_path_rate=0.3, patch_drop_rate=0.3).train(train)
    y = model(torch.randn(0, 3, 16, 16))
    assert y.shape == (0, 5)
    y.sum().backward()
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


def test_input_layouts() -> None:
    model = build()
    x = torch.randn(2, 3, 16, 16)
    y = model(x)
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), y)
    torch.testing.assert_close(model(x.transpose(2, 3).contiguous().transpose(2, 3)), y)


def test_gradcheck() -> None:
    model = build(embed_dim=4, depth=1, init_values=0.5).double()
    x = torch.randn(1, 3, 16, 16, dtype=torch.float64, requires_grad=True)

    def loss(gamma: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        names = {"blocks.0.ls1.gamma": gamma, "norm.weight": weight}
        return torch.func.functional_call(model, names, (x.detach(),))

    assert torch.autograd.gradcheck(loss, (model.blocks[0].ls1.gamma, model.norm.weight))


def test_second_derivatives() -> None:
    model = build(embed_dim=4, depth=1, img_size=8, patch_size=4, init_values=0.5).double()
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)

    def loss(gamma: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, {"blocks.0.ls1.gamma": gamma}, (x,)).square().sum()

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the others have no second derivative
        assert torch.autograd.gradgradcheck(loss, (model.blocks[0].ls1.gamma,))


def test_device_and_dtype_arguments() -> None:
    model = ViT(**BASE, dtype=torch.float64, global_pool="map", init_values=0.1, reg_tokens=1)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    meta = ViT(**BASE, device="meta")
    assert {p.device.type for p in meta.parameters()} == {"meta"}


def test_initial_weights_have_no_outliers() -> None:
    """A draw of 0 from the uniform generator must not become a weight at the cut."""
    from mmfast.nn._init import trunc_normal_

    class Edge(torch.Tensor):
        """A tensor whose uniform draws are all the lowest there is."""

        def uniform_(self, low: float = 0.0, high: float = 1.0, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
            return self.fill_(low)

        def new_empty(self, *args: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
            return super().new_empty(*args, **kwargs).as_subclass(Edge)

    weight = trunc_normal_(torch.empty(4).as_subclass(Edge), std=0.02)
    assert weight.abs().max() < 0.12
    for dtype in (torch.bfloat16, torch.float16):
        weight = trunc_normal_(torch.empty(100_000, dtype=dtype), std=0.02)
        assert weight.abs().max() < 0.12
        assert abs(weight.float().std().item() - 0.02) < 5e-4


def test_norm_layer_of_torch_becomes_mmfasts() -> None:
    model = ViT(**BASE, norm_layer=nn.LayerNorm, qk_norm=True)
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert {type(m) for m in norms} == {LayerNorm}
    assert norms[0].eps == 1e-5
    assert ViT(**BASE).norm.eps == 1e-6
    ops = {choice.op for choice in mmfast.explain(model.eval(), torch.randn(1, 3, 16, 16))}
    assert ops == {"layer_norm", "add_layer_norm", "attention", "linear_act", "patch_embed"}  # q and k are normalised


def test_activation_names() -> None:
    assert isinstance(build(act_layer="quick_gelu").blocks[0].mlp.act, QuickGELU)
    assert isinstance(build(act_layer="ReLU").blocks[0].mlp.act, nn.ReLU)


def test_attention_maps_are_what_the_model_applies() -> None:
    """The maps times v, projected, are the attention's output; later blocks are not run."""
    model = build(depth=3, qk_norm=True)
    x = torch.randn(2, 3, 16, 16)
    ran: list[int] = []
    handles = [b.mlp.register_forward_hook(lambda m, a, o, i=i: ran.append(i)) for i, b in enumerate(model.blocks)]
    maps = model.attention_maps(x, layers=[1])
    assert ran == [0]
    for handle in handles:
        handle.remove()
    (probabilities,) = maps
    assert probabilities.shape == (2, 2, 5, 5)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 2, 5))
    block = model.blocks[1]
    patches, prefix = model.forward_intermediates(
        x, indices=[0], output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
    )[0]
    tokens = block.norm1(torch.cat((prefix, patches), dim=1))
    v = block.attn._heads(tokens)[2]
    out = block.attn.proj((probabilities @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(block.attn(tokens), out, rtol=1e-4, atol=1e-5)


def test_attention_maps_have_gradients() -> None:
    model = build()
    x = torch.randn(1, 3, 16, 16, requires_grad=True)
    model.attention_maps(x)[0][0, 0, 0, 1].backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0


# Errors name the argument, what was expected and what came.

ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "heads": (
        {"embed_dim": 20, "num_heads": 3},
        ValueError,
        "embed_dim must be a multiple of num_heads, got embed_dim=20",
    ),
    "no_heads": ({"num_heads": 0}, ValueError, "num_heads=0"),
    "depth": ({"depth": -1}, ValueError, "depth must not be negative, got -1"),
    "pool": ({"global_pool": "mean"}, ValueError, "global_pool must be one of '', 'avg'.*got 'mean'"),
    "pool_token": ({"class_token": False}, ValueError, "global_pool='token' needs class_token=True"),
    "pos_embed": ({"pos_embed": "rope"}, ValueError, "pos_embed must be one of '', 'none', 'learn', got 'rope'"),
    "weight_init": ({"weight_init": "he"}, ValueError, "weight_init must be one of .*got 'he'"),
    "head_act": ({"head_act": "tanh"}, ValueError, "head_act must be one of None, 'softmax', got 'tanh'"),
    "act": ({"act_layer": "swishy"}, ValueError, "act_layer: expected one of .*got 'swishy'"),
    "act_module": ({"act_layer": nn.ReLU()}, TypeError, re.escape("expected a name or a module class, got ReLU()")),
    "norm": ({"norm_layer": "batchnorm"}, ValueError, "norm_layer must be one of layernorm, rmsnorm.*got 'batchnorm'"),
    "norm_module": ({"norm_layer": nn.LayerNorm(3)}, TypeError, "norm_layer must be a name or a module class"),
    "mlp": ({"mlp_layer": "moe"}, ValueError, "mlp_layer: expected one of mlp, swiglu, swiglu_packed.*got 'moe'"),
    "mlp_module": ({"mlp_layer": nn.ReLU()}, TypeError, "mlp_layer: expected a name or a module class"),
    "attn": ({"attn_layer": "diff"}, ValueError, "attn_layer must be 'attn' or a class .*got 'diff'"),
    "attn_module": ({"attn_layer": Attention(8)}, TypeError, "attn_layer must be a name or a module class"),
    "drop_path": ({"drop_path_rate": 1.5}, ValueError, re.escape("drop_path_rate must be in [0, 1], got 1.5")),
    "patch_drop": ({"patch_drop_rate": 1.0}, ValueError, re.escape("prob must be in [0, 1), got 1.0")),
    "patch_size": ({"patch_size": 0}, ValueError, "patch_size must be a positive integer or a pair"),
    "img_size": ({"img_size": 4}, ValueError, re.escape("img_size must be at least patch_size (8, 8), got (4, 4)")),
    "img_size_three": (
        {"img_size": (8, 8, 8)},
        ValueError,
        re.escape("img_size must be a positive integer or a pair"),
    ),
    "img_size_none": ({"img_size": None}, ValueError, "learned positions need an img_size"),
    "unknown": ({"rope": True}, TypeError, "rope"),
    "swiglu_odd": (
        {"mlp_layer": "swiglu_packed", "embed_dim": 18, "mlp_ratio": 0.5},
        ValueError,
        "must be even, got 9",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_constructor_errors(case: str) -> None:
    options, kind, message = ERRORS[case]
    with pytest.raises(kind, match=message):
        ViT(**{**BASE, **options})


IMAGES: dict[str, tuple[dict[str, Any], torch.Tensor, type[Exception], str]] = {
    "size": ({}, torch.zeros(1, 3, 24, 16), ValueError, r"image size must be \(16, 16\), got \(24, 16\)"),
    "not_divisible": (
        {"dynamic_img_size": True},
        torch.zeros(1, 3, 20, 16),
        ValueError,
        r"image size must be a multiple of patch_size \(8, 8\), got \(20, 16\)",
    ),
    "channels": (
        {},
        torch.zeros(1, 1, 16, 16),
        ValueError,
        r"images must have shape \(B, 3, H, W\), got \(1, 1, 16, 16\)",
    ),
    "rank": ({}, torch.zeros(3, 16, 16), ValueError, r"images must have shape \(B, 3, H, W\), got \(3, 16, 16\)"),
    "uint8": ({}, torch.zeros(1, 3, 16, 16, dtype=torch.uint8), TypeError, "must be floating point.*got torch.uint8"),
}


@pytest.mark.parametrize("case", IMAGES)
def test_image_errors(case: str) -> None:
    options, x, kind, message = IMAGES[case]
    with pytest.raises(kind, match=message):
        build(**options)(x)


def test_method_errors() -> None:
    model = build()
    x = torch.zeros(1, 3, 16, 16)
    with pytest.raises(ValueError, match=re.escape("indices (last n blocks) must be in 1..2, got 3")):
        model.forward_intermediates(x, 3)
    with pytest.raises(ValueError, match=re.escape("indices must be block indices in -2..1, got [2]")):
        model.forward_intermediates(x, [2])
    with pytest.raises(ValueError, match=re.escape("layers must be block indices in -2..1, got []")):
        model.attention_maps(x, [])
    with pytest.raises(ValueError, match="output_fmt must be one of 'NCHW', 'NLC', got 'NHWC'"):
        model.forward_intermediates(x, output_fmt="NHWC")
    with pytest.raises(ValueError, match="head_fusion must be one of None, 'mean', 'max', 'min', got 'sum'"):
        model.attention_maps(x, head_fusion="sum")
    with pytest.raises(ValueError, match="cannot add an attention pool, got global_pool='map'"):
        model.reset_classifier(3, "map")
    with pytest.raises(ValueError, match="pool_type must be"):
        model.pool(torch.zeros(1, 5, 16), "sum")
    with pytest.raises(ValueError, match="weight_init must be one of"):
        model.init_weights("he")
    dropped = build(patch_drop_rate=0.5).train()
    with pytest.raises(ValueError, match=r"'NCHW' needs all 2 \* 2 patches, got 2"):
        dropped.forward_intermediates(x)
    pair = build(global_pool="map")
    with pytest.raises(ValueError, match="cannot add an attention pool, got global_pool='prr'"):
        pair.reset_classifier(3, "prr")


def test_attention_maps_need_known_blocks() -> None:
    class Other(nn.Identity):
        pass

    model = ViT(**BASE, block_fn=lambda **kwargs: Other())
    with pytest.raises(TypeError, match="attention_maps needs a Block with Attention, got Other"):
        model.attention_maps(torch.zeros(1, 3, 16, 16))
