"""Captioned images from many sources, in one set of columns."""

from __future__ import annotations

import ast
import csv
import glob
import hashlib
import itertools
import json
import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import pyarrow as pa
from huggingface_hub import constants as hub_constants
from transformers.utils import logging

from .caption_files import (
    choose_image_list,
    find_caption_files,
    find_image_lists,
    has_image_list,
    read_caption_files,
    read_image_list,
)
from .columns import column_strings, column_values, find_column
from .images import image_keys, iter_encoded, refuse_if_most
from .paths import Fence, OutsideError, check_card, check_inside, place_paths
from .splits import choose_split, split_of_file
from .styled_shapes import styled_shapes


logger = logging.get_logger(__name__)

STYLED_SHAPES = "styled_shapes"
IMAGE_COLUMNS = ("image", "image_name", "file_name")
# What people wrote is called so (`alt_text`, which machines write too, has to be named); in a WebDataset these are a
# text file, and entries of JSON.
CAPTION_COLUMNS = (
    *("captions", "caption", "sentences", "sentences_raw", "text", "comment"),
    *("txt", "json.captions", "json.caption"),
)
_WEBDATASET = "webdataset"
_LINE_BREAKS = re.compile(r"[\r\n]+")
_LIST_OF_TEXTS = re.compile(r"""\s*\[\s*["'].*\]\s*""", re.DOTALL)
# What is neither printable nor a separator between words: C0 and C1 controls, and the separators of lines.
_NOT_PRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
# Categories of characters that show nothing: controls, formats, separators. All others count as visible, also those
# that are newer than Python's tables.
_INVISIBLE = ("Cc", "Cf", "Zs", "Zl", "Zp")
_FILE_BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".tar": _WEBDATASET}
_TABLES = (".csv", ".tsv", ".txt")
# What no column is called: names of images, unprintable characters.
_NO_NAME = re.compile(rf"\.(jpe?g|png|gif|webp)\b|{_NOT_PRINTABLE.pattern}", re.IGNORECASE)


class _Source(NamedTuple):
    """Rows as they are, whether they bring ids, and where relative paths start from and all paths may lead to."""

    rows: datasets.Dataset
    has_ids: bool
    start: Path | None
    fence: Fence


