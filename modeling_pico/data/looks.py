"""
Pictures drawn again in other looks: fixed ones, by which a style stress test measures, and random ones, with which a
training is augmented. The two have no look in common.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageChops, ImageEnhance, ImageFilter, ImageOps


# Shorter side, in pixels, to which larger pictures are reduced first: filters take time with the square of their size.
MAX_SIDE = 256


def _radius(image: Image.Image, share: float) -> float:
    # Relative to the picture, so that a large file gets the same look as a small one.
    return max(1.0, share * min(image.size))


def _odd_size(image: Image.Image, share: float) -> int:
    return 2 * round(_radius(image, share) / 2) + 1


def _gray(image: Image.Image) -> Image.Image:
    return ImageOps.grayscale(image)


def _negative(image: Image.Image) -> Image.Image:
    return ImageOps.invert(image)


def _sketch(image: Image.Image) -> Image.Image:
    # A photograph divided by a blurred copy of itself leaves lines on white paper ("colour dodge").
    gray = ImageOps.grayscale(image)
    light = np.asarray(gray, dtype=np.float32)
    surround = np.asarray(gray.filter(ImageFilter.GaussianBlur(_radius(image, 0.02))), dtype=np.float32)
    lines = np.clip(light / np.maximum(surround, 1), 0, 1)
    return Image.fromarray((255 * lines**4).astype(np.uint8))


def _poster(image: Image.Image) -> Image.Image:
    flat = ImageOps.autocontrast(image).filter(ImageFilter.MedianFilter(_odd_size(image, 0.03)))
    return ImageEnhance.Color(ImageOps.posterize(flat, 2)).enhance(2.0)


def _paint(image: Image.Image) -> Image.Image:
    # Every spot takes the most frequent of few tones around it, as a broad brush would; bands are 'L' pictures.
    few = image.quantize(24, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    palette = few.getpalette()
    strokes = Image.fromarray(np.asarray(few)).filter(ImageFilter.ModeFilter(_odd_size(image, 0.045)))
    strokes.putpalette(palette)
    return strokes


def _neon(image: Image.Image) -> Image.Image:
    smooth = image.filter(ImageFilter.GaussianBlur(_radius(image, 0.006)))
    edges = ImageChops.difference(
        smooth.filter(ImageFilter.MaxFilter(_odd_size(image, 0.012))),
        smooth.filter(ImageFilter.MinFilter(_odd_size(image, 0.012))),
    )
    return ImageEnhance.Color(ImageOps.autocontrast(edges, cutoff=(0, 1))).enhance(2.5)


def _mosaic(image: Image.Image) -> Image.Image:
    width, height = image.size
    cells = 28 / min(width, height)
    small = image.resize((max(1, round(width * cells)), max(1, round(height * cells))), Image.Resampling.BOX)
    return small.resize(image.size, Image.Resampling.NEAREST)


LOOKS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "gray": _gray,
    "sketch": _sketch,
    "poster": _poster,
    "paint": _paint,
    "neon": _neon,
    "mosaic": _mosaic,
    "negative": _negative,
}


def render(image: Image.Image, look: str) -> Image.Image:
    """
    Draws a picture again in a fixed look. Nothing is drawn at random.

    Args:
        image (`PIL.Image.Image`): An RGB picture.
        look (`str`): One of [`LOOKS`].

    Returns:
        `PIL.Image.Image`: An RGB picture of the same size, or reduced to 256 pixels on its shorter side.

    Raises:
        ValueError: for another look; names those there are.
    """
    if look not in LOOKS:
        raise ValueError(f"There is no look {look!r}; choose from {', '.join(map(repr, LOOKS))}.")
    if min(image.size) > MAX_SIDE:
        factor = MAX_SIDE / min(image.size)
        image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.LANCZOS)
    return LOOKS[look](image).convert("RGB")


class RandomStyle:
    """
    Draws some of the training images again in a random style: colours, blur, fewer tones, and random convolution
    (arXiv 2007.13003), each with probability one half and with strengths of its own every time.

    None of it is a look of [`LOOKS`]: saturation never reaches zero, colours are not inverted, and eight tones or
    more a channel remain.

    Args:
        probability (`float`): Share of the images that are drawn again, in [0, 1].
    """

    def __init__(self, probability: float) -> None:
        if not 0 <= probability <= 1:
            raise ValueError(f"`probability` is a share of the images in [0, 1], got {probability}.")
        self.probability = probability

    def __call__(self, image: Image.Image, rng: random.Random) -> Image.Image:
        """Returns the image or its new rendering, of the same size; `rng` is the only source of chance."""
        if rng.random() >= self.probability:
            return image
        for change in (_random_colors, _random_blur, _random_tones, _random_convolution):
            if rng.random() < 0.5:
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
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.0, 0.015) * min(image.size)))


def _random_tones(image: Image.Image, rng: random.Random) -> Image.Image:
    return ImageOps.posterize(image, rng.randint(3, 5))


def _random_convolution(image: Image.Image, rng: random.Random) -> Image.Image:
    size = rng.choice((1, 3, 5))
    kernel = np.random.default_rng(rng.getrandbits(64)).standard_normal((3, 3, size, size), dtype=np.float32)
    pixels = np.asarray(image, dtype=np.float32)
    padded = np.pad(pixels, ((size // 2,) * 2, (size // 2,) * 2, (0, 0)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(0, 1))
    mixed = np.tensordot(windows, kernel, axes=((2, 3, 4), (1, 2, 3)))
    # Lightness and contrast stay those of the picture: the others change these.
    mixed = (mixed - mixed.mean()) * (pixels.std() / max(mixed.std(), 1e-6)) + pixels.mean()
    share = rng.random()
    return Image.fromarray(np.clip(share * pixels + (1 - share) * mixed, 0, 255).astype(np.uint8))


__all__ = ["LOOKS", "RandomStyle", "render"]
