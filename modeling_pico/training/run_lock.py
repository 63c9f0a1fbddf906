"""One run at a time writes into an output folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout


# Uploads to the Hub leave names out that begin with an underscore.
LOCK_FILE = "_lock"


@contextlib.contextmanager
def sole_run(folder: str | os.PathLike) -> Iterator[None]:
    r"""
    Keeps other processes from writing a run into the same folder for as long as the context lasts. The operating
    system holds the lock, so it ends with the process, however that ends. This process may enter again.

    Args:
        folder (`str` or `os.PathLike`): Output folder of the run; made if it is not there.

    Raises:
        ValueError: if another process is in it. Nothing was changed then.
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


__all__ = ["LOCK_FILE", "sole_run"]
