"""Embeddings as bytes, and the exact score; in numpy alone, so that a search needs no PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


PRECISIONS = ("float16", "int8")


def pack(tokens: np.ndarray, precision: str) -> bytes:
    """
    The bytes of embeddings `(tokens, dim)`: in float16, or in int8 with a scale in float32 for each token, which come
    after all integers.
    """
    if precision == "float16":
        return tokens.astype("<f2").tobytes()
    scale = np.abs(tokens).max(axis=1, initial=0.0) / 127
    levels = np.rint(tokens / np.where(scale > 0, scale, 1.0)[:, None])
    return levels.astype(np.int8).tobytes() + scale.astype("<f4").tobytes()


def unpack(data: bytes, dim: int, precision: str) -> np.ndarray:
    """Embeddings `(tokens, dim)` in float32 of what [`pack`] made."""
    if precision == "float16":
        return np.frombuffer(data, "<f2").reshape(-1, dim).astype(np.float32)
    tokens = len(data) // (dim + 4)
    levels = np.frombuffer(data, np.int8, tokens * dim).reshape(tokens, dim)
    return levels * np.frombuffer(data, "<f4", tokens, tokens * dim)[:, None]


def exact_scores(query: np.ndarray, items: Sequence[np.ndarray]) -> np.ndarray:
    """
    The scores `(items,)` of a query with items, each `(tokens, dim)`, which are those of `pair_scores` and the same
    either way: the mean over the tokens of each side of the best similarity among the other's. 0 if a side has no
    token.
    """
    scores = np.zeros(len(items), np.float32)
    counts = np.array([len(item) for item in items], dtype=np.int64)
    some = np.flatnonzero(counts).tolist()
    if not len(query) or not some:
        return scores
    starts = np.cumsum(counts[some]) - counts[some]
    similarity = np.concatenate([items[place] for place in some]) @ query.T
    of_query = np.maximum.reduceat(similarity, starts).mean(axis=1)
    of_items = np.add.reduceat(similarity.max(axis=1), starts) / counts[some]
    scores[some] = of_query + of_items
    return scores


__all__ = ["PRECISIONS", "exact_scores", "pack", "unpack"]
