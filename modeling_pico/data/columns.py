"""Finding columns, and those of names and numbers: ids, styles, splits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import datasets


# From here on floating-point numbers skip integers: two ids may have become one.
_FIRST_INEXACT = 2.0**53


def find_column(dataset: datasets.Dataset, kind: str, named: str | None, usual: Sequence[str] = ()) -> str:
    """The column of a kind, as named or else the first of the usual ones."""
    names = dataset.column_names
    found = next((name for name in ([named] if named else usual) if name in names), None)
    if found is None:
        wanted = f"no column {named!r}" if named else f"none of the usual columns {list(usual)}"
        raise ValueError(f"There is {wanted} (`{kind}_column`); the columns are {names}.")
    return found


def column_values(dataset: datasets.Dataset, column: str) -> list[Any]:
    """The values of a column that is no column of images."""
    feature = dataset.features[column]
    if isinstance(feature, (datasets.Image, datasets.Audio, datasets.Video)):
        raise ValueError(f"The column {column!r} must hold text or numbers, but holds {feature}.")
    try:
        return dataset[column][:]
    except UnicodeDecodeError as error:
        raise ValueError(f"The column {column!r} holds text that is not UTF-8: {error}.") from error


def column_strings(dataset: datasets.Dataset, column: str) -> list[str]:
    """The values of a column as text: names of labels, and numbers; ValueError where one is missing."""
    values = column_values(dataset, column)
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
