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
CHECK_VERSION = 3

# Largest share of the rows that is left out without an error: beyond it, the folder is likely the wrong one.
MAX_SKIPPED = 0.5


def check_images(
    dataset: datasets.Dataset, on_bad_image: Literal["error", "skip"] = "error", num_proc: int | None = None
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
            `"error"`: raise if there is a bad image. `"skip"`: leave the rows of bad images out, with a warning, as
            long as these are at most half of the rows.
        num_proc (`int`, *optional*):
            Number of processes that share the work.

    Returns:
        `datasets.Dataset`: the rows whose images are good.

    Raises:
        ValueError: names the number of bad images and the first ten of them.
    """
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
    refuse_if_most(len(bad), len(dataset), summary)
    logger.warning(f"{summary}\nTheir rows are left out.")
    return dataset.select([row for row, problem in enumerate(problems) if not problem])


def refuse_if_most(count: int, total: int, problem: str) -> None:
    """ValueError if so many rows have a problem that they should not be left out."""
    if count > MAX_SKIPPED * total:
        raise ValueError(f"{problem}\nThat is more than the share of {MAX_SKIPPED:g} of the rows that is left out.")


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
        check_mark(value and value["path"])
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
