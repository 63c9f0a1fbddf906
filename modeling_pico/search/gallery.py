"""What is added to an index: a folder, a data set or a list of images, looked at one by one."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..model.image_decoding_pico import BadImageError, decode_image, describe_image, open_image
from .contact_sheet import check_no_sheet
from .files import content_id


@dataclass
class Item:
    """
    An image to be added.

    Attributes:
        name (`str`): What it is called in messages.
        path (`str`, *optional*): Absolute path of its file, if it has one.
        value (`Any`): What [`read_image`] takes.
        columns (`dict[str, Any]`): What else is known of it.
    """

    name: str
    path: str | None
    value: Any
    columns: dict[str, Any] = field(default_factory=dict)


class Gallery:
    r"""
    A sequence of [`Item`]; nothing is opened before it is asked for.

    Args:
        images (`str`, `os.PathLike`, `datasets.Dataset`, [`CaptionedImageDataset`] or a sequence):
            A folder with all folders in it (names that begin with a dot are left out), rows with a column `image`, or
            paths, bytes of files or PIL images.
        columns (`Mapping[str, Sequence]`, *optional*):
            What else is known of each image: texts, numbers, truth values or lists of texts. Of a data set, its own
            columns of these kinds come along.
        leave_out (`Path`, *optional*): Folder that is left out of a folder: that of the index.

    Attributes:
        kinds (`dict[str, str]`): Names of the columns and what they hold: `"text"`, `"integer"`, `"number"`,
            `"truth"` or `"texts"`.

    Raises:
        ValueError: if there is no image, or a column holds something else or not one value for each image.
    """

    def __init__(
        self, images: Any, columns: Mapping[str, Sequence[Any]] | None = None, leave_out: Path | None = None
    ) -> None:
        self.kinds: dict[str, str] = {}
        self._folder: str | None = None
        self._rows: Any = None
        self._look: Any = None
        if isinstance(images, (str, os.PathLike)):
            self._folder = os.path.join(os.path.abspath(images), "")
            self._images: Any = _find_files(self._folder, leave_out)
        elif _is_dataset(images):
            self._take_dataset(images)
        elif isinstance(images, Sequence) and not isinstance(images, bytes):
            self._images = images
        else:
            raise ValueError(
                "Images are a folder, a datasets.Dataset, a CaptionedImageDataset, or a list of paths, of bytes or of "
                f"PIL images; got {type(images).__name__}."
            )
        if not len(self):
            raise ValueError("There is no image to add: the data set or list is empty.")
        self._columns = {name: [_plain(value) for value in values] for name, values in (columns or {}).items()}
        for name, values in self._columns.items():
            if len(values) != len(self):
                raise ValueError(f"The column {name!r} has {len(values)} values for {len(self)} images.")
            self.kinds[name] = _kind(name, values)

    def _take_dataset(self, images: Any) -> None:
        import datasets

        rows = images if isinstance(images, datasets.Dataset) else images.dataset
        self._look = images if not isinstance(images, datasets.Dataset) and images.look is not None else None
        if "image" not in rows.column_names:
            raise ValueError(f"The data set has no column 'image', but {rows.column_names}.")
        kinds = {name: _kind_of_feature(feature) for name, feature in rows.features.items() if name != "image"}
        self.kinds = {name: kind for name, kind in kinds.items() if kind is not None}
        rows = rows.with_format(None).select_columns(["image", *self.kinds])
        self._images = self._rows = rows.cast_column("image", datasets.Image(decode=False))
        of_one = {name: of.feature if isinstance(of, datasets.List) else of for name, of in rows.features.items()}
        self._labels = {name: of for name, of in of_one.items() if isinstance(of, datasets.ClassLabel)}

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, place: int) -> Item:
        value = self._images[place]
        columns: dict[str, Any] = {}
        if self._rows is not None:
            columns = {name: _plain(value[name]) for name in value if name != "image"}
            for name, labels in self._labels.items():
                columns[name] = _named(columns[name], labels)
            value = value["image"] or {"path": None, "bytes": None}
            path = value["path"] if value["bytes"] is None else None
            name = f"row {place}" + (f" ({value['path']})" if value["path"] else "")
            if self._look is not None:
                path, value = None, self._look[place]["image"]
        else:
            path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
            name = path or f"image {place}"
        columns.update((column, values[place]) for column, values in self._columns.items())
        if path is not None and isinstance(value, (str, os.PathLike)):
            value = path = os.path.abspath(path)
        return Item(name, None if path is None else os.path.normpath(path), value, columns)

    def covers(self, path: str | None) -> bool:
        """Whether an image of the index belongs to what is added, so that it is gone if it is not among it."""
        return self._folder is None or (path is not None and path.startswith(self._folder))


def read_image(value: Any) -> tuple[str, Image.Image]:
    """
    What an image is known by, and the image. That is a digest of the file's bytes or, of a PIL image, of its pixels
    after decoding; BadImageError if it cannot be decoded.
    """
    if isinstance(value, bytes):
        value = {"path": None, "bytes": value}
    elif isinstance(value, (str, os.PathLike)):
        value = {"path": os.fspath(value), "bytes": None}
    if isinstance(value, Mapping):
        path = value["path"]
        # A pipe or a device would be waited for without end; what is no file is named by `decode_image`.
        if value["bytes"] is None and path is not None and os.path.isfile(path):
            _check_place(path)
            try:
                value = {"path": path, "bytes": Path(path).read_bytes()}
            except OSError as error:
                raise BadImageError(f"The image file {path!r} cannot be read: {error}") from error
    image = decode_image(value)
    if isinstance(value, Image.Image):
        return content_id(repr(image.size).encode() + image.tobytes()), image
    with open_image(value) as opened:
        check_no_sheet(opened, describe_image(value))
    return content_id(value["bytes"]), image


def _check_place(path: str) -> None:
    if f"{os.sep}.{os.sep}" in path:
        from ..data.paths import OutsideError, check_mark

        try:
            check_mark(path)
        except OutsideError as error:
            raise BadImageError(str(error)) from error


def _is_dataset(images: Any) -> bool:
    # Who holds one has imported what it is made of.
    if "datasets" not in sys.modules:
        return False
    import datasets

    if isinstance(images, (datasets.DatasetDict, datasets.IterableDataset)):
        raise ValueError(f"Give one split with a length (datasets.Dataset), got {type(images).__name__}.")
    if isinstance(images, datasets.Dataset):
        return True
    if "torch" not in sys.modules:
        return False
    from ..data import CaptionedImageDataset

    return isinstance(images, CaptionedImageDataset)


def _find_files(folder: str, leave_out: Path | None) -> list[str]:
    if not os.path.isdir(folder):
        raise ValueError(f"{folder!r} is not a folder. Files are given as a list of paths.")
    files = []
    for at, folders, names in os.walk(folder):
        kept = (name for name in folders if not name.startswith("."))
        folders[:] = [n for n in kept if leave_out is None or Path(at, n).resolve() != leave_out.resolve()]
        files += [os.path.join(at, name) for name in names if not name.startswith(".")]
    if not files:
        raise ValueError(f"There is no file in {folder!r}.")
    return sorted(files)


def _plain(value: Any) -> Any:
    """A value without numpy; NaN, by which tables of pandas say that there is none, is None."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and value != value else value


