"""Releases: what a forward does, older forms of it, and what is left alone because it is not known."""

from __future__ import annotations

import copy
import importlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmfast
from mmfast.integrations._norm import FusedBlock
from mmfast.integrations._outline import IMAGES, outline
from mmfast.integrations._swap import Unknown, known

from .families import build


@pytest.fixture(autouse=True, params=[None, "torch"], ids=["default", "op"])
def route(request: pytest.FixtureRequest) -> Iterator[None]:
    """By default a CPU tensor takes the original code; a forced backend, the path that a GPU takes."""
    with mmfast.backend(request.param):
        yield


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
    from mmfast.integrations._norm import SCALES

    monkeypatch.setitem(SCALES, Scale, "lambda1")
    form = known(cls, *_forms(cls))
    assert not issubclass(form, Unknown)
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
        assert issubclass(known(cls), Unknown)


def test_a_block_of_an_unknown_release_is_left_alone() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm2 = nn.LayerNorm(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm2(x) * 2

    class Accelerated(known(Block), Block):  # type: ignore[misc]
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


def swapped(cls: type[nn.Module], candidates: tuple[type, ...], make: Callable[..., Any] = known) -> type[nn.Module]:
    """The accelerated class of an older release's class."""
    form = make(cls, *candidates)
    assert not issubclass(form, Unknown)
    return type(cls.__name__, (form, cls), {"mmfast_original": cls})


def check(original: nn.Module, cls: type[nn.Module], call: Callable[[Any], Any], op: str) -> None:
    model = copy.deepcopy(original)
    model.__class__ = cls
    assert cls.refuses(model) is None  # type: ignore[attr-defined]
    found, expected = call(model), call(original)
    assert type(found) is type(expected)
    for a, b in zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]:
        assert b is None or torch.equal(a, b)
    assert [c.op for c in mmfast.explain(call, model)] == [op]


class TimmAttention(nn.Module):
    """Of timm before 1.0.19."""

    fused_attn = True
    gate = None

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 2, 4
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.q_norm, self.k_norm, self.norm = nn.Identity(), nn.Identity(), nn.LayerNorm(8)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x):  # type: ignore[no-untyped-def]
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        rate = self.attn_drop.p if self.training else 0.0
        y = nn.functional.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, dropout_p=rate)
        return self.proj_drop(self.proj(y.transpose(1, 2).reshape(b, n, c)))


class TimmMaskedAttention(TimmAttention):
    """Of timm before 1.0.31."""

    def forward(self, x, attn_mask=None):  # type: ignore[no-untyped-def]
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        rate = self.attn_drop.p if self.training else 0.0
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=rate)
        return self.proj_drop(self.proj(self.norm(y.transpose(1, 2).reshape(b, n, c))))


def test_older_forms_of_timms_attention() -> None:
    from mmfast.integrations.timm import ATTENTIONS

    x, mask = torch.randn(2, 5, 8), torch.rand(5, 5) < 0.7
    plain = TimmAttention().eval()
    del plain.norm
    check(plain, swapped(TimmAttention, ATTENTIONS), lambda m: m(x), "attention_qkv")
    masked = swapped(TimmMaskedAttention, ATTENTIONS)
    check(TimmMaskedAttention().eval(), masked, lambda m: m(x, mask), "attention_qkv")


def _transformers_attention() -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS


class HfAttention(nn.Module):
    is_causal = False

    def __init__(self) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(_attn_implementation="sdpa")
        self.num_attention_heads, self.attention_head_size, self.all_head_size = 2, 4, 8
        self.scaling, self.dropout_prob = 0.3, 0.0
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))


class HfAttentionTuple(HfAttention):
    """To 4.55."""

    def transpose_for_scores(self, x):  # type: ignore[no-untyped-def]
        return x.view(x.size()[:-1] + (self.num_attention_heads, self.attention_head_size)).permute(0, 2, 1, 3)  # noqa: RUF005

    def forward(self, hidden_states, head_mask=None, output_attentions=False):  # type: ignore[no-untyped-def]
        k = self.transpose_for_scores(self.key(hidden_states))
        v = self.transpose_for_scores(self.value(hidden_states))
        q = self.transpose_for_scores(self.query(hidden_states))
        attend = _transformers_attention()[self.config._attn_implementation]
        rate = self.dropout_prob if self.training else 0.0
        y, p = attend(self, q, k, v, head_mask, is_causal=self.is_causal, scaling=self.scaling, dropout=rate)
        y = y.reshape(y.size()[:-2] + (self.all_head_size,))  # noqa: RUF005
        return (y, p) if output_attentions else (y,)


class HfAttentionPair(HfAttention):
    """From 4.56."""

    def forward(self, hidden_states, head_mask=None):  # type: ignore[no-untyped-def]
        shape = (hidden_states.shape[0], -1, self.num_attention_heads, self.attention_head_size)
        k = self.key(hidden_states).view(*shape).transpose(1, 2)
        v = self.value(hidden_states).view(*shape).transpose(1, 2)
        q = self.query(hidden_states).view(*shape).transpose(1, 2)
        attend = _transformers_attention()[self.config._attn_implementation]
        rate = self.dropout_prob if self.training else 0.0
        y, p = attend(self, q, k, v, head_mask, is_causal=self.is_causal, scaling=self.scaling, dropout=rate)
        return y.reshape(y.size()[:-2] + (self.all_head_size,)), p  # noqa: RUF005


