"""One run at a time in an output folder."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
from plain import trainer

import train_pico
from modeling_pico.durable import files, sole_run
from modeling_pico.durable.files import LOCK_FILE


HOLD = """
import os, runpy, sys, time
with runpy.run_path(sys.argv[1])["sole_run"](sys.argv[2]):
    {then}
    print("in", flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def another_run(folder: Path, then: str = "") -> Iterator[subprocess.Popen]:
    """A process that is in the folder until it is killed."""
    script = textwrap.dedent(HOLD).format(then=then)
    command = [sys.executable, "-c", script, files.__file__, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "in\n"
        try:
            yield process
        finally:
            process.kill()


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
        other.send_signal(signal.SIGKILL)
        other.wait()
        made.train()  # nothing to clean up after a process that was killed
    made.save_metrics("eval", {"rsum": 1.0})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "all_results.json",
        "checkpoint-1",
        "eval_results.json",
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_children_of_a_killed_process_do_not_hold_its_folder(tmp_path):
    fork = "os.fork() or (os.close(1), time.sleep(20), os._exit(0))"
    with another_run(tmp_path, then=fork) as other:
        other.send_signal(signal.SIGKILL)
        other.wait()
        with sole_run(tmp_path):
            pass


def test_a_process_may_enter_its_own_folder_again(tmp_path):
    with sole_run(tmp_path / "run"):
        with sole_run(tmp_path / "run"):
            pass
        assert (tmp_path / "run" / LOCK_FILE).exists()
        with pytest.raises(subprocess.CalledProcessError):
            script = "import runpy, sys; runpy.run_path(sys.argv[1])['sole_run'](sys.argv[2]).__enter__()"
            command = [sys.executable, "-c", script, files.__file__, str(tmp_path / "run")]
            subprocess.run(command, check=True, capture_output=True)
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
