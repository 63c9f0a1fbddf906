"""Decoding of images, and a check that all images of a data set can be decoded."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
from datasets.fingerprint import Hasher
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Part of the key under which verdicts are cached: raise it whenever `_find_problem` judges differently.
CHECK_VERSION = 1


class BadImageError(ValueError):
    """An image is missing, truncated, or not an image."""


def decode_image(value: Mapping[str, Any] | str | os.PathLike | Image.Image | np.ndarray) -> Image.Image:
    """
    Decodes an image to RGB with 8 bits a channel.

    EXIF orientation is applied, transparency is laid on white, 16-bit channels are scaled (not clipped) to 8 bits, and
    of an animation the first frame is taken.

    Args:
        value (`Mapping`, `str`, `os.PathLike`, `PIL.Image.Image` or `numpy.ndarray`):
            `{"path", "bytes"}` as `datasets.Image(decode=False)` gives it (bytes win), a path, a PIL image, or an
            array of `uint8`, `uint16` or `bool` of shape `(height, width)` or `(height, width, 1 | 3 | 4)`.

    Returns:
        `PIL.Image.Image`: in mode RGB.

    Raises:
        BadImageError: if the image is missing, truncated or not an image; the message names its source.
    """
    if isinstance(value, Image.Image):
        return _to_rgb(value, describe_image(value))
    if isinstance(value, np.ndarray):
        return _to_rgb(_from_array(value), describe_image(value))
    with _open(value) as image:
        return _to_rgb(image, describe_image(value))


def check_images(
    dataset: datasets.Dataset,
    on_bad_image: Literal["error", "skip"] = "error",
    num_proc: int | None = None,
) -> datasets.Dataset:
    """
    Reads every image once, so that a broken file is found before the training and not in the middle of it.

    The verdicts are cached (as long as caching of `datasets` is on) under the data's fingerprint and the size and time
    of the files, so that a second run reads none of the images again unless they changed.

    Args:
        dataset (`datasets.Dataset`):
            Data with a column `image`, as [`load_captioned_images`] gives it.
        on_bad_image (`str`, *optional*, defaults to `"error"`):
            `"error"`: raise if there is a bad image. `"skip"`: leave the rows of bad images out, with a warning.
        num_proc (`int`, *optional*):
            Number of processes that share the work.

    Returns:
        `datasets.Dataset`: the rows whose images are good.

    Raises:
        BadImageError: names the number of bad images and the first ten of them.
        ValueError: for another `on_bad_image`.
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
    logger.warning(f"{summary}\nTheir rows are left out.")
    is_bad = set(bad)
    return dataset.select([row for row in range(len(dataset)) if row not in is_bad])


def describe_image(value: Any) -> str:
    """A short name of where an image comes from, for messages."""
    if isinstance(value, Mapping):
        path, content = value.get("path"), value.get("bytes")
        if content is not None:
            return (
                f"{path!r} ({len(content)} bytes in the data set)" if path else f"{len(content)} bytes in the data set"
            )
        return repr(str(path)) if path else "an empty image entry"
    if isinstance(value, (str, os.PathLike)):
        return repr(str(value))
    if isinstance(value, Image.Image):
        return f"a PIL image of size {value.size} and mode {value.mode}"
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape} and type {value.dtype}"
    return f"an object of type {type(value).__name__}"


def iter_encoded(images: datasets.Dataset) -> Iterator[pa.StructArray]:
    """Yields the not decoded column `image` piece by piece, as arrays with the fields `bytes` and `path`."""
    for batch in images.with_format("arrow").iter(batch_size=256):
        yield from batch["image"].chunks


def _open(value: Any) -> Image.Image:
    """Opens an encoded image; only its header is read."""
    path, content = value, None
    if isinstance(value, Mapping):
        path, content = value.get("path"), value.get("bytes")
    if content is None and not isinstance(path, (str, os.PathLike)):
        raise BadImageError(f"There is no image: got {describe_image(value)}.")
    try:
        return Image.open(path if content is None else io.BytesIO(content))
    except FileNotFoundError as error:
        raise BadImageError(f"The image file {describe_image(value)} does not exist.") from error
    except UnidentifiedImageError as error:
        raise BadImageError(f"{describe_image(value)} is not an image that PIL can read.") from error
    except Exception as error:  # each of PIL's format plugins fails in its own way
        raise BadImageError(f"{describe_image(value)} is not an image that PIL can read: {error}") from error


def _to_rgb(image: Image.Image, source: str) -> Image.Image:
    try:
        image.load()
    except Exception as error:
        raise BadImageError(f"The image {source} is truncated or damaged: {error}") from error
    try:
        return _convert(_upright(image))
    except Exception as error:
        raise BadImageError(f"The image {source} cannot be converted to RGB: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(0x0112, 1) not in (0, 1)
    except Exception:  # damaged metadata does not make the pixels useless
        return image
    return ImageOps.exif_transpose(image) if turned else image


def _convert(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        # PIL opens 16-bit channels as I;16 or, in older releases, as I. Floats hold either shares or 8-bit levels.
        scale = 1 / 257 if image.mode != "F" else 255.0 if values.max(initial=0.0) <= 1.0 else 1.0
        levels = values * scale
        image = Image.fromarray(np.clip(np.rint(levels), 0, 255).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image)
        image = canvas
    return image if image.mode == "RGB" else image.convert("RGB")


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
    try:
        with _open(value) as image:
            # A JPEG is decoded at an eighth of its size: all of the file is still read, most of the work is not done.
            image.draft(None, (1, 1))
            image.load()
    except BadImageError as error:
        return str(error)
    except Exception as error:
        return f"The image {describe_image(value)} is truncated or damaged: {error}"
    return ""


def _check_batch(batch: dict[str, list[Any]]) -> dict[str, list[str]]:
    return {"problem": [_find_problem(value) for value in batch["image"]]}


def _file_state(path: str | None) -> tuple[int, int]:
    try:
        state = os.stat(path) if path else None
    except OSError:
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
