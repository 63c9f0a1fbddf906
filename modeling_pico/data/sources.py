"""Captioned images from many sources, in one set of columns."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
from transformers.utils import logging

from .caption_files import find_caption_files, is_karpathy_json, read_caption_files, read_karpathy_json
from .images import iter_encoded
from .styled_shapes import styled_shapes


logger = logging.get_logger(__name__)

STYLED_SHAPES = "styled_shapes"
CAPTION_COLUMNS = ("captions", "caption", "sentences", "text")
# What is neither printable nor a separator between words: C0 and C1 controls, and the separators of lines.
_NOT_PRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_FILE_BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv"}


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
) -> datasets.Dataset:
    """
    Loads captioned images from any of the sources below into the same columns.

    `dataset_name` decides, in this order:

    1. `"styled_shapes"`: the generated data of [`styled_shapes`] (a folder of that name is `"./styled_shapes"`).
    2. A file: `.json` in the layout of Karpathy's splits (`dataset_flickr30k.json`, `dataset_coco.json`), or any
       parquet, JSON, JSON lines or CSV file; such a file has no splits, it is the one that is asked for.
    3. A folder written by `save_to_disk`.
    4. A folder with `[prefix_]{split}_caps.txt` and `[prefix_]{split}_ids.txt` (one id a caption, or one an image with
       five captions each), or such a folder followed by the prefix (`"data/f30k"`). `[prefix_]id_mapping.json` gives
       the image files of the ids.
    5. Everything else goes to `datasets.load_dataset`: a local folder (parquet files, or images with
       `metadata.jsonl`), a name on the Hub, or the name of a builder with `data_files`.

    Rows that show the same image (the same bytes, or without bytes the same path, and the same id if there is an
    `id_column`) become one row with all their captions, at the place of the first. Rows with one id but different
    images stay separate: they mean the same and look different.

    Captions are stripped, and line breaks and control characters in them become spaces. Empty ones are dropped with a
    warning.

    Args:
        dataset_name (`str`):
            The source, see above.
        split (`str`):
            Name of the split. Expressions such as `"train[:100]"` work where `load_dataset` reads the data.
        image_column (`str`, *optional*, defaults to `"image"`):
            Column with images (the `Image` feature, bytes, or paths).
        caption_column (`str`, *optional*):
            Column with a caption or a list of captions (`str`, or `{"raw": str}`). Defaults to the first that exists
            of `captions`, `caption`, `sentences`, `text`.
        id_column (`str`, *optional*):
            Column with the identity of the meaning. Without it each image is a meaning of its own, except in the
            sources that have ids (1, 4, and Karpathy's layout).
        style_column (`str`, *optional*):
            Column with the name of the style. Defaults to `"style"` if that exists.
        image_dir (`str`, *optional*):
            Folder that relative image paths start from. Defaults to the folder of the data if that is local.
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

    Returns:
        `datasets.Dataset`: with the columns `image` (`datasets.Image(decode=False)`, nothing is decoded), `captions`
        (list of `str`), `image_id` (`str`) and, if known, `style` (`str`).

    Raises:
        ValueError: for a column or split that does not exist, files that do not fit together, or rows without
            captions.
    """
    if on_empty_captions not in ("error", "skip"):
        raise ValueError(f"`on_empty_captions` must be 'error' or 'skip', got {on_empty_captions!r}.")
    if dataset_name == STYLED_SHAPES:
        dataset, has_ids, root = styled_shapes(split), True, None
    else:
        hub = {"name": config_name, "cache_dir": cache_dir, "revision": revision, "token": token}
        dataset, has_ids, root = _open_source(dataset_name, split, image_dir, with_images, data_files, hub)
    if id_column is None and has_ids:
        id_column = "image_id"
    columns = _choose_columns(dataset, image_column, caption_column, id_column, style_column, with_images)
    return _canonical(dataset, columns, root, with_images, on_empty_captions)


def _open_source(
    name: str,
    split: str,
    image_dir: str | None,
    with_images: bool,
    data_files: Any,
    hub: dict[str, Any],
) -> tuple[datasets.Dataset, bool, Path | None]:
    """Opens a source; returns its rows, whether they bring ids, and the folder that relative paths start from."""
    path = Path(name).expanduser()
    is_local = path.exists()
    root = Path(image_dir) if image_dir else (path.parent if path.is_file() else path) if is_local else None
    if root is not None and not root.is_dir():
        raise ValueError(f"`image_dir` {str(image_dir)!r} is not a folder.")
    if path.is_file():
        if path.suffix == ".json" and is_karpathy_json(path):
            assert root is not None
            return _from_rows(read_karpathy_json(path, split, root, with_images)), True, None
        if path.suffix not in _FILE_BUILDERS:
            raise ValueError(f"Cannot read {name!r}: a data file ends in one of {sorted(_FILE_BUILDERS)}.")
        options = {"sep": "\t"} if path.suffix == ".tsv" else {}
        builder = _FILE_BUILDERS[path.suffix]
        file = datasets.load_dataset(
            builder, data_files={"data": str(path)}, split="data", cache_dir=hub["cache_dir"], **options
        )
        return file, False, root
    if path.is_dir() and any((path / file).is_file() for file in ("dataset_dict.json", "state.json")):
        return _from_disk(path, split), False, root
    files = find_caption_files(str(path), split) if data_files is None else None
    if files is not None:
        rows = read_caption_files(*files, Path(image_dir) if image_dir else files[0].parent, with_images)
        return _from_rows(rows), True, None
    return _from_hub(name, split, data_files, hub), False, root


def _from_rows(rows: list[dict[str, Any]]) -> datasets.Dataset:
    features = datasets.Features(
        image=datasets.Value("string"),
        captions=datasets.List(datasets.Value("string")),
        image_id=datasets.Value("string"),
    )
    return datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features)


def _from_disk(path: Path, split: str) -> datasets.Dataset:
    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise ValueError(f"{str(path)!r} has no split {split!r}; it has {sorted(saved)}.")
        return saved[split]
    if saved.split is not None and str(saved.split) != split:
        raise ValueError(f"{str(path)!r} has no split {split!r}; it has ['{saved.split}'].")
    return saved


def _from_hub(name: str, split: str, data_files: Any, hub: dict[str, Any]) -> datasets.Dataset:
    try:
        return datasets.load_dataset(name, data_files=data_files, split=split, **hub)
    except ValueError as error:
        raise ValueError(f"Cannot load the split {split!r} of {name!r}: {error}") from error


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
    image_column = image_column or "image"
    chosen = {"caption_column": caption_column, "id_column": id_column, "style_column": style_column}
    if with_images:
        chosen["image_column"] = image_column
    for argument, column in chosen.items():
        if column is not None and column not in names:
            raise ValueError(f"There is no column {column!r} (`{argument}`); the columns are {names}.")
    return _Columns(image_column, caption_column, id_column, style_column)


def _canonical(
    dataset: datasets.Dataset, columns: _Columns, root: Path | None, with_images: bool, on_empty_captions: str
) -> datasets.Dataset:
    """Brings rows into the canonical columns: merges, cleans, checks."""
    dataset = dataset.with_format(None)
    texts = _caption_lists(dataset, columns.captions)
    ids = _strings(dataset, columns.image_id) if columns.image_id else None
    images = _image_table(dataset, columns.image, root) if columns.image in dataset.column_names else None
    if images is not None:
        groups = _group_rows(_image_keys(images), ids)
    else:
        groups = _group_rows(ids or range(len(dataset)), None)

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
        logger.warning(f"{problem}; they were dropped.")
    used = [index for index, group in enumerate(captions) if group]

    first = [groups[index][0] for index in used]
    values: dict[str, Any] = {
        "captions": [captions[index] for index in used],
        "image_id": [ids[row] for row in first] if ids else [str(index) for index in range(len(used))],
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


def _clean(text: str | None) -> str:
    return _NOT_PRINTABLE.sub(" ", text).strip() if text else ""


def _strings(dataset: datasets.Dataset, column: str) -> list[str]:
    values = dataset[column][:]
    feature = dataset.features[column]
    if isinstance(feature, datasets.ClassLabel):
        values = [None if value is None else feature.int2str(value) for value in values]
    missing = [row for row, value in enumerate(values) if value is None]
    if missing:
        raise ValueError(f"The column {column!r} is empty in {len(missing)} rows, the first are {missing[:5]}.")
    return [str(value) for value in values]


def _caption_lists(dataset: datasets.Dataset, column: str) -> list[list[str | None]]:
    """The captions of each row as a list, whatever of the known shapes the column has."""
    lists: list[list[str | None]] = []
    for row, value in enumerate(dataset[column][:]):
        if value is None or isinstance(value, str):
            value = [value]
        elif isinstance(value, dict) and isinstance(value.get("raw"), list):
            value = value["raw"]  # a list of {"raw": ...} as older releases of `datasets` stored it
        elif isinstance(value, list):
            value = [text.get("raw", text) if isinstance(text, dict) else text for text in value]
        texts = value if isinstance(value, list) else [value]
        if not all(text is None or isinstance(text, str) for text in texts):
            raise ValueError(
                f"The column {column!r} must hold a caption, a list of captions, or a list of {{'raw': caption}}; "
                f"row {row} holds {json.dumps(value, default=str)[:80]}."
            )
        lists.append(texts or [])
    return lists


def _image_table(dataset: datasets.Dataset, column: str, root: Path | None) -> datasets.Dataset:
    """The image column alone, named `image` and not decoded, with relative paths made absolute below `root`."""
    feature = dataset.features[column]
    is_text = isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")
    is_bytes = isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")
    if not (is_text or is_bytes or isinstance(feature, datasets.Image)):
        raise ValueError(f"The column {column!r} must hold images, bytes or paths, but holds {feature}.")
    images = dataset.select_columns([column])
    if column != "image":
        images = images.rename_column(column, "image")
    if is_text and root is not None:
        paths = [None if path is None else str(root / path) for path in images["image"][:]]
        images = datasets.Dataset.from_dict({"image": paths}, features=datasets.Features(image=feature))
    return images.cast_column("image", datasets.Image(decode=False))


def _image_keys(images: datasets.Dataset) -> Iterator[tuple[str, Any]]:
    """What makes two images the same: their bytes if they are in the data, else their path."""
    row = 0
    for chunk in iter_encoded(images):
        for content, path in zip(chunk.field("bytes"), chunk.field("path"), strict=True):
            if content.is_valid:
                yield "bytes", hashlib.blake2b(content.as_buffer(), digest_size=16).digest()
            else:
                # Rows without any image are never the same: each is reported as a bad image of its own.
                yield ("path", path.as_py()) if path.is_valid else ("row", row)
            row += 1


def _group_rows(keys: Any, ids: list[str] | None) -> list[list[int]]:
    """Rows with equal keys (and ids), in the order of their first row."""
    groups: dict[Any, list[int]] = {}
    for row, key in enumerate(keys):
        groups.setdefault((key, ids[row]) if ids is not None else key, []).append(row)
    return list(groups.values())
