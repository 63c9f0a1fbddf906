"""Evaluation of image-text retrieval."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .evaluator import EncodedRetrieval, RetrievalEvaluator
from .retrieval_metrics import (
    RetrievalRanks,
    chance_rsum,
    folded_retrieval_metrics,
    recall_at_k,
    retrieval_metrics,
    retrieval_ranks,
)
from .style_alignment import match_moments
from .uncertainty_reranking import (
    RetrievalUncertainty,
    RiskCoverage,
    UncertaintyReranking,
    learn_reranking,
    risk_coverage,
)


if TYPE_CHECKING:
    from .recall_metric import ImageTextRecall
    from .style_report import StyleReport, measure_styles


__all__ = [
    "EncodedRetrieval",
    "ImageTextRecall",
    "RetrievalEvaluator",
    "RetrievalRanks",
    "RetrievalUncertainty",
    "RiskCoverage",
    "StyleReport",
    "UncertaintyReranking",
    "chance_rsum",
    "folded_retrieval_metrics",
    "learn_reranking",
    "match_moments",
    "measure_styles",
    "recall_at_k",
    "retrieval_metrics",
    "retrieval_ranks",
    "risk_coverage",
]


def __getattr__(name: str) -> Any:
    # On first use only: `evaluate` and `datasets` take seconds to import and nothing above needs them.
    if name == "ImageTextRecall":
        from .recall_metric import ImageTextRecall

        return ImageTextRecall
    if name in ("StyleReport", "measure_styles"):
        from . import style_report

        return getattr(style_report, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
