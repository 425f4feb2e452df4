"""transformers: its attention implementations, masks, image sizes, and its registry of attention functions."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmfast

from .families import SIZES, build, compare


@pytest.fixture(autouse=True, params=[None, "torch"], ids=["default", "op"])
def route(request: pytest.FixtureRequest) -> Iterator[None]:
    """By default a CPU tensor takes the original code; a forced backend, the path that a GPU takes."""
    with mmfast.backend(request.param):
        yield


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_transformers_hidden_states_and_attentions(name: str) -> None:
    models = [mmfast.accelerate(build(name)), build(name)]
    for model in models:
        model.set_attn_implementation("eager")
    found, expected = (
        model(images_, output_hidden_states=True, output_attentions=True) for model in models for images_ in [X]
    )
    for key in ("hidden_states", "attentions"):
        assert len(found[key]) == len(expected[key]) > 1
        assert all(torch.equal(a, b) for a, b in zip(found[key], expected[key], strict=True))


X = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)


def test_transformers_save_pretrained(tmp_path: object) -> None:
    model = mmfast.accelerate(build("vit"))
    model.save_pretrained(tmp_path)
    loaded = type(build("vit")).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(X).logits, model(X).logits)
    assert "accelerated" not in mmfast.report(loaded).counts


@pytest.mark.parametrize("name", ["vit", "dinov2", "dinov2-registers"])
def test_another_attention_implementation_is_left_alone(name: str) -> None:
    model, original = mmfast.accelerate(build(name)), build(name)
    for m in (model, original):
        m.set_attn_implementation("eager")  # after, as for attention maps
    assert "attention" not in compare(model, original, lambda m: m(X).logits)
    reason = "has attention implementation 'eager'"
    rows = [row for row in mmfast.report(model) if row.op == "attention"]
    assert rows
    assert all(row.reason.endswith(f"fuses nothing now: {reason}") for row in rows)
    rows = [row for row in mmfast.report(mmfast.accelerate(original)) if row.op == "attention"]
    assert {(row.status, row.reason) for row in rows} == {("skipped", reason)}
    model.set_attn_implementation("sdpa")
    assert [c.op for c in mmfast.explain(model, X)].count("attention") == len(rows)


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_attention_masks(name: str) -> None:
    """Of tokens, as transformers makes one of them and hands it to each layer."""
    model, original = (getattr(m, m.base_model_prefix) for m in (mmfast.accelerate(build(name)), build(name)))
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[0, 3:] = 0

    def call(m: Any) -> Tensor:
        return m(X, attention_mask=mask).last_hidden_state

    assert compare(model, original, call).count("attention") == 2
    assert not torch.allclose(call(model), model(X).last_hidden_state)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_dropout_of_probabilities(rate: float) -> None:
    from transformers import ViTConfig, ViTModel

    original = ViTModel(ViTConfig(**SIZES, attention_probs_dropout_prob=rate), add_pooling_layer=False).train()
    model = mmfast.accelerate(copy.deepcopy(original))
    ran = compare(model, original, lambda m: m(X).last_hidden_state)
    assert ran.count("attention") == (0 if rate else 2)
    assert compare(model.eval(), original.eval(), lambda m: m(X).last_hidden_state).count("attention") == 2


def test_vit_of_other_image_sizes() -> None:
    model, original = mmfast.accelerate(build("vit")), build("vit")
    x = torch.randn(2, 3, 24, 32)
    ran = compare(model, original, lambda m: m(x, interpolate_pos_encoding=True).logits)
    assert ran.count("patch_embed") == 1
    for m in (model, original):
        with pytest.raises(ValueError, match="doesn't match model"):
            m(x)
        with pytest.raises(ValueError, match="channel dimension"):
            m(torch.randn(2, 1, 16, 16))


@pytest.mark.parametrize("name", ["dinov2", "dinov2-registers"])
@pytest.mark.parametrize("size", [(24, 32), (24, 24), (32, 8), (17, 17)], ids=["24x32", "24x24", "32x8", "17x17"])
def test_dinov2_of_other_image_sizes(name: str, size: tuple[int, int]) -> None:
    """32x8 has as many patches as the model's own size, and other positions; 17x17 has a last column that is cut."""
    model, original = mmfast.accelerate(build(name)), build(name)
    x = torch.randn(2, 3, *size)
    assert compare(model, original, lambda m: m(x).logits).count("patch_embed") == (0 if size == (17, 17) else 1)


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_masked_patches(name: str) -> None:
    from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

    torch.manual_seed(0)
    if name == "vit":
        original: nn.Module = ViTModel(ViTConfig(**SIZES), add_pooling_layer=False, use_mask_token=True)
    else:
        original = Dinov2Model(Dinov2Config(**SIZES, mlp_ratio=2))
    nn.init.normal_(original.embeddings.mask_token)
    model = mmfast.accelerate(copy.deepcopy(original.eval()))
    masked = torch.tensor([[True, False, False, True], [False, False, True, False]])
    ran = compare(model, original, lambda m: m(X, bool_masked_pos=masked).last_hidden_state)
    assert ran.count("patch_embed") == 1
    assert not torch.equal(model(X, bool_masked_pos=masked).last_hidden_state, model(X).last_hidden_state)


