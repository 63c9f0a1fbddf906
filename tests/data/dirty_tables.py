"""Data sets with one mutation a row, and tables that are broken as a whole; how each is stored, loaded and judged.

Every image carries its identity in its pixels and every caption belongs to one identity (see dirty_images.py). Rows
are written as data sets, loaded as a training loads them (`load_captioned_images`, `check_images`,
`CaptionedImageDataset`), and compared: a row is there with the right pixels and the right captions, or it was left
out and counted by a report. Tables that are broken as a whole have to load rightly or be refused with a message.
"""

from __future__ import annotations

import csv
import importlib
import json
import os
import re
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import numpy as np
from dirty_images import MUTATIONS as IMAGE_MUTATIONS
from dirty_images import Dirty, colors, draw, encode, matches, read_colors

from modeling_pico.data import CaptionedImageDataset, check_images, load_captioned_images


MESSAGES: dict[str, str] = {}  # the first refusal of every kind of table, to be read
SECONDS = 60  # after which a load counts as hanging
Rng = np.random.Generator


def caption(identity: int) -> str:
    return f"picture number {identity:06d}"


# Captions: text as stored, and as it should be loaded; None where it must be dropped and counted


CAPTIONS: dict[str, Callable[[str, Rng], tuple[str | None, str | None]]] = {
    "control characters": lambda text, rng: (f"{text}\x00\x1b[31m\x7f\x85 red", f"{text} [31m  red"),
    "line breaks": lambda text, rng: (f"\n{text}\r\nand more\u2028\u2029", f"{text} and more"),
    "separators and quotes": lambda text, rng: (f"{text}, \"quoted\"; \t| 'x' \\", f"{text}, \"quoted\";  | 'x' \\"),
    "other scripts": lambda text, rng: (f"{text} \u05e9\u05dc \u202e\U0001f3a8\u200d\u0301", None or ""),
    "byte order mark": lambda text, rng: (f"{text}\ufeff", f"{text}\ufeff"),
    "markup": lambda text, rng: (f"<b>{text}</b>&amp;<script>", f"<b>{text}</b>&amp;<script>"),
    "braces": lambda text, rng: (f"{{{text}}} %s {{{{x}}}} $HOME", f"{{{text}}} %s {{{{x}}}} $HOME"),
    "100 kB": lambda text, rng: (f"{text} {'word ' * 20000}", f"{text} {'word ' * 20000}".strip()),
    "100 kB without a space": lambda text, rng: (text + "x" * 100_000, text + "x" * 100_000),
    "empty": lambda text, rng: ("", None),
    "white space": lambda text, rng: (" \t\u3000\n", None),
    "invisible": lambda text, rng: ("\u200b\ufeff\u2060", None),
    "none": lambda text, rng: (None, None),
    "a number as text": lambda text, rng: (str(rng.integers(10**6)), ""),
    "NA": lambda text, rng: (str(rng.choice(["NA", "null", "None", "nan", "N/A"])), ""),
}
# What a line-based format cannot hold.
_BREAKS_LINES = {"line breaks", "white space", "none"}


@dataclass
class Row:
    """A row of a corpus: one mutation, of its image or of its caption."""

    identity: int
    mutation: str
    image: Dirty
    stored: str | None
    expected: list[str]
    path: Path | None = None
    image_is_good: bool = field(init=False)

    def __post_init__(self) -> None:
        self.image_is_good = self.image.expected is not None


def make_row(identity: int, mutation: str, rng: Rng) -> Row:
    kind, _, name = mutation.partition(": ")
    text, blocks = caption(identity), colors(identity)
    if kind == "image":
        return Row(identity, mutation, IMAGE_MUTATIONS[name](blocks, rng), text, [text])
    stored, expected = CAPTIONS[name](text, rng)
    if expected == "":
        expected = stored
    return Row(identity, mutation, Dirty(encode(draw(blocks), "PNG"), blocks), stored, [expected] if expected else [])


