"""Images that carry an identity in their pixels, and what real collections do to images.

Every image is a grid of coloured blocks drawn from its identity, so that decoded pixels tell which image they belong
to and whether they are right.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo


GRID, BLOCK = 4, 16
SIDE = GRID * BLOCK
# Means of blocks differ by less after any lossy format, and by more between two identities.
TOLERANCE = 28


@dataclass
class Dirty:
    """
    What became of an image.

    `expected` holds the colours of the blocks after a right decoding, None where the image has to be reported. With
    `may_fail` both are right outcomes. `place` is where the image lies if not as a file: "missing", "folder", "pipe",
    "null".
    """

    content: bytes = b""
    expected: np.ndarray | None = None
    extension: str = "png"
    may_fail: bool = False
    place: str = "file"
    alternatives: list[np.ndarray] = field(default_factory=list)


def colors(identity: int) -> np.ndarray:
    """The colours `(4, 4, 3)` of an identity's blocks, far from those of any other and from themselves when turned."""
    rng = np.random.default_rng((7, identity))
    return rng.choice(np.array([16, 128, 240], dtype=np.uint8), size=(GRID, GRID, 3))


def draw(blocks: np.ndarray) -> Image.Image:
    """The image with these blocks."""
    return Image.fromarray(np.kron(blocks, np.ones((BLOCK, BLOCK, 1), dtype=np.uint8)))


def read_colors(image: Image.Image) -> np.ndarray:
    """Mean colours `(4, 4, 3)` of the middles of the blocks; NaN if the image has another size."""
    if image.size != (SIDE, SIDE) or image.mode != "RGB":
        return np.full((GRID, GRID, 3), np.nan)
    tiles = np.asarray(image, dtype=np.float64).reshape(GRID, BLOCK, GRID, BLOCK, 3)
    return tiles[:, 4:-4, :, 4:-4].mean(axis=(1, 3))


