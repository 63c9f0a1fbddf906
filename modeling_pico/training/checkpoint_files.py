"""Checkpoint folders that are complete or absent, whenever the process dies and whatever the disk says."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

from transformers import TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints
from transformers.utils import logging


logger = logging.get_logger(__name__)

# What is being written or deleted lies in this folder of the run. Nobody looks for checkpoints there, and uploads to
# the Hub leave names out that begin with an underscore.
UNFINISHED = "_unfinished"

# Sums of losses since the last log.
LOSS_FILE = "training_loss.json"


def is_complete(checkpoint: str | os.PathLike) -> bool:
    """Whether a folder holds the trainer's state after some step; it is written last."""
    try:
        state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
        return isinstance(state.global_step, int) and state.global_step > 0
    except (OSError, ValueError, TypeError):  # no file, no JSON, no object with the fields of a state
        return False


def missing_files(checkpoint: str | os.PathLike) -> list[str]:
    """What a run would need to continue exactly and a checkpoint lacks: it was damaged, or keeps the model alone."""
    names = os.listdir(checkpoint)

    def is_there(beginning: str) -> bool:
        return any(name.startswith(beginning) for name in names)

    # DeepSpeed keeps optimizer and schedule in a folder of its own.
    by_deepspeed = is_there("global_step")
    there = {
        OPTIMIZER_NAME: by_deepspeed or is_there("optimizer"),  # FSDP: optimizer.bin or optimizer_0
        SCHEDULER_NAME: by_deepspeed or is_there(SCHEDULER_NAME),
        "rng_state.pth": is_there("rng_state"),  # several processes: rng_state_0.pth and so on
        LOSS_FILE: is_there(LOSS_FILE),
    }
    return [name for name, found in there.items() if not found]


def check_resumable(checkpoint: str | os.PathLike) -> None:
    """ValueError for a checkpoint from which a run would not continue as it was left."""
    if not is_complete(checkpoint):
        raise ValueError(
            f"{str(checkpoint)!r} is not a complete checkpoint: it lacks a readable {TRAINER_STATE_NAME}."
        )
    if missing := missing_files(checkpoint):
        raise ValueError(
            f"{str(checkpoint)!r} lacks {', '.join(missing)}, so training could not go on as it was left. (With "
            "save_only_model=True no checkpoint has them.) Delete the folder to continue from an earlier one, or "
            "train anew from its weights: PicoModel.from_pretrained, or --model_name_or_path with a new --output_dir."
        )


def last_checkpoint(folder: str | os.PathLike) -> str | None:
    """The complete checkpoint with the most steps in the folder of a run; None if there is none."""
    found = []
    for path in Path(folder).glob("checkpoint-*"):
        if path.is_dir() and (number := re.fullmatch(r"checkpoint-(\d+)", path.name)):
            found.append((int(number[1]), path))
    for _, path in sorted(found, reverse=True):
        if is_complete(path):
            return str(path)
        logger.warning(f"{path} is left out: it lacks a readable {TRAINER_STATE_NAME}, so it is not complete.")
    return None


def put_in_place(staged: Path, final: Path) -> None:
    """
    Moves a folder that lies in `UNFINISHED` to its final name, once all of it is on the disk. A folder of that name is
    replaced; should the process die between the two moves, [`clean_up`] brings the old one back.
    """
    synchronise(staged)
    if final.exists():
        replaced = staged.with_name(f"replaced-{final.name}")
        final.rename(replaced)
        try:
            staged.rename(final)
        except OSError:
            replaced.rename(final)
            raise
        discard(replaced)
    else:
        staged.rename(final)
    _synchronise_names(final.parent)


def discard(folder: Path) -> None:
    """Deletes a folder that it first takes out of sight: half-deleted, it would pass for a checkpoint."""
    run = folder.parent.parent if folder.parent.name == UNFINISHED else folder.parent
    hidden = run / UNFINISHED / f"deleted-{folder.name}"
    hidden.parent.mkdir(exist_ok=True)
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def rotate(run: Path, limit: int | None, keep: list[str | os.PathLike | None]) -> None:
    r"""
    Deletes the oldest checkpoints beyond a limit.

    Args:
        run (`Path`): Folder of the run.
        limit (`int`, *optional*): Checkpoints that may stay; None or 0 for all.
        keep (`list`): Checkpoints that stay in any case: the newest, and the best if there is one.
    """
    if limit is None or limit <= 0:
        return
    kept = {os.path.realpath(path) for path in keep if path is not None}
    try:
        checkpoints = sort_checkpoints(str(run), use_mtime=True)
        surplus = len(checkpoints) - max(limit, len(kept))
        for checkpoint in [path for path in checkpoints if os.path.realpath(path) not in kept][: max(surplus, 0)]:
            discard(Path(checkpoint))
    except OSError as error:
        # The new checkpoint is safe; an old one too many is no reason to stop.
        logger.warning(f"Old checkpoints in {run} could not be deleted: {error}")


def clean_up(run: str | os.PathLike) -> None:
    """Removes what a killed run left unfinished, and brings back a checkpoint that it was about to replace."""
    unfinished = Path(run, UNFINISHED)
    if not unfinished.is_dir():
        return
    for replaced in unfinished.glob("replaced-*"):
        final = Path(run, replaced.name.removeprefix("replaced-"))
        if not final.exists():
            replaced.rename(final)
    shutil.rmtree(unfinished, ignore_errors=True)


def move_files(staged: Path, folder: Path) -> None:
    """Moves all files of a folder into another one; each is replaced as a whole."""
    synchronise(staged)
    for path in sorted(staged.rglob("*")):
        if path.is_file():
            target = folder / path.relative_to(staged)
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


def read_results(path: Path) -> dict[str, float]:
    """The metrics in a file of results; none, with a warning, where it cannot be read as such."""
    if not path.exists():
        return {}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        results = None
    if not isinstance(results, dict):
        logger.warning(f"{path} does not hold metrics by name, and is written anew.")
        return {}
    return results


__all__ = [
    "LOSS_FILE",
    "UNFINISHED",
    "check_resumable",
    "clean_up",
    "discard",
    "is_complete",
    "last_checkpoint",
    "missing_files",
    "move_files",
    "put_in_place",
    "read_results",
    "rotate",
    "write_text",
]
