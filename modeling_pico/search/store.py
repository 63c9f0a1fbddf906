"""What an index asks of a database."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from .filters import Condition


@dataclass
class Row:
    """
    An image in the database.

    Attributes:
        id (`str`): Digest of its content, 32 hexadecimal digits.
        path (`str`, *optional*): Where it was found; None for one that came without a file.
        state (`str`): State of that file, by which a later look sees that it need not be read again.
        data (`bytes`): Its embeddings, as [`~modeling_pico.search.embeddings.pack`] writes them.
        vectors (`numpy.ndarray` of shape `(vectors, dim)`): What the first stage compares queries with.
        columns (`dict[str, Any]`): What else is known of it.
    """

    id: str
    path: str | None
    state: str
    data: bytes
    vectors: np.ndarray
    columns: dict[str, Any] = field(default_factory=dict)


class Store(Protocol):
    """
    A database of images. `add` and `delete` change all that they are given or nothing, whenever the process dies; an
    image that is added again takes the place of the first.
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

    def nearest(self, query: np.ndarray, limit: int, conditions: Sequence[Condition] = ()) -> list[Row]:
        """
        The images whose vectors fit a query `(tokens, dim)` best, by the database's own multi-vector comparison (the
        sum over the query's tokens of the best product with a vector of the image), without their vectors.
        """
        ...

    def all(self, conditions: Sequence[Condition] = ()) -> list[Row]:
        """All images that fulfil the conditions, without their vectors."""
        ...

    def read(self, ids: Sequence[str]) -> list[Row]:
        """Images by their ids, those that there are, without their vectors."""
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


__all__ = ["Row", "Store"]