def load_captioned_images(
    dataset_name: str,
    *,
    split: str,
    image_column: str | None = None,
    caption_column: str | Sequence[str] | None = None,
    id_column: str | None = None,
    style_column: str | None = None,
    split_column: str | None = None,
    image_dir: str | None = None,
    config_name: str | None = None,
    cache_dir: str | None = None,
    data_files: str | Sequence[str] | dict[str, Any] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    on_empty_captions: Literal["error", "skip", "keep"] = "error",
    keep_columns: Sequence[str] = (),
) -> datasets.Dataset:
    """
    Loads captioned images from any of the sources below into the same columns.

    `dataset_name` decides, in this order:

    1. `"styled_shapes"`: the generated data of [`styled_shapes`] (a folder of that name is `"./styled_shapes"`).
    2. A file: `.json` in the layout of Karpathy's splits (`dataset_flickr30k.json`, `dataset_coco.json`) or of COCO
       (`captions_val2017.json`); a shard of a WebDataset (`.tar`); any parquet, JSON, JSON lines or CSV file, the
       latter also with tabs, semicolons or bars between its columns and also as `.txt` (`captions.txt` of Flickr8k,
       `results.csv` of Flickr30k). All columns of a CSV file are text. A pattern (`"shards/train-*.tar"`) stands for
       all files that match it, and a folder with COCO's files (`annotations`) for the one of the split.
    3. A folder written by `save_to_disk`.
    4. `{name}/{split}_caps.txt` or `{name}_{split}_caps.txt` (`"data/f30k"` for `data/f30k_test_caps.txt`), with the
       ids of the images in `..._ids.txt` (one a caption, or one an image with five captions each) and their files in
       `..._id_mapping.json`.
    5. Everything else is found as `datasets.load_dataset` finds it: a local folder (parquet files, CSV files, images
       with `metadata.jsonl` or `metadata.csv`), a name on the Hub, or the name of a builder with `data_files`.

    If the source knows a single split, its column `split`, or the one named by `split_column`, says which rows are
    which; rows of `restval` count as `train`. Without one, a file is the split that its name says (`test.csv`), or
    `train`; the same rows are never handed out as two splits. Usual names are understood (`val` and `dev` for
    `validation`).

    Rows that show the same image (the same bytes, or without bytes the same path, and the same id if there is an
    `id_column`) become one row with all their captions, at the place of the first.

    Captions are stripped, and control characters in them become spaces. Empty ones are dropped with a warning. Each
    line of a text file of a WebDataset is a caption. Elsewhere a text with line breaks may be one caption or several
    and is refused, except among others in a list, and in the layouts of Karpathy and COCO: there each entry is one
    caption (some of MS-COCO have line breaks), and line breaks become spaces with a warning.

    Images, and the files that a data set says its rows are in, must lie in the folder of the data, in `image_dir`, or
    in the caches of `datasets` and `huggingface_hub`: paths that lead elsewhere, be it by `..`, as absolute paths or
    behind symbolic links, are refused.

    Args:
        dataset_name (`str`):
            The source, see above.
        split (`str`):
            Name of the split. Expressions such as `"train[:100]"` work too, except for 1, 4, and the layouts of
            Karpathy and COCO.
        image_column (`str`, *optional*):
            Column with images (the `Image` feature, `{"bytes", "path"}`, bytes, or paths). Defaults to the first that
            exists of `image`, `image_name`, `file_name`, else to the only one with the `Image` feature (`jpg` of a
            WebDataset).
        caption_column (`str` or `Sequence[str]`, *optional*):
            Column with a caption or a list of captions (`str`, or `{"raw": str}`; also as the text of a list,
            `'["one", "two"]'`), or several such columns (`["caption_0", "caption_1"]`), whose captions count alike.
            Defaults to the first that exists of `captions`, `caption`, `sentences`, `sentences_raw`, `text`,
            `comment`, and of a WebDataset `txt`, `json.captions`, `json.caption` (entries of its JSON are columns).
        id_column (`str`, *optional*):
            Column with the identity of the meaning. Without it each image is a meaning of its own, except in the
            sources that have ids (1, 4, and the layouts of Karpathy and COCO). Ids that are not from a column differ
            between different images of all sources, so that loaded sets can be concatenated.
        style_column (`str`, *optional*):
            Column with the name of the image's style. Defaults to `"style"` if that exists (and gives no image
            several styles, as one of captions' styles does).
        split_column (`str`, *optional*):
            Column with the name of each row's split, of a source that has all rows in one split, whatever that is
            called. Defaults to `"split"` if that exists.
        image_dir (`str`, *optional*):
            Folder that relative image paths start from, and that images may lie in. Defaults to the folder of the
            data if that is local.
        config_name (`str`, *optional*): The `name` of `datasets.load_dataset`.
        cache_dir (`str`, *optional*): As that of `load_dataset`.
        data_files (`str`, `Sequence[str]` or `dict`, *optional*): As those of `load_dataset`.
        revision (`str`, *optional*): As that of `load_dataset`; of a name on the Hub alone.
        token (`str` or `bool`, *optional*): As that of `load_dataset`.
        on_empty_captions (`str`, *optional*, defaults to `"error"`):
            What becomes of a row whose captions are all empty: `"error"` raises, `"skip"` drops it with a warning, as
            long as these are at most half of the rows, and `"keep"` leaves it without captions.
        keep_columns (`Sequence[str]`, *optional*):
            Further columns to keep as they are; of rows that become one, the values of the first.

    Returns:
        `datasets.Dataset`: with the columns `image` (`datasets.Image(decode=False)`, nothing is decoded), `captions`
        (list of `str`), `image_id` (`str`), if known `style` (`str`), and those of `keep_columns`.

    Raises:
        ValueError: for a column or split that does not exist, files that cannot be read or do not fit together,
            captions that are no text, ids that are missing, paths that lead elsewhere, or rows without captions. The
            message says how many rows it is about and names the first.
    """
    if on_empty_captions not in ("error", "skip", "keep"):
        raise ValueError(f"`on_empty_captions` must be 'error', 'skip' or 'keep', got {on_empty_captions!r}.")
    hub = {"name": config_name, "cache_dir": cache_dir, "revision": revision, "token": token}
    source = _open_source(dataset_name, split, split_column, image_dir, data_files, hub)
    dataset = source.rows.with_format(None)
    if not len(dataset):
        raise ValueError("The data holds no rows.")
    if id_column is None and source.has_ids:
        id_column = "image_id"
    if unknown := [name for name in keep_columns if name not in dataset.column_names]:
        raise ValueError(
            f"There is no column {unknown[0]!r} (`keep_columns`); the columns are {dataset.column_names}."
        )
    image_column = _image_column(dataset, image_column)
    columns = [
        _caption_lists(dataset, column, is_entries=source.has_ids)
        for column in _caption_columns(dataset, caption_column)
    ]
    texts = [list(itertools.chain(*lists)) for lists in zip(*columns, strict=True)]
    ids = column_strings(dataset, find_column(dataset, "id", id_column)) if id_column else None
    images = _image_table(source, image_column)

    keys = list(image_keys(images))
    groups: dict[Any, list[int]] = {}
    for row, key in enumerate(keys):
        groups.setdefault((key, ids and ids[row]), []).append(row)
    styles = _styles(dataset, style_column, list(groups.values()))
    captions = _clean_captions([[text for row in rows for text in texts[row]] for rows in groups.values()])
    keep = on_empty_captions == "keep"
    used = [(rows[0], group) for rows, group in zip(groups.values(), captions, strict=True) if group or keep]
    if len(used) < len(groups):
        empty = [rows[0] for rows, group in zip(groups.values(), captions, strict=True) if not group]
        problem = f"{len(empty)} of {len(groups)} images have no caption, the first at the rows {empty[:5]}"
        if on_empty_captions == "error":
            raise ValueError(f"{problem}. Drop them with on_empty_captions='skip'.")
        refuse_if_most(len(empty), len(groups), problem)
        logger.warning(f"{problem}; they were dropped.")

    first = [row for row, _ in used]
    values: dict[str, Any] = {
        "captions": [group for _, group in used],
        "image_id": [ids[row] for row in first] if ids else _made_ids([keys[row] for row in first], texts),
    }
    features = {"captions": datasets.List(datasets.Value("string")), "image_id": datasets.Value("string")}
    if styles:
        values["style"], features["style"] = [styles[row] for row in first], datasets.Value("string")
    if first != list(range(len(images))):
        images = images.select(first)
    rest = datasets.Dataset.from_dict(values, features=datasets.Features(features))
    parts = [images, rest]
    if others := [name for name in keep_columns if name not in {"image", *values}]:
        parts.append(dataset.select_columns(others).select(first))
    return datasets.concatenate_datasets(parts, axis=1)