def matches(found: np.ndarray, expected: np.ndarray) -> bool:
    """Whether every block has the expected colour."""
    return bool((np.abs(found - expected) <= TOLERANCE).all())


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def grey(blocks: np.ndarray) -> np.ndarray:
    """The blocks as PIL turns them to grey, in three channels."""
    return np.repeat(np.asarray(Image.fromarray(blocks).convert("L"))[:, :, None], 3, axis=2)


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_header(width: int, height: int, content: bytes = b"") -> bytes:
    """A PNG that claims a size, whatever it holds."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", content) + _chunk(b"IEND", b"")


Rng = np.random.Generator
Mutation = Callable[[np.ndarray, Rng], Dirty]
MUTATIONS: dict[str, Mutation] = {}


def _named(name: str) -> Callable[[Mutation], Mutation]:
    def add(function: Mutation) -> Mutation:
        MUTATIONS[name] = function
        return function

    return add


# Formats and modes: all of these are good images


def _plain(kind: str, extension: str, **options) -> Mutation:
    return lambda blocks, rng: Dirty(encode(draw(blocks), kind, **options), blocks, extension)


MUTATIONS |= {
    "png": _plain("PNG", "png"),
    "jpeg": _plain("JPEG", "jpg", quality=92, subsampling=0),
    "jpeg, progressive": _plain("JPEG", "JPEG", quality=92, subsampling=0, progressive=True),
    "webp": _plain("WEBP", "webp", quality=95),
    "webp, lossless": _plain("WEBP", "webp", lossless=True),
    "gif": _plain("GIF", "gif"),
    "bmp": _plain("BMP", "bmp"),
    "tiff": _plain("TIFF", "tif"),
    "jpeg 2000": _plain("JPEG2000", "jp2"),
    "ppm": _plain("PPM", "ppm"),
    "comment with control characters": _plain(
        "JPEG", "jpg", quality=92, subsampling=0, comment=b"\x00\x07\x1b[31m\xff"
    ),
}


@_named("CMYK")
def _cmyk(blocks: np.ndarray, rng: Rng) -> Dirty:
    kind, extension = (("JPEG", "jpg"), ("TIFF", "tif"))[rng.integers(2)]
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    return Dirty(encode(draw(blocks).convert("CMYK"), kind, **options), blocks, extension)


@_named("16-bit")
def _sixteen_bit(blocks: np.ndarray, rng: Rng) -> Dirty:
    levels = np.asarray(draw(blocks).convert("L")).astype(np.uint16) * 257
    kind = ("PNG", "TIFF", "PPM")[rng.integers(3)]
    return Dirty(
        encode(Image.fromarray(levels), kind), grey(blocks), {"PNG": "png", "TIFF": "tif", "PPM": "pgm"}[kind]
    )


@_named("16-bit with a transparent level")
def _sixteen_bit_transparent(blocks: np.ndarray, rng: Rng) -> Dirty:
    levels = np.asarray(draw(blocks).convert("L")).astype(np.uint16) * 257
    level, expected = int(levels[0, 0]), grey(blocks)
    plain = encode(Image.fromarray(levels), "PNG")
    content = plain[:33] + _chunk(b"tRNS", struct.pack(">H", level)) + plain[33:]
    return Dirty(content, np.where(expected == expected[0, 0], 255, expected))


@_named("floats")
def _floats(blocks: np.ndarray, rng: Rng) -> Dirty:
    levels = np.asarray(draw(blocks).convert("L")).astype(np.float32)
    return Dirty(encode(Image.fromarray(levels / (255, 1)[rng.integers(2)]), "TIFF"), grey(blocks), "tiff")


@_named("palette")
def _palette(blocks: np.ndarray, rng: Rng) -> Dirty:
    image = draw(blocks).quantize(32, dither=Image.Dither.NONE)
    return Dirty(encode(image, ("PNG", "GIF")[rng.integers(2)]), blocks)


@_named("palette with transparency")
def _palette_transparent(blocks: np.ndarray, rng: Rng) -> Dirty:
    image = draw(blocks).quantize(32, dither=Image.Dither.NONE)
    clear = image.getpixel((0, 0))
    expected = np.where((blocks == blocks[0, 0]).all(axis=2, keepdims=True), 255, blocks)
    return Dirty(encode(image, ("PNG", "GIF")[rng.integers(2)], transparency=clear), expected)


@_named("colour key")
def _color_key(blocks: np.ndarray, rng: Rng) -> Dirty:
    key = tuple(int(value) for value in blocks[0, 0])
    expected = np.where((blocks == blocks[0, 0]).all(axis=2, keepdims=True), 255, blocks)
    return Dirty(encode(draw(blocks), "PNG", transparency=key), expected)


@_named("alpha")
def _alpha(blocks: np.ndarray, rng: Rng) -> Dirty:
    share = rng.choice([0, 51, 255], size=(GRID, GRID, 1))
    expected = (blocks * (share / 255) + 255 * (1 - share / 255)).astype(np.uint8)
    image = draw(np.concatenate([blocks, share.astype(np.uint8)], axis=2))
    kind = ("PNG", "WEBP", "TIFF")[rng.integers(3)]
    return Dirty(encode(image, kind, **({"lossless": True} if kind == "WEBP" else {})), expected, kind.lower())


@_named("grey with alpha")
def _grey_alpha(blocks: np.ndarray, rng: Rng) -> Dirty:
    image = draw(blocks).convert("LA")
    image.putalpha(Image.new("L", image.size, 51))
    return Dirty(encode(image, "PNG"), (grey(blocks) * 0.2 + 255 * 0.8).astype(np.uint8))


@_named("two levels")
def _two_levels(blocks: np.ndarray, rng: Rng) -> Dirty:
    image = draw(blocks).convert("1", dither=Image.Dither.NONE)
    return Dirty(encode(image, ("PNG", "TIFF")[rng.integers(2)]), np.where(grey(blocks) > 127, 255, 0))


@_named("animation: the first frame counts")
def _animation(blocks: np.ndarray, rng: Rng) -> Dirty:
    kind, extension = (("GIF", "gif"), ("WEBP", "webp"), ("PNG", "png"), ("TIFF", "tif"))[rng.integers(4)]
    others = [draw(255 - blocks), draw(blocks[::-1])]
    options = {"lossless": True} if kind == "WEBP" else {}
    return Dirty(encode(draw(blocks), kind, save_all=True, append_images=others, **options), blocks, extension)


@_named("EXIF orientation")
def _orientation(blocks: np.ndarray, rng: Rng) -> Dirty:
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    orientation = int(rng.integers(2, 9))
    exif = Image.Exif()
    exif[0x0112] = orientation
    kind, options = [
        ("JPEG", {"quality": 95, "subsampling": 0}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
    ][rng.integers(4)]
    stored = draw(blocks).transpose(undo[orientation])
    return Dirty(encode(stored, kind, exif=exif, **options), blocks, kind.lower())


@_named("damaged EXIF")
def _damaged_exif(blocks: np.ndarray, rng: Rng) -> Dirty:
    exif = Image.Exif()
    exif[0x0112] = 1
    content = bytearray(exif.tobytes())
    # Not the orientation itself, whose every value is a valid statement.
    for place in rng.choice(np.array([*range(6, 16), *range(26, len(content))]), 3):
        content[place] ^= 1 << int(rng.integers(8))
    return Dirty(encode(draw(blocks), "PNG", exif=bytes(content)), blocks, alternatives=_turned(blocks))


def _turned(blocks: np.ndarray) -> list[np.ndarray]:
    flipped = blocks[:, ::-1]
    return [np.rot90(start, turns) for start in (blocks, flipped) for turns in range(4)]


@_named("orientation of no meaning")
def _odd_orientation(blocks: np.ndarray, rng: Rng) -> Dirty:
    exif = Image.Exif()
    exif[0x0112] = int(rng.choice([0, 9, 255, 65535]))
    return Dirty(encode(draw(blocks), "JPEG", quality=95, subsampling=0, exif=exif), blocks, "jpg")


@_named("wrong extension")
def _wrong_extension(blocks: np.ndarray, rng: Rng) -> Dirty:
    return Dirty(
        encode(draw(blocks), ("PNG", "GIF", "BMP")[rng.integers(3)]), blocks, ("jpg", "webp")[rng.integers(2)]
    )


@_named("rubbish behind the image")
def _rubbish_behind(blocks: np.ndarray, rng: Rng) -> Dirty:
    return Dirty(encode(draw(blocks), "PNG") + rng.bytes(200), blocks, may_fail=True)


# Damage


@_named("truncated")
def _truncated(blocks: np.ndarray, rng: Rng) -> Dirty:
    kind, extension = (
        ("PNG", "png"),
        ("JPEG", "jpg"),
        ("WEBP", "webp"),
        ("GIF", "gif"),
        ("BMP", "bmp"),
        ("TIFF", "tif"),
    )[rng.integers(6)]
    content = encode(draw(blocks), kind, **({"quality": 92, "subsampling": 0} if kind == "JPEG" else {}))
    # What is lost may be empty, such as the mark of the end: then the pixels have to be right.
    return Dirty(content[: int(rng.integers(1, len(content)))], blocks, extension, may_fail=True)


@_named("cut in half")
def _halved(blocks: np.ndarray, rng: Rng) -> Dirty:
    kind = ("PNG", "JPEG", "WEBP", "BMP")[rng.integers(4)]
    content = encode(draw(blocks), kind)
    return Dirty(content[: len(content) // 2], None, kind.lower())


@_named("changed bit in a PNG")
def _changed_bit(blocks: np.ndarray, rng: Rng) -> Dirty:
    content = bytearray(encode(draw(blocks), "PNG"))
    content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    return Dirty(bytes(content), blocks, may_fail=True)


def _bad(make: Callable[[Rng], bytes], extension: str = "jpg", place: str = "file") -> Mutation:
    return lambda blocks, rng: Dirty(make(rng), None, extension, place=place)


_SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9"/></svg>'
_EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n0 0 64 64 rectfill showpage\n%%EOF\n"
_TGA = struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, 2, 2, 24, 0) + bytes(12)

MUTATIONS |= {
    "zero bytes": _bad(lambda rng: b""),
    "some zeros": _bad(lambda rng: bytes(int(rng.integers(1, 4000)))),
    "random bytes": _bad(lambda rng: b"\xfa" + rng.bytes(int(rng.integers(1, 4000)))),
    "SVG named .jpg": _bad(lambda rng: _SVG),
    "text named .jpg": _bad(lambda rng: b"404 Not Found\n" * int(rng.integers(1, 50))),
    "HTML named .jpg": _bad(lambda rng: b"<!DOCTYPE html><html><body>Access denied</body></html>"),
    "a program's drawing (EPS)": _bad(lambda rng: _EPS),
    "a format without signature (TGA)": _bad(lambda rng: _TGA),
    "X bitmap in text": _bad(lambda rng: b"#define a_width 8\n#define a_height 1\nstatic char a_bits[] = {0x01};\n"),
    "claims 65,535 x 65,535 pixels": _bad(lambda rng: png_header(65535, 65535), "png"),
    "claims 4,294,967,295 pixels a side": _bad(lambda rng: png_header(2**32 - 1, 2**32 - 1), "png"),
    "claims no pixels": _bad(lambda rng: png_header(0, int(rng.integers(0, 9))), "png"),
    "decompression bomb": _bad(lambda rng: png_header(20000, 20000, zlib.compress(bytes(4_000_000))), "png"),
    "a line of pixels": _bad(lambda rng: encode(Image.new("RGB", (1, 20000)), "PNG"), "png"),
    "32-bit integers": _bad(lambda rng: encode(Image.new("I", (64, 64), 2**30), "TIFF"), "tif"),
    "negative integers": _bad(lambda rng: encode(Image.new("I", (64, 64), -5), "TIFF"), "tif"),
    "floats that are not numbers": _bad(lambda rng: encode(Image.new("F", (64, 64), float("nan")), "TIFF"), "tif"),
    "floats without a known white": _bad(lambda rng: encode(Image.new("F", (64, 64), 1e6), "TIFF"), "tif"),
    "no file": _bad(lambda rng: b"", place="missing"),
    "a folder instead of a file": _bad(lambda rng: b"", place="folder"),
    "a pipe instead of a file": _bad(lambda rng: b"", place="pipe"),
    "no image": _bad(lambda rng: b"", place="null"),
}


@_named("PNG with 10 MB of compressed text")
def _text_bomb(blocks: np.ndarray, rng: Rng) -> Dirty:
    info = PngInfo()
    info.add_text("comment", "a" * 10_000_000, zip=True)
    return Dirty(encode(draw(blocks), "PNG", pnginfo=info), blocks, may_fail=True)
