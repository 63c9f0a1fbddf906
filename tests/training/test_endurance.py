"""A short form of the benchmark `endurance.py`, and what it would say of a run that leaks."""

from __future__ import annotations

import os

import pytest
from held_resources import Reading, ResourceWatch, growth, problems, train_and_watch
from tiny import trainer
from transformers import TrainerCallback


def test_a_run_holds_no_more_files_threads_and_processes_at_its_end_than_when_warm(tmp_path):
    watch = train_and_watch(tmp_path, steps=100, interval=10, every=25)
    readings = watch.readings
    assert [reading.step for reading in readings] == list(range(0, 100, 10))
    log = watch.made.state.log_history
    assert sum("eval_rsum" in entry for entry in log) == 4 and sum("prototype_stage" in entry for entry in log) == 5
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2
    # The worker was there, and is gone although the trainer is not.
    assert all(reading.children == 1 for reading in readings[1:])
    readings.append(watch.read(100))
    assert problems(readings, growth(readings[:-1]), tolerance=5.0) == []


class Leak(TrainerCallback):
    """Keeps files open."""

    def __init__(self):
        self.kept: list[int] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.kept.append(os.open(os.devnull, os.O_RDONLY))


def test_a_leak_is_noticed(tmp_path):
    leak = Leak()
    watch = ResourceWatch(2)
    made = trainer(tmp_path, max_steps=16, eval_strategy="no", save_strategy="no", feedback="constant")
    made.add_callback(watch)
    made.add_callback(leak)
    made.train()
    for descriptor in leak.kept:
        os.close(descriptor)
    assert growth(watch.readings)["files"] == 8
    assert problems(watch.readings, growth(watch.readings), tolerance=50.0) == ["files grew by 8"]


@pytest.mark.parametrize(
    ("resident", "children", "expected"),
    [
        ([50, 100, 100, 100, 100, 100, 101, 102], 0, []),
        ([50, 100, 100, 100, 101, 102, 103, 104], 0, ["resident memory grew by 3.5%, more than 2.0%"]),
        ([100] * 8, 2, ["2 child processes are left after the end"]),
    ],
)
def test_growth_and_problems_by_hand(resident, children, expected):
    readings = [Reading(step, 0.0, float(value), 9, 3, 1) for step, value in enumerate(resident)]
    end = Reading(8, 0.0, 100.0, 9, 3, children)
    assert problems([*readings, end], growth(readings), 2.0) == expected