def test_pixels_of_another_dtype() -> None:
    """DINOv2 converts them to its own."""
    model, original = (m.bfloat16() for m in (mmfast.accelerate(build("dinov2")), build("dinov2")))
    found = [m(X).logits for m in (model, original)]
    assert found[0].dtype == torch.bfloat16
    torch.testing.assert_close(*found, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("registers", [False, True])
def test_swiglu(registers: bool) -> None:
    import transformers

    torch.manual_seed(0)
    prefix = "Dinov2WithRegisters" if registers else "Dinov2"
    config = getattr(transformers, f"{prefix}Config")(**SIZES, mlp_ratio=2, use_swiglu_ffn=True)
    original = getattr(transformers, f"{prefix}Model")(config).eval()
    model = mmfast.accelerate(copy.deepcopy(original), strict=True)
    assert compare(model, original, lambda m: m(X).last_hidden_state).count("linear_act") == 2


@pytest.mark.parametrize(
    ("act", "fused"),
    [
        *((act, True) for act in ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "quick_gelu", "gelu_python")),
        *((act, True) for act in ("silu", "relu")),
        *((act, False) for act in ("gelu_10", "tanh")),
    ],
)
def test_activations(act: str, fused: bool) -> None:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    original = ViTModel(ViTConfig(**SIZES, hidden_act=act), add_pooling_layer=False).eval()
    model = mmfast.accelerate(copy.deepcopy(original))
    assert compare(model, original, lambda m: m(X).last_hidden_state).count("linear_act") == (2 if fused else 0)
    statuses = {row.status for row in mmfast.report(model) if row.op == "linear_act"}
    assert statuses == ({"accelerated", "fused"} if fused else {"skipped"})


@pytest.fixture
def registered() -> Iterator[None]:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    import mmfast.integrations.transformers

    mmfast.integrations.transformers.register()
    mmfast.integrations.transformers.register()
    yield
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop("mmfast")


def _clip() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    return CLIPTextModel(config).eval()


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=20, num_attention_heads=4, num_key_value_heads=2, **sizes)
    return LlamaForCausalLM(config).eval()


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("make", [_clip, _llama], ids=["clip text", "llama"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_registered_attention_keeps_masks_and_causality(make: Any, padded: bool) -> None:
    torch.manual_seed(0)
    model = make()
    ids = torch.randint(3, 20, (2, 6))
    mask = torch.ones(2, 6, dtype=torch.long)
    if padded:
        mask[1, : 3 if make is _llama else 6] = 0 if make is _llama else 1
        mask[1, 4:] = mask[1, 4:] if make is _llama else 0
    call = {"input_ids": ids, "attention_mask": mask}
    expected = model(**call)[0]
    model.set_attn_implementation("mmfast")
    found = model(**call)[0]
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)
    assert [c.op for c in mmfast.explain(model, **call)].count("attention") == 2


@pytest.mark.usefixtures("registered")
def test_registered_attention_generates_the_same() -> None:
    torch.manual_seed(0)
    model = _llama()
    ids = torch.randint(3, 20, (2, 4))
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    model.set_attn_implementation("mmfast")
    assert torch.equal(model.generate(ids, **options), expected)


@pytest.mark.usefixtures("registered")
def test_registered_attention_in_training() -> None:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(**SIZES, attention_probs_dropout_prob=0.5)
    original = ViTModel(config, add_pooling_layer=False).train()
    model = copy.deepcopy(original)
    model.set_attn_implementation("mmfast")
    assert "attention" not in compare(model, original, lambda m: m(X).last_hidden_state)  # dropout is transformers'
    assert compare(model.eval(), original.eval(), lambda m: m(X).last_hidden_state).count("attention") == 2
    # accelerate leaves to the registry what was given to it.
    mmfast.accelerate(model)
    assert "has attention implementation 'mmfast'" in {row.reason for row in mmfast.report(model)}
    assert compare(model, original, lambda m: m(X).last_hidden_state).count("attention") == 2


@pytest.mark.triton
def test_registered_attention_by_kernels(registered: None) -> None:
    torch.manual_seed(0)
    original = _llama()
    model = copy.deepcopy(original)
    model.set_attn_implementation("mmfast")
    ids = torch.randint(3, 20, (1, 5))
    with mmfast.backend("triton"):
        found = model.model(ids).last_hidden_state
        (found * torch.linspace(-1, 1, 16)).sum().backward()
    expected = original.model(ids).last_hidden_state
    (expected * torch.linspace(-1, 1, 16)).sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for a, b in zip(model.model.parameters(), original.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
