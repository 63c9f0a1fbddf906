"""Captioned images from many sources, in one set of columns."""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import pyarrow as pa
from huggingface_hub import constants as hub_constants
from transformers.utils import logging

from .caption_files import find_caption_files, has_image_list, read_caption_files, read_image_list
from .images import MAX_SKIPPED, check_share, image_keys, iter_encoded, too_many
from .paths import Fence, OutsideError, check_files, files_named_by_card, place_paths, saved_files
from .splits import choose_split, split_of_file
from .styled_shapes import styled_shapes


logger = logging.get_logger(__name__)

STYLED_SHAPES = "styled_shapes"
IMAGE_COLUMNS = ("image", "image_name", "file_name")
CAPTION_COLUMNS = ("captions", "caption", "sentences", "text", "comment")
_LINE_BREAKS = re.compile(r"[\r\n]+")
# What is neither printable nor a separator between words: C0 and C1 controls, and the separators of lines.
_NOT_PRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
# Categories of characters that show nothing: controls, formats, separators. All others count as visible, also those
# that are newer than Python's tables.
_INVISIBLE = ("Cc", "Cf", "Zs", "Zl", "Zp")
_FILE_BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
_TABLES = (".csv", ".tsv", ".txt")
_IMAGE_NAME = re.compile(r"\.(jpe?g|png|gif|webp)\b", re.IGNORECASE)
# From here on floating-point numbers skip integers: two ids may have become one.
_FIRST_INEXACT = 2.0**53


class _Source(NamedTuple):
    """Rows as they are, whether they bring ids, and where relative paths start from and all paths may lead to."""

    rows: datasets.Dataset
    has_ids: bool
    start: Path | None
    fence: Fence


class _Columns(NamedTuple):
    image: str
    captions: str
    image_id: str | None
    style: str | None


