"""
Recall of image-text retrieval from scores and identities: pure functions of tensors of any device or numpy arrays.

Text `j` is a right answer to image `i`, and the other way round, if and only if `text_ids[j] == image_ids[i]`.
Identities that leave a query without a right answer are a ValueError everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


Scores = Tensor | np.ndarray
# Identity of each image `(images,)` or text `(texts,)`.
Ids = Tensor | np.ndarray | Sequence[int]

RECALL_LEVELS = (1, 5, 10)
# Scores of a model that are closer than this tie. Equal inputs get scores that differ in the last bits, since kernels
# round by the place in a batch or tile: by less than 1e-6 in float32, where scores lie between -2 and 2.
TIE_TOLERANCE = 2e-6
# Rows of a score matrix that are looked at together.
_CHUNK = 64


class RetrievalRanks:
    """
    Exact ranks of both directions from tiles of the score matrix, in any order and without ever holding the matrix.

    A query's rank is the number of wrong items that score at least as high as its best right one less `tie_tolerance`:
    a tie never counts in favour of the right answer, and no sorting is involved.

    What a wrong item is compared with has to be known before it is counted. Therefore every tile that holds right
    pairs, which are few where images and texts are ordered by identity, is shown to [`observe`] first, and then every
    tile, those included, to [`count`].

    Several processes may share the work: between the two phases each takes the elementwise maximum of all `best`, and
    after the second one the sum of all `counts`.

    Args:
        image_ids (`torch.Tensor`, `numpy.ndarray` or sequence of `int`): Identity of each image.
        text_ids (`torch.Tensor`, `numpy.ndarray` or sequence of `int`): Identity of each text.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Type of the tiles.
        device (`torch.device`, *optional*): Device of the tiles; that of `image_ids` by default.
        tie_tolerance (`float`, *optional*, defaults to 0.0):
            Scores that differ by no more than this tie. Those of a model need [`TIE_TOLERANCE`].

    Attributes:
        best (`torch.Tensor` of shape `(images + texts,)`): Best right score so far of each image, then of each text.
        counts (`torch.Tensor` of shape `(images + texts + 3,)`, int64):
            Wrong items so far that score at least as high as `best`, of each image, then of each text; then counted
            pairs, scores that are NaN or infinite, and right pairs that were not observed.
    """

    def __init__(
        self,
        image_ids: Ids,
        text_ids: Ids,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        tie_tolerance: float = 0.0,
    ) -> None:
        self.image_ids, self.text_ids = (ids.to(device) for ids in _as_ids(image_ids, text_ids))
        self.tie_tolerance = tie_tolerance
        sizes = [len(self.image_ids), len(self.text_ids)]
        self.best = torch.full((sum(sizes),), -math.inf, dtype=dtype, device=self.image_ids.device)
        self.counts = self.image_ids.new_zeros(sum(sizes) + 3)
        # Views: what is written to the vectors, also by a reduction over processes, is seen here.
        self._image_best, self._text_best = self.best.split(sizes)
        self._image_ranks, self._text_ranks, self._totals = self.counts.split([*sizes, 3])

    def observe(self, rows: Tensor | slice, columns: Tensor | slice, tile: Tensor) -> None:
        """
        Takes the scores of right pairs from a tile; wrong pairs in it are left alone.

        Args:
            rows (`torch.Tensor` or `slice`): Which images the tile holds, each once.
            columns (`torch.Tensor` or `slice`): Which texts the tile holds, each once.
            tile (`torch.Tensor`): Scores of shape `(rows, columns)`.
        """
        right_scores = tile.masked_fill(~self._right(rows, columns, tile), -math.inf)
        self._image_best[rows] = torch.maximum(self._image_best[rows], right_scores.amax(dim=1))
        self._text_best[columns] = torch.maximum(self._text_best[columns], right_scores.amax(dim=0))

    def count(self, rows: Tensor | slice, columns: Tensor | slice, tile: Tensor) -> None:
        """
        Counts the wrong pairs of a tile, once all right pairs were observed. Arguments as in [`observe`]; every
        pair must come once, and a score that was observed must come again bit for bit.
        """
        right = self._right(rows, columns, tile)
        reaches_image = tile >= self._image_best[rows, None] - self.tie_tolerance
        reaches_text = tile >= self._text_best[columns] - self.tie_tolerance
        self._image_ranks[rows] += (reaches_image & ~right).sum(dim=1)
        self._text_ranks[columns] += (reaches_text & ~right).sum(dim=0)
        # Judged in `compute`: reading a number here would make an accelerator wait at every tile.
        self._totals[0] += tile.numel()
        self._totals[1] += (~tile.isfinite()).sum()
        above_best = (tile > self._image_best[rows, None]) | (tile > self._text_best[columns])
        self._totals[2] += (above_best & right).sum()

    def compute(self) -> tuple[Tensor, Tensor]:
        """
        Returns:
            `tuple(torch.Tensor, torch.Tensor)`: 0-based ranks of the best right answer, int64: image to text of shape
            `(images,)` and text to image of shape `(texts,)`.

        Raises:
            `ValueError`: If scores are NaN or infinite, or pairs were not observed, left out or counted twice.
        """
        counted, not_finite, unobserved = self._totals.tolist()
        pairs = len(self.image_ids) * len(self.text_ids)
        if not_finite:
            raise ValueError(f"The scores hold {not_finite} values that are NaN or infinite.")
        if counted != pairs:
            raise ValueError(f"count() was given {counted} pairs, but there are {pairs}: every pair must come once.")
        if unobserved:
            raise ValueError(f"{unobserved} right pairs score higher in count() than anything given to observe().")
        return self._image_ranks.clone(), self._text_ranks.clone()

    def _right(self, rows: Tensor | slice, columns: Tensor | slice, tile: Tensor) -> Tensor:
        right = self.image_ids[rows, None] == self.text_ids[columns]
        if tile.shape != right.shape:
            raise ValueError(
                f"The tile must be {tuple(right.shape)} as its rows and columns, got {tuple(tile.shape)}."
            )
        if tile.dtype != self.best.dtype:
            raise ValueError(f"The tile is {tile.dtype}, but `dtype` announced {self.best.dtype}.")
        return right


def retrieval_ranks(
    scores: Scores, image_ids: Ids, text_ids: Ids, *, tie_tolerance: float = 0.0
) -> tuple[Tensor, Tensor]:
    """
    Ranks of the best right answers, as [`RetrievalRanks`] defines them, from a full score matrix.

    Args:
        scores (`torch.Tensor` or `numpy.ndarray`): Scores of shape `(images, texts)`, higher is better.
        image_ids (`torch.Tensor`, `numpy.ndarray` or sequence of `int`): Identity of each image.
        text_ids (`torch.Tensor`, `numpy.ndarray` or sequence of `int`): Identity of each text.
        tie_tolerance (`float`, *optional*, defaults to 0.0): Scores that differ by no more than this tie.

    Returns:
        `tuple(torch.Tensor, torch.Tensor)`: 0-based ranks, int64: image to text of shape `(images,)`, the best of an
        image's texts, and text to image of shape `(texts,)`, the best of a text's images.

    Raises:
        `ValueError`: If a query has no right answer, a score is NaN or infinite, or shapes do not fit.
    """
    images, texts = _as_ids(image_ids, text_ids)
    scores = torch.as_tensor(scores).detach()
    if scores.shape != (len(images), len(texts)):
        raise ValueError(f"scores must be (images, texts) = ({len(images)}, {len(texts)}), got {tuple(scores.shape)}.")
    dtype = torch.promote_types(scores.dtype, torch.float32) if scores.is_floating_point() else torch.float64
    ranks = RetrievalRanks(images, texts, dtype=dtype, device=scores.device, tie_tolerance=tie_tolerance)
    for phase in (ranks.observe, ranks.count):
        for start in range(0, len(images), _CHUNK):
            rows = slice(start, start + _CHUNK)
            phase(rows, slice(None), scores[rows].to(ranks.best.dtype))
    return ranks.compute()


def recall_at_k(ranks: Scores, k: int) -> float:
    """Share of queries whose best right answer is among the first `k`, in percent, from their 0-based ranks."""
    ranks = torch.as_tensor(ranks)
    if ranks.ndim != 1 or len(ranks) == 0:
        raise ValueError(f"ranks must be (queries,) with at least one query, got the shape {tuple(ranks.shape)}.")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    return 100.0 * int((ranks < k).sum()) / len(ranks)


def retrieval_metrics(image_to_text_ranks: Scores, text_to_image_ranks: Scores) -> dict[str, float]:
    """
    The usual numbers of image-text retrieval.

    Args:
        image_to_text_ranks (`torch.Tensor` or `numpy.ndarray` of shape `(images,)`): 0-based ranks.
        text_to_image_ranks (`torch.Tensor` or `numpy.ndarray` of shape `(texts,)`): 0-based ranks.

    Returns:
        `dict[str, float]`: `image_to_text_recall_at_1`, `_5`, `_10`, the same of `text_to_image`, and their sum
        `rsum`, in percent; `image_to_text_median_rank` and `text_to_image_median_rank`, 1-based.
    """
    directions = {"image_to_text": image_to_text_ranks, "text_to_image": text_to_image_ranks}
    metrics = {
        f"{direction}_recall_at_{k}": recall_at_k(ranks, k)
        for direction, ranks in directions.items()
        for k in RECALL_LEVELS
    }
    metrics["rsum"] = sum(metrics.values())
    for direction, ranks in directions.items():
        metrics[f"{direction}_median_rank"] = 1.0 + float(np.median(torch.as_tensor(ranks).cpu().numpy()))
    return metrics


def folded_retrieval_metrics(
    scores: Scores,
    image_ids: Ids,
    text_ids: Ids,
    num_folds: int = 5,
    *,
    tie_tolerance: float = 0.0,
) -> dict[str, float]:
    """
    Metrics averaged over consecutive blocks of images, each retrieved against exactly the texts of its own images:
    the MS-COCO 1K protocol for 5,000 images and five folds. Every image is in one fold.

    Args:
        scores (`torch.Tensor` or `numpy.ndarray`): Scores of shape `(images, texts)`, higher is better.
        image_ids (`torch.Tensor`, `numpy.ndarray` or sequence of `int`): Identity of each image.
        text_ids (`torch.Tensor`, `numpy.ndarray` or sequence of `int`): Identity of each text.
        num_folds (`int`, *optional*, defaults to 5): Number of folds; must divide the number of images.
        tie_tolerance (`float`, *optional*, defaults to 0.0): Scores that differ by no more than this tie.

    Returns:
        `dict[str, float]`: The keys of [`retrieval_metrics`], each the mean over the folds.

    Raises:
        `ValueError`: If the folds would differ in size, and as in [`retrieval_ranks`].
    """
    images, texts = _as_ids(image_ids, text_ids)
    scores = torch.as_tensor(scores).detach()
    blocks = fold_members(images, texts, num_folds)
    if scores.shape != (len(images), len(texts)):
        raise ValueError(f"scores must be (images, texts) = ({len(images)}, {len(texts)}), got {tuple(scores.shape)}.")
    folds = []
    for rows, columns in blocks:
        # Without the copy of the matrix that a choice of columns makes, where there is nothing to choose.
        of_fold = scores if num_folds == 1 else scores[rows].index_select(1, columns.to(scores.device))
        ranks = retrieval_ranks(of_fold, images[rows], texts[columns], tie_tolerance=tie_tolerance)
        folds.append(retrieval_metrics(*ranks))
    return mean_metrics(folds)


def fold_members(image_ids: Ids, text_ids: Ids, num_folds: int) -> list[tuple[slice, Tensor]]:
    """
    By fold of [`folded_retrieval_metrics`], its consecutive images and the indices of their texts; ValueError if the
    folds would differ in size.
    """
    images, texts = _as_ids(image_ids, text_ids)
    if num_folds < 1 or len(images) % num_folds:
        raise ValueError(f"{len(images)} images cannot be split into {num_folds} folds of equal size.")
    size = len(images) // num_folds
    blocks = [slice(start, start + size) for start in range(0, len(images), size)]
    return [(rows, torch.isin(texts, images[rows]).nonzero().squeeze(1)) for rows in blocks]


def mean_metrics(folds: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of each metric over the folds."""
    return {name: math.fsum(fold[name] for fold in folds) / len(folds) for name in folds[0]}


