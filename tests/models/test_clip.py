"""CLIP's own behaviour: the lecture's shapes and poolings, hooks, texts cut short, compilation, arguments."""

from __future__ import annotations

import copy
import math
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mmfast
from mmfast.models import CLIP, _clip_block, _clip_text, clip_names
from mmfast.models._clip_config import CLIP_MEAN, CLIP_STD

TEXT: dict[str, Any] = {"context_length": 9, "vocab_size": 30, "width": 16, "heads": 2, "layers": 2}
VIT: dict[str, Any] = {"layers": 2, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16}
RESNET: dict[str, Any] = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 32, "patch_size": None, "image_size": 32}
TRUNK = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 2, "num_heads": 2, "class_token": False}
SIGLIP = {"trunk": {**TRUNK, "global_pool": "map"}, "timm_pool": "map", "timm_proj": "none"}
SIGLIP_TEXT = {**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
END = TEXT["vocab_size"] - 1


def build(vision: dict[str, Any] = VIT, text: dict[str, Any] = TEXT, dim: int = 8, **options: Any) -> CLIP:
    """A model in float64 with random weights, in evaluation mode."""
    model = CLIP(dim, vision, text, **options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def images(model: CLIP, batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, *model.visual.image_size, dtype=torch.float64)


def texts(*ends: int, length: int = 9) -> Tensor:
    """Ids padded with 0 behind the end of each text."""
    ids = torch.zeros(len(ends), length, dtype=torch.int64)
    for row, end in enumerate(ends):
        ids[row, :end] = torch.randint(1, END, (end,))
        ids[row, end] = END
    return ids


def assert_same(ours: Any, theirs: Any, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


# The lecture: n = 50 image tokens of 768, m = 12 text tokens of 512, both projected to 256.


@pytest.fixture(scope="module")
def lecture() -> Callable[[str, str], CLIP]:
    def make(image_pool: str, text_pool: str) -> CLIP:
        torch.manual_seed(1)
        vision = {"layers": 1, "width": 768, "patch_size": 32, "image_size": 224, "pool_type": image_pool}
        text = {"layers": 1, "context_length": 12, "vocab_size": 100, "pool_type": text_pool}
        return CLIP(256, vision, text).eval()

    return make


@pytest.mark.parametrize("text_pool", ["argmax", "avg"])
@pytest.mark.parametrize("image_pool", ["tok", "avg"])
def test_lecture_shapes_and_poolings(lecture: Callable[[str, str], CLIP], image_pool: str, text_pool: str) -> None:
    model = lecture(image_pool, text_pool)
    x, ids = torch.randn(2, 3, 224, 224), texts(11, 6, length=12)
    ids[ids == END] = 99
    with torch.no_grad():
        image_tokens, text_tokens = model.image_tokens(x), model.text_tokens(ids)
        assert image_tokens.shape == (2, 50, 768)
        assert text_tokens.shape == (2, 12, 512)
        image = image_tokens[:, 0] if image_pool == "tok" else image_tokens[:, 1:].mean(dim=1)
        if text_pool == "argmax":
            text = torch.stack([text_tokens[0, 11], text_tokens[1, 6]])
        else:
            text = torch.stack([text_tokens[0].mean(dim=0), text_tokens[1, :7].mean(dim=0)])
        image, text = image @ model.visual.proj, text @ model.text_projection
        assert image.shape == text.shape == (2, 256)
        assert_same(model.encode_image(x), image, 1e-4)
        assert_same(model.encode_text(ids), text, 1e-4)
        image, text = image / image.norm(dim=-1, keepdim=True), text / text.norm(dim=-1, keepdim=True)
        found, found_text, scale = model(x, ids)
        assert_same((found, found_text), (image, text), 1e-4)
        assert_same(scale, torch.tensor(1 / 0.07), 1e-6)
        logits, transposed = model.get_logits(x, ids)
        assert_same(logits, image @ text.T / 0.07, 1e-3)
        assert torch.equal(transposed, logits.T)


def test_the_towers_by_their_formula() -> None:
    """Patches, class token, positions, norms, attention and MLP written out, for both towers."""
    model = build(quick_gelu=True)
    x, ids = images(model), texts(4, 8, 2)

    def attend(block: Any, y: Tensor, causal: bool) -> Tensor:
        batch, length, width = y.shape
        q, k, v = (
            part.view(batch, length, 2, width // 2).transpose(1, 2)
            for part in F.linear(y, block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, dim=-1)
        )
        scores = q @ k.transpose(-1, -2) / math.sqrt(width // 2)
        if causal:
            scores = scores + torch.full((length, length), -math.inf, dtype=y.dtype).triu(1)
        return block.attn.out_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width))

    def run(transformer: Any, y: Tensor, causal: bool) -> Tensor:
        for block in transformer.resblocks:
            y = y + attend(block, block.ln_1(y), causal)
            hidden = block.mlp.c_fc(block.ln_2(y))
            y = y + block.mlp.c_proj(hidden * torch.sigmoid(1.702 * hidden))
        return y

    visual = model.visual
    y = F.conv2d(x, visual.conv1.weight, stride=8).flatten(2).transpose(1, 2)
    y = torch.cat([visual.class_embedding.expand(3, 1, -1), y], dim=1) + visual.positional_embedding
    y = visual.ln_post(run(visual.transformer, visual.ln_pre(y), False))[:, 0] @ visual.proj
    assert_same(model.encode_image(x), y)
    y = model.token_embedding(ids) + model.positional_embedding
    y = model.ln_final(run(model.transformer, y, True))
    y = torch.stack([y[0, 4], y[1, 8], y[2, 2]]) @ model.text_projection
    assert_same(model.encode_text(ids), y)


def test_the_first_of_the_largest_ids_is_the_end() -> None:
    """transformers pads with the id of the end."""
    model = build()
    padded = texts(3, 5)
    repeated = padded.clone()
    for row, end in enumerate((3, 5)):
        repeated[row, end:] = END
    assert_same(model.encode_text(repeated), model.encode_text(padded))


def test_mean_of_a_text_leaves_out_padding_and_nothing_else() -> None:
    model = build(text={**TEXT, "pool_type": "avg"})
    ids = texts(4, 8)
    ids[0, 2] = 0  # "!" in CLIP's vocabulary
    tokens = model.text_tokens(ids)
    expected = torch.stack([tokens[0, :5].mean(dim=0), tokens[1].mean(dim=0)]) @ model.text_projection
    assert_same(model.encode_text(ids), expected)
    empty = torch.zeros(1, 9, dtype=torch.int64)
    assert_same(model.encode_text(empty), torch.zeros(1, 8, dtype=torch.float64))


def test_mean_before_the_norm() -> None:
    model = build(text={**TEXT, "pool_type": "avg", "final_ln_after_pool": True})
    plain = build(text={**TEXT, "pool_type": "avg"})
    plain.load_state_dict(model.state_dict())
    ids = texts(4, 8)
    plain.ln_final = nn.Identity()
    tokens = plain.text_tokens(ids)
    pooled = torch.stack([tokens[0, :5].mean(dim=0), tokens[1].mean(dim=0)])
    assert_same(model.encode_text(ids), model.ln_final(pooled) @ model.text_projection)


@pytest.mark.parametrize("pool", ["last", "first", "avg"])
def test_padding_mask_without_causal_mask(pool: str) -> None:
    """With the mask, what the padded positions hold does not change a text."""
    options = {**TEXT, "no_causal_mask": True, "pool_type": pool}
    masked, open_ = build(text={**options, "use_pad_mask": True}), build(text=options)
    open_.load_state_dict(masked.state_dict())
    ids = texts(4, 6)
    changed = masked.state_dict()
    changed["token_embedding.weight"] = changed["token_embedding.weight"].clone()
    changed["token_embedding.weight"][0] += torch.randn(16, dtype=torch.float64)
    other = copy.deepcopy(masked)
    other.load_state_dict(changed)
    own = pool == "last"  # the last token is a padded one: its own query changes
    assert torch.allclose(masked.encode_text(ids), other.encode_text(ids), atol=1e-9) != own
    assert not torch.allclose(masked.encode_text(ids), open_.encode_text(ids), atol=1e-3)
    full = texts(8, 8)
    assert_same(masked.encode_text(full), open_.encode_text(full))


# What is not computed.


def lengths_seen(model: CLIP, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    seen: list[int] = []
    real = _clip_block.Attention.forward

    def record(self: Any, x: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.append(x.shape[1])
        return real(self, x, *args, **options)

    monkeypatch.setattr(_clip_block.Attention, "forward", record)
    return seen


@pytest.mark.parametrize("pool", ["argmax", "eos"])
def test_texts_are_cut_after_the_longest(pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(text={**TEXT, "pool_type": pool, "eos_id": END})
    ids = texts(3, 5, 1)
    seen = lengths_seen(model, monkeypatch)
    features = model.encode_text(ids)
    grads = torch.autograd.grad(features.square().sum(), [model.positional_embedding, model.token_embedding.weight])
    assert seen == [6]
    monkeypatch.setattr("mmfast.models._clip_text._trims", lambda *args: False)
    whole = model.encode_text(ids)
    assert seen == [6, 9]
    assert_same(features, whole)
    others = torch.autograd.grad(whole.square().sum(), [model.positional_embedding, model.token_embedding.weight])
    assert_same(grads, others)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"pool_type": "last"}, 9), ({"no_causal_mask": True}, 9), ({"pool_type": "avg"}, 9), ({}, 6)],
    ids=["last", "bidirectional", "mean", "end_of_text"],
)
def test_texts_are_cut_only_where_the_rest_does_not_count(options: dict[str, Any], expected: int) -> None:
    model = build(text={**TEXT, **options})
    ids = texts(3, 5, 1)
    trimmed = model.trim_text(ids, multiple=1)
    assert trimmed.shape == (3, expected)
    assert torch.equal(trimmed, ids[:, :expected])
    if expected == 9:
        assert trimmed is ids
    assert_same(model.encode_text(trimmed), model.encode_text(ids))
    assert model.trim_text(ids, multiple=4).shape[1] == max(expected, 8)
    assert model.trim_text(ids, multiple=7).shape[1] == max(expected, 7)


def test_shorter_texts_are_taken() -> None:
    model = build()
    ids = texts(4, 2)
    assert_same(model.encode_text(ids[:, :5]), model.encode_text(ids))
    assert_same(model.encode_text(ids.int()), model.encode_text(ids))


HOOKED: dict[str, Callable[[Any], nn.Module]] = {
    "block": lambda t: t.resblocks[1],
    "ln_1": lambda t: t.resblocks[1].ln_1,
    "attn": lambda t: t.resblocks[1].attn,
    "out_proj": lambda t: t.resblocks[1].attn.out_proj,
    "ln_2": lambda t: t.resblocks[1].ln_2,
    "mlp": lambda t: t.resblocks[1].mlp,
    "c_fc": lambda t: t.resblocks[1].mlp.c_fc,
    "gelu": lambda t: t.resblocks[1].mlp.gelu,
    "c_proj": lambda t: t.resblocks[1].mlp.c_proj,
    "ls_1": lambda t: t.resblocks[1].ls_1,
    "ls_2": lambda t: t.resblocks[1].ls_2,
    "first_block": lambda t: t.resblocks[0],
    "first_ln_1": lambda t: t.resblocks[0].ln_1,
}


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "layer_scale"])
@pytest.mark.parametrize("where", [*HOOKED, "ln_end"])
def test_hooks_fire_once_on_all_tokens(where: str, scaled: bool) -> None:
    value = 0.3 if scaled else None
    model = build({**VIT, "ls_init_value": value}, {**TEXT, "ls_init_value": value})
    x, ids = images(model), texts(3, 5, 1)
    expected = model.encode_image(x), model.encode_text(ids)
    for tower, end, run, given, length, right in (
        (model.visual.transformer, model.visual.ln_post, model.encode_image, x, 5, expected[0]),
        (model.transformer, model.ln_final, model.encode_text, ids, 9, expected[1]),
    ):
        module = end if where == "ln_end" else HOOKED[where](tower)
        seen: list[torch.Size] = []
        handle = module.register_forward_hook(lambda m, i, o, seen=seen: seen.append(o.shape))
        assert_same(run(given), right)
        handle.remove()
        # A text is whole where a hook is in the transformer, and cut where it is behind it.
        cut = 6 if where == "ln_end" and length == 9 else length
        assert [shape[:2] for shape in seen] == [(3, cut)]


