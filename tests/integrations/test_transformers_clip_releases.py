"""Parts of transformers' CLIP and SigLIP as releases 4.53 to 4.57 have them."""

from __future__ import annotations

import copy
import types
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmfast
from mmfast.integrations.transformers import _clip as parts

from .test_releases import check, swapped


@pytest.fixture(autouse=True)
def through_the_ops() -> Iterator[None]:
    """By default a CPU tensor takes the original code; these tests are to see the path that a GPU takes."""
    with mmfast.backend("torch"):
        yield


class Old(nn.Module):
    is_causal, dropout, scale, num_heads, head_dim = False, 0.0, 0.4, 2, 4

    def __init__(self) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(_attn_implementation="sdpa")
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(8, 8) for _ in range(4))

    def heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.num_heads, self.head_dim).transpose(1, 2)


def _functions() -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS


class OldSiglipAttention(Old):
    def forward(self, hidden_states, attention_mask=None, output_attentions=False):  # type: ignore[no-untyped-def]
        b, n, c = hidden_states.shape
        q, k, v = (layer(hidden_states) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (x.view(b, n, self.num_heads, self.head_dim).transpose(1, 2) for x in (q, k, v))
        attend = _functions()[self.config._attn_implementation]
        rate = self.dropout if self.training else 0.0
        mask = attention_mask
        y, weights = attend(self, q, k, v, mask, is_causal=self.is_causal, scaling=self.scale, dropout=rate)
        y = self.out_proj(y.reshape(b, n, c).contiguous())
        return y, weights if output_attentions else None


class OldClipAttention(Old):
    def forward(  # type: ignore[no-untyped-def]
        self, hidden_states, attention_mask=None, causal_attention_mask=None, output_attentions=False
    ):
        b, n, c = hidden_states.shape
        q, k, v = (layer(hidden_states) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (x.view(b, n, -1, self.head_dim).transpose(1, 2) for x in (q, k, v))
        mask = causal_attention_mask if attention_mask is None else attention_mask
        if attention_mask is not None and causal_attention_mask is not None:
            mask = attention_mask + causal_attention_mask
        attend = _functions()[self.config._attn_implementation]
        options = {"is_causal": self.is_causal, "scaling": self.scale}
        options["dropout"] = self.dropout if self.training else 0.0
        y, weights = attend(self, q, k, v, mask, **options, output_attentions=output_attentions)
        y = self.out_proj(y.reshape(b, n, c).contiguous())
        return y, weights if output_attentions else None


class OldLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer_norm1, self.layer_norm2, self.mlp = nn.LayerNorm(8), nn.LayerNorm(8), nn.Linear(8, 8)


class OldSiglipLayer(OldLayer):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = OldSiglipAttention()

    def forward(self, hidden_states, attention_mask, output_attentions=False):  # type: ignore[no-untyped-def]
        y, weights = self.self_attn(
            hidden_states=self.layer_norm1(hidden_states),
            attention_mask=attention_mask,
            output_attentions=output_attentions,
        )
        x = hidden_states + y
        x = x + self.mlp(self.layer_norm2(x))
        return (x, weights) if output_attentions else (x,)


class OldClipLayer(OldLayer):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = OldClipAttention()

    def forward(  # type: ignore[no-untyped-def]
        self, hidden_states, attention_mask, causal_attention_mask, output_attentions=False
    ):
        y, weights = self.self_attn(
            hidden_states=self.layer_norm1(hidden_states),
            attention_mask=attention_mask,
            causal_attention_mask=causal_attention_mask,
            output_attentions=output_attentions,
        )
        x = hidden_states + y
        x = x + self.mlp(self.layer_norm2(x))
        return (x, weights) if output_attentions else (x,)


HIDDEN = torch.linspace(-2, 2, 2 * 5 * 8).reshape(2, 5, 8).cos()
LOWEST = torch.finfo(torch.float32).min
FUTURE = torch.full((5, 5), LOWEST).triu(1).expand(2, 1, 5, 5)
PADDED = torch.zeros(2, 1, 5, 5).index_fill(3, torch.tensor([4]), LOWEST)


@pytest.mark.parametrize("masks", [(None, None), (None, FUTURE), (PADDED, None), (PADDED, FUTURE)])
def test_older_forms_of_attention(masks: tuple[Tensor | None, Tensor | None]) -> None:
    from mmfast.integrations.transformers._parts import known_attention

    clip = swapped(OldClipAttention, parts.ATTENTIONS, known_attention)
    assert clip.__mro__[1] is parts.MaskedAttention4
    check(OldClipAttention().eval(), clip, lambda m: m(HIDDEN, *masks), "attention")
    siglip = swapped(OldSiglipAttention, parts.ATTENTIONS, known_attention)
    assert siglip.__mro__[1] is parts.OwnAttention4
    check(OldSiglipAttention().eval(), siglip, lambda m: m(HIDDEN, masks[0]), "attention")
    for cls, new, given in ((OldClipAttention, clip, masks), (OldSiglipAttention, siglip, masks[:1])):
        original = cls().eval()
        model = copy.deepcopy(original)
        model.__class__ = new
        assert torch.equal(model(HIDDEN, *given, output_attentions=True)[0], original(HIDDEN, *given)[0])
        assert not mmfast.explain(model, HIDDEN, *given, output_attentions=True)  # transformers' own answer


@pytest.mark.parametrize("asked", [False, True], ids=["plain", "weights"])
def test_older_forms_of_layers(asked: bool) -> None:
    for cls, form, masks in (
        (OldClipLayer, parts.LayerMasks, (PADDED, FUTURE)),
        (OldSiglipLayer, parts.LayerTuple, (PADDED,)),
    ):
        new = swapped(cls, parts.LAYERS)
        assert new.__mro__[1] is form
        original = cls()
        model = copy.deepcopy(original)
        model.__class__ = new
        found, expected = (m(HIDDEN, *masks, output_attentions=asked) for m in (model, original))
        assert len(found) == len(expected) == 1 + asked
        torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-6)
        ran = Counter(c.op for c in mmfast.explain(model, HIDDEN, *masks, output_attentions=asked))
        assert ran["add_layer_norm"] == 1
