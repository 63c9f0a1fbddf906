"""Training: arguments, staged construction of prototypes, trainer."""

from ..durable import NonFiniteLossError
from .arguments import PicoTrainingArguments
from .construction import PrototypeConstruction
from .trainer import PicoTrainer


__all__ = [
    "NonFiniteLossError",
    "PicoTrainer",
    "PicoTrainingArguments",
    "PrototypeConstruction",
]
