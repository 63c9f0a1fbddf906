"""The part of the trainer that writes and reads checkpoints."""

from __future__ import annotations

from torch import nn
from transformers.utils import logging

from ..modeling_pico import PicoModel
from .base import TrainerBase


logger = logging.get_logger(__name__)


class CheckpointTrainer(TrainerBase):
    """Checkpoints that hold all a run needs to continue."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._load_weights(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is None or not self._load_weights(best):
            super()._load_best_model()

    def _load_weights(self, folder: str) -> bool:
        # Files name the weights of some backbones (ViT) as older releases of transformers did. `from_pretrained`
        # translates; the plain `load_state_dict` of `Trainer` would leave those weights out with a mere warning.
        if not isinstance(self.model, PicoModel) or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return False
        logger.info(f"Loading model from {folder}.")
        self.model.load_state_dict(type(self.model).from_pretrained(folder).state_dict())
        return True

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.construction is not None and self.args.should_save:
            self.construction.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.construction is not None and checkpoint is not None:
            self.construction.load(checkpoint)


__all__ = ["CheckpointTrainer"]
