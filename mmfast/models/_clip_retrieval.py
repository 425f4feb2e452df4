"""Retrieval between images and texts, in blocks: the matrix of all similarities never exists."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def top_k_matches(
    queries: Tensor, keys: Tensor, k: int = 1, *, chunk_size: int = 4096, normalize: bool = False
) -> tuple[Tensor, Tensor]:
    """Return, for each query, the k keys with the largest inner products.

    Blocks of chunk_size x chunk_size similarities are computed and only the best are kept, so the memory beyond the
    result is O(chunk_size^2), whatever the number of queries and keys.

    Args:
        queries: (M, D), floating point.
        keys: (N, D) of the same dtype, on the same device.
        k: at most N.
        chunk_size: side of a block.
        normalize: bring both to length 1 first, so that the scores are cosines.

    Returns:
        Scores (M, k), the largest first, float32 or wider, and indices (M, k). Of equal scores any may come first.

    Raises:
        ValueError: a shape, k or chunk_size does not fit.
        TypeError: the dtypes differ or are not floating point.
    """
    _check("top_k_matches", "queries", queries, "keys", keys)
    if not 1 <= k <= keys.shape[0]:
        raise ValueError(f"top_k_matches: k must be in 1..{keys.shape[0]}, the number of keys, got {k}")
    if chunk_size < 1:
        raise ValueError(f"top_k_matches: chunk_size must be positive, got {chunk_size}")
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    scores = torch.empty(queries.shape[0], k, dtype=dtype, device=queries.device)
    indices = torch.empty(queries.shape[0], k, dtype=torch.int64, device=queries.device)
    for start in range(0, queries.shape[0], chunk_size):
        rows = queries[start : start + chunk_size]
        rows = torch.nn.functional.normalize(rows, dim=-1) if normalize else rows
        best: tuple[Tensor, Tensor] | None = None
        for offset in range(0, keys.shape[0], chunk_size):
            block = keys[offset : offset + chunk_size]
            block = torch.nn.functional.normalize(block, dim=-1) if normalize else block
            found = (rows @ block.T).to(dtype).topk(min(k, block.shape[0]), dim=-1)
            candidates = (found.values, found.indices + offset)
            if best is not None:
                joined = torch.cat((best[0], candidates[0]), dim=-1)
                found = joined.topk(min(k, joined.shape[-1]), dim=-1)
                candidates = (found.values, torch.cat((best[1], candidates[1]), dim=-1).gather(-1, found.indices))
            best = candidates
        if best is not None:
            scores[start : start + chunk_size], indices[start : start + chunk_size] = best
    return scores, indices


@torch.no_grad()
def retrieval_recall(
    image_features: Tensor,
    text_features: Tensor,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    k: Sequence[int] = (1, 5, 10),
    *,
    chunk_size: int = 4096,
) -> dict[str, float]:
    """Return how often an image finds one of its texts among the first k, and a text its image.

    Args:
        image_features: (M, D), of length 1 for cosines.
        text_features: (N, D).
        image_ids: (M,) integers; an image and a text with the same id belong together. By default 0, 1, ...
        text_ids: (N,) likewise; several captions of an image have its id.
        k: ranks; one beyond the number of candidates counts them all.
        chunk_size: as in `top_k_matches`.

    Returns:
        `{"image_to_text_recall@1": ..., "text_to_image_recall@1": ...}` for each k, in 0..1.

    Raises:
        ValueError: a shape does not fit, M != N without ids, k is empty or not positive, or there are no features.
        TypeError: the dtypes differ or are not floating point.

    Source: the recall of retrieval on Flickr30k and COCO (Radford et al., arXiv:2103.00020, table 13).
    """
    name = "retrieval_recall"
    _check(name, "image_features", image_features, "text_features", text_features)
    if not len(k) or min(k) < 1:
        raise ValueError(f"{name}: k must be positive numbers, got {tuple(k)}")
    images, texts = image_features.shape[0], text_features.shape[0]
    if not images or not texts:
        raise ValueError(f"{name}: there must be features, got {images} of images and {texts} of texts")
    if (image_ids is None or text_ids is None) and images != texts:
        raise ValueError(f"{name}: {images} images and {texts} texts need image_ids and text_ids")
    found: dict[str, float] = {}
    image_ids = _ids(name, "image_ids", image_ids, image_features)
    text_ids = _ids(name, "text_ids", text_ids, text_features)
    for direction, queries, own, keys, other in (
        ("image_to_text", image_features, image_ids, text_features, text_ids),
        ("text_to_image", text_features, text_ids, image_features, image_ids),
    ):
        most = min(max(k), keys.shape[0])
        _, indices = top_k_matches(queries, keys, most, chunk_size=chunk_size)
        hits = (other[indices] == own[:, None]).cumsum(dim=-1) > 0  # found at this rank or before
        for rank in k:
            found[f"{direction}_recall@{rank}"] = hits[:, min(rank, most) - 1].double().mean().item()
    return found


def _check(op: str, name: str, queries: Tensor, other: str, keys: Tensor) -> None:
    for what, x in ((name, queries), (other, keys)):
        if x.dim() != 2:
            raise ValueError(f"{op}: {what} must have shape (N, D), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"{op}: {what} must be floating point, got {x.dtype}")
    if keys.shape[1] != queries.shape[1]:
        raise ValueError(f"{op}: {other} must have width {queries.shape[1]} like {name}, got {keys.shape[1]}")
    if keys.dtype != queries.dtype:
        raise TypeError(f"{op}: {other} must be {queries.dtype} like {name}, got {keys.dtype}")
    if keys.device != queries.device:
        raise ValueError(f"{op}: {other} must be on {queries.device} like {name}, got {keys.device}")


def _ids(op: str, name: str, ids: Tensor | None, features: Tensor) -> Tensor:
    if ids is None:
        return torch.arange(features.shape[0], device=features.device)
    if ids.shape != features.shape[:1] or ids.is_floating_point():
        raise ValueError(
            f"{op}: {name} must be integers of shape {tuple(features.shape[:1])}, got {ids.dtype} {tuple(ids.shape)}"
        )
    return ids.to(features.device)
