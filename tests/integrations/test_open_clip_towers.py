"""open_clip's text towers without their mask, its poolings, CoCa, and both towers by the kernels."""

from __future__ import annotations

import copy
import io
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmfast
from mmfast.integrations import _causal

from .families import compare
from .test_open_clip import IMAGES, TEXT, clip, similarity

LENGTH = TEXT.shape[1]


@pytest.fixture(autouse=True)
def through_the_ops() -> Iterator[None]:
    """By default a CPU tensor takes the original code; these tests are to see the path that a GPU takes."""
    with mmfast.backend("torch"):
        yield


def masks_of(model: nn.Module, call: Callable[[nn.Module], Any]) -> list[tuple[bool, bool]]:
    """Of each attention that runs in `call(model)`: whether it is given a mask, and whether it is causal."""
    seen: list[tuple[bool, bool]] = []
    from mmfast.nn import multihead_attention

    real = multihead_attention.attention_qkv

    def spy(qkv: Tensor, heads: int, mask: Tensor | None = None, dropout: float = 0.0, causal: bool = False) -> Tensor:
        seen.append((mask is not None, causal))
        return real(qkv, heads, mask, dropout, causal)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multihead_attention, "attention_qkv", spy)
        call(model)
    return seen


def text(model: Any) -> Tensor:
    return model.encode_text(TEXT)


WITH_MASK, CAUSAL = [(True, False)] * 2, [(False, True)] * 2


def custom_text_clip(**text_options: Any) -> nn.Module:
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP

    torch.manual_seed(1)
    vision = CLIPVisionCfg(layers=2, width=16, head_width=8, patch_size=8, image_size=16)
    options = {"context_length": LENGTH, "vocab_size": 30, "width": 16, "heads": 2, "layers": 2, **text_options}
    return CustomTextCLIP(8, vision, CLIPTextCfg(**options)).eval()


@pytest.mark.parametrize("make", [clip, custom_text_clip], ids=["CLIP", "CustomTextCLIP"])
def test_the_causal_mask_is_not_read(make: Callable[[], nn.Module]) -> None:
    original = make()
    model = mmfast.accelerate(copy.deepcopy(original), strict=True)
    assert masks_of(model, text) == CAUSAL
    compare(model, original, text)
    compare(model, original, similarity)
    owner = "" if make is clip else "text"
    row = next(row for row in mmfast.report(model) if row.name == owner)
    assert (row.status, row.op) == ("accelerated", "attention")


def test_a_text_tower_without_a_mask() -> None:
    """As SigLIP's."""
    options = {"no_causal_mask": True, "pool_type": "last", "proj_bias": True, "norm_kwargs": {"eps": 1e-6}}
    original = custom_text_clip(**options)
    model = mmfast.accelerate(copy.deepcopy(original), strict=True)
    assert masks_of(model, text) == [(False, False)] * 2
    compare(model, original, similarity)
    assert "text" not in {row.name for row in mmfast.report(model) if row.op}


def _move(model: nn.Module) -> nn.Module:
    return model.double().float()


