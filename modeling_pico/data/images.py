"""Decoding of images, and a check that all images of a data set can be decoded."""

from __future__ import annotations

import functools
import hashlib
import io
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
from datasets.fingerprint import Hasher
from PIL import Image, UnidentifiedImageError
from transformers.utils import logging

from .paths import OutsideError, check_mark


logger = logging.get_logger(__name__)

# Part of the key under which verdicts are cached: raise it whenever `_find_problem` judges differently.
CHECK_VERSION = 2

FORMATS = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""
Formats that are read, as far as PIL (for HEIF: a plugin of it) can. Left out are those that PIL hands to another
program (EPS to Ghostscript), which a stranger's file must not start, and those without a signature (TGA), for which
PIL would take what is left of a damaged file.
"""

# A smallest side of 224 pixels, which many image processors make, would turn a line of pixels into gigabytes.
MAX_ASPECT_RATIO = 200

MAX_DECODED_PIXELS = 2**22
"""
Larger images are reduced to this number of pixels (2,048 x 2,048), so that a batch holds at most so many times its
number of images, whatever their sizes. Image processors go on from there to a few hundred pixels a side.
"""

# Share of the rows that may be left out without an error.
MAX_SKIPPED = 0.5

# What a stored image has to go through to stand upright, by its EXIF orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImageError(ValueError):
    """An image is missing, truncated, or not an image."""


def decode_image(value: Mapping[str, Any] | str | os.PathLike | Image.Image | np.ndarray) -> Image.Image:
    """
    Decodes an image to RGB with 8 bits a channel.

    EXIF orientation is applied, transparency is laid on white, 16-bit channels are scaled (not clipped) to 8 bits, and
    of an animation (GIF, WebP, APNG) or a file of several pages the first image is taken. What a file holds decides
    and not its name; the formats are those of [`FORMATS`]. Colour profiles are not applied. An image of more than
    [`MAX_DECODED_PIXELS`] pixels is reduced to that number by averaging.

    Refused are images of more than `PIL.Image.MAX_IMAGE_PIXELS` pixels (set that higher for larger ones), images of
    which one side is more than 200 times the other, and numbers without a known white (32-bit integers beyond 16
    bits, floats that are neither shares in [0, 1] nor levels in [0, 255]).

    Args:
        value (`Mapping`, `str`, `os.PathLike`, `PIL.Image.Image` or `numpy.ndarray`):
            `{"path", "bytes"}` as `datasets.Image(decode=False)` gives it (bytes win), a path, a PIL image, or an
            array of `uint8`, `uint16` or `bool` of shape `(height, width)` or `(height, width, 1 | 3 | 4)`.

    Returns:
        `PIL.Image.Image`: in mode RGB.

    Raises:
        BadImageError: if the image is missing, truncated, refused or not an image; the message names its source.
    """
    if isinstance(value, np.ndarray):
        value = _from_array(value)
    if isinstance(value, Image.Image):
        _check_size(value, describe_image(value))
        return _to_rgb(value, describe_image(value))
    with _open(value) as image:
        return _to_rgb(image, describe_image(value), is_own=True)


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


def describe_image(value: Any) -> str:
    """A short name of where an image comes from, for messages."""
    if isinstance(value, Mapping):
        path, content = value.get("path"), value.get("bytes")
        if content is not None:
            size = f"{len(content)} bytes in the data set"
            return f"{_shortened(path)} ({size})" if path else size
        return _shortened(path) if path else "an empty image entry"
    if isinstance(value, (str, os.PathLike)):
        return _shortened(value)
    if isinstance(value, Image.Image):
        return f"a PIL image of size {value.size} and mode {value.mode}"
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape} and type {value.dtype}"
    return f"an object of type {type(value).__name__}"


def _shortened(path: str | os.PathLike) -> str:
    # Images that were pasted into a column of paths as text would fill the screen.
    text = str(path)
    return repr(text if len(text) <= 300 else f"{text[:200]}... ({len(text)} characters)")


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


@functools.cache
def _readable_formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _open(value: Any) -> Image.Image:
    """Opens an encoded image; only its header is read."""
    path, content = value, None
    if isinstance(value, Mapping):
        path, content = value.get("path"), value.get("bytes")
    source = describe_image(value)
    if content is None and not isinstance(path, (str, os.PathLike)):
        raise BadImageError(f"There is no image: got {source}.")
    try:
        # A pipe or a device would be waited for without end.
        if content is None and os.path.exists(path) and not os.path.isfile(path):
            raise BadImageError(f"{source} is not a file.")
        image = Image.open(path if content is None else io.BytesIO(content), formats=_readable_formats())
    except BadImageError:
        raise
    except FileNotFoundError as error:
        raise BadImageError(f"The image file {source} does not exist.") from error
    except UnidentifiedImageError as error:
        allowed = ", ".join(_readable_formats())
        raise BadImageError(f"{source} is not an image of a format that is read ({allowed}).") from error
    except Exception as error:  # each of PIL's format plugins fails in its own way
        reason = getattr(error, "strerror", None) or error  # without the name, which may be very long
        raise BadImageError(f"{source} is not an image that PIL can read: {reason}") from error
    try:
        _check_size(image, source)
    except BadImageError:
        image.close()
        raise
    return image


def _check_size(image: Image.Image, source: str) -> None:
    width, height = image.size
    limit = Image.MAX_IMAGE_PIXELS
    if width < 1 or height < 1:
        raise BadImageError(f"The image {source} has no pixels: its size is {width} x {height}.")
    if limit is not None and width * height > limit:
        raise BadImageError(
            f"The image {source} is too large: {width} x {height} pixels, at most {limit:,} in all are allowed "
            "(`PIL.Image.MAX_IMAGE_PIXELS`)."
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise BadImageError(
            f"The image {source} is too narrow: {width} x {height} pixels, a side may be at most {MAX_ASPECT_RATIO} "
            "times the other."
        )


def _to_rgb(image: Image.Image, source: str, is_own: bool = False) -> Image.Image:
    """`is_own`: nobody else sees the image, so that it may be decoded at another size."""
    size = _bounded_size(image)
    try:
        if is_own and size != image.size:
            # A large JPEG becomes a half, a quarter or an eighth as large while it is decoded, never below `size`.
            image.draft(None, size)
        image.load()
    except Exception as error:
        raise BadImageError(f"The image {source} is truncated or damaged: {error}") from error
    try:
        upright = _upright(image)
        return _convert(upright, size if upright.size == image.size else size[::-1])
    except Exception as error:
        raise BadImageError(f"The image {source} cannot be converted to RGB: {error}") from error


def _bounded_size(image: Image.Image) -> tuple[int, int]:
    share = math.sqrt(MAX_DECODED_PIXELS / (image.width * image.height))
    return image.size if share >= 1 else (max(1, int(image.width * share)), max(1, int(image.height * share)))


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.BOX)


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _TURNS.get(image.getexif().get(0x0112, 1))
    except Exception:  # damaged metadata does not make the pixels useless
        return image
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.info = image.info  # says which colour is transparent
    return turned


def _convert(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_levels(image)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = _resized(image if image.mode == "RGBA" else image.convert("RGBA"), size)
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image)
        image = canvas
    return _resized(image if image.mode == "RGB" else image.convert("RGB"), size)


def _to_levels(image: Image.Image) -> Image.Image:
    """A grey image of 8 bits of one with 16-bit integers or floats."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    # PIL opens 16-bit channels as I;16 or, in older releases, as I. Floats hold either shares or 8-bit levels.
    limit = 65535 if image.mode != "F" else 255
    if not 0 <= low <= high <= limit:  # which NaN is not, either
        raise ValueError(f"its values reach from {low} to {high}, known are those from 0 to {limit}")
    scale = 1 / 257 if image.mode != "F" else 255.0 if high <= 1.0 else 1.0
    levels = np.rint(values * scale).astype(np.uint8)
    if isinstance(image.info.get("transparency"), int):
        levels[values == image.info["transparency"]] = 255
    return Image.fromarray(levels)


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    shape_fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if not shape_fits or array.dtype not in (np.uint8, np.uint16, np.bool_) or not array.size:
        raise BadImageError(
            "An image array has shape (height, width) or (height, width, 1 | 3 | 4) and type uint8, uint16 or bool; "
            f"got {describe_image(array)}."
        )
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype == np.uint16:
        array = np.rint(array / 257.0).astype(np.uint8)
    return Image.fromarray(array)


