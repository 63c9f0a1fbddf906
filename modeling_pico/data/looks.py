"""
Pictures drawn again in other looks: fixed ones, by which a style stress test measures, and random ones, with which a
training is augmented. The two have no look in common.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection

import numpy as np
from PIL import Image, ImageChops, ImageEnhance, ImageFilter, ImageOps

from ..model.image_decoding_pico import decode_image


# Shorter side in pixels to which larger pictures are reduced where the time of a filter would grow with its square
# (strokes and cells take the detail away in any case), and before random convolution.
_FILTERED_SIDE = 256
_CONVOLVED_SIDE = 384
_MOSAIC_CELLS = 40


def _reduced(image: Image.Image, side: int) -> Image.Image:
    if min(image.size) <= side:
        return image
    factor = side / min(image.size)
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.LANCZOS)


def _radius(image: Image.Image, share: float) -> float:
    # Relative to the picture, so that a large file gets the same look as a small one.
    return max(1.0, share * min(image.size))


def _window(image: Image.Image, share: float) -> int:
    """Side of a filter's window: odd, and more than the pixel itself."""
    return max(3, 2 * round(share * min(image.size) / 2) + 1)


def _gray(image: Image.Image) -> Image.Image:
    return ImageOps.grayscale(image)


def _sketch(image: Image.Image) -> Image.Image:
    # A photograph divided by a blurred copy of itself leaves lines on white paper ("colour dodge").
    gray = ImageOps.grayscale(image)
    light = np.asarray(gray, dtype=np.float32)
    surround = np.asarray(gray.filter(ImageFilter.GaussianBlur(_radius(image, 0.02))), dtype=np.float32)
    lines = np.clip(light / np.maximum(surround, 1), 0, 1)
    return Image.fromarray((255 * lines**4).astype(np.uint8))


def _poster(image: Image.Image) -> Image.Image:
    image = ImageOps.autocontrast(_reduced(image, _FILTERED_SIDE))
    flat = image.filter(ImageFilter.MedianFilter(_window(image, 0.03)))
    # Loud colours, and of each channel four tones, which reach from black to white.
    return ImageEnhance.Color(flat).enhance(2.0).point(lambda tone: 85 * round(tone / 85))


