"""What all parts of the trainer share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer

from ..evaluation.evaluator import RetrievalEvaluator
from ..model.modeling_pico import PicoModel
from .arguments import PicoTrainingArguments
from .construction import PrototypeConstruction


class TrainerBase(Trainer):
    """Attributes of [`PicoTrainer`], as its parts see them."""

    # What `Trainer` declares more widely.
    args: PicoTrainingArguments
    model: nn.Module
    train_dataset: Any
    eval_dataset: Any
    # Of the training in progress, for models with style prototypes.
    construction: PrototypeConstruction | None
    evaluator: RetrievalEvaluator
    # What the model card says beyond what the trainer knows; keyword arguments of `create_model_card`.
    card_info: dict[str, Any]
    # What the card calls the metrics that evaluations report under these prefixes.
    card_split_names: dict[str, str]
    _card_metrics: dict[str, dict[str, float]]
    # Auxiliary losses since the last log, by name.
    _auxiliary_log: dict[str, list[torch.Tensor]]

    def _unwrapped_model(self) -> nn.Module:
        """The model without what Accelerate and `torch.compile` put around it; an adapter (PEFT) stays."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _pico_model(self) -> PicoModel:
        model: Any = self._unwrapped_model()
        if not isinstance(model, PicoModel):
            try:
                # An adapter (PEFT) holds the model one level down.
                model = model.get_base_model()
            except AttributeError:
                raise ValueError(
                    "PicoTrainer trains a PicoModel or a PEFT adapter around one, but `model` is a "
                    f"{type(model).__name__}. Make one with PicoModel.from_backbones or PicoModel.from_pretrained."
                ) from None
        return model


__all__ = ["TrainerBase"]
