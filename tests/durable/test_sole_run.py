"""One run at a time in an output folder."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from plain import trainer

import train_pico
from modeling_pico.durable import files, sole_run
from modeling_pico.durable.files import LOCK_FILE


def hold(folder: Path, entered) -> None:
    with sole_run(folder):
        entered.set()
        time.sleep(600)


def hold_with_a_child(folder: Path, entered) -> None:
    with sole_run(folder):
        if os.fork() == 0:
            time.sleep(20)
            os._exit(0)
        entered.set()
        time.sleep(600)


def enter(folder: Path) -> None:
    with sole_run(folder):
        pass


@contextlib.contextmanager
def another_run(folder: Path, target: Callable[..., None] = hold) -> Iterator[BaseProcess]:
    """A process that is in the folder until it is killed."""
    context = multiprocessing.get_context("forkserver")
    entered = context.Event()
    process = context.Process(target=target, args=(folder, entered))
    process.start()
    assert entered.wait(120)
    try:
        yield process
    finally:
        process.kill()
        process.join()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_in_use_is_refused_and_left_as_it_is(tmp_path):
    unfinished = tmp_path / files.UNFINISHED_FOLDER / "checkpoint-3"
    unfinished.mkdir(parents=True)
    (unfinished / "model.safetensors").write_text("half")
    made = trainer(tmp_path, max_steps=1, eval_strategy="no")
    with another_run(tmp_path) as other:
        before = contents(tmp_path)
        for write in (made.train, lambda: made.save_metrics("eval", {"rsum": 1.0})):
            with pytest.raises(ValueError, match=f"writing its run into '{tmp_path}'. .*another output_dir; nothing"):
                write()
        assert contents(tmp_path) == before
        other.kill()
        other.join()
        made.train()  # nothing to clean up after a process that was killed
    made.save_metrics("eval", {"rsum": 1.0})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "all_results.json",
        "checkpoint-1",
        "eval_results.json",
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_children_of_a_killed_process_do_not_hold_its_folder(tmp_path):
    with another_run(tmp_path, hold_with_a_child) as other:
        other.kill()
        other.join()
        with sole_run(tmp_path):
            pass


def test_a_process_may_enter_its_own_folder_again(tmp_path):
    with sole_run(tmp_path / "run"):
        with sole_run(tmp_path / "run"):
            pass
        assert (tmp_path / "run" / LOCK_FILE).exists()
        other = multiprocessing.get_context("forkserver").Process(target=enter, args=(tmp_path / "run",))
        other.start()
        other.join()
        assert other.exitcode == 1
    assert not list((tmp_path / "run").iterdir())


def test_a_training_that_fails_leaves_its_folder(tmp_path):
    made = trainer(tmp_path, max_steps=1)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        made.train(resume_from_checkpoint=True)
    with another_run(tmp_path):
        pass


def test_the_script_is_refused_before_it_reads_data(tmp_path):
    command = ["--dataset_name", "nowhere", "--output_dir", str(tmp_path), "--do_eval", "--use_cpu"]
    with another_run(tmp_path), pytest.raises(ValueError, match="writing its run into"):
        train_pico.main(command)


def test_the_file_is_not_uploaded():
    assert fnmatch(LOCK_FILE, "_*")  # what `Trainer.push_to_hub` leaves out
