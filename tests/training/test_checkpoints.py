"""Checkpoints are complete or absent: whenever a run dies, is asked to end, or finds no room on the disk."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import assert_same_state, trainer, whole_log
from transformers import TrainerCallback, TrainerState

from modeling_pico import PicoModel
from modeling_pico.training.checkpoint_files import (
    UNFINISHED,
    clean_up,
    discard,
    is_complete,
    last_checkpoint,
    put_in_place,
    rotate,
    write_text,
)
from modeling_pico.training.run_lock import LOCK_FILE
from modeling_pico.training.signals import heed_only_parent


BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "interruptions.py"
QUICK = {"num_train_epochs": 2, "logging_steps": 2}


class Killed(BaseException):
    """The process ends here."""


def make(folder: Path, content: str = "") -> Path:
    """A folder that passes for a checkpoint."""
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text(content)
    (folder / "trainer_state.json").write_text('{"global_step": 3}')
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the lock of a run in progress."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != LOCK_FILE)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# Folders


def test_last_checkpoint_is_the_newest_complete_one(tmp_path):
    assert last_checkpoint(tmp_path / "nowhere") is None
    assert last_checkpoint(tmp_path) is None
    make(tmp_path / "checkpoint-9")
    make(tmp_path / "checkpoint-10")
    make(tmp_path / "checkpoint-11-copy")
    make(tmp_path / UNFINISHED / "checkpoint-12")
    (tmp_path / "checkpoint-13").mkdir()
    (make(tmp_path / "checkpoint-14") / "trainer_state.json").write_text('{"global_step": 1')
    (tmp_path / "checkpoint-15").write_text("a file")
    for number, state in enumerate(("{}", "[]", '{"global_step": 0}', '{"global_step": "x"}', '{"unheard_of": 1}')):
        (make(tmp_path / f"checkpoint-{number + 16}") / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


@pytest.mark.parametrize("exists", [False, True], ids=["new", "replaced"])
@pytest.mark.parametrize("operation", ["fsync", "rename", "rmtree"])
def test_a_death_between_any_two_steps_leaves_the_old_or_the_new(tmp_path, monkeypatch, exists, operation):
    owner = {"fsync": os, "rename": Path, "rmtree": shutil}[operation]
    original = getattr(owner, operation)
    seen = set()
    for when in range(1, 8):
        for after in (False, True):
            run = tmp_path / f"{when}{after}"
            make(run / "checkpoint-3", "earlier")
            if exists:
                make(run / "checkpoint-6", "old")
            staged = make(run / UNFINISHED / "checkpoint-6", "new")
            count = iter(range(1, 100))

            def die(*args, when=when, after=after, count=count, **kwargs):
                if next(count) != when:
                    return original(*args, **kwargs)
                if after:
                    original(*args, **kwargs)
                raise Killed

            monkeypatch.setattr(owner, operation, die)
            died = False
            try:
                put_in_place(staged, run / "checkpoint-6")
            except Killed:
                died = True
            monkeypatch.undo()
            clean_up(run)
            last = Path(last_checkpoint(run))
            content = (last / "model.safetensors").read_text()
            seen.add((died, content))
            assert content in (("old", "new") if exists else ("earlier", "new")) and (died or content == "new")
            assert names(run) == ["checkpoint-3", "checkpoint-6"][: 2 if exists or content == "new" else 1]
    assert (False, "new") in seen
    if operation != "rmtree" or exists:
        assert any(died for died, _ in seen)


def test_a_half_deleted_checkpoint_is_out_of_sight(tmp_path, monkeypatch):
    make(tmp_path / "checkpoint-3")
    make(tmp_path / "checkpoint-6")

    def delete_half(folder, **kwargs):
        if (file := Path(folder, "model.safetensors")).exists():
            file.unlink()
            raise Killed

    monkeypatch.setattr(shutil, "rmtree", delete_half)
    with pytest.raises(Killed):
        discard(tmp_path / "checkpoint-6")
    monkeypatch.undo()
    assert names(tmp_path) == [UNFINISHED, "checkpoint-3"]
    clean_up(tmp_path)
    assert names(tmp_path) == ["checkpoint-3"]


def test_rotation_keeps_the_best_and_the_newest(tmp_path):
    def left(limit, keep, ages=(3, 6, 9, 12)):
        run = tmp_path / str(len(names(tmp_path)))
        for age, step in enumerate(ages):
            os.utime(make(run / f"checkpoint-{step}"), (100 * age, 100 * age))
        rotate(run, limit, [run / f"checkpoint-{step}" for step in keep] + [None])
        return {int(path.name.split("-")[1]) for path in run.glob("checkpoint-*")}

    assert left(None, [12]) == left(0, [12]) == {3, 6, 9, 12}
    assert left(2, [12]) == {9, 12}
    assert left(2, [12, 3]) == {3, 12}
    assert left(1, [12, 3]) == {3, 12}
    assert left(1, [12, 12]) == {12}
    # Resumed from step 3 while later ones lay there: the newest is not the one with the most steps.
    assert left(1, [6], ages=(3, 9, 12, 6)) == {6}
    assert left(2, [6], ages=(3, 9, 12, 6)) == {12, 6}


def test_what_cannot_be_rotated_is_reported_and_left(tmp_path, monkeypatch):
    warnings: list[str] = []
    monkeypatch.setattr("modeling_pico.training.checkpoint_files.logger.warning", warnings.append)
    for step in (3, 6):
        make(tmp_path / f"checkpoint-{step}")
    monkeypatch.setattr(Path, "rename", fail(OSError(errno.EROFS, "Read-only file system")))
    rotate(tmp_path, 1, [tmp_path / "checkpoint-6"])
    assert "could not be deleted" in warnings[0] and "Read-only" in warnings[0]
    assert is_complete(tmp_path / "checkpoint-3")


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    write_text(tmp_path / "a.json", "old")
    monkeypatch.setattr(os, "fsync", fail(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_text(tmp_path / "a.json", "new")
    assert names(tmp_path) == ["a.json"] and (tmp_path / "a.json").read_text() == "old"


def fail(error: BaseException):
    def raising(*args, **kwargs):
        raise error

    return raising


# The disk


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
        "safetensors.torch.save_file",
        "torch.save",
        "pathlib.Path.write_text",
        "transformers.TrainerState.save_to_json",
        "os.fsync",
        "pathlib.Path.rename",
    ],
)
def test_a_full_disk_leaves_the_earlier_checkpoint_and_nothing_of_the_new_one(target, tmp_path, monkeypatch):
    callback = FailAtSecondSave(monkeypatch, target, OSError(errno.ENOSPC, "No space left on device"))
    made = trainer(tmp_path, callbacks=[callback], save_total_limit=1, eval_data=None, **FAST)
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


FAST = {"num_train_epochs": 2, "eval_strategy": "no", "feedback": "constant"}


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / UNFINISHED).write_text("a file where the folder should be")
    made = trainer(tmp_path, eval_data=None, **FAST)
    with pytest.raises(OSError, match=r"checkpoint-3 could not be written \(.*earlier checkpoints.*there is none yet"):
        made.train()


class FillDisk(TrainerCallback):
    """Leaves a few kilobytes after the first checkpoint."""

    def on_save(self, args, state, control, **kwargs):
        room = os.statvfs(args.output_dir)
        Path(args.output_dir, "filler").write_bytes(b"x" * (room.f_bavail * room.f_frsize - 30_000))


def test_a_disk_that_is_really_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("a small disk can only be mounted by root")
    try:
        options = {"model_options": {"dropout": 0.1}, **QUICK}
        with pytest.raises(OSError, match="checkpoint-6 could not be written.*the newest is .*checkpoint-3"):
            trainer(disk, callbacks=[FillDisk()], save_total_limit=1, **options).train()
        assert names(disk) == ["checkpoint-3", "filler"]
        (disk / "filler").unlink()
        resumed = trainer(disk, save_total_limit=1, **options)
        resumed.train(resume_from_checkpoint=True)
        assert names(disk) == ["checkpoint-6"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    assert_same_state(resumed.model, whole.model)
    assert whole_log(resumed) == whole_log(whole)


def test_a_model_in_the_output_folder_is_replaced_as_a_whole(tmp_path, monkeypatch):
    made = trainer(tmp_path)
    made.save_model()
    before = contents(tmp_path)
    with torch.no_grad():
        made.model.logit_scale.add_(1.0)
    monkeypatch.setattr(os, "fsync", fail(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match=f"The model in {tmp_path} could not be written .*No space"):
        made.save_model()
    monkeypatch.undo()
    assert contents(tmp_path) == before
    made.save_model()
    assert torch.equal(PicoModel.from_pretrained(tmp_path).logit_scale, made.model.logit_scale)
    assert not (tmp_path / UNFINISHED).exists()


def test_best_and_newest_stay_with_a_limit_of_one(tmp_path, monkeypatch):
    scores = iter([5.0, 9.0, 1.0, 2.0, 2.0])

    def evaluate(self, *args, **kwargs):
        metrics = {"eval_rsum": next(scores)}
        self.log(metrics)
        return metrics

    monkeypatch.setattr("modeling_pico.training.PicoTrainer.evaluate", evaluate)
    best = {"load_best_model_at_end": True, "metric_for_best_model": "rsum", "save_total_limit": 1}
    made = trainer(tmp_path, **{**FAST, **best, "num_train_epochs": 4, "eval_strategy": "epoch"})
    made.train()
    assert names(tmp_path) == ["checkpoint-12", "checkpoint-6"]
    for step in (6, 12):
        state = TrainerState.load_from_json(tmp_path / f"checkpoint-{step}" / "trainer_state.json")
        assert state.best_model_checkpoint == str(tmp_path / "checkpoint-6")
    assert_same_state(made.model, PicoModel.from_pretrained(tmp_path / "checkpoint-6"))


def test_a_best_checkpoint_that_is_gone_does_not_end_the_training(tmp_path):
    made = trainer(tmp_path, **QUICK)
    made.state.best_model_checkpoint = str(tmp_path / "checkpoint-3")
    made._load_best_model()  # `Trainer` warns


@pytest.mark.parametrize(("name", "sharded"), [("optimizer.bin", False), ("optimizer.pt", True)])
def test_fsdp_and_other_checkpoints_are_not_mixed(tmp_path, name, sharded):
    checkpoint = make(tmp_path / "checkpoint-3")
    (checkpoint / name).touch()
    made = trainer(tmp_path, **QUICK)
    made.is_fsdp_enabled = sharded
    with pytest.raises(ValueError, match="checkpoint-3' was written with.* FSDP and can only be resumed so"):
        made.train(resume_from_checkpoint=str(checkpoint))


def test_running_out_of_memory_is_not_called_a_full_disk(tmp_path, monkeypatch):
    callback = FailAtSecondSave(monkeypatch, "torch.save", torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        trainer(tmp_path, callbacks=[callback], eval_data=None, **FAST).train()


# Being asked to end


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
    made = trainer(tmp_path_factory.mktemp("whole"), model_options={"dropout": 0.1}, **QUICK)
    made.train()
    return made


@pytest.mark.parametrize(
    ("event", "step", "saved"),
    [("on_step_begin", 0, 1), ("on_optimizer_step", 3, 4), ("on_step_end", 3, 3), ("on_prediction_step", 3, 3)],
)
def test_sigterm_writes_a_checkpoint_first(whole, tmp_path, monkeypatch, event, step, saved):
    warnings: list[str] = []
    monkeypatch.setattr("modeling_pico.training.checkpoints.logger.warning", warnings.append)
    options = {"model_options": {"dropout": 0.1}, **QUICK}
    with pytest.raises(SystemExit) as stop:
        trainer(tmp_path, callbacks=[Terminate(event, step)], **options).train()
    assert stop.value.code == 143
    assert f"stops after step {saved} of 6" in warnings[0] and str(tmp_path) in warnings[0]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert last_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{saved}")
    resumed = trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same_state(resumed.model, whole.model)
    assert whole_log(resumed) == whole_log(whole)


@pytest.mark.parametrize("strategy", ["epoch", "no"])
def test_sigterm_after_the_last_step_ends_the_process_too(tmp_path, strategy):
    made = trainer(tmp_path, callbacks=[Terminate("on_train_end", 6)], **{**QUICK, "save_strategy": strategy})
    with pytest.raises(SystemExit) as stop:
        made.train()
    assert stop.value.code == 143
    assert_same_state(made.model, PicoModel.from_pretrained(tmp_path / "checkpoint-6"))


def stay(heed) -> None:
    heed(0)
    time.sleep(60)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers are not told apart from the training")
def test_workers_of_a_fork_server_end_with_the_training():
    worker = multiprocessing.get_context("forkserver").Process(target=stay, args=(heed_only_parent,))
    worker.start()
    while worker.is_alive() and "S (sleeping)" not in Path(f"/proc/{worker.pid}/status").read_text():
        time.sleep(0.1)
    time.sleep(0.5)
    os.kill(worker.pid, 0)
    worker.terminate()
    worker.join(20)
    assert worker.exitcode is not None


def test_a_handler_of_the_program_stays(tmp_path):
    heard = []
    signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    try:
        made = trainer(tmp_path, callbacks=[Terminate("on_step_begin", 1)], eval_data=None, **FAST)
        made.train()
        assert heard == [1] and made.state.global_step == 6
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_workers_end_with_the_training_when_the_whole_job_is_asked_to_end(tmp_path):
    """The signal goes to every process of the group, as a scheduler sends it."""
    script = (
        "import os, signal\n"
        "from tiny import trainer\n"
        "from test_checkpoints import FAST, Terminate\n"
        "class All(Terminate):\n"
        "    def act(self, args, state, control, **kwargs):\n"
        "        if state.global_step == self.step:\n"
        "            os.killpg(0, signal.SIGTERM)\n"
        f"trainer({str(tmp_path)!r}, callbacks=[All('on_step_begin', 1)], eval_data=None,\n"
        "        dataloader_num_workers=2, **FAST).train()\n"
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
    assert "stops after step 2 of 6" in done.stderr
    assert is_complete(tmp_path / "checkpoint-2")


def test_a_resumed_finished_run_trains_no_further(tmp_path):
    options = {**QUICK, "max_steps": 4, "save_strategy": "steps", "save_steps": 4}
    made = trainer(tmp_path, **options)
    made.train()
    resumed = trainer(tmp_path, **options)
    output = resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert_same_state(resumed.model, made.model)
    assert whole_log(resumed) == whole_log(made)
    assert output.training_loss == made.state.log_history[-1]["train_loss"] > 0


def test_incomplete_checkpoints_are_refused(tmp_path):
    made = trainer(tmp_path)
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        made.train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match=r"checkpoint-3' is not a complete checkpoint: it lacks"):
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with checkpoints after steps 3 and 6."""
    folder = tmp_path_factory.mktemp("run")
    trainer(folder, **QUICK).train()
    return folder


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_loss.json"])
@pytest.mark.parametrize("by", ["name", "choice"])
def test_a_checkpoint_from_which_a_run_would_not_go_on_exactly_is_refused(run, tmp_path, name, by):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    (folder / "checkpoint-6" / name).unlink()
    before = contents(folder)
    with pytest.raises(ValueError, match=f"checkpoint-6' lacks {name}, so .* not go on .* save_only_model.*Delete"):
        trainer(folder, **QUICK).train(resume_from_checkpoint=by == "choice" or str(folder / "checkpoint-6"))
    assert contents(folder) == before


