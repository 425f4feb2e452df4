"""What is particular to one library: its arguments, switches, feature extractors and older releases."""

from __future__ import annotations

import copy
import importlib
import types
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import mmfast
from mmfast.integrations._outline import outline
from mmfast.integrations._swap import FusedBlock, UnknownBlock, fused

from .families import build, images


@pytest.fixture(autouse=True, params=[None, "torch"], ids=["default", "op"])
def route(request: pytest.FixtureRequest) -> Iterator[None]:
    """By default a CPU tensor takes the original code; a forced backend, the path that a GPU takes."""
    with mmfast.backend(request.param):
        yield


def test_timm_block_passes_the_attention_arguments() -> None:
    model, original = (build("timm-layerscale-droppath").blocks[0] for _ in range(2))
    mmfast.accelerate(model)
    x, mask = torch.randn(2, 6, 16), torch.zeros(6, 6).masked_fill(torch.eye(6).bool().roll(1, 0), float("-inf"))
    assert torch.equal(model(x, mask), original(x, mask))
    assert torch.equal(model(x, attn_mask=mask), original(x, mask))
    assert torch.equal(model(x, None, True), original(x, is_causal=True))
    assert not torch.equal(model(x, mask), model(x))
    with pytest.raises(TypeError, match="nonsense"):
        model(x, nonsense=1)


def test_timm_fast_norm_is_left_to_timm() -> None:
    import timm.layers

    slow = timm.layers.LayerNorm(8)
    fast = timm.layers.LayerNorm(8)
    fast._fast_norm = True
    model = mmfast.accelerate(nn.Sequential(slow, fast))
    assert [row.reason for row in mmfast.report(model) if row.status == "skipped"] == ["has _fast_norm set"]
    assert isinstance(slow, timm.layers.LayerNorm)
    slow._fast_norm = True  # switched on after
    with torch.autocast("cpu", torch.bfloat16):
        assert slow(torch.randn(2, 8)).dtype == torch.bfloat16
    assert not mmfast.explain(model, torch.randn(2, 8))


def test_timm_block_with_another_norm_is_skipped() -> None:
    from timm.layers import RmsNorm
    from timm.models.vision_transformer import Block

    block = Block(16, 2, norm_layer=RmsNorm)
    (row,) = (row for row in mmfast.report(mmfast.accelerate(nn.Sequential(block))) if row.name == "0")
    assert (row.status, row.op, row.reason) == ("skipped", "add_layer_norm", "norm2 is a RmsNorm")


@pytest.mark.parametrize("scale_by_keep", [True, False])
def test_timm_drop_path_options(scale_by_keep: bool) -> None:
    original = build("timm-layerscale-droppath").blocks[-1].train()
    original.drop_path1.scale_by_keep = scale_by_keep
    model = mmfast.accelerate(copy.deepcopy(original))
    x = torch.randn(16, 5, 16)
    found = []
    for block in (model, original):
        torch.manual_seed(5)
        found.append(block(x))
    assert torch.equal(*found)
    model.drop_path1.eval()  # its own mode counts, not the block's
    original.drop_path1.eval()
    for block in (model, original):
        torch.manual_seed(5)
        found.append(block(x))
    assert torch.equal(*found[2:])


@pytest.mark.parametrize("name", ["torchvision", "timm"])
def test_feature_extractors_keep_their_nodes(name: str) -> None:
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    original, model = build(name), mmfast.accelerate(build(name))
    _, nodes = get_graph_node_names(original)
    assert get_graph_node_names(model)[1] == nodes
    wanted = [node for node in nodes if ".ln" in node or "norm" in node or node.endswith("add")]
    x = images()
    extractor = create_feature_extractor(model, wanted)
    found, expected = extractor(x), create_feature_extractor(original, wanted)(x)
    assert len(wanted) > 6
    assert all(torch.equal(found[node], expected[node]) for node in wanted)
    assert "layer_norm" in {choice.op for choice in mmfast.explain(extractor, x)}


def test_timm_features() -> None:
    x = images()
    original, model = build("timm"), mmfast.accelerate(build("timm"))
    expected = original.forward_intermediates(x, indices=2, norm=True)
    found = model.forward_intermediates(x, indices=2, norm=True)
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))
    traced = torch.fx.symbolic_trace(model.blocks[0], {"attn_mask": None, "is_causal": False})
    tokens = torch.randn(2, 5, 16)
    assert torch.equal(traced(tokens, None, False), original.blocks[0](tokens))


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


class Attention(nn.Module):
    """Attention of transformers before 5.10, with each of the ways to return."""

    def __init__(self, returns: str) -> None:
        super().__init__()
        self.linear, self.returns = nn.Linear(8, 8), returns

    def forward(self, x: Tensor, head_mask: Tensor | None = None, output_attentions: bool = False) -> object:
        y = self.linear(x) if head_mask is None else self.linear(x) * head_mask
        if self.returns == "tensor":
            return y
        return (y, x.mean()) if output_attentions else (y,)


