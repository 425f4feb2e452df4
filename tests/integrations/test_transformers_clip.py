"""transformers' CLIP and SigLIP: both towers, their masks, embeddings and pooling, and older forms of their parts."""

from __future__ import annotations

import copy
import io
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmfast
from mmfast.integrations.transformers import _clip as parts

from .families import compare

DEPTH = 2


@pytest.fixture(autouse=True, params=[None, "torch"], ids=["default", "op"])
def route(request: pytest.FixtureRequest) -> Iterator[None]:
    """By default a CPU tensor takes the original code; a forced backend, the path that a GPU takes."""
    with mmfast.backend(request.param):
        yield


op_route = pytest.mark.parametrize("route", ["torch"], indirect=True, ids=["op"])

TEXT = torch.tensor([[1, 5, 7, 9, 29, 0, 0], [1, 3, 29, 0, 0, 0, 0], [1, 2, 4, 8, 16, 20, 29]])
PADDING = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
IMAGES = torch.linspace(-1, 1, 3 * 3 * 16 * 16).reshape(3, 3, 16, 16).sin()
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": DEPTH, "num_attention_heads": 2}
TOKENS = {"vocab_size": 30, "max_position_embeddings": 7, "bos_token_id": 1, "eos_token_id": 29, "pad_token_id": 0}


