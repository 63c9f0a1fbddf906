"""Callbacks of PICO training."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..data import UniqueIdBatchSampler
from ..distributed import average_
from ..model.backbones_pico import batch_norm_layers
from .construction import PrototypeConstruction


logger = logging.get_logger(__name__)

MAX_LOGIT_SCALE = math.log(100)


class PrototypeCallback(TrainerCallback):
    """
    Decides when batches are collected, and when prototypes are built and come into use.

    A construction falls on the end of an epoch. It waits for `on_epoch_end`, so that it shares the evaluation the
    trainer makes there; unless an evaluation, or a checkpoint that [`DurableTrainer`] does not put off, follows at the
    end of the step already: a run that resumes from that checkpoint does not see this epoch end again.

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


class BatchNormCallback(TrainerCallback):
    """
    Gives the processes one running mean and variance of batches, the mean of theirs. Each takes those of its own pairs
    and would evaluate another model; only that of the first is saved.
    """

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if args.world_size == 1:
            return
        layers = [layer for layer in batch_norm_layers(model).values() if layer.training and layer.track_running_stats]
        running = [buffer for layer in layers for buffer in (layer.running_mean, layer.running_var)]
        if running:
            together = torch.cat(running)
            average_(together)
            for buffer, mean in zip(running, together.split([len(buffer) for buffer in running]), strict=True):
                buffer.copy_(mean)


__all__ = ["BatchNormCallback", "LogitScaleCallback", "PrototypeCallback", "TrainLoaderCallback", "UploadCallback"]
