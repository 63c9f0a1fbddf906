from __future__ import annotations

import importlib
import re

import numpy as np
import pytest

from modeling_pico.data import decode_image, styled_shapes


module = importlib.import_module("modeling_pico.data.styled_shapes")
styles = importlib.import_module("modeling_pico.data.shape_styles")


def composition(image_id):
    """Colours and shapes of a scene, read from its identity."""
    return frozenset(tuple(words.split()[1:]) for words in image_id.split(": ")[1].split(", "))


def test_columns_and_sizes():
    data = styled_shapes("train", num_scenes=10, image_size=32)
    assert data.column_names == ["image", "captions", "image_id", "style"]
    assert len(data) == 20
    assert len(set(data["image_id"])) == 10
    for row in data:
        image = decode_image(row["image"])
        assert image.size == (32, 32)
        assert len(set(row["captions"])) == 5
        assert np.asarray(image).std() > 5


def test_a_training_scene_has_two_styles_and_one_meaning():
    data = styled_shapes("train", num_scenes=30)
    by_id: dict[str, list] = {}
    for row in data:
        by_id.setdefault(row["image_id"], []).append(row)
    for rows in by_id.values():
        assert len({row["style"] for row in rows}) == 2
        assert rows[0]["captions"] == rows[1]["captions"]
    assert set(data["style"]) <= set(module.TRAIN_STYLES)


def test_deterministic_by_seed():
    first, again, other = (styled_shapes("test", num_scenes=12, seed=seed) for seed in (4, 4, 5))
    assert first[:] == again[:]
    assert first["image_id"][:] != other["image_id"][:]


def test_held_out_styles():
    assert len(module.TRAIN_STYLES) >= 5
    assert {module.VALIDATION_STYLE, module.TEST_STYLE}.isdisjoint(module.TRAIN_STYLES)
    assert set(styles.STYLES) == {*module.TRAIN_STYLES, module.VALIDATION_STYLE, module.TEST_STYLE}
    assert set(styled_shapes("validation", num_scenes=20)["style"]) == {module.VALIDATION_STYLE}
    assert set(styled_shapes("test", num_scenes=20)["style"]) == {module.TEST_STYLE}
    assert set(styled_shapes("validation_seen", num_scenes=100)["style"]) == set(module.TRAIN_STYLES)


def test_no_composition_in_two_splits_whatever_the_seed():
    seen: dict[frozenset, str] = {}
    for split, groups in module._compositions().items():
        for kinds in (*groups[0], *groups[1]):
            assert seen.setdefault(frozenset(kinds), split) == split
    assert len(seen) == 2016 + 41664  # 64 choose 2 and 64 choose 3
    for seed in (0, 1):
        for split in ("validation", "test"):
            data = styled_shapes(split, num_scenes=40, seed=seed)
            assert {seen[composition(image_id)] for image_id in data["image_id"]} == {split}


def test_scenes_of_a_split_differ_in_every_caption():
    data = styled_shapes("validation", num_scenes=200)
    assert len({composition(image_id) for image_id in data["image_id"]}) == 200
    for manner in range(5):
        assert len({captions[manner] for captions in data["captions"]}) == 200


def test_captions_tell_the_scene():
    red, blue = module._Object("large", "red", "circle"), module._Object("small", "blue", "star")
    left_of = module._LAYOUTS[2][0]
    captions = module._describe(module._Scene((red, blue), left_of), np.random.default_rng(0))
    assert captions[0] == "red circle left, blue star right"
    assert captions[1] in (
        "A large red circle is to the left of a small blue star.",
        "A small blue star is to the right of a large red circle.",
    )
    assert captions[2] == ":left_of::red_circle::blue_star:"
    assert re.fullmatch(
        r"In this picture there can be seen a circle of large size .* left-hand side of a star .*", captions[3]
    )
    assert captions[4] == ("shapes: circle, star; colours: red, blue; sizes: large, small; positions: left, right")


def test_position_and_colour_are_drawn():
    left = styles.Item("square", (255, 0, 0), 0.26, 0.5, 0.2, 0.0)
    right = styles.Item("circle", (0, 0, 255), 0.74, 0.5, 0.2, 0.0)
    for name, draw in styles.STYLES.items():
        pixels = np.asarray(draw([left, right], 192, np.random.default_rng(0)), dtype=int)
        redness = pixels[..., 0] - pixels[..., 2]
        half = redness.shape[1] // 2
        assert redness[:, :half].max() > 80, name
        assert redness[:, half:].min() < -60, name
        assert redness[:, :half].mean() > redness[:, half:].mean() + 10, name


def test_large_neighbours_do_not_touch():
    reach = module._RADII["large"] * (1 + module._GROWTH) + module._SHIFT
    assert 2 * reach < module._HIGH - module._LOW
    assert module._LOW - reach > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, "Unknown split 'dev'.*'train', 'validation', 'validation_seen', 'test'"),
        ({"split": "test", "num_scenes": 0}, "has 1 to 4367 scenes, got num_scenes=0"),
        ({"split": "test", "num_scenes": 4368}, "got num_scenes=4368"),
        ({"split": "test", "image_size": 8}, "at least 24.*got 8"),
        ({"split": "test", "seed": -1}, "not negative"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        styled_shapes(**arguments)
