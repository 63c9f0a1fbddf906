"""Training: arguments, staged construction of prototypes, trainer."""

from .arguments import PicoTrainingArguments
from .construction import PrototypeConstruction
from .finite import NonFiniteLossError
from .trainer import PicoTrainer


__all__ = [
    "NonFiniteLossError",
    "PicoTrainer",
    "PicoTrainingArguments",
    "PrototypeConstruction",
]