def _open_source(
    name: str, split: str, split_column: str | None, image_dir: str | None, data_files: Any, hub: dict[str, Any]
) -> _Source:
    path = Path(name).expanduser()
    # Files that the name stands for; those of them, or in the folder, that are COCO's or Karpathy's; caption files.
    paths, lists, files = [], [], None
    if not data_files and name != STYLED_SHAPES:
        paths = [path] if path.is_file() else []
        files = None if paths else find_caption_files(path, split)
        paths = paths if files else paths or _matching(path)
        lists = find_image_lists(path) if path.is_dir() else paths
        lists = lists if all(file.suffix.lower() == ".json" and has_image_list(file) for file in lists) else []
    if hub["revision"] is not None and (name == STYLED_SHAPES or paths or files or path.is_dir()):
        what = "is generated" if name == STYLED_SHAPES else "lies on this disk"
        raise ValueError(
            f"`revision` (--dataset_revision) is {hub['revision']!r}, a version of a data set on the Hub, but "
            f"{name!r} {what}. Leave it out."
        )
    folder = path if path.is_dir() else None
    if named := paths or files:
        folder = _common_folder(named)
    start = Path(image_dir).expanduser() if image_dir else folder
    if start is not None and not start.is_dir():
        raise ValueError(f"`image_dir` {str(image_dir)!r} is not a folder.")
    start = start and start.absolute()
    caches = [hub["cache_dir"] or datasets.config.HF_DATASETS_CACHE, hub_constants.HF_HUB_CACHE]
    fence = Fence(list(dict.fromkeys([*(part.absolute() for part in (folder, start) if part), *caches])))
    check_inside([str(file) for file in paths if file != path], fence, name)
    has_ids = name == STYLED_SHAPES or files is not None or bool(lists)
    if has_ids and split_column is not None:
        raise ValueError(f"{name!r} says which of its rows are a split without a column. Leave out `split_column`.")
    if name == STYLED_SHAPES:
        rows = styled_shapes(split)
    elif lists:
        file = choose_image_list(lists, split)
        rows = _from_rows(read_image_list(file, split, start or file.parent))
    elif files is not None:
        rows = _from_rows(read_caption_files(*files))
    else:
        if any((path / file).is_file() for file in ("dataset_dict.json", "state.json")):
            saved = datasets.load_from_disk(str(path), keep_in_memory=False)
            splits = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
            check_inside([file["filename"] for part in splits.values() for file in part.cache_files], fence, name)
        elif paths:
            splits = _read_files(paths, name, hub["cache_dir"])
        else:
            if path.is_dir() and glob.has_magic(str(path.resolve())):
                raise ValueError(f"The name of the folder {name!r} reads as a pattern of names: rename it.")
            splits = _load(name, name, None if data_files else fence, data_files=data_files, **hub)
        rows = choose_split(splits, split, repr(name), split_column)
        if _is_webdataset(rows):
            rows = rows.flatten()  # the entries of JSON become columns (`json.caption`)
    return _Source(rows, has_ids, start, fence)