def load_captioned_images(
    dataset_name: str,
    *,
    split: str,
    image_column: str | None = None,
    caption_column: str | None = None,
    id_column: str | None = None,
    style_column: str | None = None,
    image_dir: str | None = None,
    config_name: str | None = None,
    cache_dir: str | None = None,
    data_files: str | Sequence[str] | dict[str, Any] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    with_images: bool = True,
    on_empty_captions: Literal["error", "skip"] = "error",
    max_skipped: float = MAX_SKIPPED,
) -> datasets.Dataset:
    """
    Loads captioned images from any of the sources below into the same columns.

    `dataset_name` decides, in this order:

    1. `"styled_shapes"`: the generated data of [`styled_shapes`] (a folder of that name is `"./styled_shapes"`).
    2. A file: `.json` in the layout of Karpathy's splits (`dataset_flickr30k.json`, `dataset_coco.json`) or of COCO
       (`captions_val2017.json`), or any parquet, JSON, JSON lines or CSV file, also with tabs, semicolons or bars
       between its columns and also as `.txt` (`captions.txt` of Flickr8k, `results.csv` of Flickr30k). All columns of
       a CSV file are text.
    3. A folder written by `save_to_disk`.
    4. A folder with `[prefix_]{split}_caps.txt` and `[prefix_]{split}_ids.txt` (one id a caption, or one an image with
       five captions each), or such a folder followed by the prefix (`"data/f30k"`). `[prefix_]id_mapping.json` gives
       the image files of the ids.
    5. Everything else is found as `datasets.load_dataset` finds it: a local folder (parquet files, CSV files, images
       with `metadata.jsonl` or `metadata.csv`), a name on the Hub, or the name of a builder with `data_files`.

    If the source knows a single split and its rows have a column `split`, that column says which rows are which. A
    single file without such a column is the split that its name says (`test.csv`), or `train`; the same rows are never
    handed out as two splits. `val`, `valid`, `dev` and `validation` are the same, and so are `train` and `training`,
    `test` and `testing`.

    Rows that show the same image (the same bytes, or without bytes the same path, and the same id if there is an
    `id_column`) become one row with all their captions, at the place of the first. Rows with one id but different
    images stay separate: they mean the same and look different.

    Captions are stripped, and control characters in them become spaces. Empty ones, also those without a visible
    character, are dropped with a warning. A text with line breaks may be one caption or several: each line of a text
    file of a WebDataset is a caption, in a list of captions line breaks become spaces with a warning, and elsewhere
    they are refused.

    Neither paths of images nor the files that a data set says its rows are in may lead out of the folder of the data
    or `image_dir`, be it by `..`, as absolute paths, or behind symbolic links; data of the Hub may besides use the
    caches of `datasets` and `huggingface_hub`.

    Args:
        dataset_name (`str`):
            The source, see above.
        split (`str`):
            Name of the split. Expressions such as `"train[:100]"` work too, except for 1, 4, and the layouts of
            Karpathy and COCO.
        image_column (`str`, *optional*):
            Column with images (the `Image` feature, `{"bytes", "path"}`, bytes, or paths). Defaults to the first that
            exists of `image`, `image_name`, `file_name`.
        caption_column (`str`, *optional*):
            Column with a caption or a list of captions (`str`, or `{"raw": str}`). Defaults to the first that exists
            of `captions`, `caption`, `sentences`, `text`, `comment`.
        id_column (`str`, *optional*):
            Column with the identity of the meaning. Without it each image is a meaning of its own, except in the
            sources that have ids (1, 4, and the layouts of Karpathy and COCO). Ids that are not from a column differ
            between different images of all sources, so that loaded sets can be concatenated; those of a column are
            kept as they are.
        style_column (`str`, *optional*):
            Column with the name of the style. Defaults to `"style"` if that exists.
        image_dir (`str`, *optional*):
            Folder that relative image paths start from, and that images may lie in. Defaults to the folder of the
            data if that is local.
        config_name (`str`, *optional*):
            Configuration of a data set on the Hub.
        cache_dir (`str`, *optional*):
            Cache folder of `datasets`.
        data_files (`str`, `Sequence[str]` or `dict`, *optional*):
            Passed to `load_dataset`.
        revision (`str`, *optional*):
            Revision of a data set on the Hub.
        token (`str` or `bool`, *optional*):
            Token for the Hub.
        with_images (`bool`, *optional*, defaults to `True`):
            `False` loads the captions alone, every image being `None`: for data whose images are not at hand. The rows
            are the same as with images (if the data has no image column at all, rows with one id become one).
        on_empty_captions (`str`, *optional*, defaults to `"error"`):
            What becomes of a row whose captions are all empty: `"error"` raises, `"skip"` drops it with a warning.
        max_skipped (`float`, *optional*, defaults to 0.5):
            Largest share of the rows that `"skip"` drops; more is an error.

    Returns:
        `datasets.Dataset`: with the columns `image` (`datasets.Image(decode=False)`, nothing is decoded), `captions`
        (list of `str`), `image_id` (`str`) and, if known, `style` (`str`).

    Raises:
        ValueError: for a column or split that does not exist, files that cannot be read or do not fit together,
            captions that are no text, ids that are missing, paths that lead elsewhere, or rows without captions. The
            message says how many rows it is about and names the first.
    """
    check_share(max_skipped)
    if on_empty_captions not in ("error", "skip"):
        raise ValueError(f"`on_empty_captions` must be 'error' or 'skip', got {on_empty_captions!r}.")
    if dataset_name == STYLED_SHAPES:
        source = _Source(styled_shapes(split), True, None, Fence([]))
    else:
        hub = {"name": config_name, "cache_dir": cache_dir, "revision": revision, "token": token}
        source = _open_source(dataset_name, split, image_dir, with_images, data_files, hub)
    if id_column is None and source.has_ids:
        id_column = "image_id"
    columns = _choose_columns(source.rows, image_column, caption_column, id_column, style_column, with_images)
    return _canonical(source, columns, with_images, on_empty_captions, max_skipped)


