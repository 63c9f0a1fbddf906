from __future__ import annotations

import hashlib
import importlib
import multiprocessing
import random
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from PIL import Image

from modeling_pico.data import LOOKS, CaptionedImageDataset, Compose, RandomCropFlip, RandomStyle, SampleKey, render
from modeling_pico.data import styled_shapes as shapes


# The function of the same name stands before it.
looks = importlib.import_module("modeling_pico.data.looks")

SIZE = (90, 60)


def picture(size: tuple[int, int] = SIZE, seed: int = 0) -> Image.Image:
    """Soft spots of many colours."""
    rng = np.random.default_rng(seed)
    spots = Image.fromarray(rng.integers(0, 256, (8, 12, 3), dtype=np.uint8))
    return spots.resize(size, Image.Resampling.BICUBIC)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(np.int64)


def digests() -> list[str]:
    image = picture()
    drawn = [render(image, look) for look in LOOKS]
    drawn += [RandomStyle(1.0)(image, random.Random(seed)) for seed in range(20)]
    return [hashlib.blake2b(one.tobytes()).hexdigest() for one in drawn]


def test_every_process_draws_the_same():
    here = digests()
    assert len(set(here)) == len(here)
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as pool:
        assert pool.submit(digests).result() == here == digests()


# Fixed looks


@pytest.mark.parametrize("look", LOOKS)
def test_a_look_is_another_picture_of_the_same_size(look):
    image = picture()
    before = image.tobytes()
    drawn = render(image, look)
    assert (drawn.mode, drawn.size) == ("RGB", SIZE) and image.tobytes() == before
    assert np.abs(pixels(drawn) - pixels(image)).mean() > 5
    # Which of two pictures it shows can still be told.
    flat = drawn.convert("L").resize((9, 6), Image.Resampling.BOX)
    assert np.asarray(flat).std() > 3


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "P", "1", "CMYK", "I;16"])
def test_pictures_of_every_kind_and_size(look, mode):
    for size in ((1, 1), (1, 40), (40, 1), (2, 3), (30, 20)):
        image = picture(size).convert("I" if mode == "I;16" else mode)
        if mode == "I;16":
            image = image.convert("I;16")
        drawn = render(image, look)
        assert (drawn.mode, drawn.size) == ("RGB", size)
    one_color = render(Image.new("RGB", (50, 50), (200, 30, 90)), look)
    assert len(one_color.getcolors()) == 1


def test_transparency_is_white_paper():
    drawn = render(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), "negative")
    assert drawn.getpixel((3, 3)) == (0, 0, 0)


def test_gray_has_equal_channels_and_keeps_lightness():
    image = picture()
    red, green, blue = np.moveaxis(pixels(render(image, "gray")), -1, 0)
    assert (red == green).all() and (green == blue).all()
    expected = pixels(image) @ [0.299, 0.587, 0.114]
    assert np.abs(red - expected).max() <= 1


def test_negative_twice_is_the_picture():
    image = picture()
    assert (pixels(render(image, "negative")) == 255 - pixels(image)).all()
    assert render(render(image, "negative"), "negative").tobytes() == image.tobytes()


def test_sketch_is_white_paper_with_dark_lines_where_lightness_changes():
    image = Image.new("RGB", (100, 100), (220, 210, 90))
    image.paste((30, 60, 200), (50, 0, 100, 100))
    drawn = pixels(render(image, "sketch"))[50, :, 0]
    assert (drawn[:35] == 255).all() and (drawn[65:] == 255).all()
    assert drawn[50:52].max() < 60


def test_poster_has_four_tones_a_channel():
    assert set(np.unique(pixels(render(picture(), "poster")))) <= {0, 85, 170, 255}
    # Paper stays white, ink black.
    image = Image.new("RGB", (60, 60), "white")
    image.paste("black", (0, 0, 60, 30))
    assert sorted(color for _, color in render(image, "poster").getcolors()) == [(0, 0, 0), (255, 255, 255)]


def test_paint_has_few_colors_in_broad_strokes():
    image = picture((160, 160))
    dots = pixels(image)
    dots[::8, ::8] = 255 - dots[::8, ::8]
    drawn = render(Image.fromarray(dots.astype(np.uint8)), "paint")
    assert len(drawn.getcolors()) <= 24
    # Single dots are painted over, and colours stay about what they were.
    assert np.abs(pixels(drawn) - pixels(image)).mean() < 25
    assert np.abs(pixels(drawn)[::8, ::8] - pixels(image)[::8, ::8]).mean() < 30


