"""Attention and MLP of transformers' ViT and DINOv2, from 4.50 to 5.23: each has had a few forms since."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from transformers import activations
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ... import backends
from ...nn.activation import KNOWN_ACTIVATIONS
from .._attention import FusedAttention, attend, split_heads, takes_mask
from .._mlp import FusedMlp, activated, fused_linear
from .._outline import HEADS, Symbol, arguments
from .._swap import Accelerated, called, known, plain_tensor

_RECORDED = "mmfast outline"


def _record(module: object, *args: object, **kwargs: object) -> Symbol:
    found = next(arg for arg in args if isinstance(arg, Symbol))
    return found.record(f"attend({arguments(args, kwargs)})", shape=HEADS)


@contextmanager
def _recorded() -> Iterator[None]:
    """Within it, attention that a config names `_RECORDED` is a step of an outline."""
    ALL_ATTENTION_FUNCTIONS[_RECORDED] = _record
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[_RECORDED]


def known_attention(original: type[nn.Module], *candidates: type[Accelerated]) -> Any:
    """As `known`, for modules that call an attention function by the name in their config."""
    with _recorded():
        return known(original, *candidates)


def local_heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, N, H * d) -> (B, H, N, d), a view. H is as many as there are: under tensor parallelism, those of the rank."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


class _Attention(FusedAttention):
    """Of any release. Another implementation than "sdpa" is what the model's owner has asked for."""

    config: Any
    scaling: float
    is_causal: bool

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        """Why this attention is left alone, or None."""
        chosen = module.config._attn_implementation
        if chosen != "sdpa":
            return f"has attention implementation {chosen!r}"
        return "is causal" if module.is_causal else super().refuses(module)

    def _takes(self, x: Tensor, mask: Tensor | None, rate: float, options: dict[str, Any]) -> bool:
        """Whether the op does what transformers' sdpa function does for this call."""
        if backends.torch_serves(x) or self.config._attn_implementation != "sdpa" or self.is_causal:
            return False
        if (self.training and rate > 0.0) or any(options.get(name) not in (None, False) for name in _CHANGES):
            return False
        return plain_tensor(x) and x.dim() == 3 and takes_mask(mask, x.dtype)


_CHANGES = ("is_causal", "output_attentions", "cache", "position_bias", "softcap", "s_aux")
"""Keyword arguments under which an attention function may do something else."""


