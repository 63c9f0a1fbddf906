"""LanceDB, in this process and on this disk."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from .filters import Condition
from .store import NO_VECTOR, Row


try:
    import lancedb
    import pyarrow as pa
except ImportError as error:
    raise ImportError('An index needs LanceDB: pip install "modeling-pico[search]"') from error

TABLE = "images"
# Files of rows, of which each commit makes one, that are brought together: every time all rows are written anew.
_MOST_FILES = 64
# How often a search is tried while files are brought together.
_TRIES = 3
_TYPES = {"text": pa.string(), "integer": pa.int64(), "number": pa.float64(), "truth": pa.bool_()}
_TYPES["texts"] = pa.list_(pa.string())
_OWN = ("id", "path", "state", "data")


class LanceStore:
    r"""
    A [`Store`] in a folder. Every change is one commit of LanceDB.

    Args:
        folder (`Path`): The database's folder, made if need be.
        size (`int`): Numbers of a vector.
        columns (`Mapping[str, str]`): Names and types of the columns that come with the images.
    """

    def __init__(self, folder: Path, size: int, columns: Mapping[str, str]) -> None:
        self._columns = dict(columns)
        fields = [("id", pa.string()), ("path", pa.string()), ("state", pa.string()), ("data", pa.binary())]
        fields += [("vector", pa.list_(pa.float32(), size))]
        # Under names of their own: nothing that a column is called can meet those above or mean something in SQL.
        fields += [(_own_name(place), _TYPES[kind]) for place, kind in enumerate(columns.values())]
        self._schema = pa.schema(fields)
        self._table = lancedb.connect(folder, read_consistency_interval=timedelta(0)).create_table(
            TABLE, schema=self._schema, exist_ok=True
        )

    def add(self, rows: Sequence[Row]) -> None:
        if not rows:
            return
        vectors = np.stack([row.vector for row in rows]).astype(np.float32)
        arrays = [pa.array([row.id for row in rows], pa.string()), pa.array([row.path for row in rows], pa.string())]
        arrays += [pa.array([row.state for row in rows], pa.string())]
        arrays += [pa.array([row.data for row in rows], pa.binary())]
        arrays += [pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])]
        arrays += [
            pa.array([row.columns.get(name) for row in rows], _TYPES[kind]) for name, kind in self._columns.items()
        ]
        table = pa.table(arrays, schema=self._schema)
        self._table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(table)

    def delete(self, ids: Sequence[str]) -> None:
        if ids:
            self._table.delete(_one_of("id", ids))

    def keys(self) -> list[tuple[str, str | None, str]]:
        found = self._table.search().select(["id", "path", "state"]).to_arrow()
        return list(zip(*(found[name].to_pylist() for name in ("id", "path", "state")), strict=True))

    def count(self, conditions: Sequence[Condition] = ()) -> int:
        return self._table.count_rows(self._sql(conditions))

    def nearest(self, vector: np.ndarray, limit: int, conditions: Sequence[Condition] = ()) -> list[Row]:
        for _ in range(_TRIES - 1):
            # Between its two steps another process may bring files together, and rows get other numbers.
            with contextlib.suppress(OSError, RuntimeError, ValueError):
                ids, rows = self._find(vector, limit, conditions)
                if ids == {row.id for row in rows}:
                    return rows
        return self._find(vector, limit, conditions)[1]

    def _find(self, vector: np.ndarray, limit: int, conditions: Sequence[Condition]) -> tuple[set[str], list[Row]]:
        search: Any = self._table.search(vector.astype(np.float32), vector_column_name="vector")
        search = search.distance_type("dot").select(["id", "_distance"]).limit(limit).with_row_id(True)
        if conditions:
            search = search.where(self._sql(conditions), prefilter=True)
        found = search.to_arrow()
        rows = self._rows(self._table.take_row_ids(sorted(found["_rowid"].to_pylist())))
        return set(found["id"].to_pylist()), rows

    def all(self, conditions: Sequence[Condition] = ()) -> list[Row]:
        search = self._table.search()
        sql = self._sql(conditions)
        return self._rows(search if sql is None else search.where(sql))

    def read(self, ids: Sequence[str]) -> list[Row]:
        return self._rows(self._table.search().where(_one_of("id", ids))) if ids else []

    def values(self, column: str, limit: int) -> list[Any]:
        own = self._own(column)
        found = self._table.search().select([own]).to_arrow()[own].unique().drop_null()
        return sorted(found.to_pylist()) if len(found) <= limit else []

    def tidy(self) -> None:
        stats: Any = self._table.stats()
        if stats["fragment_stats"]["num_fragments"] < _MOST_FILES:
            return
        # Files of a build that was killed go too: nobody else writes, since the index holds its lock.
        self._table.optimize(cleanup_older_than=timedelta(milliseconds=1), delete_unverified=True)

    def close(self) -> None:
        """There is nothing to let go of."""

    def _rows(self, query: Any) -> list[Row]:
        wanted = [name for name in self._schema.names if name != "vector"]
        found = query.select(wanted).to_arrow().to_pylist()
        return [
            Row(
                **{name: row[name] for name in _OWN},
                vector=NO_VECTOR,
                columns={name: row[_own_name(place)] for place, name in enumerate(self._columns)},
            )
            for row in found
        ]

    def _own(self, column: str) -> str:
        return _own_name(list(self._columns).index(column)) if column in self._columns else column

    def _sql(self, conditions: Sequence[Condition]) -> str | None:
        parts = []
        for condition in conditions:
            own = self._own(condition.column)
            if condition.operator == "in":
                parts.append(_one_of(own, condition.value))
            else:
                parts.append(f"{own} {condition.operator} {_literal(condition.value)}")
        return " AND ".join(parts) or None


def _own_name(place: int) -> str:
    return f"column_{place}"


def _literal(value: Any) -> str:
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return repr(value).lower()


def _one_of(column: str, values: Sequence[Any]) -> str:
    return f"{column} IN ({', '.join(map(_literal, values))})"


__all__ = ["LanceStore"]
