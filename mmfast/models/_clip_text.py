"""The text tower of CLIP and SigLIP, with open_clip's parameter names.

Under a causal mask nothing reads what follows the end of a text. So texts on a CPU are cut after the longest of the
batch, where their length costs no synchronisation; texts of GPU tensors keep the length they come with, and
`trim_text` cuts them beforehand, in the data loader.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..nn.activation import any_global_hook, hooked
from ._clip_block import Transformer, act_layer, norm_layer, take_token
from ._clip_config import TextConfig
from ._clip_vision import lock_groups


class TextTransformer(nn.Module):
    """Token and position embeddings, a transformer, a norm, and the projection of one token's features.

    Args:
        config: the tower.
        embed_dim: width of the features.
        quick_gelu: QuickGELU instead of GELU.
        factory: device and dtype of the parameters.

    Source: open_clip's `TextTransformer`: parameters `positional_embedding`, `text_projection` (a matrix that the
    features are multiplied with, or a linear layer with `proj_bias`), `token_embedding`, `transformer`, `ln_final`; its
    initialisation, drawing the same numbers.
    """

    text_projection: Any

    def __init__(self, config: TextConfig, embed_dim: int, quick_gelu: bool, factory: dict[str, Any]) -> None:
        super().__init__()
        norm, width = norm_layer(config.norm_kwargs), config.width
        self.config = config
        self.context_length = config.context_length
        self.vocab_size = config.vocab_size
        if config.proj_type == "none" and embed_dim != width:
            raise ValueError(
                f"CLIP: embed_dim must be the width {width} of a text tower without projection, got {embed_dim}"
            )
        self.token_embedding = nn.Embedding(config.vocab_size, width, **factory)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, width, **factory))
        self.transformer = Transformer(
            width,
            config.layers,
            config.heads,
            config.mlp_ratio,
            config.ls_init_value,
            act_layer(quick_gelu, config.act_kwargs),
            norm,
            factory,
        )
        self.ln_final = norm(width, **factory)
        if config.proj_type == "none":
            self.text_projection = None
        elif config.proj_bias:
            self.text_projection = nn.Linear(width, embed_dim, **factory)
        else:
            self.text_projection = nn.Parameter(torch.empty(width, embed_dim, **factory))
        self._init_weights()

    def _init_weights(self) -> None:
        width, depth = self.config.width, self.config.layers
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        for block in self.transformer.resblocks:
            attn, mlp = block.attn, block.mlp
            nn.init.normal_(attn.in_proj_weight, std=width**-0.5)  # type: ignore[union-attr,arg-type]
            nn.init.normal_(attn.out_proj.weight, std=width**-0.5 * (2 * depth) ** -0.5)  # type: ignore[union-attr,arg-type]
            nn.init.normal_(mlp.c_fc.weight, std=(2 * width) ** -0.5)  # type: ignore[union-attr,arg-type]
            nn.init.normal_(mlp.c_proj.weight, std=width**-0.5 * (2 * depth) ** -0.5)  # type: ignore[union-attr,arg-type]
        if self.text_projection is None:
            return
        linear = isinstance(self.text_projection, nn.Linear)
        nn.init.normal_(self.text_projection.weight if linear else self.text_projection, std=width**-0.5)
        if linear:
            nn.init.zeros_(self.text_projection.bias)

    def forward(self, text: Tensor) -> Tensor:
        """Map token ids (B, L), L <= context_length, to features (B, embed_dim)."""
        return text_features(self, self.config, text)

    def forward_features(self, text: Tensor) -> Tensor:
        """Map token ids (B, L) to normalised tokens (B, L, width)."""
        return text_tokens(self, self.config, text)

    def lock(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        """Freeze all but the last groups: see `CLIP.lock_text_tower`."""
        lock_text(self, unlocked_layers)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.transformer.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should leave alone."""
        return {"positional_embedding"}


# A tower is a TextTransformer, or a CLIP that holds its parts (open_clip's older layout).


def text_features(tower: Any, config: TextConfig, text: Tensor) -> Tensor:
    """Features (B, embed_dim) of token ids (B, L)."""
    check_text(text, config)
    if config.pool_type == "avg":
        if config.final_ln_after_pool:
            return pool_text(tower, config, text, text_blocks(tower, config, text))
        return _project(tower, mean_of_text(text_tokens(tower, config, text), text, config.pad_id))
    end = end_of_text(text, config)
    if isinstance(end, Tensor) and _trims(tower, config, text):
        text = text[:, : int(end.max()) + 1]
    mask, causal = pad_mask(text, config), not config.no_causal_mask
    return _project(tower, tower.transformer.one_token(_embed(tower, text), end, mask, causal, norm=tower.ln_final))


def text_tokens(tower: Any, config: TextConfig, text: Tensor) -> Tensor:
    """Normalised tokens (B, L, width) of token ids (B, L)."""
    return text_blocks(tower, config, text, norm=tower.ln_final)


