"""Training: arguments, staged construction of prototypes, trainer."""

from ..durable import NonFiniteLossError
from .arguments import PicoTrainingArguments
from .prototype_construction import PrototypeState, construct_prototypes, feedback_weight, weighted_kmeans
from .staging import PrototypeConstruction
from .trainer import PicoTrainer


__all__ = [
    "NonFiniteLossError",
    "PicoTrainer",
    "PicoTrainingArguments",
    "PrototypeConstruction",
    "PrototypeState",
    "construct_prototypes",
    "feedback_weight",
    "weighted_kmeans",
]
