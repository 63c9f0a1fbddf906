"""Recall of image-text retrieval from scores and identities. Pure functions; tensors of any device or numpy arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


RECALL_LEVELS = (1, 5, 10)


class RetrievalRanks:
    """
    Exact ranks of both directions from tiles of whole score rows, without the full score matrix.

    Text `j` is a right answer to image `i`, and the other way round, if and only if `text_ids[j] == image_ids[i]`. A
    query's rank is the number of wrong items that score at least as high as its best right one, so a tie never speaks
    for the right answer and no sorting is involved.

    A tile holds all right answers of its images, but the right images of a text may come with a later tile. Therefore
    the scores of the right pairs, which are few, are wanted up front.

    Args:
        image_ids (`torch.Tensor`, `numpy.ndarray` or sequence of `int`): Identity of each image, shape `(images,)`.
        text_ids (`torch.Tensor`, `numpy.ndarray` or sequence of `int`): Identity of each text, shape `(texts,)`.
        positive_scores (`torch.Tensor` or `numpy.ndarray`):
            Best score of each text with one of its right images, shape `(texts,)`. Counting happens on its device.
        tie_tolerance (`float`, *optional*, defaults to 0.0):
            Largest rounding difference between `positive_scores` and the same pairs' scores in the tiles. 0 asks for
            equal bits. A wrong image within the tolerance counts as a tie, against the text.

    Raises:
        `ValueError`: If a query has no right answer, or shapes and dtypes do not fit.
    """

    def __init__(
        self,
        image_ids: Tensor | np.ndarray | Sequence[int],
        text_ids: Tensor | np.ndarray | Sequence[int],
        positive_scores: Tensor | np.ndarray,
        *,
        tie_tolerance: float = 0.0,
    ) -> None:
        self.positive_scores = _as_scores(positive_scores, "positive_scores")
        self.image_ids, self.text_ids = (ids.to(self.positive_scores.device) for ids in _as_ids(image_ids, text_ids))
        if self.positive_scores.shape != self.text_ids.shape:
            raise ValueError(
                f"positive_scores must hold one score per text, shape {tuple(self.text_ids.shape)}, got "
                f"{tuple(self.positive_scores.shape)}."
            )
        if not 0 <= tie_tolerance < math.inf:
            raise ValueError(f"tie_tolerance must be finite and at least 0, got {tie_tolerance}.")
        self.tie_tolerance = tie_tolerance
        # -1 marks images whose row has not come yet.
        self._image_ranks = torch.full_like(self.image_ids, -1)
        self._text_ranks = torch.zeros_like(self.text_ids)
        self._seen_positive_scores = torch.full_like(self.positive_scores, -math.inf)

    def update(self, row_start: int, score_tile: Tensor | np.ndarray) -> None:
        """
        Counts one tile. Every image's row must come once, in any order.

        Args:
            row_start (`int`): Index of the tile's first image.
            score_tile (`torch.Tensor` or `numpy.ndarray`): Scores of shape `(rows, texts)`, against all texts.

        Raises:
            `ValueError`: If the tile does not fit, repeats a row, or holds NaN or infinity.
        """
        tile = _as_scores(score_tile, "score_tile").to(self.positive_scores.device)
        if tile.ndim != 2 or tile.shape[1] != len(self.text_ids):
            raise ValueError(f"score_tile must be (rows, {len(self.text_ids)}), got {tuple(tile.shape)}.")
        row_end = row_start + len(tile)
        if not 0 <= row_start < row_end <= len(self.image_ids):
            raise ValueError(f"Rows {row_start} to {row_end} do not lie within {len(self.image_ids)} images.")
        if (self._image_ranks[row_start:row_end] >= 0).any():
            raise ValueError(f"Rows {row_start} to {row_end} were partly counted before.")
        right = self.image_ids[row_start:row_end, None] == self.text_ids
        right_scores = tile.masked_fill(~right, -math.inf)
        wrong_scores = tile.masked_fill(right, -math.inf)
        best_right = right_scores.amax(dim=1, keepdim=True)
        self._image_ranks[row_start:row_end] = (wrong_scores >= best_right).sum(dim=1)
        self._text_ranks += (wrong_scores >= self.positive_scores - self.tie_tolerance).sum(dim=0)
        self._seen_positive_scores = torch.maximum(self._seen_positive_scores, right_scores.amax(dim=0))

    def compute(self) -> tuple[Tensor, Tensor]:
        """
        Returns:
            `tuple(torch.Tensor, torch.Tensor)`: 0-based ranks of the best right answer, int64: image to text of shape
            `(images,)` and text to image of shape `(texts,)`.

        Raises:
            `ValueError`: If rows are missing, or the tiles contradict `positive_scores`.
        """
        missing = int((self._image_ranks < 0).sum())
        if missing:
            raise ValueError(f"{missing} of {len(self.image_ids)} images were not fed to update().")
        difference = float((self._seen_positive_scores - self.positive_scores).abs().max())
        if difference > self.tie_tolerance:
            raise ValueError(
                f"positive_scores and the tiles differ by up to {difference:.3g} in the same pairs, more than "
                f"tie_tolerance={self.tie_tolerance:.3g}. If that is rounding, raise tie_tolerance."
            )
        return self._image_ranks.clone(), self._text_ranks.clone()


def retrieval_ranks(
    scores: Tensor | np.ndarray,
    image_ids: Tensor | np.ndarray | Sequence[int],
    text_ids: Tensor | np.ndarray | Sequence[int],
    *,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """
    Ranks of the best right answers, as [`RetrievalRanks`] defines them, from a full score matrix.

    Args:
        scores (`torch.Tensor` or `numpy.ndarray`): Scores of shape `(images, texts)`, higher is better.
        image_ids (`torch.Tensor`, `numpy.ndarray` or sequence of `int`): Identity of each image, shape `(images,)`.
        text_ids (`torch.Tensor`, `numpy.ndarray` or sequence of `int`): Identity of each text, shape `(texts,)`.
        chunk_size (`int`, *optional*, defaults to 64): Rows looked at together; memory is `O(chunk_size * texts)`.

    Returns:
        `tuple(torch.Tensor, torch.Tensor)`: 0-based ranks, int64: image to text of shape `(images,)`, the best of an
        image's texts, and text to image of shape `(texts,)`, the best of a text's images.

    Raises:
        `ValueError`: If a query has no right answer, a score is NaN or infinite, or shapes do not fit.
    """
    images, texts = _as_ids(image_ids, text_ids)
    scores = _as_tensor(scores, "scores")
    if scores.shape != (len(images), len(texts)):
        raise ValueError(f"scores must be (images, texts) = ({len(images)}, {len(texts)}), got {tuple(scores.shape)}.")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    images, texts = images.to(scores.device), texts.to(scores.device)
    starts = range(0, len(images), chunk_size)
    positive_scores = torch.full((len(texts),), -math.inf, dtype=_score_dtype(scores), device=scores.device)
    for start in starts:
        chunk = _as_scores(scores[start : start + chunk_size], "scores")
        wrong = images[start : start + chunk_size, None] != texts
        positive_scores = torch.maximum(positive_scores, chunk.masked_fill(wrong, -math.inf).amax(dim=0))
    ranks = RetrievalRanks(images, texts, positive_scores)
    for start in starts:
        ranks.update(start, scores[start : start + chunk_size])
    return ranks.compute()


def recall_at_k(ranks: Tensor | np.ndarray, k: int) -> float:
    """
    Share of queries whose best right answer is among the first `k`, in percent.

    Args:
        ranks (`torch.Tensor` or `numpy.ndarray`): 0-based ranks of shape `(queries,)`.
        k (`int`): Length of the result list, at least 1.

    Returns:
        `float`: Recall in percent.
    """
    ranks = _as_tensor(ranks, "ranks")
    if ranks.ndim != 1 or len(ranks) == 0:
        raise ValueError(f"ranks must be (queries,) with at least one query, got the shape {tuple(ranks.shape)}.")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    return 100.0 * int((ranks < k).sum()) / len(ranks)


def retrieval_metrics(
    image_to_text_ranks: Tensor | np.ndarray, text_to_image_ranks: Tensor | np.ndarray
) -> dict[str, float]:
    """
    The usual numbers of image-text retrieval.

    Args:
        image_to_text_ranks (`torch.Tensor` or `numpy.ndarray`): 0-based ranks of shape `(images,)`.
        text_to_image_ranks (`torch.Tensor` or `numpy.ndarray`): 0-based ranks of shape `(texts,)`.

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
        metrics[f"{direction}_median_rank"] = 1.0 + float(np.median(_as_tensor(ranks, "ranks").cpu().numpy()))
    return metrics


