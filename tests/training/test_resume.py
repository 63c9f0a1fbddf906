"""A resumed run is the uninterrupted run: weights, prototypes and log, bit for bit."""

from __future__ import annotations

import filecmp
import json
from pathlib import Path

import pytest
import torch
from tiny import assert_same_state, prototype_log, trainer, whole_log
from transformers import TrainerCallback

from modeling_pico import PicoModel
from modeling_pico.data import RandomCropFlip
from modeling_pico.training.staging import STATE_FILE


# Prototypes that change the score at once, so that gains, weights and gradients depend on them.
PURITY = {"style_probability": "purity"}
# 18 steps in six epochs; the first prototypes after epoch 1, updates after 3, 4 and 5.
SETTINGS = {
    "epochs": {"model_options": PURITY, "logging_steps": 4},
    "learned, with chance": {
        "model_options": {"dropout": 0.2},
        "transform": RandomCropFlip(0.6),
        "feedback": "epoch_delta",
    },
    "accumulation": {
        "model_options": PURITY,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "prototype_start": 1,
        "prototype_update_start": 2,
        "caption_sampling": "all",
        "dataloader_drop_last": False,
        "num_train_epochs": 4,
        "feedback_images": 5,
        "save_strategy": "steps",
        "save_steps": 3,
        "logging_steps": 3,
    },
    "every step": {
        "model_options": {**PURITY, "dropout": 0.2},
        "prototype_start": 1,
        "prototype_update_start": 2,
        "reservoir_pairs": 14,
        "save_strategy": "steps",
        "save_steps": 1,
        "num_train_epochs": 4,
        "feedback": "constant",
    },
    "steps that end epochs": {
        "model_options": {**PURITY, "dropout": 0.2, "uncertainty_config": {"num_prototypes": 2}},
        "logging_steps": 5,
        "prototype_update_start": 2,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "steps",
        "save_steps": 3,
        "num_train_epochs": 4,
        "feedback_images": 4,
    },
}
# With these there are checkpoints without an evaluation.
NOT_ALL_EVALUATED = ("accumulation", "every step")


class StopAfter(TrainerCallback):
    def __init__(self, epoch: int):
        self.epoch = epoch

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_training_stop = round(state.epoch) == self.epoch


@pytest.fixture(scope="module", params=list(SETTINGS))
def whole_run(request, tmp_path_factory):
    """An uninterrupted run that keeps all its checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    made = trainer(folder, **SETTINGS[request.param])
    made.train()
    return request.param, folder, made


def test_whole_run_changes_prototypes_with_weights_between_0_and_1(whole_run):
    _, _, made = whole_run
    log = prototype_log(made)
    assert len(log) >= 3
    assert any(0.02 < entry["prototype_feedback_weight"] < 0.98 for entry in log)
    assert all(entry["visual_prototype_movement"] > 0 for entry in log)


def test_resume_from_any_checkpoint_equals_the_whole_run(whole_run, tmp_path):
    name, folder, whole = whole_run
    options = SETTINGS[name]
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert len(checkpoints) >= 4
    held_back = 0
    for checkpoint in checkpoints[:-1]:
        resumed = trainer(tmp_path / checkpoint.name, **{**options, "save_strategy": "no"})
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert_same_state(resumed.model, whole.model)
        assert prototype_log(resumed) == prototype_log(whole)
        assert whole_log(resumed) == whole_log(whole)
        held_back += "pending.visual_prototypes" in _tensors(checkpoint)
    assert held_back  # some checkpoints were written while an update waited


@pytest.fixture(scope="module")
def five_epochs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("five_epochs")
    made = trainer(folder, num_train_epochs=5, model_options=PURITY)
    made.train()
    return folder, made


@pytest.mark.parametrize("epoch", [1, 3, 4])
def test_stopped_run_leaves_the_checkpoint_of_the_whole_run(five_epochs, epoch, tmp_path):
    """Thereby the test above, which resumes where the whole run passed by, speaks of stopped runs as well."""
    folder, whole = five_epochs
    options = {"num_train_epochs": 5, "model_options": PURITY}
    stopped = trainer(tmp_path, callbacks=[StopAfter(epoch)], **options)
    stopped.train()
    assert stopped.state.global_step == 3 * epoch
    name = f"checkpoint-{3 * epoch}"
    for file in ("model.safetensors", STATE_FILE, "scheduler.pt"):
        assert filecmp.cmp(folder / name / file, tmp_path / name / file, shallow=False)
    resumed = trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same_state(resumed.model, whole.model)
    assert whole_log(resumed) == whole_log(whole)


def test_update_stays_out_of_the_checkpoint_of_its_evaluation(whole_run):
    name, folder, whole = whole_run
    if name in NOT_ALL_EVALUATED:
        pytest.skip("not every checkpoint is evaluated")
    logged = {entry["step"]: entry["eval_rsum"] for entry in whole.state.log_history if "eval_rsum" in entry}
    net_options = SETTINGS[name]["model_options"]
    for checkpoint in folder.glob("checkpoint-*"):
        step = int(checkpoint.name.split("-")[1])
        loaded = PicoModel.from_pretrained(checkpoint)
        assert loaded.style_prototypes.num_constructions <= len(prototype_log(whole))
        evaluation = trainer(folder / "unused", net=loaded, model_options=net_options).evaluate()
        assert evaluation["eval_rsum"] == logged[step]


def test_held_back_update_is_used_in_the_very_next_step(tmp_path):
    seen: dict[int, torch.Tensor] = {}

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            seen[state.global_step] = model.style_prototypes.visual_prototypes.clone()

    made = trainer(tmp_path, num_train_epochs=2, callbacks=[Watch()], model_options=PURITY)
    made.train()
    tensors = _tensors(tmp_path / "checkpoint-3")
    saved = PicoModel.from_pretrained(tmp_path / "checkpoint-3").style_prototypes
    assert saved.stage == 0 and not saved.visual_prototypes.any()
    assert not seen[2].any()
    assert torch.equal(seen[3], tensors["pending.visual_prototypes"])
    assert seen[3].any()


def test_checkpoint_without_the_construction_state_warns_and_trains_on(tmp_path, monkeypatch):
    trainer(tmp_path, num_train_epochs=3).train()
    (tmp_path / "checkpoint-3" / STATE_FILE).unlink()
    warnings: list[str] = []
    monkeypatch.setattr("modeling_pico.training.staging.logger.warning", warnings.append)
    resumed = trainer(tmp_path, num_train_epochs=3, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    # Beside it stands the warning of a training too short for updates.
    assert sum(STATE_FILE in warning for warning in warnings) == 1
    assert resumed.state.global_step == 9
    assert len(prototype_log(resumed)) == 2  # the lost one was logged before the checkpoint; it is built again


def _tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    return load_file(checkpoint / STATE_FILE)
