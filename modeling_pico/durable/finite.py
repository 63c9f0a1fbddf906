"""Steps whose loss or gradient is NaN or infinite: training stops before such a step, or leaves it out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.utils import logging

from ..distributed import gather, gather_object


logger = logging.get_logger(__name__)

NON_FINITE_LOSSES = ("stop", "skip")
# So many steps left out one after another are no accident of the data; training stops then as well.
MAX_SKIPPED_IN_A_ROW = 10


class NonFiniteLossError(FloatingPointError):
    """The loss or its gradient is NaN or infinite. The message names the batch; the weights are as before the step."""


class FiniteLossCallback(TrainerCallback):
    """
    Judges every optimizer step just before it is taken, so that no weight and no checkpoint ever becomes NaN: `action`
    `"stop"` raises [`NonFiniteLossError`], `"skip"` leaves the step out, warns, and logs the count.

    Once a step, and not once a micro-batch: all forward and backward passes are under way by then, and a device is
    waited for once. The norm of the gradient says it all, and says the same to all processes, since
    [`spread_non_finite`] makes the gradient NaN where the loss is. Only under loss scaling (fp16), where infinite
    gradients belong to the search for the scale and the scaler leaves such steps out itself, processes ask each other
    for their losses. `describe` says, on all processes, what the inputs of the micro-batches to blame were.
    """

    def __init__(
        self,
        action: str,
        describe: Callable[[list[dict[str, Any]]], str],
        log: Callable[[dict[str, float]], None],
    ):
        self.action = action
        self.describe = describe
        self.log = log
        self.grad_norm: Any = None  # of the step; None under loss scaling
        self.skipped = 0
        self._in_a_row = 0
        self._noted: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def note(self, loss: torch.Tensor, inputs: dict[str, Any]) -> None:
        """Takes the loss of a micro-batch and what it was computed from."""
        self._noted.append((loss.detach(), inputs))

    def on_train_begin(self, args, state, control, **kwargs):
        logged = [entry["skipped_steps"] for entry in state.log_history if "skipped_steps" in entry]
        self.skipped = int(logged[-1]) if logged else 0
        self._in_a_row = 0
        self._noted.clear()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        noted, self._noted = self._noted, []
        if self.grad_norm is None:
            finite = gather(torch.stack([loss for loss, _ in noted]).isfinite().all()[None].to(torch.uint8)).all()
        else:
            finite = math.isfinite(self.grad_norm)
        if finite:
            self._in_a_row = 0
            return
        message = self._message(state.global_step + 1, noted)
        self._in_a_row += 1
        if self.action == "stop":
            raise NonFiniteLossError(f"{message} `non_finite_loss='skip'` leaves such steps out.")
        if self._in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise NonFiniteLossError(f"{message} It is the {self._in_a_row}th step in a row.")
        self.skipped += 1
        logger.warning(f"{message} The step is left out; {self.skipped} so far.")
        # Without gradients an optimizer leaves weights, momentum and decay alone.
        model.zero_grad(set_to_none=True)
        self.log({"skipped_steps": self.skipped})

    def _message(self, step: int, noted: list[tuple[torch.Tensor, dict[str, Any]]]) -> str:
        bad = [(loss, inputs) for loss, inputs in noted if not loss.isfinite()]
        values = gather_object([float(loss) for loss, _ in bad])
        what = f"loss ({', '.join(map(str, values))})" if values else f"gradient (norm {float(self.grad_norm)})"
        # Finite losses: the gradient is to blame, and with it every micro-batch.
        inputs = [inputs for _, inputs in (bad if values else noted)]
        return f"The {what} of step {step} is not finite. {self.describe(inputs)}"


def spread_non_finite(loss: torch.Tensor) -> torch.Tensor:
    """The loss, bit for bit; if it is NaN or infinite, every gradient becomes NaN, here and on all processes."""
    return loss * torch.where(loss.isfinite(), 1.0, torch.nan)


__all__ = ["NON_FINITE_LOSSES", "FiniteLossCallback", "NonFiniteLossError", "spread_non_finite"]