def _open_source(
    name: str, split: str, image_dir: str | None, with_images: bool, data_files: Any, hub: dict[str, Any]
) -> _Source:
    path = Path(name).expanduser()
    folder = (path.parent if path.is_file() else path).absolute() if path.exists() else None
    start = Path(image_dir).expanduser().absolute() if image_dir else folder
    if start is not None and not start.is_dir():
        raise ValueError(f"`image_dir` {str(image_dir)!r} is not a folder.")
    fence = Fence(_image_folders(folder, start))
    if path.is_file():
        return _from_file(path, split, start, fence, with_images, hub["cache_dir"])
    if path.is_dir() and any((path / file).is_file() for file in ("dataset_dict.json", "state.json")):
        check_files(list(saved_files(path)), fence, str(path))
        return _Source(_from_disk(path, split), False, start, fence)
    files = find_caption_files(str(path), split) if data_files is None else None
    if files is not None:
        start = start or files[0].parent.absolute()
        rows = read_caption_files(*files, start, with_images)
        return _Source(_from_rows(rows), True, start, Fence(_image_folders(files[0].parent.absolute(), start)))
    rows = _load(name, name, split, fence, data_files=data_files, **hub)
    caches = [hub["cache_dir"] or datasets.config.HF_DATASETS_CACHE, hub_constants.HF_HUB_CACHE]
    return _Source(rows, False, start, Fence([*fence.folders, *caches]))


def _image_folders(*folders: Path | None) -> list[Path]:
    """Where images may lie: the folders, and the files behind a snapshot in the cache of the Hub."""
    known = list(dict.fromkeys(folder for folder in folders if folder is not None))
    parents = [parent for folder in known for parent in (folder, *folder.parents)]
    blobs = [parent.parent / "blobs" for parent in parents if parent.name == "snapshots"]
    return [*known, *(folder for folder in blobs if folder.is_dir())]


def _from_file(
    path: Path, split: str, start: Path | None, fence: Fence, with_images: bool, cache_dir: str | None
) -> _Source:
    assert start is not None  # the folder of the file, at least
    suffix = path.suffix.lower()
    if suffix == ".json" and has_image_list(path):
        return _Source(_from_rows(read_image_list(path, split, start, with_images)), True, start, fence)
    if suffix in _TABLES:
        rows = choose_split({split_of_file(path): _read_table(path)}, split, repr(str(path)))
        return _Source(rows, False, start, fence)
    if suffix not in _FILE_BUILDERS:
        known = sorted([*_FILE_BUILDERS, *_TABLES])
        raise ValueError(f"Cannot read {str(path)!r}: a data file ends in one of {known}.")
    # Brackets and asterisks of a name are no pattern.
    files = {split_of_file(path): glob.escape(str(path))}
    rows = _load(_FILE_BUILDERS[suffix], str(path), split, fence, data_files=files, cache_dir=cache_dir)
    return _Source(rows, False, start, fence)


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
    if not names or len(set(names)) < len(names) or any(_NOT_PRINTABLE.search(name) for name in names):
        raise ValueError(
            f"The first line of {str(path)!r} must name the columns, each once; it holds {str(names)[:80]}."
        )
    if any(_IMAGE_NAME.search(name) for name in names):
        raise ValueError(
            f"The first line of {str(path)!r} must name the columns (for example `image,caption`), but holds a row: "
            f"{str(names)[:80]}."
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
    features = datasets.Features(
        image=datasets.Value("string"),
        captions=datasets.List(datasets.Value("string")),
        image_id=datasets.Value("string"),
    )
    return datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features)


def _from_disk(path: Path, split: str) -> datasets.Dataset:
    saved = datasets.load_from_disk(str(path))
    if not isinstance(saved, datasets.DatasetDict):
        saved = {str(saved.split or "train"): saved}
    return choose_split(saved, split, repr(str(path)))


