"""Staged construction of style prototypes: what is collected, what is proposed, and when it comes into use."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import safetensors.torch
import torch
from transformers.utils import logging

from ..distributed import broadcast
from ..model.prototypes_pico import STAGE_INITIAL, STAGE_PLAIN, STAGE_UPDATED, StylePrototypes
from .arguments import PicoTrainingArguments
from .prototype_construction import PrototypeState, construct_prototypes, feedback_weight


logger = logging.get_logger(__name__)

STATE_FILE = "prototype_construction.safetensors"


class PrototypeConstruction:
    r"""
    Collects columns and statistics of pairs in the ordinary training pass, proposes prototypes, and holds a proposal
    until it may come into use.

    A proposal that follows from an evaluation waits in `pending`: it is applied at the start of the next training
    step, after the checkpoint of that evaluation was written with the prototypes the evaluation measured. All state
    beyond the model's buffers is saved beside each checkpoint, so a resumed run continues as if never stopped.

    Args:
        prototypes ([`StylePrototypes`]): The model's prototypes.
        args ([`PicoTrainingArguments`]): Schedule and feedback.
    """

    def __init__(self, prototypes: StylePrototypes, args: PicoTrainingArguments):
        self.prototypes = prototypes
        self.args = args
        self.due = False
        self.pending: PrototypeState | None = None
        self.pending_log_sum = -math.inf
        self.previous_rsum = math.nan
        self._columns: list[tuple[torch.Tensor, torch.Tensor]] = []
        # The buffer may live on an accelerator, and the schedule asks at every step.
        self._num_constructions = int(prototypes.num_constructions)
        self._steps_per_epoch = 0
        self._max_steps = 0

    # When

    def start(self, steps_per_epoch: int, max_steps: int) -> None:
        """Tells the schedule how long an epoch and the training are, in optimizer steps."""
        self._steps_per_epoch, self._max_steps = steps_per_epoch, max_steps
        self._num_constructions = int(self.prototypes.num_constructions)
        args = self.args
        end = f"Training ends at step {max_steps} (epoch {max_steps / steps_per_epoch:g})"
        if self.next_step() >= max_steps and self.prototypes.stage == STAGE_PLAIN:
            logger.warning(
                f"{end}, before the first style prototypes would be used (step {self.next_step()}): all weights stay "
                f"1. Train for longer, or lower `prototype_start`, now {args.prototype_start} epochs."
            )
        elif self._update_step(0) >= max_steps and self.prototypes.stage < STAGE_UPDATED:
            logger.warning(
                f"{end}, before the style prototypes would be updated for the first time (step "
                f"{self._update_step(0)}): they stay as they are first built. Train for longer, or lower "
                f"`prototype_update_start`, now {args.prototype_update_start} epochs."
            )

    def next_step(self) -> int:
        """Optimizer step after which the next construction is due."""
        done = self._num_constructions + (self.pending is not None)
        return self.args.prototype_start * self._steps_per_epoch if done == 0 else self._update_step(done - 1)

    def _update_step(self, index: int) -> int:
        """Optimizer step after which update number `index` of the prototypes is due."""
        epoch = self.args.prototype_update_start + index * self.args.prototype_interval
        return epoch * self._steps_per_epoch

    def is_reached(self, step: int) -> bool:
        """
        Whether the next construction is due after `step`: not while another one waits to be used, and never after the
        last step, where nothing would use it.
        """
        return self.pending is None and self.next_step() <= step < self._max_steps

    def needs_statistics(self, step: int) -> bool:
        """Whether the batch of step `step` (0-based) lies in the interval before the next construction."""
        interval = self.args.prototype_interval * self._steps_per_epoch
        return self.next_step() < self._max_steps and step >= self.next_step() - interval

    def needs_columns(self, step: int, pairs_per_step: int) -> bool:
        """Whether the batch of step `step` will be among the last `reservoir_pairs` before the next construction."""
        remaining = self.next_step() - step
        return self.needs_statistics(step) and (remaining - 1) * pairs_per_step < self.args.reservoir_pairs

    # What

    def feedback_images(self, num_images: int) -> torch.Tensor | None:
        r"""
        Which of `num_images` validation images give the counterfactual feedback: one at random of each of
        `args.feedback_images` blocks of equal size, the same ones for every construction *(ours)*.

        A multiple of the number of processes is taken, so that blocks do not cross the borders between processes.

        Returns:
            `torch.Tensor` of shape `(chosen,)`, ascending, or None for all images.
        """
        args = self.args
        if args.feedback != "counterfactual" or args.feedback_images is None:
            return None
        count = -(-args.feedback_images // args.world_size) * args.world_size
        if count >= num_images:
            return None
        borders = torch.arange(count + 1) * num_images // count
        share = torch.rand(count, generator=torch.Generator().manual_seed(args.seed), dtype=torch.float64)
        return borders[:-1] + (share * borders.diff()).long()

    @torch.no_grad()
    def collect_statistics(self, agreement: torch.Tensor, valid: torch.Tensor) -> None:
        """Adds one batch of all processes to the statistics; see [`StylePrototypes.add_agreement`]."""
        self.prototypes.add_agreement(agreement, valid)

    @torch.no_grad()
    def collect_columns(self, image_columns: torch.Tensor, text_columns: torch.Tensor) -> None:
        """Adds columns `(pairs, dim, length)` of matched pairs and keeps the last `reservoir_pairs`."""
        self._columns.append((image_columns, text_columns))
        surplus = sum(len(images) for images, _ in self._columns) - self.args.reservoir_pairs
        while surplus >= len(self._columns[0][0]):
            surplus -= len(self._columns.pop(0)[0])
        if surplus > 0:
            images, texts = self._columns[0]
            self._columns[0] = (images[surplus:], texts[surplus:])

    def reservoir(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Image and text columns `(pairs, dim, length)` collected since the last construction."""
        if not self._columns:
            raise ValueError(
                "No columns were collected before the construction of prototypes; train for a step first."
            )
        images, texts = zip(*self._columns, strict=True)
        return torch.cat(images), torch.cat(texts)

    @torch.no_grad()
    def propose(self, rsum: float | None = None, score: Callable[[], float] | None = None) -> dict[str, float]:
        r"""
        Builds prototypes from what was collected, weighs them by the configured feedback, and queues the update.

        Args:
            rsum (`float`, *optional*): Validation rSum under the prototypes in use.
            score (`Callable`, *optional*):
                Gives the rSum of the same network and embeddings, those of `rsum`, under whatever prototypes the
                buffers hold when it is called.

        Returns:
            What to log: stage, gain, weight and how far the prototypes move.
        """
        prototypes = self.prototypes
        # One seed per construction: a resumed run draws what the uninterrupted one would have drawn.
        count = int(prototypes.num_constructions)
        generator = torch.Generator().manual_seed(self.args.seed + count)
        new = construct_prototypes(prototypes, *self.reservoir(), generator=generator)
        for name, tensor in new.tensors().items():
            # All processes computed the same from the same data; different hardware may still round differently.
            setattr(new, name, broadcast(tensor))
        old = PrototypeState.of(prototypes)
        gain = self._gain(new, rsum, score)
        log_sum = float(prototypes.feedback_log_sum)
        weight, log_sum = self._weight(gain, count, log_sum)
        self.pending, self.pending_log_sum = old.interpolate(new, weight), log_sum
        self.due = False
        self._columns.clear()
        prototypes.reset_statistics()
        report = {
            "prototype_stage": float(STAGE_INITIAL if count == 0 else STAGE_UPDATED),
            "prototype_feedback_weight": weight,
        }
        if gain is not None:
            report["prototype_feedback_gain"] = gain
        for side in ("visual", "textual"):
            before, after = getattr(old, f"{side}_prototypes"), getattr(self.pending, f"{side}_prototypes")
            scale = getattr(new, f"{side}_column_scale")
            report[f"{side}_prototype_movement"] = float(((after - before) / scale).norm(dim=1).mean())
        return report

    def _gain(self, new: PrototypeState, rsum: float | None, score: Callable[[], float] | None) -> float | None:
        if not self.args.feedback_needs_validation:
            return None
        if rsum is None or score is None:
            raise ValueError(f"feedback={self.args.feedback!r} needs a validation score, but none was given.")
        if self.args.feedback == "epoch_delta":
            return 0.0 if math.isnan(self.previous_rsum) else rsum - self.previous_rsum
        with self.using(new):
            return score() - rsum

    def _weight(self, gain: float | None, count: int, log_sum: float) -> tuple[float, float]:
        if gain is not None:
            if count > 0 and math.isinf(log_sum):
                # A run that was resumed with another feedback: earlier constructions count as gains of zero.
                log_sum = math.log(count)
            return feedback_weight(log_sum, gain, self.args.feedback_kappa)
        return (1.0 if count == 0 else self.args.feedback_weight), log_sum

    @contextmanager
    def using(self, state: PrototypeState) -> Iterator[None]:
        """Puts other prototypes into use for a while; the buffers are restored bit for bit."""
        prototypes = self.prototypes
        old, stage = PrototypeState.of(prototypes), prototypes.stage.clone()
        try:
            state.copy_to(prototypes)
            prototypes.stage.fill_(max(int(stage), STAGE_INITIAL))
            yield
        finally:
            old.copy_to(prototypes)
            prototypes.stage.copy_(stage)

    @torch.no_grad()
    def apply_pending(self) -> None:
        """Brings a queued update into use."""
        if self.pending is None:
            return
        prototypes = self.prototypes
        self.pending.copy_to(prototypes)
        prototypes.stage.fill_(STAGE_INITIAL if prototypes.num_constructions == 0 else STAGE_UPDATED)
        prototypes.num_constructions += 1
        self._num_constructions += 1
        prototypes.feedback_log_sum.fill_(self.pending_log_sum)
        self.pending = None

    def observe(self, rsum: float) -> None:
        """Notes the validation rSum of an evaluation, from which `feedback="epoch_delta"` takes its next gain."""
        self.previous_rsum = rsum

    # State

    def save(self, folder: str) -> None:
        """Writes all that is not in the model's buffers beside a checkpoint."""
        tensors = {
            "previous_rsum": torch.tensor(self.previous_rsum, dtype=torch.float64),
            "pending_log_sum": torch.tensor(self.pending_log_sum, dtype=torch.float64),
        }
        if self._columns:
            tensors["visual_columns"], tensors["textual_columns"] = self.reservoir()
        if self.pending is not None:
            tensors.update({f"pending.{name}": tensor for name, tensor in self.pending.tensors().items()})
        safetensors.torch.save_file(
            {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, os.path.join(folder, STATE_FILE)
        )

    def load(self, folder: str) -> None:
        """Reads what [`save`] wrote; a checkpoint without it (weights only) starts a fresh collection."""
        path = os.path.join(folder, STATE_FILE)
        self._num_constructions = int(self.prototypes.num_constructions)
        self.due, self.pending, self._columns, self.previous_rsum = False, None, [], math.nan
        if not os.path.isfile(path):
            logger.warning(f"{path} is missing: statistics collected before the checkpoint are lost.")
            return
        tensors = safetensors.torch.load_file(path)
        self.previous_rsum = float(tensors.pop("previous_rsum"))
        self.pending_log_sum = float(tensors.pop("pending_log_sum"))
        device = self.prototypes.visual_prototypes.device
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        if "visual_columns" in tensors:
            self._columns = [(tensors["visual_columns"], tensors["textual_columns"])]
        pending = {name.removeprefix("pending."): tensors[name] for name in tensors if name.startswith("pending.")}
        if pending:
            self.pending = PrototypeState(**pending)


__all__ = ["PrototypeConstruction"]
