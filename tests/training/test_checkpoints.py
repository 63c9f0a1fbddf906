"""A training whose prototypes are under construction is killed, asked to end, and goes on as if nothing had been."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from interruption import Terminate
from tiny import assert_same_state, trainer, whole_log

from modeling_pico.durable.files import last_checkpoint


QUICK = {"num_train_epochs": 2, "logging_steps": 2, "model_options": {"dropout": 0.1}}


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


class TerminateJob(Terminate):
    """Sends SIGTERM to every process of the group, as a scheduler does."""

    def act(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.killpg(0, signal.SIGTERM)


def train_as_a_job(folder: Path) -> None:
    os.setsid()
    options = {"eval_data": None, "eval_strategy": "no", "feedback": "constant", "dataloader_num_workers": 2}
    trainer(folder, callbacks=[TerminateJob("on_step_begin", 1)], **options).train()


def test_workers_end_with_the_training_when_the_whole_job_is_asked_to_end(tmp_path):
    job = multiprocessing.get_context("forkserver").Process(target=train_as_a_job, args=(tmp_path,))
    job.start()
    job.join(120)
    assert job.exitcode == 143
    # After the step in progress.
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
