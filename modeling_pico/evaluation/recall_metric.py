"""Image-text recall as a metric of the `evaluate` library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import evaluate
import numpy as np
from datasets import Features, List, Value

from modeling_pico.evaluation.retrieval_metrics import folded_retrieval_metrics


_DESCRIPTION = """
Recall at 1, 5 and 10 of image-text retrieval in both directions, their sum (rSum) and the median ranks. A text is a
right answer to an image if and only if their ids are equal; the best right answer counts, and ties are never in its
favour.
"""

_INPUTS_DESCRIPTION = """
Args:
    predictions (`list[list[float]]`):
        One row of scores per image, against all texts of the gallery, higher is better; stored in float32. Rows may
        be added batch by batch.
    references (`list[int]`): Id of each row's image.
    text_ids (`list[int]`): Id of each text of the gallery, the meaning of the columns.
    num_folds (`int`, *optional*, defaults to 1):
        Number of consecutive blocks of images to average over; 5 for the MS-COCO 1K protocol on 5,000 images.

Returns:
    `dict[str, float]`: `image_to_text_recall_at_1`, `_5`, `_10`, the same of `text_to_image`, and `rsum`, in percent;
    `image_to_text_median_rank` and `text_to_image_median_rank`, 1-based.

Example:

    >>> metric = ImageTextRecall()
    >>> metric.add_batch(predictions=[[0.9, 0.8, 0.1]], references=[0])
    >>> metric.add_batch(predictions=[[0.7, 0.2, 0.6]], references=[1])
    >>> results = metric.compute(text_ids=[0, 0, 1])
    >>> results["image_to_text_recall_at_1"]
    50.0
"""

_CITATION = """
@inproceedings{karpathy2015deep,
  title = {Deep Visual-Semantic Alignments for Generating Image Descriptions},
  author = {Karpathy, Andrej and Fei-Fei, Li},
  booktitle = {Proceedings of the IEEE Conference on Computer Vision and Pattern Recognition},
  year = {2015}
}
"""


class ImageTextRecall(evaluate.Metric):
    """
    [`~modeling_pico.evaluation.folded_retrieval_metrics`] as an `evaluate.Metric`: score rows are added with
    `add_batch(predictions=rows, references=image_ids)` and `compute(text_ids=..., num_folds=1)` gives the metrics.
    Rows lie in an Arrow file of `evaluate`'s cache until then; `compute` holds them all, as Python floats, so
    galleries of thousands are better served by [`~modeling_pico.evaluation.RetrievalRanks`]. Where this package is
    installed, `evaluate.load` also takes the path of this file, without a network.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=Features({"predictions": List(Value("float32")), "references": Value("int64")}),
        )

    def _compute(
        self,
        *,
        predictions: Sequence[Sequence[float]],
        references: Sequence[int],
        text_ids: Sequence[int] | None = None,
        num_folds: int = 1,
    ) -> dict[str, Any]:
        if text_ids is None:
            raise ValueError("compute() needs text_ids, the id of each column of the score rows.")
        lengths = {len(row) for row in predictions}
        if lengths != {len(text_ids)}:
            raise ValueError(
                f"Every score row must have one score for each of the {len(text_ids)} texts, got rows of "
                f"{', '.join(map(str, sorted(lengths)))} scores."
            )
        scores = np.asarray(predictions, dtype=np.float32)
        return folded_retrieval_metrics(scores, references, text_ids, num_folds=num_folds)