def test_checkpoints_of_the_model_alone_are_refused_with_all_they_lack(tmp_path):
    made = trainer(tmp_path, max_steps=3, save_only_model=True)
    made.train()
    with pytest.raises(ValueError, match="lacks optimizer.pt, scheduler.pt, rng_state.pth, training_loss.json, so"):
        made.train(resume_from_checkpoint=True)


def test_random_numbers_of_another_number_of_processes_are_told(run, tmp_path, caplog):
    folder = Path(shutil.copytree(run / "checkpoint-3", tmp_path / "checkpoint-3"))
    (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
    trainer(tmp_path, **{**QUICK, "max_steps": 4}).train(resume_from_checkpoint=str(folder))
    assert "has no rng_state.pth, as after a run on another number of processes" in caplog.text


def test_killed_trainings_end_as_the_uninterrupted_one():
    """Few kills here; `--kills 50` for many."""
    command = [sys.executable, str(BENCHMARK), "--kills", "4", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert re.search(r"4 kills; [1-9] trainings ended equal", done.stdout)


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
    assert {"near_unseen_results.json", ".._.._up_results.json"} <= {
        file.name for file in (tmp_path / "run").iterdir()
    }


@pytest.mark.parametrize("content", ['{"a": 1', "[1, 2]", "", "null"])
def test_unreadable_results_are_no_reason_to_lose_new_ones(tmp_path, caplog, content):
    (tmp_path / "all_results.json").write_text(content)
    trainer(tmp_path).save_metrics("eval", {"b": 1.5})
    assert json.loads((tmp_path / "all_results.json").read_text()) == {"b": 1.5}
    assert "all_results.json does not hold metrics by name, and is written anew" in caplog.text
