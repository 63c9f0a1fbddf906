"""Maps of words on pictures."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from modeling_pico.search.heat_map import heat_maps


LOW, HIGH = np.array([68, 1, 84]), np.array([253, 231, 37])


def test_each_patch_has_the_colour_of_its_similarity_on_one_scale():
    similarity = np.array([[0.0, 0.5], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    first, second = heat_maps(Image.new("RGB", (90, 60), (200, 200, 200)), similarity, (2, 3))
    assert first.size == (321, 214)  # 3 x 107 and 2 x 107 pixels
    colour = {"low": 0.6 * LOW + 80, "high": 0.6 * HIGH + 80, "middle": 0.6 * np.array([33, 145, 140]) + 80}

    def at(drawn: Image.Image, row: int, column: int) -> np.ndarray:
        return np.array(drawn.getpixel((column * 107 + 53, row * 107 + 53)))

    assert np.abs(at(first, 0, 1) - colour["high"]).max() <= 1
    assert np.abs(at(second, 0, 0) - colour["middle"]).max() <= 1  # half of the best of all words
    for drawn, (row, column) in ((first, (0, 0)), (first, (1, 2)), (second, (1, 0)), (second, (0, 1))):
        assert np.abs(at(drawn, row, column) - colour["low"]).max() <= 1


def test_the_best_patch_is_outlined():
    similarity = np.zeros((4, 1))
    similarity[2] = 1
    (drawn,) = heat_maps(Image.new("RGB", (40, 40)), similarity, (2, 2))
    outline = (np.asarray(drawn) == (0xD5, 0x5E, 0x00)).all(axis=-1)
    rows, columns = np.nonzero(outline)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (160, 319, 0, 159)


def test_a_picture_is_seen_through_its_map():
    picture = Image.new("RGB", (40, 40), "black")
    picture.paste("white", (0, 0, 20, 40))
    (drawn,) = heat_maps(picture, np.zeros((1, 1)), (1, 1))
    white, black = (np.array(drawn.getpixel((x, 160)), dtype=float) for x in (80, 240))
    assert np.abs(white - black - 0.4 * 255).max() <= 1


def test_patches_that_are_no_grid_are_refused():
    with pytest.raises(ValueError, match=r"A grid of 2 x 3 patches has no similarities of shape \(7, 1\)"):
        heat_maps(Image.new("RGB", (9, 9)), np.zeros((7, 1)), (2, 3))
