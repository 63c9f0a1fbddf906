"""A plain model of transformers under [`DurableTrainer`]: killed, asked to end, out of disk, and resumed exactly."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from interruption import Terminate
from plain import model, trainer
from safetensors.torch import load_file
from tiny import assert_same_state, whole_log
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments, ViTForImageClassification

import modeling_pico
from modeling_pico.durable import DurableTrainer, end_with_training_only
from modeling_pico.durable.files import LOCK_FILE, UNFINISHED_FOLDER, last_checkpoint
from modeling_pico.training import PicoTrainer


BEST = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the lock of a run in progress."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != LOCK_FILE)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# The house


# Private methods of `Trainer` that are overridden: each one may change with any release of transformers.
OVERRIDDEN = {
    "_finalize_training",
    "_get_grad_norm",
    "_get_output_dir",
    "_load_best_model",
    "_load_from_checkpoint",
    "_prepare_for_training",
    "_push_from_checkpoint",
    "_save_checkpoint",
}


def test_few_private_methods_of_the_trainer_are_overridden():
    private = {name for name in vars(Trainer) if name.startswith("_") and not name.startswith("__")}
    overridden = {name for part in PicoTrainer.__mro__ if issubclass(part, DurableTrainer) for name in vars(part)}
    assert overridden & private == OVERRIDDEN


def test_it_knows_nothing_of_pico():
    package = Path(modeling_pico.__file__).parent
    lines = [line for file in (package / "durable").glob("*.py") for line in file.read_text().splitlines()]
    imports = {line.split(" import ")[0] for line in lines if line.startswith(("from .", "from modeling_pico"))}
    assert {line for line in imports if not line.startswith("from .") or line.startswith("from ..")} == {
        "from ..distributed"
    }
    assert "from ." not in (package / "distributed.py").read_text()


# Resuming


class Summing(DurableTrainer):
    """Keeps a number of its own: the sum of all losses."""

    total = 0.0

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.total += float(loss)
        return loss

    def checkpoint_state(self, folder):
        Path(folder, "large").write_text(str(self.total))
        return {"total": self.total}

    def load_checkpoint_state(self, folder, states):
        assert [float(Path(folder, "large").read_text())] == [state["total"] for state in states]
        self.total = states[0]["total"]


# Steps of one and of two batches, checkpoints within and at the end of epochs, with and without an evaluation.
SETTINGS = {
    "epochs": {},
    "steps": {"save_strategy": "steps", "save_steps": 1, "logging_steps": 4, "eval_strategy": "no"},
    "steps that end epochs": {"save_strategy": "steps", "save_steps": 3, "logging_steps": 5},
    "accumulation": {
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 3,
        "save_strategy": "steps",
        "save_steps": 2,
        "dataloader_num_workers": 1,
    },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_resumed_from_any_checkpoint_is_the_uninterrupted_one(tmp_path, name):
    options = {"num_train_epochs": 3, **SETTINGS[name]}
    whole = trainer(tmp_path / "whole", trainer_class=Summing, **options)
    output = whole.train()
    checkpoints = sorted((tmp_path / "whole").glob("checkpoint-*"))
    assert len(checkpoints) >= 3
    for checkpoint in checkpoints:
        resumed = trainer(tmp_path / "resumed", trainer_class=Summing, **{**options, "save_strategy": "no"})
        again = resumed.train(resume_from_checkpoint=str(checkpoint))
        assert_same_state(resumed.model, whole.model)
        assert whole_log(resumed) == whole_log(whole)
        assert (again.training_loss, resumed.total) == (output.training_loss, whole.total)


def test_weights_come_back_under_the_names_of_the_model(tmp_path):
    whole = trainer(tmp_path, **BEST)
    whole.train()
    saved = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert saved.keys() != whole.model.state_dict().keys()  # and so `load_state_dict` would leave some out
    best = ViTForImageClassification.from_pretrained(whole.state.best_model_checkpoint)
    assert_same_state(whole.model, best)


def test_a_finished_run_that_is_resumed_trains_no_further(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 4}
    made = trainer(tmp_path, **options)
    made.train()
    resumed = trainer(tmp_path, **options)
    output = resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert_same_state(resumed.model, made.model)
    assert whole_log(resumed) == whole_log(made)
    assert output.training_loss == made.state.log_history[-1]["train_loss"] > 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> DurableTrainer:
    """An uninterrupted run with checkpoints after steps 3 and 6."""
    made = trainer(tmp_path_factory.mktemp("whole"))
    made.train()
    return made


@pytest.fixture
def run(whole) -> Path:
    return Path(whole.args.output_dir)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state", "progress.json"])
@pytest.mark.parametrize("by", ["name", "choice"])
def test_a_checkpoint_from_which_a_run_would_not_go_on_exactly_is_refused(run, tmp_path, name, by):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    (folder / "checkpoint-6" / {"rng_state": "rng_state.pth"}.get(name, name)).unlink()
    before = contents(folder)
    with pytest.raises(ValueError, match=f"checkpoint-6' lacks {name}, so .* not go on .* save_only_model.*Delete"):
        trainer(folder).train(resume_from_checkpoint=by == "choice" or str(folder / "checkpoint-6"))
    assert contents(folder) == before


def test_checkpoints_of_the_model_alone_are_refused_with_all_they_lack(tmp_path):
    made = trainer(tmp_path, max_steps=3, save_only_model=True)
    made.train()
    with pytest.raises(ValueError, match="lacks optimizer.pt, scheduler.pt, rng_state, progress.json, so"):
        made.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("state", [None, "", '{"global_step": 1', "{}", "[]", '{"global_step": "x"}', '{"other": 1}'])
def test_incomplete_checkpoints_are_refused(tmp_path, state):
    made = trainer(tmp_path)
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        made.train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-3").mkdir()
    if state is not None:
        (tmp_path / "checkpoint-3" / "trainer_state.json").write_text(state)
    with pytest.raises(ValueError, match=r"checkpoint-3' is not a complete checkpoint: it lacks .*delete this one"):
        made.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(("name", "sharded"), [("optimizer.bin", False), ("optimizer.pt", True)])
def test_fsdp_and_other_checkpoints_are_not_mixed(run, tmp_path, name, sharded):
    folder = Path(shutil.copytree(run / "checkpoint-6", tmp_path / "checkpoint-6"))
    (folder / "optimizer.pt").rename(folder / name)
    made = trainer(tmp_path)
    made.is_fsdp_enabled = sharded
    with pytest.raises(ValueError, match="checkpoint-6' lacks optimizer.*FSDP.* by their own launch alone"):
        made.train(resume_from_checkpoint=True)


def test_the_checkpoint_of_transformers_on_sigterm_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`enable_jit_checkpoint`: SIGTERM writes a checkpoint in any case"):
        DurableTrainer(model(), TrainingArguments(str(tmp_path), use_cpu=True, enable_jit_checkpoint=True))


# The disk


def fail(error: BaseException):
    def raising(*args, **kwargs):
        raise error

    return raising


class FailAtSecondSave(TrainerCallback):
    """Breaks a function once the first checkpoint is written."""

    def __init__(self, monkeypatch, target: str, error: BaseException):
        self.act = lambda: monkeypatch.setattr(target, fail(error))

    def on_save(self, args, state, control, **kwargs):
        self.before = contents(Path(args.output_dir))
        self.act()


@pytest.mark.parametrize(
    "target",
    [
        "transformers.modeling_utils.safe_save_file",
        "torch.save",
        "pathlib.Path.write_text",
        "transformers.TrainerState.save_to_json",
        "os.fsync",
        "pathlib.Path.rename",
    ],
)
def test_a_full_disk_leaves_the_earlier_checkpoint_and_nothing_of_the_new_one(target, tmp_path, monkeypatch):
    callback = FailAtSecondSave(monkeypatch, target, OSError(errno.ENOSPC, "No space left on device"))
    made = trainer(tmp_path, callbacks=[callback], save_total_limit=1)
    with pytest.raises(OSError) as error:
        made.train()
    monkeypatch.undo()
    message = str(error.value)
    for words in (
        f"The checkpoint {tmp_path}/checkpoint-6 could not be written",
        "No space left on device",
        f"the newest is {tmp_path}/checkpoint-3",
        "resume_from_checkpoint",
    ):
        assert words in message
    assert contents(tmp_path) == callback.before and names(tmp_path) == ["checkpoint-3"]
    assert made.state.best_model_checkpoint is None


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / UNFINISHED_FOLDER).write_text("a file where the folder should be")
    with pytest.raises(OSError, match=r"checkpoint-3 could not be written \(.*earlier checkpoints.*there is none yet"):
        trainer(tmp_path).train()


class FillDisk(TrainerCallback):
    """Leaves a few kilobytes after the first checkpoint."""

    def on_save(self, args, state, control, **kwargs):
        room = os.statvfs(args.output_dir)
        Path(args.output_dir, "filler").write_bytes(b"x" * (room.f_bavail * room.f_frsize - 20_000))


def test_a_disk_that_is_really_full(whole, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("a small disk can only be mounted by root")
    try:
        with pytest.raises(OSError, match="checkpoint-6 could not be written.*the newest is .*checkpoint-3"):
            trainer(disk, callbacks=[FillDisk()], save_total_limit=1).train()
        assert names(disk) == ["checkpoint-3", "filler"]
        (disk / "filler").unlink()
        resumed = trainer(disk, save_total_limit=1)
        resumed.train(resume_from_checkpoint=True)
        assert names(disk) == ["checkpoint-6"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert_same_state(resumed.model, whole.model)
    assert whole_log(resumed) == whole_log(whole)


def test_running_out_of_memory_is_not_called_a_full_disk(tmp_path, monkeypatch):
    callback = FailAtSecondSave(monkeypatch, "torch.save", torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        trainer(tmp_path, callbacks=[callback]).train()


def test_a_model_in_the_output_folder_is_replaced_as_a_whole(tmp_path, monkeypatch):
    made = trainer(tmp_path)
    made.save_model()
    before = contents(tmp_path)
    with torch.no_grad():
        made.model.classifier.bias.add_(1.0)
    monkeypatch.setattr(os, "fsync", fail(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match=f"The model in {tmp_path} could not be written .*No space"):
        made.save_model()
    monkeypatch.undo()
    assert contents(tmp_path) == before
    made.save_model()
    assert_same_state(ViTForImageClassification.from_pretrained(tmp_path), made.model)
    assert not (tmp_path / UNFINISHED_FOLDER).exists()


def test_best_and_newest_stay_with_a_limit_of_one(tmp_path, monkeypatch):
    scores = iter([5.0, 1.0, 9.0, 8.0])

    def evaluate(self, *args, **kwargs):
        metrics = {"eval_loss": next(scores)}
        self.log(metrics)
        return metrics

    monkeypatch.setattr(DurableTrainer, "evaluate", evaluate)
    made = trainer(tmp_path, **BEST, save_total_limit=1, num_train_epochs=4)
    made.train()
    assert names(tmp_path) == ["checkpoint-12", "checkpoint-6"] and made.args.save_total_limit == 1
    for step in (6, 12):
        state = TrainerState.load_from_json(tmp_path / f"checkpoint-{step}" / "trainer_state.json")
        assert state.best_model_checkpoint == str(tmp_path / "checkpoint-6")
    assert_same_state(made.model, ViTForImageClassification.from_pretrained(tmp_path / "checkpoint-6"))


def test_a_best_checkpoint_that_is_gone_does_not_end_the_training(tmp_path):
    made = trainer(tmp_path)
    made.state.best_model_checkpoint = str(tmp_path / "checkpoint-3")
    made._load_best_model()  # `Trainer` warns


# Being asked to end


# The third step ends an epoch, whose evaluation and checkpoint belong to it.
@pytest.mark.parametrize(
    ("event", "step", "saved"),
    [("on_step_begin", 0, 1), ("on_optimizer_step", 3, 4), ("on_step_end", 3, 3), ("on_prediction_step", 3, 3)],
)
@pytest.mark.parametrize("strategy", ["epoch", "no"])
def test_sigterm_writes_a_checkpoint_first(whole, tmp_path, monkeypatch, event, step, saved, strategy):
    warnings: list[str] = []
    monkeypatch.setattr("modeling_pico.durable.trainer.logger.warning", warnings.append)
    with pytest.raises(SystemExit) as stop:
        trainer(tmp_path, callbacks=[Terminate(event, step)], save_strategy=strategy).train()
    assert stop.value.code == 143
    if strategy == "no" and event == "on_prediction_step":
        saved += 1  # nothing is saved after that evaluation
    assert f"stops after step {saved} of 6" in warnings[0] and str(tmp_path) in warnings[0]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert last_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{saved}")
    monkeypatch.undo()
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert_same_state(resumed.model, whole.model)
    assert whole_log(resumed) == whole_log(whole)


@pytest.mark.parametrize("strategy", ["epoch", "no"])
def test_sigterm_after_the_last_step_ends_the_process_too(tmp_path, strategy):
    made = trainer(tmp_path, callbacks=[Terminate("on_train_end", 6)], save_strategy=strategy)
    with pytest.raises(SystemExit) as stop:
        made.train()
    assert stop.value.code == 143
    assert_same_state(made.model, ViTForImageClassification.from_pretrained(tmp_path / "checkpoint-6"))


def test_a_handler_of_the_program_stays(tmp_path):
    heard = []
    signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    try:
        made = trainer(tmp_path, callbacks=[Terminate("on_step_begin", 1)])
        made.train()
        assert heard == [1] and made.state.global_step == 6
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def stay(start) -> None:
    start(0)
    time.sleep(60)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers are not told apart from the training")
def test_workers_of_a_fork_server_end_with_the_training():
    worker = multiprocessing.get_context("forkserver").Process(target=stay, args=(end_with_training_only,))
    worker.start()
    while worker.is_alive() and "S (sleeping)" not in Path(f"/proc/{worker.pid}/status").read_text():
        time.sleep(0.1)
    time.sleep(0.5)
    os.kill(worker.pid, 0)
    worker.terminate()
    worker.join(20)
    assert worker.exitcode is not None


# Results


def test_metrics_are_added_to_those_of_earlier_calls(tmp_path):
    made = trainer(tmp_path)
    made.save_metrics("eval", {"b": 1.5})
    made.save_metrics("test", {"a": 2})
    assert json.loads((tmp_path / "all_results.json").read_text()) == {"a": 2, "b": 1.5}
    assert json.loads((tmp_path / "test_results.json").read_text()) == {"a": 2}
    assert names(tmp_path) == ["all_results.json", "eval_results.json", "test_results.json"]


def test_results_of_a_split_of_any_name_are_kept(tmp_path):
    made = trainer(tmp_path / "run")
    made.save_metrics("eval", {"a": 1.5})
    for split in ("all", "near/unseen", "../../up", "![i](http://a/b.png)"):
        made.save_metrics(split, {split: 2.5})
    assert sorted(json.loads((tmp_path / "run" / "all_results.json").read_text())) == sorted(
        ["a", "all", "near/unseen", "../../up", "![i](http://a/b.png)"]
    )
    assert {"near_unseen_results.json", ".._.._up_results.json"} <= set(names(tmp_path / "run"))


@pytest.mark.parametrize("content", ['{"a": 1', "[1, 2]", "", "null"])
def test_unreadable_results_are_no_reason_to_lose_new_ones(tmp_path, caplog, content):
    (tmp_path / "all_results.json").write_text(content)
    trainer(tmp_path).save_metrics("eval", {"b": 1.5})
    assert json.loads((tmp_path / "all_results.json").read_text()) == {"b": 1.5}
    assert "all_results.json does not hold metrics by name, and is written anew" in caplog.text
