"""The part of the trainer that writes the model card and uploads to the Hub."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers.trainer_utils import HubStrategy

from .base import TrainerBase
from .model_card import create_model_card


# Training arguments that a model card names.
_CARD_ARGUMENTS = (
    "learning_rate",
    "backbone_learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
    "caption_sampling",
    "prototype_start",
    "prototype_update_start",
    "reservoir_pairs",
    "feedback",
    "feedback_images",
    "feedback_kappa",
)


class PublishingTrainer(TrainerBase):
    """Model card, and uploads with the code that the weights load with."""

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As `Trainer._push_from_checkpoint`, which leaves out the code the weights load with, and the card."""
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            job = self.push_in_progress
            # Files that a running upload reads stay as they are; `Trainer` leaves this upload out then.
            if self.args.hub_always_push or job is None or job.is_done():
                for file in Path(checkpoint_folder).glob("*.py"):
                    shutil.copy(file, str(self.args.output_dir))
                self.create_model_card()
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(  # type: ignore[override]
        self, language: str | None = None, license: str | None = None, **kwargs: Any
    ) -> None:
        r"""
        Writes the model card (`README.md`) into the output folder.

        Args:
            language (`str`, *optional*): Language of the captions.
            license (`str`, *optional*): Licence of the model.
            kwargs: Accepted for compatibility with `Trainer`; the card takes the rest from the run itself.
        """
        if not self.is_world_process_zero():
            return
        args = self.args
        training = {name: getattr(args, name) for name in _CARD_ARGUMENTS}
        training["lr_scheduler_type"] = transformers.SchedulerType(args.lr_scheduler_type).value
        card = create_model_card(
            model_id=self.hub_model_id or args.hub_model_id or str(args.output_dir),
            config=self._pico_model().config,
            training={**training, "processes": args.world_size},
            stage_log=[entry for entry in self.state.log_history if "prototype_stage" in entry],
            metrics={self.card_split_names.get(name, name): values for name, values in self._card_metrics.items()},
            framework_versions={module.__name__: module.__version__ for module in (transformers, torch, datasets)},
            language=language,
            license=license,
            **self.card_info,
        )
        card.save(os.path.join(str(args.output_dir), "README.md"))


__all__ = ["PublishingTrainer"]