def _matching(path: Path) -> list[Path]:
    """The files that a path matches as a pattern; none if it is no pattern. Brackets alone are a part of its name."""
    if path.exists() or not re.search(r"[*?]", str(path)):
        return []
    paths = sorted(file for file in map(Path, glob.glob(str(path), recursive=True)) if file.is_file())
    if not paths:
        raise ValueError(f"No file matches {str(path)!r}.")
    return paths


def _common_folder(paths: Sequence[Path]) -> Path:
    return Path(os.path.commonpath([path.parent for path in paths]))


def _read_files(paths: Sequence[Path], name: str, cache_dir: str | None) -> dict[str, datasets.Dataset]:
    """The rows of files by the splits that their names say, or those of folders in which they differ."""
    files: dict[str, list[Path]] = {}
    for path in paths:
        files.setdefault(split_of_file(path, _common_folder(paths)), []).append(path)
    suffixes = {path.suffix.lower() for path in paths}
    if suffixes.issubset(_TABLES):
        return {split: _joined(list(map(_read_table, parts))) for split, parts in files.items()}
    if len(suffixes) > 1:
        raise ValueError(f"{name!r} stands for files of several kinds: {sorted(suffixes)}. Name those of one kind.")
    suffix = suffixes.pop()
    if suffix not in _FILE_BUILDERS:
        known = sorted([*_FILE_BUILDERS, *_TABLES])
        raise ValueError(f"Cannot read {name!r}: a data file ends in one of {known}.")
    # Brackets and asterisks of a name are no pattern.
    escaped = {split: [glob.escape(str(path)) for path in parts] for split, parts in files.items()}
    return _load(_FILE_BUILDERS[suffix], name, None, data_files=escaped, cache_dir=cache_dir)


