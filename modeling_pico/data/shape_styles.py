"""How the scenes of the styled-shapes data are drawn: shapes as outlines, rendering styles as functions of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps


Point = tuple[float, float]
Color = tuple[int, int, int]

COLORS: dict[str, Color] = {
    "red": (222, 32, 36),
    "orange": (255, 138, 20),
    "yellow": (240, 200, 0),
    "green": (38, 160, 48),
    "turquoise": (20, 190, 190),
    "blue": (34, 80, 225),
    "purple": (132, 48, 200),
    "pink": (255, 120, 190),
}


def _star(points: int, inner: float) -> list[Point]:
    radii = [1.0, inner] * points
    return [(r * math.sin(math.pi * i / points), -r * math.cos(math.pi * i / points)) for i, r in enumerate(radii)]


def _turn(count: int = 40) -> list[float]:
    return [2 * math.pi * i / count for i in range(count)]


def _circle(radius: float) -> list[Point]:
    return [(radius * math.cos(a), radius * math.sin(a)) for a in _turn()]


def _heart(a: float) -> Point:
    height = 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)
    return math.sin(a) ** 3 * 1.02, -height / 15.5 - 0.12


_ARM = 0.36
# Outlines in a circle of about radius 1, y downwards; the second list of a shape is its hole.
SHAPES: dict[str, tuple[list[Point], list[Point]]] = {
    "circle": (_circle(0.95), []),
    "square": ([(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)], []),
    "triangle": ([(0.0, -0.98), (0.98, 0.78), (-0.98, 0.78)], []),
    "star": (_star(5, 0.42), []),
    "cross": (
        [
            (-_ARM, -1.0), (_ARM, -1.0), (_ARM, -_ARM), (1.0, -_ARM), (1.0, _ARM), (_ARM, _ARM),
            (_ARM, 1.0), (-_ARM, 1.0), (-_ARM, _ARM), (-1.0, _ARM), (-1.0, -_ARM), (-_ARM, -_ARM),
        ],
        [],
    ),
    "ring": (_circle(1.0), _circle(0.5)),
    "diamond": ([(0.0, -1.05), (0.68, 0.0), (0.0, 1.05), (-0.68, 0.0)], []),
    "heart": ([_heart(a) for a in _turn()], []),
}  # fmt: skip


class Item(NamedTuple):
    """One object as drawn: a key of `SHAPES`, its pure colour, centre and radius in shares of the side, rotation."""

    shape: str
    color: Color
    x: float
    y: float
    radius: float
    angle: float


def _outlines(item: Item, side: int) -> list[list[Point]]:
    c, s, r = math.cos(item.angle), math.sin(item.angle), item.radius * side
    return [
        [(item.x * side + r * (c * x - s * y), item.y * side + r * (s * x + c * y)) for x, y in points]
        for points in SHAPES[item.shape]
        if points
    ]


def _filled(outlines: list[list[Point]], side: int) -> Image.Image:
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    for fill, outline in zip((255, 0), outlines, strict=False):
        draw.polygon(outline, fill=fill)
    return mask


def _mask(item: Item, side: int) -> Image.Image:
    return _filled(_outlines(item, side), side)


def _strokes(draw: ImageDraw.ImageDraw, item: Item, side: int, fill: Color | int, width: float) -> None:
    for outline in _outlines(item, side):
        draw.line([*outline, *outline[:2]], fill=fill, width=max(1, round(width * side)), joint="curve")


def _mix(color: Color, other: Color, share: float) -> Color:
    """`color` with a share of `other`."""
    return tuple(round(a + (b - a) * share) for a, b in zip(color, other, strict=True))  # type: ignore[return-value]


BLACK, WHITE = (0, 0, 0), (255, 255, 255)


def _canvas(color: Color, side: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (side, side), color)
    return image, ImageDraw.Draw(image)


def draw_flat(items: list[Item], side: int, rng: np.random.Generator) -> Image.Image:
    """Plain fill on white."""
    image, _ = _canvas(WHITE, side)
    for item in items:
        image.paste(item.color, mask=_mask(item, side))
    return image


def draw_outline(items: list[Item], side: int, rng: np.random.Generator) -> Image.Image:
    """Coloured contours on white, nothing filled."""
    image, draw = _canvas(WHITE, side)
    for item in items:
        _strokes(draw, item, side, item.color, 0.03)
    return image


@lru_cache(maxsize=64)
def _hatching(side: int, step: int, degrees: int) -> Image.Image:
    """Parallel lines over the whole canvas, as a mask."""
    big = side * 2
    lines = Image.new("L", (big, big))
    draw = ImageDraw.Draw(lines)
    for x in range(0, big, step):
        draw.line([(x, 0), (x, big)], fill=255, width=max(1, round(step * 0.42)))
    lines = lines.rotate(degrees, resample=Image.Resampling.BICUBIC)
    return lines.crop((side // 2, side // 2, side // 2 + side, side // 2 + side))


def draw_hatched(items: list[Item], side: int, rng: np.random.Generator) -> Image.Image:
    """Parallel lines within a thin dark contour, on pale paper; each object has its own direction."""
    paper = (250, 246, 232)
    image, draw = _canvas(paper, side)
    for item in items:
        mask = _mask(item, side)
        image.paste(paper, mask=mask)
        lines = _hatching(side, max(3, round(side * 0.055)), int(rng.choice([20, 45, 70, 110, 135, 160])))
        image.paste(item.color, mask=ImageChops.multiply(mask, lines))
        _strokes(draw, item, side, _mix(item.color, BLACK, 0.45), 0.012)
    return image


@lru_cache(maxsize=1)
def _ball_light() -> Image.Image:
    """Light on a ball lit from the upper left, 128 being the object's own colour."""
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    light = 150 - 95 * np.hypot(x + 0.35, y + 0.4) + 130 * np.exp(-(((x + 0.38) ** 2 + (y + 0.42) ** 2) / 0.06))
    return Image.fromarray(np.clip(light, 0, 255).astype(np.uint8))


