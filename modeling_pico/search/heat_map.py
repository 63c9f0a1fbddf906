"""Where words match a picture: similarities of patches, laid on what the model sees."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw


# Viridis at equal distances from its lowest to its highest colour: light is high, whatever one can tell apart.
_COLOURS = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]])
_OUTLINE = "#D55E00"
_OPACITY = 0.6
_SIDE = 320


def heat_maps(picture: Image.Image, similarity: np.ndarray, grid: tuple[int, int]) -> list[Image.Image]:
    r"""
    For each word a map of its similarity with every patch, on the picture in grey, with its best patch outlined. All
    maps share one scale, dark to light, from the least to the greatest similarity of all.

    Args:
        picture (`PIL.Image.Image`): The part of the picture that the patches cover, in any size.
        similarity (`numpy.ndarray` of shape `(patches, words)`): Similarities, patches row by row.
        grid (`tuple[int, int]`): Rows and columns of patches.

    Returns:
        `list[PIL.Image.Image]`: as many as there are words, in the proportions of the picture, the longer side of
        320 pixels or a little more.

    Raises:
        ValueError: if the patches are not those of the grid.
    """
    rows, columns = grid
    if similarity.ndim != 2 or len(similarity) != rows * columns:
        raise ValueError(f"A grid of {rows} x {columns} patches has no similarities of shape {similarity.shape}.")
    scale = _SIDE / max(picture.size)
    # Whole pixels a patch, so that patches are of one size.
    height, width = (
        max(1, round(side * scale / count)) * count
        for side, count in ((picture.height, rows), (picture.width, columns))
    )
    grey = np.asarray(picture.convert("L").resize((width, height), Image.Resampling.LANCZOS), np.float64)[..., None]
    low, high = (similarity.min(), similarity.max()) if similarity.size else (0.0, 0.0)
    shares = (similarity - low) / max(high - low, 1e-6)
    maps = []
    for word in range(similarity.shape[1]):
        heat = _coloured(shares[:, word]).reshape(rows, columns, 3)
        heat = heat.repeat(height // rows, axis=0).repeat(width // columns, axis=1)
        drawn = Image.fromarray(np.rint(_OPACITY * heat + (1 - _OPACITY) * grey).astype(np.uint8))
        _outline(drawn, [int(similarity[:, word].argmax())], grid)
        maps.append(drawn)
    return maps


def _coloured(shares: np.ndarray) -> np.ndarray:
    """Colours `(n, 3)` of numbers in [0, 1]."""
    places = np.linspace(0, 1, len(_COLOURS))
    return np.stack([np.interp(shares, places, channel) for channel in _COLOURS.T], axis=-1)


def _outline(picture: Image.Image, patches: Sequence[int], grid: tuple[int, int]) -> None:
    draw, (rows, columns) = ImageDraw.Draw(picture), grid
    height, width = picture.height // rows, picture.width // columns
    for patch in patches:
        row, column = divmod(patch, columns)
        x, y = column * width, row * height
        draw.rectangle((x, y, x + width - 1, y + height - 1), outline=_OUTLINE, width=3)


__all__ = ["heat_maps"]