def _read_table(path: Path) -> datasets.Dataset:
    """
    Reads a file of separated columns, all as text: guessing types would make the caption "NA" empty and cut the digits
    of long ids, and a row with a comma too many would shift the columns.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            file.seek(0)
            separator = next((mark for mark in "\t,;|" if mark in header), ",")
            reader = csv.reader(file, delimiter=separator, strict=True)
            names = next(reader, [])
            rows = [(reader.line_num, row) for row in reader if row]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"Cannot read {str(path)!r}: {error}.") from error
    if not names or len(set(names)) < len(names) or any(_NO_NAME.search(name) for name in names):
        raise ValueError(
            f"The first line of {str(path)!r} must name the columns (for example `image,caption`), each once; it "
            f"holds {str(names)[:80]}."
        )
    if separator == "|":  # which is written with spaces around it
        names, rows = [name.strip() for name in names], [(line, [f.strip() for f in row]) for line, row in rows]
    wrong = [(line, len(row)) for line, row in rows if len(row) != len(names)]
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(rows)} rows of {str(path)!r} have another number of fields than its {len(names)} "
            f"columns, the first (line, fields): {wrong[:5]}. Fields with {separator!r} in them need quotes."
        )
    columns = zip(*(row for _, row in rows), strict=True) if rows else [()] * len(names)
    features = datasets.Features({name: datasets.Value("string") for name in names})
    return datasets.Dataset.from_dict(dict(zip(names, map(list, columns), strict=True)), features=features)


def _from_rows(rows: list[dict[str, Any]]) -> datasets.Dataset:
    text = datasets.Value("string")
    features = datasets.Features(image=text, captions=datasets.List(text), image_id=text)
    return datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features)


def _load(builder: str, source: str, fence: Fence | None, **options: Any) -> dict[str, datasets.Dataset]:
    """The splits of what `datasets.load_dataset` finds, in local files that lie inside the fence if there is one."""
    try:
        if fence and Path(source).is_dir():
            check_card(Path(source))
        found = datasets.load_dataset_builder(builder, **options)
        if fence:
            files = [file for files in (found.config.data_files or {}).values() for file in files]
            check_inside([file for file in files if "://" not in file], fence, source)
        splits = _tables(found)
        if splits is None:
            found.download_and_prepare()
            splits = found.as_dataset()
    except (OSError, OutsideError):  # what does not exist, cannot be reached, or is not to be read
        raise
    except Exception as error:  # readers of files fail in many ways
        generating = isinstance(error, datasets.exceptions.DatasetGenerationError)
        cause = error.__cause__ if generating and error.__cause__ is not None else error
        reason = f"{type(cause).__name__}: {cause}" if str(cause) else "it holds no rows"
        raise ValueError(f"Cannot load {source!r}: {reason}") from error
    return splits


def _tables(found: datasets.DatasetBuilder) -> dict[str, datasets.Dataset] | None:
    """The splits of a builder that would guess the types of CSV columns; None for all other builders."""
    files = found.config.data_files or {}
    manager = datasets.DownloadManager(
        base_path=found.base_path, download_config=datasets.DownloadConfig(token=found.token)
    )
    if found.name == "csv":
        local = {split: list(manager.iter_files(manager.download_and_extract(files[split]))) for split in files}
        return {split: _joined([_read_table(Path(path)) for path in paths]) for split, paths in local.items()}
    names = {Path(path).name for paths in files.values() for path in paths}
    if found.name == "imagefolder" and names.intersection(found.METADATA_FILENAMES) == {"metadata.csv"}:
        local = {split: [Path(path) for path in manager.download(files[split])] for split in files}
        tables = {split: [path for path in paths if path.name == "metadata.csv"] for split, paths in local.items()}
        return {split: _joined(list(map(_read_metadata, paths))) for split, paths in tables.items() if paths}
    return None


def _read_metadata(path: Path) -> datasets.Dataset:
    """A `metadata.csv`, whose column `file_name` is the image, and relative to the file."""
    rows = _read_table(path)
    if "file_name" not in rows.column_names:
        raise ValueError(f"{str(path)!r} has no column 'file_name'; its columns are {rows.column_names}.")
    images = [str(path.parent / name) if name else "" for name in rows["file_name"]]
    return rows.remove_columns("file_name").add_column("image", images)


def _joined(tables: list[datasets.Dataset]) -> datasets.Dataset:
    columns = {tuple(sorted(table.column_names)) for table in tables}
    if len(columns) > 1:
        raise ValueError(f"the files of one split have different columns: {sorted(columns)}")
    return datasets.concatenate_datasets(tables)


def _image_column(dataset: datasets.Dataset, named: str | None) -> str:
    """The column of images, as named, the first of the usual ones, or the only one that holds decoded images."""
    if named is None and not set(IMAGE_COLUMNS).intersection(dataset.column_names):
        found = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
        if len(found) > 1:
            raise ValueError(f"There are several columns with images: {found}. Name one of them by `image_column`.")
        named = next(iter(found), None)
    return find_column(dataset, "image", named, IMAGE_COLUMNS)


def _caption_columns(dataset: datasets.Dataset, named: str | Sequence[str] | None) -> list[str]:
    """The columns of captions, as named or else the first of the usual ones."""
    names: list[Any] = [named] if not named or isinstance(named, str) else list(named)
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"`caption_column` names {', '.join(map(repr, twice))} more than once.")
    return [find_column(dataset, "caption", name, CAPTION_COLUMNS) for name in names]


def _is_webdataset(dataset: datasets.Dataset) -> bool:
    return dataset.info.builder_name == _WEBDATASET


def _styles(dataset: datasets.Dataset, named: str | None, groups: list[list[int]]) -> list[str] | None:
    """The style of each row; `groups` are the rows that become one image each."""
    if named is None and "style" not in dataset.column_names:
        return None
    column = find_column(dataset, "style", named, ["style"])
    styles = column_strings(dataset, column)
    mixed = [rows for rows in groups if len({styles[row] for row in rows}) > 1]
    if not mixed:
        return styles
    problem = (
        f"The column {column!r} gives {len(mixed)} of {len(groups)} images several styles, the first at the rows "
        f"{mixed[0][:5]}: it is not the style of the image"
    )
    if named is not None:
        raise ValueError(f"{problem}. Name another one by `style_column`.")
    logger.warning(f"{problem} and is left out.")
    return None


def _made_ids(keys: list[tuple[str, Any]], texts: list[list[str | None]]) -> list[str]:
    """
    An id for each image that no other image of any source has; the same image has the same id in every load. Rows
    without an image are known by their number and all the captions of the source.
    """
    if any(kind == "row" for kind, _ in keys):
        source = hashlib.blake2b(json.dumps(texts).encode()).digest()
        keys = [(kind, (source, value) if kind == "row" else value) for kind, value in keys]
    return [hashlib.blake2b(repr(key).encode(), digest_size=8).hexdigest() for key in keys]


def _clean_captions(groups: list[list[str | None]]) -> list[list[str]]:
    """The captions of each image without the empty ones."""
    cleaned = [[text for text in map(_clean, group) if text] for group in groups]
    total, left = sum(map(len, groups)), sum(map(len, cleaned))
    if left < total:
        logger.warning(f"{total - left} of {total} captions are empty and were dropped.")
    return cleaned


def _clean(text: str | None) -> str:
    cleaned = _NOT_PRINTABLE.sub(" ", text).strip() if text else ""
    # Without a visible character (zero-width spaces, byte order marks) there is nothing to read.
    return cleaned if any(unicodedata.category(character) not in _INVISIBLE for character in cleaned) else ""


def _caption_lists(dataset: datasets.Dataset, column: str, is_entries: bool) -> list[list[str | None]]:
    """
    The captions of each row as a list, from any of the forms that columns of captions have. `is_entries` says that
    each text is known to be one caption.
    """
    # A text file holds a caption a line; a text in JSON does not.
    in_lines = _is_webdataset(dataset) and "json" not in column.split(".")
    lists: list[list[str | None]] = []
    wrong, broken, joined, unread = [], [], [], []
    for row, value in enumerate(column_values(dataset, column)):
        if isinstance(value, dict):
            value = value.get("raw", value)  # {"raw": list} is how older releases of `datasets` stored lists
        elif isinstance(value, str) and _LIST_OF_TEXTS.fullmatch(value):
            value = _list_in_text(value.strip())
            if value is None:
                unread.append(row)
        is_list = isinstance(value, list)
        texts = [text.get("raw", text) if isinstance(text, dict) else text for text in (value if is_list else [value])]
        if not all(text is None or isinstance(text, str) for text in texts):
            wrong.append((row, value))
        elif any(text and _LINE_BREAKS.search(text.strip()) for text in texts):
            if in_lines and not is_list:
                texts = _LINE_BREAKS.split(texts[0].strip())
            elif is_entries or sum(bool(text and text.strip()) for text in texts) > 1:
                joined.append(row)
            else:
                broken.append(row)
        lists.append(texts)
    if wrong:
        row, value = wrong[0]
        raise ValueError(
            f"The column {column!r} must hold a caption, a list of captions, or a list of {{'raw': caption}}; "
            f"{len(wrong)} of {len(lists)} rows do not, the first is row {row}, which holds "
            f"{json.dumps(value, default=str)[:80]}."
        )
    if unread:
        raise ValueError(
            f"The column {column!r} holds lists as text in {len(unread)} of {len(lists)} rows, the first are "
            f"{unread[:5]}, which are neither written as JSON nor as Python writes a list. Store lists, or write JSON."
        )
    if broken:
        raise ValueError(
            f"The column {column!r} holds texts of several lines in {len(broken)} of {len(lists)} rows, the first are "
            f"{broken[:5]}. Whether each is one caption or several cannot be told: put spaces for the line breaks, or "
            "a list of captions for the text."
        )
    if joined:
        logger.warning(
            f"The column {column!r} has captions with line breaks, which became spaces, in {len(joined)} of "
            f"{len(lists)} rows, the first are {joined[:5]}."
        )
    counts = [len(texts) for texts in lists]
    if in_lines and min(counts) == 1 < max(counts):
        logger.warning(
            f"Each line of {column!r} counts as a caption: {sum(count > 1 for count in counts)} of {len(counts)} rows "
            f"have several, up to {max(counts)}, and the others one."
        )
    return lists


def _list_in_text(text: str) -> list[str] | None:
    """The list of texts that a cell holds, just as JSON or Python write it; None if it is not written so."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        try:
            found = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return None
        # 'one' 'two', as NumPy writes a list, is a single text to Python.
        found = found if repr(found) == text else None
    if not isinstance(found, list) or not all(isinstance(part, str) for part in found):
        return None
    return [part.encode(errors="replace").decode() for part in found]  # JSON can write halves of a character


