"""Which rows of a source belong to a split, and that no two splits are the same rows."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets.data_files import SPLIT_KEYWORDS
from transformers.utils import logging

from .columns import column_strings, find_column
from .images import file_state, image_keys, iter_encoded


logger = logging.get_logger(__name__)

SPLIT_COLUMN = "split"
# "train", "training"; "validation", "valid", "dev", "val"; "test", "testing", ...
_SPLIT_OF_WORD = {word: str(split) for split, words in SPLIT_KEYWORDS.items() for word in words}


def split_of_file(path: Path, folder: Path | None = None) -> str:
    """
    The split that the name of a file says (`captions_val2017.json`: `"validation"`), or its path in a folder
    (`test/0.tar`), by default `"train"`.
    """
    name = path.relative_to(folder) if folder else path.name
    found = {_SPLIT_OF_WORD.get(word) for word in re.split(r"[-._ 0-9/]+", str(name).lower())} - {None}
    return str(found.pop()) if len(found) == 1 else "train"


def join_restval(names: Sequence[str]) -> list[str]:
    """Names of splits as rows say them, with MS-COCO's `restval` counted as `train`, as is usual."""
    return ["train" if name == "restval" else name for name in names]


def find_split(split: str, names: Collection[str], source: str) -> str:
    """The one of `names` that is the split, under its own name or another usual one (`val` for `validation`)."""
    if split in names:
        return split
    common = _SPLIT_OF_WORD.get(split.lower())
    same = [name for name in names if common is not None and _SPLIT_OF_WORD.get(name.lower()) == common]
    if len(same) == 1:
        return same[0]
    raise ValueError(f"{source} has no split {split!r}; it has {list(names)}.")


def choose_split(
    splits: Mapping[str, datasets.Dataset], split: str, source: str, column: str | None = None
) -> datasets.Dataset:
    """
    The rows of one split. A source that has all rows in one is divided by a column that names the split of each.

    Args:
        splits (`Mapping[str, datasets.Dataset]`): What the source itself tells apart.
        split (`str`): The split that is asked for, or an expression such as `"train[:100]"`.
        source (`str`): Names the source in messages.
        column (`str`, *optional*): The column that names splits. Defaults to `split` if that exists.

    Raises:
        ValueError: if there is no such split, or if a column is named for a source that has splits of its own. A
            source that is not split is only what its own name says, and `train` where that says nothing: the same rows
            must not be training, validation and test data.
    """
    splits = {str(name): rows for name, rows in splits.items()}
    rows = next(iter(splits.values()))
    hint = ""
    if column is not None and len(splits) > 1:
        raise ValueError(
            f"{source} has the splits {list(splits)} of its own. Leave out `split_column`: it is for data that have "
            "all rows in one."
        )
    if len(splits) == 1 and (column is not None or SPLIT_COLUMN in rows.column_names):
        column = find_column(rows, "split", column, [SPLIT_COLUMN])
        splits, source = _by_column(rows, column), f"The column {column!r} of {source}"
    elif len(splits) == 1:
        hint = (
            " It has no splits, and the same rows must not serve two purposes. Give a folder with a file for each "
            f"split (train.csv, validation.csv, test.csv), or add a column {SPLIT_COLUMN!r} that says it of each row "
            "(or name the one that does by `split_column`). "
            f"To use all of its rows, ask for the split {next(iter(splits))!r}."
        )
    try:
        if split not in splits and re.search(r"[\[+]", split):
            return _expression(splits, split)
        return splits[find_split(split, list(splits), source)]
    except ValueError as error:
        raise ValueError(f"{error}{hint}") from None


def _by_column(rows: datasets.Dataset, column: str) -> dict[str, datasets.Dataset]:
    members: dict[str, list[int]] = {}
    for row, name in enumerate(join_restval(column_strings(rows, column))):
        members.setdefault(name, []).append(row)
    return {name: rows.select(chosen) for name, chosen in members.items()}


def _expression(splits: Mapping[str, datasets.Dataset], expression: str) -> datasets.Dataset:
    lengths = {name: len(rows) for name, rows in splits.items()}
    parts = datasets.ReadInstruction.from_spec(expression).to_absolute(lengths)
    return datasets.concatenate_datasets(
        [splits[part.splitname].select(range(lengths[part.splitname])[part.from_ : part.to]) for part in parts]
    )


def check_distinct(splits: Mapping[str, datasets.Dataset]) -> None:
    """
    Refuses splits of which one holds nothing but rows (images with their captions) of another, and warns of images
    that two splits share, as they do where rows of single captions were dealt out (by path, or by their bytes if these
    are in the data).

    Args:
        splits (`Mapping[str, datasets.Dataset]`): Rows as [`load_captioned_images`] gives them, by name of the split.

    Raises:
        ValueError: names both splits.
    """
    outline_rows = {name: list(_outlines(rows)) for name, rows in splits.items() if len(rows)}
    outlines = {name: set(rows) for name, rows in outline_rows.items()}
    sizes = {name: {size for size, *_ in rows} for name, rows in outlines.items()}
    for pair in itertools.combinations(outlines, 2):
        small, large = sorted(pair, key=lambda name: len(outlines[name]))
        # Pictures are read only where captions and sizes already agree.
        if outlines[small] <= outlines[large] and set(_contents(splits[small])) <= set(_contents(splits[large])):
            first, second = pair
            raise ValueError(
                f"The splits {first!r} and {second!r} hold the same data: each of the {len(splits[small])} rows of "
                f"{small!r} is also a row of {large!r}, so that one says nothing that the other does not. Name splits "
                "of different rows."
            )
        # Of pictures that are in the data, only those of equal size are read.
        both = sizes[small] & sizes[large]
        images = []
        for name in pair:
            rows = [row for row, (size, *_) in enumerate(outline_rows[name]) if size in both]
            images.append(set(image_keys(splits[name].select_columns("image").select(rows))))
        shared = sum(kind != "row" for kind, _ in images[0] & images[1])
        if shared:
            small, large = sorted(pair, key=lambda name: len(splits[name]))
            logger.warning(
                f"{shared} of {len(splits[small])} images of the split {small!r} are also images of {large!r}: what "
                "is measured on these is not measured on new images."
            )


def _outlines(rows: datasets.Dataset) -> Iterator[tuple[Any, ...]]:
    """What can be known of each row without reading its picture: captions, and the size of the picture in bytes."""
    captions = iter(rows["captions"])
    for chunk in iter_encoded(rows.select_columns("image")):
        for content, path in zip(chunk.field("bytes"), chunk.field("path").to_pylist(), strict=True):
            size = content.as_buffer().size if content.is_valid else file_state(path)[:1]
            yield (size, *next(captions))


def _contents(rows: datasets.Dataset) -> Iterator[tuple[Any, ...]]:
    images = image_keys(rows.select_columns("image"), read_files=True)
    return ((image, *captions) for image, captions in zip(images, rows["captions"], strict=True))
