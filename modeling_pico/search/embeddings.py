"""Embeddings as bytes, and the exact score; in numpy alone, so that a search needs no PyTorch."""

from __future__ import annotations

import numpy as np


PRECISIONS = ("float16", "int8")


def pack(tokens: np.ndarray, precision: str) -> bytes:
    """
    The bytes of embeddings `(tokens, dim)`, token by token: in float16, or in int8, each token followed by its scale
    in float32.
    """
    if precision == "float16":
        return tokens.astype("<f2").tobytes()
    scale = (np.abs(tokens).max(axis=1, initial=0.0) / 127).astype("<f4")
    levels = np.rint(tokens / np.where(scale > 0, scale, 1.0)[:, None]).astype(np.int8)
    return np.concatenate([levels.view(np.uint8), scale[:, None].view(np.uint8)], axis=1).tobytes()


def token_bytes(dim: int, precision: str) -> int:
    """Bytes of a token."""
    return 2 * dim if precision == "float16" else dim + 4


def unpack(data: bytes, dim: int, precision: str) -> np.ndarray:
    """Embeddings `(tokens, dim)` in float32 of what [`pack`] made, of one sample or of several in a row."""
    if precision == "float16":
        return _float32(np.frombuffer(data, "<i2")).reshape(-1, dim)
    values = np.frombuffer(data, np.uint8).reshape(-1, dim + 4)
    return values[:, :dim].view(np.int8) * np.ascontiguousarray(values[:, dim:]).view("<f4")


def _float32(halves: np.ndarray) -> np.ndarray:
    """
    Finite numbers in float16, given as integers of 16 bits, in float32. By their bits, ten times as fast as numpy's
    `astype`: sign and exponent get to their places, and a power of two makes up for the other bias.
    """
    bits = halves.astype(np.int32)
    bits <<= 13
    bits &= np.int32(-0x70000001)
    values = bits.view(np.float32)
    values *= np.float32(2.0**112)
    return values


def exact_scores(query: np.ndarray, tokens: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """
    The scores of a query with items, those of `pair_scores` and the same either way: the mean over the tokens of each
    side of the best similarity among the other's. 0 if a side has no token.

    Args:
        query (`numpy.ndarray` of shape `(tokens, dim)`): Score-ready embeddings of the query.
        tokens (`numpy.ndarray` of shape `(tokens of all, dim)`): Those of all items in a row.
        counts (`numpy.ndarray` of shape `(items,)`): Number of tokens of each.

    Returns:
        `numpy.ndarray` of shape `(items,)` in float32.
    """
    scores = np.zeros(len(counts), np.float32)
    some = counts > 0
    if not len(query) or not some.any():
        return scores
    starts = (np.cumsum(counts) - counts)[some]
    similarity = tokens @ query.T
    of_query = np.maximum.reduceat(similarity, starts).mean(axis=1)
    of_items = np.add.reduceat(similarity.max(axis=1), starts) / counts[some]
    scores[some] = of_query + of_items
    return scores


__all__ = ["PRECISIONS", "exact_scores", "pack", "token_bytes", "unpack"]