def test_a_replaced_layer_is_called() -> None:
    model = build()
    x = images(model)
    before = model.encode_image(x)

    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    old = model.visual.transformer.resblocks[1].mlp.c_proj
    new = Doubled(old.in_features, old.out_features).double()
    new.load_state_dict(old.state_dict())
    model.visual.transformer.resblocks[1].mlp.c_proj = new
    after = model.encode_image(x)
    assert not torch.allclose(after, before, atol=1e-3)
    with torch.no_grad():
        old.weight.mul_(2)
        old.bias.mul_(2)
    model.visual.transformer.resblocks[1].mlp.c_proj = old
    assert_same(after, model.encode_image(x))


def test_a_wrapped_block_is_called() -> None:
    """A wrapper passes attributes on, as that of activation checkpointing does, and must be called all the same."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = build()
    x, ids = images(model), texts(3, 5, 1)
    expected = model(x, ids)
    calls = []
    for stack in (model.visual.transformer.resblocks, model.transformer.resblocks):
        for index in range(len(stack)):
            stack[index] = checkpoint_wrapper(stack[index])
            stack[index].register_forward_hook(lambda *args: calls.append(1))
    assert_same(model(x, ids), expected)
    assert len(calls) == 4


@pytest.mark.parametrize("vision", [VIT, RESNET, SIGLIP], ids=["vit", "resnet", "siglip"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_grad_checkpointing_changes_nothing(vision: dict[str, Any], train: bool) -> None:
    custom = vision is SIGLIP
    model = build(vision, SIGLIP_TEXT if custom else TEXT, custom_text=custom).train(train)
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    x, ids = images(model), texts(3, 5, 1)
    found = []
    for net in (model, other):
        first, second, scale = net(x, ids)
        (scale * first @ second.T).square().sum().backward()
        found.append({name: p.grad for name, p in net.named_parameters()} | dict(net.named_buffers()))
    assert_same(found[1], found[0])
    saved: list[int] = []

    def keep(t: Tensor) -> Tensor:
        saved.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(x, ids)
        before = sum(saved)
        saved.clear()
        other(x, ids)
    assert sum(saved) < before
    other.set_grad_checkpointing(False)
    text = other.text.transformer if custom else other.transformer
    assert not text.grad_checkpointing
    assert not getattr(other.visual, "grad_checkpointing", False)


def test_every_parameter_takes_part() -> None:
    """DistributedDataParallel waits for the gradient of each."""
    biased: dict[str, Any] = {"custom_text": True, "init_logit_bias": -10.0}
    for vision, text, options in ((VIT, TEXT, {}), (RESNET, TEXT, {}), (SIGLIP, SIGLIP_TEXT, biased)):
        model = build(vision, text, **options)
        first, second, scale, *bias = model(images(model), texts(3, 5, 1))
        (scale * first @ second.T + sum(bias)).logsumexp(-1).sum().backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


# Images as bytes, and of another size.


@pytest.mark.parametrize("vision", [VIT, RESNET, SIGLIP], ids=["vit", "resnet", "siglip"])
def test_bytes_are_normalised(vision: dict[str, Any]) -> None:
    custom = vision is SIGLIP
    options: dict[str, Any] = {"mean": CLIP_MEAN, "std": CLIP_STD, "custom_text": custom}
    model = build(vision, SIGLIP_TEXT if custom else TEXT, **options)
    raw = torch.randint(0, 256, (2, 3, *model.visual.image_size), dtype=torch.uint8)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    floats = (raw.double() / 255 - mean) / std
    assert_same(model.encode_image(raw), model.encode_image(floats), 1e-6)
    plain = build(vision, SIGLIP_TEXT if custom else TEXT, custom_text=custom)
    with pytest.raises(TypeError, match=r"images must be floating point .*mean and std.*, got torch.uint8"):
        plain.encode_image(raw)


def test_bytes_as_an_option_of_a_name() -> None:
    model = CLIP.from_config("ViT-B-32", uint8=True, device="meta")
    assert model.visual.normalisation == (CLIP_MEAN, CLIP_STD)
    siglip = CLIP.from_config("ViT-B-16-SigLIP", uint8=True, device="meta")
    assert siglip.visual.trunk.patch_embed.mean == (0.5, 0.5, 0.5)
    assert CLIP.from_config("ViT-B-32", device="meta").visual.normalisation is None


@pytest.mark.parametrize("vision", [VIT, RESNET, SIGLIP], ids=["vit", "resnet", "siglip"])
def test_set_input_size_equals_loading_at_that_size(vision: dict[str, Any]) -> None:
    custom = vision is SIGLIP
    model = build(vision, SIGLIP_TEXT if custom else TEXT, custom_text=custom).float()
    size = 96 if vision is RESNET else 40
    config = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": SIGLIP_TEXT if custom else TEXT, "custom_text": custom}
    loaded = CLIP.from_state_dict(model.state_dict(), config, image_size=size)
    model.visual.set_input_size(size)
    x = torch.randn(2, 3, size, size)
    assert model.visual.image_size == loaded.visual.image_size == (size, size)
    assert_same(model.encode_image(x), loaded.encode_image(x), 1e-5)


# torch.compile, copies, transforms.


@pytest.mark.slow
@pytest.mark.parametrize("vision", [VIT, RESNET, SIGLIP], ids=["vit", "resnet", "siglip"])
def test_compiles_as_one_graph(vision: dict[str, Any]) -> None:
    """A block of each tower: tracing more of the same takes as long again."""
    custom = vision is SIGLIP
    text = {**(SIGLIP_TEXT if custom else TEXT), "layers": 1}
    if vision is VIT:
        vision = {**VIT, "layers": 1}
    elif custom:
        vision = {**SIGLIP, "trunk": {**SIGLIP["trunk"], "depth": 1}}
    model = build(vision, text, custom_text=custom)
    x, ids = images(model), texts(3, 5, 1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = []
    for net in (model, compiled):
        model.zero_grad(set_to_none=True)
        first, second, scale = net(x, ids)
        (scale * first @ second.T).logsumexp(-1).sum().backward()
        found.append((first.detach(), second.detach(), {n: p.grad for n, p in model.named_parameters()}))
    assert_same(found[1], found[0], 1e-9)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("vision", [VIT, RESNET, SIGLIP], ids=["vit", "resnet", "siglip"])
def test_copies(vision: dict[str, Any], copier: Callable[[CLIP], CLIP]) -> None:
    custom = vision is SIGLIP
    model = build(vision, SIGLIP_TEXT if custom else TEXT, custom_text=custom, init_logit_bias=-10.0)
    x, ids = images(model), texts(3, 5, 1)
    other = copier(model)
    assert_same(other(x, ids), model(x, ids), 0.0)
    with torch.no_grad():
        other.logit_scale.add_(1.0)
    assert not torch.equal(other.logit_scale, model.logit_scale)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_functional_call_and_per_sample_gradients() -> None:
    model = build()
    x, ids = images(model), texts(3, 5, 1)
    parameters: dict[str, Tensor] = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], image: Tensor, text: Tensor) -> Tensor:
        first, second, scale = torch.func.functional_call(model, parameters, (image[None], text[None]))
        return scale * (first * second).sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, ids)
    for index in range(3):
        model.zero_grad()
        loss(parameters, x[index], ids[index]).backward()
        for name, parameter in model.named_parameters():
            assert_same(per_sample[name][index], parameter.grad, 1e-9)


def test_ops_serve_the_model() -> None:
    """Which ops one forward asks for: patches, every add with its norm, attention of whole blocks and of one token."""
    model = build({**VIT, "layers": 3}, {**TEXT, "layers": 3})
    called = Counter(choice.op for choice in mmfast.explain(model, images(model), texts(3, 5, 1)))
    assert called == {
        "patch_embed": 1,
        "layer_norm": 3 + 12,  # ln_pre, the first of each tower; and what the others are made of on a CPU
        "attention_qkv": 4,
        "attention": 2,
        "linear_act": 6,
        "add_layer_norm": 12,
    }


@pytest.mark.triton
@pytest.mark.parametrize("vision", ["vit", "resnet"])
def test_kernels_compute_the_model(vision: str, device: torch.device) -> None:
    """Under Triton's interpreter, or on a GPU: outputs and gradients of both towers."""
    image = {**VIT, "width": 32, "head_width": 16, "ls_init_value": 0.3} if vision == "vit" else RESNET
    text = {**TEXT, "width": 32}
    model = build(image, text, dim=16, quick_gelu=True).float().to(device)
    x, ids = images(model, 2).float().to(device), texts(3, 5).to(device)
    found = []
    for backend in ("torch", "triton"):
        with mmfast.backend(backend):
            model.zero_grad()
            first, second, scale = model(x, ids)
            (scale * first @ second.T).logsumexp(-1).sum().backward()
        grads: Any = {name: p.grad for name, p in model.named_parameters()}
        found.append((first, second, grads))
    for ours, theirs in zip(found[1][:2], found[0][:2], strict=True):
        assert_same(ours, theirs, 1e-4)
    for name, gradient in found[1][2].items():
        theirs = found[0][2][name]
        assert (gradient - theirs).norm() <= 1e-3 * theirs.norm() + 1e-5, name