def _find_problem(value: Any) -> str:
    """Why an image cannot be used, or an empty string; reads all its data but computes as few pixels as possible."""
    source = describe_image(value)
    try:
        check_mark(value["path"])
        with _open(value) as image:
            if image.format == "PNG":
                image.verify()  # which leaves an image behind that cannot be read any more
        with _open(value) as image:
            # A JPEG is decoded at an eighth of its size: all of the file is still read, most of the work is not done.
            image.draft(None, (1, 1))
            _to_rgb(image, source)
    except (BadImageError, OutsideError) as error:
        return str(error)
    except Exception as error:
        return f"The image {source} is truncated or damaged: {error}"
    return ""


def _check_batch(batch: dict[str, list[Any]]) -> dict[str, list[str]]:
    return {"problem": [_find_problem(value) for value in batch["image"]]}


def _file_state(path: str | None) -> tuple[int, int]:
    try:
        state = os.stat(path) if path else None
    except (OSError, ValueError):  # the latter for a name that holds a zero byte
        state = None
    return (state.st_size, state.st_mtime_ns) if state else (-1, -1)


def _find_problems(dataset: datasets.Dataset, num_proc: int | None) -> list[str]:
    if not len(dataset):
        return []
    images = dataset.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
    # Bytes are part of the data's fingerprint; files are not, and may be replaced without the data set noticing.
    paths = [path for chunk in iter_encoded(images) for path in chunk.field("path").to_pylist()]
    fingerprint = Hasher.hash((CHECK_VERSION, dataset._fingerprint, [_file_state(path) for path in paths]))
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
