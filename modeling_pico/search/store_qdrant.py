"""Qdrant: in this process and on this disk, for galleries that fit into memory, or on a server."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .filters import Condition
from .store import NO_VECTOR, Row


try:
    from qdrant_client import QdrantClient, models
except ImportError as error:
    raise ImportError('store="qdrant" needs its client: pip install "modeling-pico[qdrant]"') from error

_PAGE = 1000
_OWN = ("id", "path", "state")


class QdrantStore:
    r"""
    A [`Store`] in a collection of Qdrant. An image is written as a whole; of several that are written when the process
    dies, some may be there.

    Args:
        folder (`Path`): The database's folder, made if need be; not used with a server.
        url (`str`, *optional*): Address of a server.
        collection (`str`): Name of the collection.
        size (`int`): Numbers of a vector.
        columns (`Mapping[str, str]`): Names and kinds of the columns that come with the images.
    """

    def __init__(self, folder: Path, url: str | None, collection: str, size: int, columns: Mapping[str, str]) -> None:
        self._names = {name: f"column_{place}" for place, name in enumerate(columns)}
        self._collection = collection
        try:
            self._client = QdrantClient(path=str(folder)) if url is None else QdrantClient(url=url)
        except RuntimeError as error:
            if "already accessed" not in str(error):
                raise
            raise ValueError(
                f"The index in {str(folder.parent)!r} is open elsewhere: without a server Qdrant lets in one process, "
                "and one PicoIndex of it, at a time. Close that one, or use a server (`url`) or the store 'lancedb'."
            ) from error
        if not self._client.collection_exists(collection):
            self._client.create_collection(
                collection, vectors_config=models.VectorParams(size=size, distance=models.Distance.DOT, on_disk=True)
            )

    def add(self, rows: Sequence[Row]) -> None:
        points = [
            models.PointStruct(
                id=str(uuid.UUID(row.id)),
                vector=row.vector.tolist(),
                payload={
                    "id": row.id,
                    "path": row.path,
                    "state": row.state,
                    "data": base64.b64encode(row.data).decode(),
                    **{own: row.columns.get(name) for name, own in self._names.items()},
                },
            )
            for row in rows
        ]
        for start in range(0, len(points), _PAGE):
            self._client.upsert(self._collection, points[start : start + _PAGE], wait=True)

    def delete(self, ids: Sequence[str]) -> None:
        if points := _points(ids):
            self._client.delete(self._collection, models.PointIdsList(points=points), wait=True)

    def keys(self) -> list[tuple[str, str | None, str]]:
        return [tuple(payload[name] for name in _OWN) for payload in self._scroll(None, list(_OWN))]  # type: ignore[misc]

    def count(self, conditions: Sequence[Condition] = ()) -> int:
        return self._client.count(self._collection, count_filter=self._filter(conditions), exact=True).count

    def nearest(self, vector: np.ndarray, limit: int, conditions: Sequence[Condition] = ()) -> list[Row]:
        found = self._client.query_points(
            self._collection, query=vector.tolist(), limit=limit, query_filter=self._filter(conditions)
        )
        return [self._row(point.payload) for point in found.points]

    def all(self, conditions: Sequence[Condition] = ()) -> list[Row]:
        return [self._row(payload) for payload in self._scroll(self._filter(conditions), True)]

    def read(self, ids: Sequence[str]) -> list[Row]:
        points = _points(ids)
        return (
            [self._row(point.payload) for point in self._client.retrieve(self._collection, points)] if points else []
        )

    def values(self, column: str, limit: int) -> list[Any]:
        own = self._names[column]
        found = {payload[own] for payload in self._scroll(None, [own])} - {None}
        return sorted(found) if len(found) <= limit else []

    def tidy(self) -> None:
        """Qdrant does it by itself."""

    def close(self) -> None:
        self._client.close()

    def _scroll(self, conditions: Any, payload: Any) -> Iterator[Any]:
        offset: Any = None
        while True:
            points, offset = self._client.scroll(
                self._collection, scroll_filter=conditions, limit=_PAGE, offset=offset, with_payload=payload
            )
            yield from (point.payload for point in points)
            if offset is None:
                return

    def _row(self, payload: Any) -> Row:
        return Row(
            **{name: payload[name] for name in _OWN},
            data=base64.b64decode(payload["data"]),
            vector=NO_VECTOR,
            columns={name: payload[own] for name, own in self._names.items()},
        )

    def _filter(self, conditions: Sequence[Condition]) -> models.Filter | None:
        must: list[Any] = []
        for condition in conditions:
            key, operator = self._names[condition.column], condition.operator
            if operator in ("=", "in"):
                values = condition.value if operator == "in" else [condition.value]
                must.append(models.Filter(should=[_equal(key, value) for value in values]))
            elif operator == "!=":
                # What is unknown differs from nothing, as in SQL.
                unknown = models.IsNullCondition(is_null=models.PayloadField(key=key))
                must.append(models.Filter(must_not=[_equal(key, condition.value), unknown]))
            else:
                bound = {"<": "lt", "<=": "lte", ">": "gt", ">=": "gte"}[operator]
                must.append(models.FieldCondition(key=key, range=models.Range(**{bound: condition.value})))
        return models.Filter(must=must) if must else None


def _equal(key: str, value: Any) -> models.FieldCondition:
    if isinstance(value, float):
        return models.FieldCondition(key=key, range=models.Range(gte=value, lte=value))
    return models.FieldCondition(key=key, match=models.MatchValue(value=value))


def _points(ids: Sequence[str]) -> list[Any]:
    """Ids as Qdrant has them; what is no id of an image is none."""
    found = []
    for id in ids:
        try:
            found.append(str(uuid.UUID(hex=id)))
        except ValueError:
            continue
    return found


__all__ = ["QdrantStore"]
