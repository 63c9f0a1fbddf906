"""Generated scenes of coloured shapes in several rendering styles: small data that needs no download."""

from __future__ import annotations

import io
from functools import lru_cache
from itertools import combinations, product
from typing import NamedTuple

import datasets
import numpy as np

from .shape_styles import COLORS, SHAPES, STYLES, Item


TRAIN_STYLES = ("flat", "outline", "hatched", "shaded", "pixel", "sketch", "stippled")
VALIDATION_STYLE = "watercolor"
TEST_STYLE = "neon"

SPLITS: dict[str, int] = {"train": 2000, "validation": 400, "validation_seen": 400, "test": 400}
STYLES_PER_TRAIN_SCENE = 2
# Images are drawn larger and then reduced, which smooths the edges.
SUPERSAMPLING = 4
SHARE_OF_PAIRS = 0.4
# A tenth of all compositions each; the others are for training.
_HELD_OUT = ("validation", "validation_seen", "test")

Kind = tuple[str, str]  # colour, shape


class _Object(NamedTuple):
    size: str
    color: str
    shape: str

    def __str__(self) -> str:
        return f"{self.size} {self.color} {self.shape}"


class _Layout(NamedTuple):
    """Centres of the objects (shares of the side) and how the five manners of speech tell the positions."""

    centers: tuple[tuple[float, float], ...]
    code: str
    spots: tuple[str, ...]
    sentences: tuple[str, ...]
    passive: str


_LOW, _MID, _HIGH = 0.26, 0.5, 0.74
# Radii as shares of the side: two large neighbours, jittered towards each other, still do not touch.
_RADII = {"small": 0.135, "large": 0.2}
_INNER_RADII = {"small": 0.175, "large": 0.42}
_SHIFT, _GROWTH, _TURN = 0.02, 0.04, 0.12
_LAYOUTS: dict[int, tuple[_Layout, ...]] = {
    2: (
        _Layout(
            ((_LOW, _MID), (_HIGH, _MID)),
            "left_of",
            ("left", "right"),
            ("{a} is to the left of {b}.", "{b} is to the right of {a}."),
            "{a} which has been placed on the left-hand side of {b}",
        ),
        _Layout(
            ((_MID, _LOW), (_MID, _HIGH)),
            "above",
            ("top", "bottom"),
            ("{a} is above {b}.", "{b} is below {a}."),
            "{a} which has been placed higher up than {b}",
        ),
        _Layout(
            ((_MID, _MID), (_MID, _MID)),
            "inside",
            ("inner", "outer"),
            ("{a} is inside {b}.", "{b} is around {a}."),
            "{a} which has been enclosed by {b}",
        ),
    ),
    3: (
        _Layout(
            ((_MID, _LOW), (_LOW, _HIGH), (_HIGH, _HIGH)),
            "above_both",
            ("top", "bottom left", "bottom right"),
            ("{a} is above {b} on the left and {c} on the right.", "{b} and, to its right, {c} are below {a}."),
            "{a} which has been placed higher up than both {b} and {c}, the latter being on the right-hand side",
        ),
        _Layout(
            ((_MID, _HIGH), (_LOW, _LOW), (_HIGH, _LOW)),
            "below_both",
            ("bottom", "top left", "top right"),
            ("{a} is below {b} on the left and {c} on the right.", "{b} and, to its right, {c} are above {a}."),
            "{a} which has been placed lower down than both {b} and {c}, the latter being on the right-hand side",
        ),
    ),
}


class _Scene(NamedTuple):
    objects: tuple[_Object, ...]
    layout: _Layout

    @property
    def identity(self) -> str:
        return f"{self.layout.code}: {', '.join(map(str, self.objects))}"


def styled_shapes(
    split: str, *, num_scenes: int | None = None, image_size: int = 48, seed: int = 0
) -> datasets.Dataset:
    """
    Generates scenes of two or three coloured shapes, drawn in a style and described in five manners.

    `train` shows each scene in two of seven styles, as two rows with one `image_id`. The other splits hold other
    scenes, one row each: `validation` in a style that training never shows (`watercolor`), `test` in another such
    style (`neon`), and `validation_seen` in the styles of training, so that the loss due to the unseen style can be
    told from the loss due to new scenes.

    A composition, the set of the objects' colours and shapes, belongs to exactly one split whatever the seed and
    occurs in it once, so that no two scenes of a split fit the same caption. Captions speak of left and right: do not
    mirror the images in training.

    Args:
        split (`str`):
            `"train"`, `"validation"`, `"validation_seen"` or `"test"`.
        num_scenes (`int`, *optional*):
            Number of scenes; 2,000 for `train` (4,000 images) and 400 for the others by default.
        image_size (`int`, *optional*, defaults to 48):
            Side of the square images in pixels, at least 24.
        seed (`int`, *optional*, defaults to 0):
            Chooses the scenes, their details and styles.

    Returns:
        `datasets.Dataset`: with the columns `image` (PNG bytes, not decoded), `captions`, `image_id` and `style`.

    Raises:
        ValueError: for an unknown split or a number out of range.
    """
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r} of styled_shapes. Should be one of {list(SPLITS)}.")
    pairs, triples = _compositions()[split]
    num_scenes = SPLITS[split] if num_scenes is None else num_scenes
    if not 1 <= num_scenes <= len(pairs) + len(triples):
        raise ValueError(
            f"The split {split!r} has 1 to {len(pairs) + len(triples)} scenes, got num_scenes={num_scenes}."
        )
    if image_size < 24 or seed < 0:
        raise ValueError(f"`image_size` must be at least 24 and `seed` not negative, got {image_size} and {seed}.")

    rng = np.random.default_rng((seed, list(SPLITS).index(split)))
    num_pairs = max(min(len(pairs), round(num_scenes * SHARE_OF_PAIRS)), num_scenes - len(triples))
    chosen = [pairs[i] for i in rng.permutation(len(pairs))[:num_pairs]]
    chosen += [triples[i] for i in rng.permutation(len(triples))[: num_scenes - num_pairs]]
    rows: dict[str, list] = {"image": [], "captions": [], "image_id": [], "style": []}
    for index in rng.permutation(num_scenes).tolist():
        scene = _arrange(chosen[index], rng)
        captions = _describe(scene, rng)
        for style in _styles_of(split, rng):
            rows["image"].append({"bytes": _render(scene, style, image_size, rng), "path": None})
            rows["captions"].append(captions)
            rows["image_id"].append(scene.identity)
            rows["style"].append(style)
    features = datasets.Features(
        image=datasets.Image(decode=False),
        captions=datasets.List(datasets.Value("string")),
        image_id=datasets.Value("string"),
        style=datasets.Value("string"),
    )
    return datasets.Dataset.from_dict(rows, features=features, split=split)