def _load(builder: str, source: str, split: str, fence: Fence, *, data_files: Any, **options: Any) -> datasets.Dataset:
    """One split of what `datasets.load_dataset` finds."""
    folder = Path(source).expanduser()
    found_by_itself = data_files is None
    try:
        if found_by_itself and folder.is_dir():
            named = files_named_by_card(folder)
            if glob.has_magic(str(folder.resolve())):
                if named:
                    raise ValueError(
                        "its README.md names files, and the folder's own name reads as a pattern: rename it"
                    )
                data_files = _patterns_in(folder)
        found = datasets.load_dataset_builder(builder, data_files=data_files, **options)
        if found_by_itself:
            # Of a folder of images, those that rows name are checked with the rows.
            images = found.EXTENSIONS if found.name == "imagefolder" else ()
            files = [file for files in (found.config.data_files or {}).values() for file in files]
            local = [file for file in files if "://" not in file]
            check_files([file for file in local if Path(file).suffix.lower() not in images], fence, source)
        splits = _tables(found)
        if splits is None:
            found.download_and_prepare()
            splits = found.as_dataset()
    except (OSError, OutsideError):  # what does not exist or cannot be reached, or is not to be read
        raise
    except Exception as error:  # its readers of files fail in many ways when these are not as they should be
        generating = isinstance(error, datasets.exceptions.DatasetGenerationError)
        cause = error.__cause__ if generating and error.__cause__ is not None else error
        reason = f"{type(cause).__name__}: {cause}" if str(cause) else "it holds no rows"
        raise ValueError(f"Cannot load the split {split!r} of {source!r}: {reason}") from error
    return choose_split(splits, split, repr(source))


def _patterns_in(folder: Path) -> dict[str, list[str]]:
    """The patterns by which `datasets` searches a folder, with the name of the folder being none."""
    base = glob.escape(str(folder.resolve()))
    found = datasets.data_files.get_data_patterns(base)
    return {str(split): [f"{base}/{pattern}" for pattern in patterns] for split, patterns in found.items()}


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


def _choose_columns(
    dataset: datasets.Dataset,
    image_column: str | None,
    caption_column: str | None,
    id_column: str | None,
    style_column: str | None,
    with_images: bool,
) -> _Columns:
    names = dataset.column_names
    if style_column is None and "style" in names:
        style_column = "style"
    if caption_column is None:
        caption_column = next((column for column in CAPTION_COLUMNS if column in names), None)
        if caption_column is None:
            raise ValueError(
                f"The data has none of the usual caption columns {list(CAPTION_COLUMNS)}; its columns are {names}. "
                "Name the right one with `caption_column`."
            )
    if image_column is None:
        image_column = next((column for column in IMAGE_COLUMNS if column in names), IMAGE_COLUMNS[0])
    chosen = {"caption_column": caption_column, "id_column": id_column, "style_column": style_column}
    if with_images:
        chosen["image_column"] = image_column
    for argument, column in chosen.items():
        if column is not None and column not in names:
            raise ValueError(f"There is no column {column!r} (`{argument}`); the columns are {names}.")
    return _Columns(image_column, caption_column, id_column, style_column)


def _canonical(
    source: _Source, columns: _Columns, with_images: bool, on_empty_captions: str, max_skipped: float
) -> datasets.Dataset:
    """Brings rows into the canonical columns: merges, cleans, checks."""
    dataset = source.rows.with_format(None)
    if not len(dataset):
        raise ValueError("The data holds no rows.")
    # The text file of a WebDataset holds a caption a line.
    texts = _caption_lists(dataset, columns.captions, in_lines=dataset.info.builder_name == "webdataset")
    ids = _strings(dataset, columns.image_id) if columns.image_id else None
    images = _image_table(source, columns.image, with_images) if columns.image in dataset.column_names else None
    if images is not None:
        keys = list(image_keys(images))
        groups = _group_rows(keys, ids)
    else:
        keys = [("row", row) for row in range(len(dataset))]
        groups = _group_rows(ids or keys, None)

    merged = [[text for row in rows for text in texts[row]] for rows in groups]
    captions, dropped = [], 0
    for group in merged:
        kept = [text for text in map(_clean, group) if text]
        dropped += len(group) - len(kept)
        captions.append(kept)
    if dropped:
        logger.warning(f"{dropped} of {sum(map(len, merged))} captions are empty and were dropped.")
    empty = [index for index, group in enumerate(captions) if not group]
    if empty:
        rows = [groups[index][0] for index in empty]
        problem = f"{len(empty)} of {len(groups)} images have no caption, the first at the rows {rows[:5]}"
        if on_empty_captions == "error":
            raise ValueError(f"{problem}. Drop them with on_empty_captions='skip'.")
        if len(empty) > max_skipped * len(groups) or len(empty) == len(groups):
            raise ValueError(f"{problem}. {too_many(len(empty), len(groups), max_skipped)}")
        logger.warning(f"{problem}; they were dropped.")
    used = [index for index, group in enumerate(captions) if group]

    first = [groups[index][0] for index in used]
    values: dict[str, Any] = {
        "captions": [captions[index] for index in used],
        "image_id": [ids[row] for row in first] if ids else _made_ids([keys[row] for row in first], texts),
    }
    features = {"captions": datasets.List(datasets.Value("string")), "image_id": datasets.Value("string")}
    if columns.style:
        styles = _strings(dataset, columns.style)
        values["style"], features["style"] = [styles[row] for row in first], datasets.Value("string")
    return _join(images if with_images else None, first, values, features)