def make(kind: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The same model at each call, with weights far from their initial values; "CLIPModel", "SiglipTextModel", ..."""
    import transformers

    family = "CLIP" if kind.startswith("CLIP") else "Siglip"
    text = {**SIZES, **TOKENS, **options}
    vision = {**SIZES, "image_size": 16, "patch_size": 8, **options}
    projection = {"projection_dim": 8} if family == "CLIP" else {}
    if "Text" in kind:
        config = getattr(transformers, f"{family}TextConfig")(**text, **projection)
    elif "Vision" in kind:
        config = getattr(transformers, f"{family}VisionConfig")(**vision, **projection)
    else:
        config = getattr(transformers, f"{family}Config")(text_config=text, vision_config=vision, **projection)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        model = getattr(transformers, kind)._from_config(config, attn_implementation=attention).to(dtype).eval()
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, dtype=dtype)
    return model


def both(kind: str, **options: Any) -> tuple[Any, Any]:
    """An accelerated model, and the original."""
    original = make(kind, **options)
    return mmfast.accelerate(copy.deepcopy(original)), original


def similarity(model: Any, padding: Tensor | None = None) -> Tensor:
    dtype = next(model.parameters()).dtype
    return model(input_ids=TEXT, pixel_values=IMAGES.to(dtype), attention_mask=padding).logits_per_image


def pooled(model: Any) -> Tensor:
    """The output of a model of one tower."""
    out = model(input_ids=TEXT) if "Text" in type(model).__name__ else model(pixel_values=IMAGES)
    return next(out[name] for name in ("text_embeds", "image_embeds", "pooler_output") if name in out)


models = pytest.mark.parametrize("kind", ["CLIPModel", "SiglipModel"])


@models
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("padding", [None, PADDING], ids=["whole", "padded"])
def test_both_towers(kind: str, training: bool, padding: Tensor | None) -> None:
    model, original = both(kind)
    model.train(training), original.train(training)
    ran = Counter(compare(model, original, lambda m: similarity(m, padding)))
    head = int(kind == "SiglipModel")
    norms = 2 * 2 * DEPTH + 3  # of both towers; the final ones, and CLIP's first or the one of SigLIP's head
    # On the torch backend add_layer_norm asks layer_norm for its second half.
    assert ran == {
        "patch_embed": 1,
        "layer_norm": norms,
        "add_layer_norm": 2 * DEPTH,
        "attention": 2 * DEPTH + head,
        "linear_act": 2 * DEPTH + head,
    }


@op_route
@models
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_outputs_and_gradients_in_float64(kind: str, attention: str) -> None:
    model, original = both(kind, attention=attention, dtype=torch.float64)
    results = []
    for m in (model, original):
        out = similarity(m, PADDING)
        (out * torch.arange(9.0, dtype=torch.float64).view(3, 3)).sum().backward()
        results.append((out.detach(), [p.grad for p in m.parameters()]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-12, atol=1e-12)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "kind",
    [
        *("CLIPTextModel", "CLIPVisionModel", "CLIPTextModelWithProjection", "CLIPVisionModelWithProjection"),
        *("SiglipTextModel", "SiglipVisionModel"),
    ],
)
def test_one_tower(kind: str) -> None:
    model, original = both(kind)
    ran = compare(model, original, pooled)
    assert ran.count("add_layer_norm") == DEPTH
    assert ran.count("attention") == ran.count("linear_act") == DEPTH + (kind == "SiglipVisionModel")
    assert ran.count("patch_embed") == ("Vision" in kind)


@op_route
@models
def test_the_report_accounts_for_every_module(kind: str) -> None:
    model = make(kind)
    before = mmfast.report(model)
    assert "skipped" not in before.counts
    mmfast.accelerate(model, strict=True)
    rows = {row.name: row for row in mmfast.report(model)}
    known = {row.name for row in before if row.op}
    assert {row.status for row in rows.values()} == {"accelerated", "fused", "unknown"}
    assert all(rows[name].status != "unknown" for name in known)
    unknown = {row.type.rpartition(".")[2] for row in rows.values() if row.status == "unknown"}
    prefix = "CLIP" if kind == "CLIPModel" else "Siglip"
    containers = {f"{prefix}{part}" for part in ("Model", "TextModel", "VisionModel", "Encoder", "TextEmbeddings")}
    others = {"Embedding", "Linear", "ModuleList"} | (
        {"NonDynamicallyQuantizableLinear"} if prefix != "CLIP" else set()
    )
    assert unknown == containers | others
    fused = {name.rpartition(".")[2] for name, row in rows.items() if row.status == "fused"}
    head = {"attention"} if prefix != "CLIP" else set()
    assert fused == {"layer_norm2", "fc1", "activation_fn", "patch_embedding"} | head


def masks_of(model: nn.Module, call: Callable[[nn.Module], Any]) -> list[tuple[bool, bool]]:
    """Of each attention that runs in `call(model)`: whether it is given a mask, and whether it is causal."""
    seen: list[tuple[bool, bool]] = []
    real = parts.attend

    def spy(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
        seen.append((mask is not None, options["is_causal"]))
        return real(q, k, v, mask, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "attend", spy)
        call(model)
    return seen


@op_route
def test_text_is_causal_without_a_mask() -> None:
    model = mmfast.accelerate(make("CLIPModel"))
    image = [(False, False)] * DEPTH
    assert masks_of(model, similarity) == image + [(False, True)] * DEPTH
    assert masks_of(model, lambda m: similarity(m, PADDING)) == image + [(True, False)] * DEPTH
    changed = TEXT.clone()
    changed[1, 3:] = 11  # after the end of text
    a, b = (model.get_text_features(text).pooler_output for text in (TEXT, changed))
    assert torch.equal(a[1], b[1])
    assert masks_of(mmfast.accelerate(make("SiglipModel")), similarity) == [(False, False)] * 2 * DEPTH


@models
def test_another_attention_implementation_is_left_alone(kind: str) -> None:
    model, original = both(kind)
    head = int(kind == "SiglipModel")  # whose attention is torch.nn's
    for m in (model, original):
        m.set_attn_implementation("eager")
    assert compare(model, original, similarity).count("attention") == head
    reason = "has attention implementation 'eager'"
    rows = [row for row in mmfast.report(model) if row.name.endswith("self_attn")]
    assert len(rows) == 2 * DEPTH
    assert all(row.reason.endswith(f"fuses nothing now: {reason}") for row in rows)
    rows = [row for row in mmfast.report(original) if row.name.endswith("self_attn")]
    assert {(row.status, row.reason) for row in rows} == {("skipped", reason)}
    model.set_attn_implementation("sdpa")
    assert [c.op for c in mmfast.explain(similarity, model)].count("attention") == 2 * DEPTH + head


SILENT = ("sdpa", "attentions")  # of which transformers says that there are none


@models
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hidden_states_and_attentions(kind: str, attention: str) -> None:
    found, expected = (
        m(input_ids=TEXT, pixel_values=IMAGES, output_hidden_states=True, output_attentions=True)
        for m in both(kind, attention=attention)
    )
    for tower in ("text_model_output", "vision_model_output"):
        for key in ("hidden_states", "attentions"):
            a, b = found[tower][key] or (), expected[tower][key] or ()
            assert len(a) == len(b) == (DEPTH + (key == "hidden_states") if (attention, key) != SILENT else 0)
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("act", "fused"),
    [("quick_gelu", True), ("gelu", True), ("gelu_pytorch_tanh", True), ("relu", True), ("tanh", False)],
)
def test_activations(act: str, fused: bool) -> None:
    model, original = both("CLIPModel", hidden_act=act)
    assert compare(model, original, similarity).count("linear_act") == (2 * DEPTH if fused else 0)
    statuses = {row.status for row in mmfast.report(model) if row.op == "linear_act"}
    assert statuses == ({"accelerated", "fused"} if fused else {"skipped"})


@pytest.mark.parametrize("kind", ["CLIPVisionModel", "SiglipVisionModel"])
def test_images_of_other_sizes(kind: str) -> None:
    model, original = both(kind)
    x = torch.randn(2, 3, 24, 32)
    ran = compare(model, original, lambda m: m(x, interpolate_pos_encoding=True).pooler_output)
    assert "patch_embed" not in ran
    assert compare(model, original, lambda m: m(IMAGES, interpolate_pos_encoding=True).pooler_output)
    for m in (model, original):
        with pytest.raises((ValueError, RuntimeError)):
            m(x)
        with pytest.raises(RuntimeError, match="channels"):
            m(torch.randn(2, 1, 16, 16))
    if kind == "SiglipVisionModel":  # which takes any image of as many patches
        assert "patch_embed" in compare(model, original, lambda m: m(torch.ones(2, 3, 8, 32)).pooler_output)
        ran = compare(model, original, lambda m: m(torch.ones(2, 3, 18, 17)).pooler_output)
        assert "patch_embed" not in ran  # a last row and column that no patch has


@pytest.mark.parametrize("kind", ["CLIPVisionModel", "SiglipVisionModel"])
def test_positions_are_looked_up(kind: str) -> None:
    """As they are at each call: by their buffer of indices, and by a module that may be another one by then."""
    model, original = both(kind)
    before = pooled(original)
    for m in (model, original):
        m.embeddings.position_ids = m.embeddings.position_ids.flip(1)
    assert "patch_embed" in compare(model, original, pooled)
    assert not torch.allclose(pooled(original), before, atol=1e-3)
    seen: list[Any] = []
    for m in (model, original):
        table = m.embeddings.position_embedding
        table.register_forward_hook(lambda _m, a, y: seen.append(tuple(y.shape)) or y * 2)
    assert "patch_embed" in compare(model, original, pooled)
    assert len(set(seen)) == 1


def test_pixels_of_another_dtype() -> None:
    """Both models convert them."""
    for kind in ("CLIPVisionModel", "SiglipVisionModel"):
        model, original = both(kind)
        whole = (IMAGES * 10).to(torch.int32)
        assert "patch_embed" in compare(model, original, lambda m, x=whole: m(x).pooler_output)
        half = [m.bfloat16()(IMAGES).pooler_output for m in (model, original)]
        assert half[0].dtype == torch.bfloat16
        torch.testing.assert_close(*half, rtol=0.1, atol=0.1)


@models
def test_autocast(kind: str) -> None:
    model, original = both(kind)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = similarity(model), similarity(original)
    exact = similarity(original)
    assert found.dtype == expected.dtype
    assert (found - exact).abs().max() <= 2 * (expected - exact).abs().max() + 1e-2 * exact.abs().max()


@models
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_dropout_of_probabilities(kind: str, rate: float) -> None:
    model, original = both(kind, attention_dropout=rate)
    model.train(), original.train()
    head = int(kind == "SiglipModel")
    assert compare(model, original, similarity).count("attention") == head + (0 if rate else 2 * DEPTH)
    assert compare(model.eval(), original.eval(), similarity).count("attention") == head + 2 * DEPTH


@op_route
@models
def test_gradient_checkpointing(kind: str) -> None:
    model, original = both(kind)
    for m in (model, original):
        m.train()
    model.gradient_checkpointing_enable()
    compare(model, original, similarity)


class LoRA(nn.Module):
    """As peft wraps a linear layer."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base_layer = base
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.down, self.up = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


@pytest.mark.parametrize("when", ["before", "after"])
@models
def test_adapters_are_called(kind: str, when: str) -> None:
    original = make(kind)
    plain = similarity(original)
    model = copy.deepcopy(original)
    if when == "after":
        mmfast.accelerate(model)
    for m in (model, original):
        for tower in (m.text_model, m.vision_model):
            layer = tower.encoder.layers[0]
            for parent, name in ((layer.self_attn, "q_proj"), (layer.self_attn, "out_proj"), (layer.mlp, "fc1")):
                setattr(parent, name, LoRA(getattr(parent, name)))
    mmfast.accelerate(model)
    ran = compare(model, original, similarity)
    assert ran.count("attention") >= 2 * DEPTH
    assert not torch.allclose(similarity(model), plain, atol=1e-2)


@op_route
def test_a_rank_has_its_own_heads_alone() -> None:
    """Under tensor parallelism the projections of a rank are narrower; each module still says how wide a head is."""
    from transformers import ViTConfig, ViTModel

    vit = ViTModel(ViTConfig(**SIZES, image_size=16, patch_size=8), add_pooling_layer=False).eval()
    for original in (make("CLIPVisionModel"), make("SiglipTextModel"), vit):
        for module in original.modules():
            if hasattr(module, "q_proj"):
                for name in ("q_proj", "k_proj", "v_proj"):
                    setattr(module, name, nn.Linear(16, 8))
                setattr(module, "out_proj" if hasattr(module, "out_proj") else "o_proj", nn.Linear(8, 16))
        model = mmfast.accelerate(copy.deepcopy(original))
        given = TEXT if "Text" in type(original).__name__ else IMAGES
        ran = compare(model, original, lambda m, x=given: m(x).last_hidden_state)
        assert ran.count("attention") == DEPTH


@op_route
def test_the_pooling_head() -> None:
    model, original = both("SiglipVisionModel")
    seen: list[Any] = []
    for m in (model, original):
        m.head.attention.register_forward_hook(lambda _m, _a, y: seen.append(y))
    compare(model, original, pooled)
    assert all(y[1] is not None for y in seen)  # the weights, that a hook may want
    row = next(row for row in mmfast.report(model) if row.name == "head")
    assert row.reason.endswith("fuses nothing now: attention has hooks or a forward of its own")
    model, original = both("SiglipVisionModel")
    for m in (model, original):
        m.train().head.attention.dropout = 0.5
    assert compare(model, original, pooled).count("attention") == DEPTH
    handle = nn.modules.module.register_module_forward_hook(lambda m, _a, _y: seen.append(type(m).__name__))
    try:
        del seen[:]
        pooled(model.eval())
    finally:
        handle.remove()
    assert "MultiheadAttention" in seen


@op_route
@models
def test_files_copies_and_restore(kind: str, tmp_path: Path) -> None:
    original = make(kind)
    classes, members = [type(m) for m in original.modules()], [dict(m.__dict__) for m in original.modules()]
    expected = similarity(original)
    model = mmfast.accelerate(original)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        torch.testing.assert_close(similarity(other), expected, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = type(make(kind)).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(similarity(loaded), expected, rtol=1e-5, atol=1e-5)
    assert "accelerated" not in mmfast.report(loaded).counts
    mmfast.restore(model)
    assert [type(m) for m in model.modules()] == classes
    for module, before in zip(model.modules(), members, strict=True):
        assert module.__dict__.keys() == before.keys()
        assert all(module.__dict__[key] is before[key] for key in before)
    assert torch.equal(similarity(model), expected)


@op_route
@models
def test_compiled_without_graph_breaks(kind: str) -> None:
    torch._dynamo.reset()
    model, original = both(kind, dtype=torch.float64, num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(similarity(compiled), similarity(original), rtol=1e-12, atol=1e-12)


class Similarity(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, text: Tensor, images: Tensor) -> Tensor:
        return self.model(input_ids=text, pixel_values=images).logits_per_image


@op_route
@models
def test_traced_and_exported(kind: str) -> None:
    model, original = (Similarity(m) for m in both(kind, num_hidden_layers=1))
    expected = original(TEXT, IMAGES)
    traced = torch.jit.trace(model, (TEXT, IMAGES), check_trace=False)
    torch.testing.assert_close(traced(TEXT, IMAGES), expected, rtol=1e-5, atol=1e-5)
    exported = torch.export.export(model, (TEXT, IMAGES), strict=False).module()
    torch.testing.assert_close(exported(TEXT, IMAGES), expected, rtol=1e-5, atol=1e-5)


@op_route
@models
def test_a_text_of_one_token(kind: str) -> None:
    model, original = both(kind)
    for text in (TEXT[:, :1], TEXT[:1, :3]):
        a, b = (m.get_text_features(text).pooler_output for m in (model, original))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_on_a_cpu_the_original_code_runs() -> None:
    with mmfast.backend(None):
        for kind in ("CLIPModel", "SiglipModel"):
            model, original = both(kind)
            assert torch.equal(similarity(model, PADDING), similarity(original, PADDING))


@pytest.mark.triton
@op_route
@models
def test_both_towers_by_kernels(kind: str, device: torch.device) -> None:
    original = make(kind, num_hidden_layers=1).to(device)
    model = mmfast.accelerate(copy.deepcopy(original))
    padding = PADDING[:2].to(device) if kind == "SiglipModel" else None
    inputs = {"input_ids": TEXT[:2].to(device), "pixel_values": IMAGES[:2].to(device), "attention_mask": padding}

    def outcome(m: Any) -> tuple[Tensor, dict[str, Tensor]]:
        out = m(**inputs).logits_per_image
        (out * torch.tensor([[1.0, -2.0], [0.5, 1.5]], device=device)).sum().backward()
        return out.detach(), {name: p.grad for name, p in m.named_parameters() if p.grad is not None}

    got: list[Any] = []
    with mmfast.backend("triton"):
        choices = mmfast.explain(lambda: got.append(outcome(model)))
    found, expected = got[0], outcome(original)
    head = int(kind == "SiglipModel")
    ran = Counter((choice.op, choice.backend) for choice in choices)
    assert ran == {
        ("patch_embed", "triton"): 1,
        ("layer_norm", "triton"): 5,
        ("add_layer_norm", "triton"): 2,
        ("attention", "triton"): 2 + head,
        ("linear_act", "triton"): 2 + head,
    }
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    assert found[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-3, atol=2e-4, msg=lambda t, n=name: f"{n}: {t}")
