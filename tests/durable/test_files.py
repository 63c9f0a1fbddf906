"""Folders and files of a run are complete or absent, whenever the process dies."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from modeling_pico.durable.files import (
    UNFINISHED_FOLDER,
    delete_checkpoint,
    delete_old_checkpoints,
    last_checkpoint,
    put_in_place,
    remove_unfinished,
    write_text,
)


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


def test_last_checkpoint_is_the_newest(tmp_path):
    assert last_checkpoint(tmp_path / "nowhere") is None
    assert last_checkpoint(tmp_path) is None
    make(tmp_path / "checkpoint-9")
    make(tmp_path / "checkpoint-10")
    make(tmp_path / "checkpoint-11-copy")
    make(tmp_path / UNFINISHED_FOLDER / "checkpoint-12")
    (tmp_path / "checkpoint-13").write_text("a file")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


@pytest.mark.parametrize("exists", [False, True], ids=["new", "replaced"])
@pytest.mark.parametrize("operation", ["fsync", "rename", "rmtree"])
def test_a_death_between_any_two_steps_leaves_whole_checkpoints(tmp_path, monkeypatch, exists, operation):
    owner = {"fsync": os, "rename": Path, "rmtree": shutil}[operation]
    original = getattr(owner, operation)
    seen = set()
    for when in range(1, 8):
        for after in (False, True):
            run = tmp_path / f"{when}{after}"
            make(run / "checkpoint-3", "earlier")
            if exists:
                make(run / "checkpoint-6", "old")
            written = make(run / UNFINISHED_FOLDER / "checkpoint-6", "new")
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
                put_in_place(written, run / "checkpoint-6")
            except Killed:
                died = True
            monkeypatch.undo()
            remove_unfinished(run)
            last = Path(last_checkpoint(run))
            content = (last / "model.safetensors").read_text()
            seen.add((died, content))
            # Between the deletion of an old one and the new one there is none: a run goes on from the earlier one.
            assert content in ("earlier", "old", "new") and (died or content == "new")
            assert names(run) == ["checkpoint-3", "checkpoint-6"][: 1 if content == "earlier" else 2]
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
        delete_checkpoint(tmp_path / "checkpoint-6")
    monkeypatch.undo()
    assert names(tmp_path) == [UNFINISHED_FOLDER, "checkpoint-3"]
    remove_unfinished(tmp_path)
    assert names(tmp_path) == ["checkpoint-3"]


def test_the_best_and_the_newest_are_kept(tmp_path):
    def left(limit, keep, ages=(3, 6, 9, 12)):
        run = tmp_path / str(len(names(tmp_path)))
        for age, step in enumerate(ages):
            os.utime(make(run / f"checkpoint-{step}"), (100 * age, 100 * age))
        delete_old_checkpoints(run, limit, [run / f"checkpoint-{step}" for step in keep] + [None])
        return {int(path.name.split("-")[1]) for path in run.glob("checkpoint-*")}

    assert left(None, [12]) == left(0, [12]) == {3, 6, 9, 12}
    assert left(2, [12]) == {9, 12}
    assert left(2, [12, 3]) == {3, 12}
    assert left(1, [12, 3]) == {3, 12}
    assert left(1, [12, 12]) == {12}
    # Resumed from step 3 while later ones lay there: the newest is not the one with the most steps.
    assert left(1, [6], ages=(3, 9, 12, 6)) == {6}
    assert left(2, [6], ages=(3, 9, 12, 6)) == {12, 6}


def test_what_cannot_be_deleted_is_reported_and_left(tmp_path, monkeypatch):
    warnings: list[str] = []
    monkeypatch.setattr("modeling_pico.durable.files.logger.warning", warnings.append)
    for step in (3, 6):
        make(tmp_path / f"checkpoint-{step}")
    monkeypatch.setattr(Path, "rename", fail(OSError(errno.EROFS, "Read-only file system")))
    delete_old_checkpoints(tmp_path, 1, [tmp_path / "checkpoint-6"])
    assert "could not be deleted" in warnings[0] and "Read-only" in warnings[0]
    assert (tmp_path / "checkpoint-3" / "trainer_state.json").exists()


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
