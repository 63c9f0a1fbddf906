"""A training whose prototypes are under construction is killed, asked to end, and goes on as if nothing had been."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import assert_same_state, trainer, whole_log
from transformers import TrainerCallback

from modeling_pico.durable.files import last_checkpoint


BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "interruptions.py"
QUICK = {"num_train_epochs": 2, "logging_steps": 2, "model_options": {"dropout": 0.1}}


class Terminate(TrainerCallback):
    """Sends SIGTERM to the own process at one moment."""

    def __init__(self, event: str, step: int):
        self.step = step
        setattr(self, event, self.act)

    def act(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    made = trainer(tmp_path_factory.mktemp("whole"), **QUICK)
    made.train()
    return made


@pytest.mark.parametrize(("event", "saved"), [("on_step_begin", 3), ("on_prediction_step", 3), ("on_step_end", 2)])
def test_sigterm_leaves_a_checkpoint_with_the_construction(whole, tmp_path, event, saved):
    step = saved - 1 if event == "on_step_begin" else saved
    with pytest.raises(SystemExit) as stop:
        trainer(tmp_path, callbacks=[Terminate(event, step)], **QUICK).train()
    assert stop.value.code == 143
    assert last_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{saved}")
    resumed = trainer(tmp_path, **QUICK)
    resumed.train(resume_from_checkpoint=True)
    assert_same_state(resumed.model, whole.model)
    assert whole_log(resumed) == whole_log(whole)


def test_workers_end_with_the_training_when_the_whole_job_is_asked_to_end(tmp_path):
    """The signal goes to every process of the group, as a scheduler sends it."""
    script = (
        "import os, signal\n"
        "from tiny import trainer\n"
        "from test_checkpoints import Terminate\n"
        "class All(Terminate):\n"
        "    def act(self, args, state, control, **kwargs):\n"
        "        if state.global_step == self.step:\n"
        "            os.killpg(0, signal.SIGTERM)\n"
        f"trainer({str(tmp_path)!r}, callbacks=[All('on_step_begin', 1)], eval_data=None, eval_strategy='no',\n"
        "        dataloader_num_workers=2, feedback='constant').train()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parent,
        start_new_session=True,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 143, done.stderr[-3000:]
    assert "stops after step 2 of 18" in done.stderr
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_killed_trainings_end_as_the_uninterrupted_one():
    """Few kills here; `--kills 50` for many."""
    command = [sys.executable, str(BENCHMARK), "--kills", "4", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert re.search(r"4 kills; [1-9] trainings ended equal", done.stdout)
