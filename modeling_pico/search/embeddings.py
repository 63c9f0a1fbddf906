"""Embeddings as bytes, and the exact score; in numpy alone, so that a search needs no PyTorch."""

from __future__ import annotations

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


def pair_score(query: np.ndarray, item: np.ndarray) -> float:
    """
    The score of two samples `(tokens, dim)`, which is that of `pair_scores` and the same either way: the mean over the
    tokens of each side of the best similarity among the other's. 0 if a side has no token.
    """
    if not len(query) or not len(item):
        return 0.0
    similarity = query @ item.T
    return float(similarity.max(axis=1).mean() + similarity.max(axis=0).mean())


__all__ = ["PRECISIONS", "pack", "pair_score", "unpack"]
