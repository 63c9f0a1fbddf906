"""Decoding of images, the same in training and in use: upright, on white, 8 bits a channel."""

from __future__ import annotations

import functools
import io
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError


FORMATS = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""
Formats that are read, as far as PIL (for HEIF: a plugin of it) can. Left out are those that PIL hands to another
program (EPS to Ghostscript), which an untrusted file must not start, and those without a signature (TGA), for which
PIL would take what is left of a damaged file.
"""

# A smallest side of 224 pixels, which many image processors make, would turn a line of pixels into gigabytes.
MAX_ASPECT_RATIO = 200

MAX_DECODED_PIXELS = 2**22
"""
Larger images are reduced to this number of pixels (2,048 x 2,048), so that a batch holds at most so many times its
number of images, whatever their sizes. Image processors go on from there to a few hundred pixels a side.
"""

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
# Where PIL finds the orientation.
_TURN_TAGS = {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"}


class BadImageError(ValueError):
    """An image is missing, truncated, or not an image."""


def decode_image(value: Mapping[str, Any] | str | os.PathLike | bytes | Image.Image) -> Image.Image:
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
        value (`Mapping`, `str`, `os.PathLike`, `bytes` or `PIL.Image.Image`):
            `{"path", "bytes"}` as `datasets.Image(decode=False)` gives it (bytes win), a path, the bytes of a file, or
            a PIL image.

    Returns:
        `PIL.Image.Image`: in mode RGB.

    Raises:
        BadImageError: if the image is missing, truncated, refused or not an image; the message names its source.
    """
    if isinstance(value, Image.Image):
        _check_size(value, describe_image(value))
        return to_rgb(value, describe_image(value))
    if isinstance(value, bytes):
        value = {"bytes": value}
    with open_image(value) as image:
        return to_rgb(image, describe_image(value), is_own=True)


def describe_image(value: Any) -> str:
    """A short name of where an image comes from, for messages."""
    if isinstance(value, Mapping):
        path, content = value.get("path"), value.get("bytes")
        if content is not None:
            size = f"{len(content)} bytes"
            return f"{_shortened(path)} ({size})" if path else size
        return _shortened(path) if path else "an empty image entry"
    if isinstance(value, (str, os.PathLike)):
        return _shortened(value)
    if isinstance(value, Image.Image):
        return f"a PIL image of size {value.size} and mode {value.mode}"
    return f"an object of type {type(value).__name__}"


def _shortened(path: str | os.PathLike) -> str:
    # Images that were pasted into a column of paths as text would fill the screen.
    text = str(path)
    return repr(text if len(text) <= 300 else f"{text[:200]}... ({len(text)} characters)")


@functools.cache
def _readable_formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def open_image(value: Any) -> Image.Image:
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


def to_rgb(image: Image.Image, source: str, is_own: bool = False) -> Image.Image:
    """
    An opened image as [`decode_image`] returns it; `source` is its name in messages. `is_own`: nobody else sees the
    image, so that it may be decoded at another size.
    """
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
    # It says which colour is transparent; the turn is done, and must not be done again.
    turned.info = {name: value for name, value in image.info.items() if name not in _TURN_TAGS}
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
