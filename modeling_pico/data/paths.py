"""Paths that a data set names must not lead out of its folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


class OutsideError(ValueError):
    """A path leads out of the folder of the data."""


class Fence:
    """
    Tells whether paths stay inside of folders, wherever symbolic links lead.

    Args:
        folders (`Sequence[str | os.PathLike]`): The folders; where they are symbolic links, what they lead to.
    """

    def __init__(self, folders: Sequence[str | os.PathLike]) -> None:
        self.folders = [Path(folder) for folder in folders]
        self._inside = tuple(os.path.join(os.path.realpath(folder), "") for folder in folders)
        self._real_parents: dict[str, str] = {}

    def holds(self, path: str) -> bool:
        """Whether an absolute path, resolved, lies in one of the folders. One that cannot exist counts as inside."""
        parent, name = os.path.split(path)
        try:
            # Many images share few folders, and resolving asks the file system about every part of a path.
            if parent not in self._real_parents:
                self._real_parents[parent] = os.path.realpath(parent)
            direct = name not in (".", "..") and not os.path.islink(path)
            real = os.path.join(self._real_parents[parent], name) if direct else os.path.realpath(path)
        except ValueError:  # a zero byte
            return True
        return real.startswith(self._inside)


def place_paths(paths: Sequence[str | None], start: Path | None, fence: Fence) -> list[str | None]:
    """
    Makes the image paths of a data set absolute.

    Args:
        paths (`Sequence[str | None]`): The path of each row; none, or an empty one, where a row has no image.
        start (`Path`, *optional*): Folder that relative paths start from.
        fence ([`Fence`]): The folders that they may lead to.

    Raises:
        OutsideError: if a path leads out of the folders; names the number of such paths and the first of them.
    """
    if start is None and any(path and not os.path.isabs(path) for path in paths):
        raise ValueError(
            "The data names its images by relative paths, and it is not known what they are relative to. Name the "
            "folder with `image_dir`."
        )
    placed = [str((start or Path("/")) / path) if path else None for path in paths]
    outside = [row for row, path in enumerate(placed) if path is not None and not fence.holds(path)]
    if outside:
        first = "; ".join(f"row {row}: {str(paths[row])[:200]!r}" for row in outside[:5])
        raise OutsideError(
            f"{len(outside)} of {len(paths)} image paths lead out of the folder of the data ({first}). Images must "
            f"lie in {', '.join(repr(str(folder)) for folder in fence.folders)}, also behind symbolic links. If these "
            "paths are to be trusted, name the folder that holds their images with `image_dir`."
        )
    return placed