def _pickle(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("change", [_move, copy.deepcopy, _pickle], ids=["moved", "copied", "loaded"])
def test_the_mask_stays_known(change: Callable[[nn.Module], nn.Module]) -> None:
    """Where the buffer is made anew it is looked at anew."""
    original = clip()
    model = change(mmfast.accelerate(copy.deepcopy(original)))
    assert masks_of(model, text) == CAUSAL
    compare(model, original, text)


def _both_ways() -> Tensor:
    return torch.zeros(LENGTH, LENGTH)


def _windowed() -> Tensor:
    return torch.full((LENGTH, LENGTH), float("-inf")).triu(1) + torch.full((LENGTH, LENGTH), float("-inf")).tril(-3)


def _replace(model: Any, mask: Tensor) -> None:
    model.attn_mask = mask


def _write(model: Any, mask: Tensor) -> None:
    model.attn_mask.copy_(mask)


def _set_data(model: Any, mask: Tensor) -> None:
    model.attn_mask.data = mask


@pytest.mark.parametrize("make", [_both_ways, _windowed], ids=["both ways", "window"])
@pytest.mark.parametrize("change", [_replace, _write, _set_data], ids=["replaced", "written", "data"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_mask_that_is_changed_counts(make: Callable[[], Tensor], change: Callable[..., None], when: str) -> None:
    plain, original = clip(), clip()
    change(original, make())
    model = clip()
    if when == "before":
        change(model, make())
    mmfast.accelerate(model)
    if when == "after":
        assert masks_of(model, text) == CAUSAL
        change(model, make())
    assert masks_of(model, text) == WITH_MASK
    compare(model, original, text)
    assert not torch.allclose(text(model), text(plain), atol=1e-3)
    reason = "attn_mask is not the causal mask"
    row = mmfast.report(model)[0]
    assert row.reason.endswith(f"fuses nothing now: {reason}" if when == "after" else reason)
    assert row.status == ("accelerated" if when == "after" else "skipped")
    if when == "before":
        with pytest.raises(ValueError, match=reason):
            mmfast.accelerate(mmfast.restore(model), strict=True)


def test_a_causal_mask_that_is_new_is_added() -> None:
    """Nobody has looked at it, and a forward must not wait for a GPU to do so."""
    model, original = mmfast.accelerate(clip()), clip()
    model.attn_mask = model.attn_mask.clone()
    assert masks_of(model, text) == WITH_MASK
    compare(model, original, text)
    mmfast.report(model)  # looks
    assert masks_of(model, text) == CAUSAL
    compare(model, original, text)


def test_a_text_of_another_length_is_an_error_still() -> None:
    for model in (clip(), mmfast.accelerate(clip())):
        with pytest.raises(RuntimeError, match="size of tensor"):
            model.encode_text(TEXT[:, :5])
        with pytest.raises(RuntimeError, match="attn_mask"):
            model.transformer(torch.randn(2, 5, 16), attn_mask=model.attn_mask)


def test_what_is_known_of_masks() -> None:
    causal = torch.full((6, 6), float("-inf")).triu(1)
    known = _causal.known_causal
    assert not known(causal, 6)
    assert _causal.look(causal)
    assert known(causal, 6)
    assert known(causal[:4, :4], 4)
    assert known(causal[:6, :6], 6)
    assert not known(causal, 4)
    with torch.inference_mode():
        assert known(causal, 6)
        assert known(causal[:4, :4], 4)
    with torch.no_grad():
        assert known(causal[:4][:, :4], 4)
    for view in (causal[1:5, 1:5], causal[:4, 1:5], causal[::2, ::2], causal.t(), causal[:4, :5], causal[None]):
        assert not known(view, 4)
    assert not known(causal.clone(), 6)
    assert not known(None, 6)
    part = torch.zeros(8, 8)
    part[:6, :6] = causal
    assert _causal.look(part[:6, :6])
    assert not known(part[:6, :6], 6)  # of the whole tensor nothing is known
    causal[0, 5] = 0.0
    assert not known(causal, 6)
    assert not known(causal[:4, :4], 4)
    assert not _causal.look(causal)
    lowest = torch.full((6, 6), torch.finfo(torch.float32).min).triu(1)
    boolean = torch.ones(6, 6, dtype=torch.bool).triu(1)
    meta = torch.empty(6, 6, device="meta")
    with torch.inference_mode():
        unversioned = torch.full((6, 6), float("-inf")).triu(1)
    for mask in (lowest, boolean, meta, unversioned, nn.Parameter(lowest), None, torch.zeros(6)):
        assert not _causal.look(mask)
        assert not known(mask, 6)


def test_masks_are_forgotten_with_their_models() -> None:
    before = len(_causal._seen)
    model = mmfast.accelerate(clip())
    assert len(_causal._seen) == before + 1
    text(model)
    del model
    assert len(_causal._seen) == before


def test_compiled_towers_read_the_mask() -> None:
    """A compiled graph may outlive a mask: it has the buffer as an input, which may be written to after."""
    from open_clip.transformer import TextTransformer

    torch._dynamo.reset()
    torch.manual_seed(0)
    original = TextTransformer(LENGTH, 30, 16, 2, 1, output_dim=8).double()
    model = mmfast.accelerate(copy.deepcopy(original), strict=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        before = compiled(TEXT)
        torch.testing.assert_close(before, original(TEXT), rtol=1e-12, atol=1e-12)
        for m in (model, original):
            m.attn_mask.zero_()
        torch.testing.assert_close(compiled(TEXT), original(TEXT), rtol=1e-12, atol=1e-12)
        assert not torch.allclose(compiled(TEXT), before)


def test_attention_replaced_on_a_block_is_called() -> None:
    """As scripts do that want the attention maps."""
    model = mmfast.accelerate(clip())
    calls: list[bool] = []
    block = model.transformer.resblocks[0]
    real = block.attention

    def attention(**kwargs: Any) -> Tensor:
        calls.append(kwargs["attn_mask"] is model.attn_mask)
        return real(**kwargs)

    block.attention = attention
    assert masks_of(model, text) == [(True, False), (False, True)]
    assert calls == [True]
    del block.attention
    seen: list[Any] = []
    handle = block.attn.register_forward_pre_hook(lambda _m, _a, k: seen.append(k), with_kwargs=True)
    text(model)
    handle.remove()
    assert [sorted(kwargs) for kwargs in seen] == [["attn_mask", "need_weights"]]


def test_other_ways_to_the_blocks() -> None:
    """Intermediate features, checkpointing, half precision and sequence-first blocks."""
    model, original = mmfast.accelerate(clip()), clip()
    found, expected = (m.forward_intermediates(text=TEXT) for m in (model, original))
    for a, b in zip(found["text_intermediates"], expected["text_intermediates"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
    for m in (model, original):
        m.set_grad_checkpointing()
        m.train()
    compare(model, original, similarity)
    assert masks_of(model, text) == CAUSAL
    for m in (model, original):
        m.to(torch.bfloat16).eval()
    assert masks_of(model, text) == CAUSAL
    torch.testing.assert_close(text(model), text(original), rtol=0.1, atol=0.1)
    from open_clip.transformer import TextTransformer

    torch.manual_seed(0)
    first = TextTransformer(LENGTH, 30, 16, 2, 2, output_dim=8)
    first.transformer.batch_first = False
    for block in first.transformer.resblocks:
        block.attn.batch_first = False
    second = mmfast.accelerate(copy.deepcopy(first))
    assert masks_of(second, lambda m: m(TEXT)) == CAUSAL
    compare(second, first, lambda m: m(TEXT))


@pytest.mark.parametrize("options", [{"qk_norm": True}, {"block_type": "custom"}], ids=["qk norm", "packed"])
def test_custom_blocks(options: dict[str, Any]) -> None:
    original = clip(text=options)
    model = mmfast.accelerate(copy.deepcopy(original))
    compare(model, original, text)
    changed = TEXT.clone()
    changed[:, 5:] = 11
    assert torch.equal(model.encode_text(TEXT)[1], model.encode_text(changed)[1])
    model.attn_mask.zero_()
    original.attn_mask.zero_()
    compare(model, original, text)


def test_autocast_of_both_towers() -> None:
    model, original = mmfast.accelerate(clip()), clip()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = similarity(model), similarity(original)
        assert masks_of(model, text) == CAUSAL
    exact = similarity(original)
    assert found.dtype == expected.dtype
    assert (found - exact).abs().max() <= 2 * (expected - exact).abs().max() + 2e-2


def coca() -> nn.Module:
    from open_clip.coca_model import CoCa, MultimodalCfg
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    torch.manual_seed(1)
    decoder = MultimodalCfg(context_length=LENGTH, width=16, heads=2, layers=2, mlp_ratio=2)
    pool = {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 5, "output_tokens": True}
    text_cfg = CLIPTextCfg(
        context_length=LENGTH, vocab_size=30, width=16, heads=2, layers=2, embed_cls=True, output_tokens=True
    )
    vision_cfg = CLIPVisionCfg(layers=2, width=16, head_width=8, patch_size=8, image_size=16, **pool)
    model = CoCa(16, decoder, text_cfg, vision_cfg).eval()
    for parameter in model.parameters():  # its decoder leaves some uninitialised
        nn.init.normal_(parameter, std=0.3)
    return model


def test_coca() -> None:
    original = coca()
    model = mmfast.accelerate(copy.deepcopy(original), strict=True)

    def captions(m: Any) -> Tensor:
        return m(IMAGES, TEXT)["logits"]

    def shared(m: Any) -> Tensor:
        out = m(IMAGES, TEXT)
        return out["image_features"] @ out["text_features"].T

    compare(model, original, captions)
    compare(model, original, shared)
    # The image tower, the text tower with a mask of its own for each text, the decoder with a corner of its mask.
    assert masks_of(model, captions) == [(False, False)] * 2 + WITH_MASK + CAUSAL
    rows = {row.name: row for row in mmfast.report(model)}
    assert rows["visual.attn_pool"].status == rows["text_decoder"].status == "accelerated"
    assert rows["visual.attn_pool.attn"].status == "fused"


@pytest.mark.parametrize("widths", [(16, 16), (24, 16)], ids=["one width", "two widths"])
def test_attentional_pooler(widths: tuple[int, int]) -> None:
    from open_clip.transformer import AttentionalPooler

    torch.manual_seed(0)
    original = AttentionalPooler(*widths, n_head=2, n_queries=5)
    nn.init.normal_(original.attn.in_proj_bias)
    model = mmfast.accelerate(copy.deepcopy(original), strict=True)
    x = torch.randn(3, 7, widths[1])
    assert Counter(compare(model, original, lambda m: m(x))) == {"layer_norm": 2, "attention": 1}
    seen: list[int] = []
    handle = model.attn.register_forward_hook(lambda *_: seen.append(1))
    compare(model, original, lambda m: m(x))
    assert seen
    reason = next(row.reason for row in mmfast.report(model) if not row.name)
    assert reason.endswith("fuses nothing now: attn has hooks or a forward of its own")
    handle.remove()
    for m in (model, original):
        m.train()
        m.attn.dropout = 0.5
    assert "attention" not in compare(model, original, lambda m: m(x))
    with mmfast.backend(None):
        assert torch.equal(model.eval()(x), original.eval()(x))


def pool_2d() -> nn.Module:
    from open_clip.modified_resnet import AttentionPool2d

    torch.manual_seed(0)
    module = AttentionPool2d(4, 32, 2, 8)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    return module


@pytest.mark.parametrize("backend", [None, "torch"], ids=["default", "op"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_attention_pool_computes_one_query(backend: str | None, training: bool, layout: torch.memory_format) -> None:
    original = pool_2d().double().train(training)
    model = mmfast.accelerate(copy.deepcopy(original), strict=True)
    x = torch.randn(3, 32, 4, 4, dtype=torch.float64).to(memory_format=layout)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    with mmfast.backend(backend):
        for m, given in zip((model, original), inputs, strict=True):
            m(given).square().sum().backward()
        torch.testing.assert_close(model(x), original(x), rtol=1e-12, atol=1e-12)
        shapes: list[tuple[int, ...]] = []
        from mmfast.integrations import _attention

        real = _attention.attention
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_attention, "attention", lambda q, *a, **k: shapes.append(tuple(q.shape)) or real(q, *a, **k))
            model(x)
    assert shapes == [(3, 2, 1, 16)]
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-12, atol=1e-12)
    for a, b in zip(model.parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError):
        model(x[:, :, :3])  # the positions are those of one size, as in the original


def test_attention_pool_in_low_precision() -> None:
    original = pool_2d()
    model = mmfast.accelerate(copy.deepcopy(original))
    x = torch.randn(3, 32, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = model(x), original(x)
    exact = original(x)
    assert found.dtype == expected.dtype
    assert (found - exact).abs().max() <= 2 * (expected - exact).abs().max() + 2e-2
    half = [m.bfloat16()(x.bfloat16()) for m in (model, original)]
    assert half[0].dtype == half[1].dtype
    assert (half[0] - exact).abs().max() <= 2 * (half[1] - exact).abs().max() + 2e-2


def test_a_resnet_tower() -> None:
    from open_clip.modified_resnet import ModifiedResNet

    torch.manual_seed(0)
    original = ModifiedResNet([1, 1, 1, 1], 8, 4, 32, 8).eval()
    model = mmfast.accelerate(copy.deepcopy(original))
    x = torch.randn(2, 3, 32, 32)
    assert compare(model, original, lambda m: m(x)) == ["attention"]
    row = next(row for row in mmfast.report(model) if row.name == "attnpool")
    assert (row.status, row.op) == ("accelerated", "attention")


def test_restore_is_exact() -> None:
    for make in (clip, coca):
        model = make()
        classes, members = [type(m) for m in model.modules()], [dict(m.__dict__) for m in model.modules()]
        mmfast.restore(mmfast.accelerate(model))
        assert [type(m) for m in model.modules()] == classes
        for module, before in zip(model.modules(), members, strict=True):
            assert module.__dict__.keys() == before.keys()
            assert all(module.__dict__[key] is before[key] for key in before)


@pytest.mark.triton
def test_both_towers_by_kernels(device: torch.device) -> None:
    pool = {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 5}
    original = clip(pool, quick_gelu=True).to(device)
    model = mmfast.accelerate(copy.deepcopy(original))

    def on_device(m: Any) -> Tensor:
        image, words, scale = m(IMAGES[:2].to(device), TEXT[:2].to(device))
        return scale * image @ words.T

    got: list[Any] = []
    with mmfast.backend("triton"):
        choices = mmfast.explain(lambda: got.append(_outcome(model, on_device)))
    expected = _outcome(original, on_device)
    assert {choice.backend for choice in choices} == {"triton"}
    ran = Counter(choice.op for choice in choices)
    assert (ran["attention_qkv"], ran["attention"], ran["add_layer_norm"], ran["linear_act"]) == (4, 1, 4, 4)
    _close(got[0], expected)


@pytest.mark.triton
def test_attention_pool_by_kernels(device: torch.device) -> None:
    original = pool_2d().to(device)
    model = mmfast.accelerate(copy.deepcopy(original))
    x = torch.randn(2, 32, 4, 4, device=device)
    with mmfast.backend("triton"):
        found = _outcome(model, lambda m: m(x))
    _close(found, _outcome(original, lambda m: m(x)))


def _outcome(model: nn.Module, call: Callable[[nn.Module], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    y = call(model)
    (y * torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)).sum().backward()
    return y.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _close(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    assert found[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-3, atol=2e-4)