def draw_shaded(items: list[Item], side: int, rng: np.random.Generator) -> Image.Image:
    """Three-dimensional look: light from the upper left with a highlight, and a cast shadow on a grey floor."""
    image = ImageOps.colorize(Image.linear_gradient("L").resize((side, side)), (226, 230, 238), (150, 156, 170))
    for item in items:
        mask = _mask(item, side)
        offset = round(0.035 * side)
        shadow = ImageChops.offset(mask, offset, offset).resize((side // 4, side // 4))
        shadow = shadow.filter(ImageFilter.BoxBlur(side * 0.006)).resize((side, side)).point(lambda v: v * 0.5)
        image.paste((40, 42, 55), mask=shadow)
        reach = round(item.radius * side * 1.05)
        light = Image.new("L", (side, side))
        corner = (round(item.x * side) - reach, round(item.y * side) - reach)
        light.paste(_ball_light().resize((2 * reach, 2 * reach)), corner)
        dark = _mix(item.color, BLACK, 0.72)
        image.paste(ImageOps.colorize(light, dark, WHITE, mid=item.color, midpoint=128), mask=mask)
    return image


def draw_pixel(items: list[Item], side: int, rng: np.random.Generator) -> Image.Image:
    """Coarse pixels with a dark rim on a pale chequered ground, like an old video game."""
    grid = 24
    ground = (np.indices((grid, grid)).sum(axis=0) // 2 % 2)[..., None]
    small = Image.fromarray(np.where(ground, (206, 226, 206), (188, 212, 192)).astype(np.uint8))
    for item in items:
        # Off the grid, or turned, so few pixels would lose their symmetry and with it the shape.
        upright = item._replace(angle=0.0, x=round(item.x * grid) / grid, y=round(item.y * grid) / grid)
        mask = _mask(upright, grid * 8).resize((grid, grid), Image.Resampling.BOX).point(lambda v: 255 * (v > 110))
        for dx, dy in ((0, 1), (0, -1), (1, 0), (-1, 0)):
            small.paste(_mix(item.color, BLACK, 0.75), (dx, dy), mask)
        small.paste(item.color, mask=mask)
    return small.resize((side, side), Image.Resampling.NEAREST)


def _wobbly(outline: list[Point], rng: np.random.Generator, amount: float, count: int = 36) -> list[Point]:
    """A closed outline with `count` points and a smooth random displacement of about `amount` pixels."""
    points = np.array([*outline, outline[0]])
    along = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(points, axis=0).T))])
    where = np.linspace(0.0, along[-1], count)
    track = np.stack([np.interp(where, along, points[:, axis]) for axis in (0, 1)], axis=1)
    coarse = rng.normal(0.0, amount, (9, 2))
    shift = np.stack([np.interp(np.linspace(0, 8, count), np.arange(9), coarse[:, axis]) for axis in (0, 1)], axis=1)
    return [(float(x), float(y)) for x, y in track + shift]