def write_image(row: Row, folder: Path) -> None:
    """Puts the image of a row where its mutation says."""
    path = folder / f"{row.identity:06d}.{row.image.extension}"
    row.path = path
    if row.image.place == "folder":
        path.mkdir()
    elif row.image.place == "pipe":
        os.mkfifo(path)
    elif row.image.place == "file":
        path.write_bytes(row.image.content)


# Routes: each writes rows to a folder and says how they are loaded


def image_folder_jsonl(rows: list[Row], folder: Path) -> dict[str, Any]:
    lines = [json.dumps({"file_name": row.path.name, "text": row.stored}) for row in rows]
    (folder / "train" / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return {"dataset_name": str(folder)}


def image_folder_csv(rows: list[Row], folder: Path) -> dict[str, Any]:
    _write_csv(folder / "train" / "metadata.csv", ["file_name", "text"], [[row.path.name, row.stored] for row in rows])
    return {"dataset_name": str(folder)}


def csv_file(rows: list[Row], folder: Path) -> dict[str, Any]:
    table = [[f"train/{row.path.name}", row.stored, f"{row.identity:020d}"] for row in rows]
    _write_csv(folder / "data.csv", ["image", "caption", "meaning"], table)
    return {"dataset_name": str(folder / "data.csv"), "id_column": "meaning"}


def json_lines(rows: list[Row], folder: Path) -> dict[str, Any]:
    lines = [
        json.dumps({"image": f"train/{row.path.name}", "captions": [row.stored, row.stored], "meaning": row.identity})
        for row in rows
    ]
    (folder / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return {"dataset_name": str(folder / "data.jsonl"), "id_column": "meaning"}


def caption_files(rows: list[Row], folder: Path) -> dict[str, Any]:
    (folder / "train_caps.txt").write_text("\n".join(row.stored or "" for row in rows) + "\n", encoding="utf-8")
    (folder / "train_ids.txt").write_text("".join(f"{row.identity}\n" for row in rows))
    (folder / "id_mapping.json").write_text(json.dumps({str(row.identity): f"train/{row.path.name}" for row in rows}))
    return {"dataset_name": str(folder)}


def karpathy(rows: list[Row], folder: Path) -> dict[str, Any]:
    entries = [
        {
            "filename": row.path.name,
            "filepath": "train",
            "split": ("train", "restval")[row.identity % 2],
            "imgid": row.identity,
            "sentences": [{"raw": row.stored or ""}, {"raw": ""}],
        }
        for row in rows
    ]
    (folder / "dataset.json").write_text(json.dumps({"images": entries}))
    return {"dataset_name": str(folder / "dataset.json")}


def _bytes_dataset(rows: list[Row]) -> datasets.Dataset:
    features = datasets.Features(
        image=datasets.Image(decode=False), caption=datasets.Value("string"), meaning=datasets.Value("int64")
    )
    images = [{"bytes": row.image.content, "path": None} if row.image.place == "file" else None for row in rows]
    columns = {"image": images, "caption": [row.stored for row in rows], "meaning": [row.identity for row in rows]}
    return datasets.Dataset.from_dict(columns, features=features)


def parquet(rows: list[Row], folder: Path) -> dict[str, Any]:
    _bytes_dataset(rows).to_parquet(str(folder / "data.parquet"))
    return {"dataset_name": str(folder / "data.parquet")}


def saved_to_disk(rows: list[Row], folder: Path) -> dict[str, Any]:
    _bytes_dataset(rows).save_to_disk(str(folder / "saved"))
    return {"dataset_name": str(folder / "saved"), "id_column": "meaning"}


def _write_csv(path: Path, names: list[str], table: list[list[Any]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows(table)


ROUTES: list[Callable[[list[Row], Path], dict[str, Any]]] = [
    image_folder_jsonl,
    csv_file,
    saved_to_disk,
    caption_files,
    karpathy,
    json_lines,
    parquet,
    image_folder_csv,
]


def fits(mutation: str, route: Callable) -> bool:
    """Whether a route can store a mutation."""
    kind, _, name = mutation.partition(": ")
    if kind == "image":
        # A folder of images lists what it holds: no name without a file, and no row for what is no file.
        return not (route in (image_folder_jsonl, image_folder_csv) and name.startswith("a pipe"))
    # Where it is not known to be one caption, a text of several lines has the whole table refused.
    return not (route is caption_files and name in _BREAKS_LINES) and not (
        name == "line breaks" and route is not karpathy
    )


# Loading and judging


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Turns a hang into an error."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"still running after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def reports() -> Iterator[list[str]]:
    """Collects the warnings of the package."""
    found: list[str] = []
    modules = [importlib.import_module(f"modeling_pico.data.{name}") for name in ("images", "sources")]
    for module in modules:
        module.logger.warning = found.append
    try:
        yield found
    finally:
        for module in modules:
            del module.logger.warning


def load(options: dict[str, Any], folder: Path) -> CaptionedImageDataset:
    """As `train_pico.py` loads a split that may leave out rows, however many these are."""
    with mock.patch("modeling_pico.data.images.MAX_SKIPPED", 1.0):
        rows = load_captioned_images(
            split="train", cache_dir=str(folder / "cache"), on_empty_captions="skip", **options
        )
        return CaptionedImageDataset(check_images(rows, "skip"))


def counted(messages: list[str]) -> tuple[int, int]:
    """Images and rows without captions that the reports say were left out."""
    images = sum(int(n) for text in messages for n in re.findall(r"^(\d+) of \d+ images cannot be read", text))
    captions = sum(int(n) for text in messages for n in re.findall(r"^(\d+) of \d+ images have no caption", text))
    return images, captions


def judge(rows: list[Row], data: CaptionedImageDataset, messages: list[str]) -> dict[int, str]:
    """Outcome of every row: "loaded", "reported", or what is wrong."""
    outcome: dict[int, str] = {}
    wanted = {row.identity: row for row in rows}
    expected = {
        row.identity: [row.image.expected, *row.image.alternatives] for row in rows if row.image.expected is not None
    }
    for index in range(len(data)):
        sample = data[index]
        found = read_colors(sample["image"])
        owners = [identity for identity, pictures in expected.items() if any(matches(found, p) for p in pictures)]
        if len(owners) != 1:
            said = re.search(r"number (\d+)", " ".join(sample["captions"]))
            identity = int(said.group(1)) if said else -1 - index
            outcome[identity] = "WRONG: pixels are not those of the image"
        elif set(sample["captions"]) != set(wanted[owners[0]].expected):
            outcome[owners[0]] = f"WRONG: captions {str(sample['captions'])[:80]!r}"
        elif owners[0] in outcome:
            outcome[owners[0]] = "WRONG: the row is there twice"
        else:
            outcome[owners[0]] = "loaded"
    left_out = [row for row in rows if row.identity not in outcome]
    for row in left_out:
        allowed = not row.image_is_good or row.image.may_fail or not row.expected
        outcome[row.identity] = "reported" if allowed else "WRONG: a good row was left out"
    images, captions = counted(messages)
    if images + captions != len(left_out):
        for row in left_out:
            outcome[row.identity] = f"WRONG: {len(left_out)} rows left out, but {images} + {captions} reported"
    return outcome


def run_corpus(rows: list[Row], route: Callable, folder: Path) -> dict[int, str]:
    """Writes, loads and judges one corpus."""
    (folder / "train").mkdir(parents=True)
    for row in rows:
        write_image(row, folder / "train")
    try:
        with time_limit(SECONDS), reports() as messages:
            return judge(rows, load(route(rows, folder), folder), messages)
    except Exception as error:
        traceback.print_exc()
        return {row.identity: f"WRONG: {type(error).__name__}: {str(error)[:200]}" for row in rows}


# Tables that are broken as a whole


def good_table(rng: Rng) -> list[dict[str, Any]]:
    first = int(rng.integers(10**6))
    return [
        {
            "image": encode(draw(colors(first + i)), "PNG"),
            "caption": caption(first + i),
            "meaning": first + i,
        }
        for i in range(6)
    ]


@dataclass
class Outside:
    """A good picture outside of the folder of the data, and how a row leads to it."""

    content: bytes
    way: str  # "up", "absolute" or "link"

    def place(self, folder: Path) -> str:
        path = folder.parent / f"{folder.name}-outside.png"
        path.write_bytes(self.content)
        if self.way == "link":
            (folder / "link.png").symlink_to(path)
        return {"up": f"../{path.name}", "absolute": str(path), "link": "link.png"}[self.way]


TABLES: dict[str, Callable[[list[dict[str, Any]], Rng], list[dict[str, Any]]]] = {}


def _column(name: str, column: str, value: Callable[[Any, Rng], Any], every: bool = False) -> None:
    def change(table: list[dict[str, Any]], rng: Rng) -> list[dict[str, Any]]:
        chosen = int(rng.integers(len(table)))
        return [
            {**row, column: value(row[column], rng)} if every or i == chosen else row for i, row in enumerate(table)
        ]

    TABLES[name] = change


_column("a number as caption", "caption", lambda text, rng: int(rng.integers(100)))
_column("numbers as captions", "caption", lambda text, rng: float(rng.random()), every=True)
_column("captions in bytes", "caption", lambda text, rng: text.encode(), every=True)
_column("a caption of several lines", "caption", lambda text, rng: f"{text}\nand more")
_column("captions nested too deeply", "caption", lambda text, rng: [[text], [text]], every=True)
_column("lists of captions with none", "caption", lambda text, rng: [text, None, ""], every=True)
_column("one list among captions", "caption", lambda text, rng: [text])
_column("captions as objects", "caption", lambda text, rng: {"words": text}, every=True)
_column("captions as {'raw': ...}", "caption", lambda text, rng: [{"raw": text}], every=True)
_column("no captions at all", "caption", lambda text, rng: None, every=True)
_column("a half character", "caption", lambda text, rng: text + "\ud83d")
_column("truth as captions", "caption", lambda text, rng: True, every=True)
_column("an id that is NaN", "meaning", lambda number, rng: float("nan"))
_column("an id that is missing", "meaning", lambda number, rng: None)
_column("an id of another type", "meaning", lambda number, rng: f"id {number}")
_column("one id for all", "meaning", lambda number, rng: 7, every=True)
_column("ids beyond 64 bits", "meaning", lambda number, rng: 2**70 + number, every=True)
_column("ids as floats beyond 2**53", "meaning", lambda number, rng: float(2**60 + number), every=True)
_column("ids as lists", "meaning", lambda number, rng: [number, number], every=True)
_column("an empty id", "meaning", lambda number, rng: "", every=True)
_column("a path out of the folder", "image", lambda image, rng: Outside(image, "up"))
_column("an absolute path", "image", lambda image, rng: Outside(image, "absolute"))
_column("a link out of the folder", "image", lambda image, rng: Outside(image, "link"))
_column("a path to the root", "image", lambda image, rng: "../" * int(rng.integers(1, 9)) + "etc/passwd")
_column("a path with a zero byte", "image", lambda image, rng: "a\0b.png")
_column("a path of 100 kB", "image", lambda image, rng: "a/" * 50_000)
_column("an address as path", "image", lambda image, rng: "https://example.org/a.png")
_column("numbers as images", "image", lambda image, rng: 3, every=True)
_column("images in lists", "image", lambda image, rng: ["0.png"], every=True)
TABLES["nothing"] = lambda table, rng: table
TABLES["no column of captions"] = lambda table, rng: [{"image": r["image"], "meaning": r["meaning"]} for r in table]
TABLES["no column of images"] = lambda table, rng: [{"caption": r["caption"], "meaning": r["meaning"]} for r in table]
TABLES["columns missing in a row"] = lambda table, rng: [{"image": table[0]["image"]}, *table[1:]]
TABLES["a row twice"] = lambda table, rng: [*table, table[int(rng.integers(len(table)))]]
TABLES["no rows"] = lambda table, rng: []
# What must not be loaded although every picture of it is good. Entries of Karpathy's lists may hold line breaks.
REFUSED = ("a path out of the folder", "an absolute path", "a link out of the folder", "a caption of several lines")
FILES: dict[str, Callable[[bytes, Rng], bytes]] = {
    "cut file": lambda content, rng: content[: int(rng.integers(1, len(content)))],
    "changed bytes in the file": lambda content, rng: bytes(
        byte if rng.random() > 0.002 else int(rng.integers(256)) for byte in content
    ),
    "file in Latin-1": lambda content, rng: content.replace(b"picture", "p\xefcture".encode("latin-1"), 1),
    "file with a byte order mark": lambda content, rng: b"\xef\xbb\xbf" + content,
    "file in UTF-16": lambda content, rng: content.decode(errors="replace").encode("utf-16"),
    "empty file": lambda content, rng: b"",
    "file of zeros": lambda content, rng: bytes(len(content)),
    "file of text": lambda content, rng: b"<html>not found</html>",
    "Windows line ends": lambda content, rng: content.replace(b"\n", b"\r\n"),
}


def write_table(table: list[dict[str, Any]], folder: Path, kind: str) -> Path:
    """Writes the images as files and the rows as a file of a kind; raises where the kind cannot hold them."""
    rows = []
    for row in table:
        if isinstance(row.get("image"), Outside):
            row = {**row, "image": row["image"].place(folder)}
        elif isinstance(row.get("image"), bytes):
            number = next(i for i, other in enumerate(table) if other.get("image") == row["image"])
            (folder / f"{number}.png").write_bytes(row["image"])
            row = {**row, "image": f"{number}.png"}
        rows.append(row)
    path = folder / f"data.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    elif kind == "csv":
        names = list(dict.fromkeys(name for row in rows for name in row))
        _write_csv(path, names, [[row.get(name) for name in names] for row in rows])
    elif kind == "json":
        entries = [
            {
                "filename": row.get("image"),
                "split": "train",
                "imgid": row.get("meaning"),
                "sentences": [{"raw": row.get("caption")}],
            }
            for row in rows
        ]
        path.write_text(json.dumps({"images": entries}))
    else:
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    return path


def run_table(name: str, kind: str, rng: Rng, folder: Path) -> str | None:
    """Outcome of one broken table, None where the kind of file cannot hold it."""
    table = good_table(rng)
    if name in TABLES:
        table = TABLES[name](table, rng)
    folder.mkdir(parents=True)
    try:
        path = write_table(table, folder, kind)
    except (ValueError, TypeError, OverflowError, datasets.exceptions.DatasetsError):
        return None
    if name in FILES:
        path.write_bytes(FILES[name](path.read_bytes(), rng))
    options = {"dataset_name": str(path)} | ({} if kind == "json" else {"id_column": "meaning"})
    try:
        with time_limit(SECONDS), reports() as messages:
            data = load(options, folder)
            pairs = [data[index] for index in range(len(data))]
    except (ValueError, OSError) as error:
        MESSAGES.setdefault(f"{name}, {kind}", str(error)[:400])
        return "refused" if len(str(error)) > 20 else f"WRONG: an error that says nothing: {error!r}"
    except Exception as error:
        traceback.print_exc()
        return f"WRONG: {type(error).__name__}: {str(error)[:200]}"
    if name in REFUSED and not (name == "a caption of several lines" and kind == "json"):
        return "WRONG: it was not refused"
    for sample in pairs:
        found = read_colors(sample["image"])
        for text in sample["captions"]:
            said = re.search(r"number (\d{6})", text)
            # A changed digit makes another caption, which no reader can know.
            if said and name != "changed bytes in the file" and not matches(found, colors(int(said.group(1)))):
                return f"WRONG: a pair of another image and {text[:80]!r}"
    images, captions = counted(messages)
    dropped = len({json.dumps(row, default=str) for row in table}) - len(pairs)
    if name in TABLES and dropped != images + captions:
        return f"WRONG: {dropped} rows left out, but {images} + {captions} reported"
    return "reported" if dropped or images + captions else "loaded"


def all_mutations() -> list[str]:
    return [f"image: {name}" for name in IMAGE_MUTATIONS] + [f"caption: {name}" for name in CAPTIONS]
