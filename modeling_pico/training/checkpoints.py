"""The part of the trainer that writes and reads checkpoints."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from transformers.utils import is_peft_available, logging

from ..distributed import gather_object, reduce, wait_for_everyone
from ..model.modeling_pico import PicoModel
from .base import TrainerBase
from .callbacks import EpochEndCallback
from .checkpoint_files import (
    LOSS_FILE,
    UNFINISHED,
    check_resumable,
    clean_up,
    last_checkpoint,
    move_files,
    put_in_place,
    read_results,
    rotate,
    write_text,
)
from .run_lock import sole_run
from .sharding import own_class


if is_peft_available():
    from peft import load_peft_weights, set_peft_model_state_dict

logger = logging.get_logger(__name__)

# What a shell reports of a process that SIGTERM ended.
TERMINATED = 128 + signal.SIGTERM
# After so many steps several processes ask one another whether any was asked to end.
STEPS_BETWEEN_QUESTIONS = 8


class CheckpointTrainer(TrainerBase):
    """
    Checkpoints that are complete or absent, and hold all a run needs to continue as if it had never stopped.

    SIGTERM ends a training with a checkpoint: after the step in progress, with the evaluation and the construction
    that belong to it, and with exit status 143. A handler that the program has set itself stays in place.
    """

    _staging: str | None = None
    _saved = False
    _terminated = False
    _loss_sums: dict[str, Any] | None = None
    # First step of those whose losses are added up in `_total_loss_scalar`.
    _first_step = 0

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._epoch_end = EpochEndCallback()
        self.add_callback(self._epoch_end)

    # Training

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> TrainOutput:
        """As `Trainer.train`; `resume_from_checkpoint=True` takes the newest checkpoint that is complete."""
        run = self._get_output_dir(trial)
        with sole_run(run) if self.args.should_save else nullcontext():
            if self.args.should_save:
                clean_up(run)
            wait_for_everyone()
            if resume_from_checkpoint is True:
                resume_from_checkpoint = last_checkpoint(run)
                if resume_from_checkpoint is None:
                    raise ValueError(f"{run!r} holds no complete checkpoint to resume from.")
            if resume_from_checkpoint:
                self._check_sharding(Path(resume_from_checkpoint))
                check_resumable(resume_from_checkpoint)
            self._loss_sums = None
            with self._noticing_sigterm():
                return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _check_sharding(self, checkpoint: Path) -> None:
        is_sharded = (checkpoint / "optimizer.bin").exists()
        if self.is_deepspeed_enabled or is_sharded == self.is_fsdp_enabled:
            return
        if is_sharded or (checkpoint / "optimizer.pt").exists():
            raise ValueError(
                f"{str(checkpoint)!r} was written {'with' if is_sharded else 'without'} FSDP and can only be resumed "
                "so. Its weights load anywhere: PicoModel.from_pretrained, or --model_name_or_path with a new "
                "--output_dir."
            )

    @contextmanager
    def _noticing_sigterm(self) -> Iterator[None]:
        self._terminated = False
        in_main_thread = threading.current_thread() is threading.main_thread()
        if not in_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            yield
            return
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "_terminated", True))
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # Asked after the last step: no other one noticed. Several processes save together or not at all.
        if self._terminated and (self._saved or self.args.world_size == 1):
            if not self._saved:
                self._save_checkpoint(self.model, None)
            raise SystemExit(TERMINATED)

    def _should_terminate(self) -> bool:
        """Whether any process was asked to end: all have to stop after the same step."""
        if self.args.world_size == 1:
            return self._terminated
        # Asking waits for the device, so several processes do not ask after every step.
        if self.state.global_step % STEPS_BETWEEN_QUESTIONS and self.state.global_step < self.state.max_steps:
            return False
        asked = torch.tensor(float(self._terminated), device=self.args.device)
        return bool(reduce(asked, "sum") > 0)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self._restore_loss()
        if self.state.global_step >= self.state.max_steps:
            # A finished run that is resumed: `Trainer` would train the rest of the epoch.
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, *args, **kwargs):
        self._saved = False
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        # What the end of the epoch brings belongs to this step: a resumed run would not do it again.
        if self._epoch_end.follows or not self._should_terminate():
            return
        if not self._saved:
            self._save_checkpoint(model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        if self.is_world_process_zero():
            logger.warning(
                f"Training was asked to end (SIGTERM) and stops after step {self.state.global_step} of "
                f"{self.state.max_steps}. Its checkpoint in {self._get_output_dir(trial)} is complete: continue with "
                "resume_from_checkpoint."
            )
        raise SystemExit(TERMINATED)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self._restore_loss()
        # With a limit of one, `Trainer` would now delete the newest checkpoint unless it is the best one, and leave it
        # half-deleted if it died.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            output = super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit
        return output._replace(training_loss=output.metrics["train_loss"])

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `Trainer.log`; the loss of the whole training is that of all its steps, also where it was resumed."""
        if "train_loss" in logs and "total_flos" in logs:  # not those of evaluating a split named `train`
            steps = self.state.global_step - self._first_step
            logs["train_loss"] = self._total_loss_scalar / max(steps, 0.001)
        super().log(logs, *args, **kwargs)

    # Writing

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else self._staging

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        state, run = self.state, Path(self._get_output_dir(trial))
        final = run / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        best = state.best_model_checkpoint
        try:
            with self._staged(run, f"The checkpoint {final}") as staging:
                self._staging = str(staging)
                super()._save_checkpoint(model, trial)
                best_folder = run / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
                if best_folder == final or best_folder.is_dir():
                    best = str(best_folder)
                wait_for_everyone()
                if self.args.should_save:
                    # `Trainer` wrote where it looked for the best checkpoint, which is not where that lies.
                    state.best_model_checkpoint = best
                    state.save_to_json(str(staging / final.name / TRAINER_STATE_NAME))
                    put_in_place(staging / final.name, final)
                    rotate(run, self.args.save_total_limit, [final, best])
        finally:
            state.best_model_checkpoint, self._staging = best, None
        wait_for_everyone()
        self._saved = True
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`; in the output folder, a model is replaced only by a complete one."""
        if output_dir is not None:
            super().save_model(output_dir, _internal_call)
            return
        run = Path(str(self.args.output_dir))
        with self._staged(run, f"The model in {run}") as staging:
            super().save_model(str(staging / "model"), _internal_call=True)
            wait_for_everyone()
            if self.args.should_save:
                move_files(staging / "model", run)
        wait_for_everyone()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    @contextmanager
    def _staged(self, run: Path, what: str) -> Iterator[Path]:
        """A folder to write into, gone afterwards; an error of writing says what it did not touch."""
        staging = run / UNFINISHED
        try:
            yield staging
        # torch reports a full disk as a RuntimeError; running out of memory is one that has another cause.
        except (OSError, RuntimeError, SafetensorError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            last = last_checkpoint(run) if run.is_dir() else None
            kept = "there is none yet" if last is None else f"the newest is {last}"
            raise OSError(
                f"{what} could not be written ({type(error).__name__}: {error}). Nothing is left of the attempt, and "
                f"earlier checkpoints are as they were: {kept}. Make room or mend the folder, then continue with "
                "resume_from_checkpoint."
            ) from error
        finally:
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Not before the checkpoint has its final place.
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """
        As `Trainer.save_metrics`; files hold their old or their new content, never a part. Splits may be named by the
        data: slashes in their names become underscores in those of files.
        """
        if not self.is_world_process_zero():
            return
        folder = Path(str(self.args.output_dir))
        file_name = re.sub(r"[/\\]", "_", f"{split}_results.json")
        own, everything = folder / file_name, folder / "all_results.json"
        with sole_run(folder):
            # A split named "all" must not replace what the others have left.
            if own != everything or not combined:
                write_text(own, json.dumps(metrics, indent=4, sort_keys=True))
            if combined:
                write_text(everything, json.dumps({**read_results(everything), **metrics}, indent=4, sort_keys=True))

    # State

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with self._uncompiled(), own_class(self._pico_model()):
            super()._save(output_dir, state_dict)

    @contextmanager
    def _uncompiled(self) -> Iterator[None]:
        """`self.model` without `torch.compile`, whose wrapper gives the weights names that no other model loads."""
        found, self.model = self.model, self._unwrapped_model()
        try:
            yield
        finally:
            self.model = found

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        # The means that are logged next reach back before the checkpoint.
        auxiliary = {name: [float(value) for value in values] for name, values in self._auxiliary_log.items()}
        processes = gather_object([{"loss": self._tr_loss.item(), "auxiliary": auxiliary}])
        if not self.args.should_save:
            return
        sums = {
            "since_last_log": processes,
            "last_logged_step": self._globalstep_last_logged,
            "total": self._total_loss_scalar,
            "first_step": self._first_step,
        }
        Path(output_dir, LOSS_FILE).write_text(json.dumps(sums) + "\n", encoding="utf-8")
        if self.construction is not None:
            self.construction.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and os.path.isfile(path := os.path.join(checkpoint, LOSS_FILE)):
            self._loss_sums = json.loads(Path(path).read_text(encoding="utf-8"))
        self._first_step = self.state.global_step
        if self.construction is not None and checkpoint is not None:
            self.construction.load(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        name = "rng_state.pth" if self.args.world_size == 1 else f"rng_state_{self.args.process_index}.pth"
        if checkpoint is not None and not os.path.isfile(os.path.join(checkpoint, name)):
            logger.warning(
                f"{checkpoint} has no {name}, as after a run on another number of processes. Dropout draws other "
                "numbers than it would have."
            )
        super()._load_rng_state(checkpoint)

    def _restore_loss(self) -> None:
        """Continues the sums of losses that a checkpoint holds; `Trainer` starts them anew."""
        sums, self._loss_sums = self._loss_sums, None
        if sums is None:
            return
        processes = sums["since_last_log"]
        if len(processes) == self.args.world_size:
            processes = [processes[self.args.process_index]]
        self._tr_loss.fill_(sum(process["loss"] for process in processes) / len(processes))
        self._auxiliary_log.clear()
        for process in processes:
            for name, values in process["auxiliary"].items():
                self._auxiliary_log.setdefault(name, []).extend(torch.tensor(values, device=self.args.device))
        self._globalstep_last_logged = sums["last_logged_step"]
        self._total_loss_scalar = sums["total"]
        self._first_step = sums["first_step"]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with self._uncompiled():
            if not self._load_weights(resume_from_checkpoint):
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        with self._uncompiled():
            if best is None or not self._load_weights(best):
                super()._load_best_model()

    def _load_weights(self, folder: str) -> bool:
        # Files name the weights of some backbones (ViT) as older releases of transformers did. `from_pretrained`
        # translates; the plain `load_state_dict` of `Trainer` would leave those weights out with a mere warning.
        if not isinstance(self.model, PicoModel) or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return False
        if not os.path.isdir(folder):
            return False  # `Trainer` warns
        logger.info(f"Loading model from {folder}.")
        if self.model._hf_peft_config_loaded:
            # An adapter from `add_adapter`, which `Trainer` saves and cannot load.
            weights = load_peft_weights(folder, device=str(self.args.device))
            own = {name.removeprefix("base_model.model."): tensor for name, tensor in weights.items()}
            set_peft_model_state_dict(self.model, own, self.model.active_adapters()[0])
            return True
        self.model.load_state_dict(type(self.model).from_pretrained(folder).state_dict())
        return True


__all__ = ["CheckpointTrainer"]
