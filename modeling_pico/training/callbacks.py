"""Callbacks of PICO training. They decide when; what is done stands elsewhere."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..data import UniqueIdBatchSampler
from .staging import PrototypeConstruction


MAX_LOGIT_SCALE = math.log(100)


class PrototypeCallback(TrainerCallback):
    """
    Decides when prototypes are built and come into use.

    A construction falls on the end of an epoch. It waits for `on_epoch_end`, so that it shares the evaluation the
    trainer makes there; unless an evaluation, or a checkpoint that [`DurableTrainer`] does not put off, follows at the
    end of the step already: a run that resumes from that checkpoint does not see this epoch end again. Where no
    evaluation follows that would, `construct` builds them.
    """

    def __init__(self, construction: PrototypeConstruction, construct: Callable[[], None]):
        self.construction = construction
        self.construct = construct

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        steps = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
        self.construction.start(steps, state.max_steps)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.construction.apply_pending()

    def on_step_begin(self, args, state, control, **kwargs):
        self.construction.apply_pending()

    def on_step_end(self, args, state, control, **kwargs):
        ends = state.epoch == math.floor(state.epoch) and (control.should_evaluate or control.should_save)
        self._decide(args, control, ends and self.construction.is_reached(state.global_step))

    def on_epoch_end(self, args, state, control, **kwargs):
        self._decide(args, control, self.construction.is_reached(state.global_step))

    def _decide(self, args, control, due: bool) -> None:
        self.construction.due = due
        if due and not (args.feedback_needs_validation and control.should_evaluate):
            # `Trainer` takes what the construction logs for the log of this step, and would leave the loss out.
            should_log = control.should_log
            self.construct()
            control.should_log = should_log


class UploadCallback(TrainerCallback):
    """
    Before an upload in the midst of training: the model card, and the code that the weights load with, which `Trainer`
    would leave in the checkpoint.
    """

    def __init__(self, create_model_card: Callable[[], None]):
        self.create_model_card = create_model_card

    def on_push_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            for file in Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}").glob("*.py"):
                shutil.copy(file, args.output_dir)
            self.create_model_card()


class TrainLoaderCallback(TrainerCallback):
    """
    Tells the batch sampler its epoch, also where a resumed run wraps it twice; ends persistent workers with the
    training, which would stay as long as the trainer.
    """

    def __init__(self, sampler: UniqueIdBatchSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int(state.epoch or 0))

    def on_train_end(self, args, state, control, train_dataloader=None, **kwargs):
        train_dataloader.base_dataloader._iterator = None


class LogitScaleCallback(TrainerCallback):
    """Keeps the learned inverse temperature at most 100, as CLIP (arXiv 2103.00020) does."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("logit_scale"):
                    parameter.clamp_(max=MAX_LOGIT_SCALE)


__all__ = ["LogitScaleCallback", "PrototypeCallback", "TrainLoaderCallback", "UploadCallback"]
