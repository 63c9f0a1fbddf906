"""Trainings that survive: a `Trainer` of transformers whose runs may be killed, asked to end or run out of disk."""

from .files import sole_run, write_text
from .finite import NON_FINITE_LOSSES, NonFiniteLossError, spread_non_finite
from .sigterm import end_with_training_only
from .trainer import DurableTrainer


__all__ = [
    "NON_FINITE_LOSSES",
    "DurableTrainer",
    "NonFiniteLossError",
    "end_with_training_only",
    "sole_run",
    "spread_non_finite",
    "write_text",
]