def _paint(image: Image.Image) -> Image.Image:
    # Every spot takes the most frequent of few colours around it, as a broad brush would.
    image = _reduced(image, _FILTERED_SIDE)
    few = image.quantize(24, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    strokes = Image.fromarray(np.asarray(few)).filter(ImageFilter.ModeFilter(_window(image, 0.045)))
    strokes.putpalette(few.getpalette() or ())
    return strokes


def _neon(image: Image.Image) -> Image.Image:
    image = _reduced(image, _FILTERED_SIDE)
    smooth = image.filter(ImageFilter.GaussianBlur(_radius(image, 0.006)))
    window = _window(image, 0.012)
    light, dark = (smooth.filter(kind(window)) for kind in (ImageFilter.MaxFilter, ImageFilter.MinFilter))
    edges = ImageChops.difference(light, dark)
    return ImageEnhance.Color(ImageOps.autocontrast(edges, cutoff=(0, 1))).enhance(2.5)


def _mosaic(image: Image.Image) -> Image.Image:
    width, height = image.size
    # Small pictures get fewer cells, of two pixels or more.
    cells = min(_MOSAIC_CELLS, max(1, min(width, height) // 2)) / min(width, height)
    small = image.resize((max(1, round(width * cells)), max(1, round(height * cells))), Image.Resampling.BOX)
    return small.resize(image.size, Image.Resampling.NEAREST)


def _negative(image: Image.Image) -> Image.Image:
    return ImageOps.invert(image)


LOOKS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "gray": _gray,
    "sketch": _sketch,
    "poster": _poster,
    "paint": _paint,
    "neon": _neon,
    "mosaic": _mosaic,
    "negative": _negative,
}


def check_looks(looks: Collection[str]) -> list[str]:
    """The looks by name, each once and in their order; ValueError for none, or for one that does not exist."""
    unknown = [look for look in looks if look not in LOOKS]
    if unknown or not looks:
        given = f"There is no look {unknown[0]!r}" if unknown else "No look is named"
        raise ValueError(f"{given}; choose from {', '.join(map(repr, LOOKS))}.")
    return list(dict.fromkeys(looks))


def render(image: Image.Image, look: str) -> Image.Image:
    """
    Draws a picture again in a fixed look. Nothing is drawn at random.

    Args:
        image (`PIL.Image.Image`): A picture of any mode; transparency is laid on white.
        look (`str`): One of `LOOKS`.

    Returns:
        `PIL.Image.Image`: An RGB picture of the same size; `poster`, `paint` and `neon` are at most 256 pixels on
        their shorter side.

    Raises:
        ValueError: for another look; names those there are.
    """
    check_looks([look])
    return LOOKS[look](image if image.mode == "RGB" else decode_image(image)).convert("RGB")


class RandomStyle:
    """
    Draws some of the training images again in a random style: one or more of other colours, blur, fewer tones, and
    random convolution (arXiv 2007.13003), chosen and with strengths drawn anew every time.

    None of it is a look of [`render`]: some saturation remains, dark and light do not change places, and tones lie at
    most 32 of 256 apart.

    Args:
        probability (`float`): Share of the images that are drawn again, in [0, 1].
    """

    def __init__(self, probability: float) -> None:
        if not 0 <= probability <= 1:
            raise ValueError(f"`probability` is a share of the images in [0, 1], got {probability}.")
        self.probability = probability

    def __call__(self, image: Image.Image, rng: random.Random) -> Image.Image:
        """
        Returns the RGB image or its new rendering, of the same size or reduced to 384 pixels on its shorter side;
        `rng` is the only source of chance.
        """
        if rng.random() >= self.probability:
            return image
        chosen = rng.randrange(1, 2 ** len(_CHANGES))
        for number, change in enumerate(_CHANGES):
            if chosen >> number & 1:
                image = change(image, rng)
        return image

    def __repr__(self) -> str:
        return f"{type(self).__name__}(probability={self.probability})"


def _random_colors(image: Image.Image, rng: random.Random) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    shift = rng.randrange(256)
    image = Image.merge("HSV", (hue.point(lambda tone: (tone + shift) % 256), saturation, value)).convert("RGB")
    for enhance, low, high in (
        (ImageEnhance.Color, 0.3, 2.0),
        (ImageEnhance.Brightness, 0.6, 1.4),
        (ImageEnhance.Contrast, 0.5, 1.5),
    ):
        image = enhance(image).enhance(rng.uniform(low, high))
    return image


def _random_blur(image: Image.Image, rng: random.Random) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.003, 0.015) * min(image.size)))


def _random_tones(image: Image.Image, rng: random.Random) -> Image.Image:
    step = rng.uniform(16, 32)
    offset = rng.uniform(0, step)
    return image.point(lambda tone: min(255, max(0, round((tone + offset) // step * step + step / 2 - offset))))


def _random_convolution(image: Image.Image, rng: random.Random) -> Image.Image:
    image = _reduced(image, _CONVOLVED_SIDE)
    size = rng.choice((1, 3, 5))
    kernel = np.random.default_rng(rng.getrandbits(64)).standard_normal((3, 3, size, size), dtype=np.float32)
    pixels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1)
    padded = np.pad(pixels, ((0, 0), (size // 2,) * 2, (size // 2,) * 2), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, pixels.shape[1:], axis=(1, 2))
    mixed = np.zeros_like(pixels)
    # Not by a matrix product, whose last bits depend on the number of threads.
    for source, row, column in np.ndindex(3, size, size):
        mixed += kernel[:, source, row, column, None, None] * windows[source, row, column]
    # Dark stays dark, and lightness and contrast stay those of the picture: the other changes are for these.
    mixed -= mixed.mean(axis=(1, 2), keepdims=True)
    light = pixels.mean(axis=0) - pixels.mean()
    mixed *= np.where((mixed * light).mean(axis=(1, 2), keepdims=True) < 0, -1, 1)
    mixed = mixed * (pixels.std() / max(mixed.std(), 1e-6)) + pixels.mean()
    share = rng.random()
    result = np.clip(share * pixels + (1 - share) * mixed, 0, 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(result.transpose(1, 2, 0)))


_CHANGES = (_random_colors, _random_blur, _random_tones, _random_convolution)


__all__ = ["LOOKS", "RandomStyle", "check_looks", "render"]
