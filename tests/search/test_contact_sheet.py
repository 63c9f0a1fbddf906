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
    SHEET_FORMATS,
    TILE,
    TITLE,
    check_no_sheet,
    contact_sheet,
    find_picture,
    save_sheet,
)
from modeling_pico.search.files import content_id


COLOURS = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255), "black": (0, 0, 0), "orange": (255, 165, 0)}


@pytest.fixture
def hits(tmp_path) -> list[Hit]:
    for name in COLOURS:
        Image.new("RGB", (60, 40), name).save(tmp_path / f"{name}.png")
    paths = [tmp_path / f"{name}.png" for name in COLOURS]
    return [Hit(content_id(path.read_bytes()), 0.5, str(path)) for path in paths]


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
    # Another picture of that name, where it would be looked for last.
    Image.new("RGB", (60, 40), "black").save(moved / "red.png")
    assert find_picture(hits[0]) is None and find_picture(hits[0], [tmp_path / "blue.png"]) is None
    assert find_picture(hits[0], [moved]).getpixel((9, 9)) == COLOURS["red"]
    (moved / tmp_path.name / "red.png").unlink()
    assert find_picture(hits[0], [moved]) is None
    assert find_picture(hits[1], [moved]).getpixel((9, 9)) == COLOURS["lime"]  # where it was
    assert find_picture(Hit("id", 0.5, None), [moved]) is None


def test_a_picture_that_changed_since_it_was_indexed_is_not_shown_as_the_one_that_was_scored(hits, tmp_path):
    Image.new("RGB", (60, 40), "blue").save(tmp_path / "red.png")
    assert find_picture(hits[0]) is None and middles(contact_sheet("q", hits[:1]), 1)[0] != COLOURS["blue"]


def test_a_format_without_the_mark_is_refused(hits, tmp_path):
    for name in ("hits.bmp", "hits.gif", "hits.jp2", "hits.psd", "hits"):
        with pytest.raises(ValueError, match="must end in one of .jpeg, .jpg, .png"):
            save_sheet(contact_sheet("q", hits), tmp_path / name)


@pytest.mark.parametrize("name", [f"hits{suffix}" for suffix in SHEET_FORMATS])
def test_a_sheet_is_known(hits, tmp_path, name):
    save_sheet(contact_sheet("q", hits), tmp_path / name)
    with Image.open(tmp_path / name) as sheet, pytest.raises(BadImageError, match="contact sheet"):
        check_no_sheet(sheet, name)
    with Image.open(tmp_path / "red.png") as picture:
        check_no_sheet(picture, name)