# Arguments.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_cfg": {**VIT, "widht": 3}}, "vision_cfg has no field 'widht'"),
        (
            {"vision_cfg": {**VIT, "head_width": 5}},
            "width must be a multiple of head_width, got .*head_width=5",
        ),
        ({"vision_cfg": {**VIT, "pool_type": "cls"}}, "pool_type must be one of 'tok', 'avg', got 'cls'"),
        ({"vision_cfg": {**VIT, "patch_size": None}}, "patch_size must be given"),
        ({"vision_cfg": {**VIT, "image_size": 4}}, r"image_size must be at least patch_size \(8, 8\), got \(4, 4\)"),
        ({"vision_cfg": {**VIT, "layers": 0}}, "layers must be positive, got 0"),
        ({"vision_cfg": {**VIT, "layers": [1, 2]}}, r"four positive ones, got \[1, 2\]"),
        ({"vision_cfg": {**VIT, "attentional_pool": True}}, "attentional_pool must be False"),
        ({"vision_cfg": {"timm_model_name": "convnext_base"}}, "timm_model_name must be vit_.*, got 'convnext_base'"),
        ({"vision_cfg": {**SIGLIP, "timm_proj": "mlp"}}, "timm_proj must be one of 'none', '', 'linear', got 'mlp'"),
        ({"vision_cfg": {**SIGLIP, "timm_model_pretrained": True}}, "timm_model_pretrained must be False"),
        ({"vision_cfg": SIGLIP, "embed_dim": 9}, "embed_dim must be the width 8 .*, got 9"),
        ({"text_cfg": {**TEXT, "heads": 3}}, "width must be a multiple of heads, got width=16, heads=3"),
        ({"text_cfg": {**TEXT, "pool_type": "mean"}}, "pool_type must be one of 'argmax', .*, got 'mean'"),
        ({"text_cfg": {**TEXT, "hf_model_name": "roberta-base"}}, "hf_model_name must be None"),
        ({"text_cfg": {**TEXT, "proj_type": "none"}}, "embed_dim must be the width 16 .*, got 8"),
        ({"text_cfg": {**TEXT, "context_length": 0}}, "context_length must be positive, got 0"),
        (
            {"text_cfg": {**TEXT, "act_kwargs": {"approximate": "tanh"}}, "quick_gelu": True},
            "act_kwargs belong to GELU",
        ),
        ({"mean": (0.5,) * 3}, "mean and std must be given together"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_invalid_configurations(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CLIP(**{"embed_dim": 8, "vision_cfg": VIT, "text_cfg": TEXT, **change})


def test_configurations_must_be_mappings_and_names_known() -> None:
    with pytest.raises(TypeError, match="vision_cfg must be a mapping of open_clip's fields, got int"):
        CLIP(8, 3, TEXT)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"unknown architecture 'ViT-B-33'; known are .*ViT-B-32"):
        CLIP.from_config("ViT-B-33")
    with pytest.raises(ValueError, match="needs embed_dim, vision_cfg and text_cfg, got no text_cfg"):
        CLIP.from_config({"embed_dim": 8, "vision_cfg": VIT})
    with pytest.raises(TypeError, match="a name or a mapping, got int"):
        CLIP.from_config(3)  # type: ignore[arg-type]
    assert "ViT-L-14-336-quickgelu" in clip_names()
    assert CLIP.from_config("ViT-B/32", device="meta").visual.grid_size == (7, 7)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda m: m.encode_image(torch.zeros(1, 3, 16, 24)),
            ValueError,
            r"shape \(B, 3, 16, 16\).*got \(1, 3, 16, 24\)",
        ),
        (lambda m: m.encode_image(torch.zeros(1, 1, 16, 16)), ValueError, r"got \(1, 1, 16, 16\)"),
        (lambda m: m.encode_image([1]), TypeError, "images must be a tensor, got list"),
        (lambda m: m.encode_image(torch.zeros(1, 3, 16, 16, dtype=torch.int64)), TypeError, "got torch.int64"),
        (lambda m: m.encode_text(["a cat"]), TypeError, "text must be a tensor of token ids, got list"),
        (lambda m: m.encode_text(torch.zeros(1, 9)), TypeError, "torch.int64 or torch.int32, got torch.float32"),
        (lambda m: m.encode_text(torch.zeros(1, 10).long()), ValueError, r"L from 1 to 9, got \(1, 10\)"),
        (lambda m: m.encode_text(torch.zeros(9).long()), ValueError, r"got \(9,\)"),
        (lambda m: m.trim_text(torch.zeros(1, 9).long(), 0), ValueError, "multiple must be positive, got 0"),
        (lambda m: m.lock_image_tower(-1), ValueError, "must not be negative, got -1"),
        (lambda m: m.lock_text_tower(0, False), ValueError, "freeze_layer_norm=False"),
    ],
    ids=[
        "size",
        "channels",
        "image_type",
        "image_dtype",
        "text_type",
        "text_dtype",
        "long",
        "flat",
        "trim",
        "lock",
        "ln",
    ],
)
def test_invalid_calls(call: Callable[[CLIP], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(build())
    with pytest.raises(ValueError, match="a ResNet is locked as a whole"):
        build(RESNET).lock_image_tower(1)


def test_empty_batches() -> None:
    model = build()
    first, second, _ = model(torch.empty(0, 3, 16, 16, dtype=torch.float64), torch.empty(0, 9, dtype=torch.int64))
    assert first.shape == second.shape == (0, 8)


def test_nan_stays_in_its_sample() -> None:
    for vision in (VIT, RESNET):
        model = build(vision)
        x = images(model)
        expected = model.encode_image(x)
        x[1, 0, 3, 3] = math.nan
        found = model.encode_image(x)
        assert found[1].isnan().all()
        assert_same(found[[0, 2]], expected[[0, 2]])


def test_patch_dropout_keeps_the_class_token() -> None:
    model = build({**VIT, "patch_dropout": 0.5})
    x = images(model)
    seen: list[Tensor] = []
    model.visual.patch_dropout.register_forward_hook(lambda m, i, o: seen.extend((i[0], o)))
    model.eval().encode_image(x)
    assert torch.equal(seen[0], seen[1])
    seen.clear()
    model.train().encode_image(x)
    assert seen[1].shape == (3, 3, 16)
    assert torch.equal(seen[1][:, 0], seen[0][:, 0])


def test_float32_parameters_after_init_follow_the_factory() -> None:
    model = CLIP(8, VIT, TEXT, device="cpu", dtype=torch.bfloat16, init_logit_bias=-10.0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.logit_bias is not None
    assert model.logit_bias.item() == -10.0
    assert abs(CLIP(8, VIT, TEXT).logit_scale.item() - math.log(1 / 0.07)) < 1e-6


def test_nothing_is_read_back_from_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only texts in host memory are looked at: a GPU is not waited for."""
    model = build()
    ids = texts(3, 5)
    assert _clip_text._trims(model, model.text_cfg, ids)
    assert not _clip_text._trims(model, model.text_cfg, ids.to("meta"))
    monkeypatch.setattr(_clip_text, "_trims", lambda *args: False)  # as of a GPU tensor
    read: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                read.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        for net in (model, build(text={**TEXT, "pool_type": "eos"}), build(text={**TEXT, "pool_type": "avg"})):
            first, second, scale = net(images(net, 2), ids)
            (scale * first @ second.T).sum().backward()
    assert read == []


def test_exports_with_any_batch() -> None:
    model = build()
    x, ids = images(model, 4), texts(3, 5, 1, 2)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (x, ids), dynamic_shapes=({0: batch}, {0: batch}))
    assert_same(program.module()(x[:3], ids[:3]), model(x[:3], ids[:3]))