class Attention(_Attention):
    """Since then: projections, attention and output projection in one module."""

    variants = tuple(
        {"members": {"config": SimpleNamespace(_attn_implementation=_RECORDED)}, "training": training}
        for training in (True, False)
    )
    _steps = (
        "q_proj(hidden_states) $1.view((2,5,-1,head_dim)) $2.transpose(1,2) k_proj(hidden_states) "
        "$4.view((2,5,-1,head_dim)) $5.transpose(1,2) v_proj(hidden_states) $7.view((2,5,-1,head_dim)) "
        "$8.transpose(1,2) attend($3,$6,$9,attention_mask,dropout={},scaling=scaling,others=**kwargs) "
        "$10[0].reshape(2,5,-1) $11.contiguous() o_proj($12) -> ($13, $10[1])"
    )
    outlines = frozenset({" | ".join((_steps.format("attention_dropout"), _steps.format("0.0")))})
    head_dim: int
    attention_dropout: float
    q_proj: Any
    k_proj: Any
    v_proj: Any
    o_proj: Any

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """(B, N, C) -> ((B, N, C), no attention weights)."""
        x = hidden_states
        if not self._takes(x, attention_mask, self.attention_dropout, kwargs):
            return super().forward(hidden_states, attention_mask, **kwargs)
        q, k, v = (local_heads(project(x), self.head_dim) for project in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(attend(q, k, v, attention_mask, scale=self.scaling)), None


class SelfAttention(_Attention):
    """To 5.9 of ViT, to 5.17 of DINOv2: the projections and attention; another module has the output projection."""

    variants = Attention.variants
    dropout_prob: float
    num_attention_heads: int
    query: Any
    key: Any
    value: Any
    outlines = frozenset(
        " | ".join(
            "key(hidden_states) $1.view(2,-1,num_attention_heads,attention_head_size) $2.transpose(1,2) "
            "value(hidden_states) $4.view(2,-1,num_attention_heads,attention_head_size) $5.transpose(1,2) "
            "query(hidden_states) $7.view(2,-1,num_attention_heads,attention_head_size) $8.transpose(1,2) "
            f"attend($9,$3,$6,{mask},is_causal=is_causal,scaling=scaling,dropout={rate}{others}) "
            "$10[0].reshape((2,5,all_head_size)) -> ($11, $10[1])"
            for rate in ("dropout_prob", "0.0")
        )
        for mask, others in (("head_mask", ""), ("None", ""), ("None", ",others=**kwargs"))
    )

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """(B, N, C) -> ((B, N, C), no attention weights)."""
        y = self._attend(hidden_states, args, kwargs)
        return super().forward(hidden_states, *args, **kwargs) if y is None else (y, None)

    def _attend(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        asked = any(value is not None and value is not False for value in (*args, *kwargs.values()))
        if asked or not self._takes(x, None, self.dropout_prob, {}):
            return None
        heads = self.num_attention_heads
        k, v, q = (split_heads(project(x), heads) for project in (self.key, self.value, self.query))
        return attend(q, k, v, scale=self.scaling)


class SelfAttentionTuple(SelfAttention):
    """To 4.55: a tuple of the output and, if asked for, the attention weights."""

    variants = tuple({**variant, "inputs": {"output_attentions": False}} for variant in Attention.variants)
    outlines = frozenset(
        {
            " | ".join(
                "key(hidden_states) $1.view((2,5,num_attention_heads,attention_head_size)) $2.permute(0,2,1,3) "
                "value(hidden_states) $4.view((2,5,num_attention_heads,attention_head_size)) $5.permute(0,2,1,3) "
                "query(hidden_states) $7.view((2,5,num_attention_heads,attention_head_size)) $8.permute(0,2,1,3) "
                f"attend($9,$3,$6,head_mask,is_causal=is_causal,scaling=scaling,dropout={rate}) "
                "$10[0].reshape((2,5,all_head_size)) -> ($11,)"
                for rate in ("dropout_prob", "0.0")
            )
        }
    )

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
        """(B, N, C) -> ((B, N, C),), or transformers' own result where attention weights are asked for."""
        y = self._attend(hidden_states, args, kwargs)
        return super(SelfAttention, self).forward(hidden_states, *args, **kwargs) if y is None else (y,)


ATTENTIONS = (Attention, SelfAttention, SelfAttentionTuple)


class _Mlp(FusedMlp):
    def _first(self, x: Tensor) -> Any:
        linear, act = (self._modules[name] for name in self.bypassed)
        return activated(linear, act, x)


class Mlp(_Mlp):
    """Two linear layers."""

    outlines = frozenset({"fc1(hidden_states) activation_fn($1) fc2($2) -> $3"})
    bypassed = ("fc1", "activation_fn")
    fc2: Any

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return super().forward(x) if backends.torch_serves(x) else self.fc2(self._first(x))


class Mlp4(Mlp):
    """To 5.17, of DINOv2."""

    outlines = frozenset({"fc1(hidden_state) activation($1) fc2($2) -> $3"})
    bypassed = ("fc1", "activation")


class Intermediate(_Mlp):
    """To 5.9, of ViT: the first linear layer and its activation."""

    outlines = frozenset({"dense(hidden_states) intermediate_act_fn($1) -> $2"})
    bypassed = ("dense", "intermediate_act_fn")

    def forward(self, x: Tensor) -> Any:
        """(..., C) -> (..., hidden)."""
        return super().forward(x) if backends.torch_serves(x) else self._first(x)


class SwiGLU(_Mlp):
    """The gate alone is fused: the two linear layers have weights of their own."""

    outlines = frozenset({"gate_proj(x) act_fn($1) up_proj(x) $2*$3 down_proj($4) -> $5"})
    bypassed = ("gate_proj", "act_fn")
    up_proj: Any
    down_proj: Any

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return super().forward(x) if backends.torch_serves(x) else self.down_proj(self._first(x) * self.up_proj(x))


class SwiGLU4(_Mlp):
    """To 5.17: one linear layer makes both halves, and there is no module for the activation."""

    outlines = frozenset(
        {"weights_in(hidden_state) $1.chunk(2,dim=-1) silu($2[0],inplace=False) $2[1]*$3 weights_out($4) -> $5"}
    )
    bypassed = ("weights_in",)
    weights_in: Any
    weights_out: Any

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        """Why this MLP cannot be fused, or None."""
        reason = called(module.weights_in, nn.Linear)
        return None if reason is None else f"weights_in {reason}"

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        y = fused_linear(self.weights_in, _SILU, x, gate_last=False)
        return super().forward(x) if y is None else self.weights_out(y)


_SILU = nn.SiLU()
MLPS = (Mlp, Mlp4)
SWIGLUS = (SwiGLU, SwiGLU4)
for _name, _op in {
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "QuickGELUActivation": "quick_gelu",
    "SiLUActivation": "silu",
}.items():
    if hasattr(activations, _name):
        KNOWN_ACTIVATIONS[getattr(activations, _name)] = _op
