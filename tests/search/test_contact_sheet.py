"""Contact sheets: what they show, and that no search takes one for a picture."""

from __future__ import annotations

import pytest
from PIL import Image

from modeling_pico.data import BadImageError
from modeling_pico.search import Hit
from modeling_pico.search.contact_sheet import (
    GAP,
    LABEL,
    MARGIN,
    TILE,
    TITLE,
    check_no_sheet,
    contact_sheet,
    picture_file,
    save_sheet,
)


COLOURS = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255), "black": (0, 0, 0), "orange": (255, 165, 0)}


@pytest.fixture
def hits(tmp_path) -> list[Hit]:
    for name in COLOURS:
        Image.new("RGB", (60, 40), name).save(tmp_path / f"{name}.png")
    return [Hit(name, 0.5, str(tmp_path / f"{name}.png")) for name in COLOURS]


def middles(sheet: Image.Image, count: int) -> list[tuple[int, ...]]:
    """The colours in the middle of the tiles."""
    seen = []
    for place in range(count):
        row, column = divmod(place, 4)
        y = MARGIN + TITLE + row * (TILE + LABEL) + TILE // 2
        seen.append(sheet.getpixel((MARGIN + column * (TILE + GAP) + TILE // 2, y)))
    return seen


def test_a_sheet_shows_hits_in_order(hits):
    sheet = contact_sheet("a long query " * 20, hits)
    assert sheet.width == 2 * MARGIN + 4 * (TILE + GAP) - GAP
    assert middles(sheet, 5) == list(COLOURS.values())
    # The title ends inside the margin.
    assert sheet.crop((sheet.width - MARGIN, 0, sheet.width, 84)).getcolors() == [(MARGIN * 84, (255, 255, 255))]


def test_a_picture_that_was_asked_with_is_shown(hits):
    sheet = contact_sheet(Image.new("RGB", (30, 30), "orange"), hits[:2])
    assert sheet.getpixel((MARGIN + 10, MARGIN + 10)) == COLOURS["orange"]
    assert middles(sheet, 2) == [COLOURS["red"], COLOURS["lime"]]


def test_a_picture_that_is_gone_leaves_its_tile_empty(hits, tmp_path):
    (tmp_path / "red.png").unlink()
    hits[1].path = None
    gone, never, blue = middles(contact_sheet("q", hits[:3]), 3)
    assert gone not in COLOURS.values() and never not in COLOURS.values() and blue == COLOURS["blue"]


def test_a_picture_that_moved_is_found_inside_of_the_folder_that_is_named(hits, tmp_path):
    moved = tmp_path / "elsewhere"
    (moved / tmp_path.name).mkdir(parents=True)
    (tmp_path / "red.png").rename(moved / tmp_path.name / "red.png")
    assert picture_file(hits[0]) is None and picture_file(hits[0], [tmp_path / "blue.png"]) is None
    assert picture_file(hits[0], [moved]) == str(moved / tmp_path.name / "red.png")
    assert picture_file(hits[1], [moved]) == hits[1].path  # where it was
    assert picture_file(Hit("id", 0.5, None), [moved]) is None


@pytest.mark.parametrize("name", ["hits.png", "hits.jpg", "hits.webp"])
def test_a_sheet_is_known(hits, tmp_path, name):
    save_sheet(contact_sheet("q", hits), tmp_path / name)
    with Image.open(tmp_path / name) as sheet, pytest.raises(BadImageError, match="contact sheet"):
        check_no_sheet(sheet, name)
    with Image.open(tmp_path / "red.png") as picture:
        check_no_sheet(picture, name)
