"""A gallery of images that lies in a vector database, grows, and is searched by texts and by images."""

from __future__ import annotations

import errno
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image

from ..model.image_decoding_pico import BadImageError
from .contact_sheet import PICTURES
from .embeddings import PRECISIONS, exact_scores, pack, token_bytes, unpack
from .encoders import Encoder, ModelEncoder, load_alignment, save_alignment
from .files import written_whole
from .filters import KINDS, parse_where
from .first_stage import FirstStage
from .gallery import Gallery, Item, read_image
from .processes import Processes
from .store import NO_VECTOR, Row, Store


# Raised whenever what lies on disk changes: an index of another version is refused.
SCHEMA_VERSION = 2
INDEX_FILE, ALIGNMENT_FILE, LOCK_FILE = "index.json", "alignment.safetensors", "_lock"
FIRST_STAGE_FILE = "first_stage.npz"
STORES = ("lancedb", "qdrant")
# Images that one process encodes between two commits: what a killed build encodes again at most.
COMMIT_IMAGES = 512
# Images that are scored exactly. Up to so many are all scored, and need no first stage.
CANDIDATES = 500
# Images that the first stage is fitted to, spread over all. It is fitted anew when there are so many times as many: of
# images of a kind that it has not seen it finds few.
_FITTED_IMAGES, _GROWTH = 512, 1.25


@dataclass
class Hit:
    """
    An image that was found.

    Attributes:
        id (`str`): Digest of its content.
        score (`float`): Its exact score with the query, that of `pair_scores`.
        path (`str`, *optional*): Absolute path of its file; None for an image that came without one.
        columns (`dict[str, Any]`): What else is known of it.
    """

    id: str
    score: float
    path: str | None
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass
class Changes:
    """
    What became of the images that were given to [`PicoIndex.add`].

    Attributes:
        added (`int`): Images that are new in the index.
        changed (`int`): Images whose content, path or columns were others before.
        removed (`int`): Images that left because they are no longer there.
        unchanged (`int`): Images that the index had.
        skipped (`dict[str, str]`): What is not in the index under its name, with the reason: an image that cannot be
            read, or a second file of the same content.
    """

    added: int = 0
    changed: int = 0
    removed: int = 0
    unchanged: int = 0
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass
class _Outcome:
    """
    What a process found out about an image: the id of its content, and its row if it is to be written, without
    embeddings if the index has them; the path of another file of the same content that the index keeps; or a problem.
    """

    name: str
    path: str | None
    id: str = ""
    row: Row | None = None
    twin: str = ""
    problem: str = ""
    dim: int = 0


class _Known:
    """What the index holds, by id and by path, kept up to date while images are added."""

    def __init__(self, keys: Sequence[tuple[str, str | None, str]]) -> None:
        self.keys = {id: (path, state) for id, path, state in keys}
        self.at: dict[str, set[str]] = {}
        for id, path, _ in keys:
            if path is not None:
                self.at.setdefault(path, set()).add(id)
        # Images that were among those given so far, with the name of the first file of each.
        self.given: dict[str, str] = {}
        # Images at whose path another one was found, and those of them in whose place a new one came.
        self.displaced: set[str] = set()
        self.replaced: set[str] = set()


