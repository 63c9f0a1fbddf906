from __future__ import annotations

import pytest
import torch
from transformers import TrainerControl, TrainerState

from modeling_pico.model.alignment_heads_pico import PicoHead
from modeling_pico.training import PicoTrainingArguments, PrototypeConstruction, callbacks
from modeling_pico.training.callbacks import PrototypeCallback


class Schedule:
    """A callback for epochs of 10 steps of 4 pairs, and a training of 100 steps."""

    def __init__(self, tiny_config, folder, max_steps: int = 100, pairs_per_step: int = 4, **options):
        self.args = PicoTrainingArguments(
            str(folder), use_cpu=True, report_to=[], **{"feedback": "constant", "reservoir_pairs": 8, **options}
        )
        self.state = TrainerState(max_steps=max_steps)
        self.construction = PrototypeConstruction(PicoHead(tiny_config()).style_prototypes, self.args)
        self.built: list[int] = []
        self.callback = PrototypeCallback(self.construction, pairs_per_step, self._construct)
        self.begin()

    def begin(self) -> None:
        self.callback.on_train_begin(self.args, self.state, TrainerControl(), train_dataloader=range(10))

    def _construct(self) -> None:
        self.built.append(self.state.global_step)
        self.construction.num_constructions += 1
        self.construction.pending = dict(self.construction.prototypes.named_buffers())

    def collecting(self, steps: range) -> tuple[list[int], list[int]]:
        """Steps (0-based) that collect statistics, and those that collect columns."""
        statistics, columns = [], []
        for step in steps:
            self.state.global_step = step
            self.callback.on_step_begin(self.args, self.state, TrainerControl())
            statistics += [step] if self.construction.collects_statistics else []
            columns += [step] if self.construction.collects_columns else []
        return statistics, columns

    def run(self, **control) -> None:
        """All steps and epochs; `control` is that of steps that end an epoch."""
        for step in range(1, self.state.max_steps + 1):
            self.callback.on_step_begin(self.args, self.state, TrainerControl())
            self.state.global_step, self.state.epoch = step, step / 10
            ends = step % 10 == 0
            self.callback.on_step_end(self.args, self.state, TrainerControl(**control) if ends else TrainerControl())
            if ends:
                self.callback.on_epoch_end(self.args, self.state, TrainerControl())


@pytest.fixture
def schedule(tiny_config, tmp_path):
    return lambda **options: Schedule(tiny_config, tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [20, 40, 50, 60, 70, 80, 90]),
        ({"prototype_start": 1, "prototype_update_start": 2}, [10, 20, 30, 40, 50, 60, 70, 80, 90]),
        ({"prototype_interval": 2}, [20, 40, 60, 80]),
        # Nothing is built after the last step, where nothing would use it.
        ({"max_steps": 60}, [20, 40, 50]),
        ({"max_steps": 20}, []),
    ],
)
@pytest.mark.parametrize("control", [{}, {"should_save": True}, {"should_evaluate": True}])
def test_schedule(schedule, options, steps, control):
    made = schedule(**options)
    made.run(**control)
    assert made.built == steps


def test_an_evaluation_that_follows_builds_the_prototypes(schedule):
    made = schedule(feedback="counterfactual")
    made.state.global_step, made.state.epoch = 20, 2.0
    made.callback.on_step_end(made.args, made.state, TrainerControl(should_evaluate=True))
    assert made.construction.due and not made.built
    made.callback.on_step_end(made.args, made.state, TrainerControl(should_save=True))
    assert not made.construction.due and made.built == [20]


def test_windows_of_collection(schedule):
    # Statistics over the epoch before step 20; columns from the last two batches of four pairs.
    assert schedule().collecting(range(20)) == (list(range(10, 20)), [18, 19])
    assert schedule(pairs_per_step=3).collecting(range(20))[1] == [17, 18, 19]
    assert schedule(pairs_per_step=100).collecting(range(20))[1] == [19]
    # The reservoir is no longer than the interval.
    assert schedule(reservoir_pairs=1000).collecting(range(20))[1] == list(range(10, 20))
    # Overdue, as where a step was missed, it goes on.
    assert schedule().collecting(range(20, 25))[0] == list(range(20, 25))
    assert schedule(max_steps=20).collecting(range(20)) == ([], [])
    made = schedule()
    made.construction.num_constructions = 1
    assert made.collecting(range(20, 40))[0] == list(range(30, 40))


def test_a_step_reads_nothing_of_the_device(schedule):
    made = schedule()
    for prototypes in made.construction.prototypes.values():
        # A tensor without values stands for one whose reading would wait for the device.
        prototypes.stage = torch.zeros((), dtype=torch.int64, device="meta")
    assert made.collecting(range(20))[1] == [18, 19]


def test_a_training_too_short_for_prototypes_warns(schedule, monkeypatch):
    messages: list[str] = []
    monkeypatch.setattr(callbacks.logger, "warning", messages.append)
    schedule(max_steps=41)
    assert messages == []
    schedule(max_steps=20)
    made = schedule(max_steps=21)
    none, once = messages
    assert "ends at step 20 (epoch 2)" in none and "`prototype_start`, now 2 epochs" in none
    assert "ends at step 21 (epoch 2.1)" in once and "for the first time (step 40)" in once
    assert "`prototype_update_start`, now 4 epochs" in once
    # A run that is resumed after its updates has had them.
    made.construction.num_constructions = 2
    made.begin()
    assert len(messages) == 2
