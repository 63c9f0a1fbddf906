"""Paths that a data set names must not lead out of its folder."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

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
        self._inside = tuple(os.path.join(os.path.realpath(folder), "") for folder in folders)
        self._real_parents: dict[str, str] = {}

    def holds(self, path: str) -> bool:
        """Whether an absolute path, resolved, lies in one of the folders. One that cannot exist counts as inside."""
        return self.mark(path) is not None

    def mark(self, path: str) -> str | None:
        """
        An absolute path with `/./` behind the folder that it lies in, as rsync writes it; None for one outside.
        [`check_mark`] tells whether it still does.
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
        for folder, inside in zip(self.folders, self._inside, strict=True):
            start = os.path.join(folder, "")
            if path.startswith(start) and real.startswith(inside):
                return f"{folder}{_MARK}{path[len(start) :]}"
        return next(
            (f"{inside[:-1]}{_MARK}{real[len(inside) :]}" for inside in self._inside if real.startswith(inside)), None
        )


def check_mark(path: str | None) -> None:
    """OutsideError if a path that [`Fence.mark`] has marked leads out of the folder by now."""
    folder, mark, _ = (path or "").partition(_MARK)
    if mark and path and os.path.isfile(path) and not Fence([folder]).holds(path):
        raise OutsideError(f"The image {path!r} has become a link that leads out of {folder!r} since it was loaded.")


def place_paths(paths: Sequence[str | None], start: Path | None, fence: Fence | None) -> list[str | None]:
    """
    Makes the image paths of a data set absolute.

    Args:
        paths (`Sequence[str | None]`): The path of each row; none, or an empty one, where a row has no image.
        start (`Path`, *optional*): Folder that relative paths start from.
        fence ([`Fence`], *optional*): The folders that they may lead to; no limit for paths that are never opened.

    Returns:
        `list[str | None]`: absolute paths, marked by [`Fence.mark`] if there is a fence.

    Raises:
        OutsideError: if a path leads out of the folders; names the number of such paths and the first of them.
    """
    if start is None and fence is not None and any(path and not os.path.isabs(path) for path in paths):
        raise ValueError(
            "The data names its images by relative paths, and it is not known what they are relative to. Name the "
            "folder with `image_dir`."
        )
    placed = [str((start or Path("/")) / path) if path else None for path in paths]
    if fence is None:
        return placed
    marked = [None if path is None else fence.mark(path) for path in placed]
    outside = [row for row, path in enumerate(placed) if path is not None and marked[row] is None]
    if outside:
        first = "; ".join(f"row {row}: {str(paths[row])[:200]!r}" for row in outside[:5])
        allowed = ", ".join(repr(str(folder)) for folder in fence.folders) or "a folder, which is not given"
        raise OutsideError(
            f"{len(outside)} of {len(paths)} image paths lead out of the folder of the data ({first}). Images must "
            f"lie in {allowed}, also behind symbolic links. If these paths are to be trusted, name the folder that "
            "holds their images with `image_dir`."
        )
    return marked


def check_files(files: Sequence[str | os.PathLike], fence: Fence, source: str) -> None:
    """OutsideError unless all files of rows (local, absolute paths) lie inside the fence."""
    outside = [str(file) for file in files if not fence.holds(os.path.abspath(file))]
    if outside:
        raise OutsideError(
            f"{len(outside)} of {len(files)} files of {source!r} lie outside of its folder or are links that lead out "
            f"of it, the first: {outside[:5]}. Put copies in their places."
        )


def files_named_by_card(folder: Path) -> list[str]:
    """
    The files that the README.md (or `.huggingface.yaml`) of a data folder names as those of its configurations, as
    patterns relative to the folder.

    Raises:
        OutsideError: if one is an address or leads out of the folder. Nothing is asked of a host or a file.
    """
    configs: list[dict[str, Any]] = []
    card, options = folder / datasets.config.REPOCARD_FILENAME, folder / datasets.config.REPOYAML_FILENAME
    if card.is_file():
        configs += DatasetCard.load(card).data.to_dict().get("configs") or []
    if options.is_file():
        configs += (yaml.safe_load(options.read_text(encoding="utf-8")) or {}).get("configs") or []
    named: list[str] = []
    for config in configs:
        if config.get("data_files") is not None:
            named += itertools.chain(*sanitize_patterns(config["data_files"]).values())
        if config.get("data_dir"):
            named.append(config["data_dir"])
    outside = [name for name in named if not is_relative_path(name) or ".." in PurePath(name).parts]
    if outside:
        raise OutsideError(
            f"The README.md of {str(folder)!r} names {len(outside)} files that do not lie in its folder, the first: "
            f"{outside[:5]}."
        )
    return named


def saved_files(folder: Path) -> Iterator[Path]:
    """The files that a folder written by `save_to_disk` says its rows are in; ValueError if they cannot be told."""
    splits, state = folder / "dataset_dict.json", folder / "state.json"
    try:
        if splits.is_file():
            for split in json.loads(splits.read_text(encoding="utf-8"))["splits"]:
                yield folder / split
                yield from saved_files(folder / split)
        if state.is_file():
            for file in json.loads(state.read_text(encoding="utf-8"))["_data_files"]:
                yield folder / file["filename"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(folder)!r} is not as `save_to_disk` writes it: {type(error).__name__}: {error}."
        ) from error