def text_blocks(
    tower: Any,
    config: TextConfig,
    text: Tensor,
    count: int | None = None,
    states: list[Tensor] | None = None,
    norm: nn.Module | None = None,
) -> Tensor:
    """Run the first `count` blocks and `norm` on token ids (B, L): (B, L, width)."""
    check_text(text, config)
    mask, causal = pad_mask(text, config), not config.no_causal_mask
    return tower.transformer(_embed(tower, text), mask, causal, norm=norm, count=count, states=states)


def pool_text(tower: Any, config: TextConfig, text: Tensor, x: Tensor) -> Tensor:
    """Pool the output of the blocks, (B, L, width), normalise and project: (B, embed_dim)."""
    if config.pool_type != "avg":
        return _project(tower, tower.ln_final(take_token(x, end_of_text(text, config))))
    if config.final_ln_after_pool:
        return _project(tower, tower.ln_final(mean_of_text(x, text, config.pad_id)))
    return _project(tower, mean_of_text(tower.ln_final(x), text, config.pad_id))


def _project(tower: Any, pooled: Tensor) -> Tensor:
    projection = tower.text_projection
    if projection is None:
        return pooled
    return projection(pooled) if isinstance(projection, nn.Module) else pooled @ projection


def _embed(tower: Any, text: Tensor) -> Tensor:
    dtype = tower.transformer.weight_dtype
    return tower.token_embedding(text).to(dtype) + tower.positional_embedding[: text.shape[1]].to(dtype)


def _trims(tower: Any, config: TextConfig, text: Tensor) -> bool:
    """Whether texts may be cut after the longest: their length is at hand, and no one looks at their tokens."""
    if config.no_causal_mask or text.device.type != "cpu" or not text.shape[0]:
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    return not (any_global_hook() or hooked(tower.token_embedding) or any(map(hooked, tower.transformer.modules())))


def check_text(text: object, config: TextConfig) -> None:
    """Raise TypeError or ValueError unless `text` are token ids that the tower takes."""
    if not isinstance(text, Tensor):
        raise TypeError(f"CLIP: text must be a tensor of token ids, got {type(text).__name__}")
    if text.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"CLIP: text must be torch.int64 or torch.int32, got {text.dtype}")
    if text.dim() != 2 or not 0 < text.shape[1] <= config.context_length:
        expected = f"(B, L) with L from 1 to {config.context_length}"
        raise ValueError(f"CLIP: text must have shape {expected}, got {tuple(text.shape)}")


def end_of_text(text: Tensor, config: TextConfig) -> int | Tensor:
    """The token that stands for each text: a number, or (B,) of them; of equal largest ids the first."""
    if config.pool_type == "argmax":
        return text.argmax(dim=-1)
    if config.pool_type == "eos":
        return (text == config.eos_id).int().argmax(dim=-1)
    return 0 if config.pool_type == "first" else -1


def pad_mask(text: Tensor, config: TextConfig) -> Tensor | None:
    """(B, 1, 1, L), True where a token is not padding, where the tower masks padding; else None."""
    if not (config.use_pad_mask and config.no_causal_mask):
        return None
    return (text != config.pad_id)[:, None, None]


def mean_of_text(tokens: Tensor, text: Tensor, pad_id: int) -> Tensor:
    """The mean of tokens (B, L, D) over each text, which ends where only `pad_id` follows: (B, D).

    An id equal to `pad_id` within a text counts: CLIP's tokenizer pads with 0, which is also the id of "!". Of a text
    without tokens it is 0.
    """
    real = (text != pad_id).flip(-1).cumsum(-1).flip(-1) > 0
    weights = real.to(tokens.dtype) / real.sum(dim=-1, keepdim=True).clamp(min=1).to(tokens.dtype)
    return torch.bmm(weights[:, None], tokens)[:, 0]


def trim_text(text: Tensor, config: TextConfig, multiple: int = 8) -> Tensor:
    """Cut token ids (B, L) after the end of the longest text, to a multiple of `multiple`; the features are the same.

    Returns `text` where what follows a text counts: without a causal mask, and for the last token or the mean.
    """
    check_text(text, config)
    if multiple < 1:
        raise ValueError(f"CLIP: multiple must be positive, got {multiple}")
    end = end_of_text(text, config)
    if config.no_causal_mask or not isinstance(end, Tensor) or config.pool_type == "avg" or not text.shape[0]:
        return text
    length = int(end.max()) + 1
    return text[:, : -(-length // multiple) * multiple]


def lock_text(tower: Any, unlocked: int) -> None:
    """Freeze the parts of a text tower but for the last groups: see `CLIP.lock_text_tower`."""
    projection = tower.text_projection
    blocks = list(tower.transformer.resblocks)
    groups: list[list[Any]] = [
        [tower.token_embedding, tower.positional_embedding],
        *([block] for block in blocks[:-1]),
        [blocks[-1], tower.ln_final],
        *([[projection]] if projection is not None else []),
    ]
    lock_groups(groups, unlocked)
