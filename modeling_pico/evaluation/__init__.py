"""Evaluation of image-text retrieval."""

from .evaluator import EncodedRetrieval, RetrievalEvaluator
from .retrieval_metrics import (
    RetrievalRanks,
    chance_rsum,
    folded_retrieval_metrics,
    recall_at_k,
    retrieval_metrics,
    retrieval_ranks,
)
from .style_alignment import align_encoded, measure_gallery
from .style_report import StyleReport, measure_styles
from .style_stress import StyleStress, measure_style_stress
from .uncertainty_reranking import (
    RetrievalUncertainty,
    RiskCoverage,
    UncertaintyReranking,
    learn_reranking,
    risk_coverage,
)


__all__ = [
    "EncodedRetrieval",
    "RetrievalEvaluator",
    "RetrievalRanks",
    "RetrievalUncertainty",
    "RiskCoverage",
    "StyleReport",
    "StyleStress",
    "UncertaintyReranking",
    "align_encoded",
    "chance_rsum",
    "folded_retrieval_metrics",
    "learn_reranking",
    "measure_gallery",
    "measure_style_stress",
    "measure_styles",
    "recall_at_k",
    "retrieval_metrics",
    "retrieval_ranks",
    "risk_coverage",
]