def _join(
    images: datasets.Dataset | None, first: list[int], values: dict[str, Any], features: dict[str, Any]
) -> datasets.Dataset:
    rest = datasets.Dataset.from_dict(values, features=datasets.Features(features))
    if images is None:
        images = datasets.Dataset.from_dict(
            {"image": [None] * len(first)}, features=datasets.Features(image=datasets.Image(decode=False))
        )
    elif first != list(range(len(images))):
        images = images.select(first)
    return datasets.concatenate_datasets([images, rest], axis=1)


def _made_ids(keys: list[tuple[str, Any]], texts: list[list[str | None]]) -> list[str]:
    """
    An id for each image that no other image of any source has; the same image has the same id in every load. Rows
    without an image are told apart by their number among all the captions of the source.
    """
    if any(kind == "row" for kind, _ in keys):
        source = hashlib.blake2b(json.dumps(texts).encode()).digest()
        keys = [(kind, (source, value) if kind == "row" else value) for kind, value in keys]
    return [hashlib.blake2b(repr(key).encode(), digest_size=8).hexdigest() for key in keys]


def _clean(text: str | None) -> str:
    cleaned = _NOT_PRINTABLE.sub(" ", text).strip() if text else ""
    # Without a visible character (zero-width spaces, byte order marks) there is nothing to read.
    return cleaned if any(unicodedata.category(character) not in _INVISIBLE for character in cleaned) else ""


def _values(dataset: datasets.Dataset, column: str) -> list[Any]:
    feature = dataset.features[column]
    if isinstance(feature, (datasets.Image, datasets.Audio, datasets.Video)):
        raise ValueError(f"The column {column!r} must hold text or numbers, but holds {feature}.")
    try:
        return dataset[column][:]
    except UnicodeDecodeError as error:
        wrong = [row for row in range(len(dataset)) if not _is_unicode(dataset, row, column)]
        raise ValueError(
            f"The column {column!r} holds text that is not UTF-8 in {len(wrong)} rows, the first are {wrong[:5]}."
        ) from error


def _is_unicode(dataset: datasets.Dataset, row: int, column: str) -> bool:
    try:
        dataset.select([row])[column][:]
    except UnicodeDecodeError:
        return False
    return True


def _strings(dataset: datasets.Dataset, column: str) -> list[str]:
    values = _values(dataset, column)
    feature = dataset.features[column]
    if isinstance(feature, datasets.ClassLabel):
        # Negative is how labels that are not known are stored.
        values = [None if value is None or value < 0 else feature.int2str(value) for value in values]
    missing = [row for row, value in enumerate(values) if value is None or value == "" or value != value]
    if missing:
        raise ValueError(f"The column {column!r} is empty in {len(missing)} rows, the first are {missing[:5]}.")
    floats = (value for value in values if isinstance(value, float))
    if any(math.isinf(value) or abs(value) >= _FIRST_INEXACT for value in floats):
        raise ValueError(
            f"The column {column!r} holds floating-point numbers of 2**53 or more, which have lost digits. Store it "
            "as text or integers."
        )
    return [str(value) for value in values]


