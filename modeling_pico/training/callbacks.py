"""Callbacks of PICO training. They decide when; what is done stands elsewhere."""

from __future__ import annotations

import math

import torch
from transformers import TrainerCallback

from ..data import UniqueIdBatchSampler
from .staging import PrototypeConstruction


MAX_LOGIT_SCALE = math.log(100)


class PrototypeCallback(TrainerCallback):
    """
    Decides when prototypes are built and come into use.

    A construction falls on the end of an epoch. It waits for `on_epoch_end`, so that it shares the evaluation the
    trainer makes there; unless an evaluation, or a checkpoint that [`EpochEndCallback`] does not put off, follows at
    the end of the step already: a run that resumes from that checkpoint does not see this epoch end again.
    """

    def __init__(self, construction: PrototypeConstruction):
        self.construction = construction

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        steps = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
        self.construction.start(steps, state.max_steps)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.construction.apply_pending()

    def on_step_begin(self, args, state, control, **kwargs):
        self.construction.apply_pending()

    def on_step_end(self, args, state, control, **kwargs):
        ends = state.epoch == math.floor(state.epoch) and (control.should_evaluate or control.should_save)
        self.construction.due = ends and self.construction.is_reached(state.global_step)

    def on_epoch_end(self, args, state, control, **kwargs):
        self.construction.due = self.construction.is_reached(state.global_step)


class EpochEndCallback(TrainerCallback):
    """
    Puts off the checkpoint of an epoch's last step until the end of the epoch, so that it holds what is evaluated and
    constructed there: a run that resumes from it does not see that epoch end again.

    Attributes:
        follows (`bool`): Whether the end of the epoch comes right after this step.
    """

    def __init__(self):
        self.follows = False
        self._save = False

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.follows = self._save = False

    def on_step_end(self, args, state, control, **kwargs):
        stops = control.should_epoch_stop or control.should_training_stop
        self.follows = stops or state.epoch == math.floor(state.epoch)
        if self.follows:
            self._save, control.should_save = control.should_save, False

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_save = control.should_save or self._save
        self.follows = self._save = False


class SamplerEpochCallback(TrainerCallback):
    """Tells the batch sampler its epoch, also where a resumed run wraps it twice and nobody else does."""

    def __init__(self, sampler: UniqueIdBatchSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int(state.epoch or 0))


class LogitScaleCallback(TrainerCallback):
    """Keeps the learned inverse temperature at most 100, as CLIP (arXiv 2103.00020) does."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("logit_scale"):
                    parameter.clamp_(max=MAX_LOGIT_SCALE)


__all__ = ["EpochEndCallback", "LogitScaleCallback", "PrototypeCallback", "SamplerEpochCallback"]