class Output(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.linear(x) + residual


class OldViT(nn.Module):
    def __init__(self, returns: str) -> None:
        super().__init__()
        self.attention, self.intermediate, self.output = Attention(returns), nn.Linear(8, 8), Output()
        self.layernorm_before, self.layernorm_after = nn.LayerNorm(8), nn.LayerNorm(8)


class OldViTTensor(OldViT):
    def forward(self, hidden_states, head_mask=None):  # type: ignore[no-untyped-def]
        hidden_states = hidden_states + self.attention(self.layernorm_before(hidden_states), head_mask)
        return self.output(self.intermediate(self.layernorm_after(hidden_states)), hidden_states)


class OldViTTuple(OldViT):
    def forward(self, hidden_states, head_mask=None, output_attentions=False):  # type: ignore[no-untyped-def]
        found = self.attention(self.layernorm_before(hidden_states), head_mask, output_attentions=output_attentions)
        hidden_states = found[0] + hidden_states
        weights = found[1:]
        out = self.output(self.intermediate(self.layernorm_after(hidden_states)), hidden_states)
        return (out,) + weights  # noqa: RUF005


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.full((8,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.lambda1


class OldDino(nn.Module):
    def __init__(self, returns: str) -> None:
        super().__init__()
        self.attention, self.mlp, self.drop_path = Attention(returns), nn.Linear(8, 8), nn.Identity()
        self.norm1, self.norm2, self.layer_scale1, self.layer_scale2 = (
            nn.LayerNorm(8),
            nn.LayerNorm(8),
            Scale(),
            Scale(),
        )


class OldDinoTensor(OldDino):
    def forward(self, hidden_states, head_mask=None):  # type: ignore[no-untyped-def]
        branch = self.layer_scale1(self.attention(self.norm1(hidden_states), head_mask))
        hidden_states = self.drop_path(branch) + hidden_states
        return self.drop_path(self.layer_scale2(self.mlp(self.norm2(hidden_states)))) + hidden_states


class OldDinoTuple(OldDino):
    def forward(self, hidden_states, head_mask=None, output_attentions=False):  # type: ignore[no-untyped-def]
        found = self.attention(self.norm1(hidden_states), head_mask, output_attentions=output_attentions)
        hidden_states = self.drop_path(self.layer_scale1(found[0])) + hidden_states
        out = self.layer_scale2(self.mlp(self.norm2(hidden_states)))
        return (self.drop_path(out) + hidden_states,) + found[1:]  # noqa: RUF005


def _forms(cls: type[nn.Module]) -> tuple[type[FusedBlock], ...]:
    from mmfast.integrations.transformers import _dinov2, vit

    return _dinov2.FORMS if issubclass(cls, OldDino) else vit.FORMS


@pytest.mark.parametrize("cls", [OldViTTensor, OldViTTuple, OldDinoTensor, OldDinoTuple])
def test_older_forms_of_transformers_layers(cls: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    from mmfast.integrations._swap import SCALES

    monkeypatch.setitem(SCALES, Scale, "lambda1")
    form = fused(cls, *_forms(cls))
    assert form is not UnknownBlock
    accelerated_cls = type(cls.__name__, (form, cls), {"mmfast_original": cls})
    original = cls("tuple" if "Tuple" in cls.__name__ else "tensor")
    model = copy.deepcopy(original)
    model.__class__ = accelerated_cls
    assert model.refuses(original) is None
    x, mask = torch.randn(2, 3, 8), torch.rand(8)
    calls: list[Callable[[nn.Module], object]] = [lambda m: m(x), lambda m: m(x, mask)]
    if "Tuple" in cls.__name__:
        calls += [lambda m: m(x, None, True), lambda m: m(x, head_mask=mask, output_attentions=True)]
    for call in calls:
        found, expected = call(model), call(original)
        assert type(found) is type(expected)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
    assert [c.op for c in mmfast.explain(model, x)].count("add_layer_norm") == 1


def test_an_outline_sees_what_matters_and_nothing_else() -> None:
    class A(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.f(self.norm(x), scale=2)

    class Renamed(nn.Module):
        def forward(self, x: Tensor, unused: int = 3) -> Tensor:
            normed = self.norm(x)
            branch: Tensor = self.f(normed, scale=2)
            return branch + x

    class OtherArgument(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.f(self.norm(x), scale=3)

    class OtherSum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            normed = self.norm(x)
            return normed + self.f(normed, scale=2)

    assert outline(A) == outline(Renamed) == "norm(x) f($1,scale=2) $2+x -> $3"
    assert len({outline(A), outline(OtherArgument), outline(OtherSum)}) == 3


def test_a_forward_that_cannot_be_outlined_is_not_known() -> None:
    class Multiplies(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) * 2

    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) if self.flag else x

    class Training(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) if self.training else x

    class Star(nn.Module):
        def forward(self, *args: Tensor) -> Tensor:
            return args[0]

    for cls in (Multiplies, Branches, Training, Star):
        assert outline(cls).startswith("?"), cls
        assert fused(cls) is UnknownBlock


def test_a_block_of_an_unknown_release_is_left_alone() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm2 = nn.LayerNorm(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm2(x) * 2

    class Accelerated(fused(Block), Block):  # type: ignore[misc]
        mmfast_original = Block
        bypassed = ("norm2",)

    block = Block()
    assert Accelerated.refuses(block) == "this version of Block.forward is not known to mmfast"
    x = torch.randn(2, 4)
    expected = block(x)
    block.__class__ = Accelerated  # as after loading a file that another release has written
    assert torch.equal(block(x), expected)


def test_a_release_that_an_integration_does_not_fit_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmfast import integrations

    def import_module(name: str, package: str) -> object:
        if name == ".timm":
            raise ImportError("cannot import name 'Block'")
        return importlib.import_module(name, package)

    model = build("timm")
    monkeypatch.setattr(integrations, "importlib", types.SimpleNamespace(import_module=import_module))
    row = next(row for row in mmfast.report(mmfast.accelerate(model)) if row.name == "blocks.0")
    assert (row.status, row.reason) == ("unknown", "mmfast does not fit this version: cannot import name 'Block'")