def folded_retrieval_metrics(
    scores: Tensor | np.ndarray,
    image_ids: Tensor | np.ndarray | Sequence[int],
    text_ids: Tensor | np.ndarray | Sequence[int],
    num_folds: int = 5,
) -> dict[str, float]:
    """
    Metrics averaged over consecutive blocks of images, each retrieved against exactly the texts of its own images:
    the MS-COCO 1K protocol for 5,000 images and five folds. Every image is in one fold.

    Args:
        scores (`torch.Tensor` or `numpy.ndarray`): Scores of shape `(images, texts)`, higher is better.
        image_ids (`torch.Tensor`, `numpy.ndarray` or sequence of `int`): Identity of each image, shape `(images,)`.
        text_ids (`torch.Tensor`, `numpy.ndarray` or sequence of `int`): Identity of each text, shape `(texts,)`.
        num_folds (`int`, *optional*, defaults to 5): Number of folds; must divide the number of images.

    Returns:
        `dict[str, float]`: The keys of [`retrieval_metrics`], each the mean over the folds.

    Raises:
        `ValueError`: If the folds would differ in size, and as in [`retrieval_ranks`].
    """
    images, texts = _as_ids(image_ids, text_ids)
    scores = _as_tensor(scores, "scores")
    if num_folds < 1 or len(images) % num_folds:
        raise ValueError(f"{len(images)} images cannot be split into {num_folds} folds of equal size.")
    if scores.shape != (len(images), len(texts)):
        raise ValueError(f"scores must be (images, texts) = ({len(images)}, {len(texts)}), got {tuple(scores.shape)}.")
    if num_folds == 1:
        return retrieval_metrics(*retrieval_ranks(scores, images, texts))
    size = len(images) // num_folds
    folds = []
    for start in range(0, len(images), size):
        fold_images = images[start : start + size]
        columns = torch.isin(texts, fold_images).nonzero().squeeze(1)
        fold_scores = scores[start : start + size].index_select(1, columns.to(scores.device))
        folds.append(retrieval_metrics(*retrieval_ranks(fold_scores, fold_images, texts[columns])))
    return {name: math.fsum(fold[name] for fold in folds) / num_folds for name in folds[0]}


