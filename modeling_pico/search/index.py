"""A gallery of images that lies in a vector database, grows, and is searched by texts and by images."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image

from ..model.image_decoding_pico import BadImageError, decode_image, open_image
from .contact_sheet import check_no_sheet
from .embeddings import PRECISIONS, pack, pair_score, unpack
from .encoders import Encoder, ModelEncoder
from .filters import KINDS, parse_where
from .store import Row, Store


SCHEMA_VERSION = 1
FILE, LOCK_FILE, ALIGNMENT_FILE = "index.json", "_lock", "alignment.safetensors"
STORES = ("lancedb", "qdrant")
# Images of one commit: what a killed build encodes again at most.
COMMIT = 512


@dataclass
class Hit:
    """
    An image that was found.

    Attributes:
        id (`str`): Digest of its content.
        score (`float`): The exact score, that of `pair_scores`.
        path (`str`, *optional*): Absolute path; None for an image that came without a file.
        columns (`dict[str, Any]`): What else is known of it.
    """

    id: str
    score: float
    path: str | None
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass
class Changes:
    """
    What became of the images that were added.

    Attributes:
        added (`int`): New images.
        changed (`int`): Images at paths where another was before, which left.
        removed (`int`): Images that left because they are no longer there.
        unchanged (`int`): Images that the index had.
        skipped (`dict[str, str]`): The images that are not in the index, with the reason.
    """

    added: int = 0
    changed: int = 0
    removed: int = 0
    unchanged: int = 0
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass
class _Item:
    """An image to be added: its name in messages, its file if it has one, what to decode, and its columns."""

    name: str
    path: str | None
    value: Any
    columns: dict[str, Any]


class PicoIndex:
    """
    A gallery on disk, made by [`PicoIndex.create`] and read by [`PicoIndex.open`].

    Example:

    ```python
    >>> index = PicoIndex.create("gallery", model, processor)
    >>> index.add("pictures")
    >>> index.search("a red circle", k=5)
    ```
    """

    def __init__(self, folder: Path, about: dict[str, Any], encoder: Encoder | None, url: str | None) -> None:
        self.folder, self._about, self._encoder, self._url = folder, about, encoder, url
        self._opened: Store | None = None

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike,
        model: Any,
        processor: Any = None,
        *,
        encoder: str = "model",
        precision: str = "float16",
        store: str = "lancedb",
        url: str | None = None,
        align: bool | None = None,
    ) -> PicoIndex:
        for name, value, allowed in (("precision", precision, PRECISIONS), ("store", store, STORES)):
            if value not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
        folder = Path(folder)
        if (folder / FILE).exists():
            raise ValueError(f"{str(folder)!r} holds an index already. Open it with PicoIndex.open, or delete it.")
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"{str(folder)!r} is not empty. An index needs a folder of its own.")
        made_by = make_encoder(model, processor, encoder)
        about = {
            "schema_version": SCHEMA_VERSION,
            "store": store,
            "precision": precision,
            "model": made_by.identity,
            "align": bool(align),
            "dim": None,
            "columns": None,
        }
        folder.mkdir(parents=True, exist_ok=True)
        index = cls(folder, about, made_by, url)
        index._write()
        return index

    @classmethod
    def open(
        cls, folder: str | os.PathLike, model: Any = None, processor: Any = None, *, url: str | None = None
    ) -> PicoIndex:
        folder = Path(folder)
        try:
            about = json.loads((folder / FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{str(folder)!r} holds no index: there is no {FILE} in it.") from None
        encoder = None if model is None else make_encoder(model, processor)
        if encoder is not None and encoder.identity["fingerprint"] != about["model"]["fingerprint"]:
            raise ValueError(
                f"The index in {str(folder)!r} was made by another model: {_describe(about['model'])}, and this is "
                f"{_describe(encoder.identity)}. Open it with the model that made it, or build another index."
            )
        return cls(folder, about, encoder, url)

    def add(
        self,
        images: Any,
        *,
        columns: Mapping[str, Sequence[Any]] | None = None,
        batch_size: int = 32,
        remove_missing: bool = False,
        progress: bool = True,
    ) -> Changes:
        from transformers.utils import logging

        encoder = self._needs_encoder()
        items, inside = _items(images, columns)
        changes = Changes()
        with self._sole_writer():
            self._set_columns(items, columns)
            known = self._store.keys() if self._about["dim"] else []
            state_of = {path: (id, state) for id, path, state in known if path is not None}
            ids = {id: path for id, path, _ in known}
            kept: set[str] = set()
            stale: set[str] = set()
            bar = logging.tqdm(total=len(items), desc="Indexing", disable=not progress)
            for start in range(0, len(items), COMMIT):
                new: list[tuple[_Item, str, str, Image.Image]] = []
                for item in items[start : start + COMMIT]:
                    bar.update()
                    state = _file_state(item.path)
                    id, seen = state_of.get(item.path or "", ("", ""))
                    if state and state == seen:
                        changes.unchanged += 1
                        kept.add(id)
                        continue
                    try:
                        content, image = _read(item)
                    except BadImageError as error:
                        changes.skipped[item.name] = str(error)
                        continue
                    if content in kept or content in ids:
                        if content in kept and ids.get(content) != item.path:
                            changes.skipped[item.name] = f"the same image as {ids.get(content) or 'an earlier one'}"
                        else:
                            changes.unchanged += 1
                        kept.add(content)
                        continue
                    if id:
                        changes.changed += 1
                        stale.add(id)
                    else:
                        changes.added += 1
                    kept.add(content)
                    ids[content] = item.path
                    new.append((item, content, state, image))
                if new:
                    encoded = encoder.encode_images([image for *_, image in new], batch_size=batch_size)
                    self._set_dim(encoded[0].shape[1])
                    self._store.add(
                        [
                            Row(
                                content, item.path, state, pack(tokens, self._about["precision"]), tokens, item.columns
                            )
                            for (item, content, state, _), tokens in zip(new, encoded, strict=True)
                        ]
                    )
            bar.close()
            gone = stale - kept
            if remove_missing:
                missing = {id for id, path, _ in known if inside(path)} - kept - gone
                changes.removed = len(missing)
                gone |= missing
            if gone:
                self._store.delete(sorted(gone))
            if changes.added or gone:
                self._store.tidy()
        return changes

    def search(
        self, query: Any, k: int = 10, *, where: str | Mapping[str, Any] | None = None, candidates: int = 100
    ) -> list[Hit]:
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}.")
        encoder = self._needs_encoder()
        conditions = parse_where(where, self.columns)
        if isinstance(query, str):
            if not query.strip():
                raise ValueError("The query is empty.")
            tokens = encoder.encode_texts([query])[0]
        else:
            tokens = encoder.encode_images([query])[0]
        if not len(self):
            return []
        limit = max(k, candidates)
        few = self._store.count(conditions) <= limit
        rows = self._store.all(conditions) if few else self._store.nearest(tokens, limit, conditions)
        precision, dim = self._about["precision"], self._about["dim"]
        hits = [Hit(r.id, pair_score(tokens, unpack(r.data, dim, precision)), r.path, r.columns) for r in rows]
        return sorted(hits, key=lambda hit: (-hit.score, hit.id))[:k]

    def delete(self, ids: str | Sequence[str]) -> int:
        wanted = [ids] if isinstance(ids, str) else list(ids)
        with self._sole_writer():
            before = len(self)
            if before:
                self._store.delete(wanted)
            return before - len(self)

    def info(self) -> dict[str, Any]:
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        return {**self._about, "images": len(self), "bytes": sum(path.stat().st_size for path in files)}

    def embeddings(self, id: str) -> np.ndarray:
        """The stored embeddings `(tokens, dim)` of an image in float32; ValueError if there is none of this id."""
        rows = self._store.read([id]) if self._about["dim"] else []
        if not rows:
            raise ValueError(f"The index holds no image {id!r}.")
        return unpack(rows[0].data, self._about["dim"], self._about["precision"])

    def values(self, column: str, limit: int = 200) -> list[Any]:
        """The values of a column in order; none if there are more than `limit`, or none that a filter can name."""
        if self.columns.get(column) not in KINDS or not self._about["dim"]:
            return []
        return self._store.values(column, limit)

    def __len__(self) -> int:
        return self._store.count() if self._about["dim"] else 0

    @property
    def columns(self) -> dict[str, str]:
        """The columns that `where` may name, with what each holds: text, integer, number or truth."""
        return {"id": "text", "path": "text", **(self._about["columns"] or {})}

    @property
    def _store(self) -> Store:
        if self._opened is None:
            from .store_lancedb import LanceStore

            self._opened = LanceStore(self.folder / "lancedb", self._about["dim"], self._about["columns"] or {})
        return self._opened

    @property
    def encoder(self) -> Encoder:
        """What encodes queries; ValueError if the index was opened without a model."""
        return self._needs_encoder()

    def _needs_encoder(self) -> Encoder:
        if self._encoder is None:
            raise ValueError("The index was opened without a model: PicoIndex.open(folder, model, processor).")
        return self._encoder

    def _set_columns(self, items: list[_Item], columns: Any) -> None:
        if self._about["columns"] is None:
            self._about["columns"] = {
                name: _kind(name, [item.columns.get(name) for item in items])
                for name in dict.fromkeys(name for item in items for name in item.columns)
            }

    def _set_dim(self, dim: int) -> None:
        if self._about["dim"] is None:
            self._about["dim"] = dim
            self._write()

    def _write(self) -> None:
        part = self.folder / f"_{FILE}.part"
        with part.open("w", encoding="utf-8") as file:
            json.dump(self._about, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.folder / FILE)

    @contextmanager
    def _sole_writer(self) -> Iterator[None]:
        lock = FileLock(self.folder / LOCK_FILE, thread_local=False)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise ValueError(
                f"Another process is writing to the index in {str(self.folder)!r}. Wait until it has ended; nothing "
                "was changed."
            ) from None
        try:
            yield
        finally:
            lock.release()


def make_encoder(model: Any, processor: Any = None, encoder: str = "model") -> Encoder:
    """An [`Encoder`] as it is, or that of a model, or with `"onnx"` that of the folder of an ONNX export."""
    if isinstance(model, Encoder):
        return model
    if encoder == "onnx":
        from .encoder_onnx import OnnxEncoder

        return OnnxEncoder(model)
    return ModelEncoder(model, processor)


def _describe(identity: Mapping[str, str]) -> str:
    of_revision = f" at {identity['revision']}" if identity.get("revision") else ""
    return f"{identity.get('name')!r}{of_revision} ({identity.get('method')}, {identity['fingerprint'][:8]})"


def _items(images: Any, columns: Mapping[str, Sequence[Any]] | None) -> tuple[list[_Item], Any]:
    """What is to be added, and which paths count as missing if they are not among it."""
    columns = columns or {}
    if isinstance(images, (str, os.PathLike)):
        folder = os.path.abspath(images)
        if not os.path.isdir(folder):
            raise ValueError(f"{str(images)!r} is not a folder.")
        paths = sorted(os.path.join(at, name) for at, _, names in os.walk(folder) for name in names)
        if not paths:
            raise ValueError(f"There is no file in {str(images)!r}.")
        values: Sequence[Any] = paths
        inside = lambda path: path is not None and path.startswith(os.path.join(folder, ""))  # noqa: E731
    else:
        values, inside = list(images), lambda path: True
        if not values:
            raise ValueError("There is no image to add.")
    items = []
    for place, value in enumerate(values):
        path = os.path.abspath(value) if isinstance(value, (str, os.PathLike)) else None
        own = {name: of_all[place] for name, of_all in columns.items()}
        items.append(_Item(path or f"image {place}", path, path or value, own))
    return items, inside


def _kind(name: str, values: Sequence[Any]) -> str:
    found = {type(value) for value in values if value is not None}
    for kind, types in (
        ("texts", {list}),
        ("text", {str}),
        ("truth", {bool}),
        ("integer", {int}),
        ("number", {int, float}),
    ):
        if found <= types:
            return kind
    raise ValueError(f"The column {name!r} holds {sorted(kind.__name__ for kind in found)}.")


def _file_state(path: str | None) -> str:
    try:
        state = None if path is None else os.stat(path)
    except (OSError, ValueError):
        return ""
    return "" if state is None else f"{state.st_size} {state.st_mtime_ns} {state.st_ctime_ns} {state.st_ino}"


def _read(item: _Item) -> tuple[str, Image.Image]:
    """Digest of an image's content, and the image; BadImageError if it cannot be decoded."""
    value = item.value
    if isinstance(value, str):
        try:
            value = {"path": value, "bytes": Path(value).read_bytes() if os.path.isfile(value) else None}
        except OSError as error:
            raise BadImageError(f"The image file {value!r} cannot be read: {error}") from error
    with open_image(value) if not isinstance(value, Image.Image) else nullcontext(value) as opened:
        check_no_sheet(opened)
    image = decode_image(value)
    if isinstance(value, Mapping):
        content = value["bytes"]
    elif isinstance(value, bytes):
        content = value
    else:
        content = f"{image.size}".encode() + image.tobytes()
    return hashlib.blake2b(content, digest_size=16).hexdigest(), image


__all__ = ["Changes", "Hit", "PicoIndex", "make_encoder"]
