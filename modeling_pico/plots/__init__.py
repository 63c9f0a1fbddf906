"""
Pictures of a model and its training: `plot_*` turn plain data into figures, `gather_*` compute the data, and
`save_plots` does both. They need matplotlib: `pip install modeling-pico[plots]`.
"""

from __future__ import annotations

from .canvas import NothingToDrawError, has_matplotlib, require_matplotlib
from .features import (
    PairScores,
    PrototypeSet,
    SemanticProbability,
    plot_pair_scores,
    plot_prototypes,
    plot_semantic_probability,
)
from .gather import (
    EncodedPairs,
    encode_pairs,
    gather_match,
    gather_pair_scores,
    gather_prototypes,
    gather_risk_coverage,
    gather_semantic_probability,
)
from .history import Construction, TrainingHistory, plot_stage_timeline, plot_training_curves, read_history
from .matches import PatchWordMatch, plot_matches
from .risk_coverage import plot_risk_coverage
from .save import save_plots, save_run_plots


__all__ = [
    "Construction",
    "EncodedPairs",
    "NothingToDrawError",
    "PairScores",
    "PatchWordMatch",
    "PrototypeSet",
    "SemanticProbability",
    "TrainingHistory",
    "encode_pairs",
    "gather_match",
    "gather_pair_scores",
    "gather_prototypes",
    "gather_risk_coverage",
    "gather_semantic_probability",
    "has_matplotlib",
    "plot_matches",
    "plot_pair_scores",
    "plot_prototypes",
    "plot_risk_coverage",
    "plot_semantic_probability",
    "plot_stage_timeline",
    "plot_training_curves",
    "read_history",
    "require_matplotlib",
    "save_plots",
    "save_run_plots",
]
