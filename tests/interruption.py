"""Asks a training to end."""

from __future__ import annotations

import os
import signal

from transformers import TrainerCallback


class Terminate(TrainerCallback):
    """Sends SIGTERM to the own process at one moment."""

    def __init__(self, event: str, step: int):
        self.step = step
        setattr(self, event, self.act)

    def act(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)