def draw_sketch(items: list[Item], side: int, rng: np.random.Generator) -> Image.Image:
    """Several loose strokes around each object and a scribble inside, on grey-brown paper."""
    paper = (214, 202, 182)
    image, draw = _canvas(paper, side)
    for item in items:
        mask = _mask(item, side)
        image.paste(paper, mask=mask)
        scribble = Image.new("L", (side, side))
        pen = ImageDraw.Draw(scribble)
        reach, rows = item.radius * side, 9
        x, y = item.x * side, item.y * side
        zigzag = [
            (
                x + reach * 1.1 * (1 if i % 2 else -1),
                y + reach * (2.2 * i / rows - 1.1) + float(rng.normal(0, 0.01 * side)),
            )
            for i in range(rows + 1)
        ]
        pen.line(zigzag, fill=255, width=max(1, round(0.022 * side)))
        image.paste(item.color, mask=ImageChops.multiply(mask, scribble))
        for outline in _outlines(item, side):
            for _ in range(3):
                line = _wobbly(outline, rng, 0.014 * side)
                draw.line(line, fill=_mix(item.color, BLACK, 0.3), width=max(1, round(0.011 * side)))
    return image


def draw_stippled(items: list[Item], side: int, rng: np.random.Generator) -> Image.Image:
    """Nothing but dots, on cool white."""
    paper = (240, 244, 250)
    image, draw = _canvas(paper, side)
    dot = 0.013 * side
    for item in items:
        # An inner object stands out by a rim of bare paper.
        image.paste(paper, mask=_mask(item._replace(radius=item.radius * 1.25), side))
        mask = np.asarray(_mask(item, side))
        reach = item.radius * side * 1.05
        step = 0.036 * side
        axis = np.arange(-reach, reach, step)
        grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
        dots = grid + rng.uniform(-0.3 * step, 0.3 * step, grid.shape) + (item.x * side, item.y * side)
        dots = np.clip(dots, 0, side - 1)
        inside = mask[dots[:, 1].astype(int), dots[:, 0].astype(int)] > 0
        for x, y in dots[inside].tolist():
            draw.ellipse((x - dot, y - dot, x + dot, y + dot), fill=item.color)
    return image


@lru_cache(maxsize=8)
def _paper_grain(side: int) -> Image.Image:
    grain = np.random.default_rng(0).normal(238.0, 14.0, (side // 3, side // 3))
    return Image.fromarray(np.clip(grain, 0, 255).astype(np.uint8)).resize((side, side), Image.Resampling.BILINEAR)


def draw_watercolor(items: list[Item], side: int, rng: np.random.Generator) -> Image.Image:
    """Pale, uneven washes with soft darker rims on grained paper."""
    paper = (253, 248, 238)
    image = Image.new("RGB", (side, side), paper)
    for item in items:
        mask = _filled([_wobbly(outline, rng, 0.012 * side) for outline in _outlines(item, side)], side)
        soft = mask.filter(ImageFilter.BoxBlur(side * 0.012))
        wide = mask.filter(ImageFilter.BoxBlur(side * 0.04))
        blots = Image.fromarray(rng.integers(90, 190, (4, 4), dtype=np.uint8)).resize(
            (side, side), Image.Resampling.BICUBIC
        )
        image.paste(paper, mask=soft.point(lambda v: v * 0.7))
        image.paste(item.color, mask=ImageChops.multiply(soft, blots))
        rim = ImageChops.subtract(soft, wide)
        image.paste(_mix(item.color, BLACK, 0.15), mask=rim)
    return ImageChops.multiply(image, Image.merge("RGB", [_paper_grain(side)] * 3))


def draw_neon(items: list[Item], side: int, rng: np.random.Generator) -> Image.Image:
    """Glowing contours on black."""
    image = Image.new("RGB", (side, side), (10, 8, 26))
    for item in items:
        tube = Image.new("L", (side, side))
        _strokes(ImageDraw.Draw(tube), item, side, 255, 0.045)
        quarter = (side // 4, side // 4)
        glow = tube.resize(quarter).filter(ImageFilter.BoxBlur(side * 0.012)).resize((side, side))
        image = ImageChops.add(image, ImageOps.colorize(glow, BLACK, item.color))
        image.paste(_mix(item.color, WHITE, 0.25), mask=tube)
        core = Image.new("L", (side, side))
        _strokes(ImageDraw.Draw(core), item, side, 255, 0.012)
        image.paste(_mix(item.color, WHITE, 0.85), mask=core)
    return image


_DRAWINGS: tuple[Callable[[list[Item], int, np.random.Generator], Image.Image], ...] = (
    *(draw_flat, draw_outline, draw_hatched, draw_shaded, draw_pixel, draw_sketch, draw_stippled),
    *(draw_watercolor, draw_neon),
)
STYLES = {draw.__name__.removeprefix("draw_"): draw for draw in _DRAWINGS}
