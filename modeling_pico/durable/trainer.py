"""A `Trainer` whose runs may be killed at any moment and go on as if nothing had happened."""

from __future__ import annotations

import json
import math
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from transformers.utils import is_peft_available, logging

from ..distributed import gather_object, reduce, wait_for_everyone, whole
from .files import (
    PROGRESS_FILE,
    UNFINISHED_FOLDER,
    delete_old_checkpoints,
    last_checkpoint,
    put_in_place,
    remove_unfinished,
    replace_files,
    resumable_state,
    sole_run,
    write_text,
)
from .finite import NON_FINITE_LOSSES, FiniteLossCallback, spread_non_finite
from .sigterm import TERMINATED, noting_sigterm


if is_peft_available():
    from peft import load_peft_weights, set_peft_model_state_dict

logger = logging.get_logger(__name__)

# After so many steps several processes ask one another about SIGTERM: the answer waits for the device.
SIGTERM_CHECK_STEPS = 8


class DurableTrainer(Trainer):
    r"""
    `Trainer` with checkpoints that are complete or absent, and hold all that a run needs to continue exactly.

    - A checkpoint and the model in the output folder are written beside and moved; one run a folder.
    - A resumed run ends as the uninterrupted one does, its log and losses included; a finished one trains no further.
    - SIGTERM ends a training with a checkpoint after the step in progress, and with exit status 143. A handler that
      the program has set itself stays in place.
    - A loss or gradient that is NaN or infinite stops training before the weights change, or costs one step.

    It knows no model or task, and goes before other trainers: `class MyTrainer(DurableTrainer, SFTTrainer)`. One that
    keeps a state of its own extends [`checkpoint_state`] and [`load_checkpoint_state`]; one that computes its loss
    itself returns it from `compute_loss` through [`spread_non_finite`].

    Args:
        model, args, kwargs: As for `Trainer`.
        non_finite_loss (`str`, *optional*, defaults to `"stop"`):
            What a loss or gradient that is NaN or infinite does: `"stop"` raises [`NonFiniteLossError`], `"skip"`
            leaves the optimizer step out and logs `skipped_steps`; ten in a row end training all the same.
    """

    model: nn.Module  # what `Trainer` declares more widely
    # Where checkpoints are written before they are moved.
    _write_folder: str | None = None
    _resumed_from: Path | None = None
    _resumed_step = 0
    _saved_step = -1

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: TrainingArguments | None = None,
        *more: Any,
        non_finite_loss: str = "stop",
        **kwargs: Any,
    ):
        if non_finite_loss not in NON_FINITE_LOSSES:
            raise ValueError(f"`non_finite_loss` must be one of {NON_FINITE_LOSSES}, but got {non_finite_loss!r}.")
        if args is not None and args.enable_jit_checkpoint:
            # Theirs would be written in the middle of a step, from where no run continues exactly.
            raise ValueError("`enable_jit_checkpoint`: SIGTERM writes a checkpoint in any case. Leave it out.")
        super().__init__(model, args, *more, **kwargs)
        # A loss that stops training needs no filter, which would wait for the device at every micro-batch.
        self.args.logging_nan_inf_filter = non_finite_loss == "skip"
        self._finite_loss = FiniteLossCallback(non_finite_loss, self.describe_batches, self.log)
        self._sigterm = threading.Event()
        self.add_callback(_DurableCallback(self))
        self.add_callback(self._finite_loss)

    # For sub-classes

    def checkpoint_state(self, folder: str) -> dict[str, Any]:
        """
        What this process needs beyond what `Trainer` saves, as JSON; called on all processes for every checkpoint.
        Large things may be written into its `folder` by the process that should save.
        """
        return {}

    def load_checkpoint_state(self, folder: str, states: list[dict[str, Any]]) -> None:
        """
        Takes up what [`checkpoint_state`] left; called when training begins. `states` holds that of this process, or,
        after a run on another number of processes, those of all of them.
        """

    def describe_batches(self, batches: list[dict[str, Any]]) -> str:
        """What an error says of the micro-batches whose loss is not finite; called on all processes."""
        return "A lower `learning_rate`, bf16 instead of fp16, or other data may help."

    def unwrapped_model(self) -> nn.Module:
        """The model without what Accelerate and `torch.compile` put around it; an adapter (PEFT) stays."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    # Training

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> TrainOutput:
        """As `Trainer.train`; a checkpoint from which a run could not continue exactly is refused (ValueError)."""
        if self.is_deepspeed_enabled and self._finite_loss.action == "skip":
            raise ValueError(
                "non_finite_loss='skip' leaves steps out, but DeepSpeed takes them before they can be judged. Leave "
                "it out, or launch with DDP or FSDP."
            )
        run = self._get_output_dir(trial)
        with sole_run(run) if self.args.should_save else nullcontext(), noting_sigterm() as self._sigterm:
            if self.args.should_save:
                remove_unfinished(run)
            wait_for_everyone()
            if resume_from_checkpoint is True:
                resume_from_checkpoint = last_checkpoint(run)
                if resume_from_checkpoint is None:
                    raise ValueError(f"{run!r} holds no complete checkpoint to resume from.")
            self._resumed_from, self._resumed_step, self._saved_step = None, 0, -1
            if resume_from_checkpoint:
                self._resumed_from = Path(resume_from_checkpoint)
                optimizer = "optimizer.bin" if self.is_fsdp_enabled else "optimizer.pt"
                self._resumed_step = resumable_state(self._resumed_from, optimizer).global_step
            output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
            # Asked after the last step: no other one noticed. Several processes save together or not at all.
            is_saved = self._saved_step == self.state.global_step
            if self._sigterm.is_set() and (is_saved or self.args.world_size == 1):
                if not is_saved:
                    self._save_checkpoint(self.model, None)
                raise SystemExit(TERMINATED)
        return output._replace(training_loss=output.metrics["train_loss"])

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader) -> Any:
        """As in `Trainer`, which would train a finished run that is resumed until the end of the epoch."""
        epochs, steps_per_epoch, *others, max_steps = super().set_initial_training_values(args, dataloader)
        if self._resumed_step >= max_steps:
            epochs = self._resumed_step // steps_per_epoch
        return epochs, steps_per_epoch, *others, max_steps

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """As `Trainer.compute_loss`; where the loss is not finite, no gradient is, on any process."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = spread_non_finite(loss)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """As `Trainer.training_step`."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._finite_loss.note(loss, inputs)
        return loss

    # No callback is told the norm, and to compute it again takes time.
    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._finite_loss.grad_norm = whole(norm) if self.accelerator.scaler is None else None
        return norm

    # With `save_total_limit=1` it deletes the newest checkpoint, unless that is the best one; and no hook prevents it.
    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `Trainer.log`; the loss of the whole training is that of all its steps, also where it was resumed."""
        if "train_loss" in logs and "total_flos" in logs:  # not those of evaluating a split named `train`
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, *args, **kwargs)

    def _asked_to_end(self) -> bool:
        """Whether any process got SIGTERM: all have to stop after the same step."""
        asked = self._sigterm.is_set()
        if self.args.world_size == 1:
            return asked
        return bool(reduce(torch.tensor(float(asked), device=self.args.device), "sum") > 0)

    # Writing

    # Asked for by all that `Trainer` writes of a checkpoint; otherwise all of that had to be written here.
    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._write_folder is None else self._write_folder

    # `on_save` comes after it, but the writing itself has to be led elsewhere.
    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        state, run = self.state, Path(self._get_output_dir(trial))
        final = run / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        best = state.best_model_checkpoint
        try:
            with self._writing(run, f"The checkpoint {final}") as folder:
                self._write_folder = str(folder)
                super()._save_checkpoint(model, trial)
                best_folder = run / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
                if best_folder == final or best_folder.is_dir():
                    best = str(best_folder)
                if not self.args.save_only_model:
                    self._save_progress(folder / final.name)
                wait_for_everyone()
                if self.args.should_save:
                    # `Trainer` wrote where it looked for the best checkpoint, which is not where that lies.
                    state.best_model_checkpoint = best
                    state.save_to_json(str(folder / final.name / TRAINER_STATE_NAME))
                    put_in_place(folder / final.name, final)
                    delete_old_checkpoints(run, self.args.save_total_limit, [final, best])
        finally:
            state.best_model_checkpoint, self._write_folder = best, None
        wait_for_everyone()
        self._saved_step = state.global_step
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))

    # `Trainer` uploads before the checkpoint has its final place.
    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._write_folder is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`; in the output folder, a model is replaced only by a complete one."""
        if output_dir is not None:
            with self._as_it_was_given():
                super().save_model(output_dir, _internal_call)
            return
        run = Path(str(self.args.output_dir))
        with self._writing(run, f"The model in {run}") as folder:
            self.save_model(str(folder / "model"), _internal_call=True)
            wait_for_everyone()
            if self.args.should_save:
                replace_files(folder / "model", run)
        wait_for_everyone()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    @contextmanager
    def _writing(self, run: Path, what: str) -> Iterator[Path]:
        """A folder to write into, gone afterwards; an error of writing says what it did not touch."""
        folder = run / UNFINISHED_FOLDER
        try:
            yield folder
        # torch reports a full disk as a RuntimeError; running out of memory is one that has another cause.
        except (OSError, RuntimeError, SafetensorError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            last = last_checkpoint(run)
            kept = "there is none yet" if last is None else f"the newest is {last}"
            raise OSError(
                f"{what} could not be written ({type(error).__name__}: {error}). Nothing is left of the attempt, and "
                f"earlier checkpoints are as they were: {kept}. Make room or mend the folder, then continue with "
                "resume_from_checkpoint."
            ) from error
        finally:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def _as_it_was_given(self) -> Iterator[None]:
        """
        `self.model` without `torch.compile`, whose wrapper gives the weights names that no other model loads, and with
        its own class: FSDP's, made for it, would have torch's code saved beside it.
        """
        found: Any = self.model
        model: Any = self.unwrapped_model()
        wrapped_class: Any = type(model)
        self.model = model
        model.__class__ = next(base for base in wrapped_class.__mro__ if not issubclass(base, FSDPModule))
        try:
            yield
        finally:
            self.model, model.__class__ = found, wrapped_class

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """
        As `Trainer.save_metrics`; files hold their old or their new content, never a part. Splits may be named by the
        data: slashes in their names become underscores in those of files.
        """
        if not self.is_world_process_zero():
            return
        folder = Path(str(self.args.output_dir))
        own, everything = folder / re.sub(r"[/\\]", "_", f"{split}_results.json"), folder / "all_results.json"
        with sole_run(folder):
            # A split named "all" must not replace what the others have left.
            if own != everything or not combined:
                write_text(own, json.dumps(metrics, indent=4, sort_keys=True))
            if combined:
                try:
                    found = json.loads(everything.read_text(encoding="utf-8")) if everything.exists() else {}
                    metrics = {**found, **metrics}
                except (ValueError, TypeError):
                    logger.warning(f"{everything} does not hold metrics by name, and is written anew.")
                write_text(everything, json.dumps(metrics, indent=4, sort_keys=True))

    # What a run has to know to go on

    def _save_progress(self, folder: Path) -> None:
        # Of this process: what is logged next reaches back before the checkpoint.
        own = {"loss": self._tr_loss.item(), "state": self.checkpoint_state(str(folder))}
        progress = {
            "processes": gather_object([own]),
            "last_logged_step": self._globalstep_last_logged,
            "total_loss": self._total_loss_scalar,
        }
        if self.args.should_save:
            (folder / PROGRESS_FILE).write_text(json.dumps(progress) + "\n", encoding="utf-8")

    def _load_progress(self) -> None:
        """Continues the sums that a checkpoint holds; `Trainer` starts them anew."""
        folder = self._resumed_from
        if folder is None:
            return
        progress = json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8"))
        processes = progress["processes"]
        if len(processes) == self.args.world_size:
            processes = [processes[self.args.process_index]]
        self._tr_loss.fill_(sum(process["loss"] for process in processes) / len(processes))
        self._globalstep_last_logged = progress["last_logged_step"]
        self._total_loss_scalar = progress["total_loss"]
        self.load_checkpoint_state(str(folder), [process["state"] for process in processes])

    # It and the next one load names as files have them, and leave weights out where these differ from the model's.
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with self._as_it_was_given():
            if not self._load_weights(resume_from_checkpoint):
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        with self._as_it_was_given():
            if best is None or not self._load_weights(best):
                super()._load_best_model()

    def _load_weights(self, folder: str) -> bool:
        # Files name the weights of some models (ViT) as older releases of transformers did. `from_pretrained`
        # translates; the plain `load_state_dict` of `Trainer` would leave those weights out with a mere warning.
        if not isinstance(self.model, PreTrainedModel) or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return False
        if not Path(folder).is_dir():
            return False  # `Trainer` warns
        logger.info(f"Loading model from {folder}.")
        if self.model._hf_peft_config_loaded:
            # An adapter from `add_adapter`, which `Trainer` saves and cannot load.
            weights = load_peft_weights(folder, device=str(self.args.device))
            own = {name.removeprefix("base_model.model."): tensor for name, tensor in weights.items()}
            set_peft_model_state_dict(self.model, own, self.model.active_adapters()[0])
        else:
            self.model.load_state_dict(type(self.model).from_pretrained(folder).state_dict())
        return True


class _DurableCallback(TrainerCallback):
    """
    Says when checkpoints are written.

    That of an epoch's last step is put off until the end of the epoch, so that it holds what is evaluated there: a run
    that resumes from it does not see that epoch end again. After SIGTERM one is written at the end of the step, and
    ends the training.
    """

    def __init__(self, trainer: DurableTrainer):
        self.trainer = trainer
        self._put_off = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._load_progress()

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._put_off = False

    def on_step_end(self, args, state, control, **kwargs):
        is_last = state.global_step >= state.max_steps
        if args.world_size == 1 or is_last or state.global_step % SIGTERM_CHECK_STEPS == 0:
            control.should_save = control.should_save or self.trainer._asked_to_end()
        stops = control.should_epoch_stop or control.should_training_stop
        if stops or state.epoch == math.floor(state.epoch):
            self._put_off, control.should_save = control.should_save, False

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_save = control.should_save or self._put_off
        self._put_off = False

    def on_save(self, args, state, control, **kwargs):
        if not self.trainer._asked_to_end():
            return
        if state.is_world_process_zero:
            logger.warning(
                f"Training was asked to end (SIGTERM) and stops after step {state.global_step} of {state.max_steps}. "
                f"Its checkpoint in {args.output_dir} is complete: continue with resume_from_checkpoint."
            )
        raise SystemExit(TERMINATED)


__all__ = ["DurableTrainer"]