class PicoIndex:
    r"""
    A gallery in a vector database, in a folder of its own. [`PicoIndex.create`] makes it and [`PicoIndex.open`] opens
    it; nothing is held open in between.

    Example:

    ```python
    >>> index = PicoIndex.create("outputs/gallery", model, processor)
    >>> index.add("pictures")
    >>> index.search("a red circle above a blue star", k=5)
    ```
    """

    def __init__(self, folder: Path, about: dict[str, Any], encoder: Encoder | None, url: str | None) -> None:
        self.folder, self.url = folder, url
        self._about, self._encoder = about, encoder
        self._opened: Store | None = None
        self._fitted: tuple[tuple[int, int], FirstStage] | None = None

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike,
        model: Any,
        processor: Any = None,
        *,
        precision: str = "float16",
        store: str = "lancedb",
        url: str | None = None,
        align: bool | None = None,
    ) -> PicoIndex:
        r"""
        Makes an empty index.

        Args:
            folder (`str` or `os.PathLike`): Its folder, which must not exist or be empty.
            model ([`PicoModel`], [`Encoder`] or `str`):
                What encodes images and queries; a `str` is the folder of an ONNX export.
            processor ([`PicoProcessor`], *optional*): The processor of a [`PicoModel`].
            precision (`str`, *optional*, defaults to `"float16"`):
                How embeddings are kept: `"float16"`, or `"int8"` with a scale for each token, which takes half of it.
            store (`str`, *optional*, defaults to `"lancedb"`): The database: `"lancedb"`, or `"qdrant"`.
            url (`str`, *optional*): Address of a Qdrant server. Without it Qdrant runs in this process.
            align (`bool`, *optional*):
                Whether the gallery, of one look that training has not shown, is moved to where images of training
                lie ([`PicoModel.align`]). It is measured at the first `add`, and moves what is added later.

        Raises:
            ValueError: for a folder that is not empty, or an option that is not one of the above.
        """
        for name, value, allowed in (("precision", precision, PRECISIONS), ("store", store, STORES)):
            if value not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
        if url is not None and store != "qdrant":
            raise ValueError(f"A server is named by `url` for store='qdrant' alone, got store={store!r}.")
        folder = Path(folder)
        own = make_encoder(model, processor)
        if align and not isinstance(own, ModelEncoder):
            raise ValueError(
                f"`align` needs a PicoModel, since {type(own).__name__} does not move galleries. Build the index with "
                "the model; it may be searched with the ONNX encoders of that model."
            )
        about = {
            "schema_version": SCHEMA_VERSION,
            "store": store,
            "collection": f"pico-{uuid.uuid4().hex[:12]}",
            "precision": precision,
            "align": bool(align),
            "model": own.identity,
            "dim": None,
            "columns": None,
        }
        index = cls(folder, about, own, url)
        Processes().on_main(index._make_folder)
        return index

    @classmethod
    def open(
        cls, folder: str | os.PathLike, model: Any = None, processor: Any = None, *, url: str | None = None
    ) -> PicoIndex:
        r"""
        Opens an index.

        Args:
            folder (`str` or `os.PathLike`): Its folder.
            model ([`PicoModel`], [`Encoder`] or `str`, *optional*):
                What made it, or the folder of the ONNX export of that model. Without a model the index tells what it
                holds and deletes, but neither adds nor searches.
            processor ([`PicoProcessor`], *optional*): The processor of a [`PicoModel`].
            url (`str`, *optional*): Address of the Qdrant server, if it lies on one.

        Raises:
            ValueError: for a folder without an index, and for another model than the one that made it.
        """
        folder = Path(folder)
        try:
            about = _read_about(folder)
            version = about["schema_version"]
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"{str(folder)!r} holds no index: there is no {INDEX_FILE} in it.") from None
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{str(folder / INDEX_FILE)!r} is not that of an index: {error!r}.") from error
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"The index in {str(folder)!r} has version {version}, this code reads version {SCHEMA_VERSION}. Build "
                "it again, or install the version of the package that made it."
            )
        encoder = None
        if model is not None:
            encoder = make_encoder(model, processor)
            if encoder.identity["fingerprint"] != about["model"]["fingerprint"]:
                raise ValueError(
                    f"The index in {str(folder)!r} was made by another model: {_describe(about['model'])}. This is "
                    f"{_describe(encoder.identity)}. (Weights, configuration, preprocessing and dtype all count.)"
                )
        return cls(folder, about, encoder, url)

    # Adding and removing

    def add(
        self,
        images: Any,
        *,
        columns: Mapping[str, Sequence[Any]] | None = None,
        batch_size: int = 32,
        remove_missing: bool = False,
        progress: bool = True,
    ) -> Changes:
        r"""
        Adds images, each once: an image is known by its content. Files that did not change are not read again, so that
        a build that was interrupted continues, and a folder is brought up to date, by the same call. Under
        `accelerate launch` every process encodes its share.

        Args:
            images (`str`, `os.PathLike`, `datasets.Dataset`, [`CaptionedImageDataset`] or a sequence):
                A folder with all folders in it, rows with a column `image`, or paths, bytes of files or PIL images.
            columns (`Mapping[str, Sequence]`, *optional*):
                What else is known of each image, for [`Hit`] and `where`: texts, numbers, truth values or lists of
                texts. A data set brings its own. The first `add` decides which columns there are.
            batch_size (`int`, *optional*, defaults to 32): Images encoded at a time.
            remove_missing (`bool`, *optional*, defaults to `False`):
                Whether images leave that are not among these: of a folder those that were in it, else all others.
            progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

        Returns:
            [`Changes`]: numbers, and the images that were skipped with the reasons.

        Raises:
            ValueError: if there is nothing to add, another process writes to the index, or columns do not fit.
            OSError: if the disk is full. The index holds what it held, and what was committed before.
        """
        from transformers.utils import logging

        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        encoder = self.encoder
        gallery = Gallery(images, columns, leave_out=self.folder)
        changes = Changes()
        with self._sole_writer() as processes:
            self._check_columns(gallery.kinds)
            known = _Known(processes.from_main(lambda: self._store.keys() if self._about["dim"] else []))
            before = dict(known.keys)
            alignment = self._alignment(gallery, processes) if self._about["align"] else None
            if len(known.keys) + len(gallery) > CANDIDATES:
                ids = sorted(known.keys)
                processes.on_main(partial(self._fit_to_gallery, gallery, ids, encoder, batch_size, alignment))
            bar = logging.tqdm(total=len(gallery), desc="Indexing", disable=not (progress and processes.is_main))
            round_size = COMMIT_IMAGES * processes.count
            for start in range(0, len(gallery), round_size):
                own_start = start + COMMIT_IMAGES * processes.rank
                places = range(min(own_start, len(gallery)), min(own_start + COMMIT_IMAGES, len(gallery)))
                look = partial(self._look_at, gallery, places, known, encoder, batch_size, alignment)
                outcomes = processes.gather(look)
                rows = _take_account(outcomes, known, changes)
                if rows:
                    self._set_dim(max(outcome.dim for outcome in outcomes), processes)
                    processes.on_main(partial(self._commit, rows))
                bar.update(min(round_size, len(gallery) - start))
            bar.close()
            gone = known.displaced - known.given.keys()
            if remove_missing:
                gone |= {id for id, (path, _) in before.items() if gallery.covers(path)} - known.given.keys()
            changes.removed = len(gone - known.replaced)
            ids = sorted(known.keys.keys() - gone) if changes.added + changes.changed else []
            processes.on_main(partial(self._finish, sorted(gone), ids))
        return changes

    def delete(self, ids: str | Sequence[str]) -> int:
        """Removes images by their ids; returns how many there were."""
        with self._sole_writer(alone=True):
            before = len(self)
            if before:
                self._finish([ids] if isinstance(ids, str) else list(ids), [])
            return before - len(self)

    def _look_at(
        self, gallery: Gallery, places: range, known: _Known, encoder: Encoder, batch_size: int, alignment: Any
    ) -> list[_Outcome]:
        """What becomes of some images; those that are new are encoded."""
        outcomes: list[_Outcome] = []
        fresh: dict[str, tuple[_Outcome, Image.Image]] = {}

        def encode() -> None:
            encoded = _encode(encoder, [image for _, image in fresh.values()], batch_size, alignment)
            for (outcome, _), tokens in zip(fresh.values(), encoded, strict=True):
                self._fill(outcome, tokens)
            fresh.clear()

        seen: set[str] = set()
        for place in places:
            item = gallery[place]
            state = _State(_digest_columns(item.columns), _file_state(item.path))
            outcome = _Outcome(item.name, item.path)
            outcomes.append(outcome)
            unread = [id for id in known.at.get(item.path or "", ()) if known.keys[id][1] == str(state)]
            if state.file and unread:
                outcome.id = unread[0]
                continue
            try:
                _check_name(item)
                outcome.id, image = read_image(item.value)
            except BadImageError as error:
                outcome.problem = str(error)
                continue
            outcome.row = Row(outcome.id, item.path, str(state), b"", NO_VECTOR, item.columns)
            if outcome.id in known.keys:
                path, of_old = known.keys[outcome.id]
                old = _State(*of_old.split(" ", 1))
                if item.path is None:
                    outcome.row.path = path
                if outcome.row.path == path and old.columns == state.columns:
                    outcome.row = None
                elif item.path is not None and path not in (None, item.path) and _file_state(path) == old.file:
                    outcome.row, outcome.twin = None, str(path)
            elif outcome.id not in seen:
                seen.add(outcome.id)
                fresh[outcome.id] = (outcome, image)
                if len(fresh) == batch_size:
                    encode()
        if fresh:
            encode()
        return outcomes

    def _fill(self, outcome: _Outcome, tokens: np.ndarray) -> None:
        assert outcome.row is not None
        if np.isfinite(tokens.astype(np.float16)).all():
            outcome.row.data = pack(tokens, self._about["precision"])
            outcome.dim = tokens.shape[1]
        else:
            outcome.id, outcome.row = "", None
            outcome.problem = "the model gives values for it that are NaN, infinite or too large for float16"

    def _commit(self, rows: list[Row]) -> None:
        moved = [row for row in rows if not row.data]
        kept = {row.id: row.data for row in self._store.read([row.id for row in moved])}
        for row in moved:
            row.data = kept[row.id]
        self._add(rows, self._first_stage())

    def _add(self, rows: list[Row], first_stage: FirstStage | None) -> None:
        for row in rows:
            if first_stage is None:
                row.vector = np.zeros(FirstStage.length(self._about["dim"]), np.float32)
            else:
                row.vector = first_stage.of_image(self._unpack(row))
        with _clear_if_full(self.folder):
            self._store.add(rows)

    def _fit_to_gallery(
        self, gallery: Gallery, ids: list[str], encoder: Encoder, batch_size: int, alignment: Any
    ) -> None:
        """Fits the first stage when the gallery outgrows `CANDIDATES`; `ids` are those that are there already."""
        if self._first_stage() is not None:
            return
        places = _spread(range(len(gallery)))
        encoded: list[np.ndarray] = []
        for start in range(0, len(places), batch_size):  # which memory holds
            images = []
            for place in places[start : start + batch_size]:
                with suppress(BadImageError):  # named when it is to be encoded
                    images.append(read_image(gallery[place].value)[1])
            encoded += _encode(encoder, images, batch_size, alignment)
        self._fit(encoded, ids, max(len(gallery), len(ids)))

    def _fit(self, encoded: list[np.ndarray], ids: list[str], size: int) -> None:
        """
        Fits the first stage to embeddings and to images that are there, in an index of this size. The latter get their
        vectors before the first stage is written: without it nobody looks at them.
        """
        (self.folder / FIRST_STAGE_FILE).unlink(missing_ok=True)
        tokens = [*encoded, *(self._unpack(row) for row in (self._store.read(_spread(ids)) if ids else ()))]
        finite = [part[np.isfinite(part).all(axis=1)] for part in tokens]
        if not sum(map(len, finite)):
            return
        fitted = FirstStage.fit(np.concatenate(finite), size)
        for start in range(0, len(ids), COMMIT_IMAGES):
            self._add(self._store.read(ids[start : start + COMMIT_IMAGES]), fitted)
        with _clear_if_full(self.folder):
            fitted.save(self.folder / FIRST_STAGE_FILE)

    def _first_stage(self) -> FirstStage | None:
        """The first stage that vectors are made by now; another process may fit it anew."""
        path = self.folder / FIRST_STAGE_FILE
        try:
            state = path.stat()
            if self._fitted is None or self._fitted[0] != (state.st_ino, state.st_mtime_ns):
                self._fitted = (state.st_ino, state.st_mtime_ns), FirstStage.load(path)
        except FileNotFoundError:
            self._fitted = None
        return None if self._fitted is None else self._fitted[1]

    def _finish(self, gone: list[str], ids: list[str]) -> None:
        """Removes images, and fits the first stage anew where the index outgrew it; `ids` are all, if some came."""
        with _clear_if_full(self.folder):
            for start in range(0, len(gone), 1000):
                self._store.delete(gone[start : start + 1000])
            # Pictures of data sets lie in the folder of the index, by their ids.
            own = {file.stem: file for file in (self.folder / PICTURES).glob("*")} if gone else {}
            for id in own.keys() & set(gone):
                own[id].unlink()
            if (first_stage := self._first_stage()) is not None and len(ids) > _GROWTH * first_stage.size:
                self._fit([], ids, len(ids))
            if gone or ids:
                self._store.tidy()

    # Searching

    def search(
        self, query: Any, k: int = 10, *, where: str | Mapping[str, Any] | None = None, candidates: int = CANDIDATES
    ) -> list[Hit]:
        r"""
        Finds the images that fit a query best. The database finds `candidates` by one vector an image, which estimates
        the score, and these are scored exactly; a gallery of no more is scored whole.

        Args:
            query (`str`, `os.PathLike`, `bytes`, `PIL.Image.Image` or `numpy.ndarray`):
                A text, an image, or what [`encode_query`] made of them. A `str` is a text always; give the path of an
                image as a `Path`.
            k (`int`, *optional*, defaults to 10): Images to find; a smaller gallery is returned whole.
            where (`str` or `Mapping[str, Any]`, *optional*):
                What images must fulfil: `"style = 'ink' and year >= 1990"`, or `{"style": ["ink", "pen"]}`.
            candidates (`int`, *optional*, defaults to 500):
                Images that are scored exactly, at least `k`. With more, fewer of the best are missed.

        Returns:
            `list[Hit]`: best first.

        Raises:
            ValueError: for an empty query, an image that cannot be decoded, `k` or `candidates` below 1, or a filter
                that cannot be read or names a column that does not exist.
        """
        if k < 1 or candidates < 1:
            raise ValueError(f"k and candidates must be at least 1, got k={k} and candidates={candidates}.")
        tokens = query if isinstance(query, np.ndarray) else self.encode_query(query)
        is_empty = self._is_empty()
        conditions = parse_where(where, self.columns)
        if is_empty or not (fitting := self._store.count(conditions)):
            return []
        limit = max(k, candidates)
        first_stage = self._first_stage()
        if first_stage is None or fitting <= limit:
            rows = self._store.all(conditions)
        else:
            rows = self._store.nearest(first_stage.of_query(tokens), limit, conditions)
            if self._first_stage() is not first_stage:  # some of the vectors may have been those of another
                rows = self._store.all(conditions)
        dim, precision = self._about["dim"], self._about["precision"]
        counts = np.array([len(row.data) for row in rows], np.int64) // token_bytes(dim, precision)
        scores = exact_scores(tokens, unpack(b"".join(row.data for row in rows), dim, precision), counts)
        best = sorted(range(len(rows)), key=lambda place: (-scores[place], rows[place].id))[:k]
        return [Hit(rows[place].id, float(scores[place]), rows[place].path, rows[place].columns) for place in best]

    def encode_query(self, query: Any) -> np.ndarray:
        """The embeddings `(tokens, dim)` in float32 that a query of [`search`] is compared by."""
        encoder = self.encoder
        if isinstance(query, str):
            if not query.strip():
                raise ValueError("The query is empty. Give a text, or an image as a Path, as bytes or as a PIL image.")
            tokens = encoder.encode_texts([query])[0]
        else:
            id, image = read_image(query)
            # An image of a moved gallery is where it was moved to; any other stays where it is, as those of training.
            if self._about["align"] and not self._is_empty() and (rows := self._store.read([id])):
                return self._unpack(rows[0])
            tokens = encoder.encode_images([image])[0]
        if not np.isfinite(tokens).all():
            raise ValueError("The model gives values for the query that are NaN or infinite: nothing can be ranked.")
        return tokens

    def _unpack(self, row: Row) -> np.ndarray:
        return unpack(row.data, self._about["dim"], self._about["precision"])

    # What there is

    def embeddings(self, id: str) -> np.ndarray:
        """The stored embeddings `(tokens, dim)` of an image in float32; ValueError if there is none of this id."""
        rows = [] if self._is_empty() else self._store.read([id])
        if not rows:
            raise ValueError(f"The index holds no image {id!r}.")
        return self._unpack(rows[0])

    def values(self, column: str, limit: int = 200) -> list[Any]:
        """The values of a column in order; none if there are more than `limit`, or none that a filter can name."""
        if self._is_empty() or self.columns.get(column) not in KINDS:
            return []
        return self._store.values(column, limit)

    def __len__(self) -> int:
        return 0 if self._is_empty() else self._store.count()

    def _is_empty(self) -> bool:
        """Whether nothing was added yet; another process may have been the first to add since the index was opened."""
        if self._about["dim"] is None:
            self._about = _read_about(self.folder)
        return self._about["dim"] is None

    def info(self) -> dict[str, Any]:
        """
        What the index is: its number of `images`, `bytes` on this disk, `model` (what names it), `precision`, `store`,
        `align`, `columns` with what each holds, and `dim` of the embeddings.
        """
        images = len(self)
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        return {
            "folder": str(self.folder.resolve()),
            "images": images,
            "bytes": sum(path.stat().st_size for path in files),
            **{name: self._about[name] for name in ("model", "precision", "store", "align", "dim", "schema_version")},
            "columns": self.columns,
        }

    @property
    def model(self) -> dict[str, str]:
        """What names the model that made it: `fingerprint`, `name`, `revision` and `method`."""
        return dict(self._about["model"])

    @property
    def columns(self) -> dict[str, str]:
        """Names of the columns, and what each holds: text, integer, number, truth or texts (which no filter reads)."""
        return dict(self._about["columns"] or {})

    def close(self) -> None:
        """Lets go of the database."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    # Files

    @property
    def _store(self) -> Store:
        if self._opened is None:
            size, columns = FirstStage.length(self._about["dim"]), self.columns
            if self._about["store"] == "lancedb":
                from .store_lancedb import LanceStore

                self._opened = LanceStore(self.folder / "lancedb", size, columns)
            else:
                from .store_qdrant import QdrantStore

                self._opened = QdrantStore(self.folder / "qdrant", self.url, self._about["collection"], size, columns)
        return self._opened

    def _make_folder(self) -> None:
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            what = "holds an index already" if (self.folder / INDEX_FILE).exists() else "is not an empty folder"
            raise ValueError(
                f"{str(self.folder)!r} {what}. PicoIndex.open opens an index; a new one needs a folder of its own."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write()

    def _write(self) -> None:
        with _clear_if_full(self.folder), written_whole(self.folder / INDEX_FILE) as part:
            part.write_text(json.dumps(self._about, indent=2), encoding="utf-8")

    @property
    def encoder(self) -> Encoder:
        """What encodes images and queries; ValueError if the index was opened without a model."""
        if self._encoder is None:
            raise ValueError("The index was opened without a model: PicoIndex.open(folder, model, processor).")
        return self._encoder

    def _check_columns(self, kinds: Mapping[str, str]) -> None:
        known = self._about["columns"]
        if known is None:
            self._about["columns"] = dict(kinds)
            return
        for name, kind in kinds.items():
            if name not in known or (kind != known[name] and (kind, known[name]) != ("integer", "number")):
                raise ValueError(
                    f"The column {name!r} ({kind}) is none of the index. The first images decided which there are: "
                    f"{', '.join(f'{name} ({kind})' for name, kind in sorted(known.items())) or 'none'}."
                )

    def _set_dim(self, dim: int, processes: Processes) -> None:
        if self._about["dim"] is None:
            self._about["dim"] = dim
            processes.on_main(self._write)

    def _alignment(self, gallery: Gallery, processes: Processes) -> Any:
        """What moves the gallery: as it was measured at first, or else as these images are measured now."""
        encoder, path = self.encoder, self.folder / ALIGNMENT_FILE
        assert isinstance(encoder, ModelEncoder)

        def measure() -> None:
            if not path.exists():
                with _clear_if_full(self.folder):
                    save_alignment(encoder.measure(gallery), path)

        # Whether the file is there is for one process to see: others may look when it has just been written.
        processes.on_main(measure)
        return load_alignment(path)

    @contextmanager
    def _sole_writer(self, alone: bool = False) -> Iterator[Processes]:
        processes = Processes(alone)
        lock = FileLock(self.folder / LOCK_FILE, thread_local=False)

        def acquire() -> None:
            try:
                lock.acquire(blocking=False)
            except Timeout:
                raise ValueError(
                    f"Another process is writing to the index in {str(self.folder)!r}. Wait until it has ended; "
                    "nothing was changed."
                ) from None

        processes.on_main(acquire)
        try:
            # Another process may have been the first to add.
            self._about = _read_about(self.folder)
            self.close()
            yield processes
        finally:
            lock.release()


def make_encoder(model: Any, processor: Any = None) -> Encoder:
    """An [`Encoder`] as it is, or that of a model and its processor, or that of the folder of an ONNX export."""
    if isinstance(model, Encoder):
        return model
    if isinstance(model, (str, os.PathLike)):
        from .encoder_onnx import OnnxEncoder

        return OnnxEncoder(model)
    if processor is None:
        raise ValueError("Give the model's processor as well: PicoProcessor.from_pretrained(...).")
    return ModelEncoder(model, processor)


def _spread(items: Sequence[Any]) -> list[Any]:
    count = min(len(items), _FITTED_IMAGES)
    return [items[place * len(items) // count] for place in range(count)]


def _read_about(folder: Path) -> dict[str, Any]:
    return json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))


def _encode(encoder: Encoder, images: list[Image.Image], batch_size: int, alignment: Any) -> list[np.ndarray]:
    if alignment is None:
        return encoder.encode_images(images, batch_size=batch_size) if images else []
    assert isinstance(encoder, ModelEncoder)
    return encoder.encode_images(images, batch_size=batch_size, alignment=alignment) if images else []


def _take_account(outcomes: list[_Outcome], known: _Known, changes: Changes) -> list[Row]:
    """Counts what became of images, the same in all processes; returns the rows to write."""
    rows = []
    for outcome in outcomes:
        id, row, name = outcome.id, outcome.row, outcome.name
        if not id:
            changes.skipped[name] = outcome.problem
            continue
        others = known.at.get(outcome.path or "", set()) - {id}
        known.displaced |= others
        if row is not None and not row.data and id not in known.keys:
            changes.skipped[name] = "the same image as one that was left out"
            continue
        repeated = id in known.given
        first = known.given.setdefault(id, outcome.twin or name)
        if first != name:
            changes.skipped[name] = f"the same image as {first}"
        elif repeated:
            changes.skipped[name] = "given more than once: what came with it first is kept"
        elif row is None:
            changes.unchanged += 1
        else:
            if id in known.keys or others:
                changes.changed += 1
            else:
                changes.added += 1
            if id not in known.keys:
                known.replaced |= others
            rows.append(row)
            known.keys[id] = (row.path, row.state)
    return rows


@dataclass
class _State:
    """What is kept of an image to see that nothing changed: a digest of its columns, and the state of its file."""

    columns: str
    file: str = ""

    def __str__(self) -> str:
        return f"{self.columns} {self.file}".strip()


def _digest_columns(columns: Mapping[str, Any]) -> str:
    return blake2b(repr(sorted(columns.items())).encode(errors="surrogatepass"), digest_size=8).hexdigest()


def _file_state(path: str | None) -> str:
    from ..data.images import file_state

    return " ".join(map(str, file_state(path)))


def _check_name(item: Item) -> None:
    try:
        (item.path or "").encode()
    except UnicodeEncodeError:
        raise BadImageError("Its name is no valid text (UTF-8), as which a database keeps it.") from None


def _describe(identity: Mapping[str, str]) -> str:
    at = f" at {identity['revision']}" if identity.get("revision") else ""
    return f"{identity.get('name') or 'unnamed'}{at} ({identity.get('method')}, {identity['fingerprint'][:8]})"


@contextmanager
def _clear_if_full(folder: Path) -> Iterator[None]:
    """Databases report a full disk each in its own way."""
    try:
        yield
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        if code not in (errno.ENOSPC, errno.EDQUOT) and "No space left" not in str(error):
            raise
        raise OSError(
            errno.ENOSPC,
            "The disk is full. The index holds what was committed before; make room and add the images again, which "
            "continues. It lies in",
            str(folder),
        ) from error


__all__ = ["CANDIDATES", "STORES", "Changes", "Hit", "PicoIndex", "make_encoder"]
