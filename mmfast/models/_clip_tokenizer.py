"""The tokenizer of a CLIP: open_clip's or transformers' own, whichever is installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ._clip_config import TextConfig, clip_config, text_config

if TYPE_CHECKING:
    from .clip import CLIP

Tokenizer = Callable[[Sequence[str]], Tensor]
LIBRARIES = ("open_clip", "transformers")
OPENAI_TOKENIZER = "openai/clip-vit-base-patch32"


def clip_tokenizer(
    model: CLIP | str = "ViT-B-32",
    context_length: int | None = None,
    *,
    library: str | None = None,
    source: str | None = None,
) -> Tokenizer:
    """Return the tokenizer of a model: a function of a list of texts that gives ids (B, context_length), int64.

    CLIP's own (byte pairs, 49408 ids) is in open_clip's package. Others, SigLIP's among them, and all of transformers',
    are files that transformers reads from its cache, a folder, or the Hugging Face hub.

    Args:
        model: a `CLIP`, or open_clip's name of an architecture.
        context_length: by default the model's.
        library: "open_clip" or "transformers"; by default the first that is installed.
        source: a folder or a name on the hub, instead of the configuration's.

    Returns:
        Texts are cut at context_length, and their end is kept. open_clip pads CLIP's ids with 0, transformers with the
        id of the end: the towers take either, for the first of the largest ids is the end.

    Raises:
        ImportError: neither library is installed, or not the one asked for.
        ValueError: the name or the library is unknown.
    """
    if library is not None and library not in LIBRARIES:
        raise ValueError(f"clip_tokenizer: library must be one of {', '.join(LIBRARIES)}, got {library!r}")
    config: TextConfig = (
        text_config(clip_config(model)["text_cfg"]) if isinstance(model, str) else text_config(model.text_cfg)
    )
    length = config.context_length if context_length is None else context_length
    if length < 1:
        raise ValueError(f"clip_tokenizer: context_length must be positive, got {length}")
    source = source or config.hf_tokenizer_name
    missing: ImportError | None = None
    for name in LIBRARIES if library is None else (library,):
        make = _open_clip if name == "open_clip" else _transformers
        try:
            return make(config, length, source)
        except ImportError as error:
            missing = error
    wanted = library or "open_clip or transformers"
    raise ImportError(f"clip_tokenizer: needs {wanted}: pip install 'mmfast[peers]'") from missing


def _open_clip(config: TextConfig, length: int, source: str | None) -> Tokenizer:
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    options = config.tokenizer_kwargs or {}
    if source is None:
        return SimpleTokenizer(context_length=length, **options)
    return HFTokenizer(source, context_length=length, tokenizer_mode=config.tokenizer_mode, **options)


def _transformers(config: TextConfig, length: int, source: str | None) -> Tokenizer:
    from transformers import AutoTokenizer

    if source is not None and (config.tokenizer_kwargs or config.tokenizer_mode):
        # What these options do (cleaning, stripping) is code of open_clip's.
        raise ImportError(f"the tokenizer {source!r} with {config.tokenizer_kwargs} is open_clip's")
    tokenizer: Any = AutoTokenizer.from_pretrained(source or OPENAI_TOKENIZER)

    def tokenize(texts: Sequence[str]) -> Tensor:
        texts = [texts] if isinstance(texts, str) else list(texts)
        found = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return found["input_ids"]

    return tokenize