def chance_rsum(
    image_ids: Tensor | np.ndarray | Sequence[int],
    text_ids: Tensor | np.ndarray | Sequence[int],
    num_folds: int = 1,
) -> float:
    """
    Expected rSum of a random ranking without ties: a query with `r` right answers among `n` items finds one of them
    among the first `k` with the probability `1 - C(n - r, k) / C(n, k)` (hypergeometric).

    Args:
        image_ids (`torch.Tensor`, `numpy.ndarray` or sequence of `int`): Identity of each image, shape `(images,)`.
        text_ids (`torch.Tensor`, `numpy.ndarray` or sequence of `int`): Identity of each text, shape `(texts,)`.
        num_folds (`int`, *optional*, defaults to 1): Folds to average over, see [`folded_retrieval_metrics`].

    Returns:
        `float`: The sum of the six expected recalls, in percent.
    """
    images, texts = _as_ids(image_ids, text_ids)
    if num_folds > 1:
        blocks = images.split(len(images) // num_folds)
        return math.fsum(chance_rsum(block, texts[torch.isin(texts, block)]) for block in blocks) / len(blocks)
    total = 0.0
    for queries, gallery in ((images, texts), (texts, images)):
        ids, counts = gallery.unique(return_counts=True)
        # How many queries have r right answers, for each r that occurs.
        answers, occurrences = counts[torch.searchsorted(ids, queries)].unique(return_counts=True)
        for right, number in zip(answers.tolist(), occurrences.tolist(), strict=True):
            for k in RECALL_LEVELS:
                shown = min(k, len(gallery))
                miss = math.comb(len(gallery) - right, shown) / math.comb(len(gallery), shown)
                total += 100.0 * (1.0 - miss) * number / len(queries)
    return total


def _as_tensor(values: Tensor | np.ndarray | Sequence[int], name: str) -> Tensor:
    try:
        return torch.as_tensor(values).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be a tensor, an array or a sequence of numbers: {error}") from None


def _score_dtype(scores: Tensor) -> torch.dtype:
    return torch.promote_types(scores.dtype, torch.float32) if scores.is_floating_point() else torch.float64


def _as_scores(values: Tensor | np.ndarray, name: str) -> Tensor:
    scores = _as_tensor(values, name)
    scores = scores.to(_score_dtype(scores))
    if not torch.isfinite(scores).all():
        raise ValueError(f"{name} holds {int((~torch.isfinite(scores)).sum())} values that are NaN or infinite.")
    return scores


def _as_ids(
    image_ids: Tensor | np.ndarray | Sequence[int], text_ids: Tensor | np.ndarray | Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Identities as int64 on one device, each of which occurs on both sides."""
    images, texts = _as_tensor(image_ids, "image_ids"), _as_tensor(text_ids, "text_ids")
    for name, ids in (("image_ids", images), ("text_ids", texts)):
        if ids.ndim != 1 or len(ids) == 0:
            raise ValueError(f"{name} must be one-dimensional and not empty, got the shape {tuple(ids.shape)}.")
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(f"{name} must be integers, got {ids.dtype}.")
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