def chance_rsum(
    image_ids: Ids,
    text_ids: Ids,
    num_folds: int = 1,
) -> float:
    """
    Expected rSum of a random ranking without ties: a query with `r` right answers among `n` items finds one of them
    among the first `k` with the probability `1 - C(n - r, k) / C(n, k)` (hypergeometric).

    Args:
        image_ids (`torch.Tensor`, `numpy.ndarray` or sequence of `int`): Identity of each image.
        text_ids (`torch.Tensor`, `numpy.ndarray` or sequence of `int`): Identity of each text.
        num_folds (`int`, *optional*, defaults to 1): Folds to average over, see [`folded_retrieval_metrics`].

    Returns:
        `float`: The sum of the six expected recalls, in percent.
    """
    images, texts = _as_ids(image_ids, text_ids)
    if num_folds != 1:
        folds = [chance_rsum(images[rows], texts[columns]) for rows, columns in fold_members(images, texts, num_folds)]
        return math.fsum(folds) / num_folds
    total = 0.0
    for queries, gallery in ((images, texts), (texts, images)):
        # How many queries have r right answers, for each r that occurs.
        answers, occurrences = num_right_answers(queries, gallery).unique(return_counts=True)
        for right, number in zip(answers.tolist(), occurrences.tolist(), strict=True):
            for k in RECALL_LEVELS:
                shown = min(k, len(gallery))
                miss = math.comb(len(gallery) - right, shown) / math.comb(len(gallery), shown)
                total += 100.0 * (1.0 - miss) * number / len(queries)
    return total


def num_right_answers(queries: Tensor, gallery: Tensor) -> Tensor:
    """How often the identity of each query occurs among those of the gallery, where all of them do."""
    ids, counts = gallery.unique(return_counts=True)
    return counts[torch.searchsorted(ids, queries)]


def _as_ids(image_ids: Ids, text_ids: Ids) -> tuple[Tensor, Tensor]:
    """Identities as int64 on one device, each of which occurs on both sides."""
    images, texts = torch.as_tensor(image_ids), torch.as_tensor(text_ids)
    for name, ids in (("image_ids", images), ("text_ids", texts)):
        if ids.ndim != 1 or len(ids) == 0 or ids.is_floating_point():
            raise ValueError(f"{name} must be one integer for each, at least one, got {ids.dtype} {tuple(ids.shape)}.")
    images = images.long()
    texts = texts.to(images)
    lonely_images = int((~torch.isin(images, texts)).sum())
    lonely_texts = int((~torch.isin(texts, images)).sum())
    if lonely_images or lonely_texts:
        raise ValueError(
            f"{lonely_images} of {len(images)} images have no right text and {lonely_texts} of {len(texts)} texts "
            "have no right image in the gallery; recall is not defined for them."
        )
    return images, texts