def _named(value: Any, labels: Any) -> Any:
    """The name of a label, or names of several; None of an unknown one, which data sets write as -1."""
    if isinstance(value, list):
        return [_named(label, labels) for label in value]
    return None if value is None or value < 0 else labels.int2str(value)


def _kind(name: str, values: Sequence[Any]) -> str:
    found = {type(value) for value in values if value is not None}
    for kind, types in (("text", {str}), ("truth", {bool}), ("integer", {int}), ("number", {int, float})):
        if found <= types:
            if kind == "integer" and not all(value is None or -(2**63) <= value < 2**63 for value in values):
                raise ValueError(f"The column {name!r} holds integers of more than 64 bits. Give them as texts.")
            return kind
    if found == {list} and all(isinstance(text, str) for texts in values for text in texts or ()):
        return "texts"
    raise ValueError(
        f"The column {name!r} holds values of the type(s) {', '.join(sorted(kind.__name__ for kind in found))}; a "
        "column holds either texts, numbers, truth values or lists of texts."
    )


def _kind_of_feature(feature: Any) -> str | None:
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return "text"
    if isinstance(feature, datasets.List):
        return "texts" if _kind_of_feature(feature.feature) == "text" else None
    if not isinstance(feature, datasets.Value):
        return None
    kinds = (("string", "text"), ("large_string", "text"), ("bool", "truth"), ("int", "integer"), ("uint", "integer"))
    return next((kind for name, kind in (*kinds, ("float", "number")) if feature.dtype.startswith(name)), None)


__all__ = ["Gallery", "Item", "read_image"]
