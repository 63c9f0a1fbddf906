"""Callbacks of PICO training. They decide when; what is done stands elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from transformers import TrainerCallback
from transformers.utils import logging

from ..data import UniqueIdBatchSampler
from .construction import PrototypeConstruction


logger = logging.get_logger(__name__)

MAX_LOGIT_SCALE = math.log(100)


class PrototypeCallback(TrainerCallback):
    """
    Decides when batches are collected, and when prototypes are built and come into use.

    A construction falls on the end of an epoch. It waits for `on_epoch_end`, so that it shares the evaluation the
    trainer makes there; unless an evaluation, or a checkpoint that [`EpochEndCallback`] does not put off, follows at
    the end of the step already: a run that resumes from that checkpoint does not see this epoch end again.

    Args:
        construction ([`PrototypeConstruction`]): What is collected and built.
        pairs_per_step (`int`): Pairs of all processes in an optimizer step.
        construct (`Callable`): Builds prototypes; called where no evaluation follows that would do it.
    """

    def __init__(self, construction: PrototypeConstruction, pairs_per_step: int, construct: Callable[[], None]):
        self.construction = construction
        self.pairs_per_step = pairs_per_step
        self.construct = construct
        self._steps_per_epoch = 0

    def next_step(self) -> int:
        """Optimizer step after which the next construction is due."""
        args, done = self.construction.args, self.construction.num_constructions
        update = args.prototype_update_start + (done - 1) * args.prototype_interval
        return (update if done else args.prototype_start) * self._steps_per_epoch

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        self._steps_per_epoch = steps = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
        done, update = self.construction.num_constructions, args.prototype_update_start * steps
        end = f"Training ends at step {state.max_steps} (epoch {state.max_steps / steps:g})"
        if not done and self.next_step() >= state.max_steps:
            logger.warning(
                f"{end}, before the first style prototypes would be used (step {self.next_step()}): all weights stay "
                f"1. Train for longer, or lower `prototype_start`, now {args.prototype_start} epochs."
            )
        elif done < 2 and update >= state.max_steps:
            logger.warning(
                f"{end}, before the style prototypes would be updated for the first time (step {update}): they stay "
                f"as they are first built. Train for longer, or lower `prototype_update_start`, now "
                f"{args.prototype_update_start} epochs."
            )

    def on_step_begin(self, args, state, control, **kwargs):
        construction = self.construction
        construction.apply_pending()
        # Nothing is built after the last step, where nothing would use it.
        remaining = self.next_step() - state.global_step
        construction.collects_statistics = (
            self.next_step() < state.max_steps and remaining <= args.prototype_interval * self._steps_per_epoch
        )
        # Not the length of the batches: shorter last ones may differ between processes, which must decide alike.
        construction.collects_columns = (
            construction.collects_statistics and (remaining - 1) * self.pairs_per_step < args.reservoir_pairs
        )

    def on_step_end(self, args, state, control, **kwargs):
        if state.epoch == math.floor(state.epoch) and (control.should_evaluate or control.should_save):
            self._end_epoch(args, state, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        self._end_epoch(args, state, control)

    def _end_epoch(self, args, state, control) -> None:
        construction = self.construction
        is_due = construction.pending is None and self.next_step() <= state.global_step < state.max_steps
        construction.due = is_due and control.should_evaluate and args.feedback_needs_validation
        if is_due and not construction.due:
            self.construct()


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