@lru_cache(maxsize=1)
def _compositions() -> dict[str, tuple[list[tuple[Kind, ...]], list[tuple[Kind, ...]]]]:
    """The compositions of two and of three objects that belong to each split; the same for every seed."""
    kinds = list(product(COLORS, SHAPES))
    splits: dict[str, tuple[list, list]] = {split: ([], []) for split in SPLITS}
    rng = np.random.default_rng(20251110)
    for place, count in enumerate((2, 3)):
        everything = list(combinations(kinds, count))
        order = rng.permutation(len(everything))
        tenth = len(everything) // 10
        for number, split in enumerate(_HELD_OUT):
            splits[split][place].extend(everything[i] for i in order[number * tenth : (number + 1) * tenth])
        splits["train"][place].extend(everything[i] for i in order[len(_HELD_OUT) * tenth :])
    return splits


def _arrange(composition: tuple[Kind, ...], rng: np.random.Generator) -> _Scene:
    """Draws what the composition leaves open: the order of the objects, their sizes, their layout."""
    kinds = [composition[i] for i in rng.permutation(len(composition))]
    layouts = [
        layout
        for layout in _LAYOUTS[len(kinds)]
        # The outer object must have room for the inner one, and another colour to stand out from it.
        if layout.code != "inside" or (kinds[1][1] in ("circle", "square") and kinds[0][0] != kinds[1][0])
    ]
    layout = layouts[rng.integers(len(layouts))]
    sizes = [("small", "large")[i] for i in rng.integers(2, size=len(kinds))]
    if layout.code == "inside":
        sizes = ["small", "large"]
    return _Scene(tuple(_Object(size, *kind) for size, kind in zip(sizes, kinds, strict=True)), layout)


def _styles_of(split: str, rng: np.random.Generator) -> list[str]:
    if split == "validation":
        return [VALIDATION_STYLE]
    if split == "test":
        return [TEST_STYLE]
    count = STYLES_PER_TRAIN_SCENE if split == "train" else 1
    return [TRAIN_STYLES[i] for i in rng.permutation(len(TRAIN_STYLES))[:count]]


def _describe(scene: _Scene, rng: np.random.Generator) -> list[str]:
    """Five captions of one scene: tags, sentence, shortcode, long-winded description, properties."""
    objects, layout = scene.objects, scene.layout
    names = dict(zip("abc", (f"a {o}" for o in objects), strict=False))
    tags = ", ".join(f"{o.color} {o.shape} {spot}" for o, spot in zip(objects, layout.spots, strict=True))
    sentence = layout.sentences[rng.integers(len(layout.sentences))].format(**names)
    shortcode = f":{layout.code}:" + "".join(f":{o.color}_{o.shape}:" for o in objects)
    long_names = (f"a {o.shape} of {o.size} size that has been coloured {o.color}" for o in objects)
    passive = layout.passive.format(**dict(zip("abc", long_names, strict=False)))
    shapes, colours, sizes = (
        ", ".join(values) for values in zip(*((o.shape, o.color, o.size) for o in objects), strict=True)
    )
    properties = f"shapes: {shapes}; colours: {colours}; sizes: {sizes}; positions: {', '.join(layout.spots)}"
    long = f"In this picture there can be seen {passive}."
    return [tags, sentence[0].upper() + sentence[1:], shortcode, long, properties]


def _render(scene: _Scene, style: str, image_size: int, rng: np.random.Generator) -> bytes:
    items = []
    inside = scene.layout.code == "inside"
    for thing, (x, y) in zip(scene.objects, scene.layout.centers, strict=True):
        radius = (_INNER_RADII if inside else _RADII)[thing.size] * (1 + rng.uniform(-_GROWTH, _GROWTH))
        dx, dy = rng.uniform(-_SHIFT, _SHIFT, 2)
        angle = rng.uniform(-_TURN, _TURN)
        items.append(Item(thing.shape, COLORS[thing.color], x + dx, y + dy, radius, angle))
    if inside:
        items.reverse()  # the outer object is drawn first
    image = STYLES[style](items, image_size * SUPERSAMPLING, rng)
    image = image.reduce(SUPERSAMPLING)
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()
