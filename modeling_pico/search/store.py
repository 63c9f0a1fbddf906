"""What an index asks of a database."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from .filters import Condition


# Of rows that were read, and of those that are to be written and get theirs then.
NO_VECTOR = np.empty(0, np.float32)


@dataclass
class Row:
    """
    An image in the database.

    Attributes:
        id (`str`): Digest of its content, 32 hexadecimal digits.
        path (`str`, *optional*): Where it was found; None for one that came without a file.
        state (`str`): State of that file, by which a later look sees that it need not be read again.
        data (`bytes`): Its embeddings, as [`~modeling_pico.search.embeddings.pack`] writes them.
        vector (`numpy.ndarray` of shape `(size,)`): What the first stage compares queries with; not read back.
        columns (`dict[str, Any]`): What else is known of it.
    """

    id: str
    path: str | None
    state: str
    data: bytes
    vector: np.ndarray
    columns: dict[str, Any] = field(default_factory=dict)


class Store(Protocol):
    """
    A database of images, each with one vector. An image is there as a whole or not at all, whenever the process dies;
    one that is added again takes the place of the first.
    """

    def add(self, rows: Sequence[Row]) -> None:
        """Adds images."""
        ...

    def delete(self, ids: Sequence[str]) -> None:
        """Removes images."""
        ...

    def keys(self) -> list[tuple[str, str | None, str]]:
        """Id, path and state of all images."""
        ...

    def count(self, conditions: Sequence[Condition] = ()) -> int:
        """How many images fulfil all conditions."""
        ...

    def nearest(self, vector: np.ndarray, limit: int, conditions: Sequence[Condition] = ()) -> list[Row]:
        """The images whose vectors have the largest products with one `(size,)`, among those that fulfil all."""
        ...

    def all(self, conditions: Sequence[Condition] = ()) -> list[Row]:
        """All images that fulfil the conditions."""
        ...

    def read(self, ids: Sequence[str]) -> list[Row]:
        """Images by their ids, those that there are."""
        ...

    def values(self, column: str, limit: int) -> list[Any]:
        """The values of a column in order; none if there are more than `limit`."""
        ...

    def tidy(self) -> None:
        """Called when many images have been added or removed."""
        ...

    def close(self) -> None:
        """Lets go of the database."""
        ...


__all__ = ["NO_VECTOR", "Row", "Store"]