@pytest.mark.parametrize("side", [16, 72, 160, 400])
def test_neon_is_bright_edges_on_black(side):
    """On small pictures the window was a single pixel, and nothing was left."""
    image = Image.new("RGB", (side, side), "white")
    image.paste((200, 30, 30), (side // 2, 0, side, side))
    drawn = pixels(render(image, "neon")).max(axis=-1)[drawn_row(side)]
    assert drawn[: len(drawn) // 4].max() == drawn[-len(drawn) // 4 :].max() == 0
    assert drawn[len(drawn) // 2 - 1 : len(drawn) // 2 + 1].max() > 150


def drawn_row(side: int) -> int:
    return min(side, 256) // 2


def test_mosaic_has_flat_cells():
    drawn = pixels(render(picture((400, 200)), "mosaic"))
    cells = drawn.reshape(40, 5, 80, 5, 3)
    assert (cells == cells[:, :1, :, :1]).all()
    expected = pixels(picture((400, 200))).reshape(40, 5, 80, 5, 3).mean(axis=(1, 3))
    assert np.abs(cells[:, 0, :, 0] - expected).max() <= 1
    small = render(picture((16, 16)), "mosaic")
    assert len(small.getcolors()) <= 64


@pytest.mark.parametrize("look", LOOKS)
def test_a_large_picture_gets_the_look_of_a_small_one(look):
    large, small = render(picture((1200, 800)), look), render(picture((300, 200)), look)
    assert large.size in ((1200, 800), (384, 256))
    difference = pixels(large.resize((60, 40), Image.Resampling.BOX)) - pixels(
        small.resize((60, 40), Image.Resampling.BOX)
    )
    assert np.abs(difference).mean() < 12


def test_unknown_look_is_refused_by_name():
    with pytest.raises(ValueError, match="There is no look 'grey'; choose from 'gray', 'sketch'"):
        render(picture(), "grey")
    with pytest.raises(ValueError, match="No look is named; choose from 'gray'"):
        looks.check_looks([])
    assert looks.check_looks(["neon", "gray", "neon"]) == ["neon", "gray"]


# Random styles


def test_probability_is_the_share_that_is_drawn_again():
    image = picture()
    assert all(RandomStyle(0.0)(image, random.Random(seed)) is image for seed in range(50))
    changed = [RandomStyle(1.0)(image, random.Random(seed)).tobytes() for seed in range(100)]
    assert len(set(changed)) == 100 and image.tobytes() not in changed
    half = sum(RandomStyle(0.5)(image, random.Random(seed)) is not image for seed in range(200))
    assert 80 < half < 120
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"`probability` is a share of the images in \[0, 1\], got"):
            RandomStyle(wrong)


def test_the_generator_of_the_sample_is_the_only_source_of_chance():
    image = picture()
    first = [RandomStyle(0.7)(image, random.Random(seed)).tobytes() for seed in range(30)]
    random.seed(1)
    np.random.seed(1)
    assert [RandomStyle(0.7)(image, random.Random(seed)).tobytes() for seed in range(30)] == first
    # One generator draws anew every time.
    rng = random.Random(0)
    assert len({RandomStyle(1.0)(image, rng).tobytes() for _ in range(10)}) == 10


def test_no_random_style_is_a_look_of_the_stress_test():
    image = picture((80, 80))
    light = pixels(image).mean(axis=-1).ravel()
    saturated = []
    for seed in range(200):
        drawn = pixels(RandomStyle(1.0)(image, random.Random(seed)))
        assert drawn.shape == (80, 80, 3)
        # Neither a negative: what was dark stays darker.
        assert np.corrcoef(drawn.mean(axis=-1).ravel(), light)[0, 1] > 0.1, seed
        saturated.append((drawn.max(axis=-1) - drawn.min(axis=-1)).max())
    assert min(saturated) > 10
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    for seed in range(50):
        drawn = looks._random_tones(ramp, random.Random(seed))
        assert 8 <= len(drawn.getcolors()) <= 17
        assert np.abs(pixels(drawn) - pixels(ramp)).max() <= 17


@pytest.mark.parametrize("size", [(1, 1), (1, 30), (30, 1), (3, 2), (700, 500)])
def test_random_styles_of_pictures_of_every_size(size):
    image = picture(size)
    expected = {size, (round(size[0] * 384 / min(size)), round(size[1] * 384 / min(size)))}
    for seed in range(30):
        drawn = RandomStyle(1.0)(image, random.Random(seed))
        assert drawn.mode == "RGB" and drawn.size in (expected if min(size) > 384 else {size})


def test_random_convolution_by_hand(monkeypatch):
    image = picture((12, 8))
    rng = random.Random(3)
    size = random.Random(3).choice((1, 3, 5))
    drawn = pixels(looks._random_convolution(image, rng))
    again = random.Random(3)
    assert again.choice((1, 3, 5)) == size
    kernel = np.random.default_rng(again.getrandbits(64)).standard_normal((3, 3, size, size), dtype=np.float32)
    share = again.random()
    values = pixels(image).astype(float)
    half = size // 2
    padded = np.pad(values, ((half, half), (half, half), (0, 0)), mode="edge")
    mixed = np.zeros_like(values)
    for row in range(8):
        for column in range(12):
            window = padded[row : row + size, column : column + size]
            for channel in range(3):
                mixed[row, column, channel] = (window * kernel[channel].transpose(1, 2, 0)).sum()
    for channel in range(3):
        mixed[..., channel] -= mixed[..., channel].mean()
        if (mixed[..., channel] * (values.mean(axis=-1) - values.mean())).mean() < 0:
            mixed[..., channel] *= -1
    mixed = mixed * values.std() / mixed.std() + values.mean()
    expected = np.clip(share * values + (1 - share) * mixed, 0, 255)
    assert np.abs(drawn - expected).max() < 1.01


def test_a_crop_comes_before_the_style_and_is_the_same_without_it():
    table = shapes("train", num_scenes=4)
    crop, style = RandomCropFlip(0.5), RandomStyle(1.0)
    both, cropped = (CaptionedImageDataset(table, transform) for transform in (Compose([crop, style]), crop))
    for seed in range(5):
        key = SampleKey(0, 0, seed)
        rng = random.Random(seed)
        expected = style(crop(both[0]["image"], rng), rng)
        assert both[key]["image"].tobytes() == expected.tobytes() != cropped[key]["image"].tobytes()
    # Evaluation sees the pictures as they are.
    assert both[0]["image"].tobytes() == cropped[0]["image"].tobytes()