def _caption_lists(dataset: datasets.Dataset, column: str, in_lines: bool) -> list[list[str | None]]:
    """The captions of each row as a list, whatever of the known shapes the column has."""
    lists: list[list[str | None]] = []
    wrong, broken = [], []
    for row, value in enumerate(_values(dataset, column)):
        if value is None:
            value = [value]
        elif isinstance(value, str):
            value = _LINE_BREAKS.split(value.strip())
            if len(value) > 1 and not in_lines:
                broken.append(row)
        elif isinstance(value, dict) and isinstance(value.get("raw"), list):
            value = value["raw"]  # a list of {"raw": ...} as older releases of `datasets` stored it
        elif isinstance(value, list):
            value = [text.get("raw", text) if isinstance(text, dict) else text for text in value]
        texts = value if isinstance(value, list) else [value]
        if not all(text is None or isinstance(text, str) for text in texts):
            wrong.append((row, value))
        lists.append(texts or [])
    if broken:
        raise ValueError(
            f"The column {column!r} holds texts of several lines in {len(broken)} of {len(lists)} rows, the first are "
            f"{broken[:5]}. Whether each is one caption or several cannot be told: put spaces for the line breaks, or "
            "a list of captions for the text."
        )
    if wrong:
        row, value = wrong[0]
        raise ValueError(
            f"The column {column!r} must hold a caption, a list of captions, or a list of {{'raw': caption}}; "
            f"{len(wrong)} of {len(lists)} rows do not, the first is row {row}, which holds "
            f"{json.dumps(value, default=str)[:80]}."
        )
    joined = sum(bool(text and _LINE_BREAKS.search(text.strip())) for texts in lists for text in texts)
    if joined:
        logger.warning(f"{joined} captions hold line breaks, which became spaces.")
    return lists


def _image_table(source: _Source, column: str, with_images: bool) -> datasets.Dataset:
    """The image column alone, named `image` and not decoded, with paths made absolute and kept inside the fence."""
    fence = source.fence if with_images else None  # paths alone only tell rows apart
    feature = source.rows.features[column]
    is_text = isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")
    is_bytes = isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")
    # As images are stored by libraries that do not know the feature.
    is_struct = isinstance(feature, dict) and feature.keys() == {"bytes", "path"}
    if not (is_text or is_bytes or is_struct or isinstance(feature, datasets.Image)):
        raise ValueError(f"The column {column!r} must hold images, bytes or paths, but holds {feature}.")
    images = source.rows.select_columns([column])
    if column != "image":
        images = images.rename_column(column, "image")
    if is_text:
        paths = place_paths(images["image"][:], source.start, fence)
        images = datasets.Dataset.from_dict({"image": paths}, features=datasets.Features(image=feature))
    images = images.cast_column("image", datasets.Image(decode=False))
    return images if is_text or is_bytes else _placed(images, source.start, fence)


def _placed(images: datasets.Dataset, start: Path | None, fence: Fence | None) -> datasets.Dataset:
    """Images of which those without bytes have placed paths."""
    chunks = list(iter_encoded(images))
    paths = [
        None if has_bytes else path
        for chunk in chunks
        for has_bytes, path in zip(
            chunk.field("bytes").is_valid().to_pylist(), chunk.field("path").to_pylist(), strict=True
        )
    ]
    placed = place_paths(paths, start, fence)
    if placed == paths:
        return images
    values = pa.array(placed, images.features["image"].pa_type.field("path").type)
    parts, first = [], 0
    for chunk in chunks:
        fields = [chunk.field("bytes"), values.slice(first, len(chunk))]
        parts.append(pa.StructArray.from_arrays(fields, ["bytes", "path"]))
        first += len(chunk)
    table = datasets.table.InMemoryTable(pa.table({"image": pa.chunked_array(parts)}))
    return datasets.Dataset(table, info=datasets.DatasetInfo(features=images.features))


def _group_rows(keys: Any, ids: list[str] | None) -> list[list[int]]:
    """Rows with equal keys (and ids), in the order of their first row."""
    groups: dict[Any, list[int]] = {}
    for row, key in enumerate(keys):
        groups.setdefault((key, ids[row]) if ids is not None else key, []).append(row)
    return list(groups.values())
