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
        One row of scores per image, against all texts of the gallery, higher is better; stored in float32.
    references (`list[int]`): Id of each row's image.
    text_ids (`list[int]`): Id of each text of the gallery, the meaning of the columns.
    num_folds (`int`, *optional*, defaults to 1):
        Number of consecutive blocks of images to average over; 5 for the MS-COCO 1K protocol on 5,000 images.

Returns:
    `dict[str, float]`: what `modeling_pico.evaluation.retrieval_metrics` returns.

Example:

    >>> metric = ImageTextRecall()
    >>> metric.add_batch(predictions=[[0.9, 0.8, 0.1]], references=[0])
    >>> metric.add_batch(predictions=[[0.7, 0.2, 0.6]], references=[1])
    >>> metric.compute(text_ids=[0, 0, 1])["image_to_text_recall_at_1"]
    50.0
"""


class ImageTextRecall(evaluate.Metric):
    """
    [`~modeling_pico.evaluation.folded_retrieval_metrics`] as an `evaluate.Metric`: score rows are added with
    `add_batch(predictions=rows, references=image_ids)` and `compute(text_ids=..., num_folds=1)` gives the metrics.
    It holds all scores as Python floats, so galleries of thousands are better served by
    [`~modeling_pico.evaluation.RetrievalRanks`]. Where this package is installed, `evaluate.load` also takes the path
    of this file, without a network.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS_DESCRIPTION,
            features=Features({"predictions": List(Value("float32")), "references": Value("int64")}),
        )

    def _compute(
        self,
        *,
        predictions: Sequence[Sequence[float]],
        references: Sequence[int],
        text_ids: Sequence[int],
        num_folds: int = 1,
    ) -> dict[str, Any]:
        scores = np.asarray(predictions, dtype=np.float32)
        return folded_retrieval_metrics(scores, references, text_ids, num_folds=num_folds)