def _image_table(source: _Source, column: str) -> datasets.Dataset:
    """The image column alone, named `image` and not decoded, with paths made absolute and kept inside the fence."""
    feature = source.rows.features[column]
    is_value = isinstance(feature, datasets.Value) and feature.dtype.removeprefix("large_") in ("string", "binary")
    # As images are stored by libraries that do not know the feature.
    is_struct = isinstance(feature, dict) and feature.keys() == {"bytes", "path"}
    if not (is_value or is_struct or isinstance(feature, datasets.Image)):
        raise ValueError(f"The column {column!r} must hold images, bytes or paths, but holds {feature}.")
    images = source.rows.with_format(None).select_columns([column])
    if column != "image":
        images = images.rename_column(column, "image")
    images = images.cast_column("image", datasets.Image(decode=False))
    chunks = list(iter_encoded(images))
    has_bytes = [valid for chunk in chunks for valid in chunk.field("bytes").is_valid().to_pylist()]
    paths = [path for chunk in chunks for path in chunk.field("path").to_pylist()]
    named = [None if valid else path for valid, path in zip(has_bytes, paths, strict=True)]
    placed = place_paths(named, source.start, source.fence)
    if placed == named:
        return images
    values = pa.array(placed, images.features["image"].pa_type.field("path").type)
    parts, first = [], 0
    for chunk in chunks:
        fields = [chunk.field("bytes"), values.slice(first, len(chunk))]
        parts.append(pa.StructArray.from_arrays(fields, ["bytes", "path"]))
        first += len(chunk)
    table = datasets.table.InMemoryTable(pa.table({"image": pa.chunked_array(parts)}))
    return datasets.Dataset(table, info=datasets.DatasetInfo(features=images.features))