@pytest.mark.parametrize("cls", [HfAttentionTuple, HfAttentionPair])
def test_older_forms_of_transformers_attention(cls: type[nn.Module]) -> None:
    from mmfast.integrations.transformers._parts import ATTENTIONS, known_attention

    x = torch.randn(2, 5, 8)
    new = swapped(cls, ATTENTIONS, known_attention)
    check(cls().eval(), new, lambda m: m(x), "attention")
    original = cls().eval()
    model = copy.deepcopy(original)
    model.__class__ = new
    mask = torch.zeros(2, 2, 5, 5)
    assert torch.equal(model(x, mask)[0], original(x, mask)[0])
    assert not mmfast.explain(model, x, mask)
    if cls is HfAttentionTuple:
        assert len(model(x, None, True)) == len(model(x, output_attentions=True)) == 2


class HfIntermediate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.intermediate_act_fn = nn.Linear(8, 16), nn.GELU()

    def forward(self, hidden_states):  # type: ignore[no-untyped-def]
        return self.intermediate_act_fn(self.dense(hidden_states))


class HfMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.activation, self.fc2 = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)

    def forward(self, hidden_state):  # type: ignore[no-untyped-def]
        return self.fc2(self.activation(self.fc1(hidden_state)))


class HfSwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights_in, self.weights_out = nn.Linear(8, 32), nn.Linear(16, 8)

    def forward(self, hidden_state):  # type: ignore[no-untyped-def]
        a, b = self.weights_in(hidden_state).chunk(2, dim=-1)
        return self.weights_out(nn.functional.silu(a) * b)


@pytest.mark.parametrize("cls", [HfIntermediate, HfMlp, HfSwiGLU])
def test_older_forms_of_transformers_mlps(cls: type[nn.Module]) -> None:
    from mmfast.integrations.transformers._parts import MLPS, SWIGLUS, Intermediate

    x = torch.randn(2, 5, 8)
    check(cls(), swapped(cls, (*MLPS, *SWIGLUS, Intermediate)), lambda m: m(x), "linear_act")


class HfPatches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, 8, 8, 8)
        self.image_size, self.num_channels = (16, 16), 3

    def forward(self, pixel_values, interpolate_pos_encoding=False):  # type: ignore[no-untyped-def]
        _b, c, h, w = pixel_values.shape
        if c != self.num_channels:
            raise ValueError("channels")
        if not interpolate_pos_encoding and (h, w) != self.image_size:
            raise ValueError("size")
        return self.projection(pixel_values).flatten(2).transpose(1, 2)


class HfEmbeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embeddings, self.dropout = HfPatches(), nn.Dropout(0.0)
        self.cls_token, self.position_embeddings = (nn.Parameter(torch.randn(1, n, 8)) for n in (1, 5))
        self.image_size = (16, 16)

    def forward(self, pixel_values, bool_masked_pos=None, interpolate_pos_encoding=False):  # type: ignore[no-untyped-def]
        b, _c, _h, _w = pixel_values.shape
        x = self.patch_embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        if bool_masked_pos is not None:
            x = x * (1 - bool_masked_pos.unsqueeze(-1).type_as(x))
        cls = self.cls_token.expand(b, -1, -1)
        x = torch.cat((cls, x), dim=1)
        positions = self.position_embeddings[:, :1] if interpolate_pos_encoding else self.position_embeddings
        return self.dropout(x + positions)


def test_older_forms_of_transformers_embeddings() -> None:
    from mmfast.integrations.transformers._embeddings import PATCHES, ViTEmbeddings

    x, wide = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 32)
    patches = swapped(HfPatches, PATCHES)
    check(HfPatches(), patches, lambda m: m(x), "patch_embed")
    check(HfPatches(), patches, lambda m: m(wide, interpolate_pos_encoding=True), "patch_embed")
    cls = swapped(HfEmbeddings, (ViTEmbeddings,))
    cls.patches = (HfPatches, patches)  # type: ignore[attr-defined]
    check(HfEmbeddings(), cls, lambda m: m(x), "patch_embed")
    model = HfEmbeddings()
    model.patch_embeddings.__class__ = patches
    original = copy.deepcopy(model)
    model.__class__ = cls
    masked = torch.tensor([[True, False, False, True]] * 2)
    for args in ((x, masked), (wide, None, True), (x, None, True)):
        assert torch.equal(model(*args), original(*args))
    for m in (model, original):
        with pytest.raises(ValueError, match="size"):
            m(wide)


def test_an_outline_of_tensors() -> None:
    class A(nn.Module):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            b, n, _ = x.shape
            a, c = self.f(x).reshape(b, n, self.heads).chunk(2, dim=-1)
            y = torch.tanh(a) * c
            return y[:, 0] if mask is None else y + mask.to(y.dtype)

    masked = "f(x) $1.reshape(2,5,heads) $2.chunk(2,dim=-1) tanh($3[0]) $3[1]*$4 "
    assert outline(A) == masked + "mask.to($5.dtype) $5+$6 -> $7"
    assert outline(A, inputs={"mask": None}) == masked + "-> $5[:,0]"
    assert outline(A, missing=("heads",)).startswith("? AttributeError")
    assert "reshape(2,3,heads)" in outline(A, shape=IMAGES[:3])
    assert "reshape(2,5,4)" in outline(A, members={"heads": 4})
