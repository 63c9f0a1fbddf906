"""Folders and files of a run that are complete or absent, whenever the process dies and whatever the disk says."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from transformers import TrainerState
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint, sort_checkpoints
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Uploads to the Hub leave names out that begin with an underscore.
LOCK_FILE = "_lock"
# Holds what is being written or deleted: nobody looks for checkpoints there.
UNFINISHED_FOLDER = "_unfinished"
# What this process and the others have summed up since the last log.
PROGRESS_FILE = "progress.json"


# Checkpoints


def last_checkpoint(run: str | os.PathLike) -> str | None:
    """The checkpoint with the most steps in the folder of a run; None if there is none."""
    return get_last_checkpoint(os.fspath(run)) if os.path.isdir(run) else None


def resumable_state(checkpoint: str | os.PathLike, optimizer: str = "optimizer") -> TrainerState:
    """
    The trainer's state in a checkpoint; ValueError if a run could not continue from there exactly as it was.
    `optimizer` is how the name of that file begins, which depends on the launch.
    """
    try:
        state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
    except (OSError, ValueError, TypeError):  # no file, no JSON, no object with the fields of a state
        state = TrainerState()
    if not isinstance(state.global_step, int) or state.global_step < 1:
        raise ValueError(
            f"{os.fspath(checkpoint)!r} is not a complete checkpoint: it lacks a readable {TRAINER_STATE_NAME}. "
            "Give `resume_from_checkpoint` the folder of one, or delete this one to continue from an earlier one."
        )
    found = os.listdir(checkpoint)
    # Several processes have rng_state_0.pth and so on; DeepSpeed keeps all but these in folders global_step12.
    needed = ["rng_state", PROGRESS_FILE]
    if not any(name.startswith("global_step") for name in found):
        needed = [optimizer, SCHEDULER_NAME, *needed]
    missing = [start for start in needed if not any(name.startswith(start) for name in found)]
    if missing:
        raise ValueError(
            f"{os.fspath(checkpoint)!r} lacks {', '.join(missing)}, so training could not go on as it was left. "
            "(Checkpoints of FSDP, of DeepSpeed and of others resume by their own launch alone, and those with "
            "save_only_model=True not at all.) Delete the folder to continue from an earlier one, or train anew, in "
            "another output_dir, from its weights, which `from_pretrained` loads."
        )
    return state


def put_in_place(written: Path, final: Path) -> None:
    """Moves a folder out of `UNFINISHED_FOLDER` to its final name, once all of it is on the disk."""
    synchronise(written)
    if final.exists():  # of a run that went on from an earlier one
        delete_checkpoint(final)
    written.rename(final)
    _synchronise_names(final.parent)


def delete_checkpoint(folder: Path) -> None:
    """Takes the folder out of sight first: half-deleted, it would pass for a checkpoint."""
    hidden = folder.parent / UNFINISHED_FOLDER / f"deleted-{folder.name}"
    hidden.parent.mkdir(exist_ok=True)
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def delete_old_checkpoints(run: Path, limit: int | None, keep: list[str | os.PathLike | None]) -> None:
    """
    Deletes the oldest checkpoints beyond a limit (None or 0: none), and in no case those to `keep`: the newest, and
    the best if there is one. (`rotate_checkpoints` of transformers may leave half of one.)
    """
    if not limit:
        return
    kept = {os.path.realpath(path) for path in keep if path is not None}
    try:
        checkpoints = sort_checkpoints(str(run), use_mtime=True)
        surplus = len(checkpoints) - max(limit, len(kept))
        for checkpoint in [path for path in checkpoints if os.path.realpath(path) not in kept][: max(surplus, 0)]:
            delete_checkpoint(Path(checkpoint))
    except OSError as error:
        # The new checkpoint is safe; an old one too many is no reason to stop.
        logger.warning(f"Old checkpoints in {run} could not be deleted: {error}")


def remove_unfinished(run: str | os.PathLike) -> None:
    """Removes what a killed run left unfinished."""
    shutil.rmtree(Path(run, UNFINISHED_FOLDER), ignore_errors=True)


# Files


def replace_files(written: Path, folder: Path) -> None:
    """Moves all files of a folder into another one; each is replaced as a whole."""
    synchronise(written)
    for path in sorted(written.rglob("*")):
        if path.is_file():
            target = folder / path.relative_to(written)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
    _synchronise_names(folder)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a file that holds its old or its new content, never a part."""
    path = Path(path)
    part = path.with_name(f"_{path.name}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def synchronise(folder: Path) -> None:
    """Waits until all files of a folder are on the disk: a rename may get there before the bytes do."""
    for path in folder.rglob("*"):
        if path.is_dir():
            _synchronise_names(path)
        else:
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    _synchronise_names(folder)


def _synchronise_names(folder: Path) -> None:
    # Windows cannot open folders, and some network file systems refuse to synchronise them.
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


# One run a folder


@contextlib.contextmanager
def sole_run(folder: str | os.PathLike) -> Iterator[None]:
    """
    Keeps other processes from writing a run into the same folder for as long as the context lasts (ValueError; nothing
    was changed then). The operating system holds the lock, so it ends with the process, however that ends. This
    process may enter again.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    path = Path(folder).resolve() / LOCK_FILE
    # One object for all who enter in this process, whatever their thread.
    lock = FileLock(path, is_singleton=True, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(
            f"Another process is writing its run into {str(folder)!r}. Wait until it has ended, or choose another "
            "output_dir; nothing was changed."
        ) from None
    try:
        yield
    finally:
        if lock.lock_counter == 1:
            # While it is still held: afterwards it may be another's. (Windows deletes it on release.)
            with contextlib.suppress(OSError):
                path.unlink()
        lock.release()


__all__ = [
    "LOCK_FILE",
    "PROGRESS_FILE",
    "UNFINISHED_FOLDER",
    "delete_checkpoint",
    "delete_old_checkpoints",
    "last_checkpoint",
    "put_in_place",
    "remove_unfinished",
    "replace_files",
    "resumable_state",
    "sole_run",
    "synchronise",
    "write_text",
]
