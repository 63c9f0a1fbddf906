"""Paths that a data set names must not lead out of its folder."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path, PurePath

import datasets
import yaml
from datasets.data_files import sanitize_patterns
from datasets.utils.file_utils import is_relative_path
from huggingface_hub import DatasetCard


_MARK = f"{os.sep}.{os.sep}"


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
        self._inside = [os.path.join(os.path.realpath(folder), "") for folder in folders]
        self._real_parents: dict[str, str] = {}

    def mark(self, path: str) -> str | None:
        """
        An absolute path with `/./` behind the folder that it lies in, resolved, as rsync writes it; None for one
        outside. One that cannot exist counts as inside. [`check_mark`] tells whether it still lies there.
        """
        parent, name = os.path.split(path)
        try:
            # Many images share few folders, and resolving asks the file system about every part of a path.
            if parent not in self._real_parents:
                self._real_parents[parent] = os.path.realpath(parent)
            direct = name not in (".", "..") and not os.path.islink(path)
            real = os.path.join(self._real_parents[parent], name) if direct else os.path.realpath(path)
        except ValueError:  # a zero byte
            return path
        starts = [os.path.join(folder, "") for folder in self.folders]
        # As it is written, if that is inside of the same folder, else as it is resolved.
        for written, places in ((path, starts), (real, self._inside)):
            for start, inside in zip(places, self._inside, strict=True):
                if written.startswith(start) and real.startswith(inside):
                    return f"{start[:-1]}{_MARK}{written[len(start) :]}"
        return None


def check_mark(path: str | None) -> None:
    """OutsideError if a path that [`Fence.mark`] has marked leads out of the folder by now."""
    folder, mark, _ = (path or "").partition(_MARK)
    if path and mark and Fence([folder or os.sep]).mark(path) is None:
        raise OutsideError(f"The image {path!r} has become a link that leads out of {folder!r} since it was loaded.")


def check_inside(paths: Sequence[str], fence: Fence, source: str) -> None:
    """OutsideError unless all files of rows (local paths) lie inside the fence."""
    outside = [path for path in paths if fence.mark(os.path.abspath(path)) is None]
    if outside:
        raise OutsideError(
            f"{len(outside)} of {len(paths)} files of {source!r} lie outside of its folder or are links that lead out "
            f"of it, the first: {outside[:5]}. Put copies in their places, or name the folder that holds them with "
            "`image_dir`."
        )


def check_card(folder: Path) -> None:
    """OutsideError if the README.md (or `.huggingface.yaml`) of a data folder names addresses or files elsewhere."""
    card, options = folder / datasets.config.REPOCARD_FILENAME, folder / datasets.config.REPOYAML_FILENAME
    configs = (DatasetCard.load(card).data.to_dict().get("configs") or []) if card.is_file() else []
    if options.is_file():
        configs += (yaml.safe_load(options.read_text(encoding="utf-8")) or {}).get("configs") or []
    named = [config.get("data_dir") or "" for config in configs]
    for config in configs:
        named += itertools.chain(*sanitize_patterns(config.get("data_files") or []).values())
    # In `a::b` the address follows the colons.
    outside = [n for n in named if not is_relative_path(n) or "::" in n or ".." in PurePath(n).parts]
    if outside:
        raise OutsideError(
            f"The README.md of {str(folder)!r} names {len(outside)} files that do not lie in its folder, the first: "
            f"{outside[:5]}."
        )


def place_paths(paths: Sequence[str | None], start: Path | None, fence: Fence) -> list[str | None]:
    """
    Makes the image paths of a data set absolute, and marks them as [`Fence.mark`] does.

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
    marked = [None if path is None else fence.mark(path) for path in placed]
    outside = [row for row, path in enumerate(placed) if path is not None and marked[row] is None]
    if outside:
        first = "; ".join(f"row {row}: {str(paths[row])[:200]!r}" for row in outside[:5])
        raise OutsideError(
            f"{len(outside)} of {len(paths)} image paths lead out of the folder of the data ({first}). Images must "
            f"lie in {', '.join(repr(str(folder)) for folder in fence.folders)}, also behind symbolic links. If these "
            "paths are to be trusted, name the folder that holds their images with `image_dir`."
        )
    return marked
