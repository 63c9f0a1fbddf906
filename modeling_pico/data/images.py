"""A check that all images of a data set can be decoded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import datasets
import pyarrow as pa
from datasets.fingerprint import Hasher
from transformers.utils import logging

from ..model.image_decoding_pico import BadImageError, describe_image, open_image, to_rgb
from .paths import OutsideError, check_mark


logger = logging.get_logger(__name__)

# Part of the key under which verdicts are cached: raise it whenever `_find_problem` judges differently.
CHECK_VERSION = 2

# Share of the rows that may be left out without an error.
MAX_SKIPPED = 0.5


def check_images(
    dataset: datasets.Dataset,
    on_bad_image: Literal["error", "skip"] = "error",
    num_proc: int | None = None,
    max_skipped: float = MAX_SKIPPED,
) -> datasets.Dataset:
    """
    Reads every image once, so that a broken file is found before the training and not in the middle of it. Of a PNG
    the checksums are checked as well; other formats do not tell a changed bit from another picture.

    The verdicts are cached (as long as caching of `datasets` is on) under the data's fingerprint and the size and time
    of the files, so that a second run reads none of the images again unless they changed.

    Args:
        dataset (`datasets.Dataset`):
            Data with a column `image`, as [`load_captioned_images`] gives it.
        on_bad_image (`str`, *optional*, defaults to `"error"`):
            `"error"`: raise if there is a bad image. `"skip"`: leave the rows of bad images out, with a warning.
        num_proc (`int`, *optional*):
            Number of processes that share the work.
        max_skipped (`float`, *optional*, defaults to 0.5):
            Largest share of the rows that `"skip"` leaves out. More is an error: the folder is then likely the wrong
            one.

    Returns:
        `datasets.Dataset`: the rows whose images are good.

    Raises:
        BadImageError: names the number of bad images and the first ten of them.
        ValueError: for another `on_bad_image`, or a `max_skipped` outside of [0, 1].
    """
    check_share(max_skipped)
    if on_bad_image not in ("error", "skip"):
        raise ValueError(f"`on_bad_image` must be 'error' or 'skip', got {on_bad_image!r}.")
    problems = _find_problems(dataset, num_proc)
    bad = [row for row, problem in enumerate(problems) if problem]
    if not bad:
        return dataset
    listed = "\n".join(f"  row {row}: {problems[row]}" for row in bad[:10])
    more = f"\n  and {len(bad) - 10} more" if len(bad) > 10 else ""
    summary = f"{len(bad)} of {len(dataset)} images cannot be read:\n{listed}{more}"
    if on_bad_image == "error":
        raise BadImageError(f"{summary}\nRepair the files, or leave their rows out with on_bad_image='skip'.")
    if len(bad) > max_skipped * len(dataset) or len(bad) == len(dataset):
        raise BadImageError(f"{summary}\n{too_many(len(bad), len(dataset), max_skipped)}")
    logger.warning(f"{summary}\nTheir rows are left out.")
    is_bad = set(bad)
    return dataset.select([row for row in range(len(dataset)) if row not in is_bad])


def check_share(max_skipped: float) -> None:
    """ValueError unless `max_skipped` is a share."""
    if not 0 <= max_skipped <= 1:
        raise ValueError(f"`max_skipped` is a share of the rows in [0, 1], got {max_skipped!r}.")


def too_many(count: int, total: int, max_skipped: float) -> str:
    """Why so many rows are not left out."""
    allowed = f"at most a share of {max_skipped:g} (`max_skipped`)" if count < total else "not all"
    return f"{count} of {total} rows are more than may be left out: {allowed}."


def iter_encoded(images: datasets.Dataset) -> Iterator[pa.StructArray]:
    """Yields the not decoded column `image` piece by piece, as arrays with the fields `bytes` and `path`."""
    for batch in images.with_format("arrow").iter(batch_size=256):
        yield from batch["image"].chunks


def image_keys(images: datasets.Dataset, read_files: bool = False) -> Iterator[tuple[str, Any]]:
    """
    What makes two images of the not decoded column `image` the same: their bytes if they are in the data, else their
    path, or with `read_files` the bytes of the file.
    """
    row = 0
    for chunk in iter_encoded(images):
        for content, path in zip(chunk.field("bytes"), chunk.field("path").to_pylist(), strict=True):
            if content.is_valid:
                yield "bytes", hashlib.blake2b(content.as_buffer(), digest_size=16).digest()
            elif read_files and path is not None and os.path.isfile(path):
                yield "bytes", hashlib.blake2b(Path(path).read_bytes(), digest_size=16).digest()
            else:
                # Rows without any image are never the same: each is reported as a bad image of its own.
                yield ("path", os.path.normpath(path)) if path is not None else ("row", row)
            row += 1


def _find_problem(value: Any) -> str:
    """Why an image cannot be used, or an empty string; reads all its data but computes as few pixels as possible."""
    source = describe_image(value)
    try:
        check_mark(value["path"])
        with open_image(value) as image:
            if image.format == "PNG":
                image.verify()  # which leaves an image behind that cannot be read any more
        with open_image(value) as image:
            # A JPEG is decoded at an eighth of its size: all of the file is still read, most of the work is not done.
            image.draft(None, (1, 1))
            to_rgb(image, source)
    except (BadImageError, OutsideError) as error:
        return str(error)
    except Exception as error:
        return f"The image {source} is truncated or damaged: {error}"
    return ""


def _check_batch(batch: dict[str, list[Any]]) -> dict[str, list[str]]:
    return {"problem": [_find_problem(value) for value in batch["image"]]}


def file_state(path: str | None) -> tuple[int, ...]:
    """Size, times and number (inode) of a file, which change when another takes its place; empty without a file."""
    try:
        state = os.stat(path) if path else None
    except (OSError, ValueError):  # the latter for a name that holds a zero byte
        state = None
    # A file that is moved or copied here may keep its size and the time of its content, but not the rest.
    return (state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino) if state else ()


def _find_problems(dataset: datasets.Dataset, num_proc: int | None) -> list[str]:
    if not len(dataset):
        return []
    images = dataset.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
    # Bytes are part of the data's fingerprint; files are not, and may be replaced without the data set noticing.
    paths = [path for chunk in iter_encoded(images) for path in chunk.field("path").to_pylist()]
    fingerprint = Hasher.hash((CHECK_VERSION, dataset._fingerprint, [file_state(path) for path in paths]))
    cache_file = None
    if datasets.is_caching_enabled():
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "pico_checked_images"
        folder.mkdir(parents=True, exist_ok=True)
        cache_file = str(folder / f"{fingerprint}.arrow")
    verdicts = images.map(
        _check_batch,
        batched=True,
        batch_size=256,
        remove_columns=["image"],
        num_proc=num_proc,
        new_fingerprint=fingerprint,
        cache_file_name=cache_file,
        desc="Checking images",
    )
    return list(verdicts["problem"])
