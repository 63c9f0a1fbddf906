"""
The first stage of a search: one vector an image, whose product with the vector of a query estimates the score.

The score adds the mean over the image's tokens of the best similarity with a token of the query, and the same the
other way round. Where tokens are replaced by the nearest of a few centroids, the first mean is a product: of the
centroids' shares in the image with the best similarity of each centroid with the query. So is the second, of the best
similarities of the image with the shares in the query. What replacing leaves out of the first is made up for on
average, by the image's mean difference from its centroids *(ours)*. Of the best ten of a text this finds more than the
multi-vector comparison of databases, which adds one direction alone, from a sixteenth of the numbers
(docs/benchmarks.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .files import written_whole


CENTROIDS = 128
# Tokens a centroid that they are fitted to; more change nothing.
_TOKENS_EACH = 64
_ROUNDS = 8


@dataclass
class FirstStage:
    """
    What makes vectors of `2 * CENTROIDS + dim` numbers.

    Attributes:
        centroids (`numpy.ndarray` of shape `(centroids, dim)`): K-means of image tokens.
        shares (`numpy.ndarray` of shape `(centroids,)`): The share of the tokens that each stands for.
        size (`int`): Number of images in the index that it was fitted to.
    """

    centroids: np.ndarray
    shares: np.ndarray
    size: int

    @classmethod
    def fit(cls, tokens: np.ndarray, size: int) -> FirstStage:
        """Fits it to image tokens `(tokens, dim)` in float32; the same for the same tokens."""
        rng = np.random.default_rng(0)
        tokens = tokens[rng.permutation(len(tokens))[: _TOKENS_EACH * CENTROIDS]]
        # Of fewer tokens than centroids some stand for nothing, and have a share of zero.
        centroids = np.resize(tokens, (CENTROIDS, tokens.shape[1]))
        for _ in range(_ROUNDS):
            nearest = _nearest(tokens, centroids)
            counts = np.bincount(nearest, minlength=len(centroids))
            sums = np.zeros_like(centroids)
            np.add.at(sums, nearest, tokens)
            centroids = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], centroids)
        return cls(centroids, _shares(_nearest(tokens, centroids)), size)

    @staticmethod
    def length(dim: int) -> int:
        """Numbers of a vector."""
        return 2 * CENTROIDS + dim

    def of_image(self, tokens: np.ndarray) -> np.ndarray:
        """The vector `(length,)` of an image's tokens `(tokens, dim)`; zeros without any."""
        if not len(tokens):
            return np.zeros(self.length(tokens.shape[1]), np.float32)
        nearest = _nearest(tokens, self.centroids)
        rest = (tokens - self.centroids[nearest]).mean(axis=0)
        best = (self.centroids @ tokens.T).max(axis=1)
        return np.concatenate([_shares(nearest), rest, best]).astype(np.float32)

    def of_query(self, tokens: np.ndarray) -> np.ndarray:
        """The vector `(length,)` of a query's tokens `(tokens, dim)`, of an image as of a text; zeros without any."""
        if not len(tokens):
            return np.zeros(self.length(tokens.shape[1]), np.float32)
        similarity = self.centroids @ tokens.T
        # An image's mean difference counts with the tokens that its centroids will meet on average.
        met = self.shares @ tokens[similarity.argmax(axis=1)]
        shares = _shares(_nearest(tokens, self.centroids))
        return np.concatenate([similarity.max(axis=1), met, shares]).astype(np.float32)

    def save(self, path: Path) -> None:
        """Writes it, complete or not at all."""
        with written_whole(path) as part, part.open("wb") as file:
            np.savez(file, centroids=self.centroids, shares=self.shares, size=self.size)

    @classmethod
    def load(cls, path: Path) -> FirstStage:
        """Reads what [`save`] wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(arrays["centroids"], arrays["shares"], int(arrays["size"]))


def _shares(nearest: np.ndarray) -> np.ndarray:
    return (np.bincount(nearest, minlength=CENTROIDS) / len(nearest)).astype(np.float32)


def _nearest(tokens: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    return (tokens @ centroids.T - 0.5 * np.square(centroids).sum(axis=1)).argmax(axis=1)


__all__ = ["CENTROIDS", "FirstStage"]
