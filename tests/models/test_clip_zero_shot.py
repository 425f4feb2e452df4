"""Zero-shot classification, retrieval in blocks, and tokenizers."""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast.models import (
    CLIP,
    clip_tokenizer,
    retrieval_recall,
    top_k_matches,
    zero_shot_classifier,
    zero_shot_predict,
)

TEXT: dict[str, Any] = {"context_length": 12, "vocab_size": 60, "width": 16, "heads": 2, "layers": 2}
VIT: dict[str, Any] = {"layers": 1, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16}
END = TEXT["vocab_size"] - 1
NAMES = ["cat", "dog", "aeroplane"]
TEMPLATES: list[Any] = ["a photo of a {}.", lambda name: f"{name}!"]


def letters(texts: Sequence[str]) -> Tensor:
    """A tokenizer of letters."""
    ids = torch.zeros(len(texts), TEXT["context_length"], dtype=torch.int64)
    for row, text in enumerate(texts):
        found = [*[1 + ord(letter) % 57 for letter in text.replace(" ", "")][: TEXT["context_length"] - 1], END]
        ids[row, : len(found)] = torch.tensor(found)
    return ids


@pytest.fixture
def model() -> CLIP:
    return CLIP(8, VIT, TEXT).double().train()


def assert_same(ours: Any, theirs: Any, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("batch_size", [1, 4, 256])
def test_classifier_is_the_mean_of_the_prompts(model: CLIP, batch_size: int) -> None:
    found = zero_shot_classifier(model, NAMES, TEMPLATES, letters, batch_size=batch_size)
    assert found.shape == (8, 3)
    assert not found.requires_grad
    assert model.training
    for column, name in enumerate(NAMES):
        ids = letters([f"a photo of a {name}.", f"{name}!"])
        mean = F.normalize(model.encode_text(ids), dim=-1).mean(dim=0)
        assert_same(found[:, column], (mean / mean.norm()).detach())


def test_classifier_is_open_clips(model: CLIP) -> None:
    open_clip = pytest.importorskip("open_clip")
    theirs = open_clip.build_zero_shot_classifier(model, letters, NAMES, TEMPLATES[:1])
    assert_same(zero_shot_classifier(model, NAMES, TEMPLATES[:1], letters), theirs)
    peer = open_clip.CLIP(8, VIT, TEXT).double()
    expected = open_clip.build_zero_shot_classifier(peer, letters, NAMES, TEMPLATES[:1])
    assert_same(zero_shot_classifier(peer, NAMES, TEMPLATES[:1], letters), expected)


def test_prediction(model: CLIP) -> None:
    images = torch.randn(5, 3, 16, 16, dtype=torch.float64)
    classifier = zero_shot_classifier(model.eval(), NAMES, tokenizer=letters)
    cosines = F.normalize(model.encode_image(images), dim=-1) @ classifier
    expected = (cosines / 0.07).softmax(dim=-1)
    values, classes = zero_shot_predict(model, images, classifier, top_k=3)
    assert_same(values, expected.sort(descending=True).values.detach(), 1e-6)
    assert torch.equal(classes, cosines.argsort(descending=True))
    assert zero_shot_predict(model, images, classifier)[1].shape == (5, 1)


def test_prediction_of_a_model_with_a_bias() -> None:
    model = CLIP(8, VIT, TEXT, init_logit_bias=-10.0).double().eval()
    images = torch.randn(5, 3, 16, 16, dtype=torch.float64)
    classifier = zero_shot_classifier(model, NAMES, tokenizer=letters)
    logits = F.normalize(model.encode_image(images), dim=-1) @ classifier / 0.07 - 10.0
    values, _ = zero_shot_predict(model, images, classifier, top_k=3)
    assert_same(values, logits.sigmoid().sort(descending=True).values.detach(), 1e-6)


def test_zero_shot_arguments(model: CLIP) -> None:
    with pytest.raises(ValueError, match="classnames must not be empty"):
        zero_shot_classifier(model, [], tokenizer=letters)
    with pytest.raises(ValueError, match="templates must not be empty"):
        zero_shot_classifier(model, NAMES, [], letters)
    with pytest.raises(TypeError, match="classnames must be a sequence of strings, got one string"):
        zero_shot_classifier(model, "cat", tokenizer=letters)
    with pytest.raises(TypeError, match="templates must be a sequence of strings, got one string"):
        zero_shot_classifier(model, NAMES, "a photo of a {}.", letters)
    with pytest.raises(ValueError, match="batch_size must be positive, got 0"):
        zero_shot_classifier(model, NAMES, tokenizer=letters, batch_size=0)
    with pytest.raises(ValueError, match=r"top_k must be in 1\.\.3, got 4"):
        zero_shot_predict(model, torch.zeros(1, 3, 16, 16).double(), torch.zeros(8, 3), top_k=4)


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
def test_top_k_is_that_of_the_whole_matrix(chunk_size: int) -> None:
    queries, keys = torch.randn(10, 6, dtype=torch.float64), torch.randn(17, 6, dtype=torch.float64)
    expected = (queries @ keys.T).topk(5, dim=-1)
    values, indices = top_k_matches(queries, keys, 5, chunk_size=chunk_size)
    assert_same(values, expected.values)
    assert torch.equal(indices, expected.indices)
    cosines = (F.normalize(queries, dim=-1) @ F.normalize(keys, dim=-1).T).topk(17, dim=-1)
    values, indices = top_k_matches(queries, keys, 17, chunk_size=chunk_size, normalize=True)
    assert_same(values, cosines.values)
    assert torch.equal(indices, cosines.indices)


def test_top_k_never_holds_the_matrix() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(x, Tensor):
                    largest = max(largest, x.numel())
            return out

    with Watch():
        retrieval_recall(torch.randn(500, 4), torch.randn(500, 4), chunk_size=32)
    assert largest <= 500 * 10


def test_half_precision_scores_are_float32() -> None:
    values, indices = top_k_matches(torch.eye(4).half(), torch.eye(4).half(), 1)
    assert values.dtype == torch.float32
    assert torch.equal(indices[:, 0], torch.arange(4))


def test_recall_of_pairs() -> None:
    similarity = torch.tensor([[0.9, 0.1, 0.3], [0.8, 0.25, 0.1], [0.1, 0.2, 0.7]])
    found = retrieval_recall(similarity, torch.eye(3), k=(1, 2, 9))
    assert found == pytest.approx(
        {
            "image_to_text_recall@1": 2 / 3,  # the second image finds the first text
            "image_to_text_recall@2": 1.0,
            "image_to_text_recall@9": 1.0,
            "text_to_image_recall@1": 1.0,
            "text_to_image_recall@2": 1.0,
            "text_to_image_recall@9": 1.0,
        }
    )


@pytest.mark.parametrize("chunk_size", [2, 64])
def test_recall_with_several_captions(chunk_size: int) -> None:
    """Against ranks counted from the whole matrix."""
    images, texts = torch.randn(8, 5, dtype=torch.float64), torch.randn(24, 5, dtype=torch.float64)
    image_ids, text_ids = torch.arange(8) + 100, torch.arange(8).repeat_interleave(3)[torch.randperm(24)] + 100
    found = retrieval_recall(images, texts, image_ids, text_ids, k=(1, 5), chunk_size=chunk_size)
    scores, match = images @ texts.T, image_ids[:, None] == text_ids
    for rank in (1, 5):
        for name, s, m in (("image_to_text", scores, match), ("text_to_image", scores.T, match.T)):
            hits = [m[row][s[row].argsort(descending=True)[:rank]].any().item() for row in range(len(s))]
            assert found[f"{name}_recall@{rank}"] == pytest.approx(sum(hits) / len(hits))


def test_retrieval_arguments() -> None:
    x, y = torch.randn(3, 4), torch.randn(5, 4)
    with pytest.raises(ValueError, match="3 images and 5 texts need image_ids and text_ids"):
        retrieval_recall(x, y)
    with pytest.raises(ValueError, match=r"text_ids must be integers of shape \(5,\), got torch.int64 \(3,\)"):
        retrieval_recall(x, y, torch.arange(3), torch.arange(3))
    with pytest.raises(ValueError, match="k must be positive numbers"):
        retrieval_recall(x, x, k=(0,))
    with pytest.raises(ValueError, match="there must be features"):
        retrieval_recall(x[:0], x[:0])
    with pytest.raises(ValueError, match=r"k must be in 1\.\.5, the number of keys, got 6"):
        top_k_matches(x, y, 6)
    with pytest.raises(ValueError, match="chunk_size must be positive, got 0"):
        top_k_matches(x, y, 1, chunk_size=0)
    with pytest.raises(ValueError, match="keys must have width 4 like queries, got 3"):
        top_k_matches(x, y[:, :3])
    with pytest.raises(TypeError, match=r"keys must be torch.float32 like queries, got torch.float64"):
        top_k_matches(x, y.double())
    with pytest.raises(TypeError, match=r"queries must be floating point, got torch.int64"):
        top_k_matches(x.long(), y)
    with pytest.raises(ValueError, match=r"queries must have shape \(N, D\), got \(4,\)"):
        top_k_matches(x[0], y)


def test_tokenizer_is_open_clips() -> None:
    open_clip = pytest.importorskip("open_clip")
    tokenizer = clip_tokenizer("ViT-B-32")
    texts = ["a photo of a cat!", "tokenization " * 90]
    ids = tokenizer(texts)
    assert torch.equal(ids, open_clip.get_tokenizer("ViT-B-32")(texts))
    assert ids.shape == (2, 77)
    assert ids[0].argmax() == 7
    assert ids[1].argmax() == 76
    model = CLIP(8, VIT, {**TEXT, "vocab_size": 49408})
    assert clip_tokenizer(model)(["a cat"]).shape == (1, 12)
    assert clip_tokenizer(model, 20)(["a cat"]).shape == (1, 20)
    assert zero_shot_classifier(model, NAMES).shape == (8, 3)


def test_tokenizer_of_transformers_from_a_folder(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "cat</w>", "c", "a", "t", "ca", "t</w>", "c</w>"]
    (tmp_path / "vocab.json").write_text(str({word: i for i, word in enumerate(words)}).replace("'", '"'))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    peer = transformers.CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    peer.save_pretrained(tmp_path)
    model = CLIP(8, VIT, TEXT)
    ids = clip_tokenizer(model, library="transformers", source=str(tmp_path))(["a cat", "a"])
    expected = peer(["a cat", "a"], padding="max_length", max_length=12, truncation=True, return_tensors="pt")
    assert torch.equal(ids, expected["input_ids"])
    assert ids.shape == (2, 12)


def test_tokenizer_without_a_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **options: Any) -> Any:
        if name.partition(".")[0] in ("open_clip", "transformers"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"needs open_clip or transformers: pip install 'mmfast\[peers\]'"):
        clip_tokenizer("ViT-B-32")
    with pytest.raises(ImportError, match="needs transformers: pip install"):
        clip_tokenizer("ViT-B-32", library="transformers")


def test_tokenizer_arguments() -> None:
    with pytest.raises(ValueError, match="library must be one of open_clip, transformers, got 'nltk'"):
        clip_tokenizer("ViT-B-32", library="nltk")
    with pytest.raises(ValueError, match="unknown architecture 'ViT-B-33'"):
        clip_tokenizer("ViT-B-33")
    with pytest.raises(ValueError, match="context_length must be positive, got 0"):
        clip_tokenizer("ViT-B-32", 0)
