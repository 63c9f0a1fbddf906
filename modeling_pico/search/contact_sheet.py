"""Hits of a search on one picture, with a mark by which no later search takes it for a picture of the gallery."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont, ImageOps

from ..model.image_decoding_pico import BadImageError, decode_image
from .files import content_id


if TYPE_CHECKING:
    from .index import Hit


# Folder in that of an index for pictures of data sets, which lie in no files of their own.
PICTURES = "pictures"
# EXIF's name of the software, and formats that are written with it.
_SOFTWARE, _MARK = 0x0131, "PICO contact sheet"
SHEET_FORMATS = (".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# Layout in pixels.
COLUMNS, TILE, GAP, MARGIN, TITLE, LABEL = 4, 240, 20, 32, 52, 54
_PAPER, _CARD, _EDGE, _INK, _FAINT = "white", "#f1f2f4", "#d9dce1", "#1c1e21", "#7a7f87"


def contact_sheet(
    query: str | Image.Image, hits: Sequence[Hit], folders: Sequence[str | os.PathLike] = ()
) -> Image.Image:
    r"""
    The query and below it the hits in rows, best first, each with its rank, name and score.

    Args:
        query (`str` or `PIL.Image.Image`): What was searched for.
        hits (`Sequence[Hit]`): What was found. The tile of one whose file is gone, changed or never was says so.
        folders (`Sequence[str]`, *optional*): Where files are looked for that are gone, see [`find_picture`].

    Returns:
        `PIL.Image.Image`: to be written by [`save_sheet`].
    """
    large, small = ImageFont.load_default(26), ImageFont.load_default(15)
    columns = min(max(len(hits), 2), COLUMNS)
    rows = -(-len(hits) // columns)
    inside = columns * TILE + (columns - 1) * GAP
    top = MARGIN + TITLE
    sheet = Image.new("RGB", (inside + 2 * MARGIN, top + rows * (TILE + LABEL) + MARGIN - 18), _PAPER)
    draw = ImageDraw.Draw(sheet)
    if isinstance(query, str):
        draw.text((MARGIN, MARGIN + 12), _shortened(f"“{query}”", large, inside), _INK, large, anchor="lm")
    else:
        shown = ImageOps.contain(decode_image(query), (inside // 2, TITLE), Image.Resampling.LANCZOS)
        sheet.paste(shown, (MARGIN, MARGIN - 14))
        draw.text((MARGIN + shown.width + 14, MARGIN + 12), "and what is like it", _INK, large, anchor="lm")
    corners = Image.new("L", (2 * TILE, 2 * TILE))
    ImageDraw.Draw(corners).rounded_rectangle((0, 0, 2 * TILE - 1, 2 * TILE - 1), 28, fill=255)
    corners = corners.resize((TILE, TILE), Image.Resampling.LANCZOS)
    for place, hit in enumerate(hits):
        row, column = divmod(place, columns)
        x, y = MARGIN + column * (TILE + GAP), top + row * (TILE + LABEL)
        picture = ImageOps.pad(hit_picture(hit, folders), (TILE, TILE), Image.Resampling.LANCZOS, color=_CARD)
        sheet.paste(picture, (x, y), corners)
        draw.rounded_rectangle((x, y, x + TILE - 1, y + TILE - 1), 14, outline=_EDGE)
        score, middle = f"{hit.score:.3f}", y + TILE + 18
        name = _shortened(f"{place + 1}. {hit_name(hit)}", small, TILE - int(small.getlength(score)) - 14)
        draw.text((x + 2, middle), name, _INK, small, anchor="lm")
        draw.text((x + TILE - 2, middle), score, _FAINT, small, anchor="rm")
    return sheet


def save_sheet(sheet: Image.Image, path: str | os.PathLike) -> None:
    """Writes a contact sheet with its mark in the format of the name's suffix; ValueError for one without marks."""
    if Path(path).suffix.lower() not in SHEET_FORMATS:
        raise ValueError(f"A contact sheet must end in one of {', '.join(SHEET_FORMATS)}, got {str(path)!r}.")
    exif = Image.Exif()
    exif[_SOFTWARE] = _MARK
    sheet.save(path, exif=exif)


def check_no_sheet(image: Image.Image, source: str) -> None:
    """`BadImageError` for a contact sheet of an earlier search, which is no picture of a gallery."""
    try:
        software = image.getexif().get(_SOFTWARE)
    except Exception:  # damaged metadata does not make the pixels useless
        return
    if software == _MARK:
        raise BadImageError(f"{source} is a contact sheet of an earlier search.")


def find_picture(hit: Hit, folders: Sequence[str | os.PathLike] = ()) -> Image.Image | None:
    """
    The picture of a hit: of the file at its path or, where that has gone, at the end of its path in one of the folders
    that it may have moved to. None unless a file there still has the content that was indexed.
    """
    if hit.path is None:
        return None
    parts = Path(hit.path).parts[1:]
    ends = (Path(folder, *parts[start:]) for folder in folders for start in range(len(parts)))
    for path in (Path(hit.path), *ends):
        try:
            content = path.read_bytes() if path.is_file() else b""
            if content_id(content) == hit.id:
                return decode_image(content)
        except (OSError, BadImageError):
            continue
    return None


def hit_name(hit: Hit) -> str:
    """What a hit is called where there is little room."""
    return Path(hit.path).name if hit.path else hit.id


def hit_picture(hit: Hit, folders: Sequence[str | os.PathLike] = ()) -> Image.Image:
    """The picture of a hit, or a card that says that there is none any more."""
    picture = find_picture(hit, folders)
    if picture is None:
        picture, middle = Image.new("RGB", (TILE, TILE), _CARD), (TILE / 2, TILE / 2)
        ImageDraw.Draw(picture).text(middle, "no picture here", _FAINT, ImageFont.load_default(15), anchor="mm")
    return picture


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Cuts a text to a width in pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


__all__ = [
    "PICTURES",
    "SHEET_FORMATS",
    "check_no_sheet",
    "contact_sheet",
    "find_picture",
    "hit_name",
    "hit_picture",
    "save_sheet",
]
