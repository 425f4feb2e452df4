"""Captions of the demo's images, and the words they are made of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_WORD = re.compile(r"[a-z]+(?:-[a-z]+)*")


class Captions(NamedTuple):
    """What the classes are called in a sentence, sentences to train on, and others to name held-out images with."""

    names: tuple[str, ...]
    training: tuple[str, ...]
    held_out: tuple[str, ...]


CAPTIONS = {
    "digits": Captions(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
        (
            "a photo of the digit {}",
            "the digit {}, written by hand",
            "a picture of the number {}",
            "the handwritten number {}",
            "this is the number {}",
            "somebody wrote the digit {} here",
            "a small grey image of the digit {}",
            "number {}",
        ),
        (
            "a handwritten {}",
            "a small photo of the number {}",
            "this is the digit {}, written by hand",
            "a scan that shows the number {}",  # with words that no training caption has
        ),
    ),
    "fashion-mnist": Captions(
        (
            "T-shirt",
            "pair of trousers",
            "pullover",
            "dress",
            "coat",
            "sandal",
            "shirt",
            "sneaker",
            "bag",
            "ankle boot",
        ),
        (
            "a photo of the {}",
            "a picture of one {}",
            "the {}, by itself",
            "product photo: {}",
            "one {} on a dark background",
            "a small grey image of the {}",
            "this is the {}",
            "the {}",
        ),
        (
            "a small photo of one {}",
            "one {}, by itself",
            "this is a picture of the {}",
            "a catalogue page with the {}",  # with words that no training caption has
        ),
    ),
}


class Words:
    """Tokens of whole words: a start, the words of the training captions or one for any other, an end, padding.

    CLIP's own vocabulary, which open_clip's wheel holds, would be 49,408 embeddings for the thirty words here, nearly
    all of the model. The ids keep its order: padding is 0, and the end of text is the largest, where CLIP pools.
    """

    def __init__(self, captions: Iterable[str]) -> None:
        split = [_WORD.findall(caption.lower()) for caption in captions]
        words = sorted({word for caption in split for word in caption})
        self.ids = {word: 3 + index for index, word in enumerate(words)}
        self.vocab_size = len(words) + 4
        self.context_length = max(map(len, split)) + 4  # two words to spare

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Ids (number of texts, context_length)."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        out = torch.zeros(len(texts), self.context_length, dtype=torch.long)
        for row, text in zip(out, texts, strict=True):
            ids = [2, *(self.ids.get(word, 1) for word in _WORD.findall(text.lower())), self.vocab_size - 1]
            if len(ids) > self.context_length:
                raise ValueError(f"a caption may have {self.context_length - 2} words, got {text!r}")
            row[: len(ids)] = torch.tensor(ids)
        return out
